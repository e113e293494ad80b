"""What a run does and leaves: determinism, resuming, Ctrl-C, its folder, its settings, and clear failures."""

import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_datasets import flags, write
from test_siblings import fields_of_args

import dac
import diffusion_ql
import dtql
import edp_crr
import edp_iql
import edp_td3
import qvpo_online
from common.datasets import Bandit, UserError
from common.runs import Run, resolve_settings, run_command, summarize, uninterrupted

ROOT = Path(__file__).parent.parent
TINY = {
    "env_id": "bandit-moons-v0",
    "hidden_dims": (16, 16),
    "num_qs": 2,
    "num_q_samples": 2,
    "diffusion_steps": 3,
    "eta_lr": 0.01,
    "batch_size": 32,
    "total_steps": 60,
    "lr_decay_steps": 60,
    "eval_every": 10,
    "eval_episodes": 2,
    "log_every": 10,
    "save_every": 20,
    "actor_target_start": 5,
    "actor_target_every": 2,
}
TINY_ONLINE = {
    "env_id": "bandit-moons-v0",
    "hidden_dims": (16, 16),
    "num_qs": 2,
    "num_train_samples": 4,
    "diffusion_steps": 3,
    "entropy_weight_min": 0.02,
    "batch_size": 8,
    "total_steps": 60,
    "learning_starts": 3,
    "eval_every": 10,
    "eval_episodes": 2,
    "log_every": 10,
    "save_every": 20,
    "actor_target_every": 2,
}


def without(options, *names):
    return {name: value for name, value in options.items() if name not in names}


EDP = without(TINY, "num_qs", "num_q_samples", "eta_lr") | {"dpm_calls": 3}
DTQL = without(TINY, "num_q_samples", "diffusion_steps", "eta_lr")
DTQL |= {"pretrain_steps": 14, "num_action_samples": 4, "lr_decay": True}
AGENTS = {
    dac: (dac.DAC, TINY),
    diffusion_ql: (diffusion_ql.DiffusionQL, without(TINY, "num_qs", "num_q_samples", "eta_lr")),
    edp_td3: (edp_td3.EDPTD3, EDP),
    edp_crr: (edp_crr.EDPCRR, EDP),
    dtql: (dtql.DTQL, DTQL),
    edp_iql: (edp_iql.EDPIQL, without(EDP, "actor_target_start", "actor_target_every")),
    qvpo_online: (qvpo_online.QVPO, TINY_ONLINE),
}


@pytest.fixture(scope="module", params=AGENTS, ids=lambda script: script.__name__)
def script(request):
    return request.param


def train(run_dir, script=dac, **changes):
    """A run of 60 steps, a second at most; returns its folder."""
    script.train(script.Args(**AGENTS[script][1] | {"run_dir": str(run_dir)} | changes))
    return folder_in(run_dir)


def resume(folder, script=dac, **changes):
    # TensorBoard reads event files of one second in the order of their numbers as text, 10 before 9.
    while list(Path(folder).glob(f"events.out.tfevents.{int(time.time())}.*")):
        time.sleep(0.05)
    script.train(script.Args(resume=str(folder), **changes))


def folder_in(run_dir):
    [folder] = Path(run_dir).iterdir()
    return folder


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def evaluations_of(folder):
    """All of every evaluation but the seconds it took."""
    return [{**each, "seconds": None} for each in results_of(folder)["evaluations"]]


