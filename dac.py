"""Diffusion Actor-Critic (DAC): offline reinforcement learning with a diffusion policy.

Paper: Fang, Liu, Zhang, Wang, Jing: Diffusion Actor-Critic: Formulating Constrained Policy Iteration as
Diffusion Noise Regression for Offline Reinforcement Learning, 2024, arXiv 2405.20555.
docs/dac.md explains it and lists what to know about the authors' code and this file (D1, ...).

    python dac.py                                 # the bundled hopper-mini-v0, minutes on a CPU
    python dac.py --env-id hopper-medium-v2       # a D4RL task with the authors' settings
    python dac.py --resume runs/<run>             # go on where a run stopped

The best policy within a KL distance of the behaviour policy is again a diffusion model; its noise is that of
the behaviour, shifted against the gradient of Q (the paper's Theorem 1). So the actor regresses on noise with
"soft Q-guidance"; no gradient runs through the denoising chain.

In shapes: num_qs is the paper's H, T is diffusion_steps. Timesteps are 1..T; t = 0 is the clean action.
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

from common.cli import Even, Finite, NonNegative, Positive, Threads, UnitInterval, run_command
from common.datasets import RewardRule, load_dataset, tune_rewards
from common.devices import cuda_graphed, mish, use_device
from common.envs import make_envs
from common.runs import Run, stop_if_asked
from common.tasks import find_task

EVAL_SEED = 10_000  # evaluation episodes are seeded EVAL_SEED, EVAL_SEED + 1, ...
EPS = 1e-6  # keeps divisions by Q finite


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
    eval_every: Positive[int] = 10_000  # steps between evaluations
    eval_episodes: NonNegative[int] = 10  # episodes per evaluation, side by side; 0: no evaluation
    log_every: Positive[int] = 500  # steps between two points of the loss curves; a point is their mean
    save_every: Positive[int] = 10_000  # steps between checkpoints
    run_dir: str = "runs"  # folder that receives one folder per run
    resume: str | None = None  # continue this checkpoint or run folder; arguments given now replace its own

    # --- DAC ---
    diffusion_steps: Positive[int] = 5  # denoising steps, T
    hidden_dims: tuple[Positive[int], ...] = (256, 256, 256)  # hidden units per layer of actor and critics
    time_dim: Even[int] = 16  # features of the timestep
    num_qs: Positive[int] = 10  # critics in the ensemble, H
    rho: Finite[float] = 1.0  # pessimism: standard deviations below the ensemble's mean
    num_q_samples: Positive[int] = 10  # actions sampled per next state for the target value
    max_q_backup: bool = False  # take the best of the sampled next actions instead of their mean
    q_guidance: Literal["soft", "hard", "denoised", "none"] = "soft"  # how Q enters the actor loss; none: BC
    eta: NonNegative[float] = 1.0  # weight of the behaviour-cloning loss; where eta_lr > 0, its start
    eta_lr: NonNegative[float] = 1e-3  # step size of the dual ascent on eta; 0 keeps eta fixed
    eta_min: NonNegative[float] = 1e-3  # lower bound of eta
    eta_max: NonNegative[float] = 100.0  # upper bound of eta
    bc_threshold: NonNegative[float] = 1.0  # eta grows while the behaviour-cloning loss is above this, b
    actor_lr: NonNegative[float] = 3e-4  # learning rate of the actor; falls to 0 along a cosine
    critic_lr: NonNegative[float] = 3e-4  # learning rate of the critics; falls likewise
    max_grad_norm: Positive[float] = 1.0  # limit of the global gradient norm, per optimizer
    actor_target_every: Positive[int] = 5  # steps between updates of the target actor
    actor_target_start: NonNegative[int] = 1000  # finished steps before the target actor moves
    num_action_samples: Positive[int] = 10  # candidate actions per state when acting; the best by Q is taken
    reward_tune: RewardRule = "iql_locomotion"  # training rewards: returns span 1,000, in mazes too: D8


# fmt: off
# From runs.sh of the official code, which evaluates on 10 episodes everywhere (D9).
ANTMAZE = dict(eta=0.1, eta_lr=0.0, max_q_backup=True)
TASK_SETTINGS = {
    "walker2d-medium-v2":           dict(eta=1.0, rho=1.0, bc_threshold=1.00),
    "walker2d-medium-replay-v2":    dict(eta=1.0, rho=1.0, bc_threshold=1.00),
    "walker2d-medium-expert-v2":    dict(eta=1.0, rho=1.0, bc_threshold=1.00),
    "hopper-medium-v2":             dict(eta=1.0, rho=1.5, bc_threshold=1.00),
    "hopper-medium-replay-v2":      dict(eta=1.0, rho=1.5, bc_threshold=1.00),
    "hopper-medium-expert-v2":      dict(eta=1.0, rho=1.5, bc_threshold=0.05),
    "halfcheetah-medium-v2":        dict(eta=1.0, rho=0.0, bc_threshold=1.00),
    "halfcheetah-medium-replay-v2": dict(eta=1.0, rho=0.0, bc_threshold=1.00),
    "halfcheetah-medium-expert-v2": dict(eta=1.0, rho=0.0, bc_threshold=0.10),
    "antmaze-umaze-v0":             ANTMAZE | dict(rho=1.0),
    "antmaze-umaze-diverse-v0":     ANTMAZE | dict(rho=1.0),
    "antmaze-medium-play-v0":       ANTMAZE | dict(rho=1.0),
    "antmaze-medium-diverse-v0":    ANTMAZE | dict(rho=1.0),
    "antmaze-large-play-v0":        ANTMAZE | dict(rho=1.1, critic_lr=1e-3),
    "antmaze-large-diverse-v0":     ANTMAZE | dict(rho=1.0, critic_lr=1e-3),
    # Ours: the other tasks of a domain, and our own tasks, which are learned in minutes on a CPU.
    "antmaze": ANTMAZE,
    "adroit":  dict(eta_lr=0.0, eval_episodes=100),
    "kitchen": dict(eta_lr=0.0, eval_episodes=100),
    "hopper-mini-v0": dict(total_steps=5_000, eval_every=2_500, tau=0.05, hidden_dims=(128, 128, 128),
                           actor_lr=1e-3, critic_lr=1e-3, num_qs=2, num_q_samples=1, eta=0.3, eta_lr=0.0),
    "bandit": dict(total_steps=2_500, eval_every=500, batch_size=128, tau=0.05, hidden_dims=(64, 64, 64),
                   diffusion_steps=10, actor_lr=3e-3, critic_lr=1e-2, num_qs=2, num_q_samples=1, eta=8.0,
                   eta_lr=0.0, reward_tune="antmaze100", num_action_samples=1_000),
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


class DACNoisePredictor(nn.Module):
    """eps_theta(s, x_t, t): the noise in the noisy action x_t at timestep t."""

    def __init__(self, obs_dim: int, action_dim: int, time_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        frequencies = torch.exp(-torch.arange(time_dim // 2) * math.log(10_000) / (time_dim // 2 - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        width = 2 * time_dim  # of the embedded timestep
        self.time_mlp = nn.ModuleList([nn.Linear(time_dim, width), nn.Linear(width, width)])
        sizes = pairwise((obs_dim + action_dim + width, *hidden_dims, action_dim))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)

    def forward(self, obs: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """obs (batch, obs_dim), x_t (batch, action_dim), t (batch,) or (1,) for one timestep in all rows."""
        angles = t.unsqueeze(1) * self.frequencies  # (batch or 1, time_dim / 2)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1)  # (batch or 1, time_dim)
        embedding = self.time_mlp[1](mish(self.time_mlp[0](embedding)))  # (batch or 1, 2 * time_dim)
        embedding = embedding.expand(len(obs), -1)  # (batch, 2 * time_dim)
        x = torch.cat([obs, x_t, embedding], dim=1)  # (batch, obs_dim + action_dim + 2 * time_dim)
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


def init_xavier(network: nn.Module) -> None:
    """Uniform weights of variance 2 / (n_in + n_out) (Glorot & Bengio 2010), zero biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | EnsembleLinear):
            for member in layer.weight if isinstance(layer, EnsembleLinear) else [layer.weight]:
                nn.init.xavier_uniform_(member)
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
    """Every random number of one DAC update."""

    next_action_noise: Tensor  # (T, batch * num_q_samples, action_dim)
    t: Tensor  # (batch,), uniform in 1..T
    eps: Tensor  # (batch, action_dim)
    action_noise: Tensor  # (T, batch or 0, action_dim), empty without denoised guidance


