"""EDP + CRR: Efficient Diffusion Policy, improved as in Critic Regularized Regression.

Paper: Kang, Ma, Du, Pang, Yan: Efficient Diffusion Policies for Offline Reinforcement Learning, 2023,
arXiv 2305.20081. Equations, algorithms, tables and sections named here are the paper's.
docs/edp.md explains it and lists the differences from paper and official code that are named here (D1, ...).

    python edp_crr.py                                 # the bundled hopper-mini-v0, minutes on a CPU
    python edp_crr.py --env-id hopper-medium-v2       # a D4RL task at the paper's scale
    python edp_crr.py --resume runs/<run>             # go on where a run stopped

Diffusion-QL runs and differentiates the whole denoising chain in every training step. EDP builds an action
from one noise prediction at a random timestep instead (action approximation). Where it does need samples of
the policy, DPM-Solver takes 15 network calls instead of K = 1000.
The three EDP scripts differ in how the policy is improved, edp_iql.py also in how Q is learned.

In shapes: T is diffusion_steps, the paper's K. Timesteps are 1..T; t = 0 is the clean action.
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

from common.cli import Even, NonNegative, Positive, Threads, UnitInterval, UserError, run_command
from common.datasets import RewardRule, load_dataset, tune_rewards
from common.devices import cuda_graphed, mish, use_device
from common.envs import make_envs
from common.runs import Run, stop_if_asked
from common.tasks import find_task

EVAL_SEED = 10_000  # evaluation episodes are seeded EVAL_SEED, EVAL_SEED + 1, ...


# === Args ===
@dataclass
class Args:
    """The paper's values for locomotion, else the official code's; a task's row replaces some of them."""

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
    eval_every: Positive[int] = 10_000  # steps between evaluations
    eval_episodes: NonNegative[int] = 10  # episodes per evaluation, side by side; 0: no evaluation
    log_every: Positive[int] = 500  # steps between two points of the loss curves; a point is their mean
    save_every: Positive[int] = 10_000  # steps between checkpoints
    run_dir: str = "runs"  # folder that receives one folder per run
    resume: str | None = None  # continue this checkpoint or run folder; arguments given now replace its own

    # --- EDP ---
    diffusion_steps: Positive[int] = 1000  # diffusion steps, K
    noise_schedule: Literal["linear", "vp"] = "linear"  # how beta_t grows; vp is for few diffusion steps
    sampler: Literal["dpm", "ddpm"] = "dpm"  # reverse chain: DPM-Solver, or all diffusion_steps
    dpm_calls: Positive[int] = 15  # network calls of the DPM-Solver, at most diffusion_steps
    hidden_dims: tuple[Positive[int], ...] = (256, 256, 256)  # hidden units per layer of each network
    time_dim: Even[int] = 16  # features of the timestep
    actor_lr: NonNegative[float] = 3e-4  # learning rate of the actor
    critic_lr: NonNegative[float] = 3e-4  # learning rate of all other networks
    max_grad_norm: Positive[float] = 5.0  # limit of the gradient norm of each network
    actor_target_every: Positive[int] = 5  # steps between updates of the target actor
    actor_target_start: NonNegative[int] = 1000  # finished steps before the target actor moves
    num_action_samples: Positive[int] = 10  # candidates per state when acting, N of Alg. 2
    policy_scale: Positive[float] = 1.0  # when acting, factor on the predicted noise; above 1 is narrower
    noise_scale: NonNegative[float] = 1.0  # factor on the initial noise when acting; at 0, dpm has no noise
    reward_tune: RewardRule = "none"  # rule for the training rewards, see tune_rewards
    guidance_weight: NonNegative[float] = 1.0  # weight of L_pi beside L_diff, lambda of Alg. 1

    # --- CRR ---
    likelihood: Literal["gaussian", "elbo"] = "gaussian"  # what stands for log pi(a | s): Eq. 13 or Eq. 12
    temperature: Positive[float] = 1.0  # divides the advantage, beta
    max_weight: NonNegative[float] = 20.0  # upper bound of exp(advantage / temperature)
    num_advantage_samples: Positive[int] = 10  # actions for the baseline of the advantage, N of Eq. 21


