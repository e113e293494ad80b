"""What a task name turns into: D4RL's, Minari's and the bandits' transitions, and rewards to train on."""

import fcntl
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import gymnasium
import h5py
import numpy as np
import pytest
from recordings import Reach, flags, record, write
from runs import ROOT

from common import bandits, tasks
from common.bandits import BANDITS, RADIAL, bandit_mode, bandit_reward
from common.datasets import Dataset, RewardRule, load_dataset, task_reference, tune_rewards
from common.envs import make_env
from common.tasks import BANDIT_TASKS, D4RL_TASKS, UserError, is_minari_id, table_names, user_path

HOPPER = "hopper-medium-v2"
minari_test = pytest.mark.filterwarnings("ignore::UserWarning")  # what Minari misses in its metadata


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
        (flags(4, 5, 6), flags(7), 1000, "0>1 1>2 2>3 3>4 4>5* 5>6* 6>7* 8>9"),  # an ant inside the goal
    ],
)
def test_worked_examples(terminals, timeouts, horizon, expected, tmp_path, monkeypatch):
    monkeypatch.setitem(D4RL_TASKS[HOPPER], "horizon", horizon)
    path = write(tmp_path / "data.hdf5", terminals=terminals, timeouts=timeouts)
    assert emitted(load_dataset(HOPPER, path)) == expected


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
        monkeypatch.setitem(D4RL_TASKS[HOPPER], "horizon", horizon)
        if not expected:
            with pytest.raises(UserError, match="no transition"):
                load_dataset(HOPPER, path)
            continue
        data = load_dataset(HOPPER, path)
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
    data = load_dataset(HOPPER, path)
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


def test_double_precision_columns_and_float_flags(tmp_path):
    """medium-replay and full-replay are stored in float64; some files have (N, 1) rewards and terminals."""
    plain = load_dataset(HOPPER, write(tmp_path / "plain.hdf5", terminals=flags(3), timeouts=flags(7)))
    odd = {
        "observations": np.repeat(np.arange(10.0)[:, None], 11, axis=1),
        "rewards": np.arange(10.0)[:, None],
        "terminals": flags(3)[:, None].astype(np.float64),
        "timeouts": flags(7).astype(np.uint8),
    }
    data = load_dataset(HOPPER, write(tmp_path / "odd.hdf5", **odd))
    for name, values in vars(plain).items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(getattr(data, name), values)
            assert getattr(data, name).dtype == np.float32


def test_what_is_not_needed_is_not_read(tmp_path):
    """Kitchen's `infos` is a vector of labels, gym's a group; gym's own next observations are not D4RL's."""
    labels = np.array([b"microwave", b"kettle"] * 5)
    path = write(tmp_path / "data.hdf5", infos=labels, next_observations=np.full((10, 11), np.nan))
    assert len(load_dataset("kitchen-mixed-v0", path).rewards) == 9
    with h5py.File(path, "a") as file:
        file["metadata/policy/weight"] = np.full(3, np.nan)
    assert len(load_dataset("kitchen-mixed-v0", path).rewards) == 9


