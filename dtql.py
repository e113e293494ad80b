"""Diffusion Trusted Q-Learning (DTQL): a one-step policy inside the trust region of a diffusion model.

Paper: Chen, Wang, Zhou: Diffusion Policies creating a Trust Region for Offline Reinforcement Learning, 2024,
arXiv 2405.19690.
docs/dtql.md explains it, numbers the equations (Eq. 1 to 7) and the differences (D1, ...) named in this file,
and has the logged metrics and results.

    python dtql.py                                # the bundled hopper-mini-v0, minutes on a CPU
    python dtql.py --env-id hopper-medium-v2      # a D4RL task with the paper's settings
    python dtql.py --resume runs/<run>            # go on where a run stopped

A diffusion model learns to denoise the actions of the data. Its loss, taken at the action of a policy, is low
where actions like that are in the data: it fences the policy in, which climbs Q inside. That policy is a
Gaussian, so no denoising chain is ever run, neither in training nor when acting.

In shapes: num_qs critics are an ensemble of Q networks. Steps below 0 are pretraining.
"""

import math
import time
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
from common.runs import Run, accelerated, run_command, uninterrupted, write_atomically

EVAL_SEED = 10_000  # evaluation episodes are seeded EVAL_SEED, EVAL_SEED + 1, ...


# === Args ===
@dataclass
class Args:
    """What is left at None takes its value from TASK_SETTINGS, for other tasks from DEFAULT_SETTINGS.

    So does batch_size where it is not given.
    """

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

    # --- DTQL ---
    pretrain_steps: int | None = None  # steps of denoiser and critics alone, before those of total_steps
    alpha: float | None = None  # weight of the trust region loss
    q_weight: float = 1.0  # weight of Q in the policy's loss; 0: behaviour cloning
    nll_weight: float | None = None  # weight of the policy's negative log-likelihood of the data, gamma
    expectile: float | None = None  # weight of the rows with Q above V in the loss of V, in [0, 1]
    value_target: Literal["online", "target"] = "online"  # critics that V learns from; target: as in IQL, D1
    num_qs: int = 2  # critics in the ensemble, whose minimum counts
    hidden_dims: tuple[int, ...] | None = None  # hidden units per layer of every network
    time_dim: int = 16  # features of the noise level
    first_mish: bool = False  # an activation after the denoiser's first layer, too, D4
    clip_denoised: bool = True  # clip the denoised action to [-1, 1] in both losses of the denoiser, D5
    sigma_min: float = 0.002  # smallest noise level
    sigma_max: float = 80.0  # largest noise level
    sigma_data: float = 0.5  # standard deviation of actions that the scalings assume; median noise level
    actor_lr: float | None = None  # learning rate of the denoiser and of the policy
    critic_lr: float | None = None  # learning rate of the critics and of V
    lr_decay: bool = False  # let the learning rates fall to 0 along a cosine, from step 0 on
    lr_decay_steps: int | None = None  # steps after which they reach 0; None: total_steps
    ema_decay: float = 0.995  # share of its weights that the target actor keeps when it moves, in [0, 1]
    actor_target_every: int = 5  # steps between updates of the target actor
    actor_target_start: int = 1000  # step at which the target actor starts to move
    act_with_target: bool = False  # act with the target actor; the official code never uses it, D2
    num_action_samples: int | None = None  # candidate actions per state when acting
    reward_tune: str | None = None  # rule for the training rewards, see tune_rewards


# fmt: off
DEFAULT_SETTINGS = dict(
    total_steps=1_000_000, pretrain_steps=50_000, batch_size=256, eval_every=50_000, eval_episodes=10,
    tau=0.005, hidden_dims=(256, 256, 256), actor_lr=3e-4, critic_lr=3e-4, lr_decay=False, alpha=1.0,
    nll_weight=0.0, expectile=0.7, num_action_samples=1024, reward_tune="none",
)
# Ours, to learn in minutes on a CPU.
MINI = dict(total_steps=12_000, pretrain_steps=3_000, eval_every=3_000, tau=0.03, hidden_dims=(128, 128, 128),
            actor_lr=1e-3, critic_lr=1e-3, alpha=20.0, num_action_samples=64)
BANDIT = dict(total_steps=1_000, pretrain_steps=600, eval_every=500, tau=0.05, hidden_dims=(128, 128, 128),
              actor_lr=3e-3, critic_lr=3e-3, alpha=0.05, num_action_samples=32)
