"""How fast scripts train and act, side by side: gradient steps and policy calls per second, and their ratios.

    python tools/speed.py "diffusion_ql" "dac --num-qs 2" "edp_td3 --sampler ddpm --diffusion-steps 100"
    python tools/speed.py "dac" "../older/dac.py"                 # the same script of another checkout
    python tools/speed.py --gpu                                   # all scripts on a GPU: gpu.py says how

Each argument is a script with its own arguments. Each gets a process of its own and random data of Hopper's
size. They take turns, in rounds; a ratio, to the first script, is the median of the ratios within each round,
so that what slows the machine down for a while slows all of them. First steps, in which a script compiles,
are not counted. A policy call is act() for one state, from and to the host, as in an evaluation.
"""

import inspect
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

import toolbox
from common.cli import Positive, UserError, check_bounds, parse_args, run_command
from common.devices import cuda_graphed, use_device

TRANSITIONS = 100_000  # random ones


def calls_per_second(call, seconds):
    """Call it for so many seconds, and at least five times."""
    call()
    gpu, count, started, passed = torch.cuda.is_available(), 0, time.perf_counter(), 0
    while count < 5 or passed < seconds:
        call()
        count += 1
        if not gpu or count % 20 == 0:
            if gpu:
                torch.cuda.synchronize()
            passed = time.perf_counter() - started
    return count / passed


# The process imports the speed.py of the script's own checkout, which may be an older one.
WORKER = f"""
import sys, time, speed, torch
{inspect.getsource(calls_per_second)}
command, seconds, obs_dim, action_dim = sys.argv[1:]
sys.argv[0] = command
try:
    calls = speed.prepare(command, speed.Args([command], obs_dim=int(obs_dim), action_dim=int(action_dim)))
    for _ in range(8):
        calls[0]()
    for which in sys.stdin:
        print(calls_per_second(calls[int(which)], float(seconds)), flush=True)
except Exception as error:
    sys.exit(f"error: {{command}}: {{' '.join(str(error).split())[:300]}}")
"""


@dataclass
class Args:
    """The speed of scripts, side by side."""

    commands: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)  # scripts, in quotes
    gpu: bool = False  # instead, all that there is to know of a GPU: correctness and speed, in eight minutes
    rounds: Positive[int] = 5  # how often the scripts take turns
    seconds: Positive[float] = 2.0  # time per script and round for training, and again for acting
    obs_dim: Positive[int] = 11  # size of the random observations
    action_dim: Positive[int] = 3  # size of the random actions


def prepare(command: str, args: Args) -> tuple[Callable, Callable]:
    """One gradient step, and one policy call, of a script with its arguments."""
    name, *words = shlex.split(command)
    script = toolbox.load_script(name)
    script_args = parse_args(script.Args, script.TASK_SETTINGS, words)
    check_bounds(script_args)
    device = use_device(script_args.device, script_args.num_threads, script_args.matmul_precision)
    torch.manual_seed(script_args.seed)
    agent = toolbox.agent_class(script)(args.obs_dim, args.action_dim, script_args, device)
    sizes = {"obs": [args.obs_dim], "action": [args.action_dim], "next_obs": [args.obs_dim]}
    columns = [torch.rand(TRANSITIONS, *sizes.get(name, []), device=device) for name in script.Batch._fields]
    data = script.Batch(*(2 * column - 1 for column in columns))
    data = data._replace(terminal=torch.zeros_like(data.reward))
    if script_args.compile:
        for name in [name for name in dir(agent) if name.endswith("_loss")]:  # train() names them one by one
            setattr(agent, name, torch.compile(getattr(agent, name)))
    update = cuda_graphed(partial(agent.update, data), device, script_args.cuda_graph)
    state, steps = torch.zeros(1, args.obs_dim), cycle(range(TRANSITIONS))  # QVPO's, as a buffer fills

    def train() -> dict[str, torch.Tensor]:
        agent.set_step(next(steps))
        return update()

    return train, lambda: agent.act(state.to(device)).cpu()


def start(command: str, args: Args) -> subprocess.Popen:
    """The process of one script, of this checkout or, if the script is a path, of the one it lies in."""
    script, *words = shlex.split(command) or [""]
    path = Path(script).expanduser()
    root = toolbox.ROOT if path.name == script else path.resolve().parent
    if not (root / "tools" / "speed.py").exists():
        raise UserError(f"{root} has no tools/speed.py: it is no checkout of this project")
    worker = [sys.executable, "-P", "-c", WORKER, shlex.join([path.name, *words])]
    worker += map(str, (args.seconds, args.obs_dim, args.action_dim))
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # an older script's default
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "tools"), str(root)])
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(worker, env=os.environ | environment, **streams)


def rate(process: subprocess.Popen, which: int) -> float:
    """Calls per second, of training (0) or acting (1). SystemExit: the process has ended, and said why."""
    try:
        print(which, file=process.stdin, flush=True)
        return float(process.stdout.readline())
    except (OSError, ValueError):
        sys.exit(2)


def measure(args: Args) -> list[list[list[float]]]:
    """[round][script][0 for training, 1 for acting]: calls per second."""
    processes = []
    try:
        for command in args.commands:
            processes.append(start(command, args))
        return [[[rate(each, 0), rate(each, 1)] for each in processes] for _ in range(args.rounds)]
    finally:
        for process in processes:
            process.kill()


def main(args: Args) -> None:
    """Print a table of the commands, or what gpu.py finds. UserError: there is no GPU, or no command."""
    if args.gpu and not torch.cuda.is_available():
        raise UserError(f"--gpu needs a GPU, and PyTorch {torch.__version__} finds none")
    if args.gpu == bool(args.commands):
        raise UserError("name the scripts to measure, each in quotes with its arguments, or give --gpu alone")
    if args.gpu:
        import gpu  # loads scripts and tests

        return gpu.main()
    rates = np.array(measure(args))  # (rounds, scripts, 2)
    print(f"{args.rounds} rounds of {args.seconds:g} s\n")
    medians, ratios = np.median(rates, axis=0), np.median(rates / rates[:, :1], axis=0)
    cells = [[f"{rate:.1f}", f"{ratio:.2f}"] for rate, ratio in zip(medians.flat, ratios.flat, strict=True)]
    rows = [[f"`{each}`", *cells[2 * i], *cells[2 * i + 1]] for i, each in enumerate(args.commands)]
    header = ["script and arguments", "training steps/s", "ratio", "policy calls/s", "ratio"]
    print("\n".join(toolbox.table(header, rows)))


if __name__ == "__main__":
    run_command(main, Args)
