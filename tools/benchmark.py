"""Train scripts x tasks x seeds: on this machine, or on a Ray cluster.

    python tools/benchmark.py --scripts dac dtql --env-ids hopper-mini-v0 --seeds 0 1 2
    python tools/benchmark.py --scripts edp_td3 --tasks d4rl-gym --run-dir runs/edp -- --batch-size 64

Started again, it goes on where it stopped: finished runs are skipped, stopped ones resumed. docs/tools.md
explains the rest.
"""

import hashlib
import json
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Literal

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import toolbox
from common import runs
from common.cli import NonNegative, Positive, UnitInterval, UserError, check_bounds, parse_args, run_command
from common.datasets import load_dataset
from common.envs import make_envs
from common.tasks import find_task

PASSED_ON = ["D4RL_DATASET_DIR", "MINARI_DATASETS_PATH", "MUJOCO_GL"]  # to other machines
ROBOTS, RECORDINGS = ("halfcheetah", "hopper", "walker2d"), ("medium", "medium-replay", "medium-expert")
MAZES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
TASK_SETS = {  # the tasks of the papers' tables
    "d4rl-gym": [f"{robot}-{recording}-v2" for recording in RECORDINGS for robot in ROBOTS],
    "d4rl-antmaze": [f"antmaze-{maze}-v0" for maze in MAZES],
    "d4rl-adroit": ["pen-human-v1", "pen-cloned-v1"],
    "d4rl-kitchen": ["kitchen-complete-v0", "kitchen-partial-v0", "kitchen-mixed-v0"],
}
TASK_SETS["d4rl"] = [task for tasks in TASK_SETS.values() for task in tasks]
TASK_SETS["mujoco-online"] = ["Hopper-v4", "Walker2d-v4", "Ant-v4", "HalfCheetah-v4", "Humanoid-v4"]
TaskSet = Literal[tuple(TASK_SETS)]


@dataclass
class Args:
    """Scripts x tasks x seeds; what stands after -- goes to every script: ... --seeds 0 -- --batch-size 64"""

    scripts: list[str]  # names of scripts: dac, dtql, ...
    env_ids: list[str] = field(default_factory=list)  # tasks
    tasks: list[TaskSet] = field(default_factory=list)  # sets of tasks, those of the papers' tables
    seeds: tuple[NonNegative[int], ...] = (0,)  # seeds
    run_dir: str = "runs"  # folder that receives a folder for each run of the grid
    workers: NonNegative[int] = 0  # runs at a time; 0: as many as CPUs and GPUs allow
    cpus_per_run: Positive[int] = 1  # CPU cores, and threads, of each run
    gpus_per_run: UnitInterval[float] = 0.0  # share of a GPU for each run, 0.5: two on each; 0: they see none
    retries: NonNegative[int] = 2  # how often a run that died is resumed
    ray_address: str | None = None  # run on this Ray cluster: host:port, or auto on one of its machines


