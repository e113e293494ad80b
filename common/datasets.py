"""From the name of a task to its transitions, and to the environment that scores a policy trained on them.

data = load_dataset("hopper-medium-v2")
env = data.make_env()
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from common.envs import make_env
from common.scores import reference_returns
from common.tasks import BANDIT_TASKS, D4RL_TASKS, DATA, UserError, check_task, is_minari_id, user_path

import gymnasium
import h5py
import numpy as np

D4RL_FIELDS = ["observations", "actions", "rewards", "terminals", "timeouts"]
RewardRule = Literal[
    "none", "iql_locomotion", "iql_antmaze", "cql_antmaze", "antmaze", "antmaze100", "normalize", "minmax"
]


@dataclass(frozen=True)
class Dataset:
    """Transitions, none across an episode boundary, and how to score a policy that was trained on them."""

    task: str  # what to call it on screen
    observations: np.ndarray  # (N, obs_dim) float32
    actions: np.ndarray  # (N, action_dim) float32 in [-1, 1]
    rewards: np.ndarray  # (N,) float32
    next_observations: np.ndarray  # (N, obs_dim) float32
    terminals: np.ndarray  # (N,) float32, 1 where the environment ended (a timeout is not terminal)
    episode_ends: np.ndarray  # (N,) float32, 1 on the last transition of each episode
    episode_returns: np.ndarray  # (num complete episodes,) undiscounted, as an evaluation would count them
    reference_returns: tuple[float, float] | None  # returns that score 0 and 100; None: unknown
    make_env: Callable[[], gymnasium.Env]  # a fresh evaluation env; raises UserError if there is none


def load_dataset(task: str, dataset: str | None = None, seed: int = 0) -> Dataset:
    """The transitions of a task. UserError: unknown task, failed download, broken or unusable data.

    `dataset`, an HDF5 file in D4RL layout or a Minari id, replaces the task's own transitions; the task still
    names evaluation env, horizon and reference returns. `seed` is for the bandits, which are generated.
    """
    check_task(task)
    source = task if dataset is None else dataset
    if is_minari_id(source):
        from common.minari_data import read_minari

        fields = check_fields(source, read_minari(source))
        fields["episode_returns"] = sum_by_episode(fields["rewards"], fields["episode_ends"])
    elif dataset is not None:
        fields = read_d4rl(user_path(dataset), task)
    elif task in D4RL_TASKS:
        fields = read_d4rl(d4rl_file(task), task)
    elif task in BANDIT_TASKS:
        from common.bandits import sample_bandit

        fields = sample_bandit(task, seed)
    else:
        raise UserError(f"{task} has no transitions of its own: name a file or Minari id with --dataset")

    arrays = {name: np.asarray(values, np.float32) for name, values in fields.items()}
    outside = np.abs(arrays["actions"]) > 1
    if outside.any():
        print(f"{source}: clipped {outside.sum():,} of {outside.size:,} action values to [-1, 1]")
    arrays["actions"] = arrays["actions"].clip(-1, 1)
    return Dataset(
        task=task if dataset is None else f"{task} with the data of {dataset}",
        **arrays,
        reference_returns=task_reference(task),
        make_env=partial(make_env, task, arrays["observations"].shape[1], arrays["actions"].shape[1]),
    )


def task_reference(task: str) -> tuple[float, float] | None:
    """The returns that score 0 and 100 in a task; None if they are unknown."""
    if not is_minari_id(task):
        return reference_returns(task)
    from common.minari_data import minari_reference

    return minari_reference(task)


def d4rl_file(task: str) -> Path:
    """Path of the task's file; it is bundled, or downloaded to D4RL_DATASET_DIR or ~/.d4rl/datasets."""
    info = D4RL_TASKS[task]
    name = Path(info["file"]).name
    if (DATA / name).exists():
        return DATA / name
    path = user_path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets") / name
    if not os.path.exists(path):
        from common.downloads import download

        download(info, path)
    size = path.stat().st_size  # hashing half a gigabyte at every start would be too slow
    if info["bytes"] not in (None, size):
        advice = f"--dataset {path} uses it as it is; if you move it away, D4RL's is downloaded."
        raise UserError(f"{path} has {size:,} bytes, not {info['bytes']:,} like D4RL's file\n{advice}")
    return path


def read_d4rl(path: Path, task: str) -> dict[str, np.ndarray]:
    """The transitions of D4RL's `qlearning_dataset`, one for one, from an HDF5 file in D4RL layout.

    The next observation of a row is that of the row below. So the last row is dropped, and every timeout row,
    terminal or not, since the row below is another episode's. Other terminal rows stay: their next
    observation, wrong as it is, is never bootstrapped from. Returns the arrays of `Dataset` by name.
    """
    rows = check_fields(path, read_fields(path))
    terminals = rows["terminals"].astype(bool)
    timeouts = rows["timeouts"].astype(bool) if "timeouts" in rows else cut_at_horizon(terminals, task)
    keep = np.flatnonzero(~timeouts[:-1])
    if keep.size == 0:
        raise UserError(f"{path} has no transition: {len(timeouts)} rows, {timeouts.sum()} of them timeouts")
    fields = {name: rows[name][keep] for name in ("observations", "actions", "rewards", "terminals")}
    fields["next_observations"] = rows["observations"][keep + 1]
    fields["episode_ends"] = terminals[keep] | timeouts[keep + 1]
    fields["episode_ends"][-1] = True
    return fields | {"episode_returns": evaluated_returns(task, rows["rewards"], terminals, timeouts)}


