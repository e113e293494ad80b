"""The command line and a user's mistakes. A setting is what was given, else the task's row's, else Args'."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro

FORMAT = 3  # of checkpoint.pt, best.pt and results.json; the files of another format are refused
Args = TypeVar("Args", bound=Any)  # the class Args of a script
TaskSettings = dict[str, dict[str, object]]  # task or domain -> its row, whose values replace those in Args
# First word of a task's name -> the domain of the task, and the version that the papers train on.
DOMAINS = {"antmaze": ("antmaze", "v0"), "kitchen": ("kitchen", "v0"), "bandit": ("bandit", "v0")}
DOMAINS |= dict.fromkeys(("pen", "door", "hammer", "relocate"), ("adroit", "v1"))

# What is bounded, by a text and by what that means; NaN is outside of every bound.
Number = TypeVar("Number", int, float)
Positive = Annotated[Number, "above 0 and below 2^63", lambda number: 0 < number < 2**63]
NonNegative = Annotated[Number, "at least 0 and below 2^63", lambda number: 0 <= number < 2**63]
UnitInterval = Annotated[Number, "from 0 to 1", lambda number: 0 <= number <= 1]
Finite = Annotated[Number, "finite", math.isfinite]
Even = Annotated[Number, "even and at least 4", lambda number: number >= 4 and number % 2 == 0]
Threads = Annotated[Number, "from 1 to 1024", lambda number: 0 < number <= 1024]  # PyTorch crashes above


class UserError(Exception):
    """A mistake of the user's: the scripts print the message, without a traceback, and exit with code 2."""


def run_command(main: Callable, args_class: type, task_settings: TaskSettings | None = None) -> None:
    """Run main(arguments) of a script or, without task_settings, a tool. Exit codes: 2, and 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        args: Any = tyro.cli(args_class) if task_settings is None else parse_args(args_class, task_settings)
        check_bounds(args)
        main(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def check_bounds(args: object) -> None:
    """UserError, with the name of the flag, where a number is outside of its bound in Args."""
    for name, kind in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        kind, numbers = (get_args(kind)[0], value) if isinstance(value, tuple) else (kind, [value])
        bound: Any = getattr(kind, "__metadata__", ())  # none, a marker of tyro's, or a text and its meaning
        if len(bound) == 2 and not (numbers and all(map(bound[1], numbers))):
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {bound[0]}")


# === Settings ===
def task_row(env_id: str, task_settings: TaskSettings) -> tuple[dict[str, object], str]:
    """The row of a task, and what to call it: task, row (<its name>), or nothing if there is none.

    Without a row of its own it gets that of the papers' version of it, or of its domain: antmaze-umaze-v2 and
    Minari's D4RL/antmaze/umaze-v1 that of antmaze-umaze-v0, else antmaze's; AdroitHandDoor-v1 adroit's.
    """
    family, *words = re.split("[-/_]", re.sub("^(D4RL/|AdroitHand|Franka)", "", env_id))
    domain, version = DOMAINS.get(family.lower(), ("", ""))
    for name in (env_id, "-".join([family.lower(), *words[:-1], version]), domain):
        if name in task_settings:
            return task_settings[name], "task" if name == env_id else f"row ({name})"
    return {}, ""


def settings_for(args_class: type[Args], task_settings: TaskSettings, env_id: str, **given) -> Args:
    """The settings of a task: the defaults, its row over them, what is given over that."""
    return args_class(**{"env_id": env_id} | task_row(env_id, task_settings)[0] | given)


def sources_of(args: Any, task_settings: TaskSettings) -> dict[str, str]:
    """Setting -> where its value came from: task, row (<name>), default, or given if it differs from that."""
    row, of_row = task_row(args.env_id, task_settings)
    expected = replace(settings_for(type(args), task_settings, args.env_id), env_id=type(args).env_id)
    usual = {name: of_row if name in row else "default" for name in vars(args)}
    return usual | {name: "given" for name in vars(args) if getattr(args, name) != getattr(expected, name)}


def parse_args(args_class: type[Args], task_settings: TaskSettings, words: list[str] | None = None) -> Args:
    """What the words ask for, over the task's row or --resume's checkpoint. UserError: unfit to resume."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # of what decides on the defaults
    parser.add_argument("--env-id", "--env_id", default=args_class.env_id)
    parser.add_argument("--resume")
    first, _ = parser.parse_known_args(words)
    if first.resume is None:
        return tyro.cli(args_class, args=words, default=settings_for(args_class, task_settings, first.env_id))
    from common.checkpoints import load_checkpoint  # PyTorch, which --help and the tools can do without

    checkpoint = load_checkpoint(Path(first.resume).expanduser())
    if checkpoint["args"].keys() != {field.name for field in fields(args_class)}:
        wrote = f"{checkpoint['results']['script']}.py, or another version of it"
        raise UserError(f"{first.resume} was written by {wrote}; resume it with that")
    default = replace(args_class(**checkpoint["args"]), resume=first.resume)
    return tyro.cli(args_class, args=words, default=default)
