"""Q-weighted Variational Policy Optimization (QVPO): online reinforcement learning with a diffusion policy.

Paper: Ding, Hu, Zhang, Ren, Zhang, Yu, Wang, Shi: Diffusion-based Reinforcement Learning via Q-weighted
Variational Policy Optimization, 2024, arXiv 2405.16173. Equation numbers in this file are the paper's.
docs/qvpo_online.md has the idea, the logged metrics, the results and the differences D1, D2, ... named here.

    python qvpo_online.py                                 # Hopper-v4, published settings: a GPU's work
    python qvpo_online.py --env-id InvertedPendulum-v5    # our own settings, minutes on a CPU
    python qvpo_online.py --resume runs/<run>             # go on where a run stopped

The policy learns from its own samples: of many candidate actions per state the best by Q becomes the training
data of the diffusion model, weighted by its advantage over the average candidate. Uniform actions with a
small share of that weight keep the policy wide. To act, the best of a few samples is taken.

In shapes: T is diffusion_steps, n counts actions of one state. Timesteps are 1..T; t = 0 is the clean action.
"""

import math
import os
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
from torch import Tensor, nn

from common.cli import Even, NonNegative, Positive, Threads, UnitInterval, UserError, run_command
from common.devices import cuda_graphed, mish, use_device
from common.envs import make_envs
from common.runs import Run, stop_if_asked
from common.tasks import find_task

EVAL_SEED = 10_000  # evaluation episodes are seeded EVAL_SEED, EVAL_SEED + 1, ...


# === Args ===
@dataclass
class Args:
    """The defaults are the official code's; a task's row of TASK_SETTINGS replaces some of them (D2)."""

    env_id: str = "Hopper-v4"  # task: a Gymnasium id with Box spaces, or bandit-<pattern>-v0
    env_kwargs: tuple[str, ...] = ()  # for gymnasium.make, key=value: max_episode_steps=500
    seed: NonNegative[int] = 0  # seed of initial weights, batches and noise
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:<i>
    num_threads: Threads[int] = 1  # threads on a CPU; the networks are too small to gain from more
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products, as in PyTorch
    compile: bool = False  # compile the losses with torch.compile
    cuda_graph: bool = True  # on CUDA, replay the whole update as one CUDA graph; not yet tried on a GPU
    total_steps: Positive[int] = 1_000_000  # environment steps; from learning_starts on with an update each
    batch_size: Positive[int] = 256  # transitions per gradient step, drawn with replacement
    gamma: UnitInterval[float] = 0.99  # discount factor
    tau: UnitInterval[float] = 0.005  # step of the target networks towards the online ones
    eval_every: Positive[int] = 10_000  # steps between evaluations
    eval_episodes: NonNegative[int] = 10  # episodes per evaluation, side by side; 0: no evaluation
    log_every: Positive[int] = 500  # steps between two points of the loss curves; a point is their mean
    save_every: Positive[int] = 1_000  # steps between checkpoints
    run_dir: str = "runs"  # folder that receives one folder per run
    resume: str | None = None  # continue this checkpoint or run folder; arguments given now replace its own

    # --- QVPO ---
    learning_starts: NonNegative[int] = 10_000  # random actions before the first update
    replay_size: Positive[int] = 1_000_000  # transitions kept; the oldest are replaced
    time_limit_is_terminal: bool = False  # no value after a time limit, as in the official code: D1
    diffusion_steps: Positive[int] = 20  # denoising steps, T
    hidden_dims: tuple[Positive[int], ...] = (256, 256, 256)  # hidden units per layer; two in the paper: D3
    time_dim: Even[int] = 32  # features of the timestep
    num_behavior_samples: Positive[int] = 4  # candidates per action taken while learning, K_b
    num_target_samples: Positive[int] = 4  # candidates per next state for the target value, K_t
    num_train_samples: Positive[int] = 64  # candidates per state for the actor loss, N_d
    num_chosen: Positive[int] = 1  # how many of these, the best, the actor learns from
    num_entropy_samples: NonNegative[int] = 10  # uniform actions beside each of the chosen ones, N_e
    num_action_samples: Positive[int] = 32  # candidates per action in an evaluation
    weight: Literal["qadv", "qcut"] = "qadv"  # from Q to the weight of an action in the actor loss
    weight_cut: NonNegative[float] = 1.0  # lower bound of the weight for qcut
    entropy_weight: Positive[float] = 0.02  # weight of a uniform action relative to a chosen one, at first
    entropy_weight_min: NonNegative[float] = 0.002  # ... falls to 0 over total_steps, but not below this
    actor_lr: NonNegative[float] = 1e-4  # learning rate of the actor
    critic_lr: NonNegative[float] = 3e-4  # learning rate of the critics
    adam_eps: Positive[float] = 1e-5  # epsilon of Adam
    max_grad_norm: Positive[float] = 2.0  # limit of the global gradient norm, per optimizer; the code's: D9


