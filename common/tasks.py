"""What users name: a task is looked at once, here, and what follows from its name hangs on what was found.

hopper-medium-v2, antmaze-umaze-v0, ...         a D4RL name: the file is downloaded on first use
hopper-mini-v0                                  bundled with this repository
mujoco/hopper/medium-v0, local/mine-v0, ...     a Minari id: downloaded on first use
bandit-8gaussians-v0, bandit-moons-v0, ...      a one-step toy task, generated
Hopper-v4, mymodule:Mine-v0, ...                any Gymnasium id, with transitions from elsewhere
"""

import contextlib
import difflib
import importlib
import json
import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

from gymnasium import registry

from common.cli import UserError

DATA = Path(__file__).parent / "data"
D4RL = json.loads((DATA / "d4rl_tasks.json").read_text())
D4RL_TASKS = D4RL["tasks"]  # name -> file, horizon, and, where known, bytes and sha256
BUNDLED = "hopper-mini-v0"
PATTERNS = ("8gaussians", "moons", "corners", "spiral", "swissroll", "swissroll-far")
BANDIT_TASKS = [f"bandit-{pattern}-v0" for pattern in PATTERNS]
OFFLINE = f"Without a network: {', '.join([BUNDLED, *BANDIT_TASKS])}."


class Task(NamedTuple):
    """What a name means."""

    name: str
    kind: Literal["d4rl", "bandit", "minari", "gym"]
    family: str  # first word of the name: hopper, antmaze, pen, ...
    horizon: int | None  # steps after which an episode is cut off; None: never, or the name does not say
    file: dict  # of a D4RL name: file, bytes, sha256


def find_task(name: str) -> Task:
    """The task of that name. UserError, with the nearest names, if there is none."""
    family = name.split("-")[0]
    if name in D4RL_TASKS:
        return Task(name, "d4rl", family, D4RL_TASKS[name]["horizon"], D4RL_TASKS[name])
    if name in BANDIT_TASKS:
        return Task(name, "bandit", family, 1, {})
    if is_minari_id(name):
        return Task(name, "minari", family, None, {})
    module, _, env_id = name.rpartition(":")
    try:
        if module:  # registers env_id
            importlib.import_module(module)
    except Exception as error:  # whatever is wrong in it
        raise UserError(f"cannot import {module} (is its folder in PYTHONPATH?): {error!r}") from error
    if env_id not in registry:
        with contextlib.suppress(Exception):  # ImportError, or MuJoCo's, of what MUJOCO_GL names
            import common.d4rl_envs  # noqa: F401  # Gymnasium-Robotics registers more
    if env_id not in registry:
        nearest = difflib.get_close_matches(env_id, [*D4RL_TASKS, *BANDIT_TASKS, *registry], n=5)
        advice = "A task is a D4RL, Minari, Gymnasium, bundled or bandit name; a file goes to --dataset."
        raise UserError(f"unknown task {name!r}; nearest names: {', '.join(nearest) or 'none'}\n{advice}")
    return Task(name, "gym", family, registry[env_id].max_episode_steps, {})


def is_minari_id(name: str) -> bool:
    """namespace/name-v0, with any number of namespaces; unless a file or a Gymnasium env has that name."""
    is_id = re.fullmatch(r"([-\w]{1,99}/)+[-\w]{1,99}-v\d{1,9}", name)
    return bool(is_id) and name not in registry and not os.path.isfile(name)
