"""Whether the scripts compute the same on a GPU, and how fast they are there: python tools/speed.py --gpu

It takes at most eight minutes and needs only the repository and its requirements. It prints a table for
docs/speed.md, a line for each thing that failed, and what there was no time for. Each script has a process of
its own for each way of running it, so that what fails stops nothing else; pytest runs the checks.
"""

import os
import platform
import signal
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import speed
import torch

import toolbox

DEVICE = os.environ.setdefault("CHECKED_DEVICE", "cuda")  # of this process and those that it starts
OFFLINE = ("dac", "diffusion_ql", "dtql", "edp_crr", "edp_iql", "edp_td3")
COMMANDS = dict.fromkeys(OFFLINE, "--env-id hopper-medium-v2") | {"qvpo_online": "--env-id Hopper-v4"}
CHECKS = ["tests/test_conformance.py", __file__]
WAYS = {"eager": "--no-cuda-graph", "graphed": "--cuda-graph", "TF32": "--matmul-precision high"}
WAYS |= {"compiled": "--compile --no-cuda-graph", "both": "--compile --cuda-graph"}
SEEDS = {f"seed {seed}": f"--seed {seed}" for seed in range(5)}  # graphed, all at once
QUESTIONS = {"losses": "first_losses(train)", "steps/s": "calls_per_second(train, 1)"}
QUESTIONS |= {"acts/s": "calls_per_second(act, 1)", "kernels": "kernel_seconds(train)"}
TOLERANCE = 1e-3  # of a loss, relative to 1 + |loss|: rounding, which grows from step to step
LIMIT, FOR_SPEED = 450, 270  # seconds: for all, and of these at least for the table


# === Checks: this file is a plugin of pytest and a test ===
@pytest.fixture(autouse=True)
def golden_checks_on_the_device(request, monkeypatch):
    """What tests/conformance makes is made there, and compared on the host."""
    device = torch.device("cpu")
    if "check" in request.fixturenames:
        numpy, module = torch.Tensor.numpy, sys.modules[request.getfixturevalue("check").__module__]
        device = torch.device(DEVICE)
        monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: numpy(tensor.cpu()))
        monkeypatch.setattr(module, "CPU", device, raising=False)
    with device:
        yield


@pytest.mark.parametrize("name", COMMANDS)
def test_resume(name, tmp_path, monkeypatch):
    """A tiny run that is stopped and resumed ends as one that is not, bit for bit."""
    import runs
    import test_faults

    script = toolbox.load_script(name)
    whole = runs.train(tmp_path / "whole", script, device=DEVICE)
    stopped = test_faults.stopped(tmp_path / "stopped", monkeypatch, script=script, device=DEVICE)
    runs.resume(stopped, script)
    runs.assert_same_state(whole, stopped)


def start_checks() -> subprocess.Popen:
    """pytest prints how many pass, and a line for each that fails."""
    folders = os.pathsep.join(str(toolbox.ROOT / name) for name in ("tools", "tests"))
    words = ["-q", "-n", "0", "--noconftest", "-p", "gpu", "--tb", "no", *CHECKS]
    environment = os.environ | {"PYTHONPATH": folders, "COLUMNS": "200"}
    return subprocess.Popen([sys.executable, "-m", "pytest", *words], cwd=toolbox.ROOT, env=environment)


# === Speed ===
class Workers:
    """Processes by name, which are asked until the time is up."""

    def __init__(self, commands: dict[str, str], ends: float):
        self.processes = {name: speed.start(command, speed.Args()) for name, command in commands.items()}
        self.ends, self.answers = ends, defaultdict(lambda: np.array(np.nan))  # by name and question

    def ask(self, what: str, *names: str) -> None:
        """Ask some at the same time. One that is late is killed, and has no answer, as one that failed."""
        with ThreadPoolExecutor(len(names)) as threads:
            asked = {name: threads.submit(speed.ask, self.processes[name], QUESTIONS[what]) for name in names}
            wait(asked.values(), timeout=max(self.ends - time.monotonic(), 0))
            for name in [name for name in names if not asked[name].done()]:
                self.processes[name].kill()
        given = {name: each.result() for name, each in asked.items() if not each.exception()}
        self.answers |= {(name, what): np.array(answer) for name, answer in given.items()}

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()


def command(name: str, flags: str) -> str:
    return f"{name} {COMMANDS[name]} --device {DEVICE} {flags}"


def measure(name: str, ways: list[str], ends: float) -> dict[str, float]:
    """Header -> number of a script in the table, nan where there is none."""
    workers = Workers({way: command(name, (WAYS | SEEDS)[way]) for way in [*ways, *SEEDS]}, ends)
    try:
        workers.ask("losses", *workers.processes)
        for way in ways:
            workers.ask("steps/s", way)
        workers.ask("acts/s", "eager")
        workers.ask("steps/s", *SEEDS)
        for way in ("eager", "graphed"):
            workers.ask("kernels", way)
    finally:
        workers.end()
    of = workers.answers
    found = {f"{way}, steps/s": of[way, "steps/s"] for way in WAYS} | {"act() calls/s": of["eager", "acts/s"]}
    found["five seeds / one"] = sum(of[seed, "steps/s"] for seed in SEEDS) / of["graphed", "steps/s"]
    for way in ("eager", "graphed"):
        found[f"in kernels, {way}"] = of[way, "kernels"] * of[way, "steps/s"]
    expected = of["eager", "losses"]
    for way in ("graphed", "compiled", "both"):
        off = np.max(np.abs(of[way, "losses"] - expected) / (1 + np.abs(expected)))
        found[f"losses off by, {way}"] = off
        if off > TOLERANCE:
            print(
                f"error: {name}, {way}: the losses of the first steps are off by {off:.2g}", file=sys.stderr
            )
    return found


def main() -> None:
    """Check and compile at the same time; then measure script by script, and print the table."""
    ends, cores = time.monotonic() + LIMIT, os.cpu_count() or 1
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, cores // len(COMMANDS)))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    print(f"{name}, {cores} cores, {versions}", flush=True)
    checks = start_checks()
    compiling = Workers({name: command(name, WAYS["compiled"]) for name in COMMANDS}, ends - FOR_SPEED)
    try:
        compiling.ask("losses", *COMMANDS)  # what is compiled stays on the disk
        checks.wait(max(compiling.ends - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        checks.send_signal(signal.SIGINT)  # it says how far it has come
        time.sleep(5)
    finally:
        checks.kill()
        compiling.end()
    left_out = [f"{name} compiled" for name in COMMANDS if (name, "losses") not in compiling.answers]
    for name in COMMANDS:
        ways = [way for way in WAYS if f"{name} compiled" not in left_out or "--compile" not in WAYS[way]]
        if time.monotonic() < ends:
            found = measure(name, ways, ends)
            cells = ["-" if np.isnan(number) else f"{number:.3g}" for number in found.values()]
            table = toolbox.table(["script", *found], [[name, *cells]])
            print(*table[0 if name == next(iter(COMMANDS)) else 2 :], sep="\n", flush=True)
        if time.monotonic() > ends:
            left_out.append(name)
    print(f"\nnot all numbers, for want of time or after an error: {', '.join(left_out) or 'none'}")
