"""What goes wrong with runs: signals, crashes, full disks, closed streams, damaged files, infinities."""

import contextlib
import inspect
import math
import os
import pickle
import re
import resource
import shutil
import signal
from pathlib import Path

import benchmark
import evaluate
import numpy as np
import pytest
import report
import runs
import torch
from recordings import flags, write
from runs import assert_same_run, before_call, finish, folder_in, load, results_of, resume, train

import common.runs
import dac
import qvpo_online
from common.bandits import Bandit
from common.datasets import load_dataset
from common.runs import Run
from common.tasks import EnvironmentFailure, UserError


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the folder of a finished run."""
    return Path(shutil.copytree(finished(dac), tmp_path / "copy"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


def stopped(run_dir, monkeypatch, step=13, **changes):
    """The folder of a tiny run of dac.py that Ctrl-C stopped after this step."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_call(patch, Run, "record", at={step: signal.SIGINT})
        train(run_dir, dac, **changes)
    return folder_in(run_dir)


def test_the_table_of_faults_names_tests_that_exist():
    folder = Path(__file__).parent
    source = "".join(path.read_text() for path in folder.glob("test_*.py"))
    tests = set(re.findall(r"def (test_\w+)", source))
    table = (folder / "faults.md").read_text().partition("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ")][1:]
    named = [set(re.findall(r"`(test_\w+)`", row)) for row in rows if not row.startswith("| **")]
    assert len(named) > 40 and all(named) and set().union(*named) <= tests


# === Signals ===
def test_a_command_stopped_by_a_signal(tmp_path, monkeypatch):
    process = runs.tiny_command(tmp_path / "stopped", total_steps=10**5)
    runs.wait_for(lambda: list(tmp_path.glob("stopped/*/results.json")), process)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    folder = folder_in(tmp_path / "stopped")
    step = load(folder)["step"]
    assert (code, err) == (130, "")
    assert f"stopped at step {step:,} " in out and out.endswith(f"go on with --resume {folder}\n")
    assert not list(folder.glob("*.tmp"))
    runs.assert_same_state(folder, stopped(tmp_path / "here", monkeypatch, step, total_steps=10**5))


HANGS = """
import time, dac
from common.bandits import Bandit
from common.runs import run_command
def step(env, action):
    print("hangs", flush=True)
    time.sleep(1e6)
Bandit.step = step
run_command(dac.train, dac.Args, dac.TASK_SETTINGS)
"""


def test_a_step_that_hangs(finished, tmp_path):
    """A second Ctrl-C ends its process; until then nobody else can resume its run."""
    settings = vars(runs.tiny_settings(dac, run_dir=str(tmp_path), save_every=5))
    given = {name: value for name, value in settings.items() if value is not None}
    process = runs.python("-c", HANGS, *runs.to_words(**given), cwd=runs.ROOT)
    runs.wait_for(lambda: process.stdout.readline() == "hangs\n", process)
    folder = folder_in(tmp_path)
    with pytest.raises(UserError, match=f"{folder} is in use by another process"):
        resume(folder, dac)

    def end_it():
        process.send_signal(signal.SIGINT)  # two that come at once would count as one
        return process.poll() is not None

    runs.wait_for(end_it)
    assert (process.returncode, process.stderr.read()) == (-signal.SIGINT, "")
    resume(folder, dac)
    assert_same_run(folder, finished(dac))


