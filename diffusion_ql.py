"""Diffusion-QL: offline reinforcement learning with a diffusion policy that is pushed uphill on Q.

Paper: Wang, Hunt, Zhou: Diffusion Policies as an Expressive Policy Class for Offline Reinforcement Learning,
2022, arXiv 2208.06193.
docs/diffusion_ql.md explains it and lists what to know about the authors' code and this file (D1, ...).

    python diffusion_ql.py                                 # the bundled hopper-mini-v0, minutes on a CPU
    python diffusion_ql.py --env-id hopper-medium-v2       # a D4RL task with the authors' settings
    python diffusion_ql.py --resume runs/<run>             # go on where a run stopped

The policy is a diffusion model of the actions in the data, trained by noise regression. A second loss samples
an action from it and raises the action's Q, with the gradient running through the whole denoising chain.

In shapes: T is diffusion_steps. Timesteps are 1..T; t = 0 is the clean action.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import Even, NonNegative, Positive, Threads, UnitInterval, run_command
from common.datasets import RewardRule, load_dataset, tune_rewards
from common.devices import cuda_graphed, mish, use_device
from common.envs import make_envs
from common.runs import Run, stop_if_asked
from common.tasks import find_task

EVAL_SEED = 10_000  # evaluation episodes are seeded EVAL_SEED, EVAL_SEED + 1, ...


# === Args ===
@dataclass
class Args:
    """The defaults are the authors' for locomotion; a task's row of TASK_SETTINGS replaces some of them."""

    env_id: str = "hopper-mini-v0"  # task: D4RL, Minari or Gymnasium id, hopper-mini-v0, bandit-<pattern>-v0
    dataset: str | None = None  # an HDF5 path or Minari id to read instead of the task's own transitions
    action_bounds: tuple[float, float] = (-1.0, 1.0)  # what -1 and 1 of the policy are in such an HDF5 file
    env_kwargs: tuple[str, ...] = ()  # for gymnasium.make, key=value: max_episode_steps=500
    seed: NonNegative[int] = 0  # seed of initial weights, batches and noise
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:<i>
    num_threads: Threads[int] = 1  # threads on a CPU; the networks are too small to gain from more
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products, as in PyTorch
    compile: bool = False  # compile the losses with torch.compile
    cuda_graph: bool = True  # on CUDA, replay the whole update as one CUDA graph; not yet tried on a GPU
    total_steps: Positive[int] = 2_000_000  # gradient steps
    batch_size: Positive[int] = 256  # transitions per gradient step, drawn with replacement
    gamma: UnitInterval[float] = 0.99  # discount factor
    tau: UnitInterval[float] = 0.005  # step of the target networks towards the online ones
    eval_every: Positive[int] = 50_000  # steps between evaluations
    eval_episodes: NonNegative[int] = 10  # episodes per evaluation, side by side; 0: no evaluation
    log_every: Positive[int] = 500  # steps between two points of the loss curves; a point is their mean
    save_every: Positive[int] = 10_000  # steps between checkpoints
    run_dir: str = "runs"  # folder that receives one folder per run
    resume: str | None = None  # continue this checkpoint or run folder; arguments given now replace its own

    # --- Diffusion-QL ---
    diffusion_steps: Positive[int] = 5  # denoising steps, T
    hidden_dims: tuple[Positive[int], ...] = (256, 256, 256)  # hidden units per layer of actor and critics
    time_dim: Even[int] = 16  # features of the timestep
    eta: NonNegative[float] = 1.0  # weight of the Q loss; 0 is behaviour cloning
    max_q_backup: bool = False  # per critic, take the best of num_q_samples next actions
    num_q_samples: Positive[int] = 10  # actions sampled per next state with max_q_backup; one without
    actor_lr: NonNegative[float] = 3e-4  # learning rate of the actor
    critic_lr: NonNegative[float] = 3e-4  # learning rate of the critics
    lr_decay: bool = False  # let both learning rates fall to 0 along a cosine
    max_grad_norm: NonNegative[float] = 5.0  # limit of the gradient norm, per optimizer; 0: no limit
    actor_target_every: Positive[int] = 5  # steps between updates of the target actor
    actor_target_start: NonNegative[int] = 1000  # finished steps before the target actor moves
    num_action_samples: Positive[int] = 50  # candidate actions when acting; one is drawn by softmax of Q
    reward_tune: RewardRule = "none"  # rule for the training rewards, see tune_rewards


# fmt: off
# From the official code's table, its epochs of 1,000 steps.
ANTMAZE = dict(total_steps=1_000_000, eval_episodes=100, reward_tune="cql_antmaze", max_q_backup=True)
ADROIT = dict(total_steps=1_000_000, eval_episodes=100, reward_tune="normalize", actor_lr=3e-5)
KITCHEN = dict(total_steps=1_000_000, eval_episodes=100)
TASK_SETTINGS = {
    "halfcheetah-medium-v2":                  dict(eta=1.0,   max_grad_norm=9),
    "hopper-medium-v2":                       dict(eta=1.0,   max_grad_norm=9),
    "walker2d-medium-v2":                     dict(eta=1.0,   max_grad_norm=1),
    "halfcheetah-medium-replay-v2":           dict(eta=1.0,   max_grad_norm=2),
    "hopper-medium-replay-v2":                dict(eta=1.0,   max_grad_norm=4),
    "walker2d-medium-replay-v2":              dict(eta=1.0,   max_grad_norm=4),
    "halfcheetah-medium-expert-v2":           dict(eta=1.0,   max_grad_norm=7),
    "hopper-medium-expert-v2":                dict(eta=1.0,   max_grad_norm=5),
    "walker2d-medium-expert-v2":              dict(eta=1.0,   max_grad_norm=5),
    "antmaze-umaze-v0":             ANTMAZE | dict(eta=0.5,   max_grad_norm=2,   max_q_backup=False),
    "antmaze-umaze-diverse-v0":     ANTMAZE | dict(eta=2.0,   max_grad_norm=3),
    "antmaze-medium-play-v0":       ANTMAZE | dict(eta=2.0,   max_grad_norm=2,   actor_lr=1e-3),
    "antmaze-medium-diverse-v0":    ANTMAZE | dict(eta=3.0,   max_grad_norm=1),
    "antmaze-large-play-v0":        ANTMAZE | dict(eta=4.5,   max_grad_norm=10),
    "antmaze-large-diverse-v0":     ANTMAZE | dict(eta=3.5,   max_grad_norm=7),
    "pen-human-v1":                  ADROIT | dict(eta=0.15,  max_grad_norm=7),
    "pen-cloned-v1":                 ADROIT | dict(eta=0.1,   max_grad_norm=8),
    "kitchen-complete-v0":          KITCHEN | dict(eta=0.005, max_grad_norm=9,   total_steps=250_000),
    "kitchen-partial-v0":           KITCHEN | dict(eta=0.005, max_grad_norm=10),
    "kitchen-mixed-v0":             KITCHEN | dict(eta=0.005, max_grad_norm=10),
    # Ours: the other tasks of a domain (D9), and our own tasks, which are learned in minutes on a CPU.
    "antmaze": ANTMAZE | dict(eta=2.0),
    "adroit":   ADROIT | dict(eta=0.1),
    "kitchen": KITCHEN | dict(eta=0.005),
    "hopper-mini-v0": dict(
        total_steps=12_000, eval_every=3_000, tau=0.03, hidden_dims=(128, 128, 128),
        actor_lr=1e-3, critic_lr=1e-3, reward_tune="iql_locomotion"),
    "bandit": dict(
        total_steps=2_500, eval_every=500, batch_size=128, tau=0.05, hidden_dims=(64, 64, 64), eta=0.3,
        diffusion_steps=10, actor_lr=3e-3, critic_lr=1e-2, reward_tune="antmaze100", num_action_samples=100),
}
# fmt: on


# === Diffusion ===
class Schedule(NamedTuple):
    """beta_t and alpha_bar_t = prod_{s <= t} (1 - beta_s) for t = 0..T; nothing is noisy at t = 0."""

    beta: list[float]
    alpha_bar: list[float]


def vp_schedule(num_steps: int) -> Schedule:
    """The variance-preserving SDE of Song et al. 2021 with beta from 0.1 to 10, in num_steps steps."""
    t = np.arange(1, num_steps + 1)
    beta = 1 - np.exp(-0.1 / num_steps - 0.5 * (10 - 0.1) * (2 * t - 1) / num_steps**2)  # (T,)
    return Schedule([0.0, *beta.tolist()], [1.0, *np.cumprod(1 - beta).tolist()])


def posterior_std(schedule: Schedule) -> list[float]:
    """Standard deviation of q(x_{t-1} | x_t, x_0) for t = 0..T (Ho et al. 2020, Eq. 7); 0 at t = 0 and 1."""
    beta, alpha_bar = schedule
    steps = range(1, len(beta))
    return [0.0, *(math.sqrt(beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])) for t in steps)]


def add_noise(x_0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """A draw of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), with one timestep per row."""
    alpha_bar_t = alpha_bar[t].unsqueeze(1)  # (batch, 1)
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps


def ddpm_sample(predict_noise: Callable, noise: Tensor, schedule: Schedule, sigma: list[float]) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, Alg. 2) of x_0 (batch, action_dim), each time clipped to [-1, 1].

    predict_noise(x_t, t) is eps. noise (T, batch, action_dim): x_T, then what steps T to 2 add times sigma_t.
    """
    beta, alpha_bar = schedule
    num_steps = len(noise)
    x = noise[0]  # (batch, action_dim)
    for t in range(num_steps, 0, -1):
        eps = predict_noise(x, t)  # (batch, action_dim)
        x_0 = ((x - math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(alpha_bar[t])).clamp(-1, 1)
        x_0_weight = math.sqrt(alpha_bar[t - 1]) * beta[t] / (1 - alpha_bar[t])
        x_t_weight = math.sqrt(1 - beta[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        x = x_0_weight * x_0 + x_t_weight * x  # mean of q(x_{t-1} | x_t, x_0)
        if t > 1:
            x = x + sigma[t] * noise[num_steps - t + 1]
    return x


class DQLNoisePredictor(nn.Module):
    """eps_theta(x_t, s, t): the noise in the noisy action x_t at timestep t."""

    def __init__(self, obs_dim: int, action_dim: int, time_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        frequencies = torch.exp(-torch.arange(time_dim // 2) * math.log(10_000) / (time_dim // 2 - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time_mlp = nn.ModuleList([nn.Linear(time_dim, 2 * time_dim), nn.Linear(2 * time_dim, time_dim)])
        sizes = pairwise((action_dim + time_dim + obs_dim, *hidden_dims, action_dim))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)

    def forward(self, obs: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """obs (batch, obs_dim), x_t (batch, action_dim), t (batch,) or (1,) for one timestep in all rows."""
        angles = (t.unsqueeze(1) - 1) * self.frequencies  # (batch or 1, time_dim / 2); as if t began at 0
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1)  # (batch or 1, time_dim)
        embedding = self.time_mlp[1](mish(self.time_mlp[0](embedding)))  # (batch or 1, time_dim)
        embedding = embedding.expand(len(obs), -1)  # (batch, time_dim)
        x = torch.cat([x_t, embedding, obs], dim=1)  # (batch, action_dim + time_dim + obs_dim)
        for layer in self.layers[:-1]:
            x = mish(layer(x))
        return self.layers[-1](x)  # (batch, action_dim)


# === Critic ===
class EnsembleLinear(nn.Module):
    """One linear layer per ensemble member, computed as one batched matrix product; not yet initialised."""

    def __init__(self, num_members: int, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_members, n_in, n_out))
        self.bias = nn.Parameter(torch.empty(num_members, 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)  # (num_members, batch, n_out)


class EnsembleCritic(nn.Module):
    """num_qs independent Q networks."""

    def __init__(self, obs_dim: int, action_dim: int, num_qs: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        sizes = pairwise((obs_dim + action_dim, *hidden_dims, 1))
        self.layers = nn.ModuleList(EnsembleLinear(num_qs, n_in, n_out) for n_in, n_out in sizes)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=1)  # (batch, obs_dim + action_dim)
        x = x.expand(len(self.layers[0].weight), -1, -1)  # (num_qs, batch, obs_dim + action_dim)
        for layer in self.layers[:-1]:
            x = mish(layer(x))
        return self.layers[-1](x).squeeze(2)  # (num_qs, batch)


def member_q(critic: EnsembleCritic, member: Tensor, obs: Tensor, action: Tensor) -> Tensor:
    """Q_i(s, a) for the index i in member (1,), and no other; only the action gets a gradient."""
    weights = {name: weight.detach()[member] for name, weight in critic.named_parameters()}
    return torch.func.functional_call(critic, weights, (obs, action)).squeeze(0)  # (batch,)


def init_uniform(critic: nn.Module) -> None:
    """Weights and biases uniform within 1 / sqrt(n_in), PyTorch's default for nn.Linear."""
    for layer in critic.layers:
        bound = layer.weight.shape[1] ** -0.5
        nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.uniform_(layer.bias, -bound, bound)


def cosine_decay(step: int, decay_steps: int) -> float:
    """Factor on a learning rate that falls from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(step / decay_steps, 1)))


def polyak_update(target: nn.Module, online: nn.Module, tau: float | Tensor) -> None:
    """target <- tau * online + (1 - tau) * target."""
    with torch.no_grad():
        for target_parameter, parameter in zip(target.parameters(), online.parameters(), strict=True):
            target_parameter.lerp_(parameter, tau)


# === Agent ===
class Batch(NamedTuple):
    """Transitions on the device, float32."""

    obs: Tensor  # (batch, obs_dim)
    action: Tensor  # (batch, action_dim)
    reward: Tensor  # (batch,)
    next_obs: Tensor  # (batch, obs_dim)
    terminal: Tensor  # (batch,)


class Draws(NamedTuple):
    """Every random number of one Diffusion-QL update."""

    next_action_noise: Tensor  # (T, batch * num_q_samples or batch, action_dim): with max_q_backup or not
    t: Tensor  # (batch,), uniform in 1..T
    eps: Tensor  # (batch, action_dim)
    action_noise: Tensor  # (T, batch, action_dim)
    member: Tensor  # (1,), 0 or 1: the critic whose Q the actor raises


class DiffusionQL(nn.Module):
    """Diffusion-QL for observations of obs_dim numbers and actions in [-1, 1]^action_dim."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.num_next_actions = args.num_q_samples if args.max_q_backup else 1
        self.schedule = vp_schedule(args.diffusion_steps)
        self.sigma = posterior_std(self.schedule)
        self.actor = DQLNoisePredictor(obs_dim, action_dim, args.time_dim, args.hidden_dims)
        self.critic = EnsembleCritic(obs_dim, action_dim, 2, args.hidden_dims)
        init_uniform(self.critic)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("actor_tau", torch.tensor(0.0))
        self.register_buffer("alpha_bar", torch.tensor(self.schedule.alpha_bar), persistent=False)  # (T + 1,)
        self.to(device)
        self.device = device
        adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
        self.optimizers = {
            "actor": adam(self.actor.parameters(), lr=torch.tensor(args.actor_lr, device=device)),
            "critic": adam(self.critic.parameters(), lr=torch.tensor(args.critic_lr, device=device)),
        }

    def set_step(self, step: int) -> None:
        """Put what changes from step to step into tensors: update() may be replayed as a CUDA graph."""
        decay = cosine_decay(step, self.args.total_steps) if self.args.lr_decay else 1.0  # one cosine: D3
        self.optimizers["actor"].param_groups[0]["lr"].fill_(self.args.actor_lr * decay)
        self.optimizers["critic"].param_groups[0]["lr"].fill_(self.args.critic_lr * decay)
        moves = step >= self.args.actor_target_start and step % self.args.actor_target_every == 0  # D2: 1,000
        self.actor_tau.fill_(self.args.tau if moves else 0.0)  # 0 leaves the target actor as it is

    def draw(self, batch_size: int) -> Draws:
        """Fresh random numbers for one update."""
        num_steps, device = self.args.diffusion_steps, self.device
        next_rows = batch_size * self.num_next_actions
        return Draws(
            next_action_noise=torch.randn(num_steps, next_rows, self.action_dim, device=device),
            t=torch.randint(1, num_steps + 1, (batch_size,), device=device),
            eps=torch.randn(batch_size, self.action_dim, device=device),
            action_noise=torch.randn(num_steps, batch_size, self.action_dim, device=device),
            member=torch.randint(2, (1,), device=device),  # on the device: D7
        )

    def sample(self, actor: DQLNoisePredictor, obs: Tensor, noise: Tensor) -> Tensor:
        """One action per row of obs from the actor's reverse chain; noise (T, batch, action_dim)."""

        def predict_noise(x: Tensor, t: int) -> Tensor:
            return actor(obs, x, torch.full((1,), t, device=self.device))

        return ddpm_sample(predict_noise, noise, self.schedule, self.sigma)

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """sum_i mean (Q_i(s, a) - y)^2 with y = r + gamma (1 - d) min_i max_n Q'_i(s', a'_n).

        a'_1, a'_2, ... are actions of the target actor: num_q_samples with max_q_backup, one without.
        """
        with torch.no_grad():  # no unused graphs: D6
            n = self.num_next_actions
            next_obs = batch.next_obs.repeat_interleave(n, dim=0)  # (batch * n, obs_dim)
            noise = draws.next_action_noise  # (T, batch * n, action_dim)
            next_action = self.sample(self.actor_target, next_obs, noise)  # (batch * n, action_dim)
            next_q = self.critic_target(next_obs, next_action).unflatten(1, (-1, n))  # (2, batch, n)
            next_value = next_q.amax(2).amin(0)  # (batch,)
            target = batch.reward + self.args.gamma * (1 - batch.terminal) * next_value  # (batch,)
        q = self.critic(batch.obs, batch.action)  # (2, batch)
        loss = (q - target).square().mean(1).sum()
        return loss, {"critic_loss": loss, "q_mean": q.mean()}

    def actor_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """mean (eps_theta(x_t, s, t) - eps)^2 - eta mean Q_i(s, a_theta) / mean |Q_j(s, a_theta)|.

        x_t is a noisy action of the data. a_theta is sampled from the actor; the gradient of Q_i runs through
        all T steps of its chain. i is one of the two critics, drawn anew in every update, and j the other.
        """
        x_t = add_noise(batch.action, draws.t, draws.eps, self.alpha_bar)  # (batch, action_dim)
        bc_loss = F.mse_loss(self.actor(batch.obs, x_t, draws.t), draws.eps)
        action = self.sample(self.actor, batch.obs, draws.action_noise)  # (batch, action_dim)
        q = member_q(self.critic, draws.member, batch.obs, action)  # (batch,)
        with torch.no_grad():
            q_norm = member_q(self.critic, 1 - draws.member, batch.obs, action).abs().mean()  # D1
        q_loss = -q.mean() / q_norm
        loss = bc_loss + self.args.eta * q_loss
        return loss, {"actor_loss": loss, "bc_loss": bc_loss, "q_loss": q_loss, "q_norm": q_norm}

    def update(self, data: Batch) -> dict[str, Tensor]:
        """One gradient step on random rows of the data: tensor operations only, no host sync; 0-d metrics."""
        rows = torch.randint(len(data.reward), (self.args.batch_size,), device=self.device)  # (batch,)
        batch, draws = Batch(*(column[rows] for column in data)), self.draw(self.args.batch_size)
        max_norm = self.args.max_grad_norm or math.inf

        # The critics
        loss, metrics = self.critic_loss(batch, draws)
        self.optimizers["critic"].zero_grad()
        loss.backward()
        metrics["critic_grad_norm"] = nn.utils.clip_grad_norm_(self.critic.parameters(), max_norm)
        self.optimizers["critic"].step()

        # The actor
        loss, actor_metrics = self.actor_loss(batch, draws)
        self.optimizers["actor"].zero_grad()
        loss.backward()
        metrics["actor_grad_norm"] = nn.utils.clip_grad_norm_(self.actor.parameters(), max_norm)
        self.optimizers["actor"].step()

        # The targets
        polyak_update(self.actor_target, self.actor, self.actor_tau)
        polyak_update(self.critic_target, self.critic, self.args.tau)
        return {name: value.detach() for name, value in (metrics | actor_metrics).items()}

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """For each of obs (batch, obs_dim) one of n actions, drawn by softmax of min_i Q'_i(s, a)."""
        n = self.args.num_action_samples
        obs = obs.repeat_interleave(n, dim=0)  # (batch * n, obs_dim)
        if noise is None:
            noise = torch.randn(self.args.diffusion_steps, len(obs), self.action_dim, device=self.device)
        actions = self.sample(self.actor, obs, noise)  # (batch * n, action_dim)
        q = self.critic_target(obs, actions).amin(0).unflatten(0, (-1, n))  # (batch, n)
        chosen = torch.multinomial(q.softmax(1), 1)  # (batch, 1); of raw Q: D4
        return actions.unflatten(0, (-1, n)).take_along_dim(chosen.unsqueeze(2), dim=1).squeeze(1)


# === Evaluation ===
def evaluate(agent: nn.Module, envs: list[gym.Env]) -> dict:
    """One episode in each env, side by side, seeded EVAL_SEED, EVAL_SEED + 1, ... at every call.

    One batched act() serves all episodes still running. The random state of the training is left as it was.
    """
    returns, lengths, running = np.zeros(len(envs)), np.zeros(len(envs)), np.ones(len(envs), dtype=bool)
    with torch.random.fork_rng(devices=[agent.device] if agent.device.type == "cuda" else []):
        torch.manual_seed(EVAL_SEED)
        obs = np.stack([env.reset(seed=EVAL_SEED + i)[0] for i, env in enumerate(envs)]).astype(np.float32)
        while running.any():
            stop_if_asked()  # Ctrl-C, SIGTERM: KeyboardInterrupt
            actions = agent.act(torch.from_numpy(obs[running]).to(agent.device)).cpu().numpy()
            for i, action in zip(np.flatnonzero(running), actions, strict=True):
                obs[i], reward, terminated, truncated, _ = envs[i].step(action)
                returns[i] += reward
                lengths[i] += 1
                running[i] = not (terminated or truncated)
    return {"returns": returns.tolist(), "lengths": lengths.tolist(), "first_seed": EVAL_SEED}


# === Training ===
def train(args: Args) -> dict:
    """One run: train, evaluate, log and save; returns what results.json holds."""
    torch.manual_seed(args.seed)
    device = use_device(args.device, args.num_threads, args.matmul_precision)
    task = find_task(args.env_id)
    dataset = load_dataset(task, args.dataset, args.seed, args.action_bounds)
    envs = make_envs(task, args.eval_episodes, args, dataset)
    rewards = tune_rewards(dataset, args.reward_tune)  # D8: Adroit is standardised
    columns = (dataset.observations, dataset.actions, rewards, dataset.next_observations, dataset.terminals)
    data = Batch(*(torch.as_tensor(column, device=device) for column in columns))

    agent = DiffusionQL(data.obs.shape[1], data.action.shape[1], args, device)
    if args.compile:
        agent.critic_loss, agent.actor_loss = map(torch.compile, (agent.critic_loss, agent.actor_loss))
    run = Run(__file__, args, TASK_SETTINGS, agent, dataset)  # its folder; with --resume, all as it was saved
    update = cuda_graphed(partial(agent.update, data), device, args.cuda_graph)
    with run:  # Ctrl-C and SIGTERM save and stop it between two steps
        if run.evaluation_due():  # the run was stopped in it
            run.log_evaluation(evaluate(agent, envs))
        while run.step < args.total_steps:
            stop_if_asked()
            agent.set_step(run.step)
            with run.updating():  # if it fails in here, half a step is done, and not saved
                run.add_losses(update())
                run.step += 1
            if run.reached(args.log_every):
                run.log_losses()  # losses/*: their means since the last time
            if run.evaluation_due():
                run.log_evaluation(evaluate(agent, envs))  # eval/*, best and last ten: D5
            if run.reached(args.save_every):
                run.save()  # agent, optimizers, random state, results
    return run.results


if __name__ == "__main__":
    run_command(train, Args, TASK_SETTINGS)
