"""Whether the scripts compute the same on a GPU, and how fast they are there: python tools/speed.py --gpu

While all scripts compile, pytest holds the golden numbers to the GPU's, and runs that are stopped and resumed
to runs that are not. Then each script has a process that fills its row of the table for docs/speed.md. What
fails prints a line and stops nothing else; what there was no time for is named.
"""

import contextlib
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import speed
import torch

import toolbox

DEVICE = "cuda"
OFFLINE = ("dac", "diffusion_ql", "dtql", "edp_crr", "edp_iql", "edp_td3")
COMMANDS = dict.fromkeys(OFFLINE, "--env-id hopper-medium-v2") | {"qvpo_online": "--env-id Hopper-v4"}
WAYS = {"eager": "--no-cuda-graph", "graphed": "--cuda-graph", "TF32": "--matmul-precision high"}
WAYS |= {"compiled": "--compile --no-cuda-graph", "both": "--compile --cuda-graph"}
COLUMNS = [*WAYS, "act()/s", "in kernels, eager", "in kernels, graphed", "five seeds / one"]
COLUMNS += [f"losses off by, {way}" for way in ("graphed", "compiled", "both")]
CHECKS = ["tests/test_conformance.py", "tests/test_faults.py"]
CHOSEN = "test_conformance or every_script_is_stopped_by_ctrl_c"
LIMIT, FOR_SPEED, SECONDS = 450, 270, 1.0  # for all; of these at least for the table; for one number


def kernel_seconds(call) -> float:
    """What a call takes in kernels, or on a CPU in operators, by PyTorch's profiler."""
    with torch.profiler.profile() as profile:
        for _ in range(10):
            call()
    kind, of = ("CUDA", "device") if torch.cuda.is_available() else ("CPU", "cpu")
    events = [event for event in profile.key_averages() if event.device_type.name == kind]
    return sum(getattr(event, f"self_{of}_time_total") for event in events) / 10 / 1e6  # of microseconds


def measure(name: str, ways: list[str]) -> dict[str, float]:
    """Column -> number of a script: steps/s of each way of running it, and what else there is."""
    found, losses, command = {}, {}, f"{name} {COMMANDS[name]} --device {DEVICE}"
    for way in ways:
        try:
            train, act = speed.prepare(f"{command} {WAYS[way]}", speed.Args())
            losses[way] = np.array([loss.item() for _ in range(8) for loss in train().values()])
            found[way] = speed.calls_per_second(train, SECONDS)
            expected = losses.get("eager", losses[way])
            off = np.max(np.abs(losses[way] - expected) / (1 + np.abs(expected)))
            found[f"losses off by, {way}"] = off
            if way == "eager":
                found["act()/s"] = speed.calls_per_second(act, SECONDS)
            if way in ("eager", "graphed"):
                found[f"in kernels, {way}"] = kernel_seconds(train) * found[way]
            if off > 1e-3 and way != "TF32":  # rounding grows from step to step
                print(f"error: {name}, {way}: the first losses are off by {off:.2g}", file=sys.stderr)
        except (Exception, SystemExit) as error:
            print(f"error: {name}, {way}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
    if "graphed" in found:
        seeds = [speed.start(f"{command} --seed {seed}", speed.Args()) for seed in range(5)]
        with contextlib.suppress(SystemExit), ThreadPoolExecutor(5) as threads:  # which has been said
            found["five seeds / one"] = sum(threads.map(speed.rate, seeds, [0] * 5)) / found["graphed"]
        for process in seeds:
            process.kill()
    return found


def start_checks() -> subprocess.Popen:
    """pytest prints how many pass, and a line for each that fails."""
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--tb", "line", "-k", CHOSEN, *CHECKS]
    environment = {"CHECKED_GPU": os.environ.get("CUDA_VISIBLE_DEVICES", "0"), "COLUMNS": "200"}
    return subprocess.Popen(words, cwd=toolbox.ROOT, env=os.environ | environment)


def main() -> None:
    """Check and compile at the same time; then measure script by script, and print the table."""
    ends, gpu = time.monotonic() + LIMIT, torch.cuda.get_device_name()
    print(f"{gpu}, PyTorch {torch.__version__}, Python {platform.python_version()}", flush=True)
    row, quiet = [sys.executable, __file__], {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = {each: subprocess.Popen([*row, each, "compiled"], **quiet) for each in COMMANDS}
    first["checks"] = start_checks()
    missing = []
    for each, process in first.items():  # what is compiled stays on the disk
        try:
            process.wait(max(ends - FOR_SPEED - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            missing.append(f"{each} in the first part")
    print(*toolbox.table(["script, steps/s", *COLUMNS], []), sep="\n", flush=True)
    for each in COMMANDS:
        try:
            subprocess.run([*row, each, *WAYS], timeout=max(ends - time.monotonic(), 0), check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
            missing.append(each)
    print(f"\nmissing, for want of time or after an error: {', '.join(missing) or 'nothing'}")


if __name__ == "__main__":
    numbers = measure(sys.argv[1], sys.argv[2:])
    cells = [f"{numbers[column]:.3g}" if column in numbers else "-" for column in COLUMNS]
    print(*toolbox.table([""] * (1 + len(cells)), [[sys.argv[1], *cells]])[2:], sep="\n", flush=True)
