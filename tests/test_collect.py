"""tools/collect.py: what it records, of any environment; that the command which it prints works; failures."""

import contextlib
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import collect
import gymnasium as gym
import line
import minari
import numpy as np
import pytest
from runs import load_script, tiny_settings

import dac
from common.cli import UserError, parse_args
from common.datasets import load_dataset
from common.envs import make_env
from common.tasks import find_task

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
pytestmark = pytest.mark.filterwarnings("ignore:.*share an object.*")  # Gymnasium's, of the shared buffer


@contextlib.contextmanager
def in_folder(folder):
    """With Minari's datasets in this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        yield


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Folder of a finished collection, which is not to be changed."""
    folder = tmp_path_factory.mktemp("collected")
    with in_folder(folder):
        collect.main(TINY)
    return folder


@pytest.fixture
def datasets(collected):
    with in_folder(collected):
        yield {kind: minari.load_dataset(f"local/line/{kind}-v0") for kind in collect.KINDS}


@pytest.fixture
def run(tmp_path):
    """Collect in a folder of this test's own, with TINY arguments and those given here."""
    with in_folder(tmp_path):
        yield lambda **changes: collect.main(replace(TINY, **changes))


def load(env_id, dataset=None):
    return load_dataset(find_task(env_id), dataset)


def make(env_id):
    return make_env(find_task(env_id), tiny_settings(load_script("dac")))


def returns_of(dataset):
    return np.array([episode.rewards.sum() for episode in dataset.iterate_episodes()])


def rewards_of(dataset):
    return np.concatenate([episode.rewards for episode in dataset.iterate_episodes()])


# --- What is recorded ---
def test_datasets(datasets):
    """Each is loaded by the scripts' loader, with scores that are 0 for random and 100 for the expert."""
    expected = [returns_of(datasets[kind]).mean() for kind in ("random", "expert")]
    assert expected[1] > expected[0] + 5
    for kind, dataset in datasets.items():
        data, env = load(f"local/line/{kind}-v0"), make(f"local/line/{kind}-v0")
        assert data.reference_returns == pytest.approx(expected)
        assert len(data.rewards) == dataset.total_steps
        np.testing.assert_allclose(data.episode_returns, returns_of(dataset), rtol=1e-5)
        assert np.abs(data.actions).max() <= 1
        assert isinstance(env.unwrapped, line.Line) and env.spec.max_episode_steps == 10
        assert env.observation_space.shape == data.observations.shape[1:]
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


def assert_walks(data, scale=2):
    """Every transition is one of Line: the place moves by the action, the time by 1 from 0."""
    np.testing.assert_allclose(
        data.next_observations - data.observations,
        np.concatenate([scale * data.actions, np.ones_like(data.actions)], axis=1),
        atol=1e-5,
    )
    starts = np.append(True, data.episode_ends[:-1] == 1)
    assert (data.observations[starts, 1] == 0).all() and (data.observations[~starts, 1] > 0).all()
    np.testing.assert_array_equal(data.terminals, data.next_observations[:, 0] > 12)


def test_medium_replay_is_what_sac_did_up_to_medium(datasets):
    medium = datasets["medium"].storage.metadata["description"]
    steps = datasets["medium-replay"].total_steps
    assert medium.startswith(f"SAC's policy after {steps} steps, stochastic. ") and steps % 30 == 0
    assert_walks(load("local/line/medium-replay-v0"))


# --- Any environment, and the command at the end ---
@pytest.mark.parametrize("hdf5", [False, True])
def test_a_module_registers_a_class_whose_observations_share_a_buffer(hdf5, run, tmp_path):
    """What is recorded are copies; JSON does not have the class, so the command names the environment."""
    kinds = ("random", "medium-replay")
    run(env_id="line:ClassLine-v0", kinds=kinds, hdf5=tmp_path if hdf5 else None)
    for kind in kinds:
        path = str(tmp_path / f"classline-{kind}.hdf5") if hdf5 else f"local/classline/{kind}-v0"
        assert_walks(load("line:ClassLine-v0", path))


