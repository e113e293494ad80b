"""tools/collect.py: what it records, going on after an interruption, and clear failures."""

import contextlib
import re
import shutil
import signal
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

import collect
import gymnasium as gym
import h5py
import line
import minari
import numpy as np
import pytest
import torch
from runs import before_call, finish, python, wait_for

import dac
import toolbox
from common.datasets import load_dataset
from common.scores import normalized_score
from common.settings import parse_args
from common.tasks import UserError

TINY = collect.Args(
    env_id="Line-v0",
    total_steps=120,
    learning_starts=30,
    eval_every=30,
    eval_episodes=2,
    transitions=60,
    hidden_dims=(16,),
    learning_rate=1e-2,
    batch_size=32,
    gamma=0.9,
)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Folder of a finished collection; neither its run nor its datasets are to be changed."""
    folder = tmp_path_factory.mktemp("collected")
    with in_folder(folder):
        collect.main(replace(TINY, run_dir=str(folder / "runs")))
    return folder


@contextlib.contextmanager
def in_folder(folder):
    """With Minari's datasets in this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        yield


@pytest.fixture
def datasets(collected):
    with in_folder(collected):
        yield {kind: minari.load_dataset(f"local/line/{kind}-v0") for kind in collect.KINDS}


@pytest.fixture
def run(tmp_path):
    """Collect in a folder of this test's own, with TINY arguments and those given here."""
    with in_folder(tmp_path):
        yield lambda **changes: collect.main(replace(TINY, **{"run_dir": str(tmp_path / "runs")} | changes))


def checkpoint_in(folder, name="line"):
    return torch.load(folder / f"runs/collect__{name}__0/checkpoint.pt", weights_only=True)


def returns_of(dataset):
    return np.array([episode.rewards.sum() for episode in dataset.iterate_episodes()])


def rewards_of(dataset):
    return np.concatenate([episode.rewards for episode in dataset.iterate_episodes()])


def assert_same_rows(later, earlier, count):
    """The replay buffer of a checkpoint begins with the rows of an earlier one."""
    for name in ("observations", "actions", "rewards"):
        torch.testing.assert_close(later["buffer"][name][:count], earlier["buffer"][name], rtol=0, atol=0)


# --- What is recorded ---
def test_datasets(datasets):
    """Each is loaded by the scripts' loader, with scores that are 0 for random and 100 for the expert."""
    expected = [returns_of(datasets[kind]).mean() for kind in ("random", "expert")]
    assert expected[1] > expected[0] + 5
    for kind, dataset in datasets.items():
        data = load_dataset(f"local/line/{kind}-v0")
        assert data.reference_returns == pytest.approx(expected)
        assert len(data.rewards) == dataset.total_steps
        np.testing.assert_allclose(data.episode_returns, returns_of(dataset), rtol=1e-5)
        assert np.abs(data.actions).max() <= 1
        env = data.make_env()
        assert isinstance(env.unwrapped, line.Line)
        assert env.observation_space.shape == data.observations.shape[1:]
        about = dataset.storage.metadata
        assert "Made by tools/collect.py with env_id Line-v0, " in about["description"]
        assert about["dataset_id"] == f"local/line/{kind}-v0" == dataset.id
        assert f"torch=={collect.metadata.version('torch')}" in about["requirements"]
        assert dataset.spec.env_spec.id == "Line-v0"