def test_actions_outside_are_clipped_and_counted(tmp_path, capsys):
    actions = np.zeros((10, 3), np.float32)
    actions[2] = 1.5, -2, 1
    data = load_dataset(HOPPER, write(tmp_path / "data.hdf5", actions=actions))
    np.testing.assert_array_equal(data.actions[2], [1, -1, 1])
    assert capsys.readouterr().out.endswith("clipped 2 of 27 action values to [-1, 1]\n")
    load_dataset(HOPPER, write(tmp_path / "data.hdf5"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("task, dropped", [("Hopper-v4", 2), ("hopper-mini-v0", 2), ("bandit-moons-v0", 1)])
def test_horizon_of_other_tasks(task, dropped, tmp_path):
    """1,500 rows without timeouts are cut where the task's own environment ends; a bandit has no limit."""
    fields = {"observations": np.zeros((1500, 11)), "actions": np.zeros((1500, 3)), "timeouts": None}
    path = write(tmp_path / "data.hdf5", **fields, rewards=np.ones(1500), terminals=np.zeros(1500))
    assert len(load_dataset(task, path).rewards) == 1500 - dropped


def test_without_an_environment_a_file_needs_timeouts(tmp_path):
    load_dataset("Hopper-v2", write(tmp_path / "whole.hdf5"))
    with pytest.raises(UserError, match="environment of Hopper-v2: .*\nwithout it the file needs timeouts"):
        load_dataset("Hopper-v2", write(tmp_path / "data.hdf5", timeouts=None))


def test_bundled_task():
    data = load_dataset("hopper-mini-v0")
    assert data.observations.shape[1] == 11 and data.actions.shape[1] == 3
    assert len(data.rewards) > 1000 and len(data.episode_returns) > 10
    assert data.reference_returns == (-20.272305, 3234.3)
    assert data.make_env().spec.id == "Hopper-v4"
    assert (tasks.DATA / "hopper-mini-v0.hdf5").stat().st_size <= 2.5e6


# --- Bad files ---

NAN_ROW = np.zeros((10, 11), np.float32)
NAN_ROW[4, 2] = np.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None}, "lacks rewards; it has actions, observations, terminals, timeouts"),
        ({"observations": None, "actions": None}, "lacks observations, actions"),
        ({"timeouts": None, "truncations": flags(4)}, "has truncations; .* called timeouts"),
        ({"observations": NAN_ROW}, "observations has NaN or infinity in 1 rows, first 4"),
        ({"rewards": np.where(flags(6, 8), np.inf, 0)}, "rewards has NaN or infinity in 2 rows, first 6"),
        ({"actions": np.full((10, 3), 1e300)}, "actions has NaN or infinity in 10 rows, first 0"),
        ({"observations": np.zeros(10)}, r"observations is float64\(10,\), .* shaped \(10, size\)"),
        ({"rewards": np.zeros((10, 2))}, r"rewards is float64\(10, 2\), not numbers shaped \(10,\)"),
        ({"rewards": np.zeros(9)}, r"rewards is float64\(9,\), not numbers shaped \(10,\)"),
        ({"observations": 1.0}, r"observations is float64\(\)"),
        ({"observations": np.zeros((10, 0))}, r"observations is float64\(10, 0\)"),
        ({"observations": np.zeros((0, 11))}, r"observations is float64\(0, 11\)"),
        ({"rewards": np.array([b"one"] * 10)}, "rewards is .*not numbers"),
        ({"rewards": b"one"}, "rewards is .*not numbers"),
        ({"rewards": h5py.Empty("f")}, "rewards is .*not numbers"),
        ({"observations": np.zeros((10, 11), complex)}, r"observations is complex128\(10, 11\)"),
        ({"observations": h5py.SoftLink("/nothing")}, "lacks observations"),
        ({"observations": h5py.SoftLink("/observations")}, "too many links"),
        ({"terminals": np.full(10, 0.5)}, "terminals has 0.5 to 0.5; it must be 0 or 1"),
        ({"timeouts": np.arange(10)}, "timeouts has 0 to 9; it must be 0 or 1"),
        ({"timeouts": np.ones(10, bool)}, "no transition: 10 rows, 10 of them timeouts"),
    ],
)
def test_bad_fields(changes, message, tmp_path):
    path = write(tmp_path / "data.hdf5", **changes)
    with pytest.raises(UserError, match=f"^(cannot read )?{path}.*{message}"):
        load_dataset(HOPPER, path)


