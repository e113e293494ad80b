"""The bandits: one-step toy tasks in two dimensions, with a rare best mode among frequent worse ones."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box


def polar(radius: float | np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


MOON = polar(0.5, np.linspace(0, np.pi, 12)) - [0.25, 0.125]
ALONG = np.sqrt(np.linspace(0, 1, 32))  # along the arm of the spiral, from the inside out
TURNS = np.sqrt(np.linspace(1 / 9, 1, 36))  # equal steps along the Swiss roll, which begins at a third
ROLL = polar(0.85 * TURNS, 4.5 * np.pi * TURNS)
BANDITS = {  # the modes (M, 2) of the data, from the worst and most frequent to the best and rarest
    "bandit-8gaussians-v0": polar(0.7, np.arange(8) * np.pi / 4),
    "bandit-moons-v0": np.concatenate([MOON, -MOON]),
    "bandit-corners-v0": 0.8 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]),
    "bandit-spiral-v0": polar(0.1 + 0.7 * ALONG, 3 * np.pi * ALONG),
    # After the toy study in DTQL's official code: the reward is highest at the centre, or far from it.
    "bandit-swissroll-v0": ROLL[::-1],
    "bandit-swissroll-far-v0": ROLL,
}


def bandit_reward(task: str, actions: np.ndarray) -> np.ndarray:
    """Reward (N,) in [0, 1] of actions (N, 2): that of the nearest mode, falling to 0 away from it.

    That of a mode is the square of its rank, from 0 to 1; on the Swiss roll it is linear in its radius.
    """
    modes = BANDITS[task]
    rewards = np.linspace(0, 1, len(modes)) ** 2  # (M,)
    if "swissroll" in task:
        radius = np.linalg.norm(modes, axis=1)
        rewards = (radius - radius[0]) / (radius[-1] - radius[0])
    squared_distances = np.square(actions[:, None] - modes).sum(axis=2)  # (N, M)
    return rewards[squared_distances.argmin(1)] * np.exp(-squared_distances.min(1) / (2 * 0.1**2))


def sample_bandit(task: str, seed: int, size: int = 10_000) -> dict[str, np.ndarray]:
    """One-step episodes from the one state, zero, as the arrays of `Dataset` by name."""
    random = np.random.default_rng(seed)
    frequency = np.linspace(2, 1, len(BANDITS[task]))
    modes = random.choice(BANDITS[task], size=size, p=frequency / frequency.sum())
    actions = random.normal(modes, 0.05).clip(-1, 1)
    rewards, zero, one = bandit_reward(task, actions), np.zeros((size, 1)), np.ones(size)
    fields = {"observations": zero, "actions": actions, "rewards": rewards, "next_observations": zero}
    return fields | {"terminals": one, "episode_ends": one, "episode_returns": rewards}


class Bandit(gymnasium.Env):
    """A bandit as an environment: one state, zero, and episodes of one step."""

    def __init__(self, task: str, render_mode: str | None = None):
        self.task, self.render_mode = task, render_mode
        self.observation_space, self.action_space = Box(-1, 1, (1,)), Box(-1, 1, (2,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple:
        return np.zeros(1, np.float32), bandit_reward(self.task, action[None]).item(), True, False, {}
