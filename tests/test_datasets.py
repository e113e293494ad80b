"""What a name turns into: D4RL's, a user's, Minari's and the bandits' transitions; rewards to train on."""

import json
import re
from functools import partial
from types import SimpleNamespace
from typing import get_args

import gymnasium
import h5py
import numpy as np
import pytest
from recordings import flags, record, write
from runs import make_env

from common.bandits import BANDITS, bandit_reward
from common.cli import UserError
from common.datasets import Dataset, RewardRule, load_dataset, tune_rewards
from common.envs import make_envs
from common.tasks import BANDIT_TASKS, D4RL_TASKS, find_task

HOPPER = "hopper-medium-v2"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # what Minari misses in its metadata


def own(path, task=HOPPER, **options):
    """A user's file as the data of a task."""
    return load_dataset(find_task(task), str(path), **options)


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
@pytest.fixture
def of_d4rl(tmp_path, monkeypatch):
    """A function: D4RL's name, with a file of these fields and this horizon as D4RL's."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))

    def load(horizon=1000, **fields):
        info = {"file": "hopper.hdf5", "horizon": horizon, "bytes": None, "sha256": None}
        monkeypatch.setitem(D4RL_TASKS, HOPPER, info)
        write(tmp_path / "hopper.hdf5", **fields)
        return load_dataset(find_task(HOPPER))

    return load


@pytest.mark.parametrize("has_timeouts", [True, False])
def test_random_files_against_the_loop_over_rows(has_timeouts, of_d4rl):
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
        if not expected:
            continue
        data = of_d4rl(horizon, **fields, terminals=terminals, timeouts=timeouts)
        rows = [row for row, _ in expected]
        np.testing.assert_array_equal(data.observations[:, 0], rows)
        np.testing.assert_array_equal(data.next_observations[:, 0], np.array(rows) + 1)
        np.testing.assert_array_equal(data.actions, fields["actions"][rows].astype(np.float32))
        np.testing.assert_array_equal(data.rewards, fields["rewards"][rows].astype(np.float32))
        np.testing.assert_array_equal(data.terminals, [terminal for _, terminal in expected])
        # An episode goes on where the next transition is the next row and the environment has not ended.
        goes_on = [row + 1 in rows and not end for row, end in expected]
        np.testing.assert_array_equal(data.episode_ends, ~np.array(goes_on))


def test_fields_of_the_dataset(of_d4rl):
    data = of_d4rl(terminals=flags(3), timeouts=flags(7), next_observations=np.full((10, 11), np.nan))
    assert (data.name, data.reference_returns) == (HOPPER, (-20.272305, 3234.3))
    np.testing.assert_array_equal(data.episode_ends, [0, 0, 0, 1, 0, 0, 1, 1])
    # Timeout rows count, the unfinished rows 8 and 9 do not; gym's own next observations are not D4RL's.
    np.testing.assert_array_equal(data.episode_returns, [0 + 1 + 2 + 3, 4 + 5 + 6 + 7])
    assert data.observations.shape == data.next_observations.shape == (8, 11)
    arrays = [value for value in vars(data).values() if isinstance(value, np.ndarray)]
    assert [array.dtype for array in arrays] == [np.float32] * 7
    assert all(array.flags.c_contiguous for array in arrays)
    with pytest.raises(UserError, match=f"cannot read the data of {HOPPER}: .*rewards"):
        of_d4rl(rewards=None)


# --- A user's file ---
TWENTY = {
    "observations": np.arange(40.0).reshape(20, 2),
    "actions": np.zeros((20, 1)),
    "rewards": flags(9, 19, length=20),
}
ENDS, NONE = flags(9, 19, length=20), flags(length=20)


@pytest.mark.parametrize(
    ("terminals", "timeouts", "rows", "rewards"),
    [(ENDS, ENDS, 20, 2), (NONE, ENDS, 18, 0), (ENDS, NONE, 20, 2), (ENDS, None, 20, 2)],
    ids=["both", "timeouts", "terminals", "no timeouts"],
)
def test_what_ends_an_episode_counts(terminals, timeouts, rows, rewards, tmp_path, capsys):
    """Rewards in the last rows of two episodes; D4RL's rule is another. What cannot be used is counted."""
    path = write(tmp_path / "data.hdf5", **TWENTY, terminals=terminals, timeouts=timeouts)
    data, said = own(path), capsys.readouterr().out
    assert (len(data.rewards), data.rewards.sum(), data.terminals.sum()) == (rows, rewards, rewards)
    assert data.episode_returns.tolist() == [1, 1]
    lost = "2 rows without one are dropped, with rewards of 2 in all"
    assert (lost in said) == (rows == 18) and ("dropped" in said) == (rows == 18)
    assert ("has no timeouts: an episode ends where it is terminal" in said) == (timeouts is None)


