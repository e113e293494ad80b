"""From a task to its transitions, as arrays.

data = load_dataset(find_task("hopper-medium-v2"))

D4RL's names are read by D4RL's own rules, row for row; a user's file as a user means it (own_data.py). What
is dropped, clipped, rescaled or ignored is said in one line, with its count, or refused.
"""

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np

from common.cli import UserError
from common.scores import Reference, reference_returns
from common.tasks import DATA, Task, is_minari_id

REQUIRED = ["observations", "actions", "rewards", "terminals"]
OPTIONAL = ["timeouts", "next_observations"]
RewardRule = Literal[
    "none", "iql_locomotion", "iql_antmaze", "cql_antmaze", "antmaze", "antmaze100", "normalize", "minmax"
]


@dataclass(frozen=True)
class Dataset:
    """Transitions, none across an episode boundary, and what their episodes scored."""

    name: str  # what to call it on screen
    observations: np.ndarray  # (N, obs_dim) float32
    actions: np.ndarray  # (N, action_dim) float32 in [-1, 1]
    rewards: np.ndarray  # (N,) float32
    next_observations: np.ndarray  # (N, obs_dim) float32
    terminals: np.ndarray  # (N,) float32, 1 where the environment ended (a timeout is not terminal)
    episode_ends: np.ndarray  # (N,) float32, 1 on the last transition of each episode
    episode_returns: np.ndarray  # (num complete episodes,) undiscounted, as an evaluation would count them
    reference_returns: Reference  # returns that score 0 and 100

    def checksum(self) -> list[int]:
        """By which a resumed run knows its transitions again."""
        columns = self.observations, self.actions, self.rewards, self.next_observations, self.terminals
        return [zlib.crc32(column.data) for column in columns]

    def largest(self) -> tuple[str, float]:
        """Name and largest absolute value of the column that has the largest numbers."""
        sizes = np.abs(np.column_stack([self.observations, self.rewards])).max(0)  # (obs_dim + 1,)
        column = int(sizes.argmax())
        return f"observations[:, {column}]" if column < len(sizes) - 1 else "rewards", float(sizes[column])


def load_dataset(
    task: Task, dataset: str | None = None, seed: int = 0, action_bounds: tuple[float, float] = (-1, 1)
) -> Dataset:
    """The transitions of a task. UserError: failed download, broken or unusable data.

    `dataset`, an HDF5 file or a Minari id, replaces the task's own transitions. `action_bounds` are what -1
    and 1 of the policy are in such a file; Minari's datasets say it themselves. `seed` is for the bandits,
    which are generated.
    """
    source, reference = dataset or task.name, reference_returns(task.name)
    if is_minari_id(source):
        from common.minari_data import minari_reference, read_minari

        fields = check_fields(source, read_minari(source))
        fields["episode_returns"] = sum_by_episode(fields["rewards"], fields["episode_ends"])
        reference = reference or minari_reference(source)
    elif dataset is not None:
        from common.own_data import read_own

        fields = read_own(Path(dataset).expanduser(), task, *action_bounds)
    elif task.kind == "d4rl":
        fields = read_d4rl(d4rl_file(task), task)
    elif task.kind == "bandit":
        from common.bandits import sample_bandit

        fields = sample_bandit(task.name, seed)
    else:
        raise UserError(f"{task.name} has no transitions of its own: name a file or Minari id with --dataset")
    arrays = {name: np.asarray(values, np.float32) for name, values in fields.items()}
    name = task.name if dataset is None else f"{task.name} with the data of {dataset}"
    return Dataset(name, **arrays, reference_returns=reference)


# === D4RL's files ===
def d4rl_file(task: Task) -> Path:
    """Path of the task's file; it is bundled, or downloaded to D4RL_DATASET_DIR or ~/.d4rl/datasets."""
    name = Path(task.file["file"]).name
    if (DATA / name).exists():
        return DATA / name
    path = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser() / name
    if not path.exists():
        from common.downloads import download

        download(task.file, path)
    size = path.stat().st_size  # hashing half a gigabyte at every start would be too slow
    if task.file["bytes"] not in (None, size):
        advice = f"--dataset {path} uses it as it is; if you move it away, D4RL's is downloaded."
        raise UserError(f"{path} has {size:,} bytes, not {task.file['bytes']:,} like D4RL's file\n{advice}")
    return path


