"""Minari's datasets: their transitions, environments and reference scores. Loaded only for a Minari id."""

import contextlib
import json
import math
import os
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

from common.d4rl_envs import import_robotics
from common.datasets import is_here
from common.downloads import SILENCE
from common.envs import check_spaces
from common.tasks import OFFLINE, UserError, user_path

import h5py
import numpy as np
from gymnasium.spaces import Box, Dict


def open_minari(dataset_id: str):
    """The Minari dataset with an id, downloaded on first use. UserError if that fails in any way."""
    folder = Path(os.environ.get("MINARI_DATASETS_PATH") or user_path("~/.minari/datasets")) / dataset_id
    stored = (folder / "data").exists()
    if dataset_id.startswith("local/") and not stored:  # no host has it
        raise UserError(f"no Minari dataset {dataset_id} is on this machine: no folder {folder / 'data'}")
    try:
        import minari

        if not stored:
            check_host()
            minari.download_dataset(dataset_id)
        metadata = json.loads((folder / "data" / "metadata.json").read_text())
        needed = {"observation_space", "action_space"}  # else Minari would call what env_spec names
        if not needed <= metadata.keys():
            raise ValueError("metadata.json lacks observation_space or action_space")
        return minari.load_dataset(dataset_id)
    except Exception as error:  # Minari's, h5py's, or those of the client of the remote server
        raise UserError(
            f"cannot use the Minari dataset {dataset_id}: {type(error).__name__}: {error}\n"
            f"By hand: `minari download {dataset_id}` on a machine with a network, and copy the result to\n"
            f"  {folder} (move away what a download that broke off left there).\n{OFFLINE}"
        ) from error


def check_stored(path: Path) -> None:
    """ValueError if the HDF5 file has links, or an array that is not all there: see is_here()."""
    with h5py.File(path, "r") as file:

        def is_missing(name: str, link: h5py.HardLink) -> str | None:
            item = file[name] if isinstance(link, h5py.HardLink) else None
            is_fine = isinstance(item, h5py.Group) or (item is not None and is_here(item, file))
            return None if is_fine else name

        if name := file.visititems_links(is_missing):
            raise ValueError(f"{name} has rows that were never written, or are in other files")


def check_host() -> None:
    """OSError unless the host of Minari's datasets answers soon; Minari itself would ask for minutes."""
    if os.environ.get("MINARI_REMOTE", "hf:").startswith("hf:"):
        url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        with contextlib.suppress(HTTPError):  # any answer will do
            urllib.request.urlopen(url, timeout=SILENCE).close()
        limit_silence()


def limit_silence() -> None:
    """Have the client that Minari downloads with wait for SILENCE, then try again a few times, then fail.

    By itself it would wait for ever, because it gives most of its requests no limit.
    """
    from huggingface_hub import get_session

    def limit(request) -> None:
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), SILENCE)

    session = get_session()
    session.event_hooks = {"request": [*session.event_hooks["request"], limit]}


def read_minari(dataset_id: str) -> dict[str, np.ndarray]:
    """The transitions of a Minari dataset, T of each episode, as the arrays of `Dataset` by name.

    Dict observations are flattened as Gymnasium does in the evaluation env, in the order of the keys: a
    goal-conditioned one becomes (achieved_goal, desired_goal, observation). Actions are scaled to [-1, 1].
    """
    data = open_minari(dataset_id)
    check_spaces(dataset_id, data.observation_space, data.action_space)
    try:
        for path in Path(data.storage.data_path).glob("*.hdf5"):
            check_stored(path)
        episodes = list(data.iterate_episodes())
        # T + 1 of each episode
        observations = [flatten(data.observation_space, episode.observations) for episode in episodes]
        actions = np.concatenate([episode.actions for episode in episodes])
        return {
            "observations": np.concatenate([values[:-1] for values in observations]),
            "actions": to_unit_box(actions, data.action_space),
            "rewards": np.concatenate([episode.rewards for episode in episodes]),
            "next_observations": np.concatenate([values[1:] for values in observations]),
            "terminals": np.concatenate([episode.terminations for episode in episodes]),
            "episode_ends": np.concatenate([np.arange(len(each)) == len(each) - 1 for each in episodes]),
        }
    except Exception as error:  # h5py's, NumPy's, Minari's
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"cannot read the Minari dataset {dataset_id}: {reason}") from error


def to_unit_box(actions: np.ndarray, space: Box) -> np.ndarray:
    """Actions (N, action_dim) of a space, scaled to [-1, 1] in float64."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return 2 * (actions - low) / (high - low) - 1


def flatten(space, values) -> np.ndarray:
    """`gymnasium.spaces.flatten` of all rows at once: (T, ...), or a dict of such, to (T, obs_dim)."""
    if isinstance(space, Dict):
        return np.concatenate([flatten(space[key], values[key]) for key in space], axis=1)
    return np.reshape(values, (len(values), -1))


def minari_reference(dataset_id: str) -> tuple[float, float] | None:
    """The returns that score 0 and 100; None if the dataset has none. UserError if they cannot be that."""
    metadata = open_minari(dataset_id).storage.metadata
    reference = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if None in reference:
        return None
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        zero, hundred = map(float, reference)
        if -math.inf < zero < hundred < math.inf:
            return zero, hundred
    raise UserError(f"{dataset_id}: {reference} are not two reference scores, the lower first")


def minari_env_spec(dataset_id: str) -> dict:
    """The environment to evaluate in: its id, max_episode_steps and kwargs.

    By its id it is made from registered code, never from what else a downloaded file may name. ValueError:
    the dataset names none.
    """
    with contextlib.suppress(ImportError):  # many of Minari's environments are of that package
        import_robotics()
    metadata = open_minari(dataset_id).storage.metadata
    spec = metadata.get("eval_env_spec") or metadata.get("env_spec")
    if not spec:
        raise ValueError("the dataset names none; --dataset takes it beside another --env-id")
    return json.loads(spec)
