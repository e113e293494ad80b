"""The promises of a run, by their numbers in faults.md: what is left when something goes wrong, and said."""

import errno
import io
import math
import os
import pickle
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import filelock
import gymnasium
import numpy as np
import pytest
import runs
import torch
from recordings import flags, write
from runs import assert_same_run, before_call, curves_of, folder_in, load, results_of, resume, train

import common.runs
import dac
import dtql
import qvpo_online
from common.bandits import Bandit
from common.cli import UserError, run_command
from common.datasets import load_dataset
from common.runs import Run
from common.tasks import find_task

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the folder of a finished run."""
    return Path(shutil.copytree(finished(dac), tmp_path / "copy"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


def stopped(run_dir, monkeypatch, step=13, script=dac, **changes):
    """The folder of a tiny run that Ctrl-C stopped after this step."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_call(patch, Run, "add_losses", at={step: signal.SIGINT})
        train(run_dir, script, **changes)
    return folder_in(run_dir)


# === 1: killed at any moment (see also test_kills.py) ===
def test_a_crash_in_an_update(finished, script, tmp_path, monkeypatch):
    """Half a step is done, so the last checkpoint stays; what came after it is made again, and drawn once."""
    before = runs.critic_losses_before(script)
    at = {15 + before: RuntimeError("memory")}
    losses = before_call(monkeypatch, runs.agent_class(script), "critic_loss", at)
    with pytest.raises(RuntimeError, match="memory"):
        train(tmp_path, script)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == results_of(folder)["step"] == 8
    resume(folder, script)
    assert len(losses) == before + 15 + 16
    assert_same_run(folder, finished(script))
    assert curves_of(folder) == curves_of(finished(script))


@pytest.mark.parametrize(
    ("count", "end"),
    [(2, RuntimeError("out of cards")), (4, signal.SIGTERM)],
    ids=["crash", "signal at the end"],
)
def test_an_evaluation_that_was_cut_short_is_made_again(count, end, finished, script, tmp_path, monkeypatch):
    """A run that owes its last evaluation is not finished, though no step is left; it is drawn once."""
    before_call(monkeypatch, script, "evaluate", {count: end})
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        train(tmp_path, script)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == 6 * count and not results_of(folder)["finished"]
    assert len(results_of(folder)["evaluations"]) == count - 1
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no room"):
        before_call(patch, common.runs, "write_atomically", {2: UserError("no room")})  # after config.json
        resume(folder, script)
    resume(folder, script)
    assert_same_run(folder, finished(script))
    assert curves_of(folder) == curves_of(finished(script))