def test_random_is_uniform_and_can_be_played_again(datasets):
    episodes = list(datasets["random"].iterate_episodes())
    actions = np.concatenate([each.actions for each in episodes])
    assert 60 <= len(actions) < 60 + len(episodes[-1].actions)
    assert 1 < np.abs(actions).max() <= 2  # in the environment's units
    assert abs(actions.mean()) < 0.5 and actions.std() == pytest.approx(4 / 12**0.5, abs=0.3)
    seeds = [each["seed"] for each in datasets["random"].storage.get_episode_metadata(range(len(episodes)))]
    assert len(set(seeds)) == len(episodes)
    env = gym.make("Line-v0")
    for seed, episode in zip(seeds, episodes, strict=True):
        np.testing.assert_array_equal(env.reset(seed=seed)[0], episode.observations[0])
        for i, action in enumerate(episode.actions):
            observation, *given, _ = env.step(action)
            np.testing.assert_array_equal(observation, episode.observations[i + 1])
            assert given == [episode.rewards[i], episode.terminations[i], episode.truncations[i]]
        assert True in given[1:]


def test_policies(datasets):
    """They are stochastic, as in D4RL, and medium-expert is one after the other."""
    first = [each.actions[0].item() for each in datasets["expert"].iterate_episodes()]
    assert len(set(first)) == len(first) > 1
    both = np.concatenate([rewards_of(datasets["medium"]), rewards_of(datasets["expert"])])
    np.testing.assert_array_equal(rewards_of(datasets["medium-expert"]), both)


def test_medium_replay_is_the_buffer_up_to_medium(collected, datasets):
    steps = datasets["medium-replay"].total_steps
    buffer = {name: rows[:steps, 0].float() for name, rows in checkpoint_in(collected)["buffer"].items()}
    medium = datasets["medium"].storage.metadata["description"]
    assert medium.startswith(f"SAC's policy after {steps} steps, stochastic. ")
    data = load_dataset("local/line/medium-replay-v0")
    for name in ("observations", "next_observations", "rewards"):
        np.testing.assert_array_equal(getattr(data, name), buffer[name])
    np.testing.assert_allclose(data.actions, buffer["actions"], atol=1e-6)
    np.testing.assert_array_equal(data.terminals, buffer["dones"] * (1 - buffer["timeouts"]))


@pytest.mark.parametrize(
    ("scores", "changes", "medium", "expert"),
    [
        ([0, 10, 20, 40, 90], {}, 40, 50),  # nearest to 33 up to the first above
        ([0, 10, 30, 90, 33], {}, 30, 50),  # not the nearer one that comes after the first above
        ([0, 10, 30, 90, 33], {"expert": "best"}, 30, 40),
        ([0, 10, 20, 40, 90], {"medium_fraction": 0.9}, 50, 50),
    ],
)
def test_choice_of_policies(scores, changes, medium, expert):
    training = object.__new__(collect.Training)
    training.args = replace(TINY, **changes)
    returns = [-50 + 2 * score for score in scores]  # of which -50 and 150 score 0 and 100
    training.evaluations = [{"step": 10 * (i + 1), "return_mean": value} for i, value in enumerate(returns)]
    assert (training.medium(-50, 150)[0], training.expert()) == (medium, expert)


def test_hdf5(run, collected, tmp_path, datasets):
    """The same transitions, but for the last of each episode that was cut off, which D4RL's layout loses."""
    run(hdf5=str(tmp_path / "files"), kinds=("medium-replay",))
    assert not (tmp_path / "minari").exists()
    path = tmp_path / "files/line-medium-replay.hdf5"
    with h5py.File(path) as file:
        assert {len(rows) for rows in file.values()} == {datasets["medium-replay"].total_steps}
        assert "its replay buffer" in file.attrs["collected"]
    data = load_dataset("Line-v0", str(path))
    with in_folder(collected):
        whole = load_dataset("local/line/medium-replay-v0")
    keep = (whole.episode_ends == 0) | (whole.terminals == 1)
    keep[-1] &= not whole.terminals[-1]  # which has no row below
    for name in ("observations", "actions", "rewards", "terminals"):
        np.testing.assert_allclose(getattr(data, name), getattr(whole, name)[keep], atol=1e-6)
    inner = data.terminals == 0
    np.testing.assert_array_equal(data.next_observations[inner], whole.next_observations[keep][inner])