def test_the_files_own_next_observations(tmp_path, capsys):
    """Rows in any order: each is a transition."""
    order = np.random.default_rng(0).permutation(20)
    shuffled = TWENTY | {"observations": TWENTY["observations"][order]}
    nexts = shuffled["observations"] + 2
    given = dict(next_observations=nexts, terminals=NONE, timeouts=NONE)
    data = own(write(tmp_path / "data.hdf5", **shuffled, **given))
    assert len(data.rewards) == 20
    np.testing.assert_array_equal(data.next_observations, data.observations + 2)
    assert "next observations are the file's own" in capsys.readouterr().out


def test_one_step_episodes(tmp_path):
    data = own(write(tmp_path / "data.hdf5", terminals=flags(*range(10))))
    assert (len(data.rewards), data.terminals.sum(), data.episode_ends.sum()) == (10, 10, 10)
    np.testing.assert_array_equal(data.episode_returns, np.arange(10))


def test_horizon_of_a_file_without_timeouts(tmp_path, capsys):
    """Episodes are cut where the task's own environment ends; the screen says so."""
    fields = {"observations": np.zeros((1500, 11)), "actions": np.zeros((1500, 3)), "timeouts": None}
    path = write(tmp_path / "data.hdf5", **fields, rewards=np.ones(1500), terminals=np.zeros(1500))
    assert len(own(path, "Hopper-v4").rewards) == 1500 - 2
    assert "or after 1,000 steps as in Hopper-v4" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["f2", "f8", ">f4", "gzip", "lzf", "column"])
def test_other_ways_to_store_the_same(kind, tmp_path):
    """Other precision and byte order, compressed, (N, 1) columns; in a folder with a space and an umlaut."""
    folder = tmp_path / "meine Läufe"
    folder.mkdir()
    observations = np.repeat(np.arange(10, dtype=np.float32)[:, None], 11, axis=1)
    plain = own(write(tmp_path / "plain.hdf5", observations=observations, terminals=flags(3)))
    changes = {"observations": None if kind in ("gzip", "lzf", "column") else observations.astype(kind)}
    if kind == "column":
        changes = {"rewards": np.arange(10.0)[:, None], "terminals": flags(3)[:, None].astype(float)}
    path = write(folder / "Daten.hdf5", **{"terminals": flags(3)} | changes)
    if kind in ("gzip", "lzf"):
        with h5py.File(path, "a") as file:
            file.create_dataset("observations", data=observations, compression=kind)
    for name, values in vars(own(path)).items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(values, getattr(plain, name))
            assert values.dtype == np.float32


# --- Units of actions ---
def pendulum_file(path, actions, **changes):
    return write(path, observations=np.zeros((10, 3)), actions=actions, **changes)


