"""The domains from their data to a score: load, train 20 steps and evaluate, with every offline script."""

import json
import math
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
from test_datasets import record
from test_runs import AGENTS

import edp_iql
import qvpo_online
from common.datasets import D4RL_TASKS, load_dataset, make_env

OFFLINE = [script for script in AGENTS if script is not qvpo_online]
SIZES = {"antmaze-umaze-v0": (29, 8), "door-human-v1": (39, 28), "kitchen-mixed-v0": (60, 9)}


def write_as_recorded(path, task):
    """Three episodes of 20 rows, with what is peculiar about the files of each domain."""
    random = np.random.default_rng(0)
    last = np.arange(60) % 20 == 19
    obs_dim, action_dim = SIZES[task]
    fields = {
        "observations": random.normal(size=(60, obs_dim)),
        "actions": random.uniform(-1.3, 1.3, (60, action_dim)).clip(-1, 1),
        "rewards": random.normal(size=60),
        "terminals": np.zeros(60, bool),
        "timeouts": last,
        "infos/qpos": np.zeros((60, 5)),
    }
    if task.startswith("antmaze"):  # the first two ants reach the goal and stay there for five rows
        at_goal = np.isin(np.arange(60), [*range(12, 17), *range(33, 38)])
        fields |= {
            "rewards": at_goal.astype(np.float32),
            "terminals": at_goal,
            "infos/goal": np.ones((60, 2)),
        }
    if task.startswith("kitchen"):  # rewards are the number of subtasks done; infos is no group
        done = np.repeat([0, 1, 2, 0, 0, 1, 2, 3, 4], [8, 6, 6, 15, 5, 5, 5, 5, 5])
        fields |= {"rewards": done.astype(np.float32), "terminals": last, "timeouts": np.zeros(60, bool)}
        fields["infos"] = np.zeros(60)
        del fields["infos/qpos"]
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            file[name] = values
    return str(path)


def short_run(script, tmp_path, **options):
    """20 steps with tiny networks; the finished run's results and what it was set to."""
    tiny = AGENTS[script][1] | {"total_steps": 20, "eval_every": 20, "eval_episodes": 1, "pretrain_steps": 10}
    tiny = {name: value for name, value in tiny.items() if hasattr(script.Args, name)} | options
    results = script.train(script.Args(**tiny, run_dir=str(tmp_path / "runs")))
    [folder] = Path(tmp_path / "runs").iterdir()
    return results, json.loads((folder / "config.json").read_text())["args"]


@pytest.mark.parametrize("task", SIZES)
@pytest.mark.parametrize("script", OFFLINE, ids=lambda script: script.__name__)
def test_every_script_trains_and_evaluates_in_every_domain(script, task, tmp_path, monkeypatch):
    monkeypatch.setitem(D4RL_TASKS[task], "horizon", 30)
    dataset = write_as_recorded(tmp_path / "data.hdf5", task)
    results, _ = short_run(script, tmp_path, env_id=task, dataset=dataset)
    assert results["finished"] and all(math.isfinite(loss) for loss in results["losses"].values())
    [evaluation] = results["evaluations"]
    assert evaluation["step"] == 20 and 1 <= evaluation["length_mean"] <= 30
    low, high = {"antmaze": (0, 1), "door": (-56.512833, 2880.5693087298737), "kitchen": (0, 4)}[
        task.split("-")[0]
    ]
    score = 100 * (evaluation["return_mean"] - low) / (high - low)
    assert evaluation["normalized_score"] == pytest.approx(score)


def test_the_mean_of_the_data_counts_as_an_evaluation_does(tmp_path, monkeypatch):
    """Ants once per episode, the kitchen what was done at best, each up to the horizon."""
    returns = {}
    for task in SIZES:
        data = load_dataset(task, write_as_recorded(tmp_path / f"{task}.hdf5", task))
        returns[task] = data.episode_returns
    np.testing.assert_array_equal(returns["antmaze-umaze-v0"], [1, 1, 0])
    np.testing.assert_array_equal(returns["kitchen-mixed-v0"], [2, 0, 4])
    with h5py.File(tmp_path / "door-human-v1.hdf5") as file:
        rewards = file["rewards"][()].reshape(3, 20)
    np.testing.assert_allclose(returns["door-human-v1"], rewards.sum(axis=1), rtol=1e-5)
    for task, expected in [("antmaze-umaze-v0", [0, 0, 0]), ("kitchen-mixed-v0", [1, 0, 3])]:
        monkeypatch.setitem(D4RL_TASKS[task], "horizon", 12)
        np.testing.assert_array_equal(
            load_dataset(task, str(tmp_path / f"{task}.hdf5")).episode_returns, expected
        )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("dataset_id", "env_id", "obs_dim"),
    [
        ("D4RL/pen/human-v2", "AdroitHandPen-v1", 45),
        ("D4RL/antmaze/umaze-v1", "AntMaze_UMaze-v4", 31),
        ("D4RL/kitchen/complete-v2", "FrankaKitchen-v1", 93),
    ],
)
def test_minari_ids_with_their_own_environments(dataset_id, env_id, obs_dim, minari_folder, tmp_path):
    """Observations are flat in the data as in the environment: Dicts, of Dicts for the kitchen."""
    make_env(env_id)  # registers what gymnasium-robotics has
    own = gymnasium.make(env_id, max_episode_steps=20)
    episodes = record(dataset_id, own)
    data = load_dataset(dataset_id)
    assert data.observations.shape == (60, obs_dim)
    first = gymnasium.spaces.flatten(own.observation_space, episodes[0]["observations"][0])
    np.testing.assert_array_equal(data.observations[0], first.astype(np.float32))
    env = data.make_env()
    np.testing.assert_allclose(env.reset(seed=0)[0], first, atol=1e-6)
    results, _ = short_run(edp_iql, tmp_path, env_id=dataset_id, reward_tune="none")
    assert results["finished"] and results["evaluations"][0]["normalized_score"] is None
