"""Make offline datasets for a Gymnasium environment, by D4RL's protocol.

    python tools/collect.py --env-id Hopper-v5                    # local/hopper/{random,medium,...}-v0
    python tools/collect.py --env-id mymodule:Mine-v0             # an environment that a module registers
    python tools/collect.py --env-id Hopper-v5 --hdf5 data        # data/hopper-medium.hdf5, ... instead

Trains SAC, then records
    random          uniformly drawn actions
    medium          the policy when it was about a third of the way from random to expert
    medium-replay   all that SAC did until then, its replay buffer
    expert          the policy at the end of the training, or with --expert best the best one before
    medium-expert   medium and expert, one after the other
Policies are recorded as they are, stochastic. docs/tools.md says more.
"""

import io
import json
import re
import shlex
import shutil
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
from minari.data_collector import EpisodeBuffer
from minari.storage import get_dataset_path
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

import toolbox
from common.cli import NonNegative, Positive, Threads, UnitInterval, UserError, run_command
from common.devices import use_device
from common.envs import make_envs, original_env, parse_kwargs
from common.other_data import to_unit_box
from common.scores import scored, show
from common.tasks import Task, find_task

Kind = Literal["random", "medium", "medium-replay", "expert", "medium-expert"]
KINDS = get_args(Kind)
EVAL_SEED = 10_000  # evaluation episodes are seeded EVAL_SEED, EVAL_SEED + 1, ...


@dataclass
class Args:
    """Offline datasets for a Gymnasium environment with continuous actions."""

    env_id: str = "Hopper-v5"  # any Gymnasium id, module:Id-v0 too; actions must be bounded and continuous
    env_kwargs: tuple[str, ...] = ()  # for gymnasium.make, key=value: max_episode_steps=500
    name: str = ""  # of the datasets, local/<name>/<kind>-v0; empty: hopper for Hopper-v5
    kinds: tuple[Kind, ...] = KINDS  # the datasets to make
    hdf5: Path | None = None  # write HDF5 files in D4RL's layout to this folder, instead of Minari datasets
    overwrite: bool = False  # replace datasets of these names
    transitions: Positive[int] = 100_000  # recorded per policy, at least: the last episode is finished
    seed: NonNegative[int] = 0  # seed of training and recording
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:<i>
    num_threads: Threads[int] = 1  # threads on a CPU

    # --- SAC ---
    total_steps: Positive[int] = 300_000  # environment steps of the training
    expert: Literal["final", "best"] = "final"  # the policy at the end, or the one that was evaluated best
    medium_fraction: UnitInterval[float] = 1 / 3  # where medium is, on the way from random (0) to expert (1)
    eval_every: Positive[int] = 5_000  # steps between evaluations; medium is the policy at one
    eval_episodes: Positive[int] = 10  # episodes per evaluation
    hidden_dims: tuple[Positive[int], ...] = (256, 256)  # hidden units per layer of actor and critics
    learning_rate: Positive[float] = 3e-4  # of actor, critics and temperature
    batch_size: Positive[int] = 256  # transitions per gradient step; there is one per environment step
    gamma: UnitInterval[float] = 0.99  # discount factor
    learning_starts: NonNegative[int] = 5_000  # steps of uniform actions before the first gradient step


# === Acting ===
def make(task: Task, args: Args) -> gym.Env:
    """The environment in its own units; observations are flattened to (obs_dim,), which copies them."""
    return gym.wrappers.FlattenObservation(original_env(task, parse_kwargs(args.env_kwargs)))


def play(env: gym.Env, act: Callable, seed: int) -> EpisodeBuffer:
    """One episode of act(observation) -> action; seed decides all that is random in it."""
    torch.manual_seed(seed)
    env.action_space.seed(seed)
    observations, actions, rewards = [env.reset(seed=seed)[0]], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        actions.append(act(observations[-1]))
        observation, reward, terminated, truncated, _ = env.step(actions[-1].copy())
        observations.append(observation)
        rewards.append(float(reward))
    return episode(np.stack(observations), np.stack(actions), np.array(rewards), bool(terminated), seed)


def episode(observations, actions, rewards, terminated: bool, seed: int | None = None) -> EpisodeBuffer:
    """Of T + 1 observations, T actions and rewards; what did not terminate was cut off."""
    last = np.arange(len(rewards)) == len(rewards) - 1
    ends = {"terminations": last & terminated, "truncations": last & (not terminated)}
    return EpisodeBuffer(observations=observations, actions=actions, rewards=rewards, seed=seed, **ends)


def mean_return(episodes: list[EpisodeBuffer]) -> float:
    return float(np.mean([each.rewards.sum() for each in episodes]))


def policy(model: SAC, actor: dict | None = None) -> Callable:
    """observation (obs_dim,) -> a sample of the policy, as it is or as it was, in the environment's units."""
    if actor:
        model.actor.load_state_dict(actor)
    return lambda observation: model.predict(observation)[0]