def test_units_are_said_and_can_be_given(tmp_path, capsys):
    """Torques of 0.9 in Pendulum, which takes -2 to 2: as actions of the policy they would be 1.8 there."""
    path = pendulum_file(tmp_path / "data.hdf5", np.full((10, 1), 0.9))
    make_env("Pendulum-v1", dataset=path)
    said = capsys.readouterr().out
    assert "data.hdf5 has actions from -1 to 1 (--action-bounds)\nPendulum-v1 takes actions in Box(-2" in said
    np.testing.assert_allclose(own(path, "Pendulum-v1", action_bounds=(-2, 2)).actions, 0.45)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.linspace(0, 100, 10)[:, None], r"values outside their bounds -1 and 1; see --action-bounds"),
        (np.arange(10)[:, None] % 4, "actions are int64; discrete actions cannot be learned here"),
    ],
    ids=["0 to 100", "integers"],
)
def test_actions_in_other_units_are_refused(actions, message, tmp_path):
    path = pendulum_file(tmp_path / "data.hdf5", actions)
    with pytest.raises(UserError, match=f"{path}: .*{message}"):
        own(path, "Pendulum-v1")


def test_a_trace_outside_is_clipped_and_counted(tmp_path, capsys):
    actions = np.full((10, 1), 1 + 1e-6)
    assert own(pendulum_file(tmp_path / "data.hdf5", actions), "Pendulum-v1").actions.max() == 1
    assert "action values to [-1, 1]" in capsys.readouterr().out
    for bounds in ((1, -1), (-np.inf, np.inf), (-1, np.nan)):
        with pytest.raises(UserError, match="hdf5: --action-bounds .* must be finite, the first the lower"):
            own(tmp_path / "data.hdf5", "Pendulum-v1", action_bounds=bounds)
    with pytest.raises(UserError, match="--action-bounds are those of an HDF5 file, .*v0 knows its own"):
        load_dataset(find_task("bandit-moons-v0"), action_bounds=(-2, 2))


