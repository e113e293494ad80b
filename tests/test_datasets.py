"""What a task name turns into: D4RL's, Minari's and the bandits' transitions, and evaluation environments."""

import subprocess
import sys
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from gymnasium.utils.env_checker import check_env
from minari.data_collector.episode_buffer import EpisodeBuffer

from common import datasets
from common.datasets import (
    BANDITS,
    Dataset,
    UserError,
    bandit_mode,
    bandit_reward,
    load_dataset,
    make_env,
    tune_rewards,
)

ROOT = Path(__file__).parent.parent


def write(path, **changes):
    """An HDF5 file in D4RL layout, 10 rows of hopper's sizes; changes replace fields, None leaves one out."""
    fields = {
        "observations": np.repeat(np.arange(10, dtype=np.float32)[:, None], 11, axis=1),
        "actions": np.zeros((10, 3), np.float32),
        "rewards": np.arange(10, dtype=np.float32),
        "terminals": np.zeros(10, bool),
        "timeouts": np.zeros(10, bool),
    }
    with h5py.File(path, "w") as file:
        for name, values in {**fields, **changes}.items():
            if values is not None:
                file[name] = values
    return str(path)


def flags(*rows, length=10):
    return np.isin(np.arange(length), rows)


def emitted(data):
    """Transitions as "observation>next observation", with * where terminal."""
    columns = zip(data.observations[:, 0], data.next_observations[:, 0], data.terminals, strict=True)
    return " ".join(f"{now:.0f}>{later:.0f}{'*' * int(end)}" for now, later, end in columns)


def slow_transitions(terminals, timeouts, horizon):
    """(row, terminal) of D4RL's qlearning_dataset, row by row, without its terminate_on_end option."""
    transitions = []
    step = 0
    for row in range(len(terminals) - 1):
        last = bool(timeouts[row]) if timeouts is not None else step == horizon - 1
        if last:
            step = 0
            continue
        if terminals[row]:
            step = 0
        transitions.append((row, bool(terminals[row])))
        step += 1
    return transitions


# --- D4RL's transitions ---


@pytest.mark.parametrize(
    ("terminals", "timeouts", "horizon", "expected"),
    [
        (flags(3), flags(7), 1000, "0>1 1>2 2>3 3>4* 4>5 5>6 6>7 8>9"),
        (flags(3), flags(3, 7), 1000, "0>1 1>2 2>3 4>5 5>6 6>7 8>9"),
        (flags(3), None, 4, "0>1 1>2 2>3 4>5 5>6 6>7 8>9"),
        (flags(), None, 4, "0>1 1>2 2>3 4>5 5>6 6>7 8>9"),
        (flags(2), None, 5, "0>1 1>2 2>3* 3>4 4>5 5>6 7>8 8>9"),  # D4RL's cut, one row too early
        (flags(9), flags(), 1000, "0>1 1>2 2>3 3>4 4>5 5>6 6>7 7>8 8>9"),  # the last row is never emitted
    ],
)
def test_worked_examples(terminals, timeouts, horizon, expected, tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.D4RL_TASKS["hopper-medium-v2"], "horizon", horizon)
    path = write(tmp_path / "data.hdf5", terminals=terminals, timeouts=timeouts)
    assert emitted(load_dataset("hopper-medium-v2", path)) == expected


