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
Policies are recorded as they are, stochastic. The same command goes on with a training that was stopped, by
Ctrl-C or by a crash. docs/tools.md says more.
"""

import contextlib
import io
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Literal, get_args

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from minari.storage import get_dataset_path
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger
from tqdm import tqdm

import toolbox  # noqa: F401 (makes common/ importable)
from common.checkpoints import FORMAT, cannot_write, load_checkpoint, lock_folder, write_atomically
from common.devices import default_threads, use_device
from common.envs import CheckedEnv, flattened, make_online_env, original_env
from common.minari_data import to_unit_box
from common.runs import raise_if_interrupted, run_command, stopping_between_steps
from common.scores import normalized_score
from common.settings import NonNegative, Positive, UnitInterval
from common.tasks import BANDIT_TASKS, UserError, user_path

Kind = Literal["random", "medium", "medium-replay", "expert", "medium-expert"]
KINDS = get_args(Kind)
EVAL_SEED = 10_000  # evaluation episodes are seeded EVAL_SEED, EVAL_SEED + 1, ...
SAC_OPTIONS = ("learning_rate", "batch_size", "gamma", "learning_starts")
TRAINING = ("env_id", "seed", "eval_every", "eval_episodes", "hidden_dims", *SAC_OPTIONS)  # kept to its end
PACKAGES = ("gymnasium", "mujoco", "stable-baselines3", "torch", "numpy")
BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


@dataclass
class Args:
    """Offline datasets for a Gymnasium environment with continuous actions."""

    env_id: str = "Hopper-v5"  # a Gymnasium id; actions must be bounded and continuous
    name: str = ""  # of the datasets, local/<name>/<kind>-v0; empty: hopper for Hopper-v5
    kinds: tuple[Kind, ...] = KINDS  # the datasets to make
    hdf5: str | None = None  # write HDF5 files in D4RL layout to this folder, instead of Minari datasets
    overwrite: bool = False  # replace datasets of these names
    transitions: Positive[int] = 100_000  # recorded per policy, at least: the last episode is finished
    seed: NonNegative[int] = 0  # seed of training and recording
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:<i>
    num_threads: Positive[int] = default_threads()  # threads on a CPU; OMP_NUM_THREADS where that is set
    run_dir: str = "runs"  # folder that receives a folder with the training

    # --- SAC ---
    total_steps: Positive[int] = 300_000  # environment steps of the training
    expert: Literal["final", "best"] = "final"  # the policy at the end, or the one that was evaluated best
    medium_fraction: UnitInterval[float] = 1 / 3  # where medium is, on the way from random (0) to expert (1)
    eval_every: Positive[int] = 5_000  # steps between evaluations; medium is the policy at one; each saves
    eval_episodes: Positive[int] = 10  # episodes per evaluation
    hidden_dims: tuple[Positive[int], ...] = (256, 256)  # hidden units per layer of actor and critics
    learning_rate: Positive[float] = 3e-4  # of actor, critics and temperature
    batch_size: Positive[int] = 256  # transitions per gradient step; there is one per environment step
    gamma: UnitInterval[float] = 0.99  # discount factor
    learning_starts: NonNegative[int] = 5_000  # steps of uniform actions before the first gradient step


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Within, an error of a library is the user's: of sizes, rates or seeds that it does not take."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        raise UserError(f"{what}: {str(error).splitlines()[0]}") from error


# === Acting ===
def make(env_id: str) -> gym.Env:
    """The environment in its own units, but for observations, which are flattened to (obs_dim,)."""
    make_online_env(env_id).close()  # which knows what may be wrong with it
    if env_id in BANDIT_TASKS:
        raise UserError(f"{env_id} is not a Gymnasium id; its data is generated where it is needed")
    return CheckedEnv(flattened(original_env(env_id)), env_id)


def play(env: gym.Env, act: Callable, seed: int) -> EpisodeBuffer:
    """One episode of act(observation) -> action; seed decides all that is random in it."""
    torch.manual_seed(seed)
    env.action_space.seed(seed)
    observations, actions, rewards = [env.reset(seed=seed)[0]], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        raise_if_interrupted()
        actions.append(act(observations[-1]))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(float(reward))
    return episode(np.stack(observations), np.stack(actions), np.array(rewards), bool(terminated), seed)


def episode(observations, actions, rewards, terminated: bool, seed: int | None = None) -> EpisodeBuffer:
    """Of T + 1 observations, T actions and rewards; what did not terminate was cut off."""
    last = np.arange(len(rewards)) == len(rewards) - 1
    ends = {"terminations": last & terminated, "truncations": last & (not terminated)}
    return EpisodeBuffer(observations=observations, actions=actions, rewards=rewards, seed=seed, **ends)


# === Training ===
class Training:
    """SAC in its environment, its evaluations and the actor at each of them, and their checkpoint."""

    def __init__(self, args: Args, env: gym.Env, folder: Path):
        """A new training, or the one in the folder. UserError: that one has other settings."""
        self.args, self.path = args, folder / "checkpoint.pt"
        self.settings = {name: getattr(args, name) for name in TRAINING}
        self.evaluations, self.actors = [], {}
        state = self.read() if self.path.exists() else {}
        device = use_device(args.device, args.num_threads, "highest")
        options = {name: self.settings[name] for name in SAC_OPTIONS}
        options |= {"buffer_size": args.total_steps}  # all of it is kept, for medium-replay
        options |= {"seed": args.seed + state.get("step", 0)}  # what follows is not to repeat the beginning
        options |= {"policy_kwargs": {"net_arch": list(args.hidden_dims)}, "device": device}
        with as_user_error("SAC cannot be made with these arguments"):
            self.model = SAC("MlpPolicy", env, **options)
        self.model.set_logger(Logger(None, []))
        try:
            if state:
                self.restore(state)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{self.path} is damaged: {str(error).splitlines()[0]}") from error

    @property
    def step(self) -> int:
        return self.model.num_timesteps

    def read(self) -> dict:
        """The checkpoint, if it is of this training."""
        state, folder = load_checkpoint(self.path), self.path.parent
        theirs = state["args"] if state["results"].get("script") == "collect" else {}
        if changed := [name for name in self.settings if theirs.get(name) != self.settings[name]]:
            was = ", ".join(f"{name} {theirs.get(name)}" for name in changed)
            raise UserError(f"{folder} has a training with {was}; choose another --run-dir")
        if state["step"] > self.args.total_steps:
            raise UserError(f"{folder} has a training of {state['step']:,} steps; --total-steps is less")
        return state

    def save(self) -> None:
        """Write all that is needed to go on; the file is read without unpickling objects."""
        buffer = self.model.replay_buffer
        results = {"script": "collect", "env_id": self.args.env_id, "seed": self.args.seed}
        results |= {"evaluations": self.evaluations, "data_checksum": None, "losses": {}}
        state = {
            "format": FORMAT,
            "args": self.settings,
            "step": self.step,
            "results": results | {"finished": False, "train_seconds": 0.0},  # as in a script's checkpoint
            "agent": self.model.get_parameters(),
            "optimizers": {},  # they are among the agent's parameters
            "rng": torch.get_rng_state(),
            "actors": self.actors,
            "log_ent_coef": self.model.log_ent_coef.detach(),
            "buffer": {name: torch.from_numpy(getattr(buffer, name)[: self.step]) for name in BUFFER},
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(self.path, content.getvalue())

    def restore(self, state: dict) -> None:
        """Put everything back but the episode under way: it is cut off, and a new one begins."""
        self.evaluations, self.actors = state["results"]["evaluations"], state["actors"]
        self.model.set_parameters(state["agent"], device=self.model.device)
        self.model.log_ent_coef.data.copy_(state["log_ent_coef"])
        self.model.num_timesteps = step = state["step"]
        buffer = self.model.replay_buffer
        for name in BUFFER:
            getattr(buffer, name)[:step] = state["buffer"][name].numpy()
        buffer.pos, buffer.full = step % buffer.buffer_size, step == buffer.buffer_size
        if step and not buffer.dones[step - 1]:
            buffer.dones[step - 1] = buffer.timeouts[step - 1] = 1

    def run(self, env: gym.Env) -> None:
        """Train to the end; env is for the evaluations. KeyboardInterrupt, once all is saved."""
        counts = {"initial": self.step, "total": self.args.total_steps}
        with tqdm(desc="SAC", **counts, dynamic_ncols=True, disable=None) as bar:
            try:
                while self.step < self.args.total_steps or self.evaluation_due():
                    raise_if_interrupted()
                    if self.evaluation_due():
                        self.evaluate(env)
                        self.save()
                        bar.write(f"step {self.step:,}: return {self.evaluations[-1]['return_mean']:.5g}")
                        continue
                    with as_user_error("SAC failed, perhaps --learning-rate is too high"):
                        self.model.learn(1, reset_num_timesteps=False)
                    bar.update()
            except KeyboardInterrupt:
                self.save()
                raise

    def evaluation_due(self) -> bool:
        """Whether this step ends with an evaluation that has not been made yet."""
        wanted = self.step % self.args.eval_every == 0 or self.step == self.args.total_steps
        return wanted and self.step > (self.evaluations[-1]["step"] if self.evaluations else 0)

    def evaluate(self, env: gym.Env) -> None:
        """Play with the policy as it is now, and keep it; the random state is left as it was."""
        self.actors[self.step] = {name: each.clone() for name, each in self.model.actor.state_dict().items()}
        seeds = range(EVAL_SEED, EVAL_SEED + self.args.eval_episodes)
        with torch.random.fork_rng():
            returns = [play(env, self.policy(self.step), seed).rewards.sum() for seed in seeds]
        self.evaluations.append({"step": self.step, "return_mean": float(np.mean(returns))})

    def policy(self, step: int) -> Callable:
        """observation (obs_dim,) -> a sample of the policy at this evaluation, in the environment's units."""
        self.model.actor.load_state_dict(self.actors[step])
        self.model.policy.set_training_mode(False)
        return lambda observation: self.model.predict(observation)[0]

    def expert(self) -> int:
        """The step of the expert."""
        best = max(self.evaluations, key=itemgetter("return_mean"))
        return (best if self.args.expert == "best" else self.evaluations[-1])["step"]

    def medium(self, random_return: float, expert_return: float) -> tuple[int, float]:
        """Step and score of the actor nearest to the fraction, none later than the first that reaches it."""
        reference, goal, best = (random_return, expert_return), 100 * self.args.medium_fraction, None
        for evaluation in self.evaluations:
            score = normalized_score(evaluation["return_mean"], reference)
            if best is None or abs(score - goal) < abs(best[1] - goal):
                best = evaluation["step"], score
            if score >= goal:
                break
        return best

    def replay(self, step: int) -> list[EpisodeBuffer]:
        """The episodes of the first steps of the training; the last one is cut off where they end."""
        buffer = self.model.replay_buffer
        rows = {name: getattr(buffer, name)[:step, 0] for name in BUFFER}
        ends = np.flatnonzero(rows["dones"]) + 1
        actions = self.model.policy.unscale_action(rows["actions"])
        episodes = []
        for start, end in pairwise([0, *ends, *([step] if step not in ends else [])]):
            last = rows["next_observations"][end - 1 : end]
            observations = np.concatenate([rows["observations"][start:end], last])
            terminated = rows["dones"][end - 1] > rows["timeouts"][end - 1]
            episodes.append(episode(observations, actions[start:end], rows["rewards"][start:end], terminated))
        return episodes