@pytest.mark.parametrize("timeouts", [np.zeros(1, bool), None])
def test_a_single_row_is_no_transition(timeouts, tmp_path):
    fields = {name: np.zeros((1, size)) for name, size in [("observations", 11), ("actions", 3)]}
    fields |= {"rewards": np.zeros(1), "terminals": np.zeros(1, bool), "timeouts": timeouts}
    with pytest.raises(UserError, match="has no transition: 1 rows"):
        load_dataset(HOPPER, write(tmp_path / "data.hdf5", **fields))


def add_virtual(file):
    """Rows that are in another file, which is not there."""
    layout = h5py.VirtualLayout((10, 11), np.float32)
    layout[:] = h5py.VirtualSource("gone.hdf5", "observations", (10, 11), np.float32)
    file.create_virtual_dataset("observations", layout)


def add_external(file):
    """Rows that are in any other file, here the first bytes of this one."""
    file.create_dataset("observations", (10, 11), np.uint8, external=[(__file__, 0, 110)])


def add_link(file):
    """Rows that are in another HDF5 file."""
    other = write(Path(file.filename).with_name("other.hdf5"))
    file["observations"] = h5py.ExternalLink(other, "observations")


def add_half(file):
    """Chunks of which only the first was written."""
    file.create_dataset("observations", (10, 11), np.float32, chunks=(5, 11), compression="gzip")[:5] = 1


@pytest.mark.parametrize(
    "add",
    [
        add_virtual,
        add_external,
        add_link,
        add_half,
        lambda file: file.create_dataset("observations", (10, 11), np.float32),
        lambda file: file.create_dataset("observations", (10**12, 11), np.float32, chunks=(10**6, 11)),
    ],
    ids=["virtual", "external", "link", "half", "never", "huge"],
)
def test_rows_that_were_never_written(add, tmp_path):
    """HDF5 reads them as zeros, without a word."""
    path = write(tmp_path / "data.hdf5", observations=None)
    with h5py.File(path, "a") as file:
        add(file)
    with pytest.raises(UserError, match=f"^{path}: observations has rows that were never written"):
        load_dataset(HOPPER, path)


def test_files_that_are_not_hdf5_or_are_damaged(tmp_path):
    """None of them is called damaged, and nobody is told to replace it: a locked file may be good data."""
    path = tmp_path / "data.hdf5"
    values = np.random.default_rng(0).normal(size=(1000, 11))
    with h5py.File(write(path, observations=None), "a") as file:
        stored = file.create_dataset("observations", data=values, compression="gzip", fletcher32=True)
        offset = stored.id.get_chunk_info(0).byte_offset
    whole = path.read_bytes()
    wrong_block = whole[: offset + 50] + bytes(100) + whole[offset + 150 :]
    for content in (b"", b"not hdf5", whole[: len(whole) // 2], wrong_block):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^cannot read {path} as an HDF5 file: ") as error:
            load_dataset(HOPPER, str(path))
        assert "replace" not in str(error.value) and "delete" not in str(error.value)


def test_a_file_that_another_process_is_writing(tmp_path, monkeypatch):
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "TRUE")
    path = write(tmp_path / "data.hdf5")
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="unable to lock file"):
            load_dataset(HOPPER, path)
    assert len(load_dataset(HOPPER, path).rewards) == 9


@pytest.mark.parametrize("name", ["none.hdf5", "folder", "pipe", "", "~nosuchuser/data.hdf5", "x" * 300])
def test_paths_without_a_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="there is no file|home folder is not known"):
        load_dataset(HOPPER, name)


# --- Names ---