@pytest.mark.parametrize("has_timeouts", [True, False])
def test_random_files_against_the_loop_over_rows(has_timeouts, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    for _ in range(60):
        length, horizon = random.integers(2, 60), random.integers(2, 12)
        terminals = random.random(length) < random.choice([0, 0.05, 0.5])
        timeouts = random.random(length) < 0.2 if has_timeouts else None
        expected = slow_transitions(terminals, timeouts, horizon)
        fields = {
            "observations": np.repeat(np.arange(float(length))[:, None], 11, axis=1),
            "actions": random.uniform(-1, 1, (length, 3)),
            "rewards": random.normal(size=length),
        }
        path = write(tmp_path / "data.hdf5", **fields, terminals=terminals, timeouts=timeouts)
        monkeypatch.setitem(datasets.D4RL_TASKS["hopper-medium-v2"], "horizon", horizon)
        if not expected:
            with pytest.raises(UserError, match="no transition"):
                load_dataset("hopper-medium-v2", path)
            continue
        data = load_dataset("hopper-medium-v2", path)
        rows = [row for row, _ in expected]
        np.testing.assert_array_equal(data.observations[:, 0], rows)
        np.testing.assert_array_equal(data.next_observations[:, 0], np.array(rows) + 1)
        np.testing.assert_array_equal(data.actions, fields["actions"][rows].astype(np.float32))
        np.testing.assert_array_equal(data.rewards, fields["rewards"][rows].astype(np.float32))
        np.testing.assert_array_equal(data.terminals, [terminal for _, terminal in expected])
        # An episode goes on where the next transition is the next row and the environment has not ended.
        goes_on = [row + 1 in rows and not end for row, end in expected]
        np.testing.assert_array_equal(data.episode_ends, ~np.array(goes_on))


def test_fields_of_the_dataset(tmp_path):
    path = write(tmp_path / "data.hdf5", terminals=flags(3), timeouts=flags(7))
    data = load_dataset("hopper-medium-v2", path)
    assert data.task == f"hopper-medium-v2 with the data of {path}"
    assert data.reference_returns == (-20.272305, 3234.3)
    np.testing.assert_array_equal(data.episode_ends, [0, 0, 0, 1, 0, 0, 1, 1])
    # Timeout rows count, the unfinished rows 8 and 9 do not.
    np.testing.assert_array_equal(data.episode_returns, [0 + 1 + 2 + 3, 4 + 5 + 6 + 7])
    assert data.observations.shape == data.next_observations.shape == (8, 11)
    arrays = [value for value in vars(data).values() if isinstance(value, np.ndarray)]
    assert [array.dtype for array in arrays] == [np.float32] * 7
    assert all(array.flags.c_contiguous for array in arrays)
    with pytest.raises(AttributeError):
        data.task = "another"


# --- Quirks of D4RL's domains, and of files of one's own ---


def test_double_precision_columns_and_float_flags(tmp_path):
    """medium-replay and full-replay are stored in float64; some files have (N, 1) rewards and terminals."""
    plain = load_dataset(
        "hopper-medium-v2", write(tmp_path / "plain.hdf5", terminals=flags(3), timeouts=flags(7))
    )
    odd = write(
        tmp_path / "odd.hdf5",
        observations=np.repeat(np.arange(10.0)[:, None], 11, axis=1),
        rewards=np.arange(10.0)[:, None],
        terminals=flags(3)[:, None].astype(np.float64),
        timeouts=flags(7).astype(np.uint8),
    )
    data = load_dataset("hopper-medium-v2", odd)
    for name, values in vars(plain).items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(getattr(data, name), values)
            assert getattr(data, name).dtype == np.float32


def test_what_is_not_needed_is_not_read(tmp_path):
    """Kitchen's `infos` is a vector of labels, gym's a group; gym's own next observations are not D4RL's."""
    labels = np.array([b"microwave", b"kettle"] * 5)
    path = write(tmp_path / "data.hdf5", infos=labels, next_observations=np.full((10, 11), np.nan))
    data = load_dataset("kitchen-mixed-v0", path)
    assert len(data.rewards) == 9
    with h5py.File(path, "a") as file:
        file["metadata/policy/weight"] = np.full(3, np.nan)
    assert len(load_dataset("kitchen-mixed-v0", path).rewards) == 9


def test_clusters_of_terminals(tmp_path):
    """Antmaze marks every row inside the goal: each is terminal, each ends an episode."""
    data = load_dataset(
        "antmaze-umaze-v2", write(tmp_path / "data.hdf5", terminals=flags(4, 5, 6), timeouts=flags(7))
    )
    assert emitted(data) == "0>1 1>2 2>3 3>4 4>5* 5>6* 6>7* 8>9"
    np.testing.assert_array_equal(data.episode_ends, [0, 0, 0, 0, 1, 1, 1, 1])


def test_actions_outside_are_clipped_and_counted(tmp_path, capsys):
    actions = np.zeros((10, 3), np.float32)
    actions[2] = 1.5, -2, 1
    data = load_dataset("hopper-medium-v2", write(tmp_path / "data.hdf5", actions=actions))
    np.testing.assert_array_equal(data.actions[2], [1, -1, 1])
    assert capsys.readouterr().out.endswith("clipped 2 of 27 action values to [-1, 1]\n")
    load_dataset("hopper-medium-v2", write(tmp_path / "data.hdf5"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("task", ["Hopper-v4", "hopper-mini-v0", "bandit-moons-v0"])
def test_horizon_of_other_tasks(task, tmp_path):
    length = 1500
    fields = {"observations": np.zeros((length, 11)), "actions": np.zeros((length, 3)), "timeouts": None}
    path = write(tmp_path / "data.hdf5", **fields, rewards=np.ones(length), terminals=np.zeros(length))
    data = load_dataset(task, path)
    assert len(data.rewards) == (length - 1 if task in BANDITS else length - 2)  # a bandit has no time limit


# --- Bad files ---

NAN_ROW = np.zeros((10, 11), np.float32)
NAN_ROW[4, 2] = np.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None}, "lacks rewards; it has actions, observations, terminals, timeouts"),
        ({"observations": None, "actions": None}, "lacks observations, actions"),
        ({"observations": NAN_ROW}, "observations has NaN or infinity in 1 rows, first 4"),
        ({"rewards": np.where(flags(6, 8), np.inf, 0)}, "rewards has NaN or infinity in 2 rows, first 6"),
        ({"actions": np.full((10, 3), 1e300)}, "actions has NaN or infinity in 10 rows, first 0"),
        ({"terminals": np.full(10, np.nan)}, "terminals has NaN or infinity"),
        (
            {"observations": np.zeros(10)},
            r"observations is float64\(10,\), not numbers shaped \(10, size\)",
        ),
        ({"actions": np.zeros((10, 3, 1))}, r"actions is float64\(10, 3, 1\)"),
        ({"rewards": np.zeros((10, 2))}, r"rewards is float64\(10, 2\), not numbers shaped \(10,\)"),
        ({"rewards": np.zeros(9)}, r"rewards is float64\(9,\), not numbers shaped \(10,\)"),
        ({"timeouts": np.zeros(11, bool)}, r"timeouts is bool\(11,\)"),
        ({"rewards": 1.0}, r"rewards is float64\(\)"),
        ({"observations": 1.0}, r"observations is float64\(\)"),
        ({"observations": np.zeros((10, 0))}, r"observations is float64\(10, 0\)"),
        ({"rewards": np.array([b"one"] * 10)}, "rewards is .*not numbers"),
        ({"rewards": b"one"}, "rewards is .*not numbers"),
        ({"rewards": h5py.Empty("f")}, "rewards is .*not numbers"),
        ({"timeouts": np.ones(10, bool)}, "no transition: 10 rows, 10 of them timeouts"),
    ],
)
def test_bad_fields(changes, message, tmp_path):
    path = write(tmp_path / "data.hdf5", **changes)
    with pytest.raises(UserError, match=f"^{path}.*{message}"):
        load_dataset("hopper-medium-v2", path)


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("has_timeouts", [True, False])
def test_empty_and_single_row_files(length, has_timeouts, tmp_path):
    fields = {
        "observations": np.zeros((length, 11)),
        "actions": np.zeros((length, 3)),
        "rewards": np.zeros(length),
    }
    timeouts = np.zeros(length, bool) if has_timeouts else None
    path = write(tmp_path / "data.hdf5", **fields, terminals=np.zeros(length, bool), timeouts=timeouts)
    message = "has no transition: 1 rows" if length else r": observations is float64\(0, 11\)"
    with pytest.raises(UserError, match=f"^{path}{message}|^{path} {message}"):
        load_dataset("hopper-medium-v2", path)