# fmt: off
# From Table 3: steps, learning rates, loss weights (D4, D5). From the official code: gradient limits (D3) and
# reward rules. The number of evaluation episodes is ours (D17).
ANTMAZE = dict(total_steps=1_000_000, reward_tune="cql_antmaze", eval_episodes=100)
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
    # Ours: the other tasks of a domain, and our own tasks, which are learned in minutes on a CPU.
    "antmaze": ANTMAZE,
    "adroit": ADROIT,
    "kitchen": KITCHEN,
    "hopper-mini-v0": dict(
        total_steps=8_000, eval_every=4_000, tau=0.03, hidden_dims=(128, 128, 128), num_action_samples=50,
        actor_lr=1e-3, critic_lr=1e-3, reward_tune="iql_locomotion", likelihood="elbo", temperature=0.2),
    "bandit": dict(
        total_steps=2_000, eval_every=500, batch_size=128, tau=0.05, hidden_dims=(64, 64, 64),
        diffusion_steps=50, num_action_samples=300, actor_lr=3e-3, critic_lr=1e-2,
        reward_tune="antmaze100", likelihood="elbo", temperature=20.0, max_weight=1e5),
}
# fmt: on


# === Diffusion ===
class Schedule(NamedTuple):
    """beta_t and alpha_bar_t = prod_{s <= t} (1 - beta_s) for t = 0..T; nothing is noisy at t = 0."""

    beta: list[float]
    alpha_bar: list[float]


def linear_schedule(num_steps: int) -> Schedule:
    """beta from 0.0001 to 0.02 in 1000 steps (Ho et al. 2020); in fewer steps it is larger in proportion."""
    beta = np.minimum(1000 / num_steps * np.linspace(1e-4, 2e-2, num_steps), 0.999)  # (T,)
    return Schedule([0.0, *beta.tolist()], [1.0, *np.cumprod(1 - beta).tolist()])


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


