"""From the name of a task to its transitions, and to the environment that scores a policy trained on them.

    data = load_dataset("hopper-medium-v2")
    env = data.make_env()

A task is
    hopper-medium-v2, antmaze-umaze-v0, ...         a D4RL name: the file is downloaded on first use
    mujoco/hopper/medium-v0, local/mine-v0, ...     a Minari id: downloaded on first use
    hopper-mini-v0                                  bundled with this repository
    bandit-8gaussians-v0, bandit-moons-v0, ...      a one-step toy task, generated
    Hopper-v4, ...                                  any Gymnasium id, with transitions from elsewhere
"""

import contextlib
import difflib
import json
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium
import h5py
import numpy as np
from gymnasium.spaces import Box, Dict

from common.envs import LOCOMOTION, import_robotics, make_d4rl_env
from common.scores import reference_returns

DATA = Path(__file__).parent / "data"
D4RL = json.loads((DATA / "d4rl_tasks.json").read_text())
D4RL_TASKS = D4RL["tasks"]  # name -> file, horizon, and, where known, bytes and sha256
BUNDLED = "hopper-mini-v0"
# First word of a D4RL task's name -> the domain of the task, and the version that the papers train on.
DOMAINS = {"antmaze": ("antmaze", "v0"), "kitchen": ("kitchen", "v0")}
DOMAINS |= dict.fromkeys(("pen", "door", "hammer", "relocate"), ("adroit", "v1"))
OFFLINE = f"Without a network: {BUNDLED} and bandit-8gaussians-v0, -moons-v0, -corners-v0, -spiral-v0."


class UserError(Exception):
    """A mistake of the user's: the scripts print the message, without a traceback, and exit with code 2."""


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
    if is_minari_id(dataset or task):
        arrays = use_minari(dataset or task, read_minari)
    elif dataset or task in D4RL_TASKS:
        arrays = read_d4rl(Path(dataset).expanduser() if dataset else d4rl_file(task), task)
    elif task in BANDITS:
        arrays = sample_bandit(task, seed)
    else:
        raise UserError(f"{task} has no transitions of its own: name a file or Minari id with --dataset")
    observations, actions, *others = [np.asarray(array, np.float32) for array in arrays]

    outside = np.abs(actions) > 1
    if outside.any():
        print(f"{dataset or task}: clipped {outside.sum():,} of {outside.size:,} action values to [-1, 1]")
    env_maker = partial(make_env, task, observations.shape[1], actions.shape[1])
    name = f"{task} with the data of {dataset}" if dataset else task
    return Dataset(name, observations, actions.clip(-1, 1), *others, task_reference(task), env_maker)


def task_reference(task: str) -> tuple[float, float] | None:
    """The returns that score 0 and 100 in a task; None if they are unknown."""
    if not is_minari_id(task):
        return reference_returns(task)
    metadata = use_minari(task, lambda data: data.storage.metadata)
    reference = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return None if None in reference else reference


def check_task(task):
    """UserError, with the nearest names, unless the task is one of those listed at the head of this file."""
    if task not in (*D4RL_TASKS, *BANDITS, *gymnasium.registry) and not is_minari_id(task):
        with contextlib.suppress(ImportError):  # which registers more, if it is installed
            import_robotics()
    known = [*D4RL_TASKS, *BANDITS, *gymnasium.registry]
    if task not in known and not is_minari_id(task):
        nearest = ", ".join(difflib.get_close_matches(task, known, n=5)) or "none"
        advice = "A task is a D4RL, Minari, Gymnasium, bundled or bandit name; a file goes to --dataset."
        raise UserError(f"unknown task {task!r}; nearest names: {nearest}\n{advice}")


def is_minari_id(name):
    """namespace/name-v0, with any number of namespaces; unless a file or a Gymnasium env has that name."""
    has_form = re.fullmatch(r"([-\w]+/)+[-\w]+-v\d+", name)
    return bool(has_form) and not Path(name).is_file() and name not in gymnasium.registry


