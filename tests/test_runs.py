"""What a run does and leaves: the same numbers each time, its folder, its curves, its screen."""

import json
import re
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import runs
import torch
from recordings import flags, write
from runs import assert_same_state, before_call, curves_of, load, results_of, tiny_settings, train
from torch.utils._python_dispatch import TorchDispatchMode

import dac
from common.cli import UserError
from common.datasets import load_dataset, tune_rewards
from common.scores import summarize
from common.tasks import find_task

CPU = torch.device("cpu")


def small_agent(script, **options):
    return runs.agent_class(script)(4, 2, tiny_settings(script, **options), CPU)


# === Updates ===
def test_updates_never_wait_for_a_value(script):
    """No operation reads a number back to the host, or has a shape that depends on one."""
    agent, names = small_agent(script), set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            names.add(operation._schema.name.removeprefix("aten::"))
            return operation(*args, **kwargs or {})

    agent.set_step(20)
    for update in [getattr(agent, name) for name in ("pretrain", "update") if hasattr(agent, name)]:
        names.clear()
        with Recorder():
            update(runs.random_batch(script, 50))
        assert {"addmm", "_fused_adam_", "randint"} <= names
        assert not {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"} & names


# === Determinism ===
def test_other_seed_other_run(finished, script, tmp_path):
    other = train(tmp_path, script, seed=1, total_steps=8)
    assert results_of(other)["losses"] != results_of(finished(script))["losses"]
    if script.__name__ != "qvpo_online":  # a bandit's data is drawn anew
        assert results_of(other)["data_checksum"] != results_of(finished(script))["data_checksum"]
    assert not torch.equal(load(other)["rng"], load(finished(script))["rng"])
    for name, weight in load(other)["agent"].items():
        assert weight.dim() < 2 or not torch.equal(weight, load(finished(script))["agent"][name]), name


def test_watching_does_not_change_the_training(finished, script, tmp_path):
    other = train(tmp_path, script, eval_every=7, eval_episodes=3, log_every=3, save_every=5)
    assert_same_state(other, finished(script))
    assert [each["step"] for each in results_of(other)["evaluations"]] == [7, 14, 21, 24]


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
    data = load_dataset(find_task("hopper-medium-v2"), path)
    limit = LARGEST_ACTION.get(script.__name__, 1)
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
    seeds = []
    agent = SimpleNamespace(device=CPU, act=lambda obs: obs[:, :1])
    found = script.evaluate(agent, [Countdown(length, seeds) for length in (3, 1, 2)])
    assert (found["returns"], found["lengths"]) == ([6, 1, 3], [3, 1, 2])
    assert seeds == [10_000, 10_001, 10_002]


# === The run folder ===
def test_files(finished, script):
    names = sorted(path.name.split(".")[0] for path in finished(script).rglob("*"))
    own = {"dtql": ["pretrained"], "qvpo_online": ["replay"]}.get(script.__name__, [])
    assert names == sorted(["best", "checkpoint", "config", "events", "results", "run", *own])
    assert finished(script).name.startswith(f"bandit-moons-v0__{script.__name__}__0__2")


def test_folders_have_no_letters_that_a_file_system_refuses(tmp_path, monkeypatch):
    """Windows refuses : and /; two runs that start together have two folders."""
    monkeypatch.syspath_prepend(tmp_path)
    code = "import gymnasium\ngymnasium.register('a/B-v0', 'gymnasium.envs.classic_control:PendulumEnv')\n"
    (tmp_path / "swings.py").write_text(code)
    data = write(tmp_path / "data.hdf5", observations=np.zeros((10, 3)), actions=np.zeros((10, 1)))
    for _ in range(2):
        given = dict(env_id="swings:a/B-v0", dataset=data, reward_tune="none", eval_episodes=0, total_steps=1)
        dac.train(tiny_settings(dac, run_dir=str(tmp_path / "runs"), **given))
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2 and all(re.fullmatch(r"swings-a-B-v0__dac__0__[-\d]+", name) for name in names)


def test_config(finished):
    config = json.loads((finished(dac) / "config.json").read_text())
    settings = vars(tiny_settings(dac, run_dir=str(finished(dac).parent)))
    assert config["args"] == json.loads(json.dumps(settings))
    assert (config["sources"]["num_qs"], config["sources"]["rho"]) == ("row (bandit)", "default")
    assert (config["script"], config["torch"]) == ("dac", torch.__version__)
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", config["code"])
    assert {"device", "python", "numpy", "gymnasium", "mujoco"} <= config.keys()


def test_results(finished, script):
    results = results_of(finished(script))
    evaluations = results["evaluations"]
    assert [each["step"] for each in evaluations] == [6, 12, 18, 24]
    for each in evaluations:
        assert each["return_mean"] == pytest.approx(np.mean(each["returns"]))
        assert each["return_std"] == pytest.approx(np.std(each["returns"]))
        assert each["normalized_score"] == 100 * each["return_mean"]
        assert (each["lengths"], each["length_mean"], each["first_seed"]) == ([1, 1], 1, script.EVAL_SEED)
    assert {name: results[name] for name in ("final", "best", "last_ten")} == summarize(evaluations, (0, 1))
    known = {"format": 3, "script": script.__name__, "env_id": "bandit-moons-v0", "seed": 0}
    known |= {"step": 24, "total_steps": 24, "finished": True}
    assert results.items() >= known.items() and results["train_seconds"] > 0
    assert (results["data"] is None) == (script.__name__ == "qvpo_online")
    assert results["data"] is None or 0.1 < results["data_mean"] < 0.5


def test_best_is_the_policy_of_the_best_evaluation(script, tmp_path, monkeypatch):
    """Not the last one; it comes with a save, and survives a resume that finds nothing better."""
    returns, evaluate, states = iter([0.1, 0.9, 0.4, 0.8, 0.95]), script.evaluate, []

    def evaluated(agent, envs):
        states.append({name: value.clone() for name, value in agent.state_dict().items()})
        return evaluate(agent, envs) | {"returns": [next(returns)] * 2}

    monkeypatch.setattr(script, "evaluate", evaluated)
    folder = train(tmp_path, script, total_steps=18, eval_every=6, save_every=100)
    best = load(folder / "best.pt")
    assert (best["step"], best["results"]["best"]["return"], "optimizers" in best) == (12, 0.9, False)
    torch.testing.assert_close(best["agent"], states[1], rtol=0, atol=0)
    with pytest.raises(UserError, match="best.pt is a policy without its optimizers"):
        runs.resume(folder / "best.pt", script)
    for total_steps, step in ((24, 12), (30, 30)):
        runs.resume(folder, script, total_steps=total_steps)
        assert load(folder / "best.pt")["step"] == step


# === Curves ===
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
    assert results["data_mean"] is None and not {"final", "best", "last_ten"} & results.keys()
    assert not any(tag.startswith("eval/") for tag in curves_of(folder))
    assert not (folder / "best.pt").exists()
    assert ", not evaluated\n" in capsys.readouterr().out


# === The screen ===
def test_screen(tmp_path, capsys):
    folder = train(tmp_path, dac, total_steps=12)
    out = capsys.readouterr().out
    assert "learns from bandit-moons-v0: 10,000 transitions, 10,000 episodes, mean score " in out
    sources = dict(re.findall(r"^  (given|row \(bandit\)|default): (.*)$", out, re.M))
    assert "eta_lr 0.01" in sources["given"] and "num_qs 2" in sources["row (bandit)"]
    assert "rho 1.0" in sources["default"] and f"seed 0, step 0 of 12, {folder}" in out
    final = f"final score {results_of(folder)['final']['score']:.1f}, best score "
    assert re.search(rf"step 12 after \d+\.\d min, {final}", out) and out.endswith(f"finished: {folder}\n")
    assert re.findall(r"^step (\d+): return", out, re.M) == ["6", "12"]