def test_a_closed_terminal_does_not_stop_a_run_under_nohup(tmp_path, monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        before_call(monkeypatch, dac.DAC, "update", at={3: signal.SIGHUP})
        assert results_of(train(tmp_path, dac, total_steps=4))["finished"]
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_ctrl_c_stays_ignored_where_it_was(tmp_path, monkeypatch):
    """As after & in a shell script: SIGTERM stops the run, a Ctrl-C then does not end it at once."""
    previous, events = signal.signal(signal.SIGINT, signal.SIG_IGN), [signal.SIGTERM, signal.SIGINT]
    try:
        before_call(monkeypatch, dac.DAC, "update", at={3: lambda: [*map(signal.raise_signal, events)]})
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, dac)
        assert load(folder_in(tmp_path))["step"] == 3
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_signal_that_ends_the_cpp_compiler_too(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C in a terminal reaches g++, which torch.compile reports; without a signal that is an error."""
    from torch._inductor.exc import InductorError

    failure = InductorError(RuntimeError("g++ was killed"), inspect.currentframe())

    def fail():
        signal.raise_signal(signal.SIGINT)
        raise failure

    for event, expected in [(fail, KeyboardInterrupt), (failure, InductorError)]:
        with monkeypatch.context() as patch, pytest.raises(expected):
            before_call(patch, dac.DAC, "update", at={11: event})
            train(tmp_path / expected.__name__, dac)
    folder = folder_in(tmp_path / "KeyboardInterrupt")
    [line] = [line for line in capsys.readouterr().out.splitlines() if "while compiling" in line]
    assert line == f"stopped in step 11, while compiling: no new checkpoint in {folder}"
    assert load(folder)["step"] == 8
    resume(folder, dac)
    assert_same_run(folder, finished(dac))


def test_ctrl_c_during_the_imports(tmp_path):
    (tmp_path / "numpy.py").write_text("import time\nprint('imported', flush=True)\ntime.sleep(1e6)\n")
    process = runs.python("dac.py", cwd=runs.ROOT, env={"PYTHONPATH": str(tmp_path)})
    runs.wait_for(lambda: process.stdout.readline() == "imported\n", process)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (-signal.SIGINT, "", "")


# === Saving ===
def test_a_crash_within_the_last_save(finished, tmp_path, monkeypatch):
    """checkpoint.pt says that the run is finished, results.json does not: a resume says so and mends it."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        before_call(patch, Run, "write_results", at={4: RuntimeError("power cut")})
        train(tmp_path, dac)
    folder = folder_in(tmp_path)
    assert (load(folder)["results"]["finished"], results_of(folder)["finished"]) == (True, False)
    for _ in range(2):
        with pytest.raises(UserError, match=f"{folder} is finished, at step 24; --total-steps can add more"):
            resume(folder, dac)
        assert_same_run(folder, finished(dac))
        assert results_of(folder)["finished"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut could leave an empty file where there was a whole one.

    replay.bin grows in its place; it is there, whole, before the checkpoint that counts on it.
    """
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
    folder = train(tmp_path, qvpo_online, save_every=8, total_steps=16)
    replay, row_bytes = (folder / "replay.bin").stat().st_ino, 4 * (1 + 2 + 1 + 1 + 1)
    saves = [[(replay, steps * row_bytes), "checkpoint.pt", "results.json"] for steps in (8, 16, 16)]
    assert events == ["config.json", *sum(saves, [])]


@contextlib.contextmanager
def full_disk(size):
    """Within, no file can have more than so many bytes; pytest's own output, between tests, still can."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_another_process_writes_meanwhile(copy, tmp_path, monkeypatch):
    """A resume goes on from what is there once the folder is its own."""
    newer = Path(shutil.copytree(copy, tmp_path / "newer"))
    resume(newer, dac, total_steps=30)
    with monkeypatch.context() as patch:
        take = lambda: shutil.copy(newer / "checkpoint.pt", copy)  # noqa: E731
        before_call(patch, common.runs, "lock_folder", at={1: take})
        resume(copy, dac, total_steps=36)
    assert results_of(copy)["changes"][-1]["step"] == 30
    assert [each["step"] for each in results_of(copy)["evaluations"]] == [6, 12, 18, 24, 30, 36]


def test_a_full_disk_keeps_the_last_checkpoint(copy):
    before = contents(copy)
    message = f"cannot write {copy}/checkpoint.pt: File too large; make room or"
    with full_disk(20_000), pytest.raises(UserError, match=message):
        resume(copy, dac, total_steps=30)
    for name in ("checkpoint.pt", "results.json"):
        assert (copy / name).read_bytes() == before[copy / name]
    assert not list(copy.glob("*.tmp"))


def test_a_disk_that_is_full_for_the_curves(tmp_path, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda failure: None)  # as in run_command()
    with full_disk(10_000), pytest.raises(UserError, match=f"cannot write {tmp_path}"):
        train(tmp_path, dac, log_every=1, save_every=1000, eval_episodes=0, total_steps=1000)


# The second is what other letters are in a locale of ASCII only.
@pytest.mark.parametrize("name", ["file", "L\udcc3\udca4ufe"])
def test_a_folder_that_cannot_be_made(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/.*choose another --run-dir"):
        train(tmp_path / name, dac)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    dac.train(runs.tiny_settings(dac, run_dir="~/runs", total_steps=1))
    resume(f"~/runs/{folder_in(tmp_path / 'runs').name}", dac, total_steps=2)
    for given in (dict(run_dir="~nosuchuser/runs"), dict(resume="~nosuchuser/runs")):
        with pytest.raises(UserError, match="~nosuchuser/runs"):
            dac.train(runs.tiny_settings(dac, **given))
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


# === Streams ===
@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """Runs in processes at the same time: name -> (process, run_dir)."""
    folder = tmp_path_factory.mktemp("streams")
    options = {
        "pipe": {},
        "closed": dict(preexec_fn=lambda: [os.close(file) for file in range(3)]),
        "Läufe 🏃 跑": dict(env=dict(LC_ALL="C", PYTHONIOENCODING="ascii")),
    }
    steps = {"pipe": 100_000}  # more than it can make before it notices; the others are tiny runs
    started = {
        name: (
            runs.tiny_command(folder / name, total_steps=steps.get(name, 24), **options[name]),
            folder / name,
        )
        for name in options
    }
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


def test_nobody_reads_the_output(streams):
    """As in `python dac.py | head`: the run ends saved, at an evaluation that it could not print."""
    process, run_dir = streams["pipe"]
    runs.wait_for(lambda: process.stdout.readline().startswith("step 6:"))
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=300)) == ("", 141)
    results = results_of(folder_in(run_dir))
    assert results["finished"] is False
    assert load(folder_in(run_dir))["step"] == results["step"] == results["evaluations"][-1]["step"] > 6


def test_closed_streams(streams, finished):
    process, run_dir = streams["closed"]
    assert process.wait(timeout=300) == 0
    assert_same_run(folder_in(run_dir), finished(dac))


def test_letters_that_the_screen_cannot_show(streams, finished):
    process, run_dir = streams["Läufe 🏃 跑"]
    code, out, err = finish(process)
    assert (code, err) == (0, "") and r"L\xe4ufe \U0001f3c3 \u8dd1" in out
    assert_same_run(folder_in(run_dir), finished(dac))


# === Checkpoints that cannot be resumed ===
class Malicious:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_damaged_checkpoint(copy):
    path = copy / "checkpoint.pt"
    whole = path.read_bytes()
    one_bit_off = bytearray(whole)
    one_bit_off[whole.index(load(copy)["agent"]["critic.layers.0.weight"].numpy().tobytes())] ^= 1
    random = np.random.default_rng(0).bytes(5000)
    for content in (whole[:9999], b"", b"step 24", random, one_bit_off):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} cannot be read, or is no checkpoint, or a damaged one"):
            resume(path, dac, total_steps=30)


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content))