@pytest.mark.parametrize(
    ("task", "nearest"),
    [
        ("hoper-medium-v2", "hopper-medium-v2"),
        ("antmaze-small-v0", "antmaze-umaze-v0"),
        ("bandit-moon-v0", "bandit-moons-v0"),
        ("bandit-25-gaussian-v0", "bandit-25gaussians-v0"),
        ("Hoper-v4", "Hopper-v4"),
        ("data/my_file.hdf5", "--dataset"),
        ("a/" + "x" * 300 + "-v0", "none"),
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
    env = load_dataset("Hopper-v4", write(tmp_path / "data.hdf5")).make_env()
    assert env.observation_space.shape == (11,)


MINARI_IDS = ("mujoco/hopper/medium-v0", "D4RL/door/human-v2", "local/mine-v0", "a/b/d_e-v12")
NOT_MINARI_IDS = ["data/x.hdf5", "/x-v0", "../x-v0", "a/x", "~/x-v0", "Hopper-v4", "phys2d/Pendulum-v0"]


@pytest.mark.parametrize("name", MINARI_IDS)
def test_minari_ids(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_minari_id(name)
    Path(name).parent.mkdir(parents=True)
    Path(name).touch()
    assert not is_minari_id(name)  # it is a file


@pytest.mark.parametrize("name", [HOPPER, *NOT_MINARI_IDS])
def test_not_minari_ids(name):
    assert not is_minari_id(name)


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("hopper-medium-v2", ["hopper-medium-v2"]),
        ("antmaze-umaze-v2", ["antmaze-umaze-v2", "antmaze-umaze-v0", "antmaze"]),
        ("D4RL/antmaze/umaze-v1", ["D4RL/antmaze/umaze-v1", "antmaze-umaze-v0", "antmaze"]),
        ("AdroitHandDoor-v1", ["AdroitHandDoor-v1", "door-v1", "adroit"]),
        ("bandit-corners-v0", ["bandit-corners-v0", "bandit-corners-v0", "bandit"]),
    ],
)
def test_names_in_tables_of_settings(task, names):
    assert table_names(task) == names


def test_a_machine_without_a_home_folder(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as for a user without an entry
    for task in (HOPPER, "D4RL/door/human-v2"):
        with pytest.raises(UserError, match="home folder is not known; set HOME"):
            load_dataset(task)
    assert len(load_dataset("hopper-mini-v0").rewards) > 1000
    assert user_path("/data") == Path("/data")


def test_rooms_that_are_loaded_only_when_needed():
    """Names of tasks are cheap; a Hopper run loads no other domain, no Minari and no downloads."""
    code = "import sys; import common.tasks; print(*sys.modules); from common.datasets import load_dataset\n"
    code += "load_dataset('hopper-mini-v0').make_env(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names, hopper = (set(line.split()) for line in run.stdout.splitlines())
    assert not names & {"torch", "numpy", "h5py", "gymnasium"}
    others = {"common.d4rl_envs", "common.minari_data", "common.downloads"}
    assert not hopper & {"torch", "minari", "gymnasium_robotics", *others}


# --- Minari ---


@minari_test
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
        torques = 2 * data.actions[rows]  # in [-2, 2]
        np.testing.assert_allclose(torques, episode["actions"], atol=1e-6)
    np.testing.assert_array_equal(data.terminals, 0)  # cut, not ended
    np.testing.assert_array_equal(np.flatnonzero(data.episode_ends), [19, 39, 59])
    returns = [sum(episode["rewards"]) for episode in episodes]
    np.testing.assert_allclose(data.episode_returns, returns, rtol=1e-5)

    # A scaled action does in the evaluation env what the original one did in the recorded one.
    eval_env = data.make_env()
    assert (eval_env.action_space.low, eval_env.action_space.high) == (-1, 1)
    assert eval_env.spec.max_episode_steps == 20
    eval_env.reset(seed=0)
    for row in range(5):
        observation, reward, *_ = eval_env.step(data.actions[row])
        np.testing.assert_allclose(observation, data.next_observations[row], atol=1e-5)
        assert reward == pytest.approx(data.rewards[row], abs=1e-5)


@minari_test
def test_minari_goal_conditioned(minari_folder):
    episodes = record("local/reach-v0", gymnasium.make("Reach-v0"))
    data = load_dataset("local/reach-v0")
    assert data.reference_returns is None
    assert data.observations.shape == (15, 7)
    flat = [gymnasium.spaces.flatten(Reach.observation_space, each) for each in episodes[0]["observations"]]
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


@minari_test
def test_minari_data_for_another_task(minari_folder):
    record("local/pendulum-v0", gymnasium.make("Pendulum-v1", max_episode_steps=20))
    data = load_dataset("Pendulum-v1", "local/pendulum-v0")
    assert data.reference_returns is None
    assert data.make_env().spec.max_episode_steps == 200  # of the task, not of the data
    sizes = "size 3 and actions of size 1, the environment of hopper-mini-v0 11 and 3"
    with pytest.raises(UserError, match=sizes):
        load_dataset("hopper-mini-v0", "local/pendulum-v0").make_env()


@minari_test
def test_minari_datasets_that_cannot_be_used(minari_folder, monkeypatch):
    with pytest.raises(UserError, match="no Minari dataset local/none-v0 .*: no folder /.*/data$"):
        load_dataset("local/none-v0")
    record("local/cartpole-v0", gymnasium.make("CartPole-v1"))
    with pytest.raises(UserError, match="^local/cartpole-v0: .*Discrete"):
        load_dataset("local/cartpole-v0")
    record("local/reach-v0", gymnasium.make("Reach-v0"))
    file = minari_folder / "local/reach-v0/data/main_data.hdf5"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match="cannot (use|read) the Minari dataset local/reach-v0: OSError"):
        load_dataset("local/reach-v0")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(file))
    with pytest.raises(UserError, match="no Minari dataset local/reach-v0 is on this machine"):
        load_dataset("local/reach-v0")


