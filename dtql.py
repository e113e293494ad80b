"""Diffusion Trusted Q-Learning (DTQL): a one-step policy inside the trust region of a diffusion model.

Paper: Chen, Wang, Zhou: Diffusion Policies creating a Trust Region for Offline Reinforcement Learning, 2024,
arXiv 2405.19690.
docs/dtql.md explains it and lists what to know about the authors' code and this file (D1, ...).

    python dtql.py                                # the bundled hopper-mini-v0, minutes on a CPU
    python dtql.py --env-id hopper-medium-v2      # a D4RL task with the authors' settings
    python dtql.py --resume runs/<run>            # go on where a run stopped

A diffusion model learns to denoise the actions of the data. Its loss, taken at the action of a policy, is low
where actions like that are in the data: it fences the policy in, which climbs Q inside. That policy is a
Gaussian, so no denoising chain is ever run, neither in training nor when acting.
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from common.cli import Even, NonNegative, Positive, Threads, UnitInterval, run_command
from common.datasets import RewardRule, load_dataset, tune_rewards
from common.devices import cuda_graphed, mish, use_device
from common.envs import make_envs
from common.runs import Run, stop_if_asked
from common.tasks import find_task

EVAL_SEED = 10_000  # evaluation episodes are seeded EVAL_SEED, EVAL_SEED + 1, ...
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # the smallest and the largest noise level
SIGMA_DATA = 0.5  # the median noise level; also the standard deviation of actions that the scalings assume


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
    total_steps: Positive[int] = 1_000_000  # gradient steps
    batch_size: Positive[int] = 256  # transitions per gradient step, drawn with replacement
    gamma: UnitInterval[float] = 0.99  # discount factor
    tau: UnitInterval[float] = 0.005  # step of the target networks towards the online ones
    eval_every: Positive[int] = 50_000  # steps between evaluations
    eval_episodes: NonNegative[int] = 10  # episodes per evaluation, side by side; 0: no evaluation
    log_every: Positive[int] = 500  # steps between two points of the loss curves; a point is their mean
    save_every: Positive[int] = 10_000  # steps between checkpoints
    run_dir: str = "runs"  # folder that receives one folder per run
    resume: str | None = None  # continue this checkpoint or run folder; arguments given now replace its own

    # --- DTQL ---
    pretrain_steps: NonNegative[int] = 50_000  # steps without the policy, before step 0
    hidden_dims: tuple[Positive[int], ...] = (256, 256, 256)  # hidden units per layer of every network
    time_dim: Even[int] = 16  # features of the noise level
    alpha: NonNegative[float] = 1.0  # weight of the trust region loss
    q_weight: NonNegative[float] = 1.0  # weight of Q in the policy's loss; 0 is behaviour cloning
    nll_weight: NonNegative[float] = 0.0  # weight of -ln pi(a|s) in the policy's loss; the authors' gamma
    expectile: UnitInterval[float] = 0.7  # of Q that V regresses on; the paper's tau
    actor_lr: NonNegative[float] = 3e-4  # learning rate of the denoiser and of the policy
    critic_lr: NonNegative[float] = 3e-4  # learning rate of the critics and of V
    lr_decay: bool = False  # let the learning rates fall to 0 along a cosine, from step 0 on
    num_action_samples: Positive[int] = 1024  # candidate actions when acting; one is drawn by softmax of Q
    reward_tune: RewardRule = "none"  # rule for the training rewards, see tune_rewards


# fmt: off
# The hyperparameters of the official code, in which an epoch is 1,000 steps.
ANTMAZE = dict(eval_episodes=100, batch_size=2048, nll_weight=1.0, expectile=0.9, reward_tune="iql_antmaze")
ADROIT = dict(eval_episodes=100, alpha=1500.0)
KITCHEN = dict(eval_episodes=100, lr_decay=True)
PEN_HUMAN = ADROIT | dict(total_steps=300_000, actor_lr=3e-5, lr_decay=True, expectile=0.9)
BANDIT = dict(total_steps=1_000, pretrain_steps=600, eval_every=500, batch_size=128, hidden_dims=(64, 64),
              tau=0.05, actor_lr=3e-3, critic_lr=3e-3, alpha=5.0, reward_tune="antmaze100")
TASK_SETTINGS = {
    "halfcheetah-medium-v2":               dict(alpha=1.0),
    "halfcheetah-medium-replay-v2":        dict(alpha=5.0),
    "halfcheetah-medium-expert-v2":        dict(alpha=50.0),
    "hopper-medium-v2":                    dict(alpha=5.0, actor_lr=1e-4, lr_decay=True),
    "hopper-medium-replay-v2":             dict(alpha=5.0),
    "hopper-medium-expert-v2":             dict(alpha=20.0),
    "walker2d-medium-v2":                  dict(alpha=5.0, lr_decay=True),
    "walker2d-medium-replay-v2":           dict(alpha=5.0, lr_decay=True),
    "walker2d-medium-expert-v2":           dict(alpha=5.0, lr_decay=True),
    "antmaze-umaze-v0":          ANTMAZE | dict(alpha=1.0, total_steps=500_000),
    "antmaze-umaze-diverse-v0":  ANTMAZE | dict(alpha=1.0, total_steps=500_000, actor_lr=3e-5, lr_decay=True),
    "antmaze-medium-play-v0":    ANTMAZE | dict(alpha=1.0, total_steps=400_000),
    "antmaze-medium-diverse-v0": ANTMAZE | dict(alpha=1.0, total_steps=400_000),
    "antmaze-large-play-v0":     ANTMAZE | dict(alpha=1.0, total_steps=350_000),
    "antmaze-large-diverse-v0":  ANTMAZE | dict(alpha=0.5, total_steps=300_000),
    "pen-human-v1":            PEN_HUMAN,
    "pen-cloned-v1":              ADROIT | dict(total_steps=200_000, actor_lr=1e-5),
    "kitchen-complete-v0":       KITCHEN | dict(alpha=200.0, total_steps=500_000, actor_lr=1e-4),
    "kitchen-partial-v0":        KITCHEN | dict(alpha=100.0, actor_lr=1e-4),
    "kitchen-mixed-v0":          KITCHEN | dict(alpha=200.0, total_steps=500_000),
    # Ours: the other tasks of a domain (as medium-play, pen-human, kitchen-complete), and our own tasks.
    "antmaze": ANTMAZE | dict(alpha=1.0, total_steps=400_000),
    "adroit": PEN_HUMAN,
    "kitchen": KITCHEN | dict(alpha=200.0, total_steps=500_000, actor_lr=1e-4),
    "hopper-mini-v0": dict(total_steps=12_000, pretrain_steps=3_000, eval_every=3_000, tau=0.03, alpha=20.0,
                           hidden_dims=(128, 128, 128), actor_lr=1e-3, critic_lr=1e-3, num_action_samples=64),
    "bandit": BANDIT,
    "bandit-8gaussians-v0": BANDIT | dict(nll_weight=3.0),
}
# fmt: on


# === Diffusion ===
def sigma_quantile(u: Tensor) -> Tensor:
    """The noise level (batch,) below which a share u (batch,) of all noise levels lies.

    P(sigma < x) = 1 / (1 + (SIGMA_DATA / x)^2), log-logistic, cut off at SIGMA_MIN and SIGMA_MAX.
    """
    below_min, below_max = (1 / (1 + (SIGMA_DATA / sigma) ** 2) for sigma in (SIGMA_MIN, SIGMA_MAX))
    p = below_min + u * (below_max - below_min)
    return SIGMA_DATA * (0.5 * torch.logit(p)).exp()


def edm_scalings(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in of Karras et al. 2022, for inputs and targets of variance 1."""
    variance = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / variance, sigma * SIGMA_DATA / variance.sqrt(), 1 / variance.sqrt()


