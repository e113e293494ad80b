"""Diffusion-QL: offline reinforcement learning with a diffusion policy pushed uphill on Q.

Paper: Wang, Hunt, Zhou: Diffusion Policies as an Expressive Policy Class for Offline Reinforcement Learning,
2022, arXiv 2208.06193.
docs/diffusion_ql.md explains it, numbers the equations (Eq. 1 to 5) and the differences (D1, ...) named in
this file, and has the logged metrics and results.

    python diffusion_ql.py                                 # the bundled hopper-mini-v0, minutes on a CPU
    python diffusion_ql.py --env-id hopper-medium-v2       # a D4RL task with the paper's settings
    python diffusion_ql.py --resume runs/<run>             # go on where a run stopped

The policy is a diffusion model of the actions in the data, trained by noise regression. A second loss samples
an action from it and raises the action's Q, with the gradient running through the whole denoising chain.

In shapes: T is diffusion_steps. Timesteps are 1..T; t = 0 is the clean action.
"""

import math
import time
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
import tyro
from torch import Tensor, nn

from common.datasets import load_dataset, tune_rewards
from common.runs import Run, accelerated, run_command, uninterrupted

EVAL_SEED = 10_000  # evaluation episodes are seeded EVAL_SEED, EVAL_SEED + 1, ...


# === Args ===
@dataclass
class Args:
    """What is left at None takes its value from TASK_SETTINGS, for other tasks from DEFAULT_SETTINGS."""

    env_id: str = "hopper-mini-v0"  # task: a D4RL name, a Minari id, hopper-mini-v0 or bandit-<pattern>-v0
    dataset: str | None = None  # an HDF5 path or Minari id to read instead of the task's own transitions
    seed: int = 0  # seed of initial weights, batches and noise
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:<i>
    compile: bool = False  # compile the networks with torch.compile
    cuda_graph: bool = True  # on CUDA, replay the whole update as one CUDA graph
    total_steps: int | None = None  # gradient steps
    batch_size: int = 256  # transitions per gradient step, drawn with replacement
    gamma: float = 0.99  # discount factor, in [0, 1]
    tau: float | None = None  # step of the target networks towards the online ones, in [0, 1]
    eval_every: int | None = None  # steps between evaluations
    eval_episodes: int | None = None  # episodes per evaluation, run side by side; 0 trains without evaluation
    log_every: int = 500  # steps between two points of the loss curves, each the mean over these steps
    save_every: int = 10_000  # steps between checkpoints
    run_dir: str = "runs"  # folder that receives one folder per run
    resume: str | None = None  # go on from this checkpoint or run folder; arguments given here beat its own

    # --- Diffusion-QL ---
    diffusion_steps: int | None = None  # denoising steps, T
    noise_schedule: Literal["vp", "linear", "scaled_linear", "cosine"] = "vp"  # how beta_t grows with t
    hidden_dims: tuple[int, ...] | None = None  # hidden units per layer of the actor and of each critic
    time_dim: int = 16  # features of the timestep
    eta: float | None = None  # weight of the Q loss, Eq. 3; 0 is behaviour cloning
    max_q_backup: bool | None = None  # per critic, take the best of num_q_samples next actions
    num_q_samples: int = 10  # actions sampled per next state with max_q_backup; one without
    actor_lr: float | None = None  # learning rate of the actor
    critic_lr: float | None = None  # learning rate of the critics
    lr_decay: bool = False  # let both learning rates fall to 0 along a cosine (D3)
    lr_decay_steps: int | None = None  # steps after which they reach 0; None: total_steps
    max_grad_norm: float | None = None  # limit of the global gradient norm, per optimizer; 0: no limit
    actor_target_every: int = 5  # steps between updates of the target actor
    actor_target_start: int = 1000  # finished steps before the target actor moves
    num_action_samples: int = 50  # candidate actions per state when acting, one drawn by softmax of Q, Eq. 5
    reward_tune: str | None = None  # rule for the training rewards, see tune_rewards


