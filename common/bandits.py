"""The bandits: one-step toy tasks in two dimensions, with a rare best mode among frequent worse ones."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box


def polar(radius: float | np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


MOON = polar(0.5, np.linspace(0, np.pi, 12)) - [0.25, 0.125]
ALONG = np.sqrt(np.linspace(0, 1, 32))  # along the arm of the spiral, from the inside out
LINE = np.linspace(-0.8, 0.8, 5)
GRID = np.stack(np.meshgrid(LINE, LINE), axis=-1).reshape(-1, 2)
GRID = GRID[np.linalg.norm(GRID, axis=1).argsort(kind="stable")]  # the nearest to the centre first
TURNS = np.sqrt(np.linspace(1 / 9, 1, 36))  # equal steps along the Swiss roll, which begins at a third
ROLL = polar(0.85 * TURNS, 4.5 * np.pi * TURNS)
BANDITS = {  # the modes (M, 2) of the data, from the worst and most frequent to the best and rarest
    "bandit-8gaussians-v0": polar(0.7, np.arange(8) * np.pi / 4),
    "bandit-moons-v0": np.concatenate([MOON, -MOON]),
    "bandit-corners-v0": 0.8 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]),
    "bandit-spiral-v0": polar(0.1 + 0.7 * ALONG, 3 * np.pi * ALONG),
    # After the toy study in DTQL's official code: the reward is highest at the centre, or far from it.
    "bandit-25gaussians-v0": GRID[::-1],
    "bandit-25gaussians-far-v0": GRID,
    "bandit-swissroll-v0": ROLL[::-1],
    "bandit-swissroll-far-v0": ROLL,
}
RADIAL = [task for task in BANDITS if "25gaussians" in task or "swissroll" in task]


def bandit_mode(task: str, actions: np.ndarray) -> np.ndarray:
    """Index (N,) of the mode that is nearest to each action (N, 2); the last mode is the best."""
    return np.square(actions[:, None] - BANDITS[task]).sum(axis=2).argmin(axis=1)


def bandit_reward(task: str, actions: np.ndarray) -> np.ndarray:
    """Reward (N,) in [0, 1] of actions (N, 2): that of the nearest mode, falling to 0 away from it.

    That of a mode is the square of its rank, from 0 to 1; in RADIAL it is linear in its radius.
    """
    modes, mode = BANDITS[task], bandit_mode(task, actions)
    rewards = np.linspace(0, 1, len(modes)) ** 2  # (M,)
    if task in RADIAL:
        radius = np.linalg.norm(modes, axis=1)
        rewards = (radius - radius[0]) / (radius[-1] - radius[0])
    squared_distance = np.square(actions - modes[mode]).sum(axis=1)  # (N,)
    return rewards[mode] * np.exp(-squared_distance / (2 * 0.1**2))


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

    def __init__(self, task: str):
        self.task = task
        self.observation_space = Box(-1, 1, (1,))
        self.action_space = Box(-1, 1, (2,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple:
        return np.zeros(1, np.float32), bandit_reward(self.task, action[None]).item(), True, False, {}