def test_killed_between_the_files_of_the_last_save(finished, tmp_path, monkeypatch):
    """checkpoint.pt is the truth; results.json is made whole by the next save."""
    original, calls = common.runs.write_atomically, []

    def write_atomically(path, *what):
        calls.append(path.name)
        if calls.count("checkpoint.pt") >= 3 and path.name == "results.json":
            raise SystemError("power cut")
        return original(path, *what)

    with monkeypatch.context() as patch, pytest.raises(SystemError, match="power cut"):
        patch.setattr(common.runs, "write_atomically", write_atomically)
        train(tmp_path, dac)
    folder = folder_in(tmp_path)
    assert (load(folder)["step"], results_of(folder)["step"]) == (24, 16)
    resume(folder, dac, total_steps=26)
    resumed = resume(Path(shutil.copytree(finished(dac), tmp_path / "copy")), dac, total_steps=26)
    assert results_of(folder)["evaluations"] == resumed["evaluations"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """replay.bin grows in its place; it is there, whole, before the checkpoint that counts on it."""
    events, fsync, replace = [], os.fsync, Path.replace

    def spy_fsync(file):
        fsync(file)
        events.append((os.fstat(file).st_ino, os.fstat(file).st_size))

    def spy_replace(path, target):
        assert events.pop() == (path.stat().st_ino, path.stat().st_size)
        events.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    folder = train(tmp_path, qvpo_online, save_every=8, total_steps=16, eval_episodes=0)
    replay, row_bytes = (folder / "replay.bin").stat().st_ino, 4 * (1 + 2 + 1 + 1 + 1)
    saves = [[(replay, steps * row_bytes), "checkpoint.pt", "results.json"] for steps in (8, 16, 16)]
    assert events == ["config.json", *sum(saves, [])]


OPERATIONS = [(os, "fsync"), (Path, "replace"), (torch, "save"), (common.runs.json, "dumps")]
OPERATIONS += [(common.runs.SummaryWriter, name) for name in ("add_scalar", "flush")]


@pytest.mark.parametrize(("owner", "name"), OPERATIONS, ids=lambda each: getattr(each, "__name__", each))
def test_a_full_disk_at_each_operation(owner, name, finished, copy, monkeypatch):
    """At the second time that it is asked for after a resume: what was saved before is whole, and goes on."""
    with monkeypatch.context() as patch, pytest.raises((UserError, OSError), match="No space left"):
        before_call(patch, owner, name, {2: OSError(errno.ENOSPC, "No space left on device")})
        resume(copy, dac, total_steps=30, save_every=4, log_every=2)
    assert load(copy)["step"] >= 24 and not list(copy.glob("*.tmp"))
    resume(copy, dac, total_steps=31)
    assert results_of(copy)["finished"] and load(copy)["step"] == 31


# === 2: signals ===
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("owner", "method", "call", "step"),
    [(dac.DAC, "actor_loss", 13, 13), (Bandit, "step", 3, 12), (common.runs, "write_atomically", 3, 8)],
    ids=["in an update", "in the second evaluation", "in the first save"],
)
def test_every_signal_ends_a_run_saved(owner, method, call, step, number, finished, tmp_path, monkeypatch):
    before_call(monkeypatch, owner, method, at={call: number})
    handlers = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, dac)
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == results_of(folder)["step"] == step
    resume(folder, dac)
    assert_same_run(folder, finished(dac))


def test_every_script_is_stopped_by_ctrl_c(finished, script, tmp_path, monkeypatch, capsys):
    """Between two points of the curves, which are means: the losses since the last one survive."""
    at = {15 + runs.critic_losses_before(script): signal.SIGINT}
    before_call(monkeypatch, runs.agent_class(script), "critic_loss", at)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, script)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == 15  # the update that was under way is whole
    out = capsys.readouterr().out
    assert "step 15 after " in out and out.endswith(f"stopped: go on with --resume {folder}\n")
    resume(folder / "checkpoint.pt", script)
    assert_same_run(folder, finished(script))
    assert curves_of(folder) == curves_of(finished(script))


def test_a_signal_in_the_pretraining(finished, tmp_path, monkeypatch):
    """The steps of the pretraining that are left follow, then the training."""
    calls = before_call(monkeypatch, dtql.DTQL, "pretrain", at={7: signal.SIGHUP})
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, dtql)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == -3 and not (folder / "pretrained.pt").exists()
    resume(folder, dtql)
    assert len(calls) == 10
    assert_same_run(folder, finished(dtql))
    assert curves_of(folder) == curves_of(finished(dtql))


HANGS = """
import time, dac
from common.bandits import Bandit
from common.cli import run_command
def step(env, action):
    print("hangs", flush=True)
    time.sleep(1e6)
Bandit.step = step
run_command(dac.train, dac.Args, dac.TASK_SETTINGS)
"""


def test_a_step_that_hangs(finished, tmp_path):
    """A second Ctrl-C ends its process; until then nobody else can resume its run (promise 4)."""
    settings = vars(runs.tiny_settings(dac, run_dir=str(tmp_path), save_every=5))
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    process = runs.python("-c", HANGS, *runs.to_words(**given), cwd=runs.ROOT)
    runs.wait_for(lambda: process.stdout.readline() == "hangs\n", process)
    folder = folder_in(tmp_path)
    with pytest.raises(UserError, match=f"{folder} is in use by another process"):
        resume(folder, dac)

    def end_it():
        process.send_signal(signal.SIGINT)  # two that come at once would count as one
        return process.poll() is not None

    runs.wait_for(end_it)
    assert process.returncode == -signal.SIGINT
    resume(folder, dac)
    assert_same_run(folder, finished(dac))