def test_observations_in_a_dict(run):
    """They are flattened, in the order of the environment that a script makes."""
    run(env_id="NestedLine-v0", kinds=("random", "medium-replay"), total_steps=90)
    for kind in ("random", "medium-replay"):
        data = load_dataset(f"local/nestedline/{kind}-v0")
        assert data.make_env().reset(seed=0)[0].shape == data.observations[0].shape
        time, place = data.observations.T
        assert set(time) == set(range(10))
        inside = data.terminals == 0
        moved = (data.next_observations[:, 1] - place)[inside]
        np.testing.assert_allclose(moved, 2 * data.actions[inside, 0], atol=1e-5)


def test_screen(run, capsys):
    run(kinds=("medium", "expert"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "SAC in Line-v0 for 120 steps, then 60 per policy"
    assert [line.split(":")[0] for line in lines[2:6]] == [f"step {step}" for step in (30, 60, 90, 120)]
    data = load_dataset("local/line/medium-v0")
    score = normalized_score(data.episode_returns.mean(), data.reference_returns)
    row = f"local/line/medium-v0: {len(data.episode_returns)} episodes, {len(data.rewards)} transitions, "
    row += f"return {data.episode_returns.mean():.5g} +- {data.episode_returns.std():.4g}, score {score:.1f}"
    assert row in lines
    assert "train on one with: python dac.py --env-id local/line/expert-v0" in lines


# --- Going on ---
def test_further_kinds_and_longer_training(run, tmp_path):
    """Neither repeats what there is; a dataset is replaced only where that is asked for."""
    run(kinds=("expert",))
    short, before = checkpoint_in(tmp_path), rewards_of(minari.load_dataset("local/line/expert-v0"))
    with pytest.raises(UserError, match="local/line/expert-v0 exists; --overwrite replaces it, --kinds and"):
        run(kinds=("random", "expert"), total_steps=150)
    run(kinds=("random",), total_steps=150)
    long = checkpoint_in(tmp_path)
    assert_same_rows(long, short, 120)
    assert [each["step"] for each in long["results"]["evaluations"]] == [30, 60, 90, 120, 150]
    assert long["results"]["evaluations"][:4] == short["results"]["evaluations"]
    run(kinds=("expert",), total_steps=150, overwrite=True)
    assert not np.array_equal(rewards_of(minari.load_dataset("local/line/expert-v0")), before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_training(number, run, tmp_path, monkeypatch, capsys):
    """It stops at once, keeps all, and cuts off the episode that was under way."""
    before_call(monkeypatch, collect.SAC, "learn", {74: number})
    with pytest.raises(KeyboardInterrupt):
        run(kinds=("medium-replay",))
    assert capsys.readouterr().out.endswith("stopped; the same command goes on from here\n")
    stopped = checkpoint_in(tmp_path)
    assert stopped["step"] == 74
    monkeypatch.undo()
    steps = before_call(monkeypatch, collect.SAC, "learn", {})
    with in_folder(tmp_path):
        run(kinds=("medium-replay",), medium_fraction=0.99)
    assert len(steps) == 46
    finished = checkpoint_in(tmp_path)
    assert finished["step"] == 120
    assert_same_rows(finished, stopped, 74)
    assert [each["step"] for each in finished["results"]["evaluations"]] == [30, 60, 90, 120]
    assert finished["buffer"]["timeouts"][73] == finished["buffer"]["dones"][73] == 1
    assert finished["buffer"]["observations"][74, 0, 1] == 0  # a new episode


def test_interrupted_evaluation(run, tmp_path, monkeypatch):
    """It is made after all, when the training goes on."""
    before_call(monkeypatch, collect, "play", {3: signal.SIGINT})  # the first in the evaluation of step 60
    with pytest.raises(KeyboardInterrupt):
        run(kinds=("random",))
    assert checkpoint_in(tmp_path)["step"] == 60
    with in_folder(tmp_path):
        run(kinds=("random",))
    assert [each["step"] for each in checkpoint_in(tmp_path)["results"]["evaluations"]] == [30, 60, 90, 120]


def test_resumed_networks_are_those_that_were_saved(collected):
    env = gym.make("Line-v0")
    training = collect.Training(TINY, env, collected / "runs/collect__line__0")
    saved = checkpoint_in(collected)
    parameters = training.model.get_parameters()
    torch.testing.assert_close(parameters, saved["agent"], rtol=0, atol=0)
    assert training.model.log_ent_coef.item() == saved["log_ent_coef"].item() != 0
    assert parameters["actor.optimizer"]["state"][0]["step"] == 120 - TINY.learning_starts
    assert training.model.replay_buffer.size() == training.step == 120


def test_kill(run, tmp_path):
    """kill -9: the training goes on from the last checkpoint; meanwhile the folder is nobody else's."""
    words = ["--run-dir", tmp_path / "runs", "--env-id", "Line-v0", "--total-steps", 100_000, "--gamma", 0.9]
    words += ["--learning-starts", 30, "--eval-every", 30, "--eval-episodes", 2, "--hidden-dims", 16]
    words += ["--learning-rate", 1e-2, "--batch-size", 32]
    code = "import line, collect; collect.run_command(collect.main, collect.Args)"
    path = f"{Path(collect.__file__).parent}:{Path(line.__file__).parent}"
    process = python("-c", code, *words, env={"PYTHONPATH": path})
    wait_for((tmp_path / "runs/collect__line__0/checkpoint.pt").exists, process)
    with pytest.raises(UserError, match="collect__line__0 is in use by another process"):
        run(total_steps=100_000)
    process.kill()
    finish(process)
    killed = checkpoint_in(tmp_path)
    run(kinds=("random",), total_steps=killed["step"] + 60)
    assert checkpoint_in(tmp_path)["step"] == killed["step"] + 60 >= 90
    assert_same_rows(checkpoint_in(tmp_path), killed, killed["step"])


# --- A full disk ---
def test_a_full_disk(run, tmp_path, monkeypatch):
    """The message says so, nothing half-written stays, and the command goes on later."""
    folder, usage = tmp_path / "minari/local/line", shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(UserError, match="cannot write .*random-v0: it takes up to .* make room and run"):
            run(kinds=("random",))
    assert list(folder.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda path, other: exec("raise OSError('No space left')"))
        with pytest.raises(UserError, match="cannot write .*random-v0: No space left; make room"):
            run(kinds=("random",))
    assert not list(folder.glob("*-v0"))
    (folder / "unfinished-v0").mkdir()  # as a crash leaves it
    run(kinds=("random",))
    assert len(load_dataset("local/line/random-v0").rewards) >= 60


# --- Mistakes ---
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_id": "Lime-v0"}, "unknown task 'Lime-v0'; nearest names: Line-v0"),
        ({"env_id": "CartPole-v1"}, "CartPole-v1: .* actions Discrete.* are not .* bounded continuous"),
        ({"env_id": "hopper-medium-v2"}, "hopper-medium-v2 names recorded data; .* such as Hopper-v4"),
        ({"env_id": "bandit-moons-v0"}, "bandit-moons-v0 is not a Gymnasium id"),
        ({"name": "a/b"}, "--name is 'a/b'; it must be of at most 100 letters"),
        ({"device": "meta"}, "--device meta is not available"),
        ({"total_steps": 10**15}, "SAC cannot be made with these arguments: "),
        ({"hidden_dims": (10**13,)}, "SAC cannot be made with these arguments: "),
        ({"seed": 2**40}, "SAC cannot be made with these arguments: "),
        ({"learning_rate": 1e30}, "SAC failed, perhaps --learning-rate is too high: "),
    ],
)
def test_mistakes(changes, message, run):
    with pytest.raises(UserError, match=message):
        run(**changes)


def test_a_file_in_the_place_of_a_folder(run, tmp_path):
    (tmp_path / "file").touch()
    for given, flag in [("hdf5", "--hdf5"), ("run_dir", "--run-dir")]:
        with pytest.raises(UserError, match=f"cannot write {tmp_path}/file.*choose another {flag}"):
            run(**{given: str(tmp_path / "file")})
    assert not (tmp_path / "runs").exists()


def test_another_training_in_the_folder(run, tmp_path):
    run(kinds=("random",))
    changes = {"kinds": ("expert",)}
    with pytest.raises(UserError, match="collect__line__0 has a training with batch_size 32; choose another"):
        run(**changes, batch_size=16)
    with pytest.raises(UserError, match="has a training of 120 steps; --total-steps is less"):
        run(**changes, total_steps=60)
    path = tmp_path / "runs/collect__line__0/checkpoint.pt"
    state = checkpoint_in(tmp_path)
    torch.save(state | {"results": state["results"] | {"script": "dac"}}, path)
    with pytest.raises(UserError, match="has a training with env_id None, seed None, "):
        run(**changes)
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="checkpoint.pt .*no checkpoint, or a damaged one"):
        run(**changes)