# === Training ===
class Snapshots(BaseCallback):
    """SAC's actor every eval_every steps and at the end, and its mean return then in a few episodes."""

    def __init__(self, env: gym.Env, args: Args):
        super().__init__()
        self.env, self.args = env, args
        self.actors, self.returns = {}, {}  # by step

    def _on_step(self) -> bool:
        step, args = self.num_timesteps, self.args
        if step % args.eval_every == 0 or step == args.total_steps:
            self.actors[step] = deepcopy(self.model.actor.state_dict())
            seeds = range(EVAL_SEED, EVAL_SEED + args.eval_episodes)
            with torch.random.fork_rng():
                self.returns[step] = mean_return([play(self.env, policy(self.model), each) for each in seeds])
            print(f"step {step:,} of {args.total_steps:,}: return {self.returns[step]:.5g}")
        return True


def train(env: gym.Env, eval_env: gym.Env, args: Args) -> tuple[SAC, Snapshots]:
    """SAC after total_steps in env, and what was kept on the way."""
    options = {"policy_kwargs": {"net_arch": list(args.hidden_dims)}, "seed": args.seed}
    options |= {"buffer_size": args.total_steps}  # all of it is kept, for medium-replay
    options |= {name: getattr(args, name) for name in ("learning_rate", "batch_size", "gamma")}
    device = use_device(args.device, args.num_threads, "highest")
    model = SAC("MlpPolicy", env, device=device, learning_starts=args.learning_starts, **options)
    model.set_logger(Logger(None, []))
    snapshots = Snapshots(eval_env, args)
    model.learn(args.total_steps, callback=snapshots)
    return model, snapshots


def medium_step(returns: dict[int, float], goal: float) -> int:
    """Of the evaluations up to the first that reaches the goal, the step of the nearest one."""
    steps = list(returns)
    first = next((i for i, step in enumerate(steps) if returns[step] >= goal), len(steps) - 1)
    return min(steps[: first + 1], key=lambda step: abs(returns[step] - goal))


