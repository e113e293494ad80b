"""From the name of a task to its environment: to evaluate in, or to learn in."""

import math
import traceback
import warnings
from typing import Any

from common.tasks import BANDIT_TASKS, D4RL_TASKS, EnvironmentFailure, UserError, check_task, is_minari_id

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

ROBOTS = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4", "ant": "Ant-v4"}
LONGEST_EPISODE = 100_000  # steps; an episode is cut there if its environment has no limit of its own
LARGEST = float(np.finfo(np.float32).max)  # of the numbers that an environment may give


def make_online_env(task: str) -> gymnasium.Env:
    """A fresh environment to learn in, as make_env() makes it; UserError for names of recorded data, too."""
    if task in D4RL_TASKS or is_minari_id(task):
        nearest = ROBOTS.get(task.split("-")[0], "Hopper-v4")
        advice = f"to learn online, name an environment, such as {nearest}"
        raise UserError(f"{task} names recorded data; {advice}")
    return make_env(task, advice="install what it needs, or choose another --env-id")


def make_env(
    task: str,
    obs_dim: int | None = None,
    action_dim: int | None = None,
    render_mode: str | None = None,
    advice: str = "--eval-episodes 0 trains without evaluation",
) -> gymnasium.Env:
    """A fresh environment: observations (obs_dim,), flattened if need be; actions (action_dim,) in [-1, 1].

    Other actions are clipped, as D4RL does; MuJoCo would clip the torque, but reckon the cost of the whole.
    D4RL's tasks run in D4RL's environments, as far as those exist today: docs/tasks.md. UserError if there is
    no environment, it is not installed or not continuous, or has other sizes than those given.
    """
    check_task(task)
    options = {"render_mode": render_mode} if render_mode else {}
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Gymnasium's, on its v4
            env: Any = original_env(task, **options)
        check_spaces(task, env.observation_space, env.action_space)
        env = flattened(env)
        if (env.action_space.low != -1).any() or (env.action_space.high != 1).any():
            env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
        env = gymnasium.wrappers.TransformAction(env, lambda action: action.clip(-1, 1), env.action_space)
    except UserError:
        raise
    except Exception as error:  # whatever an environment's author may raise, most often a missing package
        raise UserError(f"cannot make the environment of {task}: {error}\n{advice}") from error
    env_dims = env.observation_space.shape[0], env.action_space.shape[0]
    if env_dims != (obs_dim or env_dims[0], action_dim or env_dims[1]):
        data = f"observations of size {obs_dim} and actions of size {action_dim}"
        raise UserError(f"the data has {data}, the environment of {task} {env_dims[0]} and {env_dims[1]}")
    return CheckedEnv(env, task)


def original_env(task: str, **options) -> gymnasium.Env:
    """The environment of a task, with its own spaces; the options are gymnasium.make's."""
    if task in BANDIT_TASKS:
        from common.bandits import Bandit

        return Bandit(task)
    if task in D4RL_TASKS:
        family, horizon = task.split("-")[0], D4RL_TASKS[task]["horizon"]
        if family not in ROBOTS:
            from common.d4rl_envs import make_d4rl_env

            return make_d4rl_env(task, horizon, **options)
        env = gymnasium.make(ROBOTS[family], max_episode_steps=horizon, **options)
        return pad_contact_forces(env) if family == "ant" else env
    if is_minari_id(task):
        from common.minari_data import minari_env_spec

        spec = minari_env_spec(task)
    else:
        spec = vars(gymnasium.spec(task.rpartition(":")[2]))  # check_task() imported the module before it
    options["max_episode_steps"] = spec["max_episode_steps"] or LONGEST_EPISODE
    return gymnasium.make(spec["id"], **spec["kwargs"] | options)


def flattened(env: gymnasium.Env) -> gymnasium.Env:
    """The same environment with observations (obs_dim,)."""
    is_flat = len(env.observation_space.shape or ()) == 1  # a Dict has no shape
    return env if is_flat else gymnasium.wrappers.FlattenObservation(env)


def pad_contact_forces(env: gymnasium.Env) -> gymnasium.Env:
    """Ant-v4 leaves out D4RL's 84 contact forces, which are all zero: (27,) to (111,)."""
    space = Box(-np.inf, np.inf, (111,), np.float64)
    return gymnasium.wrappers.TransformObservation(env, lambda obs: np.pad(obs, (0, 84)), space)


def check_spaces(name: str, observations: gymnasium.Space, actions: gymnasium.Space) -> None:
    """UserError unless observations are numbers and actions are vectors of real numbers in bounds."""
    if not (are_numbers(observations) and are_bounded_vectors(actions)):
        needed = "numbers (Box, or a Dict of them) and a bounded continuous vector (Box)"
        raise UserError(f"{name}: observations {observations} and actions {actions} are not {needed}")


def are_numbers(space: gymnasium.Space) -> bool:
    """Whether a space is a Box with something in it, or a Dict of such spaces."""
    if isinstance(space, Dict):
        return len(space) > 0 and all(map(are_numbers, space.values()))
    return isinstance(space, Box) and 0 not in space.shape


def are_bounded_vectors(space: gymnasium.Space) -> bool:
    """Whether a space is a Box of vectors of real numbers, with room between the bounds of each."""
    if not isinstance(space, Box) or len(space.shape) != 1 or 0 in space.shape:
        return False
    is_real = np.issubdtype(space.low.dtype, np.floating)
    return bool(is_real and space.is_bounded() and (space.low < space.high).all())


class CheckedEnv(gymnasium.Wrapper):
    """The same environment; EnvironmentFailure if it raises an error or gives what is no number."""

    def __init__(self, env: gymnasium.Env, task: str):
        super().__init__(env)
        self.task = task
        self.shape = env.observation_space.shape

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        try:
            obs, info = self.env.reset(seed=seed, options=options)
            return self.checked(obs), info
        except Exception as error:
            raise self.failure("reset()", error) from error

    def step(self, action: np.ndarray) -> tuple:
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
            if not math.fabs(reward) < LARGEST:
                raise ValueError(f"the reward is {reward}")
            return self.checked(obs), reward, bool(terminated), bool(truncated), info
        except Exception as error:
            given = "" if np.isfinite(action).all() else " of an action that is not finite"
            raise self.failure(f"step(){given}", error) from error

    def checked(self, obs: np.ndarray) -> np.ndarray:
        """The observation. ValueError, TypeError: it has another type or shape, or NaN or infinity."""
        if not isinstance(obs, np.ndarray) or obs.shape != self.shape:
            raise ValueError(f"the observation is {obs}, not an array {self.shape}")
        if not np.abs(obs).max() < LARGEST:
            raise ValueError(f"the observation is {obs}")
        return obs

    def failure(self, call: str, error: Exception) -> EnvironmentFailure:
        reason = f"{type(error).__name__}: {error}"
        place = traceback.extract_tb(error.__traceback__)[-1]
        if place.filename != __file__:
            reason += f" ({place.filename}:{place.lineno})"
        return EnvironmentFailure(f"the environment of {self.task} failed in {call}: {reason}")