class DTQLDenoiser(nn.Module):
    """D_phi(x; s, sigma): the clean action in the noisy one x = a + sigma z."""

    def __init__(self, obs_dim: int, action_dim: int, time_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        frequencies = torch.exp(-torch.arange(time_dim // 2) * math.log(10_000) / (time_dim // 2 - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time_mlp = nn.ModuleList([nn.Linear(time_dim, 2 * time_dim), nn.Linear(2 * time_dim, time_dim)])
        sizes = pairwise((action_dim + obs_dim + time_dim, hidden_dims[0], *hidden_dims, action_dim))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)

    def network(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """F_phi: x (batch, action_dim) scaled to variance 1, t = ln(sigma) / 4 (batch, 1)."""
        angles = t * self.frequencies  # (batch, time_dim / 2)
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1)  # (batch, time_dim)
        embedding = self.time_mlp[1](mish(self.time_mlp[0](embedding)))  # (batch, time_dim)
        x = torch.cat([x, obs, embedding], dim=1)  # (batch, action_dim + obs_dim + time_dim)
        x = self.layers[0](x)  # (batch, hidden), and no activation: D4
        for layer in self.layers[1:-1]:
            x = mish(layer(x))
        return self.layers[-1](x)  # (batch, action_dim)

    def forward(self, obs: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """clip(c_skip x + c_out F_phi(c_in x; s, ln(sigma) / 4), -1, 1); sigma (batch, 1)."""
        c_skip, c_out, c_in = edm_scalings(sigma)
        denoised = c_skip * x + c_out * self.network(obs, c_in * x, sigma.log() / 4)  # (batch, action_dim)
        return denoised.clamp(-1, 1)  # where it clips, no gradient: D5


# === Critic ===
class LayerNormQ(nn.Module):
    """Q(s, a), with layer normalisation, which V does not have (D2)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        sizes = pairwise((obs_dim + action_dim, *hidden_dims, 1))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in hidden_dims)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=1)  # (batch, obs_dim + action_dim)
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = mish(norm(layer(x)))
        return self.layers[-1](x).squeeze(1)  # (batch,)


class TwinCritic(nn.Module):
    """Two independent Q networks."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        self.members = nn.ModuleList(LayerNormQ(obs_dim, action_dim, hidden_dims) for _ in range(2))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.stack([member(obs, action) for member in self.members])  # (2, batch)


class StateValue(nn.Module):
    """V(s)."""

    def __init__(self, obs_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        sizes = pairwise((obs_dim, *hidden_dims, 1))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)

    def forward(self, obs: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            obs = mish(layer(obs))  # (batch, hidden)
        return self.layers[-1](obs).squeeze(1)  # (batch,)


def polyak_update(target: nn.Module, online: nn.Module, tau: float | Tensor) -> None:
    """target <- tau * online + (1 - tau) * target."""
    with torch.no_grad():
        for target_parameter, parameter in zip(target.parameters(), online.parameters(), strict=True):
            target_parameter.lerp_(parameter, tau)


# === Agent ===
class OneStepPolicy(nn.Module):
    """pi_theta(a|s): a Gaussian, squashed to [-1, 1] by tanh."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        sizes = pairwise((obs_dim, *hidden_dims, 2 * action_dim))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)
        for layer in self.layers:  # unlike the other networks: D2
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation before the tanh, (batch, action_dim) each."""
        x = obs  # (batch, obs_dim)
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        mean, log_std = self.layers[-1](x).chunk(2, dim=1)
        return mean, log_std.clamp(-5, 2).exp()


def nll_of(action: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """-ln N(artanh(a / 1.001); mean, std^2) (batch,), without the Jacobian of the tanh; D3."""
    z = torch.atanh(action / (1 + 1e-3))  # (batch, action_dim)
    return (((z - mean) / std).square() / 2 + std.log() + math.log(2 * math.pi) / 2).sum(1)


class Batch(NamedTuple):
    """Transitions on the device, float32."""

    obs: Tensor  # (batch, obs_dim)
    action: Tensor  # (batch, action_dim)
    reward: Tensor  # (batch,)
    next_obs: Tensor  # (batch, obs_dim)
    terminal: Tensor  # (batch,)


class Draws(NamedTuple):
    """Every random number of one DTQL update."""

    bc_sigma: Tensor  # (batch,), noise levels of the denoiser's own loss
    bc_noise: Tensor  # (batch, action_dim)
    trust_sigma: Tensor  # (batch,), those of the trust region loss
    trust_noise: Tensor  # (batch, action_dim)
    action_noise: Tensor  # (batch, action_dim), of the policy's action


class DTQL(nn.Module):
    """Diffusion Trusted Q-Learning for observations of obs_dim numbers and actions in [-1, 1]^action_dim."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device: torch.device):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.denoiser = DTQLDenoiser(obs_dim, action_dim, args.time_dim, args.hidden_dims)
        self.actor = OneStepPolicy(obs_dim, action_dim, args.hidden_dims)
        self.critic = TwinCritic(obs_dim, action_dim, args.hidden_dims)
        self.value = StateValue(obs_dim, args.hidden_dims)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.to(device)
        self.device = device
        adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
        critics = [*self.critic.parameters(), *self.value.parameters()]
        self.optimizers = {
            "denoiser": adam(self.denoiser.parameters(), lr=torch.tensor(args.actor_lr, device=device)),
            "actor": adam(self.actor.parameters(), lr=torch.tensor(args.actor_lr, device=device)),
            "critic": adam(critics, lr=torch.tensor(args.critic_lr, device=device)),
        }

    def set_step(self, step: int) -> None:
        """Put what changes from step to step into tensors: update() may be replayed as a CUDA graph."""
        progress = min(max(step, 0) / self.args.total_steps, 1)
        decay = 0.5 * (1 + math.cos(math.pi * progress)) if self.args.lr_decay else 1.0  # half a cosine
        for name, optimizer in self.optimizers.items():
            lr = self.args.critic_lr if name == "critic" else self.args.actor_lr
            optimizer.param_groups[0]["lr"].fill_(lr * decay)

    def draw_noise(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Noise levels (batch,) and noises (batch, action_dim) for the actions of a batch."""
        u = torch.rand(batch_size, dtype=torch.float64, device=self.device)  # (batch,)
        return sigma_quantile(u).float(), torch.randn(batch_size, self.action_dim, device=self.device)  # D7

    def draw(self, batch_size: int) -> Draws:
        """Fresh random numbers for one update."""
        action_noise = torch.randn(batch_size, self.action_dim, device=self.device)  # (batch, action_dim)
        bc_sigma, bc_noise = self.draw_noise(batch_size)
        trust_sigma, trust_noise = self.draw_noise(batch_size)
        return Draws(bc_sigma, bc_noise, trust_sigma, trust_noise, action_noise)

    def diffusion_loss(self, action: Tensor, obs: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """L(a; s) = mean ((D(a + sigma z; s, sigma) - a) / c_out)^2: low where the data has actions like a.

        For an action of the data the denoiser's own loss, for one of the policy the trust region loss.
        """
        sigma = sigma.unsqueeze(1)  # (batch, 1)
        denoised = self.denoiser(obs, action + sigma * noise, sigma)  # (batch, action_dim)
        _, c_out, _ = edm_scalings(sigma)
        return ((denoised - action) / c_out).square().mean()

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """mean |expectile - 1(A < 0)| A^2 + sum_k mean (Q_k(s, a) - y)^2 with y = r + gamma (1 - d) V(s').

        A = min_k Q_k(s, a) - V(s). The first term trains V, the second the critics.
        """
        q = self.critic(batch.obs, batch.action)  # (2, batch)
        v = self.value(batch.obs)  # (batch,)
        with torch.no_grad():
            next_v = self.value(batch.next_obs)  # (batch,); no target network: D1
            target = batch.reward + self.args.gamma * (1 - batch.terminal) * next_v  # (batch,)
        advantage = q.detach().amin(0) - v  # (batch,); online critics: D1
        weight = torch.where(advantage > 0, self.args.expectile, 1 - self.args.expectile)  # (batch,)
        value_loss = (weight * advantage.square()).mean()
        q_loss = (q - target).square().mean(1).sum()
        loss = value_loss + q_loss
        metrics = {"critic_loss": loss, "value_loss": value_loss, "q_loss": q_loss}
        return loss, metrics | {"q_mean": q.mean(), "v_mean": v.mean()}

    def actor_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """alpha L(a_pi; s) - q_weight mean min_k Q_k(s, a_pi) - nll_weight mean ln pi(a|s).

        a_pi = tanh(mean(s) + std(s) xi) is an action of the policy, with a gradient; a is that of the data.
        """
        mean, std = self.actor(batch.obs)
        action = (mean + std * draws.action_noise).tanh()  # (batch, action_dim)
        trust_loss = self.diffusion_loss(action, batch.obs, draws.trust_sigma, draws.trust_noise)
        actor_q = self.critic(batch.obs, action).amin(0).mean()
        entropy = (std.log() + math.log(2 * math.pi * math.e) / 2).sum(1).mean()  # before the tanh (Fig. 5)
        loss = self.args.alpha * trust_loss - self.args.q_weight * actor_q
        metrics = {"trust_loss": trust_loss, "actor_q": actor_q, "entropy": entropy}
        if self.args.nll_weight > 0:
            metrics["nll"] = nll_of(batch.action, mean, std).mean()
            loss = loss + self.args.nll_weight * metrics["nll"]
        return loss, {"actor_loss": loss} | metrics

    def sample_batch(self, data: Batch) -> Batch:
        rows = torch.randint(len(data.reward), (self.args.batch_size,), device=self.device)  # (batch,)
        return Batch(*(column[rows] for column in data))

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One optimizer step; no gradient is computed for networks that it does not train: D8."""
        optimizer.zero_grad()
        loss.backward(inputs=optimizer.param_groups[0]["params"])
        optimizer.step()

    def pretrain(self, data: Batch) -> dict[str, Tensor]:
        """Like update(), but the policy waits: one gradient step of denoiser, critics and V."""
        batch, noise = self.sample_batch(data), self.draw_noise(self.args.batch_size)
        bc_loss = self.diffusion_loss(batch.action, batch.obs, *noise)
        self.descend(bc_loss, self.optimizers["denoiser"])
        loss, metrics = self.critic_loss(batch)
        self.descend(loss, self.optimizers["critic"])  # their targets do not follow: D6
        return {name: value.detach() for name, value in (metrics | {"bc_loss": bc_loss}).items()}

    def update(self, data: Batch) -> dict[str, Tensor]:
        """One gradient step on random rows of the data: tensor operations only, no host sync; 0-d metrics."""
        batch, draws = self.sample_batch(data), self.draw(self.args.batch_size)
        # The critics and V
        loss, metrics = self.critic_loss(batch)
        self.descend(loss, self.optimizers["critic"])
        # The denoiser, which is the trust region
        metrics["bc_loss"] = self.diffusion_loss(batch.action, batch.obs, draws.bc_sigma, draws.bc_noise)
        self.descend(metrics["bc_loss"], self.optimizers["denoiser"])
        # The policy
        loss, actor_metrics = self.actor_loss(batch, draws)
        self.descend(loss, self.optimizers["actor"])
        # The target critics
        polyak_update(self.critic_target, self.critic, self.args.tau)
        return {name: value.detach() for name, value in (metrics | actor_metrics).items()}

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """For each of obs (batch, obs_dim) one of n actions, drawn by softmax of min_k Q'_k(s, a)."""
        n = self.args.num_action_samples
        if noise is None:
            noise = torch.randn(len(obs), n, self.action_dim, device=self.device)  # (batch, n, action_dim)
        mean, std = self.actor(obs)  # once per state, whatever n is
        actions = (mean.unsqueeze(1) + std.unsqueeze(1) * noise).tanh()  # (batch, n, action_dim)
        q = self.critic_target(obs.repeat_interleave(n, dim=0), actions.flatten(0, 1))  # (2, batch * n)
        q = q.amin(0).unflatten(0, (-1, n))  # (batch, n)
        chosen = torch.multinomial(q.softmax(1), 1)  # (batch, 1)
        return actions.take_along_dim(chosen.unsqueeze(2), dim=1).squeeze(1)


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
    """One run: pretrain, train, evaluate, log and save; returns what results.json holds."""
    torch.manual_seed(args.seed)
    device = use_device(args.device, args.num_threads, args.matmul_precision)
    task = find_task(args.env_id)
    dataset = load_dataset(task, args.dataset, args.seed, args.action_bounds)
    envs = make_envs(task, args.eval_episodes, args, dataset)
    rewards = tune_rewards(dataset, args.reward_tune)  # mazes: r - 1: D12
    columns = (dataset.observations, dataset.actions, rewards, dataset.next_observations, dataset.terminals)
    data = Batch(*(torch.as_tensor(column, device=device) for column in columns))

    agent = DTQL(data.obs.shape[1], data.action.shape[1], args, device)
    if args.compile:
        losses = map(torch.compile, (agent.critic_loss, agent.diffusion_loss, agent.actor_loss))
        agent.critic_loss, agent.diffusion_loss, agent.actor_loss = losses
    run = Run(__file__, args, TASK_SETTINGS, agent, dataset, first_step=-args.pretrain_steps)
    pretrain = cuda_graphed(partial(agent.pretrain, data), device, args.cuda_graph)
    update = cuda_graphed(partial(agent.update, data), device, args.cuda_graph)
    with run:  # Ctrl-C and SIGTERM save and stop it between two steps
        if run.evaluation_due():  # the run was stopped in it
            run.log_evaluation(evaluate(agent, envs))
        while run.step < args.total_steps:  # not one more: D9
            stop_if_asked()
            agent.set_step(run.step)
            with run.updating():  # if it fails in here, half a step is done, and not saved
                run.add_losses(pretrain() if run.step < 0 else update())
                run.step += 1
            if run.reached(args.log_every):
                run.log_losses()  # losses/*: their means since the last time
            if run.evaluation_due():
                run.log_evaluation(evaluate(agent, envs))  # eval/*; D11: how often
            if run.step == 0:  # what the pretraining has learned, optimizers included: D10
                run.save("pretrained.pt")
            if run.reached(args.save_every):
                run.save()  # agent, optimizers, random state, results
    return run.results


if __name__ == "__main__":
    run_command(train, Args, TASK_SETTINGS)