# === Recording ===
def record(env: gym.Env, act: Callable, kind: str, args: Args) -> list[EpisodeBuffer]:
    """Play until there are enough transitions; each episode has a seed of its own."""
    episodes, count = [], 0
    while count < args.transitions:
        seed = np.random.SeedSequence([args.seed, KINDS.index(kind), len(episodes)])
        episodes.append(play(env, act, int(seed.generate_state(1)[0]) // 2))
        count += len(episodes[-1].rewards)
    return episodes


def replay(model: SAC, step: int) -> list[EpisodeBuffer]:
    """The episodes of the first steps of the training; the last one is cut off where they end."""
    buffer = model.replay_buffer
    names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    obs, next_obs, actions, rewards, dones, timeouts = (getattr(buffer, name)[:step, 0] for name in names)
    ends = [int(end) + 1 for end in np.flatnonzero(dones)]
    actions, episodes = model.policy.unscale_action(actions), []
    for start, end in pairwise([0, *ends, *([step] if step not in ends else [])]):
        seen = np.concatenate([obs[start:end], next_obs[end - 1 : end]])
        terminated = dones[end - 1] > timeouts[end - 1]
        episodes.append(episode(seen, actions[start:end], rewards[start:end], terminated))
    return episodes


def record_all(model: SAC, snapshots: Snapshots, env: gym.Env, args: Args) -> dict[str, tuple[str, list]]:
    """For each kind, and for random and expert in any case, a sentence on it and its episodes."""
    returns, actors = snapshots.returns, snapshots.actors
    expert = max(returns, key=returns.get) if args.expert == "best" else max(returns)
    best = record(env, policy(model, actors[expert]), "expert", args)
    random = record(env, lambda _: env.action_space.sample(), "random", args)
    low, high = mean_return(random), mean_return(best)
    medium, middle = medium_step(returns, low + args.medium_fraction * (high - low)), []
    print(f"medium is the policy of step {medium:,}, with return {returns[medium]:.5g} when it was evaluated")
    if {"medium", "medium-expert"} & set(args.kinds):
        middle = record(env, policy(model, actors[medium]), "medium", args)
    return {
        "random": ("Uniformly drawn actions.", random),
        "medium": (f"SAC's policy after {medium} steps, stochastic.", middle),
        "medium-replay": (f"All that SAC did in its first {medium} steps.", replay(model, medium)),
        "expert": (f"SAC's policy after {expert} steps, stochastic.", best),
        "medium-expert": (f"SAC's policy after {medium} steps, then after {expert}.", middle + best),
    }


# === Writing ===
def write_hdf5(path: Path, episodes: list[EpisodeBuffer], space: gym.spaces.Box, about: dict) -> None:
    """An HDF5 file in D4RL's layout with next_observations; actions are scaled to [-1, 1]."""
    parts = {"observations": lambda each: each.observations[:-1], "actions": lambda each: each.actions}
    parts |= {"next_observations": lambda each: each.observations[1:], "rewards": lambda each: each.rewards}
    parts |= {"terminals": lambda each: each.terminations, "timeouts": lambda each: each.truncations}
    columns = {name: np.concatenate([part(each) for each in episodes]) for name, part in parts.items()}
    columns["actions"] = to_unit_box(path, columns["actions"], space.low, space.high, "its action_space")
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, values in columns.items():
            file[name] = values.astype(np.float32 if values.dtype.kind == "f" else bool)
        file.attrs["collected"] = json.dumps(about)
    toolbox.write_output(path, content.getvalue())


def write_minari(dataset_id: str, episodes: list[EpisodeBuffer], env: gym.Env, about: dict) -> None:
    """A Minari dataset, made under another name and then renamed, so that it is complete or not there."""
    path, spaces = get_dataset_path(dataset_id), {"observation_space": env.observation_space}
    part = path.with_name("unfinished-v0")
    size = sum(each.observations.nbytes + each.actions.nbytes for each in episodes)
    try:
        shutil.rmtree(part, ignore_errors=True)  # left by a crash
        part.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(part.parent).free < 2 * size:  # on a full disk HDF5 crashes
            raise OSError(f"it takes up to {2 * size / 1e6:.0f} MB, there is less room")
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it names no author
            name = part.relative_to(get_dataset_path()).as_posix()
            minari.create_dataset_from_buffers(name, episodes, action_space=env.action_space, **spaces)
        file = part / "data" / "metadata.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | about | {"dataset_id": dataset_id}))
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: h5py's
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}; make room") from error


def spec_of(env: gym.Env) -> str | None:
    """The environment as JSON, from which it can be made again; None where it is registered with a class."""
    try:
        return replace(env.unwrapped.spec, max_episode_steps=env.spec.max_episode_steps).to_json()
    except Exception:  # of many kinds, from values that JSON does not have
        return None


# === The command ===
def main(args: Args) -> None:
    """Train, record, write, and say how to train on it. UserError: mostly before the first step."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # Gymnasium's, on its older environments
    task = find_task(args.env_id)
    if task.kind == "bandit":
        raise UserError(f"{args.env_id} is not a Gymnasium id; its data is generated where it is needed")
    make_envs(task, 1, args)[0].close()  # which knows what may be wrong with it
    env, eval_env = make(task, args), make(task, args)
    spec = spec_of(env)
    name = args.name or re.sub(r"-v\d+$", "", args.env_id.rpartition(":")[2]).lower().replace("/", "-")
    if not re.fullmatch(r"[-\w]{1,100}", name) or not args.kinds:
        raise UserError(f"--name is {name!r}; it takes 1 to 100 letters, digits, - and _, and one of --kinds")
    names = {kind: f"local/{name}/{kind}-v0" for kind in args.kinds}
    if args.hdf5:
        names = {kind: str(args.hdf5.expanduser() / f"{name}-{kind}.hdf5") for kind in args.kinds}
    for each in names.values():
        path = Path(each) if args.hdf5 else get_dataset_path(each)
        if not args.overwrite and path.exists():
            raise UserError(f"{each} exists; --overwrite replaces it, --kinds and --name leave it alone")
        toolbox.write_output(path.with_name(".trial"), b"")  # fails, if it does, before hours of training

    model, snapshots = train(env, eval_env, args)
    recorded = record_all(model, snapshots, eval_env, args)
    reference = mean_return(recorded["random"][1]), mean_return(recorded["expert"][1])
    made_with = ", ".join(f"{name} {value}" for name, value in vars(args).items())
    about = {"env_spec": spec, "eval_env_spec": spec} if spec else {}
    if reference[0] < reference[1]:
        about |= {"ref_min_score": reference[0], "ref_max_score": reference[1]}
    else:
        print(f"no scores: the expert's return, {reference[1]:.5g}, is not above random, {reference[0]:.5g}")
    for kind, each in names.items():
        sentence, episodes = recorded[kind]
        about["description"] = f"{sentence} Made by tools/collect.py with {made_with}."
        if args.hdf5:
            write_hdf5(Path(each), episodes, env.action_space, about)
        else:
            write_minari(each, episodes, env, about)
        rows = sum(len(each.rewards) for each in episodes)
        mean = show(scored(mean_return(episodes), reference if "ref_min_score" in about else None))
        print(f"{each}: {len(episodes):,} episodes, {rows:,} transitions, mean {mean}")
    words = ["--env-id", names[args.kinds[-1]]]
    if args.hdf5 or not spec or ":" in args.env_id:  # the data alone does not say where the environment is
        words = ["--env-id", args.env_id, "--dataset", names[args.kinds[-1]]]
        words += ["--env-kwargs", *args.env_kwargs] if args.env_kwargs else []
    print(f"train on one with: python dac.py {shlex.join(words)}")


if __name__ == "__main__":
    run_command(main, Args)