# fmt: off
DEFAULT_SETTINGS = dict(
    total_steps=2_000_000, eval_every=50_000, eval_episodes=10, tau=0.005, diffusion_steps=5,
    hidden_dims=(256, 256, 256), eta=1.0, max_q_backup=False, actor_lr=3e-4, critic_lr=3e-4,
    max_grad_norm=5.0, reward_tune="none", lr_decay=False,
)
# Ours, to learn in minutes on a CPU.
MINI = dict(total_steps=12_000, eval_every=3_000, tau=0.03, hidden_dims=(128, 128, 128),
            actor_lr=1e-3, critic_lr=1e-3, eta=1.0, reward_tune="iql_locomotion")
BANDIT = dict(total_steps=1_000, eval_every=500, lr_decay=True, tau=0.03, hidden_dims=(128, 128, 128),
              actor_lr=3e-3, critic_lr=3e-3, eta=0.3, reward_tune="normalize")
# From the official code's table, its epochs of 1,000 steps.
ANTMAZE = dict(total_steps=1_000_000, reward_tune="cql_antmaze", max_q_backup=True, eval_episodes=100)
ADROIT = dict(total_steps=1_000_000, reward_tune="normalize", actor_lr=3e-5, eval_episodes=100)
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
    # Ours: the other tasks of a domain, and our own tasks.
    "antmaze":                      ANTMAZE | dict(eta=2.0),
    "adroit":                        ADROIT | dict(eta=0.1),
    "kitchen":                      KITCHEN | dict(eta=0.005),
    "hopper-mini-v0": MINI,
    "bandit-8gaussians-v0": BANDIT,
    "bandit-moons-v0": BANDIT,
    "bandit-corners-v0": BANDIT,
    "bandit-spiral-v0": BANDIT,
}
# fmt: on


# === Diffusion ===
def noise_schedule(name: str, num_steps: int) -> tuple[list[float], list[float]]:
    """beta_t and alpha_bar_t = prod_{s <= t} (1 - beta_s) for t = 0..T; nothing is noisy at t = 0."""
    t = np.arange(num_steps + 1, dtype=np.float64)
    if name == "vp":  # the variance-preserving SDE of Song et al. 2021 with beta from 0.1 to 10
        beta = 1 - np.exp(-0.1 / num_steps - 0.5 * (10 - 0.1) * (2 * t - 1) / num_steps**2)
    elif name in (
        "linear",
        "scaled_linear",
    ):  # Ho et al. 2020; scaled so that num_steps = 1000 stays as it is
        scale = 1000 / num_steps if name == "scaled_linear" else 1
        beta = np.minimum(scale * np.concatenate([[0], np.linspace(1e-4, 2e-2, num_steps)]), 0.999)
    else:  # cosine: Nichol & Dhariwal 2021
        f = np.cos((t / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - f / np.roll(f, 1), 0.999)
    beta[0] = 0
    return beta.tolist(), np.cumprod(1 - beta).tolist()


def posterior_std(beta: list[float], alpha_bar: list[float]) -> list[float]:
    """Standard deviation of q(x_{t-1} | x_t, x_0) for t = 0..T (Ho et al. 2020, Eq. 7); 0 at t = 0 and 1."""
    steps = range(1, len(beta))
    return [0.0, *(math.sqrt(beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])) for t in steps)]


