"""D4RL's environments, on top of those that are maintained today: Gymnasium's and Gymnasium-Robotics'.

Observations, rewards, starts, goals, horizons and ends of episodes are D4RL's (its d4rl/locomotion,
hand_manipulation_suite and kitchen); docs/tasks.md lists, for each domain, what still differs.
"""

import contextlib
import io
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium
import mujoco
import numpy as np
from gymnasium.spaces import Box

with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # it prints a note
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES
    from gymnasium_robotics.envs.maze import maps

MAZE_GOALS = {"umaze": (3, 1), "medium": (6, 6), "large": (7, 9)}  # row and column of the goal's cell
KITCHEN_TASKS = {  # the subtasks of each task
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}
COMPILE_ONCE = cache(mujoco.MjModel.from_xml_path)  # 100 kitchens' own models would take 8 GB and a minute
HAND_TO_OBJECT = {  # palm minus object (3,), from an observation of Adroit's tasks
    "door": lambda obs: obs[35:38],
    "hammer": lambda obs: obs[33:36] - obs[36:39],
    "relocate": lambda obs: obs[30:33],
}


def make_d4rl_env(task: str, **options) -> gymnasium.Env:
    """The environment of a D4RL task; the options are gymnasium.make's. LookupError: not rebuilt here."""
    family, *variant = task.split("-")
    if family == "antmaze":
        return AntMaze(variant[0], **options)
    if family in HAND_TO_OBJECT or family == "pen":
        return Adroit(family, **options)
    if family == "kitchen":
        return Kitchen(variant[0], **options)
    raise LookupError(f"the environments of {family} are not rebuilt here")


class AntMaze(gymnasium.Wrapper):
    """D4RL's antmaze: an ant that gets a reward of 1 when it comes within 0.5 of the goal, where it ends.

    Observations (29,) are qpos (15), which begins with x and y, and qvel (14). The start is the origin, x
    grows with the maze's columns and y with its rows, by 4 per cell; the goal is not observed. D4RL's ant
    takes steps of 0.02 s, not 0.01, has torques up to 30, not 150, and softer contacts than Gymnasium's.
    """

    def __init__(self, size: str, **options):
        rows = getattr(maps, {"umaze": "U_MAZE", "medium": "MEDIUM_MAZE", "large": "LARGE_MAZE"}[size])
        maze = {"maze_map": rows[::-1], "continuing_task": False}  # reversed: its y grows upwards
        env: Any = gymnasium.make("AntMaze_UMaze-v4", **maze, **options)
        super().__init__(env)
        self.maze = env.unwrapped
        Path(self.maze.tmp_xml_file_path).unlink(missing_ok=True)  # or one is left for each environment
        self.maze.position_noise_range = 0  # of start and goal; reset() adds D4RL's
        self.maze.ant_env._reset_noise_scale = 0.1  # qpos +- 0.1, qvel with standard deviation 0.1
        model = self.maze.ant_env.model
        model.opt.timestep = 0.02
        model.actuator_gear[:, 0] = 30
        model.geom_solimp[:, :3] = 0.8, 0.8, 0.01
        (row, column), last = MAZE_GOALS[size], len(rows) - 1
        self.cells = {"reset_cell": np.array([last - 1, 1]), "goal_cell": np.array([last - row, column])}
        self.origin = self.maze.maze.cell_rowcol_to_xy(self.cells["reset_cell"])  # of D4RL's frame
        self.observation_space = Box(-np.inf, np.inf, (29,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Start in the start's cell; the goal is up to 1.5 m away from the centre of its cell, in x and y."""
        obs, info = self.env.reset(seed=seed, options=self.cells)
        random = self.maze.np_random
        self.maze.goal = self.maze.goal + random.uniform(0, 1, 2) + random.uniform(0, 0.5, 2)
        self.maze.update_target_site_pos()  # for the picture
        return self.flat(obs), info

    def step(self, action: np.ndarray) -> tuple:
        obs, _, _, truncated, info = self.env.step(action)
        reached = bool(np.linalg.norm(obs["achieved_goal"] - self.maze.goal) <= 0.5)
        return self.flat(obs), float(reached), reached, truncated, info | {"success": reached}

    def flat(self, obs: dict) -> np.ndarray:
        return np.concatenate([obs["achieved_goal"] - self.origin, obs["observation"]])


class Adroit(gymnasium.Wrapper):
    """D4RL's pen, door, hammer and relocate: Gymnasium-Robotics', but for two differences.

    There the last three are rewarded by +0.1 per metre from hand to object, not -0.1, and the pen may drop.
    """

    def __init__(self, family: str, **options):
        self.family = family
        super().__init__(gymnasium.make(f"AdroitHand{family.title()}-v1", **options))

    def step(self, action: np.ndarray) -> tuple:
        obs, reward, terminated, truncated, info = self.env.step(action)
        if self.family == "pen":
            terminated = bool(obs[26] < 0.075)  # height of the pen, in metres
        else:
            reward = float(reward) - 0.2 * np.linalg.norm(HAND_TO_OBJECT[self.family](obs))
        return obs, float(reward), terminated, truncated, info


class Kitchen(gymnasium.ObservationWrapper):
    """D4RL's kitchen: a reward of 1 for each subtask when it is first done; it ends when all four are done.

    Observations (60,) are the joint positions of the robot (9) and the objects (21), with noise, and the goal
    (30): the positions that make the subtasks done, 0 elsewhere.
    """

    def __init__(self, variant: str, **options):
        options |= {"tasks_to_complete": list(KITCHEN_TASKS[variant]), "disable_env_checker": True}
        options |= {"robot_noise_ratio": 0.1, "object_noise_ratio": 0.1}  # as in D4RL
        with mock.patch.object(mujoco.MjModel, "from_xml_path", COMPILE_ONCE):
            super().__init__(gymnasium.make("FrankaKitchen-v1", **options))
        self.goal = np.zeros(30)
        for subtask in KITCHEN_TASKS[variant]:
            self.goal[OBS_ELEMENT_INDICES[subtask]] = OBS_ELEMENT_GOALS[subtask]
        self.observation_space = Box(-np.inf, np.inf, (60,), np.float64)

    def observation(self, obs: dict) -> np.ndarray:
        """Of Gymnasium-Robotics' (59,), which also has the velocities, and the goal."""
        return np.concatenate([obs["observation"][:9], obs["observation"][18:39], self.goal])