# fmt: off
PENDULUM = dict(total_steps=10_000, eval_every=1_000, learning_starts=1_000, diffusion_steps=10, tau=0.01,
                hidden_dims=(64, 64, 64), num_train_samples=16, actor_lr=1e-3, critic_lr=1e-3)
TASK_SETTINGS = {
    # The paper's Table 3, which has -v3 of these environments (D12) and a constant entropy weight (D2).
    "Ant-v4":         dict(num_target_samples=2, entropy_weight=0.01, entropy_weight_min=0.01),
    "HalfCheetah-v4": dict(num_target_samples=4, entropy_weight=0.01, entropy_weight_min=0.01),
    "Hopper-v4":      dict(num_target_samples=1, entropy_weight=0.01, entropy_weight_min=0.01),
    "Humanoid-v4":    dict(num_target_samples=2, entropy_weight=0.01, entropy_weight_min=0.01),
    "Walker2d-v4":    dict(num_target_samples=2, entropy_weight=0.01, entropy_weight_min=0.01),
    # Ours, to learn in minutes on a CPU.
    "InvertedPendulum-v5": PENDULUM,
    "Pendulum-v1": PENDULUM,
    "bandit": dict(total_steps=2_500, eval_every=500, learning_starts=1_000, diffusion_steps=5, tau=0.05,
                   hidden_dims=(64, 64, 64), num_train_samples=16, actor_lr=3e-4, critic_lr=1e-2),
}
# fmt: on


# === Diffusion ===
class Schedule(NamedTuple):
    """beta_t and alpha_bar_t = prod_{s <= t} (1 - beta_s) for t = 0..T; nothing is noisy at t = 0."""

    beta: list[float]
    alpha_bar: list[float]