@minari_test
@pytest.mark.parametrize("add", [add_virtual, add_external, add_link, add_half])
def test_minari_rows_that_were_never_written(add, minari_folder):
    record("local/pendulum-v0", gymnasium.make("Pendulum-v1", max_episode_steps=10))
    with h5py.File(minari_folder / "local/pendulum-v0/data/main_data.hdf5", "a") as file:
        del file["episode_1/observations"]
        add(file)
        file.move("observations", "episode_1/observations")
    message = "local/pendulum-v0: ValueError: episode_1/observations has rows that were never written"
    with pytest.raises(UserError, match=message):
        load_dataset("local/pendulum-v0")


def change_metadata(folder, **changes):
    """Replace entries of a Minari dataset's metadata; None takes one out."""
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in metadata.items() if value is not None}))


@minari_test
@pytest.mark.parametrize("scores", [("low", "high"), (1, 1), (2, 1), (math.nan, 1), (0, math.inf), ([], 1)])
def test_minari_reference_scores_that_cannot_be(scores, minari_folder):
    record("local/reach-v0", gymnasium.make("Reach-v0"))
    change_metadata(minari_folder / "local/reach-v0", ref_min_score=scores[0], ref_max_score=scores[1])
    with pytest.raises(UserError, match="^local/reach-v0: .* are not two reference scores"):
        task_reference("local/reach-v0")


@minari_test
@pytest.mark.parametrize("lost", [{}, {"observation_space": None}])
def test_a_minari_dataset_executes_nothing(lost, minari_folder):
    """Its environment is made by its registered id; what else it names, here a function, is not called."""
    record("local/reach-v0", gymnasium.make("Reach-v0"))
    victim = minari_folder / "victim"
    spec = gymnasium.spec("Pendulum-v1").to_json()
    spec = json.loads(spec) | {"id": "Hostile-v0", "entry_point": "builtins:open"}
    spec["kwargs"] = {"file": str(victim), "mode": "w"}
    change_metadata(minari_folder / "local/reach-v0", env_spec=json.dumps(spec), **lost)
    with pytest.raises(UserError, match="metadata.json lacks" if lost else "Hostile.* doesn't exist"):
        load_dataset("local/reach-v0").make_env()
    assert not victim.exists()


