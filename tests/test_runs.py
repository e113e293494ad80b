"""What a run does and leaves: the same numbers each time, a resume that is exact, its folder, its screen."""

import json
import math
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import runs
import torch
from agents import check_no_waiting, random_batch
from recordings import flags, write
from runs import assert_same_run, before_call, curves_of, folder_in, load, results_of, resume, train

import dac
import dtql
from common.bandits import Bandit
from common.datasets import load_dataset, tune_rewards
from common.devices import matmul_library
from common.runs import Run
from common.scores import summarize
from common.tasks import UserError

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


# === Updates ===
def test_gradients_stay_where_they_belong(script):
    """No loss computes gradients for a network that it does not train; with losses that options add."""
    options = {"q_guidance": "denoised", "nll_weight": 1.0}
    options = {name: value for name, value in options.items() if hasattr(script.Args, name)}
    agent = runs.agent_class(script)(4, 2, runs.tiny_settings(script, **options), torch.device("cpu"))
    seen = []

    def check(trained):
        seen.append(trained)
        own = {id(parameter) for parameter in agent.optimizers[trained].param_groups[0]["params"]}
        for name, parameter in agent.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in own), (trained, name)
        agent.zero_grad()

    for name, optimizer in agent.optimizers.items():
        optimizer.step = partial(check, name)
    agent.set_step(1)
    agent.update(random_batch(script))
    assert sorted(seen) == sorted(agent.optimizers)


# === Determinism ===
def test_other_seed_other_run(finished, script, tmp_path):
    other = train(tmp_path, script, seed=1, total_steps=8)
    assert results_of(other)["losses"] != results_of(finished(script))["losses"]
    data = {results_of(folder)["data_checksum"] for folder in (other, finished(script))}
    assert data == {None} or len(data) == 2  # a bandit's data is drawn anew
    assert not torch.equal(load(other)["rng"], load(finished(script))["rng"])
    for name, weight in load(other)["agent"].items():
        assert weight.dim() < 2 or not torch.equal(weight, load(finished(script))["agent"][name]), name


def test_watching_does_not_change_the_training(finished, script, tmp_path):
    other = train(tmp_path, script, eval_every=7, eval_episodes=3, log_every=3, save_every=5)
    runs.assert_same_state(other, finished(script))
    assert [each["step"] for each in results_of(other)["evaluations"]] == [7, 14, 21, 24]


def test_every_evaluation_draws_the_same_numbers():
    torch.manual_seed(0)
    agent = dac.DAC(1, 2, runs.tiny_settings(dac, num_action_samples=1), torch.device("cpu"))
    envs = [Bandit("bandit-moons-v0") for _ in range(3)]
    torch.manual_seed(1)
    first = dac.evaluate(agent, envs)
    assert torch.equal(torch.rand(5), torch.rand(5, generator=torch.Generator().manual_seed(1)))
    assert dac.evaluate(agent, envs) == first
    assert len(set(first["returns"])) > 1  # though not for every episode of one evaluation


def test_learning_rates_follow_the_steps(finished):
    for name, optimizer in load(finished(dac))["optimizers"].items():
        factor = (1 + math.cos(math.pi * 23 / 24)) / 2
        rate = getattr(runs.tiny_settings(dac), f"{name}_lr") * factor
        assert float(optimizer["param_groups"][0]["lr"]) == pytest.approx(rate)


# === Data and evaluation ===
LARGEST_ACTION = {"dac": 1 - 1e-5, "edp_crr": 0.999, "edp_iql": 0.999, "edp_td3": 0.999}  # others do not clip


def test_a_run_learns_from_the_transitions_of_its_data(script, tmp_path, monkeypatch):
    if script.__name__ == "qvpo_online":
        pytest.skip("it learns from its own transitions")
    random = np.random.default_rng(0)
    fields = {"observations": random.normal(size=(10, 11)), "rewards": random.normal(size=10)}
    fields |= {"actions": np.resize([1.0, -1.0, 0.3], (10, 3)), "terminals": flags(3), "timeouts": flags(7)}
    path = write(tmp_path / "data.hdf5", **fields)
    updates = before_call(monkeypatch, runs.agent_class(script), "update", at={})
    given = {"env_id": "hopper-medium-v2", "dataset": path, "reward_tune": "cql_antmaze"}
    train(tmp_path / "runs", script, **given, eval_episodes=0, total_steps=1)
    data, limit = load_dataset("hopper-medium-v2", path), LARGEST_ACTION.get(script.__name__, 1)
    expected = {"obs": data.observations, "action": data.actions.clip(-limit, limit)}
    expected |= {"reward": tune_rewards(data, "cql_antmaze"), "next_obs": data.next_observations}
    expected |= {"terminal": data.terminals}
    _, given_data = updates[0]
    for name, column in given_data._asdict().items():
        np.testing.assert_array_equal(column, expected[name], name)


