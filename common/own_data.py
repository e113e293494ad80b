"""A user's own transitions: an HDF5 file in D4RL's layout, read as a user means it, and checked."""

import os
from pathlib import Path

import h5py
import numpy as np

from common.cli import UserError
from common.datasets import FIELDS, clip, cut_at_horizon, transitions
from common.tasks import Task


def read_own(path: Path, task: Task, low: float, high: float) -> dict[str, np.ndarray]:
    """The transitions of a user's file, as the arrays of `Dataset` by name; what ends an episode counts.

    With next_observations each row is a transition. Without, the next observation is that of the row below: a
    row that has none, because its episode was cut off there or the file ends, is dropped; a terminal row
    stays, since its next observation is never used. UserError: the file cannot be used.
    """
    rows = read_file(path)
    terminals = rows["terminals"].astype(bool)
    if "timeouts" in rows:
        timeouts = rows["timeouts"].astype(bool)
    else:
        timeouts = cut_at_horizon(terminals, task.horizon)
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
    fields = transitions(task, rows, timeouts, keep, next_observations)
    return fields | {"actions": to_unit_box(path, fields["actions"], low, high, "--action-bounds")}


def read_file(path: Path) -> dict[str, np.ndarray]:
    """The checked fields of an HDF5 file. UserError: a field is missing or unusable."""
    if not path.is_file():  # to open a pipe would take forever
        advice = "--dataset takes an HDF5 file or a Minari id; in a resumed run it is the checkpoint's"
        raise UserError(f"there is no file {path} (seen from {os.getcwd()}); {advice}")
    with h5py.File(path) as file:
        if missing := [name for name in FIELDS if name not in file]:
            raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(file) or 'nothing'}")
        known = [name for name in [*FIELDS, "timeouts", "next_observations"] if name in file]
        for name in known:
            check_stored(path, file[name], file)
        if ignored := sorted(file.keys() - known):
            print(f"{path}: ignored {', '.join(ignored)}")
        return check_fields(path, {name: file[name][()] for name in known})


def check_stored(path: Path, values: h5py.Dataset | h5py.Group, file: h5py.File) -> None:
    """UserError if rows were never written, or are in other files: HDF5 reads zeros where they should be."""
    if isinstance(values, h5py.Group):
        for each in values.values():
            check_stored(path, each, file)
        return
    written = values.id.get_space_status() == h5py.h5d.SPACE_STATUS_ALLOCATED or not values.size
    if not written or values.is_virtual or values.external or values.file != file:
        raise UserError(f"{path}: {values.name[1:]} has rows that were never written, or are in other files")


def check_fields(source: str | Path, fields: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The fields as float32, (N, size) or (N,). UserError for other shapes, NaN, infinity, and no numbers."""
    checked, num_rows = {}, len(np.atleast_1d(fields["observations"]))
    for name, values in fields.items():
        is_vector = name.endswith(("observations", "actions"))
        if not is_vector and values.shape == (num_rows, 1):
            values = values[:, 0]
        wrong_shape = values.ndim != 1 + is_vector or len(values) != num_rows or values.size == 0
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
    if not (low < high).all():
        raise UserError(f"{advice} are {low} and {high}; the first must be the lower one")
    scaled = (actions - (low + high) / 2) / ((high - low) / 2)
    outside = np.abs(scaled) > 1 + 1e-3  # what rounding leaves outside is no mistake
    if outside.mean() > 0.01:
        bounds = f"{np.min(low):g} and {np.max(high):g}"
        found = f"actions from {actions.min():g} to {actions.max():g}, {outside.sum():,} of {outside.size:,}"
        raise UserError(f"{source}: {found} values outside their bounds {bounds}; see {advice}")
    return clip(source, scaled)