@minari_test
def test_a_minari_dataset_without_an_environment(minari_folder):
    record("local/reach-v0", gymnasium.make("Reach-v0"))
    change_metadata(minari_folder / "local/reach-v0", env_spec=None, eval_env_spec=None)
    with pytest.raises(UserError, match="of local/reach-v0: .*names none; .*\n--eval-episodes 0 trains"):
        load_dataset("local/reach-v0").make_env()


# --- Bandits ---


@pytest.mark.parametrize("task", BANDIT_TASKS)
def test_bandit_data(task):
    """The best mode pays 1 and is there, but far from the most frequent; off the pattern nothing is paid."""
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

    centres = BANDITS[task]
    best = len(centres) - 1
    of_modes = bandit_reward(task, centres)
    assert np.all(np.diff(of_modes) >= 0) and of_modes[0] == 0 and of_modes[best] == 1
    mode = bandit_mode(task, data.actions)
    counts = np.bincount(mode, minlength=len(centres))
    assert 0 < counts[best] < 0.7 * counts.max()
    assert data.rewards.mean() < (0.5 if task in RADIAL else 0.4)
    assert data.rewards[mode == best].mean() > 0.7

    line = np.linspace(-1.5, 1.5, 81)
    grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    off = np.linalg.norm(grid[:, None] - centres, axis=2).min(axis=1) > 0.4
    assert off.sum() > 100 and bandit_reward(task, grid)[off].max() < 1e-3
    assert bandit_reward(task, grid).max() <= 1


def test_all_bandits_have_names():
    assert list(bandits.BANDITS) == BANDIT_TASKS


@pytest.mark.parametrize(("pattern", "count", "tops"), [("25gaussians", 25, 4), ("swissroll", 36, 1)])
def test_rewards_near_the_centre_and_far_from_it(pattern, count, tops):
    """Linear in a mode's distance from the centre, as in DTQL's toy study; the two add up to 1."""
    near, far = f"bandit-{pattern}-v0", f"bandit-{pattern}-far-v0"
    centres = BANDITS[far]
    radius = np.linalg.norm(centres, axis=1)
    expected = (radius - radius.min()) / np.ptp(radius)
    np.testing.assert_allclose(bandit_reward(far, centres), expected, atol=1e-12)
    np.testing.assert_allclose(bandit_reward(near, centres), 1 - expected, atol=1e-12)
    assert len(centres) == count and np.sum(expected == 1) == tops
    np.testing.assert_array_equal(BANDITS[near], centres[::-1])
    gaps = np.linalg.norm(centres[:, None] - centres, axis=2) + 9 * np.eye(count)
    assert gaps.min(axis=1).min() > 0.1 and gaps.min(axis=1).max() < 0.45


# --- Rewards to train on ---


def with_rewards(rewards, episode_ends):
    """A dataset of which only rewards and episode ends matter."""
    rewards = np.array(rewards, np.float32)
    empty = np.zeros((len(rewards), 1), np.float32)
    ends = np.array(episode_ends, np.float32)
    return Dataset("a-task", empty, empty, rewards, empty, ends, ends, np.zeros(0), None, lambda: None)


TUNED = {
    "none": [0, 1, 3, 2],
    "iql_antmaze": [-1, 0, 2, 1],
    "cql_antmaze": [-2, 2, 10, 6],
    "antmaze": [-0.5, 1.5, 5.5, 3.5],
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


def test_what_a_reward_rule_does_is_printed(capsys):
    data = with_rewards([0, 1, 3, 2], [0, 1, 0, 1])
    tune_rewards(data, "none")
    assert capsys.readouterr().out == "rewards as recorded: [0, 3], mean 1.5, sum 6\n"
    tune_rewards(data, "cql_antmaze")
    changed = "rewards by cql_antmaze: [0, 3], mean 1.5, sum 6 -> [-2, 10], mean 4, sum 16\n"
    assert capsys.readouterr().out == changed


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
