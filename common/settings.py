"""From a script's Args and its table of tasks to the settings of one run, and where each of them came from.

A setting is what was given, else what the task's row has, else the default that stands in Args.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from common.checkpoints import load_checkpoint
from common.tasks import UserError, table_names, user_path

import tyro
from typeguard import TypeCheckError, check_type

Args = TypeVar("Args", bound=Any)  # the class Args of a script
TaskSettings = dict[str, dict[str, object]]  # task or domain -> its row, whose values replace those in Args


class Bound(NamedTuple):
    """What a number must be; NaN is outside of every bound."""

    text: str
    holds: Callable[[float], bool]


Number = TypeVar("Number", int, float)
Positive = Annotated[Number, Bound("above 0 and below 2^63", lambda number: 0 < number < 2**63)]
NonNegative = Annotated[Number, Bound("at least 0 and below 2^63", lambda number: 0 <= number < 2**63)]
UnitInterval = Annotated[Number, Bound("from 0 to 1", lambda number: 0 <= number <= 1)]
Finite = Annotated[Number, Bound("finite", math.isfinite)]
Even = Annotated[Number, Bound("even and at least 4", lambda number: number >= 4 and number % 2 == 0)]


def check_bounds(args: object) -> None:
    """UserError, with the name of the flag, where a value is not of its type in Args or outside its bound."""
    for name, kind in get_type_hints(type(args), include_extras=True).items():
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        try:
            check_type(value, kind)
        except TypeCheckError as error:
            raise UserError(f"{flag} is {value}; it must be of another type: {error}") from error
        numbers = value if isinstance(value, tuple) else (value,)
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
        if not numbers:
            raise UserError(f"{flag} is empty; it must have at least one number")
        for bound in getattr(kind, "__metadata__", ()):
            for number in numbers:
                if isinstance(bound, Bound) and not bound.holds(number):
                    raise UserError(f"{flag} is {number}; it must be {bound.text}")


def task_row(env_id: str, task_settings: TaskSettings) -> tuple[dict[str, object], str]:
    """The row of a task, and what to call it: task, row (<its name>), or nothing if there is none.

    A task without a row of its own gets that of the papers' version of it, or that of its domain.
    """
    for name in table_names(env_id):
        if name in task_settings:
            return task_settings[name], "task" if name == env_id else f"row ({name})"
    return {}, ""


def settings_for(args_class: type[Args], task_settings: TaskSettings, env_id: str, **given) -> Args:
    """The settings of a task: the defaults, its row over them, what is given over that."""
    row, _ = task_row(env_id, task_settings)
    return args_class(**{"env_id": env_id} | row | given)


def sources_of(args: Any, task_settings: TaskSettings) -> dict[str, str]:
    """Setting -> where its value came from: task, row (<name>), default, or given if it differs from that."""
    row, of_row = task_row(args.env_id, task_settings)
    expected = replace(settings_for(type(args), task_settings, args.env_id), env_id=type(args).env_id)
    usual = {name: of_row if name in row else "default" for name in vars(args)}
    given = {name: "given" for name, value in vars(args).items() if value != getattr(expected, name)}
    return usual | given


@dataclass
class _First:
    """What must be known before the other arguments have defaults."""

    env_id: str
    resume: str | None


def parse_args(
    args_class: type[Args], task_settings: TaskSettings, words: Sequence[str] | None = None
) -> Args:
    """The settings that a command line asks for (by default that of this process); --help shows the task's.

    On --resume the checkpoint's settings take the place of the task's. UserError: a checkpoint of no use.
    """
    plain = _First(args_class.env_id, None)
    first, _ = tyro.cli(_First, args=words, default=plain, return_unknown_args=True, add_help=False)
    if first.resume is None:
        return tyro.cli(args_class, args=words, default=settings_for(args_class, task_settings, first.env_id))
    if not first.resume:
        raise UserError("--resume is empty; it takes a checkpoint or a run folder")
    checkpoint = load_checkpoint(user_path(first.resume))
    if checkpoint["args"].keys() != {field.name for field in fields(args_class)}:
        wrote = f"{checkpoint['results']['script']}.py, or another version of it"
        raise UserError(f"{first.resume} was written by {wrote}; resume it with that")
    saved = args_class(**checkpoint["args"])
    try:
        check_bounds(saved)
    except UserError as error:
        raise UserError(f"{first.resume} is damaged: {error}") from error
    return tyro.cli(args_class, args=words, default=replace(saved, resume=first.resume))
