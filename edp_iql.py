"""EDP + IQL: Efficient Diffusion Policy, improved as in Implicit Q-Learning.

Paper: Kang, Ma, Du, Pang, Yan: Efficient Diffusion Policies for Offline Reinforcement Learning, 2023,
arXiv 2305.20081.
docs/edp.md explains it, numbers the equations (Eq. 1 to 8) and the differences (D1, ...) named in this file,
and has the logged metrics and results. edp_td3.py and edp_crr.py differ in how the policy is improved.

    python edp_iql.py                                 # the bundled hopper-mini-v0, minutes on a CPU
    python edp_iql.py --env-id hopper-medium-v2       # a D4RL task with the paper's scale and gradient limits
    python edp_iql.py --resume runs/<run>             # go on where a run stopped

Diffusion-QL runs and differentiates the whole denoising chain in every training step. EDP builds an action
from one noise prediction at a random timestep instead (action approximation), and where it does need a chain,
for acting, DPM-Solver takes 15 network calls instead of K = 1000.

In shapes: T is diffusion_steps, the paper's K. Timesteps are 1..T; t = 0 is the clean action.
"""

import math
import time
from collections.abc import Callable, Iterable
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

from common.datasets import UserError, load_dataset, tune_rewards
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

    # --- EDP ---
    diffusion_steps: int | None = None  # diffusion steps, K
    noise_schedule: Literal["vp", "linear", "scaled_linear", "cosine"] = "scaled_linear"  # how beta_t grows
    sampler: Literal["dpm", "ddpm", "ddim"] = "dpm"  # reverse chain: DPM-Solver, or all diffusion_steps
    dpm_calls: int = 15  # network calls of the DPM-Solver
    dpm_t_end: float | None = None  # where it stops, as a share of diffusion_steps; None: 1 / diffusion_steps
    hidden_dims: tuple[int, ...] | None = None  # hidden units per layer of the actor and of each critic
    time_dim: int = 16  # features of the timestep
    actor_lr: float | None = None  # learning rate of the actor
    critic_lr: float | None = None  # learning rate of the critics and of V
    weight_decay: float = 0.0  # decoupled weight decay of the critics and of V
    lr_decay: bool = False  # let the actor's learning rate fall to 0 along a cosine
    lr_decay_steps: int | None = None  # steps after which it reaches 0; None: total_steps
    max_grad_norm: float | None = None  # limit of the gradient norm of each network; 0: no limit
    action_approximation: bool = True  # Eq. 2; without, the gradient runs through the sampler's whole chain
    num_action_samples: int = 10  # candidate actions per state when acting, one drawn by softmax of Q (EAS)
    policy_scale: float = 1.0  # when acting, factor on the predicted noise: above 1 narrows the policy
    noise_scale: float = 1.0  # when acting, factor on the initial noise; 0 makes DPM-Solver deterministic
    reward_tune: str | None = None  # rule for the training rewards, see tune_rewards
    guidance_weight: float | None = None  # weight of the guidance loss beside the noise regression, lambda

    # --- IQL ---
    expectile: float | None = None  # of Q that V regresses on, in (0, 1), Eq. 6
    learn_std: bool = False  # learn the standard deviation of the Gaussian around the policy's action; else 1
    bc_weight: float = 1.0  # weight of the noise regression
    advantage_weight: Literal["exp", "softmax"] = "exp"  # from advantage to weight, Eq. 6
    inverse_temperature: float | None = None  # multiplies the advantage
    max_weight: float = 100.0  # upper bound of the exponential weight


# fmt: off
DEFAULT_SETTINGS = dict(
    total_steps=2_000_000, eval_every=10_000, eval_episodes=10, tau=0.005, diffusion_steps=1000,
    hidden_dims=(256, 256, 256), actor_lr=3e-4, critic_lr=3e-4, max_grad_norm=5.0,
    reward_tune="iql_locomotion", guidance_weight=1.0, lr_decay=False, expectile=0.7, inverse_temperature=3.0,
)
# Ours, to learn in minutes on a CPU.
MINI = dict(total_steps=12_000, eval_every=3_000, tau=0.03, hidden_dims=(128, 128, 128),
            actor_lr=1e-3, critic_lr=1e-3)