# === What there is to do ===
@dataclass(frozen=True, eq=False)
class Job:
    """One run of the grid; its folder has the script's own run folder and its output, log.txt."""

    script: str
    env_id: str
    seed: int
    words: tuple[str, ...]  # of the script's command line
    settings: dict  # what decides what the run learns
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.script} {self.env_id} {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


def decisive(args: dict) -> dict:
    """The arguments that decide what a run learns, as JSON has them."""
    return json.loads(json.dumps({name: args[name] for name in args if name not in toolbox.WHERE_AND_HOW}))


def plan_jobs(script: str, env_id: str, seeds: list[int], words: list[str], run_dir: Path) -> list[Job]:
    """The runs of a script on a task. UserError: the script does not take the words."""
    module = toolbox.load_script(script)
    parse = partial(parse_args, module.Args, module.TASK_SETTINGS)
    try:
        plain, args = parse(["--env-id", env_id]), parse(["--env-id", env_id, *words])
    except SystemExit as end:  # tyro's, of a mistake or of --help
        raise UserError(f"{script}.py does not take {shlex.join(words)}") if end.code else end from None
    check_bounds(args)
    for name in ("env_id", "seed", "run_dir", "resume"):
        if getattr(args, name) != getattr(plain, name):
            raise UserError(f"--{name.replace('_', '-')} after --: the grid sets it")
    if os.path.isfile(getattr(args, "dataset", None) or ""):
        args.dataset = os.path.abspath(args.dataset)  # means the same everywhere
        words = [*words, "--dataset", args.dataset]
    jobs = []
    for seed in seeds:
        settings, usual = (decisive(asdict(replace(each, seed=seed))) for each in (args, plain))
        given = {name: value for name, value in settings.items() if value != usual[name]}
        digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{env_id}__{script}__{seed}" + (f"__{digest}" if given else "")
        folder = run_dir / re.sub(r"[^-\w.]", "-", name)
        own = ["--env-id", env_id, "--seed", str(seed), "--run-dir", str(folder)]
        jobs.append(Job(script, env_id, seed, (*own, *words), settings, folder))
    return jobs


def plan_grid(args: Args, words: list[str]) -> list[Job]:
    """All runs, in the order of tasks, seeds, scripts. UserError for names and arguments that are no good."""
    scripts = dict.fromkeys(toolbox.load_script(name).__name__ for name in args.scripts)
    tasks = dict.fromkeys([*args.env_ids, *(task for name in args.tasks for task in TASK_SETS[name])])
    if not scripts or not tasks:
        raise UserError("nothing to run: name --scripts, and tasks by --env-ids or --tasks")
    seeds, run_dir, jobs = list(dict.fromkeys(args.seeds)), Path(args.run_dir).expanduser().resolve(), []
    for task in map(find_task, tasks):
        planned = [plan_jobs(script, task.name, seeds, words, run_dir) for script in scripts]
        jobs += [job for of_a_seed in zip(*planned, strict=True) for job in of_a_seed]
    return jobs


def check_tasks(jobs: list[Job]) -> None:
    """UserError, before anything starts, for a task that a script cannot be trained on.

    Data that is not there yet is downloaded now, once, rather than by several runs at a time.
    """
    for job in {("dataset" in job.settings, job.env_id): job for job in jobs}.values():
        given, task = SimpleNamespace(**job.settings), find_task(job.env_id)
        try:
            if "dataset" in job.settings:
                data = load_dataset(task, given.dataset, given.seed, given.action_bounds)
                make_envs(task, min(given.eval_episodes, 1), given, data)
            else:  # the script learns online
                make_envs(task, 1, given)
        except UserError as error:
            raise UserError(f"{job.script} cannot be trained on {job.env_id}: {error}") from error


# === One run ===
def look_up(job: Job) -> tuple[str, toolbox.RecordedRun | None]:
    """What there is of the job: finished, stopped (there is a checkpoint to go on from) or new; and the run.

    UserError: the run that is there has other settings.
    """
    found = "new", None
    for path in sorted(job.folder.glob("*/checkpoint.pt")):  # their names end in the time: the newest is last
        run = toolbox.read_run(path.parent)
        ours, theirs = job.settings, decisive(run.args)
        names = sorted(theirs.keys() | ours.keys())
        if other := [name for name in names if theirs.get(name, ours.get(name)) != ours.get(name)]:
            was = ", ".join(f"{name} {theirs.get(name)}" for name in other)
            raise UserError(f"{run.folder} was made with {was}: move it away, or choose another --run-dir")
        found = "finished" if run.finished else "stopped", run
    return found


def is_busy(job: Job) -> bool:
    """Whether a script is at work for the job already: it locks its run folder, and outlives a benchmark."""
    try:
        for folder in job.folder.glob("*/"):
            FileLock(folder / "run.lock").acquire(blocking=False).lock.release()
    except Timeout:
        return True
    except OSError:  # a file system without locks
        pass
    return False


def execute(job: Job, environment: dict[str, str], retries: int) -> str:
    """Make the run, or what is missing of it, and say how its script ended; if it dies, it is resumed."""
    how = "not begun"
    while is_busy(job) and not runs.stop_requested.is_set():
        time.sleep(0.5)
    job.folder.mkdir(parents=True, exist_ok=True)
    for _ in range(1 + retries):
        state, found = look_up(job)
        if state == "finished" or runs.stop_requested.is_set():
            break
        words = [sys.executable, str(toolbox.ROOT / f"{job.script}.py")]
        words += ["--num-threads", environment["OMP_NUM_THREADS"], *job.words]
        words += ["--resume", str(found.folder)] if found else []
        with open(job.log, "a") as log:
            head = f"{time.strftime('%F %T')} on {socket.gethostname()}, {state}"
            print(f"=== {head}: {shlex.join(words)}", file=log, flush=True)
            code = run_script(words, os.environ | environment, log)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if code in (0, 2):  # after a mistake it would come to the same
            break
    return how


def run_script(words: list[str], environment: dict[str, str], log: IO) -> int:
    """The exit code of a process; it gets SIGTERM when this one is to stop."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
    # In a session of its own a Ctrl-C in the terminal does not reach it.
    process = subprocess.Popen(words, env=environment, **streams, start_new_session=True)
    try:
        while process.poll() is None and not runs.stop_requested.is_set():
            time.sleep(0.1)
    finally:  # also where ray.cancel() raises in the loop
        if process.poll() is None:
            process.terminate()
        process.wait()
    return process.returncode


# === Where the runs are made: how to submit one, how to stop all, and what to say of the place ===
def this_machine(args: Args) -> tuple[Callable[..., Future], Callable, str]:
    """Processes on this machine, so many at a time; those with a share of a GPU take turns on the GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    room = fitting = max(cores // args.cpus_per_run, 1)
    if args.gpus_per_run:
        room = int(1 / args.gpus_per_run) * len(gpus)
        if room < (args.workers or 1):
            found = f"{len(gpus)} GPUs here have room for {room} runs at a time"
            raise UserError(f"--gpus-per-run {args.gpus_per_run:g}: {found}; give fewer --workers")
    room = args.workers or min(room, fitting)
    threads, free = ThreadPoolExecutor(room), queue.SimpleQueue()
    for i in range(room):
        free.put(gpus[i % len(gpus)] if args.gpus_per_run else "")

    def run(job: Job, environment: dict[str, str], retries: int) -> str:
        gpu = free.get()
        try:
            return execute(job, environment | {"CUDA_VISIBLE_DEVICES": gpu}, retries)
        finally:
            free.put(gpu)

    about = f"{room} at a time on {socket.gethostname()} with {cores} cores, {len(gpus)} GPUs"
    return partial(threads.submit, run), lambda: None, about  # execute() itself looks at the flag


def ray_cluster(args: Args) -> tuple[Callable[..., Future], Callable, str]:
    """Tasks of a Ray cluster, whose machines share the folders of the repository and of the runs."""
    address = args.ray_address
    try:
        import ray

        if ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except ImportError:
        raise UserError("--ray-address needs Ray: pip install -r requirements-extras.txt") from None
    except Exception as error:  # of many kinds
        advice = f"`ray start --head` shows the address ({str(error).strip().splitlines()[0]})"
        raise UserError(f"no Ray cluster answers at --ray-address {address}; {advice}") from error
    # Where a machine dies, Ray calls execute() on another one.
    options = dict(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, max_retries=args.retries)
    task, references = ray.remote(**options)(execute), []

    def submit(*arguments) -> Future:
        references.append(task.remote(*arguments))
        return references[-1].future()

    about = f"on the Ray cluster {address} with {len(ray.nodes())} machines"
    return submit, lambda: [ray.cancel(reference) for reference in references], about


# === All runs ===
def outcome(job: Job, future: Future) -> tuple[str, str]:
    """Whether a run finished or failed, and what to say of it."""
    run = None
    try:
        state, run = look_up(job)
        if state == "finished":
            scores = [f"{run.unit} {value:.5g}" for value in run.evaluations.values()] or ["not evaluated"]
            return "finished", f"{scores[-1]} after {timedelta(seconds=int(3600 * run.hours))}"
        lines = [line for line in job.log.read_text(errors="replace").splitlines()[-20:] if line.strip()]
        how = f"{future.result()}; {([line for line in lines if line.startswith('error: ')] or lines)[-1]}"
    except Exception as error:  # another run in the folder, a full disk, a machine that died
        how = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
    at = f"at step {run.step:,}" if run else "before its first checkpoint"
    return "failed", f"{at}: {how}\n  log: {job.log}"


def run_all(jobs: list[Job], args: Args) -> Counter:
    """Make the runs and count how they end; after Ctrl-C, until all have stopped."""
    submit, stop, about = ray_cluster(args) if args.ray_address else this_machine(args)
    print(about)
    environment = {"OMP_NUM_THREADS": str(args.cpus_per_run), "OMP_WAIT_POLICY": "passive"}
    environment |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    counts, stopping = Counter(), False
    pending = {submit(job, environment, args.retries): job for job in jobs}
    with tqdm(total=len(jobs), unit="run", dynamic_ncols=True, disable=None) as bar:
        while pending:
            done = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED).done
            if runs.stop_requested.is_set() and not stopping:
                bar.write("interrupted: the runs under way save and stop")
                stop()
                stopping = True
            for job, future in [(pending.pop(future), future) for future in done]:
                how, what = outcome(job, future)
                how = "stopped" if how == "failed" and stopping else how
                if how != "stopped":
                    bar.write(f"{how:10}{job.name}: {what}")
                counts[how] += 1
                bar.update()
    return counts


def main(args: Args, words: list[str]) -> None:
    """Make the runs of the grid that are not finished yet; words are for the command line of each script."""
    if args.ray_address and args.workers:
        raise UserError("--workers is for one machine; on a Ray cluster --cpus-per-run limits the runs")
    jobs, started = plan_grid(args, words), time.time()
    found = {job: look_up(job)[0] for job in jobs}
    states = Counter(found.values())
    numbers = ", ".join(f"{states[state]} {state}" for state in ("finished", "stopped", "new"))
    print(f"{len(jobs)} runs in {jobs[0].folder.parent}: {numbers}")
    check_tasks([job for job in jobs if found[job] == "new"])
    if not (todo := [job for job in jobs if found[job] != "finished"]):
        return
    with runs.stopping_between_steps():
        counts = run_all(todo, args) + Counter(finished=states["finished"])
        numbers = ", ".join(f"{counts[state]} {state}" for state in ("finished", "failed", "stopped"))
        print(f"{numbers}, of {len(jobs)} runs, after {timedelta(seconds=int(time.time() - started))}")
        runs.stop_if_asked()
    if counts["finished"] < len(jobs):
        sys.exit(1)


if __name__ == "__main__":
    run_command(partial(main, words=toolbox.take_words_for_scripts()), Args)