def read_fields(path: Path) -> dict[str, np.ndarray]:
    """The fields of an HDF5 file in D4RL layout. UserError: it cannot be read, or not all of it is there."""
    if not os.path.isfile(path):  # to open a pipe would take forever
        raise UserError(f"there is no file {path}; --dataset takes an HDF5 file or a Minari id")
    try:
        with h5py.File(path, "r") as file:
            found = {name: file[name] for name in D4RL_FIELDS if isinstance(file.get(name), h5py.Dataset)}
            missing = [name for name in D4RL_FIELDS[:-1] if name not in found]
            if missing:
                raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(file) or 'nothing'}")
            if "timeouts" not in found and "truncations" in file:
                raise UserError(f"{path} has truncations; in D4RL's layout they are called timeouts")
            for name, values in found.items():
                if not is_here(values, file):
                    raise UserError(f"{path}: {name} has rows that were never written, or are in other files")
            return {name: values[()] for name, values in found.items()}
    except (OSError, RuntimeError, KeyError, ValueError, MemoryError) as error:  # h5py's and NumPy's
        raise UserError(f"cannot read {path} as an HDF5 file: {error}") from error


def is_here(values: h5py.Dataset, file: h5py.File) -> bool:
    """Whether all rows were written, into this file; of others HDF5 reads zeros, or any file they name."""
    written = values.id.get_space_status() == h5py.h5d.SPACE_STATUS_ALLOCATED or not values.size
    return written and not values.is_virtual and not values.external and values.file == file


def evaluated_returns(
    task: str, rewards: np.ndarray, terminals: np.ndarray, timeouts: np.ndarray
) -> np.ndarray:
    """The returns (num complete episodes,) that the recorded episodes would have got in an evaluation.

    They count the steps up to the horizon. Two domains were recorded otherwise than they are evaluated: ants
    go on after they reached the goal, and a step in the kitchen is rewarded for all that is done by then.
    """
    family = task.split("-")[0] if task in D4RL_TASKS else None
    horizon = D4RL_TASKS[task]["horizon"] if family else None
    ends = timeouts if family == "antmaze" else terminals | timeouts
    episodes = np.split(rewards.astype(np.float64), np.flatnonzero(ends) + 1)[:-1]
    count = np.max if family in ("antmaze", "kitchen") else np.sum
    return np.array([count(episode[:horizon]) for episode in episodes])


def cut_at_horizon(terminals: np.ndarray, task: str) -> np.ndarray:
    """The timeouts (N,) that D4RL assumes in a file without them: a cut where an episode reaches the horizon.

    As in D4RL the count of an episode that follows a terminal row starts at that row, one step too early.
    """
    if task in D4RL_TASKS:
        horizon = D4RL_TASKS[task]["horizon"]
    else:
        env = make_env(task, advice="without it the file needs timeouts, true where an episode was cut off")
        horizon = getattr(env.spec, "max_episode_steps", None) or len(terminals) + 1
    timeouts = np.zeros_like(terminals)
    start = 0
    for end in [*np.flatnonzero(terminals), len(terminals) - 1]:
        timeouts[start + horizon - 1 : end + 1 : horizon] = True
        if not timeouts[end]:
            start = end
    return timeouts


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
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
            checked[name] = values.astype(np.float32, copy=False)
        bad = ~np.isfinite(checked[name]).reshape(num_rows, -1).all(axis=1)  # (N,)
        if bad.any():
            raise UserError(f"{source}: {name} has NaN or infinity in {bad.sum()} rows, first {bad.argmax()}")
        if name in ("terminals", "timeouts") and not np.isin(checked[name], (0, 1)).all():
            raise UserError(f"{source}: {name} has {values.min()} to {values.max()}; it must be 0 or 1")
    return checked


def sum_by_episode(rewards: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Undiscounted returns of the complete episodes; `ends` (N,) is true on the last row of each."""
    return np.diff(np.cumsum(rewards, dtype=np.float64)[np.flatnonzero(ends)], prepend=0.0)


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
        raise UserError(f"{data.task}: --reward-tune {rule} is undefined: {reason}; none keeps the rewards")
    tuned = ((rewards - shift) / scale).astype(np.float32)
    print(f"rewards by {rule}: {describe(rewards)} -> {describe(tuned)}")
    return tuned


def describe(rewards: np.ndarray) -> str:
    """Range, mean and sum of rewards (N,), for the screen."""
    low, high, mean = (f"{value:.4g}" for value in (rewards.min(), rewards.max(), rewards.mean()))
    return f"[{low}, {high}], mean {mean}, sum {rewards.sum(dtype=np.float64):.4g}"
