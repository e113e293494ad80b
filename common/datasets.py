"""From a task to its transitions, as arrays.

D4RL's names are read by D4RL's own rules, row for row; a user's file as a user means it (other_data.py). What
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

FIELDS = ["observations", "actions", "rewards", "terminals"]  # of a file in D4RL's layout
RewardRule = Literal[
    "none", "iql_locomotion", "iql_antmaze", "cql_antmaze", "antmaze100", "normalize", "minmax"
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

    def about(self) -> dict:
        """What a run's results say of it; by the checksum a resumed run knows its transitions again."""
        columns = self.observations, self.actions, self.rewards, self.next_observations, self.terminals
        mean = self.episode_returns.mean().item() if len(self.episode_returns) else None
        found = {"data": self.name, "data_mean": mean, "reference_returns": self.reference_returns}
        return found | {"data_checksum": [zlib.crc32(column.data) for column in columns]}


def load_dataset(task: Task, dataset: str | None = None, seed: int = 0, action_bounds=(-1, 1)) -> Dataset:
    """The transitions of a task. UserError: failed download, broken or unusable data.

    `dataset`, an HDF5 file or a Minari id, replaces the task's own transitions; `action_bounds` are what -1
    and 1 of the policy are in such a file. `seed` is for the bandits, which are generated.
    """
    source, reference = dataset or task.name, reference_returns(task.name)
    if tuple(action_bounds) != (-1, 1) and (dataset is None or is_minari_id(dataset)):
        raise UserError(f"--action-bounds are those of an HDF5 file, --dataset; {source} knows its own")
    try:
        if is_minari_id(source):
            from common.other_data import read_minari

            fields, own_reference = read_minari(source)
            reference = reference or own_reference
        elif dataset is not None:
            from common.other_data import read_own

            fields = read_own(Path(dataset).expanduser(), task, *action_bounds)
        elif task.kind == "d4rl":
            fields = read_d4rl(task)
        elif task.kind == "bandit":
            from common.bandits import sample_bandit

            fields = sample_bandit(task.name, seed)
        else:
            raise UserError(f"{task.name} has no transitions of its own: name a file or id with --dataset")
    except (OSError, KeyError, ValueError, RuntimeError) as error:  # HDF5's, and of ragged observations
        raise UserError(f"cannot read the data of {source}: {error}") from error
    arrays = {name: np.asarray(values, np.float32) for name, values in fields.items()}
    name = task.name if dataset is None else f"{task.name} with the data of {dataset}"
    return Dataset(name, **arrays, reference_returns=reference)


# === Files in D4RL's layout ===
def read_d4rl(task: Task) -> dict[str, np.ndarray]:
    """The transitions of D4RL's `qlearning_dataset`, one for one, as the arrays of `Dataset` by name.

    The file is bundled, or downloaded to D4RL_DATASET_DIR or ~/.d4rl/datasets. The next observation of a row
    is that of the row below. So the last row is dropped, and every timeout row, terminal or not, since below
    it is another episode. Other terminal rows stay: their next observation is never bootstrapped from.
    """
    name = Path(task.file["file"]).name
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    path = (DATA if (DATA / name).exists() else folder) / name
    if not path.exists():
        from common.downloads import download

        download(task.file, path)
    with h5py.File(path) as file:
        rows = {name: file[name][()] for name in FIELDS}
        timeouts = file["timeouts"][()].astype(bool) if "timeouts" in file else None
    if timeouts is None:
        timeouts = cut_at_horizon(rows["terminals"], task.horizon, after_terminal=1)
    keep = np.flatnonzero(~timeouts[:-1])
    fields = transitions(task, rows, timeouts, keep, rows["observations"][keep + 1])
    return fields | {"actions": clip(path, fields["actions"])}


def transitions(task: Task, rows: dict, timeouts: np.ndarray, keep: np.ndarray, next_obs: np.ndarray) -> dict:
    """The rows to keep (N,), in order, with their next observations, as the arrays of `Dataset` by name."""
    ends = timeouts | rows["terminals"].astype(bool)
    episode = np.append(0, np.cumsum(ends)[:-1])[keep]  # (N,): which one a transition is of
    fields = {name: rows[name][keep] for name in FIELDS} | {"next_observations": next_obs}
    fields["episode_ends"] = np.append(np.diff(episode) > 0, True)
    # Two domains were recorded otherwise than they are evaluated: ants go on after they reached the goal, and
    # a step in the kitchen is rewarded for all that is done by then.
    whole = np.flatnonzero(timeouts if task.family == "antmaze" else ends) + 1
    counted = np.max if task.family in ("antmaze", "kitchen") else np.sum
    rewards = np.split(rows["rewards"].astype(np.float64), whole)[:-1]  # of each complete episode
    return fields | {"episode_returns": np.array([counted(each[: task.horizon]) for each in rewards])}


def clip(source: str | Path, actions: np.ndarray) -> np.ndarray:
    """Actions clipped to [-1, 1]; says how many values that changes."""
    if (outside := np.abs(actions) > 1).any():
        print(f"{source}: clipped {outside.sum():,} of {outside.size:,} action values to [-1, 1]")
    return actions.clip(-1, 1)


def cut_at_horizon(terminals: np.ndarray, horizon: int | None, after_terminal: int = 0) -> np.ndarray:
    """Timeouts (N,) for a file without them: true where an episode reaches the horizon.

    after_terminal: the step that a row after a terminal one is; in D4RL 1, so that it is cut one step early.
    """
    timeouts, step = np.zeros(len(terminals), bool), 0
    for row, terminal in enumerate(terminals):
        timeouts[row] = step + 1 == horizon
        step = 0 if timeouts[row] else after_terminal if terminal else step + 1
    return timeouts


# === Rewards ===
def tune_rewards(data: Dataset, rule: RewardRule) -> np.ndarray:
    """The rewards (N,) to train on, by a rule of the official codes, which it prints; scores use raw ones.

    UserError: the rule would divide by zero.
    """
    rewards = data.rewards.astype(np.float64)
    returns = np.diff(np.cumsum(rewards)[data.episode_ends > 0], prepend=0)
    rules = {  # rule: what to subtract, then what to divide by
        "none": (0, 1),
        "iql_locomotion": (0, np.ptp(returns) / 1000),  # returns span 1000
        "iql_antmaze": (1, 1),
        "cql_antmaze": (0.5, 1 / 4),
        "antmaze100": (0, 1 / 100),
        "normalize": (rewards.mean(), rewards.std(ddof=1)),
        "minmax": ((rewards.max() + rewards.min()) / 2, np.ptp(rewards) / 2),  # onto [-1, 1]
    }
    shift, scale = rules[rule]
    if not scale > 1e-9:
        raise UserError(f"{data.name}: --reward-tune {rule} is undefined: all rewards or returns are equal")
    print(f"rewards by {rule}: (reward - {shift:.6g}) / {scale:.6g}")
    return ((rewards - shift) / scale).astype(np.float32)
