"""The domains from their data to a score: load, train and evaluate, with every offline script."""

import math
from itertools import cycle

import gymnasium
import numpy as np
import pytest
from recordings import record, write
from runs import AGENTS, load_script, make_env, results_of, train

from common.datasets import load_dataset
from common.tasks import D4RL_TASKS, find_task

SIZES = {"antmaze-umaze-v0": (29, 8), "door-human-v1": (39, 28), "kitchen-mixed-v0": (60, 9)}
REFERENCE = {"antmaze-umaze-v0": (0, 1), "door-human-v1": (-56.512833, 2880.5693087298737)}
REFERENCE |= {"kitchen-mixed-v0": (0, 4)}
OFFLINE = [name for name in AGENTS if not name.endswith("_online")]
SHORT = dict(total_steps=20, eval_every=20, eval_episodes=1)


def write_as_recorded(path, task):
    """Three episodes of 20 rows, with what is peculiar about the files of each domain."""
    random, row, (obs_dim, action_dim) = np.random.default_rng(0), np.arange(60), SIZES[task]
    fields = {
        "observations": random.normal(size=(60, obs_dim)),
        "actions": random.uniform(-1.3, 1.3, (60, action_dim)).clip(-1, 1),
        "rewards": random.normal(size=60),
        "terminals": np.zeros(60, bool),
        "timeouts": row % 20 == 19,
        "infos/qpos": np.zeros((60, 5)),
    }
    if task.startswith("antmaze"):  # the first two ants reach the goal and stay there for five rows
        at_goal = np.isin(row, [*range(12, 17), *range(33, 38)])
        fields |= {"rewards": at_goal.astype(float), "terminals": at_goal, "infos/goal": np.ones((60, 2))}
    if task.startswith("kitchen"):  # rewards are the number of subtasks done; infos is no group
        done = np.repeat([0.0, 1, 2, 0, 0, 1, 2, 3, 4], [8, 6, 6, 15, 5, 5, 5, 5, 5])
        fields |= {"rewards": done, "terminals": fields["timeouts"], "timeouts": np.zeros(60, bool)}
        fields |= {"infos": np.zeros(60), "infos/qpos": None}
    return write(path, **fields)


@pytest.mark.parametrize(("name", "task"), list(zip(OFFLINE, cycle(SIZES), strict=False)))
def test_every_script_and_every_domain(name, task, tmp_path, monkeypatch):
    monkeypatch.setitem(D4RL_TASKS[task], "horizon", 30)
    dataset = write_as_recorded(tmp_path / "data.hdf5", task)
    given = dict(env_id=task, dataset=dataset, reward_tune="none") | SHORT
    results = results_of(train(tmp_path / "runs", load_script(name), **given))
    assert results["finished"] and all(math.isfinite(loss) for loss in results["losses"].values())
    [evaluation] = results["evaluations"]
    low, high = REFERENCE[task]
    assert evaluation["step"] == 20 and 1 <= evaluation["length_mean"] <= 30
    score = 100 * (evaluation["return_mean"] - low) / (high - low)
    assert evaluation["normalized_score"] == pytest.approx(score)


def test_the_mean_of_the_data_counts_as_an_evaluation_does(tmp_path, monkeypatch):
    """Ants once per episode, the kitchen what was done at best, each up to the horizon."""

    whole = {"antmaze-umaze-v0": [1, 1, 0], "kitchen-mixed-v0": [2, 0, 4]}
    cut = {"antmaze-umaze-v0": [0, 0, 0], "kitchen-mixed-v0": [1, 0, 3]}
    for expected in (whole, cut):
        for task, returns in expected.items():
            data = load_dataset(find_task(task), write_as_recorded(tmp_path / "data.hdf5", task))
            assert data.episode_returns.tolist() == returns
            monkeypatch.setitem(D4RL_TASKS[task], "horizon", 12)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("dataset_id", "env_id", "obs_dim"),
    [
        ("D4RL/pen/human-v2", "AdroitHandPen-v1", 45),
        ("D4RL/antmaze/umaze-v1", "AntMaze_UMaze-v4", 31),
        ("D4RL/kitchen/complete-v2", "FrankaKitchen-v1", 93),
    ],
)
def test_minari_ids_with_their_own_environments(dataset_id, env_id, obs_dim, minari_folder):
    """Observations are flat in the data as in the environment: Dicts, of Dicts for the kitchen."""
    find_task(env_id)  # registers what gymnasium-robotics has
    own = gymnasium.make(env_id, max_episode_steps=20)
    episodes = record(dataset_id, own)
    data = load_dataset(find_task(dataset_id))
    assert data.observations.shape == (60, obs_dim)
    first = gymnasium.spaces.flatten(own.observation_space, episodes[0]["observations"][0])
    np.testing.assert_array_equal(data.observations[0], first.astype(np.float32))
    np.testing.assert_allclose(make_env(dataset_id).reset(seed=0)[0], first, atol=1e-6)
    given = dict(env_id=dataset_id, reward_tune="none") | SHORT
    results = results_of(train(minari_folder / "runs", load_script("dac"), **given))
    assert results["finished"] and results["evaluations"][0]["normalized_score"] is None