def names_in_tables(task: str) -> list[str]:
    """What a task may be called in a table of settings, nearest first; only its own name if of no domain.

    antmaze-umaze-v2, antmaze-umaze-v0, antmaze: the name itself, the version of the papers, the domain. For
    Minari's copy D4RL/antmaze/umaze-v1 the last two are the same. Environments have a domain, too:
    AntMaze_UMaze-v4 is called antmaze, AdroitHandDoor-v1 adroit, FrankaKitchen-v1 kitchen.
    """
    words = re.split("[-/_]", re.sub("^(D4RL/|AdroitHand|Franka)", "", task))  # family, kind and version
    family = words[0].lower()
    if family not in DOMAINS:
        return [task]
    domain, version = DOMAINS[family]
    return [task, "-".join([family, *words[1:-1], version]), domain]


def d4rl_file(task):
    """Path of the task's file, which is downloaded to D4RL_DATASET_DIR (or ~/.d4rl/datasets) on first use."""
    if task == BUNDLED:
        return DATA / f"{BUNDLED}.hdf5"
    info = D4RL_TASKS[task]
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    path = folder / Path(info["file"]).name
    if not os.path.exists(path):
        download(info, path)
    size = path.stat().st_size  # hashing half a gigabyte at every start would be too slow
    if info["bytes"] not in (None, size):
        advice = "Delete it to download it again, or name it with --dataset to use it as it is."
        raise UserError(f"{path} has {size:,} bytes, not {info['bytes']:,} like D4RL's file\n{advice}")
    return path


def download(info, path):
    """Fetches a D4RL file from the first source that has it; it gets its name when complete and right."""
    import pooch

    urls = [D4RL["url"] + info["file"], D4RL["mirror"] + path.name]
    if os.environ.get("D4RL_MIRROR"):
        urls.insert(0, f"{os.environ['D4RL_MIRROR'].rstrip('/')}/{path.name}")
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # unique: other seeds may fetch it too
    # Seconds to connect and between two reads: what fails should fail soon.
    fetch = pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 20, timeout=(3.05, 10))
    failures = ""
    for url in urls:
        print(f"downloading {url} to {path.parent}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for stale in path.parent.glob("*.hdf5.*.part"):  # of a killed process, if nobody writes to it
                if time.time() - stale.stat().st_mtime > 600:
                    stale.unlink()
            fetch(url, part, None)
            size = part.stat().st_size
            if info["bytes"] not in (None, size):
                raise ValueError(f"got {size:,} bytes instead of {info['bytes']:,}")
            if info["sha256"] not in (None, pooch.file_hash(part)) or not h5py.is_hdf5(part):
                raise ValueError("what came is not the file: wrong SHA-256, or not HDF5")
            part.replace(path)
            return
        except (OSError, ValueError) as error:  # each of requests' exceptions is one of the two
            failures += f"\n  {url}\n    {type(error).__name__}: {str(error).split('Caused by ')[-1]}"
        finally:
            if os.path.exists(part):
                part.unlink()
    raise UserError(
        f"could not download {path.name}:{failures}\n"
        f"By hand: put {D4RL['url']}{info['file']}\n  into {path.parent}; or set D4RL_DATASET_DIR to another "
        f"folder, or D4RL_MIRROR to another URL, that has {path.name}.\n{OFFLINE}"
    )


def read_d4rl(path, task):
    """The transitions of D4RL's `qlearning_dataset`, one for one, from an HDF5 file in D4RL layout.

    The next observation of a row is that of the row below. So the last row is dropped, and every timeout row,
    terminal or not, since the row below is another episode's. Other terminal rows stay: their next
    observation, wrong as it is, is never bootstrapped from. Returns the arrays in the order of `Dataset`.
    """
    try:
        with h5py.File(path, "r") as file:
            names = ["observations", "actions", "rewards", "terminals", "timeouts"]
            rows = {name: file[name][()] for name in names if isinstance(file.get(name), h5py.Dataset)}
            missing = [name for name in names[:-1] if name not in rows]
            if missing:
                raise UserError(f"{path} lacks {', '.join(missing)}; it has {', '.join(file) or 'nothing'}")
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}; --dataset takes an HDF5 file or a Minari id") from error
    except (OSError, RuntimeError, KeyError) as error:  # h5py, of truncated, damaged and other files
        raise UserError(f"{path} is damaged or not an HDF5 file, replace it: {error}") from error

    rows = check_fields(path, rows)
    terminals = rows["terminals"].astype(bool)
    timeouts = rows["timeouts"].astype(bool) if "timeouts" in rows else cut_at_horizon(terminals, task)
    keep = np.flatnonzero(~timeouts[:-1])
    if keep.size == 0:
        raise UserError(f"{path} has no transition: {len(timeouts)} rows, {timeouts.sum()} of them timeouts")
    observations, actions, rewards = rows["observations"], rows["actions"], rows["rewards"]
    transitions = observations[keep], actions[keep], rewards[keep], observations[keep + 1], terminals[keep]
    ends = terminals[keep] | timeouts[keep + 1]
    ends[-1] = True
    return *transitions, ends, evaluated_returns(task, rewards, terminals, timeouts)


