"""Minari's datasets: their transitions, environments and reference scores. Loaded only for a Minari id."""

import json
import math
import os
from pathlib import Path

import h5py
import numpy as np
from gymnasium.spaces import Box, Dict

from common.cli import UserError
from common.datasets import is_here
from common.own_data import to_unit_box
from common.tasks import OFFLINE

HARMLESS = {"Monitor", "RecordEpisodeStatistics"}  # wrappers that change neither rewards nor episodes


def open_minari(dataset_id: str):
    """The Minari dataset with an id, downloaded on first use. UserError if that fails in any way."""
    folder = Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser() / dataset_id
    if dataset_id.startswith("local/") and not (folder / "data").exists():  # no host has it
        raise UserError(f"no Minari dataset {dataset_id} is on this machine: no folder {folder / 'data'}")
    try:
        import minari

        if not (folder / "data").exists():
            minari.download_dataset(dataset_id)
        metadata = json.loads((folder / "data" / "metadata.json").read_text())
        if (
            not {"observation_space", "action_space"} <= metadata.keys()
        ):  # Minari would call what env_spec names
            raise ValueError("metadata.json lacks observation_space or action_space")
        return minari.load_dataset(dataset_id)
    except Exception as error:  # Minari's, h5py's, or those of the client of the remote server
        raise UserError(
            f"cannot use the Minari dataset {dataset_id}: {type(error).__name__}: {error}\n"
            f"By hand: `minari download {dataset_id}` on a machine with a network, and copy the result to\n"
            f"  {folder} (move away what a download that broke off left there).\n"
            f"A Gymnasium environment of that name is <module that registers it>:{dataset_id}. {OFFLINE}"
        ) from error


def read_minari(dataset_id: str) -> dict[str, np.ndarray]:
    """The transitions of a Minari dataset, T of each episode, as the arrays of `Dataset` by name.

    Dict observations are flattened as Gymnasium does in the evaluation env, in the order of the keys: a
    goal-conditioned one becomes (achieved_goal, desired_goal, observation). Actions are scaled to [-1, 1].
    """
    data = open_minari(dataset_id)
    space = data.action_space
    if not (isinstance(space, Box) and len(space.shape) == 1 and space.is_bounded()):
        raise UserError(f"{dataset_id}: actions {space} are not a bounded continuous vector (Box)")
    try:
        for path in Path(data.storage.data_path).glob("*.hdf5"):
            check_stored(path)
        episodes = list(data.iterate_episodes())
        # T + 1 of each episode
        observations = [flatten(data.observation_space, episode.observations) for episode in episodes]
        actions = np.concatenate([episode.actions for episode in episodes])
        return {
            "observations": np.concatenate([values[:-1] for values in observations]),
            "actions": to_unit_box(dataset_id, actions, space.low, space.high, "its action_space"),
            "rewards": np.concatenate([episode.rewards for episode in episodes]),
            "next_observations": np.concatenate([values[1:] for values in observations]),
            "terminals": np.concatenate([episode.terminations for episode in episodes]),
            "episode_ends": np.concatenate([np.arange(len(each)) == len(each) - 1 for each in episodes]),
        }
    except UserError:
        raise
    except Exception as error:  # h5py's, NumPy's, Minari's
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"cannot read the Minari dataset {dataset_id}: {reason}") from error


def check_stored(path: Path) -> None:
    """ValueError if the HDF5 file has links, or an array that is not all there: see is_here()."""
    with h5py.File(path, "r") as file:

        def check(name: str, link: object) -> None:
            is_hard = isinstance(link, h5py.HardLink)
            if not is_hard or not (isinstance(file[name], h5py.Group) or is_here(file[name], file)):
                raise ValueError(f"{name} has rows that were never written, or are in other files")

        file.visititems_links(check)


def flatten(space, values) -> np.ndarray:
    """`gymnasium.spaces.flatten` of all rows at once: (T, ...), or a dict of such, to (T, obs_dim)."""
    if isinstance(space, Dict):
        return np.concatenate([flatten(space[key], values[key]) for key in space], axis=1)
    return np.reshape(values, (len(values), -1))


def minari_reference(dataset_id: str) -> tuple[float, float] | None:
    """The returns that score 0 and 100; None if the dataset has none. UserError if they cannot be that."""
    found = open_minari(dataset_id).storage.metadata
    zero, hundred = found.get("ref_min_score"), found.get("ref_max_score")
    if None in (zero, hundred):
        return None
    if not (isinstance(zero, int | float) and isinstance(hundred, int | float) and zero < hundred < math.inf):
        raise UserError(f"{dataset_id}: {zero} and {hundred} are not two reference scores, the lower first")
    return float(zero), float(hundred)


def minari_env_spec(dataset_id: str) -> dict:
    """The environment to evaluate in: its id, max_episode_steps and kwargs.

    By its id it is made from registered code, never from what else a downloaded file may name. UserError: the
    dataset names none, or one in wrappers, which change what a return means.
    """
    metadata = open_minari(dataset_id).storage.metadata
    spec = json.loads(metadata.get("eval_env_spec") or metadata.get("env_spec") or "null")
    if not spec:
        raise UserError(f"{dataset_id} names no environment; --dataset takes it beside another --env-id")
    names = [wrapper["name"] for wrapper in spec.get("additional_wrappers") or []]
    if others := [name for name in names if name not in HARMLESS]:
        advice = "--eval-episodes 0 trains; --env-id <module>:<Id> --dataset takes an environment of yours"
        raise UserError(f"{dataset_id} was recorded in wrappers, {', '.join(others)}; {advice}")
    return spec