def test_a_signal_that_was_ignored_stays_ignored(tmp_path, monkeypatch):
    """As under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_call(monkeypatch, dac.DAC, "update", at={3: signal.SIGHUP})
        assert results_of(train(tmp_path, dac))["finished"]
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_run_in_a_thread(finished, tmp_path, capsys):
    """As Optuna and Ray Tune start them: no signals there, and it says what such a run is not."""
    with ThreadPoolExecutor() as pool:
        assert results_of(pool.submit(train, tmp_path, dac).result())["finished"]
    assert "not reproducible: threads share PyTorch's random state" in capsys.readouterr().out
    train(tmp_path / "main", dac, total_steps=1)
    assert "not reproducible" not in capsys.readouterr().out


def test_a_notebook(tmp_path, monkeypatch):
    """Its streams have no reconfigure() and no file number; a command runs and returns there."""

    class OutStream(io.TextIOBase):
        text = ""

        def write(self, text):
            OutStream.text += text
            return len(text)

    words = runs.to_words(**runs.AGENTS["dac"][1] | dict(env_id=runs.TASK, run_dir=tmp_path))
    monkeypatch.setattr(sys, "argv", ["dac.py", *words])
    monkeypatch.setattr(sys, "stdout", OutStream())
    monkeypatch.setattr(sys, "stderr", OutStream())
    run_command(dac.train, dac.Args, dac.TASK_SETTINGS)
    assert "finished: " in OutStream.text and results_of(folder_in(tmp_path))["finished"]


# === 3: exceptions ===
@pytest.mark.parametrize(
    ("script", "method", "call", "step"),
    [
        *[(dac, "reset", 1, 6), (dac, "step", 5, 18)],
        *[(qvpo_online, "reset", 4, 2), (qvpo_online, "step", 17, 12)],
    ],
)
def test_an_environment_that_fails(script, method, call, step, finished, tmp_path, monkeypatch):
    """The last finished step is saved, Python's own error is shown, and the run goes on once it is mended."""
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="^out of cards$"):
        before_call(patch, Bandit, method, at={call: ValueError("out of cards")})
        train(tmp_path, script)
    assert load(folder_in(tmp_path))["step"] == results_of(folder_in(tmp_path))["step"] == step
    resume(folder_in(tmp_path), script)
    assert results_of(folder_in(tmp_path))["finished"]
    if script is qvpo_online:
        assert load(folder_in(tmp_path))["memory"]["count"] == 24  # a transition for each step
    else:
        assert_same_run(folder_in(tmp_path), finished(dac))