def test_files_that_are_not_hdf5_or_are_damaged(tmp_path):
    path = Path(write(tmp_path / "data.hdf5", observations=np.random.default_rng(0).normal(size=(10, 11))))
    whole = path.read_bytes()
    damaged = {"": "signature", "not hdf5": "signature", whole[: len(whole) // 2]: "truncated"}
    for content, reason in damaged.items():
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(
            UserError, match=f"^{path} is damaged or not an HDF5 file, replace it: .*{reason}"
        ):
            load_dataset("hopper-medium-v2", str(path))
    with pytest.raises(UserError, match="damaged or not"):
        load_dataset("hopper-medium-v2", str(tmp_path))  # a folder
    with pytest.raises(UserError, match="no such file: .*none.hdf5"):
        load_dataset("hopper-medium-v2", str(tmp_path / "none.hdf5"))


def test_a_damaged_compressed_block(tmp_path):
    path = tmp_path / "data.hdf5"
    values = np.random.default_rng(0).normal(size=(1000, 11))
    with h5py.File(write(path, observations=None), "a") as file:
        stored = file.create_dataset("observations", data=values, compression="gzip", fletcher32=True)
        offset = stored.id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 50 : offset + 150] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or not an HDF5 file"):
        load_dataset("hopper-medium-v2", str(path))


# --- Names ---


@pytest.mark.parametrize(
    ("task", "nearest"),
    [
        ("hoper-medium-v2", "hopper-medium-v2"),
        ("hopper-medium-v1", "hopper-medium-v2"),
        ("bandit-moon-v0", "bandit-moons-v0"),
        ("Hoper-v4", "Hopper-v4"),
        ("data/my_file.hdf5", "--dataset"),
        ("", "none"),
    ],
)
def test_unknown_tasks(task, nearest, tmp_path):
    for call in (load_dataset, make_env, lambda name: load_dataset(name, write(tmp_path / "data.hdf5"))):
        with pytest.raises(UserError, match=f"unknown task '{task}'[^$]*{nearest}"):
            call(task)


def test_an_environment_has_no_transitions_of_its_own(tmp_path):
    with pytest.raises(UserError, match="Hopper-v4 has no transitions.*--dataset"):
        load_dataset("Hopper-v4")
    assert load_dataset("Hopper-v4", write(tmp_path / "data.hdf5")).make_env().observation_space.shape == (
        11,
    )


@pytest.mark.parametrize(
    "name", ["mujoco/hopper/medium-v0", "D4RL/door/human-v2", "local/mine-v0", "a/b/c/d_e-v12"]
)
def test_minari_ids(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert datasets.is_minari_id(name)
    Path(name).parent.mkdir(parents=True)
    Path(name).touch()
    assert not datasets.is_minari_id(name)  # it is a file


@pytest.mark.parametrize(
    "name",
    [
        "hopper-medium-v2",
        "data/x.hdf5",
        "/x-v0",
        "../x-v0",
        "a/x",
        "~/x-v0",
        "Hopper-v4",
        "phys2d/Pendulum-v0",
    ],
)
def test_not_minari_ids(name):
    assert not datasets.is_minari_id(name)


# --- Minari ---


class Reach(gymnasium.Env):
    """A goal-conditioned task with actions in [0, 4] that ends at the fifth step, or is cut there."""

    def __init__(self, terminate=True):
        spaces = {
            "observation": Box(-9, 9, (3,)),
            "achieved_goal": Box(-9, 9, (2,)),
            "desired_goal": Box(-9, 9, (2,)),
        }
        self.observation_space = Dict(spaces)
        self.action_space = Box(0, 4, (2,))
        self.terminate = terminate

    def observe(self):
        self.state = self.np_random.normal(size=7).astype(np.float32)
        return {
            "observation": self.state[:3],
            "achieved_goal": self.state[3:5],
            "desired_goal": self.state[5:],
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), float(action.sum()), self.steps == 5 and self.terminate, self.steps == 5, {}


gymnasium.register("Reach-v0", entry_point=f"{__name__}:Reach")


def stack(observations):
    """One array of all rows, or a dict of such."""
    if isinstance(observations[0], dict):
        return {key: stack([values[key] for values in observations]) for key in observations[0]}
    return np.stack(observations)


def record(dataset_id, env, **metadata):
    """Records three episodes as a local Minari dataset; returns them."""
    episodes = []
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        env.action_space.seed(seed)
        episode = {
            "observations": [observation],
            "actions": [],
            "rewards": [],
            "terminations": [],
            "truncations": [],
        }
        done = False
        while not done:
            action = env.action_space.sample()
            observation, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            for name, value in zip(
                episode, (observation, action, reward, terminated, truncated), strict=True
            ):
                episode[name].append(value)
        episodes.append(episode)
    buffers = []
    for episode in episodes:
        buffers.append(EpisodeBuffer(**{**episode, "observations": stack(episode["observations"])}))
    minari.create_dataset_from_buffers(dataset_id, buffer=buffers, env=env, **metadata)
    return episodes


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_box(minari_folder):
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    episodes = record("local/pendulum/random-v0", env, ref_min_score=-100.0, ref_max_score=0.0)
    data = load_dataset("local/pendulum/random-v0")
    assert data.task == "local/pendulum/random-v0"
    assert data.reference_returns == (-100.0, 0.0)
    assert len(data.rewards) == 60  # nothing is dropped
    for number, episode in enumerate(episodes):
        rows = slice(20 * number, 20 * number + 20)
        np.testing.assert_array_equal(data.observations[rows], episode["observations"][:-1])
        np.testing.assert_array_equal(data.next_observations[rows], episode["observations"][1:])
        np.testing.assert_allclose(
            2 * data.actions[rows], episode["actions"], atol=1e-6
        )  # torques in [-2, 2]
    np.testing.assert_array_equal(data.terminals, 0)  # cut, not ended
    np.testing.assert_array_equal(np.flatnonzero(data.episode_ends), [19, 39, 59])
    np.testing.assert_allclose(
        data.episode_returns, [sum(episode["rewards"]) for episode in episodes], rtol=1e-5
    )

    # A scaled action does in the evaluation env what the original one did in the recorded one.
    eval_env = data.make_env()
    assert (eval_env.action_space.low, eval_env.action_space.high) == (-1, 1)
    eval_env.reset(seed=0)
    for row in range(5):
        observation, reward, *_ = eval_env.step(data.actions[row])
        np.testing.assert_allclose(observation, data.next_observations[row], atol=1e-5)
        assert reward == pytest.approx(data.rewards[row], abs=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_goal_conditioned(minari_folder):
    episodes = record("local/reach-v0", gymnasium.make("Reach-v0"))
    data = load_dataset("local/reach-v0")
    assert data.reference_returns is None
    assert data.observations.shape == (15, 7)
    space = Reach().observation_space
    flat = [gymnasium.spaces.flatten(space, values) for values in episodes[0]["observations"]]
    np.testing.assert_array_equal(data.observations[:5], flat[:-1])
    np.testing.assert_array_equal(data.next_observations[:5], flat[1:])
    first = episodes[0]["observations"][0]
    in_order = [first["achieved_goal"], first["desired_goal"], first["observation"]]
    np.testing.assert_array_equal(data.observations[0], np.concatenate(in_order))
    np.testing.assert_array_equal(data.terminals.reshape(3, 5), [[0, 0, 0, 0, 1]] * 3)
    np.testing.assert_allclose(data.actions[:5], np.array(episodes[0]["actions"]) / 2 - 1, atol=1e-6)
    env = data.make_env()
    np.testing.assert_array_equal(env.reset(seed=0)[0].astype(np.float32), data.observations[0])
    assert env.step(np.ones(2, np.float32))[1] == 8


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_data_for_another_task(minari_folder):
    record("local/pendulum-v0", gymnasium.make("Pendulum-v1", max_episode_steps=20))
    data = load_dataset("Pendulum-v1", "local/pendulum-v0")
    assert data.reference_returns is None
    assert data.make_env().spec.max_episode_steps == 200  # of the task, not of the data
    with pytest.raises(
        UserError, match="size 3 and actions of size 1, the environment of hopper-mini-v0 11 and 3"
    ):
        load_dataset("hopper-mini-v0", "local/pendulum-v0").make_env()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_failures(minari_folder):
    with pytest.raises(UserError, match="(?s)local/none-v0: .*minari download local/none-v0.*hopper-mini-v0"):
        load_dataset("local/none-v0")
    record("local/reach-v0", gymnasium.make("Reach-v0"))
    file = minari_folder / "local/reach-v0/data/main_data.hdf5"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(
        UserError, match=f"(?s)cannot use the Minari dataset local/reach-v0: .*{minari_folder}"
    ):
        load_dataset("local/reach-v0")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_with_discrete_actions(minari_folder):
    record("local/cartpole-v0", gymnasium.make("CartPole-v1"))
    with pytest.raises(UserError, match="^local/cartpole-v0: .*Discrete"):
        load_dataset("local/cartpole-v0")


# --- The bundled task ---


def test_bundled_task():
    data = load_dataset("hopper-mini-v0")
    assert data.observations.shape[1] == 11
    assert data.actions.shape[1] == 3
    assert len(data.rewards) > 1000
    assert len(data.episode_returns) > 10
    assert data.reference_returns == (-20.272305, 3234.3)
    assert data.make_env().spec.id == "Hopper-v4"
    assert (ROOT / "common/data/hopper-mini-v0.hdf5").stat().st_size <= 2.5e6


# --- Bandits ---


@pytest.mark.parametrize("task", BANDITS)
def test_bandit_data(task):
    data = load_dataset(task, seed=1)
    assert data.observations.shape == data.next_observations.shape == (10_000, 1)
    assert data.actions.shape == (10_000, 2)
    for ones in (data.terminals, data.episode_ends):
        np.testing.assert_array_equal(ones, 1)
    np.testing.assert_array_equal(data.episode_returns, data.rewards)
    np.testing.assert_allclose(data.rewards, bandit_reward(task, data.actions), atol=1e-6)
    assert data.reference_returns == (0, 1)
    assert np.mean(np.abs(data.actions) == 1) < 1e-3  # hardly anything had to be clipped

    np.testing.assert_array_equal(load_dataset(task, seed=1).actions, data.actions)
    assert not np.array_equal(load_dataset(task, seed=2).actions, data.actions)


@pytest.mark.parametrize("task", BANDITS)
def test_bandits_have_something_to_gain_over_imitation(task):
    data = load_dataset(task)
    centres = BANDITS[task]
    at_centres = bandit_reward(task, centres)
    assert at_centres.argmax() == len(centres) - 1
    assert at_centres[-1] == 1
    counts = np.bincount(bandit_mode(task, data.actions), minlength=len(centres))
    assert 0 < counts[-1] < 0.7 * counts.max()  # the best mode is there, but far from the most frequent
    assert data.rewards.mean() < 0.4
    assert data.rewards[bandit_mode(task, data.actions) == len(centres) - 1].mean() > 0.7


@pytest.mark.parametrize("task", BANDITS)
def test_bandits_pay_nothing_off_the_pattern(task):
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 81), np.linspace(-1, 1, 81)), axis=-1).reshape(-1, 2)
    distance = np.linalg.norm(grid[:, None] - BANDITS[task], axis=2).min(axis=1)
    reward = bandit_reward(task, grid)
    assert (distance > 0.4).sum() > 100
    assert reward[distance > 0.4].max() < 1e-3
    assert reward.max() <= 1