def add_noise(x_0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """A draw of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), with one timestep per row."""
    alpha_bar_t = alpha_bar[t].unsqueeze(1)  # (batch, 1)
    return alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps


def ddpm_sample(
    predict_noise: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    beta: list[float],
    alpha_bar: list[float],
    sigma: list[float],
    clip: bool,
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, Alg. 2): x_T is noise[0], noise[1:] is added at steps T, ..., 2.

    noise is (T, batch, action_dim), sigma[t] the scale of what is added at step t, x_0 (batch, action_dim).
    """
    x = noise[0]  # (batch, action_dim)
    num_steps = len(noise)
    for t in range(num_steps, 0, -1):
        eps = predict_noise(x, t)  # (batch, action_dim)
        x_0 = (x - math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(alpha_bar[t])
        if clip:
            x_0 = x_0.clamp(-1, 1)
        x_0_weight = math.sqrt(alpha_bar[t - 1]) * beta[t] / (1 - alpha_bar[t])
        x_t_weight = math.sqrt(1 - beta[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        x = x_0_weight * x_0 + x_t_weight * x  # mean of q(x_{t-1} | x_t, x_0)
        if t > 1:
            x = x + sigma[t] * noise[num_steps - t + 1]
    return x


class Mish(torch.autograd.Function):
    """x tanh(softplus(x)) = 2 x / (1 + r^2) - x with r = sigmoid(-x); takes a third of F.mish's CPU time."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        minus_x = -x
        return minus_x.addcdiv_(x, minus_x.sigmoid().square_().add_(1), value=2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # (2 - d + 4 x r^2 (1 - r) / d) / d with d = 1 + r^2
        (x,) = ctx.saved_tensors
        r = (-x).sigmoid_()
        d = r.square().add_(1)
        return (2 - d).addcdiv_(x * (d - 1) * (1 - r), d, value=4).div_(d).mul_(grad)


def mish(x: Tensor) -> Tensor:
    return Mish.apply(x) if x.device.type == "cpu" else F.mish(x)


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
        angles = (t - 1).unsqueeze(
            1
        ) * self.frequencies  # (batch or 1, time_dim / 2); the authors count from 0
        time = torch.cat([angles.sin(), angles.cos()], dim=1)  # (batch or 1, time_dim)
        time = self.time_mlp[1](mish(self.time_mlp[0](time)))  # (batch or 1, time_dim)
        time = time.expand(len(obs), -1)  # (batch, time_dim)
        x = torch.cat([x_t, time, obs], dim=1)  # (batch, action_dim + time_dim + obs_dim)
        for layer in self.layers[:-1]:
            x = mish(layer(x))  # (batch, hidden)
        return self.layers[-1](x)  # (batch, action_dim)


# === Critic ===
class EnsembleLinear(nn.Module):
    """One linear layer per ensemble member, computed as one batched matrix product; the agent fills it."""

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
        self.num_qs = num_qs
        sizes = pairwise((obs_dim + action_dim, *hidden_dims, 1))
        self.layers = nn.ModuleList(EnsembleLinear(num_qs, n_in, n_out) for n_in, n_out in sizes)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=1)  # (batch, obs_dim + action_dim)
        x = x.expand(self.num_qs, -1, -1)  # (num_qs, batch, obs_dim + action_dim)
        for layer in self.layers[:-1]:
            x = mish(layer(x))  # (num_qs, batch, hidden)
        return self.layers[-1](x).squeeze(2)  # (num_qs, batch)


def member_q(critic: EnsembleCritic, member: Tensor, obs: Tensor, action: Tensor) -> Tensor:
    """Q of the member whose index is in member (1,), no other computed; only the action gets a gradient."""
    x = torch.cat([obs, action], dim=1).unsqueeze(0)  # (1, batch, obs_dim + action_dim)
    for layer in critic.layers[:-1]:
        bias, weight = layer.bias.detach()[member], layer.weight.detach()[member]
        x = mish(torch.baddbmm(bias, x, weight))  # (1, batch, hidden)
    bias, weight = critic.layers[-1].bias.detach()[member], critic.layers[-1].weight.detach()[member]
    return torch.baddbmm(bias, x, weight).flatten()  # (batch,)


def init_uniform(network: nn.Module) -> None:
    """Weights and biases uniform within 1 / sqrt(n_in), PyTorch's default for nn.Linear."""
    for layer in network.modules():
        if isinstance(layer, EnsembleLinear):
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -(layer.weight.shape[1] ** -0.5), layer.weight.shape[1] ** -0.5)


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

    next_action_noise: Tensor  # (T, next_rows, action_dim), see draw()
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
        self.beta, self.alpha_bar = noise_schedule(args.noise_schedule, args.diffusion_steps)
        self.sigma = posterior_std(self.beta, self.alpha_bar)
        self.actor = DQLNoisePredictor(obs_dim, action_dim, args.time_dim, args.hidden_dims)
        self.critic = EnsembleCritic(obs_dim, action_dim, 2, args.hidden_dims)
        init_uniform(self.critic)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("actor_tau", torch.tensor(0.0))
        self.register_buffer("alpha_bars", torch.tensor(self.alpha_bar), persistent=False)  # (T + 1,)
        self.to(device)
        self.device = device
        adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
        self.optimizers = {
            "actor": adam(self.actor.parameters(), lr=torch.tensor(args.actor_lr, device=device)),
            "critic": adam(self.critic.parameters(), lr=torch.tensor(args.critic_lr, device=device)),
        }

    def set_step(self, step: int) -> None:
        """Write into tensors what depends on the number of finished updates, so that update() need not."""
        decay_steps = self.args.lr_decay_steps or self.args.total_steps
        decay = cosine_decay(step, decay_steps) if self.args.lr_decay else 1.0
        self.optimizers["actor"].param_groups[0]["lr"].fill_(self.args.actor_lr * decay)
        self.optimizers["critic"].param_groups[0]["lr"].fill_(self.args.critic_lr * decay)
        moves = step >= self.args.actor_target_start and step % self.args.actor_target_every == 0  # D2
        self.actor_tau.fill_(self.args.tau if moves else 0.0)

    def draw(self, batch_size: int) -> Draws:
        """Fresh random numbers for one update."""
        num_steps, device = self.args.diffusion_steps, self.device
        next_rows = batch_size * self.num_next_actions
        return Draws(
            next_action_noise=torch.randn(num_steps, next_rows, self.action_dim, device=device),
            t=torch.randint(1, num_steps + 1, (batch_size,), device=device),
            eps=torch.randn(batch_size, self.action_dim, device=device),
            action_noise=torch.randn(num_steps, batch_size, self.action_dim, device=device),
            member=torch.randint(2, (1,), device=device),
        )

    def sample(self, actor: DQLNoisePredictor, obs: Tensor, noise: Tensor) -> Tensor:
        """One action per row of obs from the actor's reverse chain; noise (T, batch, action_dim)."""

        def predict_noise(x: Tensor, t: int) -> Tensor:
            return actor(obs, x, torch.full((1,), t, device=self.device))

        return ddpm_sample(predict_noise, noise, self.beta, self.alpha_bar, self.sigma, clip=True)

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared temporal-difference error of both critics; Eq. 4."""
        with torch.no_grad():
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
        """Noise regression, and the Q of a sampled action through the whole chain; Eq. 1 to 3."""
        x_t = add_noise(batch.action, draws.t, draws.eps, self.alpha_bars)  # (batch, action_dim)
        bc_loss = F.mse_loss(self.actor(batch.obs, x_t, draws.t), draws.eps)
        action = self.sample(self.actor, batch.obs, draws.action_noise)  # (batch, action_dim)
        q = member_q(self.critic, draws.member, batch.obs, action)  # (batch,)
        with torch.no_grad():
            q_norm = member_q(self.critic, 1 - draws.member, batch.obs, action).abs().mean()  # D1
        q_loss = -q.mean() / q_norm
        loss = bc_loss + self.args.eta * q_loss
        return loss, {"actor_loss": loss, "bc_loss": bc_loss, "q_loss": q_loss, "q_norm": q_norm}

    def descend(self, name: str, loss: Tensor) -> Tensor:
        """One optimizer step of the actor or the critic; returns the gradient norm before clipping."""
        self.optimizers[name].zero_grad()
        loss.backward()
        limit = self.args.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(getattr(self, name).parameters(), limit)
        self.optimizers[name].step()
        return grad_norm

    def update_critic(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """One gradient step of both critics."""
        loss, metrics = self.critic_loss(batch, draws)
        return metrics | {"critic_grad_norm": self.descend("critic", loss)}

    def update_actor(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """One gradient step of the actor; the targets follow, the actor's where its rate is not 0."""
        loss, metrics = self.actor_loss(batch, draws)
        metrics |= {"actor_grad_norm": self.descend("actor", loss)}
        polyak_update(self.actor_target, self.actor, self.actor_tau)
        polyak_update(self.critic_target, self.critic, self.args.tau)
        return metrics

    def update(self, data: Batch) -> dict[str, Tensor]:
        """One gradient step on random rows of the data: tensor operations only, no host sync; 0-d metrics."""
        rows = torch.randint(len(data.reward), (self.args.batch_size,), device=self.device)  # (batch,)
        batch, draws = Batch(*(column[rows] for column in data)), self.draw(self.args.batch_size)
        metrics = self.update_critic(batch, draws) | self.update_actor(batch, draws)
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """For each of obs (batch, obs_dim) one of num_action_samples actions, by softmax of Q; Eq. 5."""
        n = self.args.num_action_samples
        obs = obs.repeat_interleave(n, dim=0)  # (batch * n, obs_dim)
        if noise is None:
            noise = torch.randn(self.args.diffusion_steps, len(obs), self.action_dim, device=self.device)
        actions = self.sample(self.actor, obs, noise)  # (batch * n, action_dim)
        q = self.critic_target(obs, actions).amin(0).unflatten(0, (-1, n))  # (batch, n)
        chosen = torch.multinomial(q.softmax(1), 1)  # (batch, 1)
        return actions.unflatten(0, (-1, n)).take_along_dim(chosen.unsqueeze(2), dim=1).squeeze(1)


