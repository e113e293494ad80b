"""Q-weighted Variational Policy Optimization (QVPO): online reinforcement learning with a diffusion policy.

Paper: Ding, Hu, Zhang, Ren, Zhang, Yu, Wang, Shi: Diffusion-based Reinforcement Learning via Q-weighted
Variational Policy Optimization, 2024, arXiv 2405.16173.
docs/qvpo_online.md explains it, numbers the equations (Eq. 1 to 6) and the differences (D1, ...) named in
this file, and has the logged metrics and results.

    python qvpo_online.py                                 # Hopper-v4, the paper's settings: a GPU's work
    python qvpo_online.py --env-id InvertedPendulum-v5    # our own settings, minutes on a CPU
    python qvpo_online.py --resume runs/<run>             # go on where a run stopped

The policy learns from its own samples: of many candidate actions per state the best by Q becomes the training
data of the diffusion model, weighted by its advantage over the average candidate. Uniform actions with a
small share of that weight keep the policy wide, and acting takes the best of a few samples.

In shapes: num_qs critics, T is diffusion_steps, n counts candidates per state: row j * batch + b holds
candidate j of state b. Timesteps are 1..T; t = 0 is the clean action.
"""

import math
import time
import zlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from common.datasets import UserError, make_online_env
from common.runs import Run, accelerated, cannot_write, run_command, uninterrupted

EVAL_SEED = 10_000  # evaluation episodes are seeded EVAL_SEED, EVAL_SEED + 1, ...
CPU_ROWS = 1024  # rows in one reverse chain on a CPU: few enough for their activations to stay in cache


# === Args ===
@dataclass
class Args:
    """What is left at None takes its value from TASK_SETTINGS, for other tasks from DEFAULT_SETTINGS."""

    env_id: str = "Hopper-v4"  # task: a Gymnasium id with Box spaces, or bandit-<pattern>-v0
    dataset: str | None = None  # an HDF5 path or Minari id to read instead of the task's own transitions
    seed: int = 0  # seed of initial weights, batches and noise
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:<i>
    compile: bool = False  # compile the networks with torch.compile
    cuda_graph: bool = True  # on CUDA, replay the whole update as one CUDA graph
    total_steps: int | None = None  # environment steps; from learning_starts on one gradient step for each
    batch_size: int = 256  # transitions per gradient step, drawn with replacement
    gamma: float = 0.99  # discount factor, in [0, 1]
    tau: float | None = None  # step of the target networks towards the online ones, in [0, 1]
    eval_every: int | None = None  # steps between evaluations
    eval_episodes: int | None = None  # episodes per evaluation, run side by side; 0 trains without evaluation
    log_every: int = 500  # steps between two points of the loss curves, each the mean over these steps
    save_every: int = 10_000  # steps between checkpoints
    run_dir: str = "runs"  # folder that receives one folder per run
    resume: str | None = None  # go on from this checkpoint or run folder; arguments given here beat its own

    # --- QVPO ---
    learning_starts: int | None = None  # environment steps with random actions before the first update
    replay_size: int = 1_000_000  # transitions kept; the oldest are replaced
    time_limit_is_terminal: bool = False  # do not bootstrap where the time limit cut an episode off (D1)
    diffusion_steps: int | None = None  # denoising steps, T
    noise_schedule: Literal["vp", "linear", "scaled_linear", "cosine"] = "cosine"  # how beta_t grows with t
    sampler_temperature: float = 1.0  # factor on the noise added by the reverse chain
    deterministic_eval: bool = False  # evaluate without that noise; x_T stays random
    hidden_dims: tuple[int, ...] | None = None  # hidden units per layer of the actor and of each critic
    time_dim: int = 32  # features of the timestep
    num_qs: int = 2  # critics; the smallest of their values counts
    num_behavior_samples: int | None = None  # candidates per action taken while learning, K_b
    num_target_samples: int | None = None  # candidates per next state for the target value, K_t
    num_train_samples: int | None = None  # candidates per state for the actor loss, N_d
    num_chosen: int = 1  # how many of these, the best, the actor learns from
    num_entropy_samples: int = 10  # uniform actions beside each of the chosen ones, N_e
    num_action_samples: int = 32  # candidates per action in an evaluation
    weight: Literal["qadv", "qcut", "qrelu", "qexpn", "qcut0n", "qcut1n"] = "qadv"  # from Q to weight; Eq. 4
    weight_beta: float = 1.0  # factor on the normalised Q of qexpn, on the centred Q of qcut0n and qcut1n
    weight_cut: float = 1.0  # lower bound of Q for qcut
    weight_shift: float = 0.0  # added to Q by qrelu
    q_mean_rate: float = 1e-3  # step of the running mean of Q towards that of the candidates
    q_std_rate: float = 1e-3  # the same for the standard deviation
    entropy_weight: float | None = None  # weight of a uniform action relative to a chosen one, at the start
    entropy_weight_min: float | None = None  # ... which falls to 0 over total_steps, but not below this
    actor_lr: float | None = None  # learning rate of the actor
    critic_lr: float | None = None  # learning rate of the critics
    adam_eps: float = 1e-5  # epsilon of Adam
    max_grad_norm: float = 2.0  # limit of the global gradient norm, per optimizer
    actor_target_every: int = 1  # steps between updates of the target actor


