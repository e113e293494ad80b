"""Minari's datasets: their transitions, environments and reference scores. Loaded only for a Minari id."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
from gymnasium.spaces import Box, Dict

from common.cli import UserError
from common.own_data import check_fields, check_stored, to_unit_box
from common.tasks import OFFLINE

HARMLESS = {"Monitor", "RecordEpisodeStatistics"}  # wrappers that change neither rewards nor episodes


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


def read_minari(dataset_id: str) -> dict[str, np.ndarray]:
    """The transitions of a Minari dataset, T of each episode, as the arrays of `Dataset` by name.

    Dict observations are flattened as Gymnasium does in the evaluation env, in the order of the keys: a
    goal-conditioned one becomes (achieved_goal, desired_goal, observation). Actions are scaled to [-1, 1].
    UserError: they cannot be used.
    """
    data = open_minari(dataset_id)
    space = data.action_space
    if not (isinstance(space, Box) and len(space.shape) == 1 and space.is_bounded()):
        raise UserError(f"{dataset_id}: actions {space} are not a bounded continuous vector (Box)")
    for path in Path(data.storage.data_path).glob("*.hdf5"):
        with h5py.File(path) as file:
            check_stored(path, file, file)
    episodes = list(data.iterate_episodes())
    # T + 1 of each episode
    observations = [flatten(data.observation_space, episode.observations) for episode in episodes]
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
    return fields


def flatten(space, values) -> np.ndarray:
    """`gymnasium.spaces.flatten` of all rows at once: (T, ...), or a dict of such, to (T, obs_dim)."""
    if isinstance(space, Dict):
        return np.concatenate([flatten(space[key], values[key]) for key in space], axis=1)
    return np.reshape(values, (len(values), -1))


def minari_reference(dataset_id: str) -> tuple[float, float] | None:
    """The returns that score 0 and 100; None if the dataset has none."""
    metadata = open_minari(dataset_id).storage.metadata
    zero, hundred = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return None if None in (zero, hundred) else (float(zero), float(hundred))


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
    if others := [name for name in names if name not in HARMLESS]:
        advice = "--eval-episodes 0 trains; --env-id <module>:<Id> --dataset takes an environment of yours"
        raise UserError(f"{dataset_id} was recorded in wrappers, {', '.join(others)}; {advice}")
    return spec["id"], spec["kwargs"] | {"max_episode_steps": spec["max_episode_steps"]}