# === Evaluation ===
def evaluate(agent: nn.Module, envs: list[gym.Env]) -> dict:
    """One episode in each env, side by side, seeded EVAL_SEED, EVAL_SEED + 1, ... at every call.

    One batched act() serves all episodes still running. The random state of the training is left as it was.
    """
    returns, lengths = np.zeros(len(envs)), np.zeros(len(envs))
    started = time.time()
    with torch.random.fork_rng(devices=[agent.device] if agent.device.type == "cuda" else []):
        torch.manual_seed(EVAL_SEED)
        obs = np.stack([env.reset(seed=EVAL_SEED + i)[0] for i, env in enumerate(envs)]).astype(np.float32)
        running = np.arange(len(envs))
        while len(running):
            actions = agent.act(torch.from_numpy(obs[running]).to(agent.device)).cpu().numpy()
            over = np.zeros(len(running), dtype=bool)
            for row, i in enumerate(running):
                obs[i], reward, terminated, truncated, _ = envs[i].step(actions[row])
                returns[i] += reward
                lengths[i] += 1
                over[row] = terminated or truncated
            running = running[~over]
    return {
        "return_mean": returns.mean().item(),
        "return_std": returns.std().item(),
        "length_mean": lengths.mean().item(),
        "seconds": time.time() - started,
        "returns": returns.tolist(),
        "first_seed": EVAL_SEED,
    }


# === Training ===
def train(args: Args) -> dict:
    """One run: train, evaluate, log and save; returns what results.json holds."""
    run = Run("diffusion_ql", args, DEFAULT_SETTINGS, TASK_SETTINGS)
    args = run.args

    dataset = load_dataset(args.env_id, args.dataset, args.seed)
    envs = [dataset.make_env() for _ in range(args.eval_episodes)]
    rewards = tune_rewards(dataset, args.reward_tune)
    columns = (dataset.observations, dataset.actions, rewards, dataset.next_observations, dataset.terminals)
    data = Batch(*(torch.as_tensor(column, device=run.device) for column in columns))

    agent = DiffusionQL(data.obs.shape[1], data.action.shape[1], args, run.device)
    run.begin(agent, dataset)
    update = accelerated(partial(agent.update, data), agent, args)
    with run:
        while True:
            if run.evaluation_due():
                run.add_evaluation(evaluate(agent, envs))
            if run.step >= args.total_steps:
                break
            agent.set_step(run.step)
            with uninterrupted():
                run.record(update())
            if run.reached(args.log_every):
                run.log()
            if run.reached(args.save_every):
                run.save()
    return run.results


if __name__ == "__main__":
    run_command(train, tyro.cli(Args))