def test_files_of_somebody_else(run, tmp_path):
    """They are replaced only on demand, and nothing is trained before."""
    file = tmp_path / "line-medium.hdf5"
    file.write_text("mine")
    with pytest.raises(UserError, match="line-medium.hdf5 exists; --overwrite"):
        run(hdf5=str(tmp_path))
    assert file.read_text() == "mine" and not list(tmp_path.glob("runs/*/*"))
    run(kinds=("medium",), hdf5=str(tmp_path), overwrite=True)
    assert len(load_dataset("Line-v0", str(file)).rewards) > 50


def test_a_training_that_has_not_learned(run, monkeypatch):
    """The return that scores 100 would be that which scores 0."""
    monkeypatch.setattr(collect, "returns_of", lambda episodes: np.ones(6))
    with pytest.raises(UserError, match="is no better than random, .* a larger --total-steps goes on"):
        run(total_steps=30)


# --- Data of one's own ---
@pytest.mark.parametrize("first_line", ["import h5py", "import minari"])
def test_recipes_of_the_readme(first_line, tmp_path, monkeypatch):
    """Two episodes of Hopper's sizes, one ended, one cut off, are what the command below the code reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    random, episodes = np.random.default_rng(0), []
    for length, ended in [(5, True), (7, False)]:
        last = np.arange(length) == length - 1
        columns = random.uniform(-1, 1, (length, 3)), random.normal(size=length)
        observations = random.normal(size=(length + 1, 11))
        episodes.append((observations, *columns, last & ended, last & (not ended)))
    names = ("actions", "rewards", "terminals", "timeouts")
    arrays = {name: np.concatenate([each[i] for each in episodes]) for i, name in enumerate(names, start=1)}
    arrays["observations"] = np.concatenate([each[0][:-1] for each in episodes])

    text = (toolbox.ROOT / "README.md").read_text()
    block = re.match(r"(    .*\n|\n)+", text[text.index(f"    {first_line}\n") :]).group()
    code, _, command = textwrap.dedent(block).partition("python dac.py ")
    with warnings.catch_warnings(action="ignore"):  # Minari would like to know the author
        exec(code, arrays | {"episodes": episodes})
    args = parse_args(dac.Args, dac.TASK_SETTINGS, command.split())
    data = load_dataset(args.env_id, args.dataset)
    assert data.make_env().observation_space.shape == data.observations.shape[1:]
    rows = 11 if args.dataset else 12  # D4RL's layout loses the last observation of what was cut off
    for name in ("rewards", "actions", "terminals"):
        np.testing.assert_allclose(getattr(data, name), arrays[name][:rows], rtol=1e-6)
    assert data.reference_returns == pytest.approx((-20.3, 3234.3), abs=0.1)
