"""From a task to its environment: to evaluate in, or to learn in."""

import json
import os
import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from common.cli import UserError
from common.datasets import Dataset
from common.tasks import Task, find_task

ROBOTS = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}
LONGEST_EPISODE = 1_000  # steps, where an environment has no limit of its own


def make_envs(task: Task, count: int, args: Any, dataset: Dataset | None = None) -> list[gymnasium.Env]:
    """So many fresh environments, as make_env() makes them: to score a policy of the dataset, or to learn in.

    Says what a user may not expect. UserError: they do not fit the dataset, or the task names no environment.
    """
    other_data = not dataset or (args.dataset and task.kind == "minari")  # nothing is downloaded to ask it
    if count and other_data and task.kind in ("d4rl", "minari"):
        known = f"such as {ROBOTS.get(task.family, 'Hopper-v4')}, or <module that registers it>:{task.name}"
        raise UserError(f"{task.name} names recorded data; here name an environment, {known}")
    envs = [make_env(task, args) for _ in range(count)]
    for env in envs[:1]:
        found = [space.shape[0] for space in (env.observation_space, env.action_space)]
        if dataset and found != (sizes := [dataset.observations.shape[1], dataset.actions.shape[1]]):
            raise UserError(f"observations and actions of {task.name} have sizes {found}, the data's {sizes}")
        if dataset and args.dataset:  # to be compared with what was said of the data
            print(f"{task.name} takes actions in {env.unwrapped.action_space}")
        if env.spec and task.horizon != env.spec.max_episode_steps == LONGEST_EPISODE:
            print(f"{task.name} is cut after {LONGEST_EPISODE:,} steps; --env-kwargs max_episode_steps=...")
    return envs


def make_env(task: Task, args: Any, render_mode: str | None = None) -> Any:
    """A fresh environment: observations (obs_dim,), flattened if need be; actions (action_dim,) in [-1, 1].

    args.env_kwargs go to gymnasium.make. Actions outside [-1, 1] are clipped, as D4RL does; MuJoCo would clip
    the torque, but reckon the cost of the whole. UserError: it cannot be made, or not be learned in.
    """
    options = parse_kwargs(args.env_kwargs) | ({"render_mode": render_mode} if render_mode else {})
    if not render_mode:  # nothing is drawn, so what MUJOCO_GL names need not work
        try:
            import mujoco  # noqa: F401
        except Exception:  # of many kinds; without MuJoCo, too
            os.environ["MUJOCO_GL"] = "disable"
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Gymnasium's, on its v4
            env: Any = original_env(task, options)
        if isinstance(env.observation_space, Dict):  # its keys in order, as Minari has them
            env.observation_space = Dict(dict(env.observation_space.spaces))
        if len(env.observation_space.shape or ()) != 1:  # a Dict has no shape
            env = gymnasium.wrappers.FlattenObservation(env)
    except UserError:
        raise
    except Exception as error:  # whatever an environment's author may raise, most often a missing package
        newer, gl = f"{task.name.rpartition('-')[0]}-v4", os.environ.get("MUJOCO_GL")
        advice = "Install what it needs, or train with --eval-episodes 0"
        if render_mode and gl:
            advice = f"MUJOCO_GL is {gl}: does that work here?"
        elif task.name.endswith(("-v2", "-v3")) and newer in gymnasium.registry:
            advice = f"Gymnasium has {newer}"
        elif task.kind == "minari":
            advice += f"; or --env-id <module that registers it>:<Id> --dataset {task.name}"
        raise UserError(f"cannot make the environment of {task.name}: {error}\n{advice}") from error
    space = env.action_space
    vector = isinstance(space, Box) and len(space.shape) == 1 and space.is_bounded()
    if not (vector and space.dtype.kind == "f" and (space.low < space.high).all()):
        raise UserError(f"{task.name}: actions {space} are not a bounded continuous vector (Box)")
    if (space.low != -1).any() or (space.high != 1).any():
        env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return gymnasium.wrappers.TransformAction(env, lambda action: action.clip(-1, 1), env.action_space)


def original_env(task: Task, options: dict) -> gymnasium.Env:
    """The environment of a task, with its own spaces; the options are gymnasium.make's."""
    if task.kind == "bandit":
        from common.bandits import Bandit

        return Bandit(task.name, **options)
    env_id, options = task.name.rpartition(":")[2], {"max_episode_steps": task.horizon} | options
    if task.kind == "d4rl":
        if task.family not in ROBOTS:
            from common.d4rl_envs import make_d4rl_env

            return make_d4rl_env(task.name, **options)
        env_id = ROBOTS[task.family]
    if task.kind == "minari":
        from common.other_data import minari_env_spec

        env_id, own_options = minari_env_spec(task.name)
        options = own_options | {name: value for name, value in options.items() if value is not None}
    limits = options["max_episode_steps"], find_task(env_id).horizon, LONGEST_EPISODE  # registers it, too
    limit = next(steps for steps in limits if steps is not None)  # Gymnasium refuses 0
    return gymnasium.make(env_id, **options | {"max_episode_steps": limit})


def parse_kwargs(words: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of an environment from key=value; a value is JSON, Python's or text. UserError: no value."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--env-kwargs {word} is not key=value, such as max_episode_steps=500")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return found