def approximate_action(x_t: Tensor, t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """a_hat = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t), clipped to [-1, 1] (D12; Eq. 9)."""
    alpha_bar_t = alpha_bar[t].unsqueeze(1)  # (batch, 1)
    return ((x_t - (1 - alpha_bar_t).sqrt() * eps) / alpha_bar_t.sqrt()).clamp(-1, 1)


def elbo_weights(schedule: Schedule) -> Tensor:
    """beta_t / (2 (1 - beta_t) (1 - alpha_bar_t)) for t = 0..T, times a factor: their mean is 1 (Eq. 12)."""
    beta, alpha_bar = np.array(schedule)[:, 1:]
    weights = beta / (2 * (1 - beta) * (1 - alpha_bar))  # (T,)
    return torch.tensor([0.0, *(weights / weights.mean()).tolist()])


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


class SolverCall(NamedTuple):
    """One network call of the DPM-Solver, and the weights of the sum that leads on from there."""

    t: float  # timestep of the call, in 1..T; may lie between two
    clip_t: int  # the whole timestep whose alpha_bar the noise is clipped by
    x_weight: float  # of x where the step began, x_s
    eps_weight: float  # of the noise where the step began, eps_s
    change_weight: float  # of what the noise has changed by since then, eps - eps_s


def dpm_solver_plan(schedule: Schedule, num_calls: int) -> list[list[SolverCall]]:
    """The steps of DPM-Solver (Lu et al. 2022, third order, singlestep) from timestep T to 1, evenly spaced.

    A step of order m makes m network calls; all but the last one or two have order 3. From s, where a step
    begins, a call leads on to t. With alpha^2 = alpha_bar = 1 - sigma^2 and h the growth of log(alpha/sigma)
        x_t = alpha_t / alpha_s x_s - sigma_t (e^h - 1) eps_s - change_weight (eps - eps_s).
    UserError: there are too few timesteps.
    """
    num_steps = len(schedule.alpha_bar) - 1
    if num_steps < max(2, num_calls):
        raise UserError(f"--dpm-calls is {num_calls}; it needs --diffusion-steps {max(2, num_calls)} or more")
    full_steps, rest = divmod(num_calls, 3)
    orders = [3] * full_steps + [rest] if rest else [3] * (full_steps - 1) + [2, 1]
    ends = np.linspace(num_steps, 1, num_calls + 1)[np.cumsum([0, *orders])]
    plan = []
    for order, (start, end) in zip(orders, pairwise(ends), strict=True):
        t = np.linspace(start, end, order + 1)  # (order + 1,), a call at each but the last
        log_alpha = np.interp(t, np.arange(num_steps + 1), 0.5 * np.log(schedule.alpha_bar))
        sigma = np.sqrt(-np.expm1(2 * log_alpha))
        half_log_snr = log_alpha - np.log(sigma)
        h = half_log_snr[1:] - half_log_snr[0]  # (order,)
        x_weight = np.exp(log_alpha[1:] - log_alpha[0])
        eps_weight = sigma[1:] * np.expm1(h)
        phi = np.expm1(h) / 2 if order == 2 else np.expm1(h) / h - 1  # phi_2 of the paper
        change_weight = np.append(0, sigma[2:] * phi[1:] * h[1:] / h[:-1])
        weights = np.stack([x_weight, eps_weight, change_weight], axis=1)  # (order, 3)
        calls = zip(t[:-1].tolist(), weights.tolist(), strict=True)
        plan.append([SolverCall(time, math.floor(time + 1e-6), *each) for time, each in calls])
    return plan


def dpm_sample(predict_noise: Callable, x: Tensor, schedule: Schedule, plan: list[list]) -> Tensor:
    """DPM-Solver along a dpm_solver_plan, from x = x_T (batch, action_dim); keeps x_0 in [-1, 1] (D7)."""

    def clipped_noise(x: Tensor, call: SolverCall) -> Tensor:
        alpha_bar = schedule.alpha_bar[call.clip_t]
        signal, spread = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        return torch.clamp(predict_noise(x, call.t), (x - signal) / spread, (x + signal) / spread)

    for first, *others in plan:
        x_start, eps_start = x, clipped_noise(x, first)  # (batch, action_dim)
        x = first.x_weight * x_start - first.eps_weight * eps_start
        for call in others:
            eps = clipped_noise(x, call)  # (batch, action_dim)
            x = call.x_weight * x_start - call.eps_weight * eps_start - call.change_weight * (eps - eps_start)
    return x


class EDPNoisePredictor(nn.Module):
    """eps_theta(s, x_t, t): the noise in the noisy action x_t at timestep t, which may lie between two."""

    def __init__(self, obs_dim: int, action_dim: int, time_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        frequencies = torch.exp(-torch.arange(time_dim // 2) * math.log(10_000) / (time_dim // 2))  # D18
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time_mlp = nn.ModuleList([nn.Linear(time_dim, 2 * time_dim), nn.Linear(2 * time_dim, time_dim)])
        sizes = pairwise((obs_dim + action_dim + time_dim, *hidden_dims, action_dim))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)

    def forward(self, obs: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """obs (batch, obs_dim), x_t (batch, action_dim), t (batch,) or (1,) for one timestep in all rows."""
        angles = (t.unsqueeze(1) - 1) * self.frequencies  # (batch or 1, time_dim / 2); from 0: D18
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1)  # (batch or 1, time_dim)
        embedding = self.time_mlp[1](mish(self.time_mlp[0](embedding)))
        embedding = embedding.expand(len(obs), -1)  # (batch, time_dim)
        x = torch.cat([obs, x_t, embedding], dim=1)  # (batch, obs_dim + action_dim + time_dim)
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


def init_lecun(network: nn.Module) -> None:
    """Normal weights of variance 1 / n_in, truncated at two standard deviations, and zero biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | EnsembleLinear):
            n_in = layer.weight.shape[1]  # of (n_out, n_in) and of (num_members, n_in, n_out)
            std = n_in**-0.5 / 0.87962566  # which truncation takes back to n_in**-0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)


def polyak_update(target: nn.Module, online: nn.Module, tau: float | Tensor) -> None:
    """target <- tau * online + (1 - tau) * target."""
    with torch.no_grad():
        for target_parameter, parameter in zip(target.parameters(), online.parameters(), strict=True):
            target_parameter.lerp_(parameter, tau)


def clip_by_global_norm(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scale gradients whose joint norm is above max_norm down to it, exactly; returns the norm before."""
    norm = nn.utils.get_total_norm(gradients)
    scale = (max_norm / norm).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
    return norm


# === Agent ===
class Batch(NamedTuple):
    """Transitions on the device, float32."""

    obs: Tensor  # (batch, obs_dim)
    action: Tensor  # (batch, action_dim)
    reward: Tensor  # (batch,)
    next_obs: Tensor  # (batch, obs_dim)
    terminal: Tensor  # (batch,)


class Draws(NamedTuple):
    """Every random number of one EDP update; noise_steps is T for ddpm, 1 for dpm, which adds none."""

    next_action_noise: Tensor  # (noise_steps, batch, action_dim)
    t: Tensor  # (batch,), uniform in 1..T
    eps: Tensor  # (batch, action_dim)
    advantage_noise: Tensor  # (num_advantage_samples, batch, action_dim)


class EDPCRR(nn.Module):
    """EDP + CRR for observations of obs_dim numbers and actions in [-1, 1]^action_dim."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        make_schedule = vp_schedule if args.noise_schedule == "vp" else linear_schedule
        self.schedule = make_schedule(args.diffusion_steps)
        self.sigma = posterior_std(self.schedule)  # not Eq. 4's beta: D11
        self.noise_steps = args.diffusion_steps if args.sampler == "ddpm" else 1
        if args.sampler == "dpm":  # as in the paper; the code's default is ddpm: D1
            self.plan = dpm_solver_plan(self.schedule, args.dpm_calls)
        self.actor = EDPNoisePredictor(obs_dim, action_dim, args.time_dim, args.hidden_dims)
        self.critic = EnsembleCritic(obs_dim, action_dim, 2, args.hidden_dims)
        init_lecun(self)  # as in the official code: D18
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("actor_tau", torch.tensor(0.0))
        self.register_buffer("elbo_weights", elbo_weights(self.schedule), persistent=False)
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
        counted = (step + 1) % self.args.actor_target_every == 0
        moves = counted and step >= self.args.actor_target_start  # D13: first in the 1,005th update
        self.actor_tau.fill_(self.args.tau if moves else 0.0)  # 0 leaves the target actor as it is

    def draw(self, batch_size: int) -> Draws:
        """Fresh random numbers for one update."""
        num_samples = self.args.num_advantage_samples
        return Draws(
            next_action_noise=torch.randn(self.noise_steps, batch_size, self.action_dim, device=self.device),
            t=torch.randint(1, self.args.diffusion_steps + 1, (batch_size,), device=self.device),
            eps=torch.randn(batch_size, self.action_dim, device=self.device),
            advantage_noise=torch.randn(num_samples, batch_size, self.action_dim, device=self.device),
        )

    def sample(self, actor: EDPNoisePredictor, obs: Tensor, noise: Tensor, scale: float = 1.0) -> Tensor:
        """One action per row of obs from the actor's chain; noise (noise_steps, batch, action_dim)."""

        def predict_noise(x: Tensor, t: float) -> Tensor:
            eps = actor(obs, x, torch.full((1,), t, dtype=x.dtype, device=self.device))  # (batch, action_dim)
            return eps if scale == 1 else scale * eps

        if self.args.sampler == "dpm":
            return dpm_sample(predict_noise, noise[0], self.schedule, self.plan)
        return ddpm_sample(predict_noise, noise, self.schedule, self.sigma)

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """sum_i mean (Q_i(s, a) - y)^2 (Eq. 6) with y = r + gamma (1 - d) min_i Q'_i(s', a') (Eq. 14)."""
        with torch.no_grad():
            next_action = self.sample(self.actor_target, batch.next_obs, draws.next_action_noise)  # D13: slow
            next_value = self.critic_target(batch.next_obs, next_action).amin(0)  # (batch,)
            target = batch.reward + self.args.gamma * (1 - batch.terminal) * next_value  # (batch,)
        q = self.critic(batch.obs, batch.action)  # (2, batch)
        loss = (q - target).square().mean(1).sum()
        return loss, {"critic_loss": loss, "q_mean": q.mean()}

    def advantage(self, batch: Batch, actions: Tensor) -> Tensor:
        """min_i Q_i(s, a) less its mean over other actions, (n, batch, action_dim): Eq. 21, mended (D8)."""
        n = len(actions)
        q = self.critic(batch.obs, batch.action).amin(0)  # (batch,)
        others = self.critic(batch.obs.repeat(n, 1), actions.flatten(0, 1)).amin(0)  # (n * batch,)
        return q - others.unflatten(0, (n, -1)).mean(0)

    def actor_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """L_diff + lambda L_pi (Alg. 1), L_diff = mean (eps_theta(s, x_t, t) - eps)^2 (Eq. 5, a sum: D10).

        L_pi = -mean f log pi(a | s) (Eq. 20), f = min(exp(A / beta), max_weight), A the advantage.
        """
        x_t = add_noise(batch.action, draws.t, draws.eps, self.alpha_bar)  # (batch, action_dim); Eq. 8
        eps = self.actor(batch.obs, x_t, draws.t)  # (batch, action_dim)
        bc_loss = F.mse_loss(eps, draws.eps)
        action = approximate_action(x_t, draws.t, eps, self.alpha_bar)  # (batch, action_dim)
        with torch.no_grad():
            advantage = self.advantage(batch, action + draws.advantage_noise)  # (batch,)
            weight = (advantage / self.args.temperature).exp().clamp(max=self.args.max_weight)  # bound: D6
        if self.args.likelihood == "elbo":
            log_prob = -self.elbo_weights[draws.t] * (eps - draws.eps).square().mean(1)  # mean weight 1: D9
        else:
            log_prob = -0.5 * ((batch.action - action).square() + math.log(2 * math.pi)).sum(1)  # D9
        guidance_loss = -(weight * log_prob).mean()
        loss = bc_loss + self.args.guidance_weight * guidance_loss  # lambda of Table 3: D4
        metrics = {"actor_loss": loss, "bc_loss": bc_loss, "guidance_loss": guidance_loss}
        return loss, metrics | {"advantage": advantage.mean(), "weight": weight.mean()}

    def update(self, data: Batch) -> dict[str, Tensor]:
        """One gradient step on random rows of the data: tensor operations only, no host sync; 0-d metrics."""
        rows = torch.randint(len(data.reward), (self.args.batch_size,), device=self.device)  # (batch,)
        batch, draws = Batch(*(column[rows] for column in data)), self.draw(self.args.batch_size)

        # The actor, before the critics: D14
        loss, metrics = self.actor_loss(batch, draws)
        self.optimizers["actor"].zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in self.actor.parameters()]
        metrics["actor_grad_norm"] = clip_by_global_norm(gradients, self.args.max_grad_norm)
        self.optimizers["actor"].step()

        # The critics, each with a limit of its own: D3
        loss, critic_metrics = self.critic_loss(batch, draws)
        self.optimizers["critic"].zero_grad()
        loss.backward()
        members = [[parameter.grad[i] for parameter in self.critic.parameters()] for i in range(2)]
        norms = [clip_by_global_norm(gradients, self.args.max_grad_norm) for gradients in members]
        critic_metrics["critic_grad_norm"] = torch.stack(norms).mean()
        self.optimizers["critic"].step()

        # The targets
        polyak_update(self.actor_target, self.actor, self.actor_tau)
        polyak_update(self.critic_target, self.critic, self.args.tau)
        return {name: value.detach() for name, value in (metrics | critic_metrics).items()}

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """For each of obs (batch, obs_dim) one of n actions, drawn by softmax of min_i Q_i (Alg. 2)."""
        n = self.args.num_action_samples
        obs = obs.repeat_interleave(n, dim=0)  # (batch * n, obs_dim)
        if noise is None:
            noise = torch.randn(self.noise_steps, len(obs), self.action_dim, device=self.device)
            noise[0] *= self.args.noise_scale
        actions = self.sample(self.actor, obs, noise, self.args.policy_scale)  # (batch * n, action_dim)
        q = self.critic(obs, actions).amin(0).unflatten(0, (-1, n))  # (batch, n); of min Q: D2
        chosen = torch.multinomial(q.softmax(1), 1)  # (batch, 1)
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
    actions = dataset.actions.clip(-0.999, 0.999)  # as in the official code: D15
    rewards = tune_rewards(dataset, args.reward_tune)  # D16: per domain
    columns = (dataset.observations, actions, rewards, dataset.next_observations, dataset.terminals)
    data = Batch(*(torch.as_tensor(column, device=device) for column in columns))

    agent = EDPCRR(data.obs.shape[1], data.action.shape[1], args, device)
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
                run.log_evaluation(evaluate(agent, envs))  # eval/*
            if run.reached(args.save_every):
                run.save()  # agent, optimizers, random state, results
    return run.results


if __name__ == "__main__":
    run_command(train, Args, TASK_SETTINGS)
