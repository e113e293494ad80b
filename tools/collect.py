"""Make offline datasets for a Gymnasium environment, by D4RL's protocol.

    python tools/collect.py --env-id Hopper-v5                    # local/hopper/{random,medium,...}-v0
    python tools/collect.py --env-id Hopper-v5 --hdf5 data        # data/hopper-medium.hdf5, ... instead
    python dac.py --env-id local/hopper/medium-v0                 # train on one of them

Trains SAC, then records
    random          uniformly drawn actions
    medium          the policy when it was about a third of the way from random to expert
    medium-replay   all that SAC did until then, its replay buffer
    expert          the policy at the end of the training, or with --expert best the best one before
    medium-expert   medium and expert, one after the other
Policies are recorded as they are, stochastic. The same command goes on where an earlier one was stopped, by
Ctrl-C or by a crash. docs/tools_collect.md says more.
"""

import contextlib
import faulthandler
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import tyro
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage import get_dataset_path
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common.datasets import UserError, make_online_env  # noqa: E402
from common.runs import load_checkpoint, run_command, select_device, write_atomically  # noqa: E402
from common.scores import normalized_score  # noqa: E402

Kind = Literal["random", "medium", "medium-replay", "expert", "medium-expert"]
KINDS = ("random", "medium", "medium-replay", "expert", "medium-expert")
EVAL_SEED = 10_000  # evaluation episodes are seeded EVAL_SEED, EVAL_SEED + 1, ...
PART_SIZE = 10_000  # transitions that are recorded before they are written
TRAINING = "env_id seed eval_every eval_episodes hidden_dims learning_rate batch_size gamma"
TRAINING = (*TRAINING.split(), "learning_starts")  # arguments that a training keeps to its end
RECORDING = ("total_steps", "transitions", "episodes", "expert", "medium_fraction")
PACKAGES = ("gymnasium", "mujoco", "stable-baselines3", "torch", "numpy")
BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


@dataclass
class Args:
    """Offline datasets for a Gymnasium environment with continuous actions."""

    env_id: str = "Hopper-v5"  # a Gymnasium id; actions must be bounded and continuous
    name: str | None = None  # of the datasets, local/<name>/<kind>-v0; None: hopper for Hopper-v5
    kinds: tuple[Kind, ...] = KINDS  # the datasets to make
    hdf5: str | None = None  # write HDF5 files in D4RL layout to this folder, instead of Minari datasets
    overwrite: bool = False  # replace datasets of these names that were made in another way
    transitions: int = 100_000  # recorded per policy, at least: the last episode is played to its end
    episodes: int | None = None  # recorded per policy, instead
    seed: int = 0  # seed of training and recording
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:<i>
    run_dir: str = "runs"  # folder that receives a folder with all that is needed to go on

    # --- SAC ---
    total_steps: int = 300_000  # environment steps of the training
    expert: Literal["final", "best"] = "final"  # the policy at the end, or the one that was evaluated best
    medium_fraction: float = 1 / 3  # where medium is, on the way from random (0) to expert (1)
    eval_every: int = 5_000  # steps between evaluations; medium is the policy at one of them
    eval_episodes: int = 10  # episodes per evaluation
    save_every: int = 20_000  # steps between checkpoints
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden units per layer of actor and critics
    learning_rate: float = 3e-4  # of actor, critics and temperature
    batch_size: int = 256  # transitions per gradient step; there is one per environment step
    gamma: float = 0.99  # discount factor, in [0, 1]
    learning_starts: int = 5_000  # steps of uniform actions before the first gradient step


class Episode(NamedTuple):
    """One episode of T steps, in the units of the environment."""

    observations: np.ndarray  # (T + 1, obs_dim), flattened if need be
    actions: np.ndarray  # (T, action_dim)
    rewards: np.ndarray  # (T,)
    terminated: bool  # whether the environment ended it; it was cut off otherwise
    seed: int  # of the reset; -1: unknown