# From the hyperparameters of the official code, 1,000 steps an epoch.
ANTMAZE = dict(batch_size=2048, nll_weight=1.0, expectile=0.9, reward_tune="iql_antmaze", eval_episodes=100)
ADROIT = dict(alpha=1500.0, eval_episodes=100)
KITCHEN = dict(lr_decay=True, eval_episodes=100)
TASK_SETTINGS = {
    "halfcheetah-medium-v2":        dict(actor_lr=3e-4, alpha=1.0, total_steps=1_000_000),
    "halfcheetah-medium-replay-v2": dict(actor_lr=3e-4, alpha=5.0, total_steps=1_000_000),
    "halfcheetah-medium-expert-v2": dict(actor_lr=3e-4, alpha=50.0, total_steps=1_000_000),
    "hopper-medium-v2":             dict(actor_lr=1e-4, alpha=5.0, lr_decay=True, total_steps=1_000_000),
    "hopper-medium-replay-v2":      dict(actor_lr=3e-4, alpha=5.0, total_steps=1_000_000),
    "hopper-medium-expert-v2":      dict(actor_lr=3e-4, alpha=20.0, total_steps=1_000_000),
    "walker2d-medium-v2":           dict(actor_lr=3e-4, alpha=5.0, lr_decay=True, total_steps=1_000_000),
    "walker2d-medium-replay-v2":    dict(actor_lr=3e-4, alpha=5.0, lr_decay=True, total_steps=1_000_000),
    "walker2d-medium-expert-v2":    dict(actor_lr=3e-4, alpha=5.0, lr_decay=True, total_steps=1_000_000),
    "antmaze-umaze-v0":             ANTMAZE | dict(actor_lr=3e-4, alpha=1.0, total_steps=500_000),
    "antmaze-umaze-diverse-v0":     ANTMAZE | dict(actor_lr=3e-5, alpha=1.0, lr_decay=True,
                                                   total_steps=500_000),
    "antmaze-medium-play-v0":       ANTMAZE | dict(actor_lr=3e-4, alpha=1.0, total_steps=400_000),
    "antmaze-medium-diverse-v0":    ANTMAZE | dict(actor_lr=3e-4, alpha=1.0, total_steps=400_000),
    "antmaze-large-play-v0":        ANTMAZE | dict(actor_lr=3e-4, alpha=1.0, total_steps=350_000),
    "antmaze-large-diverse-v0":     ANTMAZE | dict(actor_lr=3e-4, alpha=0.5, total_steps=300_000),
    "pen-human-v1":                 ADROIT | dict(actor_lr=3e-5, lr_decay=True, expectile=0.9,
                                                  total_steps=300_000),
    "pen-cloned-v1":                ADROIT | dict(actor_lr=1e-5, total_steps=200_000),
    "kitchen-complete-v0":          KITCHEN | dict(actor_lr=1e-4, alpha=200.0, total_steps=500_000),
    "kitchen-partial-v0":           KITCHEN | dict(actor_lr=1e-4, alpha=100.0, total_steps=1_000_000),
    "kitchen-mixed-v0":             KITCHEN | dict(actor_lr=3e-4, alpha=200.0, total_steps=500_000),
    # Ours: the other tasks of a domain (as medium-play, pen-human, kitchen-complete), and our own tasks.
    "antmaze":                      ANTMAZE | dict(actor_lr=3e-4, alpha=1.0, total_steps=400_000),
    "adroit":                       ADROIT | dict(actor_lr=3e-5, lr_decay=True, expectile=0.9,
                                                  total_steps=300_000),
    "kitchen":                      KITCHEN | dict(actor_lr=1e-4, alpha=200.0, total_steps=500_000),
    "hopper-mini-v0": MINI,
    "bandit-8gaussians-v0": BANDIT,
    "bandit-moons-v0": BANDIT,
    "bandit-corners-v0": BANDIT,
    "bandit-spiral-v0": BANDIT,
}
# fmt: on
for maze in [name for name in TASK_SETTINGS if name.startswith("antmaze-")]:  # six tasks each, set alike
    TASK_SETTINGS[maze.replace("-v0", "-v2")] = TASK_SETTINGS[maze]


# === Diffusion ===
def sigma_quantile(u: Tensor, sigma_min: float, sigma_max: float, sigma_data: float) -> Tensor:
    """The noise level below which a share u of them lies: log-logistic, cut off at both ends; Eq. 3."""
    below_min, below_max = (1 / (1 + (sigma_data / sigma) ** 2) for sigma in (sigma_min, sigma_max))
    p = below_min + u * (below_max - below_min)
    return sigma_data * (0.5 * torch.logit(p)).exp()