def test_bandit_env():
    env = make_env("bandit-corners-v0")
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation, [0])
    observation, reward, terminated, truncated, _ = env.step(np.array([0.8, -0.8], np.float32))
    assert (reward, terminated, truncated) == (pytest.approx(1), True, False)
    check_env(env, skip_render_check=True)


# --- Environments ---


@pytest.mark.parametrize(
    ("task", "env_id", "obs_dim", "action_dim"),
    [
        ("hopper-medium-v2", "Hopper-v4", 11, 3),
        ("halfcheetah-random-v2", "HalfCheetah-v4", 17, 6),
        ("walker2d-full-replay-v2", "Walker2d-v4", 17, 6),
        ("ant-expert-v2", "Ant-v4", 111, 8),
        ("hopper-mini-v0", "Hopper-v4", 11, 3),
        ("Ant-v4", "Ant-v4", 27, 8),
        ("Pendulum-v1", "Pendulum-v1", 3, 1),
    ],
)
def test_environments(task, env_id, obs_dim, action_dim):
    env = make_env(task)
    assert env.spec.id == env_id
    assert env.observation_space.shape == (obs_dim,)
    assert env.action_space == Box(-1, 1, (action_dim,))
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(env.action_space.sample())
    assert observation.shape == (obs_dim,)
    assert observation in env.observation_space
    if task.startswith("ant-"):
        assert (observation[27:] == 0).all() and (observation[:27] != 0).all()