# --- Files that cannot be used ---
NAN_ROW = np.zeros((10, 11), np.float32)
NAN_ROW[4, 2] = np.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None}, "lacks rewards; it has actions, observations, terminals, timeouts"),
        ({"observations": NAN_ROW}, "observations has 1 NaN or infinity, first in row 4"),
        ({"rewards": np.full(10, 1e300)}, "rewards has 10 NaN or infinity, first in row 0"),
        ({"observations": np.zeros(10)}, r"observations is float64\(10,\), .* shaped \(10, size\)"),
        ({"rewards": np.zeros(9)}, r"rewards is float64\(9,\), not numbers shaped \(10,\)"),
        ({"rewards": np.array([b"one"] * 10)}, "rewards is .*not numbers"),
        ({"terminals": np.full(10, 0.5)}, "terminals has 0.5 to 0.5; it must be 0 or 1"),
        ({"timeouts": np.ones(10, bool)}, "no transition: 10 rows, 10 of them timeouts"),
        ({"timeouts": None, "truncations": np.ones(10, bool)}, "lacks timeouts; it has .*, truncations"),
        ({"next_observations": np.zeros((10, 12))}, r"next_observations is float64\(10, 12\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_fields(changes, message, tmp_path):
    path = write(tmp_path / "data.hdf5", **changes)
    with pytest.raises(UserError, match=f"^{path}.*{message}"):
        own(path)


def add_virtual(file, name):
    """Rows that are in another file, which is not there."""
    layout = h5py.VirtualLayout((10, 11), np.float32)
    layout[:] = h5py.VirtualSource("gone.hdf5", "observations", (10, 11), np.float32)
    file.create_virtual_dataset(name, layout)


def add_half(file, name):
    file.create_dataset(name, (10, 11), np.float32, chunks=(5, 11), compression="gzip")[:5] = 1


ELSEWHERE = dict(shape=(10, 11), dtype=np.uint8, external=[(__file__, 0, 110)])
NOWHERE = [partial(h5py.File.create_dataset, **each) for each in (ELSEWHERE, dict(data=h5py.Empty("f")))]


@pytest.mark.parametrize("add", [add_virtual, add_half, h5py.File.create_group, *NOWHERE])
def test_rows_that_were_never_written(add, tmp_path):
    """HDF5 reads them as zeros, without a word."""
    path = write(tmp_path / "data.hdf5", observations=None)
    with h5py.File(path, "a") as file:
        add(file, "observations")
    with pytest.raises(UserError, match=f"^{path}: .*observations is no array, or has rows never written"):
        own(path)


@pytest.mark.parametrize("name", ["none.hdf5", "folder", ""])
def test_paths_without_a_file(name, tmp_path, monkeypatch):
    """In a resumed run a relative path is the checkpoint's, and seen from another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    message = rf"there is no file {re.escape(name or '.')} \(seen from {tmp_path}\); .*in a resumed run"
    with pytest.raises(UserError, match=message):
        own(name)


# --- Names ---
@pytest.mark.parametrize(
    ("task", "nearest"),
    [
        ("hoper-medium-v2", "hopper-medium-v2"),
        ("bandit-8-gaussian-v0", "bandit-8gaussians-v0"),
        ("Hoper-v4", "Hopper-v4"),
        ("data/my_file.hdf5", "--dataset"),
        ("a/" + "x" * 300 + "-v0", "none"),
        ("", "none"),
    ],
)
def test_unknown_tasks(task, nearest):
    with pytest.raises(UserError, match=f"unknown task '{task}'[^$]*{nearest}"):
        find_task(task)


# --- Minari ---
def test_minari_box(minari_folder):
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    episodes = record("local/pendulum/random-v0", env, ref_min_score=-100.0, ref_max_score=0.0)
    data = load_dataset(find_task("local/pendulum/random-v0"))
    assert data.name == "local/pendulum/random-v0"
    assert data.reference_returns == (-100.0, 0.0)
    assert len(data.rewards) == 60  # nothing is dropped
    for number, episode in enumerate(episodes):
        rows = slice(20 * number, 20 * number + 20)
        np.testing.assert_array_equal(data.observations[rows], episode["observations"][:-1])
        np.testing.assert_array_equal(data.next_observations[rows], episode["observations"][1:])
        torques = 2 * data.actions[rows]  # in [-2, 2]
        np.testing.assert_allclose(torques, episode["actions"], atol=1e-6)
    np.testing.assert_array_equal(data.terminals, 0)  # cut, not ended
    np.testing.assert_array_equal(np.flatnonzero(data.episode_ends), [19, 39, 59])
    returns = [sum(episode["rewards"]) for episode in episodes]
    np.testing.assert_allclose(data.episode_returns, returns, rtol=1e-5)

    # A scaled action does in the evaluation env what the original one did in the recorded one.
    eval_env = make_env("local/pendulum/random-v0")
    assert (eval_env.action_space.low, eval_env.action_space.high) == (-1, 1)
    assert eval_env.spec.max_episode_steps == 20
    eval_env.reset(seed=0)
    for row in range(5):
        observation, reward, *_ = eval_env.step(data.actions[row])
        np.testing.assert_allclose(observation, data.next_observations[row], atol=1e-5)
        assert reward == pytest.approx(data.rewards[row], abs=1e-5)


def test_minari_goal_conditioned(minari_folder, capsys):
    episodes = record("local/reach-v0", gymnasium.make("Reach-v0"))
    data = load_dataset(find_task("local/reach-v0"))
    assert data.reference_returns is None
    assert data.observations.shape == (15, 7)
    keys = ["achieved_goal", "desired_goal", "observation"]  # the environment has them in another order
    flat = [np.concatenate([each[key] for key in keys]) for each in episodes[0]["observations"]]
    np.testing.assert_array_equal(data.observations[:5], flat[:-1])
    np.testing.assert_array_equal(data.next_observations[:5], flat[1:])
    np.testing.assert_array_equal(data.terminals.reshape(3, 5), [[0, 0, 0, 0, 1]] * 3)
    np.testing.assert_allclose(data.actions[:5], np.array(episodes[0]["actions"]) / 2 - 1, atol=1e-6)
    assert "local/reach-v0 has actions in Box(0.0, 4.0, (2,), float32)" in capsys.readouterr().out
    env = make_env("local/reach-v0")
    np.testing.assert_array_equal(env.reset(seed=0)[0].astype(np.float32), data.observations[0])
    assert env.step(np.ones(2, np.float32))[1] == 8


def change_metadata(folder, **changes):
    """Replace entries of a Minari dataset's metadata; None takes one out."""
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in metadata.items() if value is not None}))


