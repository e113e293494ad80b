"""What users name: tasks, of which domain each is, what a wrong name may have meant, and paths of files.

A task is
    hopper-medium-v2, antmaze-umaze-v0, ...         a D4RL name: the file is downloaded on first use
    mujoco/hopper/medium-v0, local/mine-v0, ...     a Minari id: downloaded on first use
    hopper-mini-v0                                  bundled with this repository
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

DATA = Path(__file__).parent / "data"
D4RL = json.loads((DATA / "d4rl_tasks.json").read_text())
D4RL_TASKS = D4RL["tasks"]  # name -> file, horizon, and, where known, bytes and sha256
BUNDLED = "hopper-mini-v0"
PATTERNS = ["8gaussians", "moons", "corners", "spiral"]
PATTERNS += ["25gaussians", "25gaussians-far", "swissroll", "swissroll-far"]
BANDIT_TASKS = [f"bandit-{pattern}-v0" for pattern in PATTERNS]
OFFLINE = f"Without a network: {', '.join([BUNDLED, *BANDIT_TASKS])}."
# First word of a task's name -> the domain of the task, and the version that the papers train on.
DOMAINS = {"antmaze": ("antmaze", "v0"), "kitchen": ("kitchen", "v0"), "bandit": ("bandit", "v0")}
DOMAINS |= dict.fromkeys(("pen", "door", "hammer", "relocate"), ("adroit", "v1"))


class UserError(Exception):
    """A mistake of the user's: the scripts print the message, without a traceback, and exit with code 2."""


class EnvironmentFailure(UserError):
    """An environment raised an error, or gave what it must not give. A run saves what it learned before."""


def check_task(task: str) -> None:
    """UserError, with the nearest names, unless the task is one of those listed at the head of this file."""
    if task in D4RL_TASKS or task in BANDIT_TASKS or is_minari_id(task):
        return
    from gymnasium import registry

    module, _, env_id = task.rpartition(":")
    if module:  # registers env_id
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever is wrong in it
            raise UserError(f"cannot import {module} of {task}: {type(error).__name__}: {error}") from error
    elif task not in registry:
        from common.d4rl_envs import import_robotics

        with contextlib.suppress(ImportError):  # it registers more, if it is installed
            import_robotics()
    if env_id not in registry:
        nearest = difflib.get_close_matches(task, [*D4RL_TASKS, *BANDIT_TASKS, *registry], n=5)
        advice = "A task is a D4RL, Minari, Gymnasium, bundled or bandit name; a file goes to --dataset."
        raise UserError(f"unknown task {task!r}; nearest names: {', '.join(nearest) or 'none'}\n{advice}")


def is_minari_id(name: str) -> bool:
    """namespace/name-v0, with any number of namespaces; unless a file or a Gymnasium env has that name."""
    if not re.fullmatch(r"([-\w]{1,99}/)+[-\w]{1,99}-v\d{1,9}", name) or os.path.isfile(name):
        return False
    from gymnasium import registry

    return name not in registry


def table_names(task: str) -> list[str]:
    """What a task may be called in a table of settings, nearest first; only its own name if of no domain.

    antmaze-umaze-v2, antmaze-umaze-v0, antmaze: the name itself, the version of the papers, the domain. For
    Minari's copy D4RL/antmaze/umaze-v1 the last two are the same. Environments have a domain, too:
    AntMaze_UMaze-v4 is called antmaze, AdroitHandDoor-v1 adroit, FrankaKitchen-v1 kitchen.
    """
    words = re.split("[-/_]", re.sub("^(D4RL/|AdroitHand|Franka)", "", task))  # family, kind and version
    family = words[0].lower()
    if family not in DOMAINS:
        return [task]
    domain, version = DOMAINS[family]
    return [task, "-".join([family, *words[1:-1], version]), domain]


def user_path(name: str) -> Path:
    """The path that a user named; ~ is the home folder. UserError: it is empty, or there is no such home."""
    path = os.path.expanduser(name)
    if not path or path.startswith("~"):
        advice = "set HOME or name the whole path"
        raise UserError(f"{name!r} is empty, or its home folder is not known; {advice}")
    return Path(path)