@pytest.mark.parametrize(
    ("env_id", "options"),
    [
        ("line:Line-v0", {"env_kwargs": ("max_episode_steps=7", "nested=true"), "name": "mine"}),
        ("Pendulum-v1", {"env_kwargs": ("g=9", "max_episode_steps=7"), "kinds": ("expert",)}),
        ("Pendulum-v1", {"env_kwargs": ("max_episode_steps=7",), "hdf5": Path("my data")}),
    ],
)
def test_the_printed_command_works(env_id, options, run, tmp_path, monkeypatch, capsys):
    """With the dataset's scores, and episodes as long as the recorded ones."""
    monkeypatch.chdir(tmp_path)
    run(env_id=env_id, **{"kinds": ("random", "expert"), "total_steps": 60} | options)
    [command] = [line for line in capsys.readouterr().out.splitlines() if "python dac.py" in line]
    words = shlex.split(command.partition("python dac.py ")[2])
    assert ("--dataset" in words) == ("line:" in env_id or "hdf5" in options)
    tiny = "--total-steps 4 --batch-size 4 --num-qs 2 --hidden-dims 8 --eval-episodes 1 --eval-every 4"
    monkeypatch.setenv("D4RL_DATASET_DIR", os.devnull)
    results = dac.train(parse_args(dac.Args, dac.TASK_SETTINGS, [*words, *tiny.split()]))
    assert results["evaluations"][0]["lengths"] == [7]
    assert (results["reference_returns"] is None) == ("hdf5" in options)


def test_a_training_that_has_not_learned(run, monkeypatch, capsys):
    """The return that scores 100 would be that which scores 0: there are no scores, but there is the data."""
    monkeypatch.setattr(collect, "mean_return", lambda episodes: 1.0)
    run(total_steps=30, kinds=("random",))
    assert "no scores: the expert's return, 1, is not above random, 1" in capsys.readouterr().out
    assert load("local/line/random-v0").reference_returns is None


# --- Failures ---
@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(collect.SAC, "learn", lambda *args, **options: pytest.fail("it trains"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_id": "hopper-medium-v2"}, "hopper-medium-v2 names recorded data; .* such as Hopper-v4"),
        ({"env_id": "bandit-moons-v0"}, "bandit-moons-v0 is not a Gymnasium id"),
        ({"name": "a/b"}, "--name is 'a/b'; it takes 1 to 100 letters"),
    ],
)
def test_mistakes(changes, message, run, no_training):
    with pytest.raises(UserError, match=message):
        run(**changes)


def test_what_is_there_already(run, tmp_path, no_training):
    """It is replaced only on demand, and nothing is trained before; nor where nothing can be written."""
    (tmp_path / "line-medium.hdf5").write_text("mine")
    with pytest.raises(UserError, match="line-medium.hdf5 exists; --overwrite replaces it, --kinds and"):
        run(hdf5=tmp_path)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/line-medium.hdf5/"):
        run(hdf5=tmp_path / "line-medium.hdf5")
    (tmp_path / "minari/local/line/expert-v0").mkdir(parents=True)
    with pytest.raises(UserError, match="local/line/expert-v0 exists; --overwrite"):
        run(kinds=("expert",))


def test_overwrite_and_a_full_disk(run, tmp_path, monkeypatch):
    """Nothing half-written stays, nor anything of a crash."""
    folder, usage = tmp_path / "minari/local/line", shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(UserError, match="cannot write .*random-v0: it takes up to .* make room"):
            run(kinds=("random",))
    assert list(folder.iterdir()) == []
    for name in ("unfinished-v0", "random-v0"):
        (folder / name).mkdir()
    run(kinds=("random",), overwrite=True)
    assert len(load("local/line/random-v0").rewards) >= 60 and not (folder / "unfinished-v0").exists()