def read_d4rl(path: Path, task: Task) -> dict[str, np.ndarray]:
    """The transitions of D4RL's `qlearning_dataset`, one for one.

    The next observation of a row is that of the row below. So the last row is dropped, and every timeout row,
    terminal or not, since the row below is another episode's. Other terminal rows stay: their next
    observation, wrong as it is, is never bootstrapped from. Returns the arrays of `Dataset` by name.
    """
    rows, _ = read_file(path)
    terminals = rows["terminals"].astype(bool)
    timeouts = rows["timeouts"] if "timeouts" in rows else cut_at_horizon(terminals, task.horizon, late=True)
    timeouts = timeouts.astype(bool)
    keep = np.flatnonzero(~timeouts[:-1])
    if keep.size == 0:
        raise UserError(f"{path} has no transition: {len(timeouts)} rows, {timeouts.sum()} of them timeouts")
    fields = {name: rows[name][keep] for name in REQUIRED}
    fields["actions"] = clip(path, fields["actions"])
    fields["next_observations"] = rows["observations"][keep + 1]
    fields["episode_ends"] = terminals[keep] | timeouts[keep + 1]
    fields["episode_ends"][-1] = True
    return fields | {"episode_returns": evaluated_returns(task, rows["rewards"], terminals, timeouts)}


