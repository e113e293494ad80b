"""How fast scripts train and act, side by side: gradient steps and policy calls per second, and their ratios.

    python tools/speed.py "diffusion_ql" "dac --num-qs 2" "edp_td3 --sampler ddpm --diffusion-steps 100"

Each argument is a script with its own arguments. The scripts take turns, in rounds, on random data of
Hopper's size; a ratio, to the first script, is the median of the ratios within each round, so that what slows
the machine down for a while slows all of them. Warming up, and on a GPU capturing the CUDA graph, is not
counted. A policy call is act() for one state, from and to the host, as in an evaluation.
"""

import difflib
import importlib
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import tyro
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common.datasets import UserError  # noqa: E402
from common.runs import (  # noqa: E402
    accelerated,
    given_arguments,
    keep_freed_memory,
    resolve_settings,
    run_command,
    select_device,
)


@dataclass
class Args:
    """The speed of scripts, side by side."""

    commands: Annotated[list[str], tyro.conf.Positional]  # scripts, each in quotes with its arguments
    rounds: int = 5  # how often the scripts take turns
    seconds: float = 2.0  # time per script and round for training, and again for acting
    obs_dim: int = 11  # size of the random observations
    action_dim: int = 3  # size of the random actions
    transitions: int = 100_000  # number of random transitions


def load_script(name: str):
    """The module of the script with that name."""
    names = sorted(path.stem for path in ROOT.glob("*.py"))
    name = name.removesuffix(".py")
    if name not in names:
        near = difflib.get_close_matches(name, names, cutoff=0.3) or names
        raise UserError(f"there is no script {name!r}; nearest names: {', '.join(near)}")
    return importlib.import_module(name)


def agent_class(module) -> type[nn.Module]:
    """The class in a script that updates and acts."""
    [found] = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and hasattr(value, "update") and hasattr(value, "act")
    ]
    return found


def prepare(command: str, args: Args) -> tuple[Callable[[], None], Callable[[], None]]:
    """One gradient step, and one policy call, of a script with its arguments."""
    name, *words = shlex.split(command)
    module = load_script(name)
    given = given_arguments(tyro.cli(module.Args, args=words, prog=name))
    script_args = module.Args(**dict.fromkeys(module.DEFAULT_SETTINGS) | given)
    script_args, _ = resolve_settings(script_args, module.DEFAULT_SETTINGS, module.TASK_SETTINGS)
    device = select_device(script_args.device)
    torch.manual_seed(script_args.seed)
    agent = agent_class(module)(args.obs_dim, args.action_dim, script_args, device)
    shapes = {"obs": (args.obs_dim,), "action": (args.action_dim,), "next_obs": (args.obs_dim,)}
    columns = {
        field: torch.rand(args.transitions, *shapes.get(field, ()), device=device) * 2 - 1
        for field in module.Batch._fields
    }
    data = module.Batch(**columns | {"terminal": torch.zeros(args.transitions, device=device)})
    update = accelerated(partial(agent.update, data), agent, script_args)
    obs, steps = torch.zeros(1, args.obs_dim), iter(range(sys.maxsize))

    def train() -> None:
        agent.set_step(next(steps))
        update()

    return train, lambda: agent.act(obs.to(device)).cpu()


def seconds_for(call: Callable[[], None], count: int) -> float:
    """How long so many calls take, on a GPU until it is done with them."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    started = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return time.perf_counter() - started


def warm_up(call: Callable[[], None], seconds: float) -> int:
    """The number of calls that take about so many seconds, found by calling."""
    seconds_for(call, 5)  # memory, compilation, the CUDA graph
    count = 1
    while (passed := seconds_for(call, count)) < seconds / 4:
        count *= 2
    return max(1, round(count * seconds / passed))


def measure(args: Args) -> list[tuple[str, float, float, float, float]]:
    """Per script: command, training steps/s, ratio to the first script's, policy calls/s, their ratio."""
    keep_freed_memory()
    calls = [call for command in args.commands for call in prepare(command, args)]
    counts = [warm_up(call, args.seconds) for call in calls]
    rounds = [
        [count / seconds_for(call, count) for call, count in zip(calls, counts, strict=True)]
        for _ in range(args.rounds)
    ]
    rows = []
    for i, command in enumerate(args.commands):
        row = [command]
        for kind in (0, 1):
            row.append(median(rates[2 * i + kind] for rates in rounds))
            row.append(median(rates[2 * i + kind] / rates[kind] for rates in rounds))
        rows.append(tuple(row))
    return rows


def main(args: Args) -> None:
    rows = measure(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, {torch.get_num_threads()} threads, {args.rounds} rounds of {args.seconds:g} s\n")
    print("| script and arguments | training steps/s | ratio | policy calls/s | ratio |")
    print("|---|---|---|---|---|")
    for command, steps, step_ratio, calls, call_ratio in rows:
        print(f"| `{command}` | {steps:.1f} | {step_ratio:.2f} | {calls:.1f} | {call_ratio:.2f} |")


if __name__ == "__main__":
    run_command(main, tyro.cli(Args))