def curves_of(folder):
    """Tag -> list of (step, value), from the TensorBoard events."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def assert_same_state(folder, other):
    """Networks, targets, buffers, optimizers, random state and memory are equal, bit for bit."""
    for part in ("agent", "optimizers", "rng", "step", "memory"):
        torch.testing.assert_close(load(folder)[part], load(other)[part], rtol=0, atol=0)


def assert_same_run(folder, other):
    assert_same_state(folder, other)
    assert evaluations_of(folder) == evaluations_of(other)
    assert results_of(folder)["losses"] == results_of(other)["losses"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of 60 steps; not to be changed."""
    return train(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def finished_by(script, tmp_path_factory):
    """The same, by each of the scripts."""
    return train(tmp_path_factory.mktemp("finished"), script)


@pytest.fixture
def finished_copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def resolved(**arguments):
    """Arguments and their sources, of a tiny run or for the arguments given here."""
    return resolve_settings(dac.Args(**arguments or TINY), dac.DEFAULT_SETTINGS, dac.TASK_SETTINGS)


def count_calls(monkeypatch, owner, name, at):
    """Raise at[n], or call it if it is a function, before the n-th call of a method; returns all calls."""
    original, calls = getattr(owner, name), []

    def counted(*args):
        calls.append(args)
        event = at.get(len(calls))
        if isinstance(event, BaseException):
            raise event
        if event:
            event()
        return original(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls


def command(*arguments, script=dac, limit=None, **options):
    """`python dac.py ...` as a process; limit: bytes that a file may have, as on a full disk."""

    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells have background processes ignore it
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, script.__file__, *map(str, arguments)],
        preexec_fn=prepare, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def finish(process):
    """Exit code, stdout and stderr of a process."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def tiny_flags(script=dac, **changes):
    words = []
    for name, value in {**AGENTS[script][1], **changes}.items():
        words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [value])]
    return words


# --- Determinism ---
def test_same_seed_same_run(finished_by, script, tmp_path):
    assert_same_run(finished_by, train(tmp_path, script))


def test_other_seed_other_run(finished_by, script, tmp_path):
    other = train(tmp_path, script, seed=1)
    assert results_of(other)["losses"] != results_of(finished_by)["losses"]
    assert not torch.equal(load(other)["rng"], load(finished_by)["rng"])
    for name in ("actor.layers.0.weight", "critic.layers.0.weight"):
        assert not torch.equal(load(other)["agent"][name], load(finished_by)["agent"][name])


def test_watching_does_not_change_the_training(finished_by, script, tmp_path):
    other = train(tmp_path, script, eval_every=7, eval_episodes=3, log_every=4, save_every=9)
    assert_same_state(finished_by, other)
    assert [each["step"] for each in evaluations_of(other)] == [7, 14, 21, 28, 35, 42, 49, 56, 60]


def test_every_evaluation_draws_the_same_numbers():
    torch.manual_seed(0)
    agent = dac.DAC(1, 2, resolved()[0], torch.device("cpu"))
    envs = [Bandit("bandit-moons-v0") for _ in range(3)]
    torch.manual_seed(1)
    first = dac.evaluate(agent, envs)["returns"]
    assert torch.equal(torch.rand(5), torch.rand(5, generator=torch.Generator().manual_seed(1)))
    assert dac.evaluate(agent, envs)["returns"] == first
    assert len(set(first)) > 1  # though not for every episode of one evaluation


def test_learning_rates_follow_the_steps(finished):
    for name, optimizer in load(finished)["optimizers"].items():
        first_rate = getattr(resolved()[0], f"{name}_lr")
        last_rate = first_rate * (1 + math.cos(math.pi * 59 / 60)) / 2
        assert float(optimizer["param_groups"][0]["lr"]) == pytest.approx(last_rate)


# --- Resuming ---
def test_resume_is_exact(finished_by, script, tmp_path):
    folder = train(tmp_path, script, total_steps=30)
    resume(folder, script, total_steps=60)
    assert_same_run(folder, finished_by)
    assert folder_in(tmp_path) == folder
    ours, theirs = curves_of(folder), curves_of(finished_by)
    assert ours.keys() == theirs.keys()
    for tag in ours.keys() - {"charts/steps_per_second", "eval/seconds"}:
        assert ours[tag] == theirs[tag], tag


def test_resume_after_a_crash(finished_by, script, tmp_path, monkeypatch):
    """The steps after the last checkpoint are made again; the curves show them once."""
    updates = count_calls(monkeypatch, AGENTS[script][0], "update", at={36: RuntimeError("power cut")})
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, script)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == 20
    resume(folder, script)
    assert len(updates) == 36 + 40
    assert_same_run(folder, finished_by)
    for tag, points in curves_of(finished_by).items():
        if tag.startswith("losses") or "episode" in tag:
            assert curves_of(folder)[tag] == points


def test_resume_after_ctrl_c_in_an_update(finished_by, script, tmp_path, monkeypatch, capsys):
    interrupt = {35: lambda: signal.raise_signal(signal.SIGINT)}
    count_calls(monkeypatch, AGENTS[script][0], "update_actor", at=interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, script)
    folder = folder_in(tmp_path)
    step = 35 + max(AGENTS[script][1].get("learning_starts", 0) - 1, 0)
    assert load(folder)["step"] == step  # the update that was under way is whole
    assert results_of(folder)["finished"] is False
    summary = capsys.readouterr().out.splitlines()[-2:]
    assert re.match(rf"stopped at step {step} after 0.\d min: final score ", summary[0])
    assert summary[1] == f"  in {folder}; go on with --resume {folder}"
    resume(folder / "checkpoint.pt", script)
    assert_same_run(folder, finished_by)


def test_resume_after_ctrl_c_in_an_evaluation(finished, tmp_path, monkeypatch):
    count_calls(monkeypatch, Bandit, "step", at={6: KeyboardInterrupt()})  # in the third evaluation
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    folder = folder_in(tmp_path)
    assert [each["step"] for each in evaluations_of(folder)] == [10, 20]
    assert load(folder)["step"] == 30
    resume(folder)
    assert_same_run(folder, finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_waits_for_the_end_of_the_block(number):
    """Then it does what it would have done before."""
    received, done = [], []
    previous = signal.signal(number, lambda *_: received.append(len(done)))
    try:
        with uninterrupted():
            signal.raise_signal(number)
            done.append("block")
        assert received == [1]
        signal.raise_signal(number)
        assert received == [1, 1]
    finally:
        signal.signal(number, previous)


@pytest.fixture(scope="module")
def finished_dtql(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), dtql)


def test_resume_after_ctrl_c_in_the_pretraining(finished_dtql, tmp_path, monkeypatch, capsys):
    """The steps of the pretraining that are left follow, then the training."""
    calls = count_calls(
        monkeypatch, dtql.DTQL, "pretrain", at={9: lambda: signal.raise_signal(signal.SIGINT)}
    )
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, dtql)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == -5
    assert "stopped at step -5 " in capsys.readouterr().out
    assert not (folder / "pretrained.pt").exists()
    resume(folder, dtql)
    assert len(calls) == 14
    assert_same_run(folder, finished_dtql)
    ours, theirs = curves_of(folder), curves_of(finished_dtql)
    assert [step for step, _ in ours["losses/bc_loss"]] == [-10, -5, 0, 10, 20, 30, 40, 50, 60]
    for tag in ("losses/actor_loss", "eval/return_mean"):  # the interruption added a point to the others
        assert ours[tag] == theirs[tag]


def test_what_the_pretraining_learned_is_used_again(finished_dtql, tmp_path, monkeypatch):
    """pretrained.pt is the checkpoint of step 0: with it a run goes on, as it did or with another alpha."""
    pretrained = torch.load(finished_dtql / "pretrained.pt", weights_only=True)
    assert (pretrained["step"], pretrained["results"]["evaluations"]) == (0, [])
    calls = count_calls(monkeypatch, dtql.DTQL, "pretrain", at={})
    shutil.copy(finished_dtql / "pretrained.pt", tmp_path)
    resume(tmp_path / "pretrained.pt", dtql)
    assert_same_run(tmp_path, finished_dtql)
    resume(tmp_path / "pretrained.pt", dtql, alpha=7.0)
    assert load(tmp_path)["args"]["alpha"] == 7.0
    assert results_of(tmp_path)["losses"]["actor_loss"] != results_of(finished_dtql)["losses"]["actor_loss"]
    assert calls == []


def test_without_pretraining(tmp_path):
    folder = train(tmp_path, dtql, pretrain_steps=0)
    assert results_of(folder)["finished"] and not (folder / "pretrained.pt").exists()


def test_given_arguments_win_over_those_of_the_checkpoint(tmp_path):
    folder = train(tmp_path, gamma=0.5, log_every=3)
    given = ["--total-steps", 70, "--gamma", 0.99, "--seed", 5, "--env-id", "bandit-corners-v0"]
    code, *_ = finish(command("--resume", folder, *given))
    assert code == 0
    results, keys = results_of(folder), ("script", "env_id", "data", "seed")
    assert [results[key] for key in keys] == ["dac", "bandit-corners-v0", "bandit-corners-v0", 5]
    config = json.loads((folder / "config.json").read_text())
    expected = {"total_steps": 70, "gamma": 0.99, "log_every": 3, "hidden_dims": [16, 16]}
    assert {name: config["args"][name] for name in expected} == expected
    assert config["sources"].items() >= resolved()[1].items()  # as they were
    assert load(folder)["step"] == results_of(folder)["total_steps"] == 70


# --- Settings ---
def test_given_beats_task_beats_default():
    args, sources = resolved(env_id="halfcheetah-medium-expert-v2", eta=0.5)
    assert (args.eta, sources["eta"]) == (0.5, "given")
    assert (args.bc_threshold, sources["bc_threshold"]) == (0.1, "task")
    assert (args.rho, sources["rho"]) == (0.0, "task")  # not None, though false
    assert (args.num_qs, sources["num_qs"]) == (dac.DEFAULT_SETTINGS["num_qs"], "default")
    args, sources = resolved(env_id="own-v0")
    assert set(sources.values()) == {"default"}
    assert dac.DEFAULT_SETTINGS.items() <= vars(args).items()


def test_a_table_may_set_what_has_a_default(tmp_path, monkeypatch):
    """The mazes have larger batches; what is given wins, also where it is the default, also on resuming."""
    for words, batch_size, source in [([], 2048, "task"), (["--batch-size", "256"], 256, "given")]:
        monkeypatch.setattr(sys, "argv", ["dtql.py", *words])
        run = Run("dtql", dtql.Args(env_id="antmaze-umaze-v2"), dtql.DEFAULT_SETTINGS, dtql.TASK_SETTINGS)
        assert (run.args.batch_size, run.sources["batch_size"]) == (batch_size, source)
        checkpoint = {"script": "dtql", "args": vars(run.args), "sources": run.sources}
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        monkeypatch.setattr(sys, "argv", ["dtql.py"])
        run = Run("dtql", dtql.Args(resume=str(tmp_path)), dtql.DEFAULT_SETTINGS, dtql.TASK_SETTINGS)
        assert (run.args.batch_size, run.sources["batch_size"]) == (batch_size, source)


# --- The run folder ---
def test_files(finished_by, script):
    names = sorted(path.name.split(".")[0] for path in finished_by.rglob("*"))
    own = {dtql: ["pretrained"], qvpo_online: ["replay"]}.get(script, [])
    assert names == sorted(["checkpoint", "config", "events", *own, "results"])
    assert finished_by.name.startswith(f"bandit-moons-v0__{script.__name__}__0__2")


def test_config(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["args"].keys() == {field.name for field in fields(dac.Args)}
    args, sources = resolved()
    assert config["args"]["num_qs"] == args.num_qs == 2
    assert config["args"]["rho"] == args.rho
    assert config["sources"].items() >= sources.items()
    assert (config["script"], config["torch"]) == ("dac", torch.__version__)
    assert {"device", "git_commit", "python", "numpy", "gymnasium", "mujoco"} <= config.keys()


@pytest.mark.parametrize("means", [[20, *range(10)], [*range(10), 20], [3]])
def test_final_best_and_last_ten(means):
    summary = summarize([{"return_mean": mean} for mean in means], (0, 50))
    expected = {"final": means[-1], "best": max(means), "last_ten": np.mean(means[-10:])}
    assert summary == {name: {"return": mean, "score": 2 * mean} for name, mean in expected.items()}


def test_results(finished):
    results = results_of(finished)
    evaluations = results["evaluations"]
    assert [each["step"] for each in evaluations] == [10, 20, 30, 40, 50, 60]
    for each in evaluations:
        assert each["return_mean"] == pytest.approx(np.mean(each["returns"]))
        assert len(each["returns"]) == 2
        assert each["return_std"] == pytest.approx(np.std(each["returns"]))
        assert each["normalized_score"] == 100 * each["return_mean"]
        assert (each["length_mean"], each["first_seed"]) == (1, dac.EVAL_SEED)
    summary = {name: results[name] for name in ("final", "best", "last_ten")}
    assert summary == summarize(evaluations, (0, 1))
    assert results["format"] == 1
    assert (results["script"], results["env_id"], results["seed"]) == ("dac", "bandit-moons-v0", 0)
    assert (results["step"], results["total_steps"], results["finished"]) == (60, 60, True)
    assert results["data_mean"]["score"] == pytest.approx(100 * results["data_mean"]["return"])
    assert 0.1 < results["data_mean"]["return"] < 0.5
    assert 0 < results["train_seconds"] < 60


def test_curves(finished, tmp_path):
    curves, results = curves_of(finished), results_of(finished)
    losses = {tag.removeprefix("losses/"): points for tag, points in curves.items() if "losses/" in tag}
    assert {"critic_loss", "actor_loss", "bc_loss", "guidance_loss", "eta", "q_mean"} <= losses.keys()
    assert {name: points[-1][1] for name, points in losses.items()} == pytest.approx(results["losses"])
    steps = [10, 20, 30, 40, 50, 60]
    assert all([step for step, _ in points] == steps for points in curves.values())
    scores = [each["normalized_score"] for each in results["evaluations"]]
    assert [value for _, value in curves["eval/normalized_score"]] == pytest.approx(scores)
    assert curves.keys() >= {"eval/return_mean", "eval/return_std", "eval/length_mean", "eval/seconds"}
    assert all(value > 0 for _, value in curves["charts/steps_per_second"])
    # A point is the mean since the last one.
    every_step = curves_of(train(tmp_path, log_every=1))["losses/critic_loss"]
    assert np.mean([value for _, value in every_step[-10:]]) == pytest.approx(
        results["losses"]["critic_loss"]
    )


def test_two_runs_that_start_together_have_two_folders(tmp_path):
    for _ in range(3):
        dac.train(dac.Args(**TINY | {"run_dir": str(tmp_path), "total_steps": 1}))
    assert len(list(tmp_path.iterdir())) == 3


def test_without_evaluation(tmp_path, capsys):
    """Also where there is no environment to evaluate in."""
    data = write(
        tmp_path / "maze.hdf5",
        observations=np.random.default_rng(0).normal(size=(10, 29)),
        actions=np.zeros((10, 8)),
        terminals=flags(3, 7),
    )
    folder = train(tmp_path / "runs", env_id="antmaze-umaze-v0", dataset=data, eval_episodes=0)
    results = results_of(folder)
    assert results["evaluations"] == []
    assert not {"final", "best", "last_ten"} & results.keys()
    assert (results["step"], results["finished"]) == (60, True)
    assert not any(tag.startswith("eval/") for tag in curves_of(folder))
    assert capsys.readouterr().out.splitlines()[-2].endswith(": not evaluated")


def test_data_without_a_complete_episode(tmp_path):
    """There is no mean return then, and results.json is still what other programs take for JSON."""
    data = write(tmp_path / "data.hdf5", rewards=np.ones(10), terminals=flags())
    arguments = {"env_id": "hopper-medium-v2", "dataset": data, "reward_tune": "none", "eval_episodes": 0}
    folder = train(tmp_path / "runs", **arguments)
    json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


def test_batches_larger_than_the_data(tmp_path):
    data = write(tmp_path / "data.hdf5", terminals=flags(3, 7))
    folder = train(tmp_path / "runs", env_id="hopper-medium-v2", dataset=data, eval_episodes=0, batch_size=50)
    assert results_of(folder)["finished"]


# --- Mistakes ---
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_id": "bandit-moon-v0"}, "unknown task 'bandit-moon-v0'; nearest names: bandit-moons-v0"),
        ({"env_id": "antmaze-umaze-v0", "dataset": "none.hdf5"}, "no such file: none.hdf5"),
        ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
        ({"batch_size": -3}, "--batch-size is -3"),
        ({"total_steps": 0}, "--total-steps is 0"),
        ({"eval_every": 0}, "--eval-every is 0"),
        ({"log_every": 0}, "--log-every is 0"),
        ({"save_every": -1}, "--save-every is -1"),
        ({"num_qs": 0}, "--num-qs is 0"),
        ({"diffusion_steps": 0}, "--diffusion-steps is 0"),
        ({"reward_tune": "fair"}, "unknown reward rule 'fair'; choose from none, iql_locomotion"),
        ({"device": "tpu"}, "--device tpu is not available: .*; try --device cpu"),
        ({"device": "cuda:99"}, "--device cuda:99 is not available: .*; try --device cpu"),
        ({"resume": "none"}, "--resume: there is no checkpoint at none"),
    ],
)
def test_mistakes(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "runs", **changes)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("eval_episodes", -1),
        ("seed", -1),
        ("gamma", 1.5),
        ("tau", -0.1),
        ("actor_target_every", 0),
        ("lr_decay_steps", 0),
        ("actor_lr", -1.0),
        ("pretrain_steps", -1),
        ("nll_weight", -1.0),
        ("ema_decay", -0.1),
        ("sigma_min", 0.0),
    ],
)
def test_numbers_out_of_range(argument, value, tmp_path):
    script = next(each for each in AGENTS if hasattr(each.Args, argument))
    with pytest.raises(UserError, match=f"--{argument.replace('_', '-')} is {value}"):
        train(tmp_path / "runs", script, **{argument: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_no_cuda(tmp_path):
    with pytest.raises(UserError, match="--device cuda is not available: .*; try --device cpu"):
        train(tmp_path, device="cuda")


@pytest.mark.parametrize(
    ("changes", "env_id", "message"),
    [
        (
            {"rewards": np.full(10, np.nan)},
            "hopper-medium-v2",
            "rewards has NaN or infinity in 10 rows, first 0",
        ),
        ({}, "bandit-moons-v0", "observations of size 11 and actions of size 3, .* 1 and 2"),
        ({}, "antmaze-umaze-v0", "observations of size 11 and actions of size 3, .* 29 and 8"),
        ({}, "maze2d-umaze-v1", "environment of maze2d-umaze-v1: .*\\n--eval-episodes 0 trains without"),
    ],
)
def test_data_that_cannot_be_used(changes, env_id, message, tmp_path):
    data = write(tmp_path / "data.hdf5", terminals=flags(3, 7), **changes)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "runs", env_id=env_id, dataset=data)
    assert not (tmp_path / "runs").exists()


def test_a_file_in_the_way_of_the_run_folder(tmp_path):
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/runs.*choose another --run-dir"):
        train(tmp_path / "runs")
    assert (tmp_path / "runs").read_text() == "mine"


def break_critic_loss(monkeypatch, step, agent=dac.DAC):
    """Make the critics' loss infinite when it is computed for that time."""
    calls, original = [], agent.critic_loss

    def critic_loss(agent, batch, *draws):
        calls.append(batch)
        if len(calls) == step:
            batch = batch._replace(reward=batch.reward + math.inf)
        return original(agent, batch, *draws)

    monkeypatch.setattr(agent, "critic_loss", critic_loss)


@pytest.mark.parametrize("save_every", [16, 13])  # first seen when the losses are logged, when they are saved
def test_a_loss_that_is_not_finite(save_every, finished_by, script, tmp_path, monkeypatch):
    """The run ends, and the last good checkpoint can be resumed."""
    agent, arguments = AGENTS[script]
    before = arguments.get("pretrain_steps", 0) - max(arguments.get("learning_starts", 0) - 1, 0)
    break_critic_loss(monkeypatch, 38 + before, agent)  # steps of the run and updates are counted apart
    message = r"critic_loss is inf at step 38\b.* the .*checkpoint in .* is from before"
    with pytest.raises(UserError, match=message):
        train(tmp_path, script, save_every=save_every)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == results_of(folder)["step"] == 38 // save_every * save_every
    resume(folder, script)
    assert_same_state(folder, finished_by)


def test_a_loss_that_is_not_finite_before_the_first_checkpoint(tmp_path, monkeypatch):
    break_critic_loss(monkeypatch, step=1)
    with pytest.raises(UserError, match="critic_loss is inf at step 1; try a lower learning rate$"):
        train(tmp_path)
    assert not (folder_in(tmp_path) / "checkpoint.pt").exists()


# --- Checkpoints that cannot be resumed ---
class Malicious:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_damaged_checkpoint(finished_copy, tmp_path):
    path = finished_copy / "checkpoint.pt"
    whole = path.read_bytes()
    place = whole.index(load(finished_copy)["agent"]["critic.layers.0.weight"].numpy().tobytes())
    one_bit_off = bytearray(whole)
    one_bit_off[place] ^= 1
    torch.save({"script": "dac", "args": Malicious(tmp_path / "harm")}, path)
    contents = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "random": np.random.default_rng(0).bytes(5000),
        "one bit off": one_bit_off,
        "text": b"step 60",
        "pickle": pickle.dumps(Malicious(tmp_path / "harm")),
        "pickle of PyTorch": path.read_bytes(),
    }
    for content in contents.values():
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"--resume: {path} is no checkpoint, or a damaged one"):
            resume(path, total_steps=70)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {}, "this run is finished, at step 60; --total-steps can add more"),
        ({"script": "edp_td3"}, {}, r"was written by edp_td3\.py; resume it with that script"),
        ({}, {"num_qs": 3}, r"the checkpoint does not fit: .*critic\.layers\.0\.weight"),
        ({}, {"hidden_dims": (16,)}, r"the checkpoint does not fit: .*actor\.layers\.2\.weight"),
        ({"args": {**TINY, "beta_max": 10}}, {}, "the checkpoint is of another version, with beta_max"),
    ],
)
def test_a_checkpoint_that_does_not_fit(change, arguments, message, finished_copy):
    if change:
        torch.save(load(finished_copy) | change, finished_copy / "checkpoint.pt")
    before = {path: path.read_bytes() for path in finished_copy.iterdir()}
    if arguments:
        arguments = {**arguments, "total_steps": 70}
    with pytest.raises(UserError, match=f"--resume: .*{message}"):
        resume(finished_copy, **arguments)
    assert {path: path.read_bytes() for path in finished_copy.iterdir()} == before