def check_arguments(args: Args) -> None:
    """UserError for a number out of range, and for no or repeated kinds."""
    least = {"seed": 0, "learning_starts": 0}
    for name, value in vars(args).items():
        low, high = (least.get(name, 1), 2**31) if type(value) is int else (0, 1)
        above = name in ("medium_fraction", "learning_rate")
        if type(value) in (int, float) and not (low < value < high if above else low <= value <= high):
            bound = f"between {low} and {high}" if above else f"in {low}..{high}"
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {bound}")
    if not args.kinds or len(set(args.kinds)) < len(args.kinds):
        raise UserError(f"--kinds is {' '.join(args.kinds) or 'empty'}; name each kind once, at least one")
    if not args.hidden_dims or min(args.hidden_dims) < 1:
        raise UserError(f"--hidden-dims is {args.hidden_dims}; it must be numbers of at least 1")


# --- Interruption ---
RECEIVED = []  # signals that ask to stop


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the program at the next stop_if_asked(), and nowhere else."""
    RECEIVED.clear()
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, lambda number, frame: RECEIVED.append(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_if_asked() -> None:
    """SystemExit after Ctrl-C or SIGTERM, with the exit code that is usual for it."""
    if RECEIVED:
        sys.exit(128 + RECEIVED[0])


# --- Acting ---
def make(env_id: str) -> gym.Env:
    """The environment in its own units, but for observations, which are flattened to (obs_dim,)."""
    make_online_env(env_id).close()  # which knows what may be wrong with it
    if env_id not in gym.registry:
        raise UserError(f"{env_id} is not a Gymnasium id; its data is generated where it is needed")
    env = gym.make(env_id)
    return env if len(env.observation_space.shape or ()) == 1 else gym.wrappers.FlattenObservation(env)


def play(env: gym.Env, act: Callable, seed: int) -> Episode:
    """One episode of act(observation) -> action; seed decides all that is random in it."""
    torch.manual_seed(seed)
    env.action_space.seed(seed)
    observations, actions, rewards = [env.reset(seed=seed)[0]], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        stop_if_asked()
        actions.append(act(observations[-1]))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(float(reward))
    return Episode(np.stack(observations), np.stack(actions), np.array(rewards), bool(terminated), seed)


def policy(model: SAC, weights: dict) -> Callable:
    """observation (obs_dim,) -> a sample of SAC's policy with these weights, in the environment's units."""
    model.actor.load_state_dict(weights)
    model.policy.set_training_mode(False)
    return lambda observation: model.predict(observation)[0]


# --- Training ---
class Training:
    """SAC in its environment, its evaluations and the actor at each of them, and their checkpoint."""

    def __init__(self, args: Args, env: gym.Env, folder: Path):
        """A new training, or the one in the folder. UserError: that one has other settings."""
        self.args, self.path = args, folder / "checkpoint.pt"
        self.id, self.evaluations, self.actors = uuid.uuid4().hex, [], {}
        self.saved = -1  # step of the checkpoint
        state = self.read() if self.path.exists() else None
        step = state["step"] if state else 0
        self.model = SAC(
            "MlpPolicy",
            env,
            learning_rate=args.learning_rate,
            buffer_size=args.total_steps,  # all of it is kept, for medium-replay
            learning_starts=args.learning_starts,
            batch_size=args.batch_size,
            gamma=args.gamma,
            policy_kwargs={"net_arch": list(args.hidden_dims)},
            seed=args.seed + step,  # what follows is not to repeat the beginning
            device=select_device(args.device),
        )
        self.model.set_logger(Logger(None, []))
        if state:
            self.restore(state)

    @property
    def step(self) -> int:
        return self.model.num_timesteps

    def read(self) -> dict:
        """The checkpoint, if it is one, and one of this training."""
        state = load_checkpoint(self.path)
        settings, step = state["settings"], state["step"]
        changed = [name for name in TRAINING if settings[name] != getattr(self.args, name)]
        if changed:
            was = ", ".join(f"{name} {settings[name]}" for name in changed)
            raise UserError(
                f"{self.path.parent} has a training with {was}; choose another --run-dir, or delete it"
            )
        if step > self.args.total_steps:
            raise UserError(
                f"{self.path.parent} has a training of {step:,} steps; --total-steps must be no less"
            )
        return state

    def save(self) -> None:
        """Write all that is needed to go on; the file is read without unpickling objects."""
        buffer = self.model.replay_buffer
        state = {
            "script": "tools/collect",
            "settings": {name: getattr(self.args, name) for name in TRAINING},
            "step": self.step,
            "id": self.id,
            "evaluations": self.evaluations,
            "actors": self.actors,
            "parameters": self.model.get_parameters(),
            "log_ent_coef": self.model.log_ent_coef.detach(),
            "buffer": {name: torch.from_numpy(getattr(buffer, name)[: self.step]) for name in BUFFER},
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(self.path, content.getvalue())
        self.saved = self.step

    def restore(self, state: dict) -> None:
        """Put everything back but the episode under way: it is cut off, and a new one begins."""
        self.id, self.evaluations, self.actors = state["id"], state["evaluations"], state["actors"]
        self.model.set_parameters(state["parameters"], device=self.model.device)
        self.model.log_ent_coef.data.copy_(state["log_ent_coef"])
        self.model.num_timesteps = self.saved = step = state["step"]
        buffer = self.model.replay_buffer
        for name in BUFFER:
            getattr(buffer, name)[:step] = state["buffer"][name].numpy()
        buffer.pos, buffer.full = step % buffer.buffer_size, step == buffer.buffer_size
        if step and not buffer.dones[step - 1, 0]:
            buffer.timeouts[step - 1] = 1

    def run(self, env: gym.Env) -> None:
        """Train to the end; env is for the evaluations."""
        counts = {"initial": self.step, "total": self.args.total_steps}
        bar = tqdm(desc="SAC", **counts, dynamic_ncols=True, disable=None)
        try:
            while True:
                evaluated = self.evaluations[-1]["step"] if self.evaluations else 0
                if self.step > evaluated and self.reached(self.args.eval_every):
                    self.evaluate(env)
                    bar.write(f"step {self.step:,}: return {self.evaluations[-1]['return_mean']:.5g}")
                if self.step > self.saved and self.reached(self.args.save_every):
                    self.save()
                if self.step >= self.args.total_steps:
                    break
                stop_if_asked()
                self.model.learn(1, reset_num_timesteps=False)
                bar.update()
        except SystemExit:
            self.save()
            raise
        finally:
            bar.close()

    def reached(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.args.total_steps

    def medium(self, random_return: float, expert_return: float) -> tuple[int, float]:
        """Step and score of the actor nearest to the fraction, none later than the first that reaches it."""
        reference, fraction = (random_return, expert_return), self.args.medium_fraction
        best = None
        for evaluation in self.evaluations:
            score = normalized_score(evaluation["return_mean"], reference) / 100
            if best is None or abs(score - fraction) < abs(best[1] - fraction):
                best = evaluation["step"], score
            if score >= fraction:
                break
        return best

    def replay(self, step: int) -> list[Episode]:
        """The episodes of the first steps of the training; the last one is cut off where they end."""
        buffer = self.model.replay_buffer
        arrays = {name: getattr(buffer, name)[:step, 0] for name in BUFFER[:-2]}
        timeouts = buffer.timeouts[:step, 0].astype(bool)
        terminals = buffer.dones[:step, 0].astype(bool) & ~timeouts
        actions = self.model.policy.unscale_action(arrays["actions"])
        ends = np.flatnonzero(terminals | timeouts) + 1
        episodes = []
        for start, end in pairwise([0, *ends, *([step] if step not in ends else [])]):
            last = arrays["next_observations"][end - 1 : end]
            observations = np.concatenate([arrays["observations"][start:end], last])
            rewards = arrays["rewards"][start:end]
            episodes.append(Episode(observations, actions[start:end], rewards, bool(terminals[end - 1]), -1))
        return episodes

    def evaluate(self, env: gym.Env) -> None:
        """Play with the policy as it is now, and keep it; the random state is left as it was."""
        weights = {name: tensor.clone() for name, tensor in self.model.actor.state_dict().items()}
        with torch.random.fork_rng():
            act = policy(self.model, weights)
            seeds = range(EVAL_SEED, EVAL_SEED + self.args.eval_episodes)
            returns = [play(env, act, seed).rewards.sum() for seed in seeds]
        self.evaluations.append({"step": self.step, "return_mean": float(np.mean(returns))})
        self.actors[self.step] = weights


# --- Recording ---
def record(env: gym.Env, act: Callable, name: str, folder: Path, args: Args) -> list[Episode]:
    """Play as many episodes or transitions as asked for; those that the folder has are not played again."""
    paths = sorted(folder.glob("*.npz"))
    recorded = [episode for path in paths for episode in read_part(path)]
    goal, unit = (args.episodes, "episodes") if args.episodes else (args.transitions, "transitions")
    episodes, unsaved, count = [], [], 0
    with tqdm(desc=name, total=goal, unit=f" {unit}", dynamic_ncols=True, disable=None) as bar:
        try:
            while count < goal:
                stop_if_asked()
                if len(episodes) < len(recorded):
                    episode = recorded[len(episodes)]
                else:
                    seed = np.random.SeedSequence([args.seed, KINDS.index(name), len(episodes)])
                    episode = play(env, act, int(seed.generate_state(1)[0]) // 2)
                    unsaved.append(episode)
                episodes.append(episode)
                length = 1 if args.episodes else len(episode.rewards)
                count += length
                bar.update(length)
                if sum(len(each.rewards) for each in unsaved) >= PART_SIZE or count >= goal and unsaved:
                    write_part(folder, len(episodes), unsaved)
                    unsaved = []
        except SystemExit:
            if unsaved:
                write_part(folder, len(episodes), unsaved)
            raise
    return episodes


def write_part(folder: Path, number: int, episodes: list[Episode]) -> None:
    """Add a file with these episodes, of which the last is the number-th."""
    arrays = {
        "observations": np.concatenate([each.observations for each in episodes]),
        "actions": np.concatenate([each.actions for each in episodes]),
        "rewards": np.concatenate([each.rewards for each in episodes]),
        "lengths": np.array([len(each.rewards) for each in episodes]),
        "terminated": np.array([each.terminated for each in episodes]),
        "seeds": np.array([each.seed for each in episodes]),
    }
    content = io.BytesIO()
    np.savez(content, **arrays)
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{number:08}.npz", content.getvalue())


def read_part(path: Path) -> list[Episode]:
    """What write_part() wrote."""
    try:
        with np.load(path) as arrays:
            lengths, terminated, seeds = (arrays[name] for name in ("lengths", "terminated", "seeds"))
            ends = np.cumsum(lengths)[:-1]
            observations = np.split(arrays["observations"], np.cumsum(lengths + 1)[:-1])
            columns = observations, np.split(arrays["actions"], ends), np.split(arrays["rewards"], ends)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged: delete {path.parent} to record it anew ({error})") from error
    rows = zip(*columns, terminated.tolist(), seeds.tolist(), strict=True)
    return [Episode(*row) for row in rows]


# --- Writing ---
def write_hdf5(path: Path, episodes: list[Episode], space: spaces.Box, about: dict) -> None:
    """An HDF5 file in D4RL layout, complete or not at all; actions are scaled to [-1, 1]."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    actions = np.concatenate([each.actions for each in episodes])
    last = np.concatenate([np.arange(len(each.rewards)) == len(each.rewards) - 1 for each in episodes])
    terminals = np.concatenate([np.full(len(each.rewards), each.terminated) for each in episodes]) & last
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["observations"] = np.concatenate([each.observations[:-1] for each in episodes], dtype=np.float32)
        file["actions"] = (2 * (actions - low) / (high - low) - 1).astype(np.float32)
        file["rewards"] = np.concatenate([each.rewards for each in episodes], dtype=np.float32)
        file["terminals"] = terminals
        file["timeouts"] = last & ~terminals
        file.attrs["collected"] = json.dumps(about)
    write_atomically(path, content.getvalue())