# === Recording ===
def record(env: gym.Env, act: Callable, kind: str, args: Args) -> list[EpisodeBuffer]:
    """Play until there are enough transitions; each episode has a seed of its own."""
    episodes, count = [], 0
    with tqdm(desc=kind, total=args.transitions, dynamic_ncols=True, disable=None) as bar:
        while count < args.transitions:
            seed = np.random.SeedSequence([args.seed, KINDS.index(kind), len(episodes)])
            episodes.append(play(env, act, int(seed.generate_state(1)[0]) // 2))
            count += len(episodes[-1].rewards)
            bar.update(len(episodes[-1].rewards))
    return episodes


def record_all(training: Training, env: gym.Env, args: Args) -> dict[str, tuple[str, list[EpisodeBuffer]]]:
    """For each kind, and for random and expert in any case, a sentence on it and its episodes."""
    expert, best = training.expert(), record(env, training.policy(training.expert()), "expert", args)
    random = record(env, lambda _: env.action_space.sample(), "random", args)
    low, high = returns_of(random).mean(), returns_of(best).mean()
    if high <= low:
        advice = "a larger --total-steps goes on from there"
        raise UserError(f"the expert's return, {high:.5g}, is no better than random, {low:.5g}; {advice}")
    medium, score = training.medium(low, high)
    print(f"medium is the policy of step {medium:,}, with score {score:.1f} when it was evaluated")
    middle = []
    if {"medium", "medium-expert"} & set(args.kinds):
        middle = record(env, training.policy(medium), "medium", args)
    replay = f"All that SAC did in its first {medium} steps: its replay buffer."
    both = f"SAC's policy after {medium} steps, then that after {expert}, both stochastic."
    return {
        "random": ("Uniformly drawn actions.", random),
        "medium": (f"SAC's policy after {medium} steps, stochastic.", middle),
        "medium-replay": (replay, training.replay(medium)),
        "expert": (f"SAC's policy after {expert} steps, stochastic.", best),
        "medium-expert": (both, middle + best),
    }


def returns_of(episodes: list[EpisodeBuffer]) -> np.ndarray:
    return np.array([each.rewards.sum() for each in episodes])


# === Writing ===
def write_hdf5(path: Path, episodes: list[EpisodeBuffer], space: spaces.Box, about: dict) -> None:
    """An HDF5 file in D4RL layout, complete or not at all; actions are scaled to [-1, 1]."""
    actions = np.concatenate([each.actions for each in episodes])
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["observations"] = np.concatenate([each.observations[:-1] for each in episodes], dtype=np.float32)
        file["actions"] = to_unit_box(actions, space).astype(np.float32)
        file["rewards"] = np.concatenate([each.rewards for each in episodes], dtype=np.float32)
        file["terminals"] = np.concatenate([each.terminations for each in episodes])
        file["timeouts"] = np.concatenate([each.truncations for each in episodes])
        file.attrs["collected"] = json.dumps(about)
    write_atomically(path, content.getvalue(), "--hdf5")


def write_minari(dataset_id: str, episodes: list[EpisodeBuffer], env: gym.Env, about: dict) -> None:
    """A Minari dataset, made under another name and then renamed, so that it is complete or not there."""
    root, path = get_dataset_path(), get_dataset_path(dataset_id)
    part = path.with_name("unfinished-v0")
    spec = env.unwrapped.spec
    details = about | {"env": spec, "eval_env": spec, "observation_space": env.observation_space}
    size = sum(each.observations.nbytes + each.actions.nbytes for each in episodes)
    try:
        shutil.rmtree(part, ignore_errors=True)  # left by a crash
        part.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(part.parent).free < 2 * size:  # on a full disk HDF5 crashes
            raise OSError(f"it takes up to {2 * size / 1e6:.0f} MB, there is less room")
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that nobody is named as author
            minari.create_dataset_from_buffers(part.relative_to(root).as_posix(), episodes, **details)
        file = part / "data" / "metadata.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset_id": dataset_id}))
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: h5py's
        shutil.rmtree(part, ignore_errors=True)
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; make room and run the same command again") from error