BANDIT = dict(total_steps=2_000, eval_every=500, lr_decay=True, tau=0.03, diffusion_steps=50,
              hidden_dims=(128, 128, 128), actor_lr=3e-3, critic_lr=3e-3, inverse_temperature=10.0,
              reward_tune="none")
# Steps, learning rates and loss weights per domain from the paper's Table 3, gradient limits and reward rules
# from the official code.
ANTMAZE = dict(total_steps=1_000_000, reward_tune="iql_antmaze", expectile=0.9, eval_episodes=100)
ADROIT = dict(total_steps=1_000_000, reward_tune="minmax", guidance_weight=0.1, actor_lr=3e-5, critic_lr=3e-5,
              eval_episodes=100)
KITCHEN = dict(total_steps=1_000_000, reward_tune="minmax", guidance_weight=0.005, eval_episodes=100)
TASK_SETTINGS = {
    "halfcheetah-medium-v2":                  dict(max_grad_norm=9),
    "hopper-medium-v2":                       dict(max_grad_norm=9),
    "walker2d-medium-v2":                     dict(max_grad_norm=1),
    "halfcheetah-medium-replay-v2":           dict(max_grad_norm=2),
    "hopper-medium-replay-v2":                dict(max_grad_norm=4),
    "walker2d-medium-replay-v2":              dict(max_grad_norm=4),
    "halfcheetah-medium-expert-v2":           dict(max_grad_norm=7),
    "hopper-medium-expert-v2":                dict(max_grad_norm=5),
    "walker2d-medium-expert-v2":              dict(max_grad_norm=5),
    "antmaze-umaze-v0":             ANTMAZE | dict(max_grad_norm=2),
    "antmaze-umaze-diverse-v0":     ANTMAZE | dict(max_grad_norm=3),
    "antmaze-medium-play-v0":       ANTMAZE | dict(max_grad_norm=2),
    "antmaze-medium-diverse-v0":    ANTMAZE | dict(max_grad_norm=1),
    "antmaze-large-play-v0":        ANTMAZE | dict(max_grad_norm=10),
    "antmaze-large-diverse-v0":     ANTMAZE | dict(max_grad_norm=7),
    "pen-human-v1":                  ADROIT | dict(max_grad_norm=7),
    "pen-cloned-v1":                 ADROIT | dict(max_grad_norm=8),
    "kitchen-complete-v0":          KITCHEN | dict(max_grad_norm=9),
    "kitchen-partial-v0":           KITCHEN | dict(max_grad_norm=10),
    "kitchen-mixed-v0":             KITCHEN | dict(max_grad_norm=10),
    # Ours: the other tasks of a domain, and our own tasks.
    "antmaze": ANTMAZE,
    "adroit": ADROIT,
    "kitchen": KITCHEN,
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


def approximate_action(x_t: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean action that x_t was made from if eps was its noise, clipped to [-1, 1]; Eq. 2."""
    alpha_bar_t = alpha_bar[t].unsqueeze(1)  # (batch, 1)
    return ((x_t - (1 - alpha_bar_t).sqrt() * eps) / alpha_bar_t.sqrt()).clamp(-1, 1)


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


def clipped_ddim_sample(
    predict_noise: Callable[[Tensor, float], Tensor], noise: Tensor, alpha_bar: list[float]
) -> Tensor:
    """Deterministic sampling (Song et al. 2021) from x_T = noise, the clean action clipped at every step."""
    x = noise  # (batch, action_dim)
    for t in range(len(alpha_bar) - 1, 0, -1):
        eps = predict_noise(x, t)  # (batch, action_dim)
        x_0 = ((x - math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(alpha_bar[t])).clamp(-1, 1)
        eps = (x - math.sqrt(alpha_bar[t]) * x_0) / math.sqrt(1 - alpha_bar[t])  # (batch, action_dim)
        x = math.sqrt(alpha_bar[t - 1]) * x_0 + math.sqrt(1 - alpha_bar[t - 1]) * eps
    return x


class SolverStage(NamedTuple):
    """One network call of the DPM-Solver, at time t, and the weights that lead on from there."""

    t: float  # timestep of the call, in 1..T; may lie between two
    clip_t: int  # the whole timestep whose alpha_bar the noise is clipped by
    x_weight: float  # of x where the step began
    eps_weight: float  # of the noise where the step began
    change_weight: float  # of what the noise has changed by since then


def dpm_solver_plan(alpha_bar: list[float], num_calls: int, t_end: float) -> list[list[SolverStage]]:
    """The steps of DPM-Solver (Lu et al. 2022, third order, singlestep), uniform in time from T to t_end T.

    All steps make three network calls, except the last one or two, so that there are num_calls. UserError:
    more calls than timesteps, or an end before timestep 1, where the schedule is not defined.
    """
    num_steps = len(alpha_bar) - 1
    if not 1 <= num_calls <= num_steps:
        raise UserError(f"--dpm-calls is {num_calls}; it must be in 1..{num_steps}, the diffusion steps")
    if not 1 - 1e-9 <= t_end * num_steps < num_steps:  # 1 / 49 * 49 is less than 1
        raise UserError(f"--dpm-t-end is {t_end}; it must be at least 1 / {num_steps}, and below 1")
    log_alphas = 0.5 * np.log(alpha_bar[1:])  # (T,), of timesteps 1..T, linear in between

    def log_alpha(t: np.ndarray) -> np.ndarray:
        return np.interp(t, np.arange(1, num_steps + 1), log_alphas)

    def sigma(t: np.ndarray) -> np.ndarray:
        return np.sqrt(-np.expm1(2 * log_alpha(t)))

    full, rest = divmod(num_calls, 3)
    orders = [3] * full + [rest] if rest else [3] * (full - 1) + [2, 1]
    grid = np.linspace(num_steps, t_end * num_steps, num_calls + 1)[np.cumsum([0, *orders])]
    plan = []
    for order, (start, end) in zip(orders, pairwise(grid), strict=True):
        times = np.linspace(start, end, order + 1)
        half_log_snr = log_alpha(times) - np.log(sigma(times))
        h = half_log_snr - half_log_snr[0]
        growth = np.expm1(h)
        step = []
        for i in range(1, order + 1):  # the call at times[i - 1] leads to times[i]
            change = growth[i] / 2 if order == 2 else growth[i] / h[i] - 1
            stage = SolverStage(
                t=float(times[i - 1]),
                clip_t=int(times[i - 1] + 1e-6),  # D9
                x_weight=float(np.exp(log_alpha(times[i]) - log_alpha(start))),
                eps_weight=float(sigma(times[i]) * growth[i]),
                change_weight=float(sigma(times[i]) * change * h[i] / h[i - 1]) if i > 1 else 0.0,
            )
            step.append(stage)
        plan.append(step)
    return plan


def dpm_sample(
    predict_noise: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    alpha_bar: list[float],
    plan: list[list[SolverStage]],
    clip: bool,
) -> Tensor:
    """Sampling by DPM-Solver from x_T = noise; clip keeps the clean action within [-1, 1] at every call."""
    x = noise  # (batch, action_dim)
    for step in plan:
        x_start, eps_start = x, None
        for stage in step:
            eps = predict_noise(x, stage.t)  # (batch, action_dim)
            if clip:
                signal, spread = math.sqrt(alpha_bar[stage.clip_t]), math.sqrt(1 - alpha_bar[stage.clip_t])
                eps = torch.clamp(eps, (x - signal) / spread, (x + signal) / spread)
            eps_start = eps if eps_start is None else eps_start
            x = stage.x_weight * x_start - stage.eps_weight * eps_start
            if stage.change_weight:
                x = x - stage.change_weight * (eps - eps_start)
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


class EDPNoisePredictor(nn.Module):
    """eps_theta(s, x_t, t): the noise in the noisy action x_t at timestep t, which may lie between two."""

    def __init__(self, obs_dim: int, action_dim: int, time_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        frequencies = torch.exp(-torch.arange(time_dim // 2) * math.log(10_000) / (time_dim // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time_mlp = nn.ModuleList([nn.Linear(time_dim, 2 * time_dim), nn.Linear(2 * time_dim, time_dim)])
        sizes = pairwise((obs_dim + action_dim + time_dim, *hidden_dims, action_dim))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)

    def forward(self, obs: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """obs (batch, obs_dim), x_t (batch, action_dim), t (batch,) or (1,) for one timestep in all rows."""
        angles = (t - 1).unsqueeze(
            1
        ) * self.frequencies  # (batch or 1, time_dim / 2); the authors count from 0
        time = torch.cat([angles.cos(), angles.sin()], dim=1)  # (batch or 1, time_dim)
        time = self.time_mlp[1](mish(self.time_mlp[0](time)))  # (batch or 1, time_dim)
        time = time.expand(len(obs), -1)  # (batch, time_dim)
        x = torch.cat([obs, x_t, time], dim=1)  # (batch, obs_dim + action_dim + time_dim)
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


class StateValue(nn.Module):
    """V(s)."""

    def __init__(self, obs_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        sizes = pairwise((obs_dim, *hidden_dims, 1))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)

    def forward(self, obs: Tensor) -> Tensor:
        x = obs  # (batch, obs_dim)
        for layer in self.layers[:-1]:
            x = mish(layer(x))  # (batch, hidden)
        return self.layers[-1](x).squeeze(1)  # (batch,)


def init_lecun(network: nn.Module) -> None:
    """Normal weights of variance 1 / n_in, truncated at two standard deviations, and zero biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | EnsembleLinear):
            n_in = layer.weight.shape[1]  # of (n_out, n_in) and of (num_members, n_in, n_out)
            std = n_in**-0.5 / 0.87962566  # which truncation takes back to n_in**-0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, diag(std^2)): (batch,)."""
    return (-0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(1)


def cosine_decay(step: int, decay_steps: int) -> float:
    """Factor on a learning rate that falls from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(step / decay_steps, 1)))


def polyak_update(target: nn.Module, online: nn.Module, tau: float | Tensor) -> None:
    """target <- tau * online + (1 - tau) * target."""
    with torch.no_grad():
        for target_parameter, parameter in zip(target.parameters(), online.parameters(), strict=True):
            target_parameter.lerp_(parameter, tau)


def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to a joint norm of max_norm if it is above; returns the norm before."""
    gradients = [parameter.grad for parameter in parameters]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (max_norm / norm).clamp(max=1.0))
    return norm


def clip_by_member_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """As clip_by_global_norm, for each member of an ensemble alone; returns the norms before, (num_qs,)."""
    gradients = [parameter.grad for parameter in parameters]
    norms = torch.stack([gradient.square().sum((1, 2)) for gradient in gradients]).sum(0).sqrt()  # (num_qs,)
    scale = (max_norm / norms).clamp(max=1.0)[:, None, None]  # (num_qs, 1, 1)
    for gradient in gradients:
        gradient.mul_(scale)
    return norms


# === Agent ===
class Batch(NamedTuple):
    """Transitions on the device, float32."""

    obs: Tensor  # (batch, obs_dim)
    action: Tensor  # (batch, action_dim)
    reward: Tensor  # (batch,)
    next_obs: Tensor  # (batch, obs_dim)
    terminal: Tensor  # (batch,)


class Draws(NamedTuple):
    """Every random number of one EDP + IQL update."""

    t: Tensor  # (batch,), uniform in 1..T
    eps: Tensor  # (batch, action_dim)
    action_noise: Tensor  # (noise_steps, batch or 0, action_dim), empty with action approximation


class EDPIQL(nn.Module):
    """EDP + IQL for observations of obs_dim numbers and actions in [-1, 1]^action_dim."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.beta, self.alpha_bar = noise_schedule(args.noise_schedule, args.diffusion_steps)
        self.sigma = posterior_std(self.beta, self.alpha_bar)
        self.noise_steps = args.diffusion_steps if args.sampler == "ddpm" else 1
        if args.sampler == "dpm":
            t_end = 1 / args.diffusion_steps if args.dpm_t_end is None else args.dpm_t_end
            self.plan = dpm_solver_plan(self.alpha_bar, args.dpm_calls, t_end)
        self.actor = EDPNoisePredictor(obs_dim, action_dim, args.time_dim, args.hidden_dims)
        self.critic = EnsembleCritic(obs_dim, action_dim, 2, args.hidden_dims)
        init_lecun(self.actor)
        self.value = StateValue(obs_dim, args.hidden_dims)
        init_lecun(self.critic)
        init_lecun(self.value)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.log_std = nn.Parameter(torch.zeros(action_dim), requires_grad=args.learn_std)
        self.register_buffer("alpha_bars", torch.tensor(self.alpha_bar), persistent=False)  # (T + 1,)
        self.to(device)
        self.device = device
        adam = partial(torch.optim.AdamW, fused=True, capturable=device.type == "cuda")
        actor_lr, critic_lr = (torch.tensor(lr, device=device) for lr in (args.actor_lr, args.critic_lr))
        decay = args.weight_decay
        self.optimizers = {
            "actor": adam(self.actor.parameters(), actor_lr, weight_decay=0),
            "critic": adam(self.critic.parameters(), critic_lr, weight_decay=decay),
            "value": adam(self.value.parameters(), critic_lr, weight_decay=decay),
        }
        if args.learn_std:
            self.optimizers["log_std"] = adam([self.log_std], critic_lr, weight_decay=decay)

    def set_step(self, step: int) -> None:
        """Write into tensors what depends on the number of finished updates, so that update() need not."""
        decay_steps = self.args.lr_decay_steps or self.args.total_steps
        decay = cosine_decay(step, decay_steps) if self.args.lr_decay else 1.0
        self.optimizers["actor"].param_groups[0]["lr"].fill_(self.args.actor_lr * decay)

    def draw(self, batch_size: int) -> Draws:
        """Fresh random numbers for one update."""
        device, rows = self.device, (batch_size, self.action_dim)
        chain_rows = 0 if self.args.action_approximation else batch_size
        return Draws(
            t=torch.randint(1, self.args.diffusion_steps + 1, (batch_size,), device=device),
            eps=torch.randn(*rows, device=device),
            action_noise=torch.randn(self.noise_steps, chain_rows, self.action_dim, device=device),
        )

    def sample(self, actor: EDPNoisePredictor, obs: Tensor, noise: Tensor, scale: float = 1.0) -> Tensor:
        """One action per row of obs from the actor's chain; noise (noise_steps, batch, action_dim)."""

        def predict_noise(x: Tensor, t: float) -> Tensor:
            return scale * actor(obs, x, torch.full((1,), t, dtype=x.dtype, device=self.device))

        if self.args.sampler == "dpm":
            return dpm_sample(predict_noise, noise[0], self.alpha_bar, self.plan, clip=True)
        if self.args.sampler == "ddim":
            return clipped_ddim_sample(predict_noise, noise[0], self.alpha_bar)
        return ddpm_sample(predict_noise, noise, self.beta, self.alpha_bar, self.sigma, clip=True)

    def advantage(self, batch: Batch) -> Tensor:
        """min Q'(s, a) - V(s): (batch,)."""
        return self.critic_target(batch.obs, batch.action).amin(0) - self.value(batch.obs)

    def value_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Expectile regression of V on Q; Eq. 6."""
        advantage = self.advantage(batch)  # (batch,)
        weight = torch.where(advantage > 0, self.args.expectile, 1 - self.args.expectile)  # (batch,)
        loss = (weight * advantage.square()).mean()
        return loss, {"value_loss": loss, "advantage": advantage.mean()}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared temporal-difference error of both critics; Eq. 7."""
        with torch.no_grad():
            target = batch.reward + self.args.gamma * (1 - batch.terminal) * self.value(
                batch.next_obs
            )  # (batch,)
        q = self.critic(batch.obs, batch.action)  # (2, batch)
        loss = (q - target).square().mean(1).sum()
        return loss, {"critic_loss": loss, "q_mean": q.mean()}

    def policy_action(self, batch: Batch, draws: Draws, x_t: Tensor, eps: Tensor) -> Tensor:
        """An action of the policy, differentiable: approximated from the noisy x_t, or sampled."""
        if self.args.action_approximation:
            return approximate_action(x_t, draws.t, eps, self.alpha_bars)  # (batch, action_dim)
        return self.sample(self.actor, batch.obs, draws.action_noise)  # (batch, action_dim)

    def advantage_weight(self, advantage: Tensor) -> Tensor:
        """The weight (batch,) of each action of the data in the regression; Eq. 6."""
        if self.args.advantage_weight == "softmax":
            return (self.args.inverse_temperature * advantage).softmax(0)
        return (self.args.inverse_temperature * advantage).exp().clamp(max=self.args.max_weight)

    def actor_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Noise regression, and regression on the data's actions weighted by their advantage; Eq. 1, 4, 6."""
        x_t = add_noise(batch.action, draws.t, draws.eps, self.alpha_bars)  # (batch, action_dim)
        eps = self.actor(batch.obs, x_t, draws.t)  # (batch, action_dim)
        bc_loss = F.mse_loss(eps, draws.eps)
        action = self.policy_action(batch, draws, x_t, eps)  # (batch, action_dim)
        std = self.log_std.clamp(-5, 2).exp()  # (action_dim,)
        with torch.no_grad():
            weight = self.advantage_weight(self.advantage(batch))  # (batch,)
        log_prob = gaussian_log_prob(batch.action, action, std)  # (batch,)
        guidance_loss = -(weight * log_prob).mean()
        loss = self.args.bc_weight * bc_loss + self.args.guidance_weight * guidance_loss
        metrics = {"actor_loss": loss, "bc_loss": bc_loss, "guidance_loss": guidance_loss}
        return loss, metrics | {"weight": weight.mean()}

    def descend(self, name: str, loss: Tensor) -> Tensor:
        """One optimizer step; returns the gradient norm before clipping, (num_qs,) for the critic."""
        self.optimizers[name].zero_grad()
        loss.backward()
        clip = clip_by_member_norm if name == "critic" else clip_by_global_norm
        grad_norm = clip(getattr(self, name).parameters(), self.args.max_grad_norm or math.inf)
        self.optimizers[name].step()
        return grad_norm

    def update_value(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of V."""
        loss, metrics = self.value_loss(batch)
        return metrics | {"value_grad_norm": self.descend("value", loss)}

    def update_actor(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """One gradient step of the actor, and of the standard deviation if it is learned."""
        loss, metrics = self.actor_loss(batch, draws)
        self.log_std.grad = None
        metrics |= {"actor_grad_norm": self.descend("actor", loss)}
        if self.args.learn_std:
            clip_by_global_norm([self.log_std], self.args.max_grad_norm or math.inf)
            self.optimizers["log_std"].step()
        return metrics

    def update_critic(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of both critics."""
        loss, metrics = self.critic_loss(batch)
        return metrics | {"critic_grad_norm": self.descend("critic", loss).mean()}

    def update_targets(self) -> None:
        """The target critics follow."""
        polyak_update(self.critic_target, self.critic, self.args.tau)

    def update(self, data: Batch) -> dict[str, Tensor]:
        """One gradient step on random rows of the data: tensor operations only, no host sync; 0-d metrics."""
        rows = torch.randint(len(data.reward), (self.args.batch_size,), device=self.device)  # (batch,)
        batch, draws = Batch(*(column[rows] for column in data)), self.draw(self.args.batch_size)
        metrics = self.update_value(batch) | self.update_actor(batch, draws) | self.update_critic(batch)
        self.update_targets()
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """For each of obs (batch, obs_dim) one of num_action_samples actions, by softmax of Q; Eq. 8."""
        n = self.args.num_action_samples
        obs = obs.repeat_interleave(n, dim=0)  # (batch * n, obs_dim)
        if noise is None:
            noise = torch.randn(self.noise_steps, len(obs), self.action_dim, device=self.device)
            noise[0] *= self.args.noise_scale
        actions = self.sample(self.actor, obs, noise, self.args.policy_scale)  # (batch * n, action_dim)
        q = self.critic(obs, actions).amin(0).unflatten(0, (-1, n))  # (batch, n)
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
    run = Run("edp_iql", args, DEFAULT_SETTINGS, TASK_SETTINGS)
    args = run.args

    dataset = load_dataset(args.env_id, args.dataset, args.seed)
    envs = [dataset.make_env() for _ in range(args.eval_episodes)]
    actions = dataset.actions.clip(-0.999, 0.999)
    rewards = tune_rewards(dataset, args.reward_tune)
    columns = (dataset.observations, actions, rewards, dataset.next_observations, dataset.terminals)
    data = Batch(*(torch.as_tensor(column, device=run.device) for column in columns))

    agent = EDPIQL(data.obs.shape[1], data.action.shape[1], args, run.device)
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