# --- The command ---
def test_help_explains_every_argument(script):
    code, out, _ = finish(command("--help", script=script, env={**os.environ, "COLUMNS": "100"}))
    assert code == 0
    shown = "".join(out.replace("│", "").split())  # the comments are broken into lines of a table
    for name, lines in fields_of_args(Path(script.__file__)).items():
        comment = "".join(lines).split("  # ")[1]
        assert f"--{name.replace('_', '-')}" in shown
        assert "".join(comment.split()) in shown, f"--{name} is shown without its comment"


def test_screen(tmp_path):
    code, out, err = finish(command(*tiny_flags(total_steps=20, run_dir=tmp_path)))
    folder = folder_in(tmp_path)
    final = results_of(folder)["final"]["score"]
    assert (code, err) == (0, "")
    rewards, *lines = out.splitlines()
    assert rewards.startswith("rewards by iql_locomotion: [0, ")
    assert lines[0].startswith("dac on bandit-moons-v0: 10,000 transitions, 10,000 episodes, mean score ")
    assert "num_qs 2" in out
    assert f"rho {resolved()[0].rho}" in out
    assert f"  cpu, seed 0, step 0 of 20, {folder}" in lines
    assert [line.split(":")[0] for line in lines[-4:-2]] == ["step 10", "step 20"]
    assert re.match(rf"finished at step 20 after 0.\d min: final score {final:.1f}, best score ", lines[-2])
    assert lines[-1] == f"  in {folder}"