def test_actions_are_scaled_to_the_environment():
    plain, scaled = gymnasium.make("Pendulum-v1"), make_env("Pendulum-v1")
    plain.reset(seed=0), scaled.reset(seed=0)
    np.testing.assert_allclose(scaled.step(np.float32([0.5]))[0], plain.step(np.float32([1.0]))[0], atol=1e-6)


def test_tasks_without_an_environment_still_load(tmp_path):
    data = load_dataset("maze2d-umaze-v1", write(tmp_path / "data.hdf5"))
    with pytest.raises(UserError, match="environment of maze2d.* are not part of .*\n.*--eval-episodes 0"):
        data.make_env()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("CartPole-v1", "CartPole-v1: .*Discrete"),
        ("FrozenLake-v1", "FrozenLake-v1: .*Discrete"),
        ("Hopper-v2", "cannot make the environment of Hopper-v2: .*\n.*--eval-episodes 0"),
    ],
)
def test_environments_that_do_not_work(task, message):
    with pytest.raises(UserError, match=message):
        make_env(task)


def test_environment_of_another_size(tmp_path):
    path = write(tmp_path / "data.hdf5", actions=np.zeros((10, 4), np.float32))
    with pytest.raises(
        UserError, match="size 11 and actions of size 4, the environment of hopper-medium-v2 11 and 3"
    ):
        load_dataset("hopper-medium-v2", path).make_env()