def make_minari(folder: str, dataset_id: str, episodes: list[Episode], env_id: str, about: dict) -> None:
    """A new Minari dataset, in this folder instead of Minari's own; to be called in a process of its own."""
    os.environ["MINARI_DATASETS_PATH"] = folder
    faulthandler.disable()  # on a full disk HDF5 crashes, and has pages to say before
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore", UserWarning)  # Minari would like to know the author
    spec = gym.spec(env_id)
    with contextlib.closing(gym.make(spec)) as env:
        space = env.observation_space
    buffers = []
    for number, each in enumerate(episodes):
        last = np.arange(len(each.rewards)) == len(each.rewards) - 1
        buffers.append(
            EpisodeBuffer(
                id=number,
                seed=each.seed if each.seed >= 0 else None,
                observations=unflatten_rows(space, each.observations),
                actions=each.actions,
                rewards=each.rewards,
                terminations=last & each.terminated,
                truncations=last & (not each.terminated),
            )
        )
    details = {name: about[name] for name in ("algorithm_name", "description", "requirements")}
    details |= {name: about[name] for name in ("ref_min_score", "ref_max_score")}
    made = minari.create_dataset_from_buffers(dataset_id, buffers, spec, spec, **details)
    made.storage.update_metadata({"collected": about})