@pytest.mark.parametrize(("script", "number"), [(dac, signal.SIGINT), (qvpo_online, signal.SIGTERM)])
def test_ctrl_c(script, number, tmp_path):
    """SIGTERM, of a cluster that takes the machine away, is a Ctrl-C."""
    flags = tiny_flags(script, total_steps=100_000, run_dir=tmp_path / "stopped")
    process = command(*flags, script=script)
    while not list(tmp_path.glob("stopped/*/results.json")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, err) == (130, "")
    folder = folder_in(tmp_path / "stopped")
    assert out.endswith(f"go on with --resume {folder}\n")
    step = load(folder)["step"]
    assert f"stopped at step {step:,} " in out
    assert not list(folder.glob("*.tmp"))
    resume(folder, script, total_steps=step + 20)
    assert_same_run(folder, train(tmp_path / "uninterrupted", script, total_steps=step + 20))


def test_a_mistake_is_one_message():
    code, out, err = finish(command("--env-id", "hoper-medium-v2"))
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown task 'hoper-medium-v2'; nearest names: hopper-medium-v2")
    assert "Traceback" not in err


def test_exit_codes(capsys):
    def fail(error):
        raise error

    for error, code in [(UserError("what, found, what to do"), 2), (KeyboardInterrupt(), 130)]:
        with pytest.raises(SystemExit) as exit_info:
            run_command(fail, error)
        assert exit_info.value.code == code
    assert capsys.readouterr().err == "error: what, found, what to do\n"
    run_command(lambda args: {}, None)


def test_a_full_disk_keeps_the_last_checkpoint(finished_copy):
    before = {path: path.read_bytes() for path in finished_copy.glob("[cr]*")}
    code, _, err = finish(command("--resume", finished_copy, "--total-steps", 80, limit=20_000))
    assert code == 2
    message = (
        f"error: cannot write {finished_copy}/checkpoint.pt: File too large; make room or choose another"
    )
    assert err.startswith(message)
    assert "Traceback" not in err
    assert not list(finished_copy.glob("*.tmp"))
    for name in ("checkpoint.pt", "results.json"):
        assert (finished_copy / name).read_bytes() == before[finished_copy / name]
    resume(finished_copy, total_steps=80)


def test_a_disk_that_is_full_for_the_curves(tmp_path):
    arguments = tiny_flags(log_every=1, save_every=1000, total_steps=1000, run_dir=tmp_path)
    code, _, err = finish(command(*arguments, limit=10_000))
    assert code == 2
    assert err.startswith(f"error: cannot write {folder_in(tmp_path)}")
    assert "Traceback" not in err