def evaluated_returns(task, rewards, terminals, timeouts):
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


def cut_at_horizon(terminals, task):
    """The timeouts (N,) that D4RL assumes in a file without them: a cut where an episode reaches the horizon.

    As in D4RL the count of an episode that follows a terminal row starts at that row, one step too early.
    """
    if task in D4RL_TASKS:
        horizon = D4RL_TASKS[task]["horizon"]
    else:
        horizon = getattr(make_env(task).spec, "max_episode_steps", None) or len(terminals) + 1
    timeouts = np.zeros_like(terminals)
    start = 0
    for end in [*np.flatnonzero(terminals), len(terminals) - 1]:
        timeouts[start + horizon - 1 : end + 1 : horizon] = True
        if not timeouts[end]:
            start = end
    return timeouts


def check_fields(source, fields):
    """The fields as float32, (N, size) or (N,). UserError for other shapes, NaN, infinity, and no numbers."""
    checked = {}
    num_rows = np.atleast_1d(fields["observations"]).shape[0]
    for name, values in fields.items():
        values = np.asarray(values)
        dims = 2 if name.endswith(("observations", "actions")) else 1
        if dims == 1 and values.shape == (num_rows, 1):
            values = values[:, 0]
        wrong_shape = values.ndim != dims or values.shape[0] != num_rows or 0 in values.shape
        if wrong_shape or values.dtype.kind not in "biuf":
            expected = f"({num_rows}, size)" if dims == 2 else f"({num_rows},)"
            raise UserError(
                f"{source}: {name} is {values.dtype}{values.shape}, not numbers shaped {expected}"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
            checked[name] = values.astype(np.float32, copy=False)
        bad = ~np.isfinite(checked[name]).all(axis=tuple(range(1, dims)))
        if bad.any():
            raise UserError(f"{source}: {name} has NaN or infinity in {bad.sum()} rows, first {bad.argmax()}")
    return checked


def sum_by_episode(rewards, ends):
    """Undiscounted returns of the complete episodes; `ends` (N,) is true on the last row of each."""
    return np.diff(np.cumsum(rewards, dtype=np.float64)[np.flatnonzero(ends)], prepend=0.0)


def use_minari(dataset_id, use):
    """use(the Minari dataset), which is downloaded on first use; UserError if that fails in any way."""
    import minari

    try:
        return use(minari.load_dataset(dataset_id, download=True))
    except UserError:
        raise
    except Exception as error:  # Minari's, h5py's, or those of the client of the remote server
        folder = minari.storage.get_dataset_path(dataset_id)
        raise UserError(
            f"cannot use the Minari dataset {dataset_id}: {type(error).__name__}: {error}\n"
            f"By hand: `minari download {dataset_id}` on a machine with a network, and copy the result to\n"
            f"  {folder} (delete that if it is left from a download that broke off).\n{OFFLINE}"
        ) from error


def read_minari(data):
    """The transitions of a Minari dataset: T of each episode, from its T + 1 observations.

    Dict observations are flattened as Gymnasium does in the evaluation env, in the order of the keys: a
    goal-conditioned one becomes (achieved_goal, desired_goal, observation). Actions are scaled to [-1, 1].
    Returns the arrays in the order of `Dataset`.
    """
    check_spaces(data.id, data.observation_space, data.action_space)
    low, high = data.action_space.low.astype(np.float64), data.action_space.high.astype(np.float64)
    episodes = list(data.iterate_episodes())
    observations = [flatten_observations(data.observation_space, each.observations) for each in episodes]
    fields = {
        "observations": np.concatenate([values[:-1] for values in observations]),
        "actions": 2 * (np.concatenate([each.actions for each in episodes]) - low) / (high - low) - 1,
        "rewards": np.concatenate([each.rewards for each in episodes]),
        "next_observations": np.concatenate([values[1:] for values in observations]),
        "terminals": np.concatenate([each.terminations for each in episodes]),
        "episode_ends": np.concatenate([np.arange(len(each)) == len(each) - 1 for each in episodes]),
    }
    fields = check_fields(data.id, fields)
    return *fields.values(), sum_by_episode(fields["rewards"], fields["episode_ends"])


def flatten_observations(space, values):
    """`gymnasium.spaces.flatten` of all rows at once: (T, ...), or a dict of such, to (T, obs_dim)."""
    if isinstance(space, Dict):
        return np.concatenate([flatten_observations(space[key], values[key]) for key in space], axis=1)
    return np.reshape(values, (len(values), -1))


def polar(radius, angle):
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


MOON = polar(0.5, np.linspace(0, np.pi, 12)) - [0.25, 0.125]
ALONG = np.sqrt(np.linspace(0, 1, 32))  # equal steps along the arm of the spiral, from the inside out
BANDITS = {  # the modes (M, 2) of the data, from the worst and most frequent to the best and rarest
    "bandit-8gaussians-v0": polar(0.7, np.arange(8) * np.pi / 4),
    "bandit-moons-v0": np.concatenate([MOON, -MOON]),
    "bandit-corners-v0": 0.8 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]),
    "bandit-spiral-v0": polar(0.1 + 0.7 * ALONG, 3 * np.pi * ALONG),
}