class DAC(nn.Module):
    """Diffusion Actor-Critic for observations of obs_dim numbers and actions in [-1, 1]^action_dim."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.schedule = vp_schedule(args.diffusion_steps)
        self.sigma = [math.sqrt(beta) for beta in self.schedule.beta]  # not the posterior's: D1
        self.actor = DACNoisePredictor(obs_dim, action_dim, args.time_dim, args.hidden_dims)
        self.critic = EnsembleCritic(obs_dim, action_dim, args.num_qs, args.hidden_dims)
        init_xavier(self)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("eta", torch.tensor(float(args.eta)), persistent=args.eta_lr > 0)
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
        decay = 0.5 * (1 + math.cos(math.pi * min(step / self.args.total_steps, 1)))  # half a cosine
        self.optimizers["actor"].param_groups[0]["lr"].fill_(self.args.actor_lr * decay)
        self.optimizers["critic"].param_groups[0]["lr"].fill_(self.args.critic_lr * decay)
        moves = step > self.args.actor_target_start and step % self.args.actor_target_every == 0  # D5: 1,005
        self.actor_tau.fill_(self.args.tau if moves else 0.0)  # 0 leaves the target actor as it is

    def draw(self, batch_size: int) -> Draws:
        """Fresh random numbers for one update."""
        num_steps, device = self.args.diffusion_steps, self.device
        next_rows = batch_size * self.args.num_q_samples
        chain_rows = batch_size if self.args.q_guidance == "denoised" else 0
        return Draws(
            next_action_noise=torch.randn(num_steps, next_rows, self.action_dim, device=device),
            t=torch.randint(1, num_steps + 1, (batch_size,), device=device),
            eps=torch.randn(batch_size, self.action_dim, device=device),
            action_noise=torch.randn(num_steps, chain_rows, self.action_dim, device=device),
        )

    def sample(self, actor: DACNoisePredictor, obs: Tensor, noise: Tensor) -> Tensor:
        """One action per row of obs from the actor's reverse chain; noise (T, batch, action_dim)."""

        def predict_noise(x: Tensor, t: int) -> Tensor:
            return actor(obs, x, torch.full((1,), t, device=self.device))

        return ddpm_sample(predict_noise, noise, self.schedule, self.sigma)

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """mean (Q_h(s, a) - y)^2 over heads h and rows, y = r + gamma (1 - d) (mean_h v_h - rho std_h v_h).

        v_h is the mean (max_q_backup: the maximum) of Q'_h(s', a') over actions a' of the target actor.
        """
        with torch.no_grad():
            n = self.args.num_q_samples
            next_obs = batch.next_obs.repeat_interleave(n, dim=0)  # (batch * n, obs_dim)
            next_action = self.sample(self.actor_target, next_obs, draws.next_action_noise)
            next_q = self.critic_target(next_obs, next_action).unflatten(1, (-1, n))  # (num_qs, batch, n)
            next_q = next_q.amax(2) if self.args.max_q_backup else next_q.mean(2)  # (num_qs, batch)
            next_value = next_q.mean(0) - self.args.rho * next_q.std(0, correction=0)  # (batch,)
            target = batch.reward + self.args.gamma * (1 - batch.terminal) * next_value  # (batch,)
        q = self.critic(batch.obs, batch.action)  # (num_qs, batch)
        loss = F.mse_loss(q, target.expand_as(q))  # mean over heads, too: D4
        return loss, {"critic_loss": loss, "q_mean": q.mean(), "q_std": q.std(0, correction=0).mean()}

    def actor_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """eta mean (eps_theta(s, x_t, t) - eps)^2 + guidance, with x_t a noisy action of the data."""
        x_t = add_noise(batch.action, draws.t, draws.eps, self.alpha_bar)  # (batch, action_dim)
        eps_theta = self.actor(batch.obs, x_t, draws.t)  # (batch, action_dim)
        bc_loss = F.mse_loss(eps_theta, draws.eps)
        loss, metrics = self.eta * bc_loss, {"bc_loss": bc_loss, "eta": self.eta.clone()}
        if self.args.q_guidance != "none":  # behaviour cloning: D10
            metrics |= self.guidance(batch, draws, x_t, eps_theta)
            loss = loss + metrics["guidance_loss"]
        return loss, {"actor_loss": loss} | metrics

    def guidance(self, batch: Batch, draws: Draws, x_t: Tensor, eps_theta: Tensor) -> dict[str, Tensor]:
        """The guidance term, by which eps_theta raises Q, and metrics; every divisor has + EPS.

        soft      mean sqrt(1 - alpha_bar_t) G eps_theta with G = grad_x mean_h Q'_h(s, x_t) / mean |Q'(s, a)|
        hard      mean G eps_theta
        denoised  -mean Q'(s, a_theta) / mean |Q'(s, a)|, with a_theta sampled through the whole chain
        """
        q_norm = self.critic_target(batch.obs, batch.action).abs().mean()
        if self.args.q_guidance == "denoised":
            action = self.sample(self.actor, batch.obs, draws.action_noise)  # (batch, action_dim)
            loss = -self.critic_target(batch.obs, action).mean() / (q_norm + EPS)
        else:
            x_t = x_t.detach().requires_grad_()
            q = self.critic_target(batch.obs, x_t).mean(0)  # (batch,)
            gradient = torch.autograd.grad(q.sum(), x_t)[0] / (q_norm + EPS)  # at x_t: D2
            if self.args.q_guidance == "soft":
                gradient = (1 - self.alpha_bar[draws.t]).sqrt().unsqueeze(1) * gradient
            loss = (gradient * eps_theta).mean()
        return {"guidance_loss": loss, "q_norm": q_norm}

    def update(self, data: Batch) -> dict[str, Tensor]:
        """One gradient step on random rows of the data: tensor operations only, no host sync; 0-d metrics."""
        rows = torch.randint(len(data.reward), (self.args.batch_size,), device=self.device)  # may repeat: D7
        batch, draws = Batch(*(column[rows] for column in data)), self.draw(self.args.batch_size)

        # The critics, and their targets: the actor climbs the new ones
        loss, metrics = self.critic_loss(batch, draws)
        self.optimizers["critic"].zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in self.critic.parameters()]
        metrics["critic_grad_norm"] = clip_by_global_norm(gradients, self.args.max_grad_norm)
        self.optimizers["critic"].step()
        polyak_update(self.critic_target, self.critic, self.args.tau)

        # The actor
        loss, actor_metrics = self.actor_loss(batch, draws)
        self.optimizers["actor"].zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in self.actor.parameters()]
        metrics["actor_grad_norm"] = clip_by_global_norm(gradients, self.args.max_grad_norm)
        self.optimizers["actor"].step()
        if self.args.eta_lr > 0:  # by the loss before that step: D3
            violation = (actor_metrics["bc_loss"].detach() - self.args.bc_threshold).clamp(-1, 1)
            self.eta.add_(self.args.eta_lr * violation).clamp_(self.args.eta_min, self.args.eta_max)
        polyak_update(self.actor_target, self.actor, self.actor_tau)
        return {name: value.detach() for name, value in (metrics | actor_metrics).items()}

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """For each of obs (batch, obs_dim) the best of num_action_samples actions, by mean_h Q'_h(s, a)."""
        n = self.args.num_action_samples
        obs = obs.repeat_interleave(n, dim=0)  # (batch * n, obs_dim)
        if noise is None:
            noise = torch.randn(self.args.diffusion_steps, len(obs), self.action_dim, device=self.device)
        actions = self.sample(self.actor, obs, noise)  # (batch * n, action_dim)
        q = self.critic_target(obs, actions).mean(0).unflatten(0, (-1, n))  # (batch, n)
        best = q.argmax(1, keepdim=True)  # (batch, 1)
        return actions.unflatten(0, (-1, n)).take_along_dim(best.unsqueeze(2), dim=1).squeeze(1)


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
    actions = dataset.actions.clip(-1 + 1e-5, 1 - 1e-5)  # as in the official code: D6
    rewards = tune_rewards(dataset, args.reward_tune)
    columns = (dataset.observations, actions, rewards, dataset.next_observations, dataset.terminals)
    data = Batch(*(torch.as_tensor(column, device=device) for column in columns))

    agent = DAC(data.obs.shape[1], data.action.shape[1], args, device)
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