def test_environments_are_made_silently_and_only_ours(tmp_path):
    """Nothing on the screen, no MuJoCo log in the working folder; warnings of other code stay."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import warnings; warnings.simplefilter('always')\n"
        "from common.datasets import make_env\n"
        "tasks = ['halfcheetah-medium-v2', 'ant-medium-v2', 'Pendulum-v1', 'Hopper-v5']\n"
        "tasks += ['antmaze-umaze-v2', 'pen-human-v1', 'hammer-human-v1', 'kitchen-mixed-v0']\n"
        "for task in tasks:\n"
        "    env = make_env(task); env.reset(seed=0); env.step(env.action_space.sample())\n"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
    assert list(tmp_path.iterdir()) == []
    run[-1] += "import gymnasium; gymnasium.make('HalfCheetah-v4')\n"
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "out of date" in done.stderr


def test_import_is_light():
    code = (
        "import sys, common.datasets; print(sorted({'minari', 'mujoco', 'pooch', 'torch'} & {*sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- Rewards ---


def with_rewards(rewards, episode_ends):
    """A dataset of which only rewards and episode ends matter."""
    rewards = np.array(rewards, np.float32)
    empty = np.zeros((len(rewards), 1), np.float32)
    ends = np.array(episode_ends, np.float32)
    return Dataset("a-task", empty, empty, rewards, empty, ends, ends, np.zeros(0), None, lambda: None)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", [0, 1, 3, 2]),
        ("iql_antmaze", [-1, 0, 2, 1]),
        ("cql_antmaze", [-2, 2, 10, 6]),
        ("antmaze", [-0.5, 1.5, 5.5, 3.5]),
        ("antmaze100", [0, 100, 300, 200]),
        ("iql_locomotion", [0, 250, 750, 500]),  # returns 1 and 5
        ("normalize", np.array([-1.5, -0.5, 1.5, 0.5]) / np.sqrt(5 / 3)),
        ("minmax", np.array([-3, -1, 3, 1]) / 3),
    ],
)
def test_reward_rules(rule, expected):
    tuned = tune_rewards(with_rewards([0, 1, 3, 2], [0, 1, 0, 1]), rule)
    assert tuned.dtype == np.float32
    np.testing.assert_allclose(tuned, expected, rtol=1e-6)


def test_what_a_reward_rule_does_is_printed(capsys):
    data = with_rewards([0, 1, 3, 2], [0, 1, 0, 1])
    tune_rewards(data, "none")
    assert capsys.readouterr().out == "rewards as recorded: [0, 3], mean 1.5, sum 6\n"
    tune_rewards(data, "cql_antmaze")
    changed = "rewards by cql_antmaze: [0, 3], mean 1.5, sum 6 -> [-2, 10], mean 4, sum 16\n"
    assert capsys.readouterr().out == changed


def test_reward_rules_refuse():
    with pytest.raises(
        UserError, match="unknown reward rule 'no'; choose from none, iql_locomotion, iql_antmaze"
    ):
        tune_rewards(with_rewards([0, 1], [1, 1]), "no")
    for rule in ("iql_locomotion", "normalize", "minmax"):
        with pytest.raises(UserError, match=f"a-task: reward rule {rule} is undefined"):
            tune_rewards(with_rewards([0.1] * 9, [0, 0, 1] * 3), rule)
    with pytest.raises(UserError, match="undefined"):  # one episode only
        tune_rewards(with_rewards([0.1, 0.2, 0.3], [0, 0, 1]), "iql_locomotion")