def write_minari(dataset_id: str, episodes: list[Episode], env_id: str, about: dict) -> None:
    """A Minari dataset, complete or not at all: made in a hidden folder beside the others, then moved.

    The process that makes it is another one, because HDF5 crashes where the disk is full.
    """
    root, path = get_dataset_path(), get_dataset_path(dataset_id)
    namespace = path.parent.relative_to(root).as_posix()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".collect-") as folder:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
                pool.submit(make_minari, folder, dataset_id, episodes, env_id, about).result()
            if namespace not in list_local_namespaces():
                create_namespace(namespace)
            if path.exists():
                path.rename(Path(folder) / "replaced")
            (Path(folder) / dataset_id).rename(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: h5py's, and that of a process that crashed
        raise UserError(
            f"cannot write {path}: {str(error).splitlines()[0]}\n"
            "Is the disk full? Make room, then run the same command again; what is recorded so far is kept."
        ) from error


def unflatten_rows(space: spaces.Space, rows: np.ndarray) -> np.ndarray | dict:
    """`gymnasium.spaces.unflatten` of all rows (T, obs_dim) at once: (T, ...), or a dict of such."""
    if isinstance(space, spaces.Dict):
        ends = np.cumsum([spaces.flatdim(each) for each in space.values()])[:-1]
        columns = zip(space.items(), np.split(rows, ends, axis=1), strict=True)
        return {name: unflatten_rows(each, values) for (name, each), values in columns}
    return rows.reshape(len(rows), *space.shape).astype(space.dtype)


def made_by(name: str, hdf5: bool) -> dict | None:
    """What the dataset of that name notes about how it was made, {} if nothing; None: there is no dataset."""
    path = Path(name) if hdf5 else get_dataset_path(name)
    if not path.exists():
        return None
    try:
        if hdf5:
            with h5py.File(path) as file:
                collected = json.loads(file.attrs["collected"])
        else:
            collected = json.loads((path / "data" / "metadata.json").read_text())["collected"]
        return collected["made_by"]
    except (OSError, ValueError, KeyError):  # somebody else's, or damaged
        return {}


# --- The command ---
def names_of(args: Args, name: str) -> dict[str, str]:
    """By kind, what its dataset is called: a Minari id, or the path of a file."""
    if args.hdf5 is None:
        return {kind: f"local/{name}/{kind}-v0" for kind in args.kinds}
    return {kind: f"{args.hdf5}/{name}-{kind}.hdf5" for kind in args.kinds}


def record_all(training: Training, env: gym.Env, args: Args) -> tuple[dict, dict, tuple[float, float]]:
    """The episodes of each kind, a sentence on each, and the returns that score 0 and 100."""
    folder = training.path.parent

    def sac(step: int) -> Callable:
        return policy(training.model, training.actors[step])

    last, best = training.evaluations[-1], max(training.evaluations, key=itemgetter("return_mean"))
    margin = 0.1 * abs(last["return_mean"])
    if args.expert == "final" and best["return_mean"] > last["return_mean"] + margin:
        print(f"the policy of step {best['step']:,} was better; --expert best takes that one for the expert")
    expert = (last if args.expert == "final" else best)["step"]
    sets = {"random": record(env, lambda _: env.action_space.sample(), "random", folder / "random", args)}
    sets["expert"] = record(env, sac(expert), "expert", folder / f"expert-{expert}", args)
    low, high = (float(returns_of(sets[kind]).mean()) for kind in ("random", "expert"))
    if high <= low:
        raise UserError(
            f"the expert, with return {high:.5g}, is no better than a random policy, with {low:.5g}; "
            "a larger --total-steps goes on from there"
        )
    medium, score = training.medium(low, high)
    if any("medium" in kind for kind in args.kinds):
        print(f"medium is the policy of step {medium:,}, with score {100 * score:.1f} when it was evaluated")
        if abs(score - args.medium_fraction) > 0.15:
            print("  none was nearer: a smaller --eval-every leaves more to choose from")
    if {"medium", "medium-expert"} & set(args.kinds):
        sets["medium"] = record(env, sac(medium), "medium", folder / f"medium-{medium}", args)
        sets["medium-expert"] = sets["medium"] + sets["expert"]
    sets["medium-replay"] = training.replay(medium)
    explained = {
        "random": "Uniformly drawn actions.",
        "medium": f"SAC's policy after {medium} steps, stochastic.",
        "medium-replay": f"All that SAC did in its first {medium} steps: its replay buffer.",
        "expert": f"SAC's policy after {expert} steps, stochastic.",
        "medium-expert": f"SAC's policy after {medium} steps, then that after {expert}, both stochastic.",
    }
    return sets, explained, (low, high)


def returns_of(episodes: list[Episode]) -> np.ndarray:
    return np.array([each.rewards.sum() for each in episodes])


def show(names: dict[str, str], sets: dict[str, list[Episode]], reference: tuple[float, float]) -> None:
    """A table of the datasets."""
    width = max(map(len, names.values()))
    print(f"{'':{width}}  episodes  transitions  return               normalized score")
    for kind, name in names.items():
        returns, transitions = returns_of(sets[kind]), sum(len(each.rewards) for each in sets[kind])
        spread = f"{returns.mean():.5g} +- {returns.std():.4g}"
        score = normalized_score(returns.mean(), reference)
        print(f"{name:{width}}  {len(returns):8,}  {transitions:11,}  {spread:19}  {score:16.1f}")


def collect(args: Args) -> None:
    """Train, record, write; what an earlier command of the same arguments has done is not done again."""
    check_arguments(args)
    env, eval_env = make(args.env_id), make(args.env_id)
    name = args.name or re.sub(r"-v\d+$", "", args.env_id).lower().replace("/", "-")
    if not re.fullmatch(r"[-\w]+", name):
        raise UserError(f"--name is {name!r}; it must be of letters, digits, - and _")
    folder, names = Path(args.run_dir) / f"collect__{name}__{args.seed}", names_of(args, name)
    for path in (folder, Path(args.hdf5 or folder)):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from error

    training = Training(args, env, folder)
    made = {field: getattr(args, field) for field in RECORDING} | {"training": training.id}
    found = {kind: made_by(name, args.hdf5 is not None) for kind, name in names.items()}
    for kind in names:
        if found[kind] not in (None, made) and not args.overwrite:
            raise UserError(
                f"{names[kind]} exists, made in another way; --overwrite replaces it, --name gives the new "
                "ones another name"
            )
    size = f"{args.episodes:,} episodes" if args.episodes else f"{args.transitions:,} transitions"
    print(f"SAC in {args.env_id} for {args.total_steps:,} steps, then {size} per policy: {', '.join(names)}")
    print(f"  {training.model.device}, seed {args.seed}, step {training.step:,}, {folder}")
    training.run(eval_env)
    sets, explained, reference = record_all(training, eval_env, args)

    for kind in names:
        if found[kind] == made:
            print(f"{names[kind]} is there already")
            continue
        about = {
            "env_id": args.env_id,
            "algorithm_name": "uniform" if kind == "random" else "SAC, stable-baselines3",
            "description": explained[kind],
            "ref_min_score": reference[0],
            "ref_max_score": reference[1],
            "requirements": [f"{package}=={metadata.version(package)}" for package in PACKAGES],
            "arguments": {field: getattr(args, field) for field in (*TRAINING, *RECORDING)},
            "made_by": made,
        }
        if args.hdf5 is None:
            write_minari(names[kind], sets[kind], args.env_id, about)
        else:
            write_hdf5(Path(names[kind]), sets[kind], env.action_space, about)
        stop_if_asked()

    show(names, sets, reference)
    example = names.get("medium", next(iter(names.values())))
    words = example if args.hdf5 is None else f"{args.env_id} --dataset {example}"
    print(f"train on one with: python dac.py --env-id {words}")
    print(f"{folder} has what is needed to train longer or make more kinds; delete it when you are done")


def main(args: Args) -> None:
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # Gymnasium's, on its older environments
    with interruptible():
        try:
            collect(args)
        except SystemExit:
            print("stopped; the same command goes on from here")
            raise


if __name__ == "__main__":
    run_command(main, tyro.cli(Args))