def cosine_schedule(num_steps: int) -> Schedule:
    """alpha_bar_t falls like a squared cosine (Nichol & Dhariwal 2021), in num_steps steps."""
    t = np.arange(num_steps + 1)
    f = np.cos((t / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2  # (T + 1,)
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)  # (T,)
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


class QVPONoisePredictor(nn.Module):
    """eps_theta(s, x_t, t): the noise in the noisy actions x_t at timestep t, of n actions per state.

    The first layer W (x_t, time, s) + b is computed as W_x x_t + shared, where all actions of a state that
    are at the same timestep have the same shared = W_time time + W_s s + b (D10).
    """

    def __init__(self, obs_dim: int, action_dim: int, time_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        frequencies = torch.exp(-torch.arange(time_dim // 2) * math.log(10_000) / (time_dim // 2 - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        hidden = hidden_dims[0]
        self.time_mlp = nn.ModuleList([nn.Linear(time_dim, hidden), nn.Linear(hidden, time_dim)])
        self.input_dims = (action_dim, time_dim, obs_dim)
        sizes = pairwise((sum(self.input_dims), *hidden_dims, action_dim))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)

    def shared(self, obs: Tensor, t: Tensor) -> Tensor:
        """(n, batch, hidden) of obs (batch, obs_dim) and t (n, batch, 1) or (n, 1, 1)."""
        angles = (t - 1) * self.frequencies  # the authors count from 0
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)
        embedding = self.time_mlp[1](mish(self.time_mlp[0](embedding)))
        _, time_weight, obs_weight = self.layers[0].weight.split(self.input_dims, dim=1)
        return F.linear(embedding, time_weight) + F.linear(obs, obs_weight, self.layers[0].bias)

    def forward(self, x_t: Tensor, shared: Tensor) -> Tensor:
        """x_t (n, batch, action_dim); shared as above, or (batch, hidden) at one timestep."""
        x_weight = self.layers[0].weight.split(self.input_dims, dim=1)[0]
        x = mish(F.linear(x_t, x_weight) + shared)
        for layer in self.layers[1:-1]:
            x = mish(layer(x))
        return self.layers[-1](x)


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


def init_normal(network: nn.Module) -> None:
    """Normal weights with standard deviation 1 / (2 sqrt(n_in)), not truncated (D11); zero biases."""
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

    next_action_noise: Tensor  # (T, num_target_samples, batch, action_dim)
    candidate_noise: Tensor  # (T, num_train_samples, batch, action_dim)
    uniform_actions: Tensor  # (num_chosen * num_entropy_samples, batch, action_dim), uniform in [-1, 1)
    t: Tensor  # (num_chosen + num_chosen * num_entropy_samples, batch), uniform in 1..T
    eps: Tensor  # (num_chosen + num_chosen * num_entropy_samples, batch, action_dim)


class QVPO(nn.Module):
    """QVPO for observations of obs_dim numbers and actions in [-1, 1]^action_dim."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.schedule = cosine_schedule(args.diffusion_steps)
        self.sigma = posterior_std(self.schedule)
        self.actor = QVPONoisePredictor(obs_dim, action_dim, args.time_dim, args.hidden_dims)
        self.critic = EnsembleCritic(obs_dim, action_dim, 2, args.hidden_dims)
        init_normal(self)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("entropy_weight", torch.tensor(float(args.entropy_weight)))
        self.register_buffer("num_stored", torch.tensor(1))
        self.register_buffer("alpha_bar", torch.tensor(self.schedule.alpha_bar), persistent=False)  # (T + 1,)
        self.to(device)
        self.device = device
        adam = partial(torch.optim.Adam, eps=args.adam_eps, fused=True, capturable=device.type == "cuda")
        self.optimizers = {
            "actor": adam(self.actor.parameters(), lr=torch.tensor(args.actor_lr, device=device)),
            "critic": adam(self.critic.parameters(), lr=torch.tensor(args.critic_lr, device=device)),
        }

    def set_step(self, step: int) -> None:
        """Write into tensors what depends on the number of finished steps, so that update() need not."""
        start, least = self.args.entropy_weight, self.args.entropy_weight_min
        self.entropy_weight.fill_(min(start, max(least, start * (1 - step / self.args.total_steps))))
        self.num_stored.fill_(min(step + 1, self.args.replay_size))  # the step under way has acted by then

    def draw(self, batch_size: int) -> Draws:
        """Fresh random numbers for one update."""
        args, num_steps, device = self.args, self.args.diffusion_steps, self.device
        num_uniform = args.num_chosen * args.num_entropy_samples
        shape = args.num_chosen + num_uniform, batch_size
        noise = partial(torch.randn, device=device)
        return Draws(
            next_action_noise=noise(num_steps, args.num_target_samples, batch_size, self.action_dim),
            candidate_noise=noise(num_steps, args.num_train_samples, batch_size, self.action_dim),
            uniform_actions=2 * torch.rand(num_uniform, batch_size, self.action_dim, device=device) - 1,
            t=torch.randint(1, num_steps + 1, shape, device=device),
            eps=noise(*shape, self.action_dim),
        )

    @torch.no_grad()
    def candidates(self, obs: Tensor, noise: Tensor, target: bool = False) -> tuple[Tensor, Tensor]:
        """n actions per row of obs, from noise (T, n, batch, action_dim), and the smaller Q of each."""
        actor, critic = (self.actor_target, self.critic_target) if target else (self.actor, self.critic)
        num_steps, n, batch, _ = noise.shape
        shared = actor.shared(obs, torch.arange(num_steps + 1, device=self.device).view(-1, 1, 1))

        def predict_noise(x: Tensor, t: int) -> Tensor:
            return actor(x.unflatten(0, (-1, batch)), shared[t]).flatten(0, 1)

        whole = self.device.type == "cuda" or torch.compiler.is_compiling()  # else parts for a CPU's cache
        parts = noise.split(n if whole else max(1, 1024 // batch), dim=1)
        sample = partial(ddpm_sample, predict_noise, schedule=self.schedule, sigma=self.sigma)
        actions = torch.cat([sample(part.flatten(1, 2)) for part in parts])  # (n * batch, action_dim)
        q = critic(obs.repeat(n, 1), actions).amin(0)  # (n * batch,)
        return actions.unflatten(0, (n, batch)), q.unflatten(0, (n, batch))

    def critic_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """sum_h mean (Q_h(s, a) - y)^2 with y = r + gamma (1 - d) max_k min_h Q'_h(s', a'_k).

        The a'_k are num_target_samples actions of the target actor.
        """
        _, next_q = self.candidates(batch.next_obs, draws.next_action_noise, target=True)
        target = batch.reward + self.args.gamma * (1 - batch.terminal) * next_q.amax(0)  # (batch,)
        q = self.critic(batch.obs, batch.action)  # (num_qs, batch)
        loss = (q - target).square().mean(1).sum()
        return loss, {"critic_loss": loss, "q_mean": q.mean(), "target_mean": target.mean()}

    def q_weight(self, q: Tensor, value: Tensor) -> Tensor:
        """qadv: max(Q - V, 0), Eq. 9. qcut: max(Q, weight_cut), Sec. 4.2 (D7)."""
        return (q - value).clamp(min=0) if self.args.weight == "qadv" else q.clamp(min=self.args.weight_cut)

    def choose(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The num_chosen best candidates per state and their weights; V is the mean q of all candidates."""
        actions, q = self.candidates(obs, noise)
        best_q, best = q.topk(self.args.num_chosen, dim=0)  # (num_chosen, batch)
        return actions.take_along_dim(best.unsqueeze(2), dim=0), self.q_weight(best_q, q.mean(0))

    def weighted_loss(self, obs: Tensor, action: Tensor, weight: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """mean w (eps_theta(s, x_t, t) - eps)^2, Eq. 6; obs (batch, obs_dim), the others (n, batch, ...)."""
        x_t = add_noise(action.flatten(0, 1), t.flatten(), eps.flatten(0, 1), self.alpha_bar)
        error = self.actor(x_t.view_as(eps), self.actor.shared(obs, t.unsqueeze(2))) - eps
        return (weight * error.square().mean(2)).mean()  # over the uniform ones, too: D5

    def actor_loss(self, obs: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of the best of the actor's own actions and, as entropy term, of uniform ones.

        Eq. 10: a uniform action has entropy_weight times the weight of a chosen one of its state (D6).
        """
        action, weight = self.choose(obs, draws.candidate_noise)
        metrics = {"weight": weight.mean(), "entropy_weight": self.entropy_weight.clone()}
        uniform_weight = (self.entropy_weight * weight).repeat(self.args.num_entropy_samples, 1)
        action, weight = torch.cat([action, draws.uniform_actions]), torch.cat([weight, uniform_weight])
        loss = self.weighted_loss(obs, action, weight, draws.t, draws.eps)
        return loss, {"actor_loss": loss} | metrics

    def update(self, data: Batch) -> dict[str, Tensor]:
        """One gradient step on random rows of the data: tensor operations only, no host sync; 0-d metrics."""
        # A bound of randint is a number on the host, and fixed in a CUDA graph; num_stored is on the device.
        rows = torch.randint(2**62, (2, self.args.batch_size), device=self.device) % self.num_stored
        batch, draws = Batch(*(column[rows[0]] for column in data)), self.draw(self.args.batch_size)
        max_norm = self.args.max_grad_norm
        # The critics
        loss, metrics = self.critic_loss(batch, draws)
        self.optimizers["critic"].zero_grad()
        loss.backward()
        metrics["critic_grad_norm"] = nn.utils.clip_grad_norm_(self.critic.parameters(), max_norm)
        self.optimizers["critic"].step()
        # The actor, on other states: D4
        loss, actor_metrics = self.actor_loss(data.obs[rows[1]], draws)
        self.optimizers["actor"].zero_grad()
        loss.backward()
        metrics["actor_grad_norm"] = nn.utils.clip_grad_norm_(self.actor.parameters(), max_norm)
        self.optimizers["actor"].step()
        polyak_update(self.actor_target, self.actor, self.args.tau)
        polyak_update(self.critic_target, self.critic, self.args.tau)
        return {name: value.detach() for name, value in (metrics | actor_metrics).items()}

    def best_of(self, n: int, obs: Tensor, noise: Tensor | None) -> Tensor:
        """For each of obs (batch, obs_dim) the action with the largest q of n samples of the actor."""
        if noise is None:
            noise = torch.randn(self.args.diffusion_steps, n, len(obs), self.action_dim, device=self.device)
        actions, q = self.candidates(obs, noise)
        return actions[q.argmax(0), torch.arange(len(obs), device=self.device)]  # (batch, action_dim)

    def explore(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """The efficient behaviour policy of Sec. 4.4, for learning: the best of num_behavior_samples."""
        return self.best_of(self.args.num_behavior_samples, obs, noise)

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """The same with num_action_samples, for evaluation, noise included (D8)."""
        return self.best_of(self.args.num_action_samples, obs, noise)


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
class Experience:
    """The environment that is learned in, and the last transitions from it, on the device.

    save() appends to a file, so a checkpoint costs what is new since the last one. The state of an
    environment cannot be saved, but an episode can be played again from its seed and its actions.
    """

    def __init__(self, env: gym.Env, args: Args, device: torch.device):
        self.env, self.args, self.capacity = env, args, min(args.replay_size, args.total_steps)
        obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        try:
            self.rows = torch.empty(self.capacity, sum(self.sizes), device=device)
        except RuntimeError as error:  # out of memory
            size = f"{4e-9 * self.capacity * sum(self.sizes):,.1f} GB"
            raise UserError(f"{self.capacity:,} transitions take {size}: lower --replay-size") from error
        obs, action, reward, next_obs, terminal = self.rows.split(self.sizes, dim=1)
        self.data = Batch(obs, action, reward.squeeze(1), next_obs, terminal.squeeze(1))
        self.count, self.saved, self.checksum = 0, 0, 0  # transitions so far, those in the file, its CRC
        self.begin_episode(start=0)

    def begin_episode(self, start: int, seed: int | None = None) -> None:
        """Reset the environment, with a new seed if none is given (D13), before transition number `start`."""
        seed = torch.randint(2**31, ()).item() if seed is None else seed
        self.obs = self.env.reset(seed=seed)[0].astype(np.float32)
        self.episode_seed, self.episode_start, self.episode_return = seed, start, 0.0

    def play(self, action: np.ndarray) -> tuple[Tensor, bool]:
        """One step of the environment: the transition as a row, and whether the episode is over."""
        next_obs, reward, terminated, truncated, _ = self.env.step(action)
        terminal = terminated or (truncated and self.args.time_limit_is_terminal)  # the code's mask: D1
        row = np.concatenate([self.obs, action, [reward], next_obs, [terminal]], dtype=np.float32)
        self.obs = next_obs.astype(np.float32)
        self.episode_return += float(reward)
        return torch.from_numpy(row), terminated or truncated

    def step(self, action: np.ndarray) -> dict[str, float]:
        """Play one action and keep the transition; return and length of the episode if it is over."""
        row, over = self.play(action)
        length = float(self.count + 1 - self.episode_start)
        episode = {"episode_return": self.episode_return, "episode_length": length} if over else {}
        if over:
            self.begin_episode(self.count + 1)  # before anything is counted, since it may fail
        self.rows[self.count % self.capacity] = row
        self.count += 1
        return episode

    def slots(self, start: int) -> Tensor:
        """Rows of the transitions from number `start` to the newest."""
        return torch.arange(start, self.count, device=self.rows.device) % self.capacity

    def save(self, folder: Path) -> dict[str, int]:
        """Append what is new to replay.bin, safe from a power cut; returns what the checkpoint must hold."""
        path, row_bytes = folder / "replay.bin", 4 * sum(self.sizes)
        new = self.rows[self.slots(self.saved)].cpu().numpy().tobytes()
        with open(path, "ab") as file:
            file.truncate(self.saved * row_bytes)  # after a crash there may be more than was saved
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        self.saved, self.checksum = self.count, zlib.crc32(new, self.checksum)
        return {name: getattr(self, name) for name in ("count", "checksum", "episode_start", "episode_seed")}

    def load(self, folder: Path, state: dict[str, int]) -> None:
        """What save() wrote; the episode that was under way is played again. ValueError: another file."""
        path, row_size = folder / "replay.bin", sum(self.sizes)
        stored = np.fromfile(path, np.float32, state["count"] * row_size)
        if zlib.crc32(stored) != state["checksum"]:
            raise ValueError(f"{path} is damaged, or not that of the checkpoint")
        self.count, self.saved, self.checksum = state["count"], state["count"], state["checksum"]
        newest = torch.from_numpy(stored).view(-1, row_size)[-self.capacity :]
        self.rows[self.slots(self.count - len(newest))] = newest.to(self.rows.device)
        self.begin_episode(state["episode_start"], state["episode_seed"])
        is_kept = self.count - self.episode_start <= self.capacity
        if not (is_kept and all(map(self.repeats, self.rows[self.slots(self.episode_start)].cpu()))):
            print("  the episode under way cannot be played again: a new one begins")
            self.begin_episode(self.count)

    def repeats(self, row: Tensor) -> bool:
        """Play the action of a transition again: whether all of it is as before, and the episode goes on."""
        again, over = self.play(row.split(self.sizes)[1].numpy())
        return torch.equal(again, row) and not over


def train(args: Args) -> dict:
    """One run: act, learn, evaluate, log and save; returns what results.json holds."""
    if args.num_chosen > args.num_train_samples:
        raise UserError(f"--num-chosen is {args.num_chosen}, of only {args.num_train_samples} candidates")
    torch.manual_seed(args.seed)
    device = use_device(args.device, args.num_threads, args.matmul_precision)
    env, *envs = make_envs(find_task(args.env_id), 1 + args.eval_episodes, args)
    experience = Experience(env, args, device)

    agent = QVPO(env.observation_space.shape[0], env.action_space.shape[0], args, device)
    if args.compile:
        agent.critic_loss, agent.actor_loss = map(torch.compile, (agent.critic_loss, agent.actor_loss))
    run = Run(__file__, args, TASK_SETTINGS, agent, memory=experience)
    update = cuda_graphed(partial(agent.update, experience.data), device, args.cuda_graph)
    with run:  # Ctrl-C and SIGTERM save and stop it between two steps
        if run.evaluation_due():  # the run was stopped in it
            run.log_evaluation(evaluate(agent, envs))
        while run.step < args.total_steps:
            stop_if_asked()
            agent.set_step(run.step)
            if run.step < args.learning_starts:
                action = 2 * torch.rand(agent.action_dim) - 1  # (action_dim,)
            else:
                action = agent.explore(torch.from_numpy(experience.obs[None]).to(device))[0].cpu()
            episode = experience.step(action.numpy())
            with run.updating():  # if it fails in here, half a step is done, and not saved
                run.add_losses(update() if run.step + 1 >= args.learning_starts else {})
                run.step += 1
            run.add_to_curves("charts", episode)
            if run.reached(args.log_every):
                run.log_losses()  # losses/*: their means since the last time
            if run.evaluation_due():
                run.log_evaluation(evaluate(agent, envs))  # eval/*
            if run.reached(min(args.save_every, args.replay_size)):  # before unsaved transitions are replaced
                run.save()  # agent, optimizers, random state, results, transitions: D14
    return run.results


if __name__ == "__main__":
    run_command(train, Args, TASK_SETTINGS)
