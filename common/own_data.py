"""A user's own transitions: an HDF5 file in D4RL's layout, read as a user means it; only for --dataset."""

from pathlib import Path

import numpy as np

from common.cli import UserError
from common.datasets import clip, cut_at_horizon, evaluated_returns, read_file
from common.tasks import Task


def read_own(path: Path, task: Task, low: float, high: float) -> dict[str, np.ndarray]:
    """The transitions of a user's file: whatever ends an episode, its last row counts.

    With next_observations each row is a transition. Without, the next observation is that of the row below: a
    row that has none, because its episode was cut off there or the file ends, is dropped; a terminal row
    stays, since its next observation is never used. Returns the arrays of `Dataset` by name.
    """
    rows, ignored = read_file(path)
    if ignored:
        print(f"{path}: ignored {', '.join(ignored)}")
    terminals = rows["terminals"].astype(bool)
    if "timeouts" in rows:
        timeouts = rows["timeouts"].astype(bool)
        if both := (timeouts & terminals).sum():
            print(f"{path}: {both:,} rows are both terminal and timeout, and count as terminal")
    else:
        timeouts = cut_at_horizon(terminals, task.horizon)
        limit = f", or after {task.horizon:,} steps as in {task.name}" if task.horizon else ""
        print(f"{path} has no timeouts: an episode ends where it is terminal{limit}")
    if "next_observations" in rows:
        keep, next_obs = np.arange(len(terminals)), rows["next_observations"]
        print(f"{path}: next observations are the file's own")
    else:
        followed = ~timeouts & (np.arange(len(terminals)) < len(terminals) - 1)
        keep, next_obs = np.flatnonzero(terminals | followed), np.roll(rows["observations"], -1, axis=0)
        lost = rows["rewards"][~(terminals | followed)]
        dropped = f"; {len(lost):,} rows without one are dropped, with rewards of {lost.sum():.4g} in all"
        print(f"{path}: a next observation is that of the row below{dropped if len(lost) else ''}")
    if keep.size == 0:
        raise UserError(f"{path} has no transition: {len(timeouts)} rows, {timeouts.sum()} of them timeouts")
    ends = terminals | timeouts
    episode = np.append(0, np.cumsum(ends)[:-1])[keep]  # number of the episode of each transition
    return {
        "observations": rows["observations"][keep],
        "actions": to_unit_box(path, rows["actions"][keep], low, high, "--action-bounds"),
        "rewards": rows["rewards"][keep],
        "next_observations": next_obs[keep],
        "terminals": terminals[keep],
        "episode_ends": np.append(np.diff(episode) > 0, True),
        "episode_returns": evaluated_returns(task, rows["rewards"], terminals, timeouts),
    }


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