# === The command ===
def show(name: str, episodes: list[EpisodeBuffer], reference: tuple[float, float]) -> None:
    """A line of the table of datasets."""
    returns, transitions = returns_of(episodes), sum(len(each.rewards) for each in episodes)
    score = normalized_score(returns.mean(), reference)
    counts = f"{len(returns):,} episodes, {transitions:,} transitions"
    print(f"{name}: {counts}, return {returns.mean():.5g} +- {returns.std():.4g}, score {score:.1f}")


def collect(args: Args) -> None:
    """Train, record, write; a training that was stopped goes on."""
    env, eval_env = make(args.env_id), make(args.env_id)
    name = args.name or re.sub(r"-v\d+$", "", args.env_id).lower().replace("/", "-")
    if not re.fullmatch(r"[-\w]{1,100}", name):
        raise UserError(f"--name is {name!r}; it must be of at most 100 letters, digits, - and _")
    folder = user_path(args.run_dir) / f"collect__{name}__{args.seed}"
    hdf5 = user_path(args.hdf5) if args.hdf5 is not None else None
    names = {kind: f"{hdf5}/{name}-{kind}.hdf5" if hdf5 else f"local/{name}/{kind}-v0" for kind in args.kinds}
    for each in names.values():
        if not args.overwrite and (Path(each) if hdf5 else get_dataset_path(each)).exists():
            raise UserError(f"{each} exists; --overwrite replaces it, --kinds and --name leave it alone")
    for path, flag in [(hdf5, "--hdf5"), (folder, "--run-dir")]:
        try:
            if path:
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error, flag) from error

    lock = lock_folder(folder)
    training = Training(args, env, folder)
    print(f"SAC in {args.env_id} for {args.total_steps:,} steps, then {args.transitions:,} per policy")
    print(f"  {training.model.device}, seed {args.seed}, step {training.step:,}, {folder}")
    training.run(eval_env)
    recorded = record_all(training, eval_env, args)
    reference = tuple(float(returns_of(recorded[kind][1]).mean()) for kind in ("random", "expert"))
    made_with = ", ".join(f"{name} {value}" for name, value in vars(args).items())
    about = dict(zip(("ref_min_score", "ref_max_score"), reference, strict=True))
    about["requirements"] = [f"{package}=={metadata.version(package)}" for package in PACKAGES]
    for kind, each in names.items():
        sentence, episodes = recorded[kind]
        about["description"] = f"{sentence} Made by tools/collect.py with {made_with}."
        if hdf5:
            write_hdf5(Path(each), episodes, env.action_space, about)
        else:
            write_minari(each, episodes, env, about)
        show(each, episodes, reference)
    example = names[args.kinds[-1]]
    words = f"{args.env_id} --dataset {example}" if hdf5 else example
    print(f"train on one with: python dac.py --env-id {words}")
    print(f"{folder} has what is needed to train longer or record more; delete it when you are done")
    lock.release()


def main(args: Args) -> None:
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # Gymnasium's, on its older environments
    try:
        with stopping_between_steps():
            collect(args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
        raise


if __name__ == "__main__":
    run_command(main, Args)
