"""How fast scripts train and act, side by side: gradient steps and policy calls per second, and their ratios.

    python tools/speed.py "diffusion_ql" "dac --num-qs 2" "edp_td3 --sampler ddpm --diffusion-steps 100"
    python tools/speed.py "dac" "../older/dac.py"                 # the same script of another checkout

Each argument is a script with its own arguments. Each gets a process of its own and random data of Hopper's
size. They take turns, in rounds; a ratio, to the first script, is the median of the ratios within each round,
so that what slows the machine down for a while slows all of them. A first round, for compilation and CUDA
graphs, is not counted. A policy call is act() for one state, from and to the host, as in an evaluation.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import tyro

import toolbox
from common.cli import Positive, Threads, UserError, check_bounds, parse_args, run_command
from common.devices import compiled, cuda_graphed, default_threads, use_device

# The process of one script. It imports the speed.py of the script's own checkout.
WORKER = """
import sys, time, speed, torch
command, seconds, *sizes = sys.argv[1:]
sizes = dict(zip(("obs_dim", "action_dim", "transitions"), map(int, sizes)))
sys.argv[0] = command
try:
    calls = speed.prepare(command, speed.Args([command], **sizes))
except Exception as error:
    sys.exit(f"error: {command}: {error}")
synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
for which in sys.stdin:
    count, started, passed = 0, time.perf_counter(), 0
    while count < 5 or passed < float(seconds):
        calls[int(which)]()
        count += 1
        if count % 20 == 0 or not torch.cuda.is_available():
            synchronize()
            passed = time.perf_counter() - started
    synchronize()
    print(count / (time.perf_counter() - started), flush=True)
"""


@dataclass
class Args:
    """The speed of scripts, side by side."""

    commands: Annotated[list[str], tyro.conf.Positional]  # scripts, each in quotes with its arguments
    rounds: Positive[int] = 5  # how often the scripts take turns
    seconds: Positive[float] = 2.0  # time per script and round for training, and again for acting
    num_threads: Threads[int] = default_threads()  # threads on a CPU, where a script is not given others
    obs_dim: Positive[int] = 11  # size of the random observations
    action_dim: Positive[int] = 3  # size of the random actions
    transitions: Positive[int] = 100_000  # number of random transitions


def prepare(command: str, args: Args) -> tuple[Callable, Callable]:
    """One gradient step, and one policy call, of a script with its arguments."""
    name, *words = shlex.split(command)
    script = toolbox.load_script(name)
    script_args = parse_args(script.Args, script.TASK_SETTINGS, words)
    check_bounds(script_args)
    device = use_device(script_args.device, script_args.num_threads, script_args.matmul_precision)
    torch.manual_seed(script_args.seed)
    agent = toolbox.agent_class(script)(args.obs_dim, args.action_dim, script_args, device)
    shapes = {"obs": (args.obs_dim,), "action": (args.action_dim,), "next_obs": (args.obs_dim,)}
    columns = [
        torch.rand(args.transitions, *shapes.get(name, ()), device=device) for name in script.Batch._fields
    ]
    data = script.Batch(*(2 * column - 1 for column in columns))._replace(
        terminal=torch.zeros_like(columns[2])
    )
    if script_args.compile:
        losses = [name for name in dir(agent) if name.endswith("_loss")]  # which train() names one by one
        vars(agent).update(zip(losses, compiled(*(getattr(agent, name) for name in losses)), strict=True))
    update = cuda_graphed(partial(agent.update, data), device, script_args.cuda_graph)
    obs, steps = torch.zeros(1, args.obs_dim), cycle(range(args.transitions))  # QVPO's, as a buffer fills

    def train() -> None:
        agent.set_step(next(steps))
        update()

    return train, lambda: agent.act(obs.to(device)).cpu()


def start(command: str, args: Args) -> subprocess.Popen:
    """The process of one script, of this checkout or, if the script is a path, of the one it lies in."""
    script, *words = shlex.split(command) or [""]
    path = Path(script).expanduser()
    root = toolbox.ROOT if path.name == script else path.resolve().parent
    if not (root / "tools" / "speed.py").exists():
        raise UserError(f"{root} has no tools/speed.py: it is no checkout of this project")
    words = [shlex.join([path.name, *words]), args.seconds, args.obs_dim, args.action_dim, args.transitions]
    environment = {"OMP_NUM_THREADS": str(args.num_threads), "OMP_WAIT_POLICY": "passive"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "tools"), str(root)])
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-P", "-c", WORKER, *map(str, words)]
    return subprocess.Popen(command, env=os.environ | environment, **streams)


def rate(process: subprocess.Popen, which: int) -> float:
    """Calls per second, of training (0) or acting (1). SystemExit: the process ended, and has said why."""
    try:
        print(which, file=process.stdin, flush=True)
        return float(process.stdout.readline())
    except (BrokenPipeError, ValueError):
        sys.exit(2)


def measure(args: Args) -> list[list[list[float]]]:
    """[round][script][0 for training, 1 for acting]: calls per second."""
    processes = []
    try:
        for command in args.commands:
            processes.append(start(command, args))
        rounds = range(1 + args.rounds)  # the first is to warm up
        return [[[rate(each, 0), rate(each, 1)] for each in processes] for _ in rounds][1:]
    finally:
        for process in processes:
            process.kill()


def processor() -> str:
    """The GPU, or vendor and model of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    found = re.findall(r"^(?:vendor_id|model name)\s*: (.+)", about, re.M)
    return " ".join(found[:2]) or platform.processor()


def main(args: Args) -> None:
    rounds = measure(args)
    defaults = f"{args.num_threads} threads and the highest precision where a script is not told otherwise"
    print(f"{processor()}; {defaults}; {args.rounds} rounds of {args.seconds:g} s\n")
    print("| script and arguments | training steps/s | ratio | policy calls/s | ratio |")
    print("|---|---|---|---|---|")
    for i, command in enumerate(args.commands):
        cells = []
        for which in (0, 1):
            cells.append(f"{median(rates[i][which] for rates in rounds):.1f}")
            cells.append(f"{median(rates[i][which] / rates[0][which] for rates in rounds):.2f}")
        print(f"| `{command}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_command(main, Args)