class Countdown(gymnasium.Env):
    """Ends after so many steps, with rewards 1, 2, ...; takes only that number for an action."""

    def __init__(self, length, seeds):
        self.length, self.seeds = length, seeds

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.count = 0
        return np.array([self.length, 0.0]), {}

    def step(self, action):
        assert action == self.length
        self.count += 1
        return np.array([self.length, self.count]), float(self.count), self.count == self.length, False, {}


def test_evaluate_plays_every_environment_to_its_end(script):
    seeds, cpu = [], torch.device("cpu")
    agent = SimpleNamespace(device=cpu, act=lambda obs: obs[:, :1])
    found = script.evaluate(agent, [Countdown(length, seeds) for length in (3, 1, 2)])
    assert (found["returns"], found["lengths"]) == ([6, 1, 3], [3, 1, 2])
    assert seeds == [10_000, 10_001, 10_002]


# === Resuming ===
def test_resume_after_a_crash(finished, script, tmp_path, monkeypatch):
    """The steps after the last checkpoint are made again; the curves show them once."""
    before = runs.critic_losses_before(script)
    at = {15 + before: RuntimeError("power cut")}
    losses = before_call(monkeypatch, runs.agent_class(script), "critic_loss", at)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, script)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == 8
    resume(folder, script)
    assert len(losses) == before + 15 + 16
    assert_same_run(folder, finished(script))
    assert folder_in(tmp_path) == folder
    assert curves_of(folder) == curves_of(finished(script))


def test_resume_after_a_crash_in_the_last_evaluation(finished, script, tmp_path, monkeypatch):
    """No step is left then, which would set the learning rates."""
    count = len(results_of(finished(script))["evaluations"])
    before_call(monkeypatch, script, "evaluate", {count: RuntimeError("power cut")})
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, script)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == load(finished(script))["step"]
    resume(folder, script)
    assert_same_run(folder, finished(script))


def test_resume_after_ctrl_c_in_an_update(finished, script, tmp_path, monkeypatch, capsys):
    at = {13 + runs.critic_losses_before(script): signal.SIGINT}
    before_call(monkeypatch, runs.agent_class(script), "critic_loss", at)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, script)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == 13  # the update that was under way is whole
    assert results_of(folder)["finished"] is False
    summary = capsys.readouterr().out.splitlines()[-2:]
    assert re.match(r"stopped at step 13 after \d+\.\d min: final score ", summary[0])
    assert summary[1] == f"  in {folder}; go on with --resume {folder}"
    resume(folder / "checkpoint.pt", script)
    assert_same_run(folder, finished(script))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("owner", "method", "call", "step"),
    [(dac.DAC, "update_actor", 13, 13), (Bandit, "step", 3, 12), (Run, "write_results", 1, 8)],
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


def test_resume_after_a_signal_in_the_pretraining(finished, tmp_path, monkeypatch, capsys):
    """The steps of the pretraining that are left follow, then the training."""
    calls = before_call(monkeypatch, dtql.DTQL, "pretrain", at={7: signal.SIGHUP})
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, dtql)
    folder = folder_in(tmp_path)
    assert load(folder)["step"] == -3
    assert "stopped at step -3 " in capsys.readouterr().out
    assert not (folder / "pretrained.pt").exists()
    resume(folder, dtql)
    assert len(calls) == 10
    assert_same_run(folder, finished(dtql))
    ours, theirs = curves_of(folder), curves_of(finished(dtql))
    assert [step for step, _ in ours["losses/bc_loss"]] == [-8, -4, -3, 0, 4, 8, 12, 16, 20, 24]
    for tag in ("losses/actor_loss", "eval/return_mean"):  # the interruption added a point to the others
        assert ours[tag] == theirs[tag]


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
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "pretrained.pt", tmp_path / "other")
    resume(tmp_path / "other" / "pretrained.pt", dtql, alpha=7.0)
    other = results_of(tmp_path / "other")
    assert other["changes"] == [{"step": 0, "alpha": [5.0, 7.0]}]
    assert other["losses"]["actor_loss"] != results_of(finished(dtql))["losses"]["actor_loss"]
    assert calls == []