# === 4: one process per folder ===
@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("name", ["ENOLCK", "ENOTSUP", "ENOSYS"])
def test_a_file_system_without_locks(name, tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    fcntl = SimpleNamespace(**vars(filelock._unix.fcntl) | {"flock": flock})
    monkeypatch.setattr(filelock._unix, "fcntl", fcntl)
    folder = train(tmp_path, dac, total_steps=2)
    resume(folder, dac, total_steps=4)
    assert results_of(folder)["step"] == 4


# === 5: numbers that are not finite ===
def break_critic_loss(monkeypatch, call, script):
    """Make the critics' loss infinite when it is computed for that time."""
    calls, original = [], runs.agent_class(script).critic_loss

    def critic_loss(agent, batch, *draws):
        calls.append(batch)
        if len(calls) == call:
            batch = batch._replace(reward=batch.reward + math.inf)
        return original(agent, batch, *draws)

    monkeypatch.setattr(runs.agent_class(script), "critic_loss", critic_loss)


@pytest.mark.parametrize("save_every", [6, 5])  # first seen when the losses are logged, when they are saved
def test_a_loss_that_is_not_finite(save_every, finished, script, tmp_path, monkeypatch):
    """The run ends, and the last good checkpoint can be resumed."""
    with monkeypatch.context() as patch:
        break_critic_loss(patch, 14 + runs.critic_losses_before(script), script)
        message = r"critic_loss is inf at step 14\b.*; nothing is saved after it in "
        with pytest.raises(UserError, match=message):
            train(tmp_path, script, save_every=save_every, eval_every=100)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == results_of(folder)["step"] == 13 // save_every * save_every
    resume(folder, script, eval_every=6)
    torch.testing.assert_close(load(folder)["agent"], load(finished(script))["agent"], rtol=0, atol=0)


def test_learning_rates_that_are_too_high(script, tmp_path):
    """What they do is seen before an evaluation fails of it."""
    rates = dict(actor_lr=1e18, critic_lr=1e18, log_every=100, save_every=100, eval_every=2)
    with pytest.raises(UserError, match="(loss|norm|weight|bias).* is .*; try a lower learning rate"):
        train(tmp_path, script, **rates)


def test_data_that_are_too_large_are_named(tmp_path):
    observations = np.random.default_rng(0).normal(size=(10, 11))
    observations[:, 7] *= 1e30
    data = write(tmp_path / "data.hdf5", observations=observations)
    given = dict(env_id="hopper-medium-v2", dataset=data, reward_tune="none", eval_episodes=0, log_every=1)
    with pytest.raises(UserError, match=r"observations\[:, 7\].* are up to [\de.+]+: scale them down"):
        train(tmp_path / "runs", dac, **given)


# === 6: nothing that was downloaded is executed (Minari: test_datasets.py) ===
class Malicious:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def write_checkpoint(path, content):
    torch.save(content, path)


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content))


def write_hdf5_of_pickles(path, content):
    write(path, rewards=np.array([np.void(pickle.dumps(content))] * 10))


HOPPER = find_task("Hopper-v4")
READERS = {  # what is read -> its file, how a hostile one is written, what reads it
    "checkpoint": ("checkpoint.pt", write_checkpoint, lambda run: resume(run, dac)),
    "pickle": ("checkpoint.pt", write_pickle, lambda run: resume(run, dac)),
    "replay": ("replay.bin", write_pickle, lambda run: resume(run, qvpo_online, total_steps=30)),
    "data": ("x.hdf5", write_hdf5_of_pickles, lambda run: load_dataset(HOPPER, str(run / "x.hdf5"))),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_shared_file_executes_nothing(reader, finished, tmp_path):
    name, write_hostile, read = READERS[reader]
    run = Path(shutil.copytree(finished(qvpo_online if reader == "replay" else dac), tmp_path / "copy"))
    write_hostile(run / name, Malicious(tmp_path / "harm"))
    with pytest.raises(UserError, match=name):
        read(run)
    assert not (tmp_path / "harm").exists()


# === 7: mistakes ===
def test_a_damaged_checkpoint(copy):
    """Truncated, empty, text, noise, one bit off."""
    path = copy / "checkpoint.pt"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[:9999], b"", b"step 24", np.random.default_rng(0).bytes(5000), flipped):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} is damaged, no checkpoint, or of another version"):
            resume(path, dac, total_steps=30)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"format": 1}, {}, "of another version .*format 1, not 3"),
        ({"args": {"beta": 10}}, {}, "was written by dac.py, or another version of it; resume it with that"),
        ({}, {"script": qvpo_online}, "was written by dac.py, or another version of it; resume it with that"),
        ({}, {"env_id": "bandit-spiral-v0"}, "is of env_id bandit-moons-v0, not bandit-spiral-v0: start"),
        ({}, {"seed": 1}, "is of seed 0, not 1: start a new run"),
        ({}, {"num_qs": 3}, "does not fit: size mismatch for critic_target"),
        ({}, {"total_steps": 24}, "is finished, at step 24; larger --total-steps add more"),
        ({}, {"total_steps": 12}, "is finished, at step 24|past --total-steps 12"),
        ({}, {"path": "none"}, "there is no checkpoint at none"),
    ],
)
def test_a_checkpoint_that_does_not_fit(changes, given, message, copy):
    torch.save(load(copy) | changes, copy / "checkpoint.pt")
    before = contents(copy)
    with pytest.raises(UserError, match=message):
        resume(**{"path": copy, "script": dac, "total_steps": 30} | given)
    after = contents(copy)
    assert {path: after[path] for path in before} == before