# fmt: off
DEFAULT_SETTINGS = dict(  # of the official code
    total_steps=1_000_000, tau=0.005, eval_every=10_000, eval_episodes=10, learning_starts=10_000,
    diffusion_steps=20, hidden_dims=(256, 256, 256),
    num_behavior_samples=4, num_target_samples=4, num_train_samples=64,
    entropy_weight=0.02, entropy_weight_min=0.002, actor_lr=1e-4, critic_lr=3e-4,
)
# Ours, to learn in minutes on a CPU.
PENDULUM = dict(total_steps=10_000, eval_every=1_000, learning_starts=1_000, diffusion_steps=10, tau=0.01,
                hidden_dims=(64, 64, 64), num_train_samples=16, actor_lr=1e-3, critic_lr=1e-3)
BANDIT = dict(total_steps=1_000, eval_every=250, learning_starts=200, diffusion_steps=5, tau=0.05,
              hidden_dims=(64, 64, 64), num_train_samples=8, actor_lr=1e-3, critic_lr=3e-3)
# From Table 3 of the paper, where the weight of the entropy term is a constant; the last rows are ours.
TASK_SETTINGS = {
    "Ant-v4":         dict(num_target_samples=2, entropy_weight=0.01, entropy_weight_min=0.01),
    "HalfCheetah-v4": dict(num_target_samples=4, entropy_weight=0.01, entropy_weight_min=0.01),
    "Hopper-v4":      dict(num_target_samples=1, entropy_weight=0.01, entropy_weight_min=0.01),
    "Humanoid-v4":    dict(num_target_samples=2, entropy_weight=0.01, entropy_weight_min=0.01),
    "Walker2d-v4":    dict(num_target_samples=2, entropy_weight=0.01, entropy_weight_min=0.01),
    "InvertedPendulum-v5": PENDULUM,
    "Pendulum-v1": PENDULUM,
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


class QVPONoisePredictor(nn.Module):
    """eps_theta(s, x_t, t): the noise in the noisy action x_t at timestep t.

    The first layer sees x_t, timestep and state side by side. Its result is the sum of three shares, so that
    candidates of one state share the state's, and all candidates the timestep's.
    """

    def __init__(self, obs_dim: int, action_dim: int, time_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        frequencies = torch.exp(-torch.arange(time_dim // 2) * math.log(10_000) / (time_dim // 2 - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time_mlp = nn.ModuleList(
            [nn.Linear(time_dim, hidden_dims[0]), nn.Linear(hidden_dims[0], time_dim)]
        )
        self.input_dims = (action_dim, time_dim, obs_dim)
        sizes = pairwise((sum(self.input_dims), *hidden_dims, action_dim))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)

    def embed_obs(self, obs: Tensor) -> Tensor:
        """The state's share of the first layer: from (batch, obs_dim) to (batch, hidden)."""
        weight = self.layers[0].weight.split(self.input_dims, dim=1)[2]  # (hidden, obs_dim)
        return F.linear(obs, weight, self.layers[0].bias)  # (batch, hidden)

    def embed_time(self, num_steps: int) -> Tensor:
        """The timestep's share of the first layer for t = 0..T, where t = 0 is not used."""
        t = torch.arange(-1, num_steps, device=self.frequencies.device)  # (T + 1,); the authors count from 0
        angles = t.unsqueeze(1) * self.frequencies  # (T + 1, time_dim / 2)
        time = torch.cat([angles.sin(), angles.cos()], dim=1)  # (T + 1, time_dim)
        time = self.time_mlp[1](mish(self.time_mlp[0](time)))  # (T + 1, time_dim)
        weight = self.layers[0].weight.split(self.input_dims, dim=1)[1]  # (hidden, time_dim)
        return F.linear(time, weight)  # (T + 1, hidden)

    def forward(self, obs_share: Tensor, time_share: Tensor, x_t: Tensor) -> Tensor:
        """The shares are (batch, hidden), that of the time (hidden,) for one timestep in all rows."""
        weight = self.layers[0].weight.split(self.input_dims, dim=1)[0]  # (hidden, action_dim)
        x = mish(torch.addmm(obs_share + time_share, x_t, weight.T))  # (batch, hidden)
        for layer in self.layers[1:-1]:
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


def init_normal(network: nn.Module) -> None:
    """Normal weights with standard deviation 1 / (2 sqrt(n_in)), not truncated (D9); zero biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | EnsembleLinear):
            nn.init.normal_(layer.weight, std=0.5 * layer.weight.shape[1] ** -0.5)
            nn.init.zeros_(layer.bias)


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
    """Every random number of one QVPO update."""

    next_action_noise: Tensor  # (T, num_target_samples * batch, action_dim)
    candidate_noise: Tensor  # (T, num_train_samples * batch, action_dim)
    uniform_actions: Tensor  # (num_entropy_samples, batch * num_chosen, action_dim), uniform in [-1, 1)
    t: Tensor  # (num_entropy_samples + 1, batch * num_chosen), uniform in 1..T
    eps: Tensor  # (num_entropy_samples + 1, batch * num_chosen, action_dim)


class QVPO(nn.Module):
    """QVPO for observations of obs_dim numbers and actions in [-1, 1]^action_dim."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.beta, self.alpha_bar = noise_schedule(args.noise_schedule, args.diffusion_steps)
        std = posterior_std(self.beta, self.alpha_bar)
        self.sigma = [args.sampler_temperature * value for value in std]
        self.eval_sigma = [0.0 if args.deterministic_eval else sigma for sigma in self.sigma]
        self.actor = QVPONoisePredictor(obs_dim, action_dim, args.time_dim, args.hidden_dims)
        self.critic = EnsembleCritic(obs_dim, action_dim, args.num_qs, args.hidden_dims)
        init_normal(self.actor)
        init_normal(self.critic)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("running_q_mean", torch.tensor(0.0))
        self.register_buffer("running_q_std", torch.tensor(1.0))
        self.register_buffer("entropy_weight", torch.tensor(float(args.entropy_weight)))
        self.register_buffer("actor_tau", torch.tensor(0.0))
        self.register_buffer("num_stored", torch.tensor(1))
        self.register_buffer("alpha_bars", torch.tensor(self.alpha_bar), persistent=False)  # (T + 1,)
        self.to(device)
        self.device = device
        adam = partial(torch.optim.Adam, eps=args.adam_eps, fused=True, capturable=device.type == "cuda")
        self.optimizers = {
            "actor": adam(self.actor.parameters(), lr=torch.tensor(args.actor_lr, device=device)),
            "critic": adam(self.critic.parameters(), lr=torch.tensor(args.critic_lr, device=device)),
        }

    def set_step(self, step: int) -> None:
        """Write into tensors what depends on the number of finished steps, so that update() need not.

        The update that follows has step + 1 transitions to draw from, up to replay_size.
        """
        start, least = self.args.entropy_weight, self.args.entropy_weight_min
        self.entropy_weight.fill_(min(start, max(least, start * (1 - step / self.args.total_steps))))
        self.actor_tau.fill_(self.args.tau if step % self.args.actor_target_every == 0 else 0.0)
        self.num_stored.fill_(min(step + 1, self.args.replay_size))

    def draw(self, batch_size: int) -> Draws:
        """Fresh random numbers for one update."""
        args, action_dim, device = self.args, self.action_dim, self.device
        num_uniform, chosen = args.num_entropy_samples, batch_size * args.num_chosen
        noise = partial(torch.randn, args.diffusion_steps, device=device)
        return Draws(
            next_action_noise=noise(args.num_target_samples * batch_size, action_dim),
            candidate_noise=noise(args.num_train_samples * batch_size, action_dim),
            uniform_actions=2 * torch.rand(num_uniform, chosen, action_dim, device=device) - 1,
            t=torch.randint(1, args.diffusion_steps + 1, (1 + num_uniform, chosen), device=device),
            eps=torch.randn(1 + num_uniform, chosen, action_dim, device=device),
        )

    @torch.no_grad()
    def candidates(
        self, obs: Tensor, noise: Tensor, sigma: list[float], target: bool = False
    ) -> tuple[Tensor, Tensor]:
        """n actions per state and their values; noise (T, n * batch, action_dim). target: of the targets."""
        actor, critic = (self.actor_target, self.critic_target) if target else (self.actor, self.critic)
        n = noise.shape[1] // len(obs)
        obs_share = actor.embed_obs(obs).repeat(n, 1)  # (n * batch, hidden)
        time_share = actor.embed_time(len(noise))  # (T + 1, hidden)
        obs = obs.repeat(n, 1)  # (n * batch, obs_dim)

        def predict_noise(x: Tensor, t: int, obs_share: Tensor) -> Tensor:
            return actor(obs_share, time_share[t], x)  # (batch, action_dim)

        actions, q = [], []
        rows = CPU_ROWS if self.device.type == "cpu" else len(obs)
        parts = (obs.split(rows), obs_share.split(rows), noise.split(rows, dim=1))
        for part_obs, part_share, part_noise in zip(*parts, strict=True):
            predict = partial(predict_noise, obs_share=part_share)
            actions.append(ddpm_sample(predict, part_noise, self.beta, self.alpha_bar, sigma, clip=True))
            q.append(critic(part_obs, actions[-1]).amin(0))
        actions = torch.cat(actions).unflatten(0, (n, -1))  # (n, batch, action_dim)
        q = torch.cat(q).unflatten(0, (n, -1))  # (n, batch)
        return actions, q

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared temporal-difference error, summed over the critics; Eq. 1 and 2."""
        _, next_q = self.candidates(batch.next_obs, draws.next_action_noise, self.sigma, target=True)
        target = batch.reward + self.args.gamma * (1 - batch.terminal) * next_q.amax(0)  # (batch,)
        q = self.critic(batch.obs, batch.action)  # (num_qs, batch)
        loss = (q - target).square().mean(1).sum()
        return loss, {"critic_loss": loss, "q_mean": q.mean(), "target_mean": target.mean()}

    def q_weights(self, q: Tensor, value: Tensor) -> Tensor:
        """Weight of each action in the actor loss, from its q and its state's value; Eq. 4."""
        args = self.args
        if args.weight == "qadv":
            return (q - value).clamp(min=0)
        if args.weight == "qcut":
            return q.clamp(min=args.weight_cut)
        if args.weight == "qrelu":
            return (q + args.weight_shift).clamp(min=0)
        centred = q - self.running_q_mean
        if args.weight == "qexpn":
            return (args.weight_beta * (centred / self.running_q_std).clamp(-8, 8)).exp()
        return (args.weight_beta * centred).clamp(min=0 if args.weight == "qcut0n" else 1)

    @torch.no_grad()
    def choose(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The num_chosen best candidates per state, best first, and their weights; row b * num_chosen + k.

        The running mean and standard deviation of Q, which some weights need, follow the candidates'.
        """
        k = self.args.num_chosen
        actions, q = self.candidates(obs, noise, self.sigma)
        self.running_q_mean.lerp_(q.mean(), self.args.q_mean_rate)
        self.running_q_std.lerp_(q.std(), self.args.q_std_rate)
        best = q.T.topk(k, dim=1).indices  # (batch, k)
        best_q = q.T.take_along_dim(best, dim=1)  # (batch, k)
        weight = self.q_weights(best_q, q.mean(0).unsqueeze(1)).flatten()  # (batch * k,)
        chosen = actions.transpose(0, 1).take_along_dim(best.unsqueeze(2), dim=1)  # (batch, k, action_dim)
        return chosen.flatten(0, 1), weight

    def actor_loss(self, obs: Tensor, action: Tensor, weight: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Weighted noise regression; Eq. 3. obs is (batch, obs_dim), the others are (n, batch, ...)."""
        n, t, eps = len(action), t.flatten(), eps.flatten(0, 1)
        obs_share = self.actor.embed_obs(obs).repeat(n, 1)  # (n * batch, hidden)
        time_share = self.actor.embed_time(self.args.diffusion_steps)[t]  # (n * batch, hidden)
        x_t = add_noise(action.flatten(0, 1), t, eps, self.alpha_bars)  # (n * batch, action_dim)
        error = (self.actor(obs_share, time_share, x_t) - eps).square()  # (n * batch, action_dim)
        return (weight.flatten().unsqueeze(1) * error).mean()

    def descend(self, name: str, loss: Tensor) -> Tensor:
        """One optimizer step of the actor or the critic; returns the gradient norm before clipping."""
        self.optimizers[name].zero_grad()
        loss.backward()
        parameters = getattr(self, name).parameters()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        self.optimizers[name].step()
        return grad_norm

    def update_critic(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """One gradient step of the critics."""
        loss, metrics = self.critic_loss(batch, draws)
        return metrics | {"critic_grad_norm": self.descend("critic", loss)}

    def update_actor(self, obs: Tensor, draws: Draws) -> dict[str, Tensor]:
        """One gradient step of the actor on its own best actions and on uniform ones; Eq. 3 to 5."""
        action, weight = self.choose(obs, draws.candidate_noise)
        metrics = {"weight": weight.mean(), "entropy_weight": self.entropy_weight.clone()}
        obs = obs.repeat_interleave(self.args.num_chosen, dim=0)  # (batch * num_chosen, obs_dim)
        uniform_weight = self.entropy_weight * weight  # (batch * num_chosen,); Eq. 5
        weight = torch.stack([weight, *[uniform_weight] * self.args.num_entropy_samples])
        action = torch.cat([action.unsqueeze(0), draws.uniform_actions])
        loss = self.actor_loss(obs, action, weight, draws.t, draws.eps)
        metrics |= {"actor_loss": loss, "actor_grad_norm": self.descend("actor", loss)}
        running = {"running_q_mean": self.running_q_mean.clone(), "running_q_std": self.running_q_std.clone()}
        return metrics | running

    def update_targets(self) -> None:
        """The target networks follow, after both updates."""
        polyak_update(self.critic_target, self.critic, self.args.tau)
        polyak_update(self.actor_target, self.actor, self.actor_tau)

    def update(self, data: Batch) -> dict[str, Tensor]:
        """One gradient step on random rows of the data: tensor operations only, no host sync; 0-d metrics."""
        shape = 2, self.args.batch_size  # the actor's states are drawn anew (D4)
        rows = torch.randint(2**62, shape, device=self.device) % self.num_stored  # (2, batch)
        batch, draws = Batch(*(column[rows[0]] for column in data)), self.draw(self.args.batch_size)
        metrics = self.update_critic(batch, draws) | self.update_actor(data.obs[rows[1]], draws)
        self.update_targets()
        return {name: value.detach() for name, value in metrics.items()}

    def best_of(self, n: int, obs: Tensor, noise: Tensor | None, sigma: list[float]) -> Tensor:
        """For each of obs (batch, obs_dim) the best of n candidates; Eq. 6."""
        if noise is None:
            shape = self.args.diffusion_steps, n * len(obs), self.action_dim
            noise = torch.randn(shape, device=self.device)  # (T, n * batch, action_dim)
        actions, q = self.candidates(obs, noise, sigma)
        best = q.argmax(0)[None, :, None]  # (1, batch, 1)
        return actions.take_along_dim(best, dim=0).squeeze(0)  # (batch, action_dim)

    def explore(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """The efficient behaviour policy, for acting while learning: best of num_behavior_samples."""
        return self.best_of(self.args.num_behavior_samples, obs, noise, self.sigma)

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """For each of obs (batch, obs_dim) the best of num_action_samples actions; for evaluation."""
        return self.best_of(self.args.num_action_samples, obs, noise, self.eval_sigma)


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
class Experience:
    """The environment that is learned in, and the last transitions from it, on the device.

    save() appends to a file, so a checkpoint costs what is new since the last one. The state of an
    environment cannot be saved, but an episode can be played again from its seed and its actions.
    """

    def __init__(self, env: gym.Env, capacity: int, time_limit_is_terminal: bool, device: torch.device):
        self.env, self.capacity, self.time_limit_is_terminal = env, capacity, time_limit_is_terminal
        obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = torch.empty(capacity, sum(self.sizes), dtype=torch.float32, device=device)
        obs, action, reward, next_obs, terminal = self.rows.split(self.sizes, dim=1)
        self.data = Batch(obs, action, reward.squeeze(1), next_obs, terminal.squeeze(1))
        self.count, self.saved, self.checksum = 0, 0, 0  # transitions so far, those in the file, its CRC
        self.begin_episode(seed=None)

    def begin_episode(self, seed: int | None) -> None:
        """Reset the environment, with a new seed if none is given."""
        self.episode_seed = torch.randint(2**31, ()).item() if seed is None else seed
        self.episode_start, self.episode_return = self.count, 0.0
        self.obs = self.env.reset(seed=self.episode_seed)[0].astype(np.float32)

    def step(self, action: np.ndarray) -> dict[str, float]:
        """Play one action and keep the transition; return and length of the episode if it is over."""
        next_obs, reward, terminated, truncated, _ = self.env.step(action)
        terminal = terminated or (truncated and self.time_limit_is_terminal)  # D1
        row = np.concatenate([self.obs, action, [reward], next_obs, [terminal]], dtype=np.float32)
        self.rows[self.count % self.capacity] = torch.from_numpy(row)
        self.count += 1
        self.episode_return += float(reward)
        self.obs = next_obs.astype(np.float32)
        if not (terminated or truncated):
            return {}
        episode = {
            "episode_return": self.episode_return,
            "episode_length": float(self.count - self.episode_start),
        }
        self.begin_episode(seed=None)
        return episode

    def save(self, folder: Path) -> dict[str, int]:
        """Append what is new to the folder's replay.bin; what is returned goes into the checkpoint."""
        path = folder / "replay.bin"
        slots = torch.arange(self.saved, self.count, device=self.rows.device) % self.capacity
        new = self.rows[slots].cpu().numpy().tobytes()
        try:
            with open(path, "r+b" if self.saved else "wb") as file:
                file.seek(self.saved * 4 * sum(self.sizes))  # a crash may have left more behind a checkpoint
                file.write(new)
                file.truncate()
        except OSError as error:
            raise cannot_write(path, error) from error
        self.saved, self.checksum = self.count, zlib.crc32(new, self.checksum)
        return {name: getattr(self, name) for name in ("count", "checksum", "episode_start", "episode_seed")}

    def load(self, folder: Path, state: dict[str, int]) -> None:
        """What save() wrote, and the episode that was under way; UserError if the file is not that."""
        path, row_bytes, checksum = folder / "replay.bin", 4 * sum(self.sizes), 0
        block = min(self.capacity, 50_000)
        try:
            with open(path, "rb") as file:
                for start in range(0, state["count"], block):
                    content = file.read(min(block, state["count"] - start) * row_bytes)
                    checksum = zlib.crc32(content, checksum)
                    rows = np.frombuffer(content, np.float32).reshape(-1, sum(self.sizes))
                    slots = torch.arange(start, start + len(rows)) % self.capacity
                    self.rows[slots.to(self.rows.device)] = torch.tensor(rows, device=self.rows.device)
        except (OSError, ValueError) as error:
            raise UserError(f"--resume: cannot read {path}: {error}") from error
        if checksum != state["checksum"]:
            raise UserError(f"--resume: {path} is damaged, or not that of the checkpoint")
        self.count = self.saved = state["count"]
        self.checksum = checksum
        self.replay_episode(state["episode_start"], state["episode_seed"])

    def replay_episode(self, start: int, seed: int) -> None:
        """Play the episode that began at transition `start` again, to where it was; or begin a new one."""
        self.begin_episode(seed)
        self.episode_start = start
        repeats = self.count - start <= self.capacity
        for slot in [index % self.capacity for index in range(start, self.count)] if repeats else []:
            next_obs, reward, terminated, truncated, _ = self.env.step(self.data.action[slot].cpu().numpy())
            self.episode_return += float(reward)
            self.obs = next_obs.astype(np.float32)
            same = np.array_equal(self.obs, self.data.next_obs[slot].cpu().numpy())
            repeats = same and not (terminated or truncated)
            if not repeats:
                break
        if not repeats:
            print("  the episode under way cannot be played again: a new one begins")
            self.begin_episode(seed=None)


def train(args: Args) -> dict:
    """One run: act, learn, evaluate, log and save; returns what results.json holds."""
    run = Run("qvpo_online", args, DEFAULT_SETTINGS, TASK_SETTINGS)
    args = run.args
    if args.dataset:
        raise UserError("--dataset: qvpo_online.py learns from what it does itself; it reads no transitions")
    if args.num_chosen > args.num_train_samples:
        raise UserError(f"--num-chosen is {args.num_chosen}, of only {args.num_train_samples} candidates")

    env, *envs = (make_online_env(args.env_id) for _ in range(1 + args.eval_episodes))
    agent = QVPO(env.observation_space.shape[0], env.action_space.shape[0], args, run.device)
    capacity = min(args.replay_size, args.total_steps)
    experience = Experience(env, capacity, args.time_limit_is_terminal, run.device)
    run.begin(agent, memory=experience)
    update = accelerated(partial(agent.update, experience.data), agent, args)
    with run:
        while True:
            if run.evaluation_due():
                run.add_evaluation(evaluate(agent, envs))
            if run.step >= args.total_steps:
                break
            agent.set_step(run.step)
            with uninterrupted():
                if run.step < args.learning_starts:
                    action = 2 * torch.rand(agent.action_dim) - 1  # (action_dim,)
                else:
                    obs = torch.from_numpy(experience.obs).to(run.device)  # (obs_dim,)
                    action = agent.explore(obs.unsqueeze(0)).squeeze(0).cpu()  # (action_dim,)
                episode = experience.step(action.numpy())
                run.record(update() if run.step + 1 >= args.learning_starts else {})
                run.add_to_curves("charts", episode)
            if run.reached(args.log_every):
                run.log()
            if run.reached(min(args.save_every, args.replay_size)):  # before unsaved transitions are replaced
                run.save()
    return run.results


if __name__ == "__main__":
    run_command(train, tyro.cli(Args))
