"""Environments for tests of the tools: quick, easily learned, and drawn without OpenGL."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict


class Line(gym.Env):
    """Walk up a line; an action is the next step, and most of the reward. Beyond 12 the episode ends.

    shared: observations are one buffer that is changed in place, as environments in the wild have it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    action_space = Box(-2, 2, (1,))

    def __init__(self, nested: bool = False, shared: bool = False, render_mode: str | None = None):
        self.nested, self.shared, self.render_mode = nested, shared, render_mode
        self.buffer = np.zeros(2)
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float64)
        if nested:
            place = Box(-np.inf, np.inf, (1,), np.float64)
            self.observation_space = Dict(time=Box(0, np.inf, (1, 1)), place=place)

    def observe(self):
        if self.nested:
            return {"place": np.array([self.place]), "time": np.full((1, 1), self.time, np.float32)}
        self.buffer[:] = self.place, self.time
        return self.buffer if self.shared else self.buffer.copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = self.np_random.uniform(-1, 1), 0.0
        return self.observe(), {}

    def step(self, action):
        self.place += float(action[0])
        self.time += 1
        return self.observe(), float(action[0]) + 0.01 * self.place, self.place > 12, False, {}

    def render(self):
        """Rows below the place are white; 30 pixels long and, unlike most films, of an odd height."""
        frame = np.zeros((31, 30, 3), np.uint8)
        frame[: int(np.clip(self.place, -15, 15)) + 15] = 255
        return frame


gym.register("Line-v0", "line:Line", max_episode_steps=10)
gym.register("ClassLine-v0", Line, max_episode_steps=10, kwargs={"shared": True})  # JSON has no classes