def bandit_mode(task, actions):
    """Index (N,) of the mode that is nearest to each action (N, 2); the last mode is the best."""
    return np.square(actions[:, None] - BANDITS[task]).sum(axis=2).argmin(axis=1)


def bandit_reward(task, actions):
    """Reward (N,) in [0, 1] of actions (N, 2): grows with the index of the mode, falls to 0 away from it."""
    mode = bandit_mode(task, actions)
    level = np.linspace(0, 1, len(BANDITS[task]))[mode] ** 2
    return level * np.exp(-np.square(actions - BANDITS[task][mode]).sum(axis=1) / (2 * 0.1**2))


def sample_bandit(task, seed, size=10_000):
    """One-step episodes from the one state, zero; the arrays in the order of `Dataset`."""
    random = np.random.default_rng(seed)
    frequency = np.linspace(2, 1, len(BANDITS[task]))
    modes = random.choice(BANDITS[task], size=size, p=frequency / frequency.sum())
    actions = random.normal(modes, 0.05).clip(-1, 1)
    rewards = bandit_reward(task, actions)
    return np.zeros((size, 1)), actions, rewards, np.zeros((size, 1)), np.ones(size), np.ones(size), rewards


class Bandit(gymnasium.Env):
    """A bandit as an environment: one state, zero, and episodes of one step."""

    def __init__(self, task):
        self.task = task
        self.observation_space = Box(-1, 1, (1,))
        self.action_space = Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(bandit_reward(self.task, action[None])[0]), True, False, {}


def make_online_env(task: str) -> gymnasium.Env:
    """A fresh environment to learn in, as make_env() makes it; UserError for names of recorded data, too."""
    if task in D4RL_TASKS or is_minari_id(task):
        nearest = LOCOMOTION.get(task.split("-")[0], "Hopper-v4")
        raise UserError(
            f"{task} names recorded data; to learn online, name an environment, such as {nearest}"
        )
    return make_env(task, advice="install what it needs, or choose another --env-id")