def test_more_steps_with_other_settings(finished, tmp_path, capsys):
    """Arguments given on resuming beat those of the checkpoint; the rest stays as it was."""
    folder = Path(shutil.copytree(finished(dac), tmp_path / "copy"))
    resume(folder, dac, total_steps=30, gamma=0.5, log_every=7)
    assert "resumed with total_steps 24 -> 30, gamma 0.99 -> 0.5, log_every 4 -> 7" in capsys.readouterr().out
    changes = {"step": 24, "total_steps": [24, 30], "gamma": [0.99, 0.5], "log_every": [4, 7]}
    assert results_of(folder)["changes"] == [changes]
    config = json.loads((folder / "config.json").read_text())
    expected = {"total_steps": 30, "gamma": 0.5, "log_every": 7, "hidden_dims": [8, 8], "eta_lr": 0.01}
    assert {name: config["args"][name] for name in expected} == expected
    assert {config["sources"][name] for name in expected} == {"given"}
    assert config["sources"]["actor_lr"] == "row (bandit)"
    assert load(folder)["step"] == results_of(folder)["total_steps"] == 30
    assert [each["step"] for each in results_of(folder)["evaluations"]] == [6, 12, 18, 24, 30]


def test_updates_never_wait_for_a_value(script):
    agent = runs.agent_class(script)(4, 2, runs.tiny_settings(script), torch.device("cpu"))
    agent.set_step(20)
    for name in ("pretrain", "update"):
        if update := getattr(agent, name, None):
            check_no_waiting(partial(update, random_batch(script, 50)))


def test_a_run_is_resumed_where_it_is(finished, tmp_path):
    """Also after it was moved; another --run-dir is refused."""
    folder = Path(shutil.copytree(finished(dac), tmp_path / "moved" / "run"))
    with pytest.raises(UserError, match=f"--run-dir .*/new is for a new run; {folder} stays in place"):
        resume(folder, dac, total_steps=26, run_dir=tmp_path / "new")
    resume(folder, dac, total_steps=26)
    resume(folder, dac, total_steps=28, run_dir=tmp_path / "moved")
    assert results_of(folder)["finished"] and not (tmp_path / "new").exists()


def test_the_hours_before_a_resume_count(tmp_path):
    folder = train(tmp_path, dac, total_steps=8)
    saved = load(folder)
    saved["results"]["train_seconds"] = 1000.0
    torch.save(saved, folder / "checkpoint.pt")
    resume(folder, dac, total_steps=16)
    assert results_of(folder)["train_seconds"] > 1000


def test_a_run_does_not_go_back(tmp_path, monkeypatch):
    before_call(monkeypatch, dac.DAC, "update", at={13: signal.SIGTERM})
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, dac)
    with pytest.raises(UserError, match="is at step 13, past --total-steps 12"):
        resume(folder_in(tmp_path), dac, total_steps=12)


def test_resume_with_a_setting_that_numpy_computed(tmp_path):
    folder = train(tmp_path, dac, total_steps=1, actor_lr=np.float64(1e-3))
    resume(folder, dac, total_steps=2)


# === The run folder ===
def test_files(finished, script):
    names = sorted(path.name.split(".")[0] for path in finished(script).rglob("*"))
    own = {"dtql": ["pretrained"], "qvpo_online": ["replay"]}.get(script.__name__, [])
    assert names == sorted(["checkpoint", "config", "events", "results", "run", *own])
    assert finished(script).name.startswith(f"bandit-moons-v0__{script.__name__}__0__2")