def test_minari_actions_outside_their_box(minari_folder):
    env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    record("local/pendulum-v0", env)
    with h5py.File(minari_folder / "local/pendulum-v0/data/main_data.hdf5", "a") as file:
        file["episode_1/actions"][:] = 50
    with pytest.raises(UserError, match="v0: actions from .* to 50, 20 of 60 .* bounds -2 and 2"):
        load_dataset(find_task("local/pendulum-v0"))


def test_wrappers_of_a_minari_dataset(minari_folder):
    """They change what a return means: refused by name; with a file's --dataset nobody needs them."""
    plain = gymnasium.make("Pendulum-v1", max_episode_steps=20)
    record("local/clipped-v0", gymnasium.wrappers.ClipReward(plain, -1.0, 0.0))
    record("local/watched-v0", gymnasium.wrappers.RecordEpisodeStatistics(plain))
    monitored = json.loads(plain.spec.to_json())
    monitored["additional_wrappers"] = [{"name": "Monitor", "entry_point": "gone:Monitor", "kwargs": None}]
    record("local/monitored-v0", plain)
    change_metadata(minari_folder / "local/monitored-v0", env_spec=json.dumps(monitored))
    for name in ("watched", "monitored"):
        assert make_env(f"local/{name}-v0").spec.id == "Pendulum-v1"
    with pytest.raises(UserError, match="clipped-v0 .* in wrappers, ClipReward; --eval-episodes 0 trains"):
        make_env("local/clipped-v0")
    assert len(load_dataset(find_task("local/clipped-v0")).rewards) == 60
    assert make_env("Pendulum-v1", dataset="local/clipped-v0").spec.id == "Pendulum-v1"


def test_minari_datasets_that_cannot_be_used(minari_folder):
    with pytest.raises(UserError, match="(?s)local/none-v0.*By hand"):
        load_dataset(find_task("local/none-v0"))
    record("local/cartpole-v0", gymnasium.make("CartPole-v1"))
    with pytest.raises(UserError, match="^local/cartpole-v0: .*Discrete"):
        load_dataset(find_task("local/cartpole-v0"))


@pytest.mark.parametrize("task", ["Pendulum-v1", "dm_control/cheetah-run-v0"])
def test_nobody_is_asked_when_a_file_is_given(task, minari_folder, monkeypatch):
    """An id with a namespace may be Minari's or Gymnasium's; the message says how to name the second."""
    monkeypatch.setattr("minari.download_dataset", pytest.fail)
    pendulum_file(minari_folder / "data.hdf5", np.zeros((10, 1)))
    own(minari_folder / "data.hdf5", task)
    if "/" in task:
        message = "names recorded data; .*<module that registers it>:dm_control/cheetah-run-v0"
        for dataset in (str(minari_folder / "data.hdf5"), None):
            data = own(dataset, task) if dataset else None
            with pytest.raises(UserError, match=message):
                make_envs(find_task(task), 1, SimpleNamespace(env_kwargs=(), dataset=dataset), data)