# === Files ===
def read_file(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The checked fields of an HDF5 file in D4RL's layout, and the names of what else is in it.

    UserError: it cannot be read, or a field is missing or unusable.
    """
    if not path.is_file():  # to open a pipe would take forever
        advice = "--dataset takes an HDF5 file or a Minari id; in a resumed run it is the checkpoint's"
        raise UserError(f"there is no file {path} (seen from {os.getcwd()}); {advice}")
    try:
        with h5py.File(path, "r") as file:
            known = [name for name in REQUIRED + OPTIONAL if isinstance(file.get(name), h5py.Dataset)]
            if missing := [name for name in REQUIRED if name not in known]:
                raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(file) or 'nothing'}")
            if "timeouts" not in known and "truncations" in file:
                raise UserError(f"{path} has truncations; in D4RL's layout they are called timeouts")
            for name in known:
                if not is_here(file[name], file):
                    raise UserError(f"{path}: {name} has rows that were never written, or are in other files")
            fields = {name: file[name][()] for name in known}
            ignored = [name for name in file if name not in known]
    except (OSError, RuntimeError, KeyError, ValueError, MemoryError) as error:  # h5py's and NumPy's
        raise UserError(f"cannot read {path} as an HDF5 file: {error}") from error
    return check_fields(path, fields), ignored


def is_here(values: h5py.Dataset, file: h5py.File) -> bool:
    """Whether all rows were written, into this file; of others HDF5 reads zeros, or any file they name."""
    written = values.id.get_space_status() == h5py.h5d.SPACE_STATUS_ALLOCATED or not values.size
    return written and not values.is_virtual and not values.external and values.file == file


def check_fields(source: str | Path, fields: dict) -> dict[str, np.ndarray]:
    """The fields as float32, (N, size) or (N,). UserError for other shapes, NaN, infinity, and no numbers."""
    checked = {}
    num_rows = np.atleast_1d(fields["observations"]).shape[0]
    for name, values in fields.items():
        values = np.asarray(values)
        is_vector = name.endswith(("observations", "actions"))
        if not is_vector and values.shape == (num_rows, 1):
            values = values[:, 0]
        wrong_shape = values.ndim != 1 + is_vector or len(values) != num_rows or values.size == 0
        if wrong_shape or values.dtype.kind not in "biuf":
            found, size = f"{values.dtype}{values.shape}", " size" if is_vector else ""
            raise UserError(f"{source}: {name} is {found}, not numbers shaped ({num_rows},{size})")
        if name == "actions" and values.dtype.kind != "f":
            raise UserError(f"{source}: actions are {values.dtype}; discrete actions cannot be learned here")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
            checked[name] = values.astype(np.float32, copy=False)
        bad = ~np.isfinite(checked[name]).reshape(num_rows, -1).all(axis=1)  # (N,)
        if bad.any():
            raise UserError(f"{source}: {name} has NaN or infinity in {bad.sum()} rows, first {bad.argmax()}")
        if name in ("terminals", "timeouts") and not np.isin(checked[name], (0, 1)).all():
            raise UserError(f"{source}: {name} has {values.min()} to {values.max()}; it must be 0 or 1")
    return checked


def clip(source: str | Path, actions: np.ndarray) -> np.ndarray:
    """Actions clipped to [-1, 1]; says how many values that changes."""
    if (outside := np.abs(actions) > 1).any():
        print(f"{source}: clipped {outside.sum():,} of {outside.size:,} action values to [-1, 1]")
    return actions.clip(-1, 1)


def cut_at_horizon(terminals: np.ndarray, horizon: int | None, late: bool = False) -> np.ndarray:
    """Timeouts (N,) for a file without them: true where an episode reaches the horizon.

    late: as in D4RL the count of an episode that follows a terminal row starts at that row, one step early.
    """
    timeouts, start = np.zeros_like(terminals), 0
    horizon = horizon or len(terminals) + 1
    for end in [*np.flatnonzero(terminals), len(terminals) - 1]:
        timeouts[start + horizon - 1 : end + 1 : horizon] = True
        start = end if late and not timeouts[end] else end + 1
    return timeouts


def evaluated_returns(task: Task, rewards: np.ndarray, terminals: np.ndarray, timeouts: np.ndarray):
    """The returns (num complete episodes,) that the recorded episodes would have got in an evaluation.

    Two domains were recorded otherwise than they are evaluated: ants go on after they reached the goal, and a
    step in the kitchen is rewarded for all that is done by then.
    """
    ends = timeouts if task.family == "antmaze" else terminals | timeouts
    episodes = np.split(rewards.astype(np.float64), np.flatnonzero(ends) + 1)[:-1]
    count = np.max if task.family in ("antmaze", "kitchen") else np.sum
    return np.array([count(episode[: task.horizon]) for episode in episodes])


def sum_by_episode(rewards: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Undiscounted returns of the complete episodes; `ends` (N,) is true on the last row of each."""
    return np.diff(np.cumsum(rewards, dtype=np.float64)[np.flatnonzero(ends)], prepend=0.0)


# === Rewards ===
def tune_rewards(data: Dataset, rule: RewardRule) -> np.ndarray:
    """The rewards (N,) to train on, by one of the rules of the official codes; scores use the raw rewards.

    Prints what the rule does to them. UserError: data for which the rule would divide by zero.
    """
    rewards = data.rewards.astype(np.float64)
    if rule == "none":
        print(f"rewards as recorded: {describe(rewards)}")
        return data.rewards
    rules = {  # rule: what to subtract, then what to divide by
        "iql_locomotion": (0, np.ptp(sum_by_episode(rewards, data.episode_ends)) / 1000),  # returns span 1000
        "iql_antmaze": (1, 1),
        "cql_antmaze": (0.5, 1 / 4),
        "antmaze": (0.25, 1 / 2),
        "antmaze100": (0, 1 / 100),
        "normalize": (rewards.mean(), rewards.std(ddof=1)),
        "minmax": ((rewards.max() + rewards.min()) / 2, np.ptp(rewards) / 2),  # onto [-1, 1]
    }
    shift, scale = rules[rule]
    if not scale > 1e-9:
        reason = "all rewards, or all returns of whole episodes, are equal"
        raise UserError(f"{data.name}: --reward-tune {rule} is undefined: {reason}; none keeps the rewards")
    tuned = ((rewards - shift) / scale).astype(np.float32)
    print(f"rewards by {rule}: {describe(rewards)} -> {describe(tuned)}")
    return tuned


def describe(rewards: np.ndarray) -> str:
    """Range, mean and sum of rewards (N,), for the screen."""
    low, high, mean = (f"{value:.4g}" for value in (rewards.min(), rewards.max(), rewards.mean()))
    return f"[{low}, {high}], mean {mean}, sum {rewards.sum(dtype=np.float64):.4g}"