def test_more_steps_with_other_settings(copy, capsys):
    """A finished run goes on with more; arguments given on resuming beat those of the checkpoint."""
    resume(copy, dac, total_steps=30, gamma=0.5, log_every=7)
    assert "resumed with total_steps 24 -> 30, gamma 0.99 -> 0.5, log_every 4 -> 7" in capsys.readouterr().out
    config = runs.json.loads((copy / "config.json").read_text())
    expected = {"total_steps": 30, "gamma": 0.5, "log_every": 7, "hidden_dims": [8, 8], "eta_lr": 0.01}
    assert {name: config["args"][name] for name in expected} == expected
    assert {config["sources"][name] for name in expected} == {"given"}
    assert load(copy)["step"] == results_of(copy)["total_steps"] == 30
    assert [each["step"] for each in results_of(copy)["evaluations"]] == [6, 12, 18, 24, 30]


def test_what_the_pretraining_learned_is_used_again(finished, tmp_path, monkeypatch):
    """pretrained.pt is the checkpoint of step 0: with it a run goes on, as it did or with another alpha."""
    pretrained = load(finished(dtql) / "pretrained.pt")
    assert (pretrained["step"], pretrained["results"]["evaluations"]) == (0, [])
    calls = before_call(monkeypatch, dtql.DTQL, "pretrain", at={})
    shutil.copy(finished(dtql) / "pretrained.pt", tmp_path)
    resume(tmp_path / "pretrained.pt", dtql)
    assert_same_run(tmp_path, finished(dtql))
    with pytest.raises(UserError, match=f"{tmp_path} has a checkpoint.pt; copy pretrained.pt elsewhere"):
        resume(tmp_path / "pretrained.pt", dtql, alpha=7.0)
    (tmp_path / "checkpoint.pt").unlink()
    resume(tmp_path / "pretrained.pt", dtql, alpha=7.0)
    losses = [results_of(folder)["losses"]["actor_loss"] for folder in (tmp_path, finished(dtql))]
    assert losses[0] != losses[1] and calls == []


def test_data_that_changed_since_the_start(tmp_path, monkeypatch):
    data = write(tmp_path / "data.hdf5", terminals=flags(4, 9))
    given = dict(env_id="hopper-medium-v2", dataset=data, eval_episodes=0, reward_tune="none")
    folder = stopped(tmp_path / "runs", monkeypatch, **given)
    write(tmp_path / "data.hdf5", terminals=flags(3, 9))
    other = write(tmp_path / "other.hdf5", terminals=flags(3, 9))
    with pytest.raises(UserError, match=f"the data of hopper-medium-v2 .* changed since the run in {folder}"):
        resume(folder, dac)
    resume(folder, dac, dataset=other)
    assert results_of(folder)["finished"] and other in results_of(folder)["data"]


# === Memory ===
class Camera(gymnasium.Env):
    """Pictures of 27,648 numbers, in which nobody gets to a step."""

    observation_space = gymnasium.spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1, 1, (1,))


def test_a_replay_that_does_not_fit_into_memory(tmp_path):
    gymnasium.register("Camera-v0", Camera, max_episode_steps=5)
    with pytest.raises(UserError, match="1,000,000 transitions take 221.2 GB.*: lower --replay-size"):
        qvpo_online.train(qvpo_online.Args(env_id="Camera-v0", run_dir=str(tmp_path / "runs")))
    gymnasium.registry.pop("Camera-v0")
    assert not (tmp_path / "runs").exists()