def edm_scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in of Karras et al. 2022, for inputs and targets of variance 1; Eq. 2."""
    variance = sigma**2 + sigma_data**2
    return sigma_data**2 / variance, sigma * sigma_data / variance.sqrt(), 1 / variance.sqrt()


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


class DTQLDenoiser(nn.Module):
    """D_phi(x; s, sigma): the clean action in the noisy one x = a + sigma z."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        half = args.time_dim // 2
        frequencies = torch.exp(-torch.arange(half) * math.log(10_000) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)  # (time_dim / 2,)
        sizes = pairwise((args.time_dim, 2 * args.time_dim, args.time_dim))
        self.time_mlp = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)
        hidden_dims = (*args.hidden_dims[:1], *args.hidden_dims)  # a layer more than the other networks
        sizes = pairwise((action_dim + obs_dim + args.time_dim, *hidden_dims, action_dim))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)

    def network(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """F_phi: x (batch, action_dim) scaled to variance 1, t = ln(sigma) / 4 (batch, 1)."""
        angles = t * self.frequencies  # (batch, time_dim / 2)
        time = torch.cat([angles.sin(), angles.cos()], dim=1)  # (batch, time_dim)
        time = self.time_mlp[1](mish(self.time_mlp[0](time)))  # (batch, time_dim)
        x = torch.cat([x, obs, time], dim=1)  # (batch, action_dim + obs_dim + time_dim)
        x = self.layers[0](x)  # (batch, hidden)
        if self.args.first_mish:
            x = mish(x)  # (batch, hidden)
        for layer in self.layers[1:-1]:
            x = mish(layer(x))  # (batch, hidden)
        return self.layers[-1](x)  # (batch, action_dim)

    def forward(self, obs: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Eq. 2; obs (batch, obs_dim), x (batch, action_dim), sigma (batch, 1)."""
        c_skip, c_out, c_in = edm_scalings(sigma, self.args.sigma_data)
        denoised = c_skip * x + c_out * self.network(obs, c_in * x, sigma.log() / 4)  # (batch, action_dim)
        return denoised.clamp(-1, 1) if self.args.clip_denoised else denoised


# === Critic ===
class EnsembleLinear(nn.Module):
    """One linear layer per ensemble member, computed as one batched matrix product; the agent fills it."""

    def __init__(self, num_members: int, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_members, n_in, n_out))
        self.bias = nn.Parameter(torch.empty(num_members, 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)  # (num_members, batch, n_out)


class EnsembleLayerNorm(nn.Module):
    """Layer normalisation whose scale and shift are each ensemble member's own."""

    def __init__(self, num_members: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_members, 1, size))
        self.bias = nn.Parameter(torch.zeros(num_members, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:])  # (num_members, batch, size)
        return torch.addcmul(self.bias, x, self.weight)  # (num_members, batch, size)


class LayerNormCritic(nn.Module):
    """num_qs independent Q networks, each hidden layer normalised."""

    def __init__(self, obs_dim: int, action_dim: int, num_qs: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        self.num_qs = num_qs
        sizes = pairwise((obs_dim + action_dim, *hidden_dims, 1))
        self.layers = nn.ModuleList(EnsembleLinear(num_qs, n_in, n_out) for n_in, n_out in sizes)
        self.norms = nn.ModuleList(EnsembleLayerNorm(num_qs, size) for size in hidden_dims)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], dim=1)  # (batch, obs_dim + action_dim)
        x = x.expand(self.num_qs, -1, -1)  # (num_qs, batch, obs_dim + action_dim)
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = mish(norm(layer(x)))  # (num_qs, batch, hidden)
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
class OneStepPolicy(nn.Module):
    """pi_theta(a|s): a Gaussian, squashed to [-1, 1] by tanh."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dims: tuple[int, ...]):
        super().__init__()
        sizes = pairwise((obs_dim, *hidden_dims, 2 * action_dim))
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in sizes)
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation before the tanh, (batch, action_dim) each."""
        x = obs  # (batch, obs_dim)
        for layer in self.layers[:-1]:
            x = layer(x).relu()  # (batch, hidden)
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
        self.denoiser = DTQLDenoiser(obs_dim, action_dim, args)
        self.actor = OneStepPolicy(obs_dim, action_dim, args.hidden_dims)
        self.critic = LayerNormCritic(obs_dim, action_dim, args.num_qs, args.hidden_dims)
        self.value = StateValue(obs_dim, args.hidden_dims)
        init_uniform(self.critic)
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("actor_tau", torch.tensor(0.0))
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
        """Write into tensors what depends on the number of finished updates, so that update() need not."""
        decay_steps = self.args.lr_decay_steps or self.args.total_steps
        decay = cosine_decay(max(step, 0), decay_steps) if self.args.lr_decay else 1.0
        for name, optimizer in self.optimizers.items():
            lr = self.args.critic_lr if name == "critic" else self.args.actor_lr
            optimizer.param_groups[0]["lr"].fill_(lr * decay)
        moves = step >= self.args.actor_target_start and step % self.args.actor_target_every == 0
        self.actor_tau.fill_(1 - self.args.ema_decay if moves else 0.0)

    def draw_noise(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """A noise level and a noise for each action of a batch."""
        u = torch.rand(batch_size, dtype=torch.float64, device=self.device)  # (batch,)
        sigma = sigma_quantile(u, self.args.sigma_min, self.args.sigma_max, self.args.sigma_data)
        return sigma.float(), torch.randn(batch_size, self.action_dim, device=self.device)

    def draw(self, batch_size: int) -> Draws:
        """Fresh random numbers for one update."""
        action_noise = torch.randn(batch_size, self.action_dim, device=self.device)  # (batch, action_dim)
        return Draws(*self.draw_noise(batch_size), *self.draw_noise(batch_size), action_noise)

    def diffusion_loss(self, action: Tensor, obs: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """How badly the denoiser finds action (batch, action_dim) again; Eq. 1."""
        sigma = sigma.unsqueeze(1)  # (batch, 1)
        denoised = self.denoiser(obs, action + sigma * noise, sigma)  # (batch, action_dim)
        _, c_out, _ = edm_scalings(sigma, self.args.sigma_data)
        return ((denoised - action) / c_out).square().mean()

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Expectile regression of V on the critics, Eq. 4, and of the critics on r + gamma V(s'), Eq. 5."""
        q = self.critic(batch.obs, batch.action)  # (num_qs, batch)
        v = self.value(batch.obs)  # (batch,)
        with torch.no_grad():
            next_v = self.value(batch.next_obs)  # (batch,)
            target = batch.reward + self.args.gamma * (1 - batch.terminal) * next_v  # (batch,)
            min_q = q.amin(0)  # (batch,)
            if self.args.value_target == "target":
                min_q = self.critic_target(batch.obs, batch.action).amin(0)  # (batch,)
        above, below = (min_q - v).relu(), (v - min_q).relu()
        expectile = self.args.expectile
        value_loss = (expectile * above.square() + (1 - expectile) * below.square()).mean()
        q_loss = (q - target).square().mean(1).sum()
        loss = value_loss + q_loss
        metrics = {"critic_loss": loss, "value_loss": value_loss, "q_loss": q_loss}
        return loss, metrics | {"q_mean": q.mean(), "v_mean": v.mean()}

    def actor_loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Up Q, within the trust region, near the data; Eq. 6."""
        mean, std = self.actor(batch.obs)
        action = (mean + std * draws.action_noise).tanh()  # (batch, action_dim)
        trust_loss = self.diffusion_loss(action, batch.obs, draws.trust_sigma, draws.trust_noise)
        actor_q = self.critic(batch.obs, action).amin(0).mean()
        loss = self.args.alpha * trust_loss - self.args.q_weight * actor_q
        metrics = {"trust_loss": trust_loss, "actor_q": actor_q, "actor_std": std.mean()}
        if self.args.nll_weight > 0:
            metrics["nll"] = nll_of(batch.action, mean, std).mean()
            loss = loss + self.args.nll_weight * metrics["nll"]
        return loss, {"actor_loss": loss} | metrics

    def descend(self, name: str, loss: Tensor) -> None:
        """One optimizer step."""
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()

    def update_denoiser(self, batch: Batch, sigma: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """One gradient step of the denoiser: behaviour cloning."""
        loss = self.diffusion_loss(batch.action, batch.obs, sigma, noise)
        self.descend("denoiser", loss)
        return {"bc_loss": loss}

    def update_critic(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of critics and V."""
        loss, metrics = self.critic_loss(batch)
        self.descend("critic", loss)
        return metrics

    def update_actor(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """One gradient step of the policy."""
        for network in (self.denoiser, self.critic):  # which only lead the gradient to the action
            network.requires_grad_(False)
        loss, metrics = self.actor_loss(batch, draws)
        self.descend("actor", loss)
        for network in (self.denoiser, self.critic):
            network.requires_grad_(True)
        return metrics

    def update_targets(self) -> None:
        """The targets follow; that of the actor where its rate is not 0."""
        polyak_update(self.critic_target, self.critic, self.args.tau)
        polyak_update(self.actor_target, self.actor, self.actor_tau)

    def sample_batch(self, data: Batch) -> Batch:
        rows = torch.randint(len(data.reward), (self.args.batch_size,), device=self.device)  # (batch,)
        return Batch(*(column[rows] for column in data))

    def pretrain(self, data: Batch) -> dict[str, Tensor]:
        """Like update(), but the policy waits: one gradient step of denoiser, critics and V."""
        batch = self.sample_batch(data)
        metrics = self.update_denoiser(batch, *self.draw_noise(self.args.batch_size))
        metrics |= self.update_critic(batch)
        if self.args.value_target == "target":  # otherwise it stays as it was initialised; D6
            polyak_update(self.critic_target, self.critic, self.args.tau)
        return {name: value.detach() for name, value in metrics.items()}

    def update(self, data: Batch) -> dict[str, Tensor]:
        """One gradient step on random rows of the data: tensor operations only, no host sync; 0-d metrics."""
        batch, draws = self.sample_batch(data), self.draw(self.args.batch_size)
        metrics = self.update_critic(batch) | self.update_denoiser(batch, draws.bc_sigma, draws.bc_noise)
        metrics |= self.update_actor(batch, draws)
        self.update_targets()
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor | None = None, u: Tensor | None = None) -> Tensor:
        """For each of obs (batch, obs_dim) one of num_action_samples actions, drawn by softmax(Q); Eq. 7.

        noise is (batch, num_action_samples, action_dim), u (batch,) uniform in [0, 1).
        """
        n = self.args.num_action_samples
        if noise is None:
            noise = torch.randn(len(obs), n, self.action_dim, device=self.device)
        if u is None:
            u = torch.rand(len(obs), device=self.device)
        actor = self.actor_target if self.args.act_with_target else self.actor
        mean, std = actor(obs)  # once per state, whatever n is
        actions = (mean.unsqueeze(1) + std.unsqueeze(1) * noise).tanh()  # (batch, n, action_dim)
        q = self.critic_target(obs.repeat_interleave(n, dim=0), actions.flatten(0, 1))  # (num_qs, batch * n)
        probability = q.amin(0).unflatten(0, (-1, n)).softmax(1)  # (batch, n)
        share = probability.cumsum(1)  # (batch, n)
        chosen = (share / share[:, -1:] <= u.unsqueeze(1)).sum(1)  # (batch,)
        return actions[torch.arange(len(obs), device=self.device), chosen]  # (batch, action_dim)


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
    """One run: pretrain, train, evaluate, log and save; returns what results.json holds."""
    run = Run("dtql", args, DEFAULT_SETTINGS, TASK_SETTINGS)
    args = run.args
    if not run.checkpoint:
        run.step = -args.pretrain_steps

    dataset = load_dataset(args.env_id, args.dataset, args.seed)
    envs = [dataset.make_env() for _ in range(args.eval_episodes)]
    rewards = tune_rewards(dataset, args.reward_tune)
    columns = (dataset.observations, dataset.actions, rewards, dataset.next_observations, dataset.terminals)
    data = Batch(*(torch.as_tensor(column, device=run.device) for column in columns))

    agent = DTQL(data.obs.shape[1], data.action.shape[1], args, run.device)
    run.begin(agent, dataset)
    pretrain = accelerated(partial(agent.pretrain, data), agent, args)
    update = accelerated(partial(agent.update, data), agent, args)
    with run:
        while True:
            if run.evaluation_due():
                run.add_evaluation(evaluate(agent, envs))
            if run.step >= args.total_steps:
                break
            if run.step == 0 and args.pretrain_steps > 0:  # keep what the pretraining has learned
                run.save()
                checkpoint = (run.folder / "checkpoint.pt").read_bytes()
                write_atomically(run.folder / "pretrained.pt", checkpoint)
            agent.set_step(run.step)
            with uninterrupted():
                run.record(pretrain() if run.step < 0 else update())
            if run.reached(args.log_every):
                run.log()
            if run.reached(args.save_every):
                run.save()
    return run.results


if __name__ == "__main__":
    run_command(train, tyro.cli(Args))
