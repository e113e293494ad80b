"""From a task to its environment: to evaluate in, or to learn in."""

import contextlib
import json
import os
import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from common.cli import UserError
from common.datasets import Dataset
from common.tasks import Task

ROBOTS = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4", "ant": "Ant-v4"}
LONGEST_EPISODE = 1_000  # steps, where an environment has no limit of its own


def make_envs(task: Task, count: int, args: Any, dataset: Dataset | None = None) -> list[gymnasium.Env]:
    """So many fresh environments, as make_env() makes them: to score a policy of the dataset, or to learn in.

    Says what a user may not expect. UserError: they do not fit the dataset, or there is nothing to learn in.
    """
    if dataset is None and task.kind in ("d4rl", "minari"):
        known = f"such as {ROBOTS.get(task.family, 'Hopper-v4')}, or <module that registers it>:{task.name}"
        raise UserError(f"{task.name} names recorded data; to learn online, name an environment, {known}")
    envs: list[Any] = [make_env(task, args) for _ in range(count)]
    for env in envs[:1]:
        found, bounds = (
            (env.observation_space.shape[0], env.action_space.shape[0]),
            env.unwrapped.action_space,
        )
        if dataset and found != (sizes := (dataset.observations.shape[1], dataset.actions.shape[1])):
            data = f"observations of size {sizes[0]} and actions of size {sizes[1]}"
            raise UserError(f"the data has {data}, the environment of {task.name} {found[0]} and {found[1]}")
        if dataset and args.dataset and ((bounds.low != -1).any() or (bounds.high != 1).any()):
            there, (low, high) = f"{bounds.low.min():g} to {bounds.high.max():g}", args.action_bounds
            says = f"in the file that is {low:g} to {high:g} (--action-bounds)"
            print(f"{task.name} takes actions from {there}; {says}")
        if env.spec and task.horizon != env.spec.max_episode_steps == LONGEST_EPISODE:
            other = "--env-kwargs max_episode_steps=... sets another limit"
            print(f"{task.name}: an episode is cut after {LONGEST_EPISODE:,} steps; {other}")
    return envs


def make_env(task: Task, args: Any, render_mode: str | None = None) -> gymnasium.Env:
    """A fresh environment: observations (obs_dim,), flattened if need be; actions (action_dim,) in [-1, 1].

    args.env_kwargs go to gymnasium.make. Actions outside [-1, 1] are clipped, as D4RL does; MuJoCo would clip
    the torque, but reckon the cost of the whole. D4RL's tasks run in D4RL's environments, as far as those
    exist today: docs/tasks.md. UserError: there is none, it is not installed, or cannot be learned in.
    """
    options = parse_kwargs(args.env_kwargs) | ({"render_mode": render_mode} if render_mode else {})
    try:
        if not render_mode:
            ignore_broken_opengl()
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # Gymnasium's, on its v4
            env: Any = original_env(task, options)
        check_spaces(task.name, env.observation_space, env.action_space)
        if len(env.observation_space.shape or ()) != 1:  # a Dict has no shape
            env = gymnasium.wrappers.FlattenObservation(env)
        if (env.action_space.low != -1).any() or (env.action_space.high != 1).any():
            env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
        return gymnasium.wrappers.TransformAction(env, lambda action: action.clip(-1, 1), env.action_space)
    except UserError:
        raise
    except Exception as error:  # whatever an environment's author may raise, most often a missing package
        reason = f"{error}\n{advice(task, render_mode is not None)}"
        raise UserError(f"cannot make the environment of {task.name}: {reason}") from error


def original_env(task: Task, options: dict) -> gymnasium.Env:
    """The environment of a task, with its own spaces; the options are gymnasium.make's."""
    if task.kind == "bandit":
        from common.bandits import Bandit

        return Bandit(task.name)
    env_id, options = task.name.rpartition(":")[2], {"max_episode_steps": task.horizon} | options
    if task.kind == "d4rl" and task.family not in ROBOTS:
        from common.d4rl_envs import make_d4rl_env

        return make_d4rl_env(task.name, **options)
    if task.kind == "d4rl":
        env = gymnasium.make(ROBOTS[task.family], **options)
        return pad_contact_forces(env) if task.family == "ant" else env
    if task.kind == "minari":
        from common.minari_data import minari_env_spec

        spec = minari_env_spec(task.name)
        env_id, own = spec["id"], spec["kwargs"] | {"max_episode_steps": spec["max_episode_steps"]}
        options = own | {name: value for name, value in options.items() if value is not None}
    return gymnasium.make(
        env_id, **options | {"max_episode_steps": options["max_episode_steps"] or LONGEST_EPISODE}
    )


def advice(task: Task, drawn: bool) -> str:
    """What to do where an environment cannot be made."""
    base, _, version = task.name.rpartition("-")
    if drawn and "MUJOCO_GL" in os.environ:
        return f"MUJOCO_GL is {os.environ['MUJOCO_GL']}: does that work here?"
    if version in ("v2", "v3") and f"{base}-v4" in gymnasium.registry:
        return f"Gymnasium has {base}-v4"
    if task.kind == "minari":
        return (
            f"If a module registers it: --env-id <module>:<Id> --dataset {task.name}; else --eval-episodes 0"
        )
    return "Install what it needs; --eval-episodes 0 trains without evaluation"


def ignore_broken_opengl() -> None:
    """Import MuJoCo, if it is there, although MUJOCO_GL may name what does not work: nothing is drawn."""
    try:
        import mujoco  # noqa: F401
    except ImportError:
        pass
    except Exception:  # of many kinds
        os.environ["MUJOCO_GL"] = "disable"


def parse_kwargs(words: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of an environment, from JSON objects or key=value. UserError: a word is neither."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        try:
            if word.startswith("{") or not equals:
                found |= json.loads(word)
                continue
            found[key] = value  # text needs no quotes
            with contextlib.suppress(ValueError):
                found[key] = json.loads(value)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"--env-kwargs {word} is neither a JSON object nor key=value ({error})"
            ) from error
    return found


def pad_contact_forces(env: gymnasium.Env) -> gymnasium.Env:
    """Ant-v4 leaves out D4RL's 84 contact forces, which are all zero: (27,) to (111,)."""
    space = Box(-np.inf, np.inf, (111,), np.float64)
    return gymnasium.wrappers.TransformObservation(env, lambda obs: np.pad(obs, (0, 84)), space)


def check_spaces(name: str, observations: Any, actions: Any) -> None:
    """UserError unless observations are numbers and actions are vectors of real numbers in bounds."""
    boxes = list(observations.values()) if isinstance(observations, Dict) else [observations]
    numbers = len(boxes) > 0 and all(isinstance(box, Box) and 0 not in box.shape for box in boxes)
    vectors = isinstance(actions, Box) and len(actions.shape) == 1 and actions.is_bounded()
    if not (numbers and vectors and actions.dtype.kind == "f" and (actions.low < actions.high).all()):
        needed = "numbers (Box, or a Dict of them) and a bounded continuous vector (Box)"
        raise UserError(f"{name}: observations {observations} and actions {actions} are not {needed}")