@pytest.mark.parametrize("lost", [{}, {"observation_space": None}])
def test_a_minari_dataset_executes_nothing(lost, minari_folder):
    """Its environment is made by its registered id; a module and a function that it names are not touched."""
    record("local/reach-v0", gymnasium.make("Reach-v0"))
    victim = minari_folder / "victim"
    spec = gymnasium.spec("Pendulum-v1").to_json()
    spec = json.loads(spec) | {"id": "gone:Hostile-v0", "entry_point": "builtins:open"}
    spec["kwargs"] = {"file": str(victim), "mode": "w"}
    change_metadata(minari_folder / "local/reach-v0", env_spec=json.dumps(spec), **lost)
    with pytest.raises(UserError, match="metadata.json lacks" if lost else "unknown task 'Hostile-v0'"):
        make_env("local/reach-v0")
    assert not victim.exists()


# --- Bandits ---
@pytest.mark.parametrize("task", BANDIT_TASKS)
def test_bandit_data(task):
    """The best mode pays 1 and is there, but far from the most frequent."""
    data = load_dataset(find_task(task), seed=1)
    assert data.observations.shape == data.next_observations.shape == (10_000, 1)
    assert data.actions.shape == (10_000, 2)
    assert data.terminals.all() and data.episode_ends.all()
    np.testing.assert_array_equal(data.episode_returns, data.rewards)
    np.testing.assert_allclose(data.rewards, bandit_reward(task, data.actions), atol=1e-6)
    assert data.reference_returns == (0, 1)
    assert np.mean(np.abs(data.actions) == 1) < 1e-3  # hardly anything had to be clipped
    np.testing.assert_array_equal(load_dataset(find_task(task), seed=1).actions, data.actions)
    assert not np.array_equal(load_dataset(find_task(task), seed=2).actions, data.actions)

    best = len(BANDITS[task]) - 1
    of_modes = bandit_reward(task, BANDITS[task])
    mode = np.linalg.norm(data.actions[:, None] - BANDITS[task], axis=2).argmin(1)
    assert np.all(np.diff(of_modes) >= 0) and of_modes[0] == 0 and of_modes[best] == 1
    counts = np.bincount(mode, minlength=best + 1)
    assert 0 < counts[best] < 0.7 * counts.max()
    assert data.rewards.mean() < (0.5 if "swissroll" in task else 0.4)
    assert data.rewards[mode == best].mean() > 0.7


# --- Rewards to train on ---
def with_rewards(rewards, episode_ends):
    """A dataset of which only rewards and episode ends matter."""
    rewards = np.array(rewards, np.float32)
    empty = np.zeros((len(rewards), 1), np.float32)
    ends = np.array(episode_ends, np.float32)
    return Dataset("a-task", empty, empty, rewards, empty, ends, ends, np.zeros(0), None)


TUNED = {
    "none": [0, 1, 3, 2],
    "iql_antmaze": [-1, 0, 2, 1],
    "cql_antmaze": [-2, 2, 10, 6],
    "antmaze100": [0, 100, 300, 200],
    "iql_locomotion": [0, 250, 750, 500],  # returns 1 and 5
    "normalize": np.array([-1.5, -0.5, 1.5, 0.5]) / np.sqrt(5 / 3),
    "minmax": np.array([-3, -1, 3, 1]) / 3,
}


@pytest.mark.parametrize("rule", get_args(RewardRule))
def test_reward_rules(rule):
    tuned, expected = tune_rewards(with_rewards([0, 1, 3, 2], [0, 1, 0, 1]), rule), TUNED[rule]
    assert tuned.dtype == np.float32
    np.testing.assert_allclose(tuned, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "rewards", "message"),
    [
        ("iql_locomotion", [0.1] * 9, "a-task: --reward-tune iql_locomotion is undefined"),
        ("normalize", [0.1] * 9, "--reward-tune normalize is undefined"),
        ("minmax", [0.1] * 9, "--reward-tune minmax is undefined"),
        ("iql_locomotion", [0.1, 0.2, 0.3], "undefined"),  # one episode only
    ],
)
def test_reward_rules_refuse(rule, rewards, message):
    ends = [0, 0, 1] * (len(rewards) // 3)
    with pytest.raises(UserError, match=message):
        tune_rewards(with_rewards(rewards, ends), rule)