def make_env(
    task: str,
    obs_dim: int | None = None,
    action_dim: int | None = None,
    render_mode: str | None = None,
    advice: str = "--eval-episodes 0 trains without evaluation",
) -> gymnasium.Env:
    """A fresh environment: observations (obs_dim,), flattened if need be; actions (action_dim,) in [-1, 1].

    D4RL's tasks run in D4RL's environments, as far as those exist today: see common/envs.py. UserError if
    there is no environment, it is not installed or not continuous, or has other sizes than those given.
    """
    check_task(task)
    rendering = {"render_mode": render_mode} if render_mode else {}
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Gymnasium's, on its v4
            if task in D4RL_TASKS:
                env = make_d4rl_env(task, D4RL_TASKS[task]["horizon"], **rendering)
            elif task in BANDITS:
                env = Bandit(task)
            elif is_minari_id(task):
                with contextlib.suppress(ImportError):  # many of Minari's environments are of that package
                    import_robotics()
                env = use_minari(task, lambda data: data).recover_environment(eval_env=True, **rendering)
            else:
                env = gymnasium.make(task, **rendering)
    except Exception as error:  # whatever an environment's author may raise, most often a missing package
        raise UserError(f"cannot make the environment of {task}: {error}\n{advice}") from error

    check_spaces(task, env.observation_space, env.action_space)
    if len(env.observation_space.shape or ()) != 1:  # a Dict has no shape
        env = gymnasium.wrappers.FlattenObservation(env)
    if (env.action_space.low != -1).any() or (env.action_space.high != 1).any():
        env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    env_dims = env.observation_space.shape[0], env.action_space.shape[0]
    if env_dims != (obs_dim or env_dims[0], action_dim or env_dims[1]):
        data = f"observations of size {obs_dim} and actions of size {action_dim}"
        raise UserError(f"the data has {data}, the environment of {task} {env_dims[0]} and {env_dims[1]}")
    return env


def check_spaces(name, observations, actions):
    """UserError unless the spaces are of numbers (Box, or a Dict of them) and of bounded vectors (Box)."""
    bounded_vector = isinstance(actions, Box) and len(actions.shape) == 1 and actions.is_bounded()
    if not bounded_vector or not isinstance(observations, Box | Dict):
        needed = "numbers (Box, or a Dict of them) and a bounded continuous vector (Box)"
        raise UserError(f"{name}: observations {observations} and actions {actions} are not {needed}")


def tune_rewards(data: Dataset, rule: str) -> np.ndarray:
    """The rewards (N,) to train on, by one of the rules of the official codes; scores use the raw rewards.

    Prints what the rule does to them. UserError: an unknown rule, or data for which the rule would divide
    by zero.
    """
    rewards = data.rewards.astype(np.float64)
    rules = {  # rule: what to subtract, then what to divide by
        "none": (0, 1),
        "iql_locomotion": (0, np.ptp(sum_by_episode(rewards, data.episode_ends)) / 1000),  # returns span 1000
        "iql_antmaze": (1, 1),
        "cql_antmaze": (0.5, 1 / 4),
        "antmaze": (0.25, 1 / 2),
        "antmaze100": (0, 1 / 100),
        "normalize": (rewards.mean(), rewards.std(ddof=1)),
        "minmax": ((rewards.max() + rewards.min()) / 2, np.ptp(rewards) / 2),  # onto [-1, 1]
    }
    if rule not in rules:
        raise UserError(f"unknown reward rule {rule!r}; choose from {', '.join(rules)}")
    shift, scale = rules[rule]
    if not scale > 1e-9:
        raise UserError(f"{data.task}: reward rule {rule} is undefined, all returns or rewards are equal")
    tuned = ((rewards - shift) / scale).astype(np.float32)
    if rule == "none":
        print(f"rewards as recorded: {describe(rewards)}")
    else:
        print(f"rewards by {rule}: {describe(rewards)} -> {describe(tuned)}")
    return tuned


def describe(rewards):
    """Range, mean and sum of rewards (N,), for the screen."""
    low, high, mean = (f"{value:.4g}" for value in (rewards.min(), rewards.max(), rewards.mean()))
    return f"[{low}, {high}], mean {mean}, sum {rewards.sum(dtype=np.float64):.4g}"
