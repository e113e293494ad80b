"""Recorded data for tests: HDF5 files in D4RL layout, and Minari datasets of toy environments."""

import gymnasium
import h5py
import minari
import numpy as np
from gymnasium.spaces import Box, Dict
from minari.data_collector.episode_buffer import EpisodeBuffer


def write(path, **changes):
    """An HDF5 file in D4RL layout, 10 rows of hopper's sizes; changes replace fields, None leaves one out."""
    fields = {
        "observations": np.repeat(np.arange(10, dtype=np.float32)[:, None], 11, axis=1),
        "actions": np.zeros((10, 3), np.float32),
        "rewards": np.arange(10, dtype=np.float32),
        "terminals": np.zeros(10, bool),
        "timeouts": np.zeros(10, bool),
    }
    with h5py.File(path, "w") as file:
        for name, values in {**fields, **changes}.items():
            if values is not None:
                file[name] = values
    return str(path)


def flags(*rows, length=10):
    """(length,), true on the given rows."""
    return np.isin(np.arange(length), rows)


class Reach(gymnasium.Env):
    """A goal-conditioned task with actions in [0, 4] that ends at the fifth step."""

    action_space = Box(0, 4, (2,))
    sizes = {"observation": 3, "achieved_goal": 2, "desired_goal": 2}
    observation_space = Dict([(name, Box(-9, 9, (size,))) for name, size in sizes.items()])

    def observe(self):
        state = self.np_random.normal(size=7).astype(np.float32)
        return {"observation": state[:3], "achieved_goal": state[3:5], "desired_goal": state[5:]}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), float(action.sum()), self.steps == 5, False, {}


gymnasium.register("Reach-v0", f"{__name__}:Reach", max_episode_steps=20)


def stack(observations):
    """One array of all rows, or a dict of such."""
    if isinstance(observations[0], dict):
        return {key: stack([values[key] for values in observations]) for key in observations[0]}
    return np.stack(observations)


def record(dataset_id, env, **metadata):
    """Records three episodes of random actions as a local Minari dataset; returns them."""
    episodes = []
    for seed in range(3):
        env.action_space.seed(seed)
        observations, steps, over = [env.reset(seed=seed)[0]], [], False
        while not over:
            action = env.action_space.sample()
            observation, *outcome, _ = env.step(action)
            observations.append(observation)
            steps.append((action, *outcome))
            over = outcome[1] or outcome[2]
        names = ("actions", "rewards", "terminations", "truncations")
        columns = zip(*steps, strict=True)
        episodes.append(dict(zip(names, map(list, columns), strict=True)) | {"observations": observations})
    buffers = [EpisodeBuffer(**each | {"observations": stack(each["observations"])}) for each in episodes]
    minari.create_dataset_from_buffers(dataset_id, buffer=buffers, env=env, **metadata)
    return episodes