def test_the_speed_leaves_out_evaluations(tmp_path, monkeypatch):
    """By a clock on which a step takes 2 s, and an evaluation, within a point of the curve, 100 s."""
    now = [0.0]

    def takes(seconds, function):
        def timed(*arguments):
            now[0] += seconds
            return function(*arguments)

        return timed

    monkeypatch.setattr("common.runs.time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(dac.DAC, "update", takes(2, dac.DAC.update))
    monkeypatch.setattr(dac, "evaluate", takes(100, dac.evaluate))
    folder = train(tmp_path, dac, log_every=4, eval_every=6)
    speeds = runs.all_curves_of(folder)["charts/steps_per_second"]
    assert [value for _, value in speeds] == [0.5] * 6


def test_two_runs_that_start_together_have_two_folders(tmp_path):
    for _ in range(2):
        dac.train(runs.tiny_settings(dac, run_dir=str(tmp_path), total_steps=1))
    assert len(list(tmp_path.iterdir())) == 2


def test_config(finished):
    config = json.loads((finished(dac) / "config.json").read_text())
    settings = vars(runs.tiny_settings(dac, run_dir=str(finished(dac).parent)))
    assert config["args"] == json.loads(json.dumps(settings))
    assert (config["sources"]["num_qs"], config["sources"]["rho"]) == ("row (bandit)", "default")
    assert (config["script"], config["torch"]) == ("dac", torch.__version__)
    assert {"device", "git_commit", "python", "numpy", "gymnasium", "mujoco"} <= config.keys()


def test_results(finished, script):
    results = results_of(finished(script))
    evaluations = results["evaluations"]
    assert [each["step"] for each in evaluations] == [6, 12, 18, 24]
    for each in evaluations:
        assert each["return_mean"] == pytest.approx(np.mean(each["returns"]))
        assert each["return_std"] == pytest.approx(np.std(each["returns"]))
        assert each["normalized_score"] == 100 * each["return_mean"]
        assert (each["lengths"], each["length_mean"], each["first_seed"]) == ([1, 1], 1, script.EVAL_SEED)
        assert 0 < each["seconds"] < results["train_seconds"]
    assert {name: results[name] for name in ("final", "best", "last_ten")} == summarize(evaluations, (0, 1))
    assert (results["format"], results["seed"], results["finished"]) == (2, 0, True)
    assert (results["script"], results["env_id"]) == (script.__name__, "bandit-moons-v0")
    assert (results["step"], results["total_steps"]) == (24, 24)
    if script.__name__ == "qvpo_online":
        assert (results["data"], results["data_checksum"]) == (None, None)
    else:
        assert results["data_mean"]["score"] == pytest.approx(100 * results["data_mean"]["return"])
        assert 0.1 < results["data_mean"]["return"] < 0.5


def test_curves(finished, tmp_path):
    curves, results = curves_of(finished(dac)), results_of(finished(dac))
    losses = {tag.removeprefix("losses/"): points for tag, points in curves.items() if "losses/" in tag}
    assert {"critic_loss", "actor_loss", "bc_loss", "guidance_loss", "eta", "q_mean"} <= losses.keys()
    assert {name: points[-1][1] for name, points in losses.items()} == pytest.approx(results["losses"])
    assert all([step for step, _ in points] == [4, 8, 12, 16, 20, 24] for points in losses.values())
    scores = {each["step"]: each["normalized_score"] for each in results["evaluations"]}
    assert dict(curves["eval/normalized_score"]) == pytest.approx(scores)
    assert curves.keys() >= {"eval/return_mean", "eval/return_std", "eval/length_mean"}
    # A point is the mean since the last one.
    every_step = curves_of(train(tmp_path, dac, log_every=1))["losses/critic_loss"]
    mean = np.mean([value for _, value in every_step[-4:]])
    assert mean == pytest.approx(results["losses"]["critic_loss"])


def test_without_evaluation(tmp_path, capsys):
    """Also where there is no environment to evaluate in, and no complete episode; with few transitions."""
    data = write(tmp_path / "data.hdf5", terminals=flags())
    given = dict(env_id="maze2d-umaze-v1", dataset=data, reward_tune="none", eval_episodes=0, batch_size=50)
    folder = train(tmp_path / "runs", dac, **given)
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert (results["evaluations"], results["step"], results["finished"]) == ([], 24, True)
    assert results["data_mean"] == {"return": None, "score": None}
    assert not {"final", "best", "last_ten"} & results.keys()
    assert not any(tag.startswith("eval/") for tag in curves_of(folder))
    assert capsys.readouterr().out.splitlines()[-2].endswith(": not evaluated")


# === The screen ===
def test_screen(tmp_path, capsys):
    folder = train(tmp_path, dac, total_steps=12)
    rewards, *lines = capsys.readouterr().out.splitlines()
    assert rewards.startswith("rewards by antmaze100: [0, ")
    assert lines[0].startswith("dac on bandit-moons-v0: 10,000 transitions, 10,000 episodes, mean score ")
    sources = dict(line.strip().split(": ", 1) for line in lines[1:4])
    assert list(sources) == ["given", "row (bandit)", "default"]
    assert "eta_lr 0.01" in sources["given"] and "num_qs 2" in sources["row (bandit)"]
    assert "rho 1.0" in sources["default"]
    assert f"  cpu, {matmul_library()}, seed 0, step 0 of 12, {folder}" in lines
    assert [line.split(":")[0] for line in lines[-4:-2]] == ["step 6", "step 12"]
    final = f"final score {results_of(folder)['final']['score']:.1f}, best score "
    assert re.match(rf"finished at step 12 after \d+\.\d min: {final}", lines[-2])
    assert lines[-1] == f"  in {folder}"


def test_a_line_about_once_a_minute_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    """Here the clock that a run looks at goes ten seconds a step."""
    now = [1e9]
    monkeypatch.setattr("common.runs.time.time", lambda: now[0])
    steps = dict.fromkeys(range(1, 25), lambda: now.__setitem__(0, now[0] + 10))
    before_call(monkeypatch, dac.DAC, "update", at=steps)
    train(tmp_path, dac)
    lines = [line for line in capsys.readouterr().out.splitlines() if "/24 [" in line]
    assert [re.search(r" (\d+)/24 ", line)[1] for line in lines] == ["7", "14", "21"]
    assert all("step/s, score " in line for line in lines)