def write_hdf5_of_pickles(path, content):
    write(path, rewards=np.array([np.void(pickle.dumps(content))] * 10))


def look_up_for_benchmark(run):
    benchmark.look_up(benchmark.Job("dac", "Hopper-v4", 0, (), {}, folder=run.parent))


READERS = {  # what is read -> its file, how a hostile one is written, what reads it
    "checkpoint": (
        "checkpoint.pt",
        lambda path, content: torch.save(content, path),
        lambda run: resume(run, dac),
    ),
    "pickle": ("checkpoint.pt", write_pickle, lambda run: resume(run, dac)),
    "evaluate": ("checkpoint.pt", write_pickle, lambda run: evaluate.main(evaluate.Args(run))),
    "replay": ("replay.bin", write_pickle, lambda run: resume(run, qvpo_online, total_steps=30)),
    "dataset": ("x.hdf5", write_hdf5_of_pickles, lambda run: load_dataset("Hopper-v4", str(run / "x.hdf5"))),
    "report": ("results.json", write_pickle, lambda run: report.find_runs([str(run)])),
    "report, config": ("config.json", write_pickle, lambda run: report.find_runs([str(run)])),
    "benchmark": ("results.json", write_pickle, look_up_for_benchmark),
    "benchmark, config": ("config.json", write_pickle, look_up_for_benchmark),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_shared_file_executes_nothing(reader, finished, tmp_path):
    name, write_hostile, read = READERS[reader]
    script = qvpo_online if reader == "replay" else dac
    run = Path(shutil.copytree(finished(script), tmp_path / "copy"))
    write_hostile(run / name, Malicious(tmp_path / "harm"))
    with pytest.raises(UserError, match=name):
        read(run)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "replay"])
def test_a_pipe_in_the_place_of_a_file(reader, copy):
    """To open it would take forever."""
    name, _, read = READERS[reader]
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    with pytest.raises(UserError, match=name):
        read(copy)


