"""Transitions from elsewhere than D4RL: a user's HDF5 file in D4RL's layout, or a Minari id; both checked."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
from gymnasium.spaces import Box, Dict

from common.cli import UserError
from common.datasets import FIELDS, clip, cut_at_horizon, transitions
from common.scores import Reference
from common.tasks import OFFLINE, Task


# === A file ===
def read_own(path: Path, task: Task, low: float, high: float) -> dict[str, np.ndarray]:
    """The transitions of a user's file, as the arrays of `Dataset` by name; what ends an episode counts.

    With next_observations each row is a transition. Without, the next observation is that of the row below: a
    row that has none, because its episode was cut off there or the file ends, is dropped; a terminal row
    stays, since its next observation is never used. UserError: the file cannot be used.
    """
    if not path.is_file():  # to open a pipe would take forever
        advice = "--dataset takes an HDF5 file or a Minari id; in a resumed run it is the checkpoint's"
        raise UserError(f"there is no file {path} (seen from {os.getcwd()}); {advice}")
    with h5py.File(path) as file:
        cut = ["timeouts"] if {"truncations", "truncated"} & file.keys() else []  # by Gymnasium's name
        if missing := [name for name in [*FIELDS, *cut] if name not in file]:
            raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(file) or 'nothing'}")
        known = [name for name in [*FIELDS, "timeouts", "next_observations"] if name in file]
        if ignored := sorted(file.keys() - known):
            print(f"{path}: ignored {', '.join(ignored)}")
        for name in known:  # HDF5 reads zeros for rows that are not there
            column, allocated = file[name], h5py.h5d.SPACE_STATUS_ALLOCATED
            is_here = getattr(column, "shape", None) and not (column.is_virtual or column.external)
            if not is_here or column.size and column.id.get_space_status() != allocated:
                raise UserError(f"{path}: {name} is no array, or has rows never written or in other files")
        rows = check_fields(path, {name: file[name][()] for name in known})
    terminals = rows["terminals"].astype(bool)
    timeouts = rows.get("timeouts", cut_at_horizon(terminals, task.horizon)).astype(bool)
    if "timeouts" not in rows:
        limit = f", or after {task.horizon:,} steps as in {task.name}" if task.horizon else ""
        print(f"{path} has no timeouts: an episode ends where it is terminal{limit}")
    if "next_observations" in rows:
        keep, next_observations = np.arange(len(terminals)), rows["next_observations"]
        print(f"{path}: next observations are the file's own")
    else:
        stays = terminals | np.append(~timeouts[:-1], False)
        keep, lost = np.flatnonzero(stays), rows["rewards"][~stays]
        next_observations = rows["observations"][(keep + 1) % len(stays)]
        dropped = f"; {len(lost):,} rows without one are dropped, with rewards of {lost.sum():.4g} in all"
        print(f"{path}: a next observation is that of the row below{dropped if len(lost) else ''}")
    if keep.size == 0:
        raise UserError(f"{path} has no transition: {len(timeouts)} rows, {timeouts.sum()} of them timeouts")
    print(f"{path} has actions from {low:g} to {high:g} (--action-bounds)")
    fields = transitions(task, rows, timeouts, keep, next_observations)
    return fields | {"actions": to_unit_box(path, fields["actions"], low, high, "--action-bounds")}


# === Minari ===
def open_minari(dataset_id: str):
    """The Minari dataset with an id, downloaded on first use. UserError if that fails in any way."""
    root = Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()
    try:
        import minari

        if not (root / dataset_id / "data").exists() and not dataset_id.startswith("local/"):
            minari.download_dataset(dataset_id)
        metadata = json.loads((root / dataset_id / "data" / "metadata.json").read_text())
        if not {"observation_space", "action_space"} <= metadata.keys():
            raise ValueError("metadata.json lacks its spaces")  # Minari would make what env_spec names
        return minari.load_dataset(dataset_id)
    except Exception as error:  # Minari's, h5py's, or those of the client of the remote server
        raise UserError(
            f"cannot use the Minari dataset {dataset_id}: {type(error).__name__}: {error}\n"
            f"By hand: `minari download {dataset_id}` on a machine with a network, and copy the result to\n"
            f"  {root / dataset_id} (move away what a download that broke off left there).\n"
            f"A Gymnasium environment of that name is <module that registers it>:{dataset_id}. {OFFLINE}"
        ) from error


def read_minari(dataset_id: str) -> tuple[dict[str, np.ndarray], Reference]:
    """The transitions of a Minari dataset, as the arrays of `Dataset` by name, and what scores 0 and 100.

    Dict observations are flattened as Gymnasium does in the evaluation env, in the order of the keys: a
    goal-conditioned one becomes (achieved_goal, desired_goal, observation). Actions are scaled to [-1, 1].
    UserError: they cannot be used.
    """
    data = open_minari(dataset_id)
    space, scores = data.action_space, data.storage.metadata
    if not (isinstance(space, Box) and len(space.shape) == 1 and space.is_bounded()):
        raise UserError(f"{dataset_id}: actions {space} are not a bounded continuous vector (Box)")
    print(f"{dataset_id} has actions in {space}")
    episodes = list(data.iterate_episodes())
    observations = [flatten(data.observation_space, each.observations) for each in episodes]  # T + 1 each
    fields = {
        "observations": np.concatenate([values[:-1] for values in observations]),
        "actions": np.concatenate([episode.actions for episode in episodes]),
        "rewards": np.concatenate([episode.rewards for episode in episodes]),
        "next_observations": np.concatenate([values[1:] for values in observations]),
        "terminals": np.concatenate([episode.terminations for episode in episodes]),
        "episode_ends": np.concatenate([np.arange(len(each)) == len(each) - 1 for each in episodes]),
    }
    fields = check_fields(dataset_id, fields)
    fields["actions"] = to_unit_box(dataset_id, fields["actions"], space.low, space.high, "its action_space")
    fields["episode_returns"] = np.array([np.sum(each.rewards, dtype=float) for each in episodes])
    zero, hundred = (float(scores.get(f"ref_{name}_score", "nan")) for name in ("min", "max"))
    return fields, (zero, hundred) if zero < hundred else None


def flatten(space, values) -> np.ndarray:
    """`gymnasium.spaces.flatten` of all rows at once: (T, ...), or a dict of such, to (T, obs_dim)."""
    if isinstance(space, Dict):
        return np.concatenate([flatten(space[key], values[key]) for key in space], axis=1)
    return np.reshape(values, (len(values), -1))


def minari_env_spec(dataset_id: str) -> tuple[str, dict]:
    """The environment to evaluate in: its id, and its options for gymnasium.make.

    By its id it is made from registered code, never from what else a downloaded file may name. UserError: the
    dataset names none, or one in wrappers, which change what a return means.
    """
    metadata = open_minari(dataset_id).storage.metadata
    spec = json.loads(metadata.get("eval_env_spec") or metadata.get("env_spec") or "null")
    if not spec:
        raise UserError(f"{dataset_id} names no environment; --dataset takes it beside another --env-id")
    names = [wrapper["name"] for wrapper in spec.get("additional_wrappers") or []]
    if others := [name for name in names if name not in ("Monitor", "RecordEpisodeStatistics")]:
        advice = "--eval-episodes 0 trains; --env-id <module>:<Id> --dataset takes an environment of yours"
        raise UserError(f"{dataset_id} was recorded in wrappers, {', '.join(others)}; {advice}")
    return spec["id"].rpartition(":")[2], spec["kwargs"] | {"max_episode_steps": spec["max_episode_steps"]}


# === Checks of both ===
def check_fields(source: str | Path, fields: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The fields as float32, (N, size) or (N,). UserError for other shapes, NaN, infinity, and no numbers."""
    checked, num_rows = {}, len(np.atleast_1d(fields["observations"]))
    for name, values in fields.items():
        is_vector = name.endswith(("observations", "actions"))
        if not is_vector and values.shape == (num_rows, 1):
            values = values[:, 0]
        wrong_shape = values.ndim != 1 + is_vector or len(values) != num_rows or values.size == 0
        wrong_shape |= name == "next_observations" and values.shape != fields["observations"].shape
        if wrong_shape or values.dtype.kind not in "biuf":
            found, size = f"{values.dtype}{values.shape}", " size" if is_vector else ""
            raise UserError(f"{source}: {name} is {found}, not numbers shaped ({num_rows},{size})")
        if name == "actions" and values.dtype.kind != "f":
            raise UserError(f"{source}: actions are {values.dtype}; discrete actions cannot be learned here")
        checked[name] = values.astype(np.float32, copy=False)
        if len(bad := np.argwhere(~np.isfinite(checked[name]))):  # also what float32 cannot hold
            raise UserError(f"{source}: {name} has {len(bad):,} NaN or infinity, first in row {bad[0, 0]:,}")
        if name in ("terminals", "timeouts") and not np.isin(values, (0, 1)).all():
            raise UserError(f"{source}: {name} has {values.min()} to {values.max()}; it must be 0 or 1")
    return checked


def to_unit_box(source: str | Path, actions: np.ndarray, low, high, advice: str) -> np.ndarray:
    """Actions (N, action_dim) from [low, high] to [-1, 1]. UserError: more than a trace is outside."""
    low, high, actions = (np.asarray(each, np.float64) for each in (low, high, actions))
    if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
        raise UserError(f"{source}: {advice} {low} and {high} must be finite, the first the lower one")
    scaled = (actions - (low + high) / 2) / ((high - low) / 2)
    outside = np.abs(scaled) > 1 + 1e-3  # what rounding leaves outside is no mistake
    if outside.mean() > 0.01:
        bounds = f"{np.min(low):g} and {np.max(high):g}"
        found = f"actions from {actions.min():g} to {actions.max():g}, {outside.sum():,} of {outside.size:,}"
        raise UserError(f"{source}: {found} values outside their bounds {bounds}; see {advice}")
    return clip(source, scaled)