PARTS = """args, args hidden_dims, args batch_size, args gamma, args env_id, args compile, step, results,
results script, results evaluations, results train_seconds, agent, agent eta, agent actor.layers.0.weight,
optimizers, optimizers actor, optimizers actor state, optimizers actor state 0 exp_avg, rng"""
CHANGES = {"missing": None, "of another type": [1], "of another size": torch.zeros(3, 5, 7)}
CHANGES |= {"not a number": torch.tensor(math.nan)}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", PARTS.replace("\n", " ").split(", "))
def test_a_checkpoint_with_a_wrong_part(place, change, copy):
    checkpoint = part = load(copy)
    *keys, last = (int(key) if key.isdigit() else key for key in place.split())
    for key in keys:
        part = part[key]
    part[last] = CHANGES[change]
    if change == "missing":
        del part[last]
    torch.save(checkpoint, copy / "checkpoint.pt")
    before = contents(copy)
    with pytest.raises(UserError, match=f"{copy}.* (damaged|another version)"):
        resume(copy, dac, total_steps=30)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"format": 1}, {}, "is of another version of this project: format 1, not 2"),
        ({"args": {"beta": 10}}, {}, "was written by dac.py, or another version of it; resume it with that"),
        ({}, {"script": qvpo_online}, "was written by dac.py, or another version of it; resume it with that"),
        ({}, {"env_id": "bandit-spiral-v0"}, "is of env_id bandit-moons-v0, not bandit-spiral-v0: start"),
        ({}, {"seed": 1}, "is of seed 0, not 1: start a new run"),
        ({}, {"num_qs": 3}, "does not fit: size mismatch for critic_target"),
        ({}, {"path": "none"}, "there is no checkpoint at none"),
        ({}, {"path": ""}, "--resume is empty; it takes a checkpoint or a run folder"),
        ({}, {"path": "x" * 300}, "xxx cannot be read, or is no checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit(changes, given, message, copy):
    torch.save(load(copy) | changes, copy / "checkpoint.pt")
    before = contents(copy)
    with pytest.raises(UserError, match=message):
        resume(**{"path": copy, "script": dac, "total_steps": 30} | given)
    assert contents(copy) == before


def test_data_that_changed_since_the_start(tmp_path, monkeypatch):
    data = write(tmp_path / "data.hdf5", terminals=flags(4, 9))
    given = dict(env_id="hopper-medium-v2", dataset=data, eval_episodes=0)
    folder = stopped(tmp_path / "runs", monkeypatch, **given)
    write(tmp_path / "data.hdf5", terminals=flags(3, 9))
    other = write(tmp_path / "other.hdf5", terminals=flags(3, 9))
    with pytest.raises(UserError, match=f"the data of hopper-medium-v2 .* changed since the run in {folder}"):
        resume(folder, dac)
    resume(folder, dac, dataset=other)
    assert results_of(folder)["finished"] and other in results_of(folder)["data"]


# === Numbers that are not finite ===
def break_critic_loss(monkeypatch, call, script=dac):
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
    break_critic_loss(monkeypatch, 14 + runs.critic_losses_before(script), script)
    message = r"critic_loss is inf at step 14\b.* the checkpoint in .* is from before"
    with pytest.raises(UserError, match=message):
        train(tmp_path, script, save_every=save_every, eval_every=100)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == results_of(folder)["step"] == 13 // save_every * save_every
    resume(folder, script, eval_every=6)
    torch.testing.assert_close(load(folder)["agent"], load(finished(script))["agent"], rtol=0, atol=0)


@pytest.mark.parametrize("eval_every", [1, 2])
def test_learning_rates_that_are_too_high(eval_every, script, tmp_path):
    """What they do is seen before an evaluation fails of it."""
    rates = dict(actor_lr=1e18, critic_lr=1e18, log_every=100, save_every=100)
    with pytest.raises(UserError, match="(loss|a weight) is .*; try a lower learning rate"):
        train(tmp_path, script, eval_every=eval_every, **rates)


# === Environments that fail ===
@pytest.mark.parametrize(
    ("script", "method", "call", "step"),
    [
        *[(dac, "reset", 1, 6), (dac, "step", 5, 18)],
        *[(qvpo_online, "reset", 1, 0), (qvpo_online, "reset", 4, 2), (qvpo_online, "step", 17, 12)],
    ],
)
def test_an_environment_that_fails(script, method, call, step, finished, tmp_path, monkeypatch):
    """What was learned is saved, and the run goes on when the environment is repaired."""
    with monkeypatch.context() as patch, pytest.raises(EnvironmentFailure, match="moons-v0.* out of cards"):
        before_call(patch, Bandit, method, at={call: ValueError("out of cards")})
        train(tmp_path, script)
    if step:
        assert load(folder_in(tmp_path))["step"] == results_of(folder_in(tmp_path))["step"] == step
        resume(folder_in(tmp_path), script)
        assert results_of(folder_in(tmp_path))["finished"]
    if script is qvpo_online and step:
        assert load(folder_in(tmp_path))["memory"]["count"] == 24  # a transition for each step
    if script is dac:
        assert_same_run(folder_in(tmp_path), finished(dac))
