"""Train scripts x tasks x seeds: on this machine, or on a Ray cluster.

    python tools/benchmark.py --scripts dac dtql --env-ids hopper-mini-v0 --seeds 0 1 2 --workers 2

Started again, it goes on where it stopped: finished runs are skipped, interrupted ones resumed.
docs/tools.md explains the rest.
"""

import contextlib
import difflib
import fcntl
import hashlib
import importlib
import json
import math
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.datasets import (  # noqa: E402
    BANDITS,
    D4RL_TASKS,
    UserError,
    check_task,
    d4rl_file,
    is_minari_id,
    make_env,
)
from common.runs import cannot_write, given_arguments, resolve_settings, run_command, show  # noqa: E402

# Where and how a run is made, not what it learns: runs that differ in these alone are the same run.
WHERE_AND_HOW = {"run_dir", "resume", "device", "compile", "cuda_graph", "log_every", "save_every"}
PASSED_ON = ["D4RL_DATASET_DIR", "D4RL_MIRROR", "MINARI_DATASETS_PATH", "MUJOCO_GL"]  # to other machines


@dataclass
class Args:
    """Scripts x tasks x seeds; what stands after -- goes to every script: ... --seeds 0 -- --batch-size 64"""

    scripts: list[str]  # names of scripts: dac, dtql, ...
    env_ids: list[str]  # tasks
    seeds: list[int] = field(default_factory=lambda: [0])  # seeds
    total_steps: int | None = None  # steps of every run; None: the script's own for the task
    run_dir: str = "runs"  # folder of the run folders; their output goes to logs/ in it
    workers: int | None = None  # runs at a time; None: as many as CPUs and GPUs allow
    cpus_per_run: int = 1  # CPU cores, and threads, of each run
    gpus_per_run: float = 0.0  # GPUs of each run, 0.5: two runs share one; 0: the run sees no GPU
    retries: int = 2  # how often a run that died is resumed
    ray_address: str | None = None  # run on this Ray cluster: host:port, or auto on one of its machines
    dry_run: bool = False  # say what there is to do, and start nothing


# === What there is to do ===
@dataclass(frozen=True, eq=False)
class Job:
    """One run of the grid."""

    script: str  # dac
    env_id: str  # hopper-mini-v0
    seed: int
    arguments: tuple[str, ...]  # everything for the script's command line
    settings: dict  # every argument of the run, as config.json has them
    given: frozenset[str]  # names of the arguments that were asked for
    run_dir: Path

    @property
    def name(self) -> str:
        return f"{self.script} {self.env_id} {self.seed}"

    @property
    def log(self) -> Path:
        """The file for its output; it bears a hash of the settings, so that each run has its own."""
        settings = {name: value for name, value in self.settings.items() if name not in WHERE_AND_HOW}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{self.env_id.replace('/', '-')}__{self.script}__{self.seed}__{digest}.log"
        return self.run_dir / "logs" / name


def script_names() -> list[str]:
    """The scripts that can be trained: the top-level files with a function train()."""
    return sorted(path.stem for path in ROOT.glob("*.py") if "\ndef train(" in path.read_text())


def full_path(dataset: str | None) -> str | None:
    """A dataset's absolute path if it is a file, so that it means the same everywhere; else its name."""
    path = Path(dataset).expanduser() if dataset else None
    return str(path.resolve()) if path and path.is_file() else dataset


def plan_job(script: str, env_id: str, seed: int, words: list[str], run_dir: Path) -> Job:
    """The job with all its settings. UserError, or tyro's SystemExit, for what the script does not take."""
    module = importlib.import_module(script)
    arguments = ["--env-id", env_id, "--seed", str(seed), "--run-dir", str(run_dir), *words]
    parsed = tyro.cli(module.Args, args=arguments, prog=f"{script}.py")
    if parsed.resume:
        raise UserError("--resume: interrupted runs of the grid are found and resumed without it")
    given = given_arguments(parsed, arguments)
    unresolved = module.Args(**dict.fromkeys(module.DEFAULT_SETTINGS) | given)
    args, _ = resolve_settings(unresolved, module.DEFAULT_SETTINGS, module.TASK_SETTINGS)
    settings = json.loads(json.dumps(asdict(args))) | {"dataset": full_path(args.dataset)}
    if args.dataset:
        arguments += ["--dataset", settings["dataset"]]
    return Job(script, env_id, seed, tuple(arguments), settings, frozenset(given), run_dir)


def check_combination(job: Job) -> None:
    """UserError, before anything starts, for a task that the script cannot be trained on.

    A D4RL file that is not there yet is downloaded now, once, rather than by several runs at a time.
    """
    script, env_id, dataset = job.script, job.env_id, job.settings["dataset"]
    online = hasattr(importlib.import_module(script), "make_online_env")
    recorded = env_id in D4RL_TASKS or is_minari_id(env_id)
    try:
        if online and dataset:
            raise UserError("it learns online and reads no --dataset")
        if online and recorded:
            raise UserError("it learns online and needs an environment, such as Hopper-v4")
        if not online and dataset and not is_minari_id(dataset) and not Path(dataset).is_file():
            raise UserError(f"no such file: {dataset}; --dataset takes an HDF5 file or a Minari id")
        if not online and not dataset and not recorded and env_id not in BANDITS:
            raise UserError(
                "the task has no transitions of its own; name a file or Minari id by -- --dataset"
            )
        if job.settings["eval_episodes"] > 0 and not is_minari_id(env_id):
            make_env(env_id).close()
        if not dataset and env_id in D4RL_TASKS:
            d4rl_file(env_id)
    except UserError as error:
        raise UserError(f"{script} cannot be trained on {env_id}: {error}") from error


def plan_grid(args: Args, words: list[str]) -> list[Job]:
    """All runs, checked, in the order of tasks, seeds, scripts. UserError for what cannot be run."""
    known = script_names()
    scripts = [name.removesuffix(".py") for name in args.scripts]
    for name in scripts:
        if name not in known:
            near = difflib.get_close_matches(name, known, cutoff=0.3) or known
            raise UserError(f"there is no script {name!r}; nearest names: {', '.join(near)}")
    for task in args.env_ids:
        check_task(task)
    for name in ("scripts", "env_ids", "seeds"):
        if not getattr(args, name):
            raise UserError(f"nothing to run: --{name.replace('_', '-')} is empty")
    if args.total_steps is not None:
        words = ["--total-steps", str(args.total_steps), *words]
    for flag in ("--env-id", "--seed", "--run-dir"):
        if any(word.split("=")[0].replace("_", "-") == flag for word in words):
            raise UserError(f"{flag} after --: the grid sets it, by --env-ids, --seeds and --run-dir")
    run_dir = Path(args.run_dir).expanduser().resolve()
    jobs = [
        plan_job(script, env_id, seed, words, run_dir)
        for env_id in dict.fromkeys(args.env_ids)
        for seed in dict.fromkeys(args.seeds)
        for script in dict.fromkeys(scripts)
    ]
    for job in {(job.script, job.env_id): job for job in jobs}.values():
        check_combination(job)
    return jobs


# === What is there already ===
def read_json(path: Path) -> dict:
    """The object in a JSON file; an empty one if there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def same_run(job: Job, config: dict) -> bool:
    """Whether a run with this config.json has the job's settings, but for where and how it was made.

    An argument that the script has got since is taken to be at its default there.
    """
    theirs = config.get("args", {})
    theirs = theirs | {"dataset": full_path(theirs.get("dataset"))}
    if theirs.keys() - job.settings.keys() - WHERE_AND_HOW or (job.given - WHERE_AND_HOW) - theirs.keys():
        return False
    return all(theirs[name] == job.settings[name] for name in theirs.keys() - WHERE_AND_HOW)


def read_runs(run_dir: Path) -> dict[tuple, list[tuple[Path, dict, dict]]]:
    """(script, task, seed) -> its runs, each as folder, config.json and results.json, in order of names."""
    runs = defaultdict(list)
    for path in sorted(run_dir.glob("*/config.json")):
        config, results = read_json(path), read_json(path.with_name("results.json"))
        args = config.get("args", {})
        script = config.get("script", results.get("script"))  # config.json has not always had it
        runs[script, args.get("env_id"), args.get("seed")].append((path.parent, config, results))
    return runs


def look_up(job: Job, runs: dict | None = None) -> tuple[str, Path | None, dict, int]:
    """What there is of the job: (state, folder, results, number of its runs with other settings).

    The state is finished, interrupted (there is a checkpoint), or new. runs is what read_runs() found.
    """
    runs = read_runs(job.run_dir) if runs is None else runs
    theirs = runs.get((job.script, job.env_id, job.seed), [])
    same = [(folder, results) for folder, config, results in theirs if same_run(job, config)]
    interrupted = []
    for folder, results in same:
        step = results.get("step", -1)
        if results.get("finished") and step >= job.settings["total_steps"]:
            return "finished", folder, results, len(theirs) - len(same)
        if (folder / "checkpoint.pt").exists():
            interrupted.append((step, folder, results))
    if not interrupted:
        return "new", None, {}, len(theirs) - len(same)
    _, folder, results = max(interrupted, key=lambda each: each[:2])  # the one that got furthest
    return "interrupted", folder, results, len(theirs) - len(same)


# === One run ===
def execute(job: Job, environment: dict[str, str], wanted_signal: Callable[[], int | None]) -> int:
    """Run the job, resuming what is there of it, and return its exit code; 0 if it is finished already.

    The log file is locked as long as the script runs, also where it outlives this process or its machine's
    Ray: nobody then starts the same run a second time beside it. wanted_signal() is the signal that the
    script is to get, None as long as it is to go on.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a") as log:
        while True:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if wanted_signal():
                    return 130
                time.sleep(0.5)
            except OSError:  # a file system without locks
                break
        state, folder, results, _ = look_up(job)
        if state == "finished":
            return 0
        if wanted_signal():
            return 130
        resume = ["--resume", str(folder)] if state == "interrupted" else []
        words = [sys.executable, str(ROOT / f"{job.script}.py"), *job.arguments, *resume]
        done = f", {state} at step {results['step']:,}" if "step" in results else f", {state}"
        print(f"=== {time.strftime('%F %T')} on {socket.gethostname()}{done}", file=log)
        print(f"=== {shlex.join(words)}", file=log, flush=True)
        # in a session of its own, so that a Ctrl-C in the terminal reaches it once, from here
        process = subprocess.Popen(
            words,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            sent = None
            while process.poll() is None:
                if wanted_signal() != sent:
                    sent = wanted_signal()
                    process.send_signal(sent)
                time.sleep(0.1)
        finally:  # ray.cancel() raises here
            if process.poll() is None:
                process.terminate()
                process.wait()
        return process.returncode


def progress(job: Job) -> tuple[int, str]:
    """Step and score of the last evaluation that the log tells of, since the run was last started."""
    try:
        lines = job.log.read_text(errors="replace").rpartition("=== ")[2].splitlines()
    except OSError:
        return 0, ""
    for line in reversed(lines):
        if evaluation := re.match(r"step ([\d,]+): .*?, (?:score )?((?:return )?[-\d.e+]+) \(best", line):
            return int(evaluation[1].replace(",", "")), evaluation[2]
        if start := re.search(r", seed \d+, step (-?[\d,]+) of [\d,]+, ", line):
            return max(int(start[1].replace(",", "")), 0), ""
    return 0, ""


def last_words(job: Job) -> str:
    """The error message that a run left in its log, or else its last line."""
    if not job.log.exists():
        return "it left no log"
    lines = [line for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines[-20:] if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


# === Where the runs are made ===
class ThisMachine:
    """Runs as processes on this machine, so many at a time."""

    def __init__(self, args: Args):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        gpus, share = torch.cuda.device_count(), args.gpus_per_run
        fitting = cores // args.cpus_per_run
        if share:
            fitting = min(fitting, int(gpus / share + 1e-9))
        workers = args.workers or max(fitting, 1)
        if workers * share > gpus + 1e-9:
            found = f"{workers} runs at a time and {gpus} GPUs here"
            raise UserError(f"--gpus-per-run {share:g} with {found}; give fewer --workers or a smaller share")
        self.about = f"{workers} at a time on {socket.gethostname()}"
        if workers * args.cpus_per_run > cores:
            self.about += f", which has {cores} cores: they slow each other down"
        if gpus and not share:
            self.about += f", without its {gpus} GPUs (see --gpus-per-run)"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        self.signal, self.gpus = None, queue.SimpleQueue()  # for each worker, which of them its runs see
        for worker in range(workers):
            first, end = int(worker * share + 1e-9), math.ceil((worker + 1) * share - 1e-9)
            self.gpus.put(",".join(visible[first:end]))
        self.threads = ThreadPoolExecutor(workers)

    def submit(self, job: Job, environment: dict[str, str]) -> Future:
        """The future exit code of the job."""

        def run() -> int:
            if self.signal:
                return 130
            gpus = self.gpus.get()
            try:
                return execute(job, environment | {"CUDA_VISIBLE_DEVICES": gpus}, lambda: self.signal)
            finally:
                self.gpus.put(gpus)

        return self.threads.submit(run)

    def stop(self) -> None:
        """Tell the runs to save and stop; told twice, they are killed."""
        self.signal = signal.SIGTERM if self.signal is None else signal.SIGKILL


def answers(address: str) -> bool:
    """Whether a Ray cluster is up at host:port, known within seconds; ray.init() would try for minutes."""
    host, _, port = address.rpartition(":")
    words = ["-c", "from ray.scripts.scripts import main; main()", "health-check", "--address", address]
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        return subprocess.run([sys.executable, *words], capture_output=True, timeout=15).returncode == 0
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return False


class RayCluster:
    """Runs as tasks of a Ray cluster, whose machines share the folders of the repository and of the runs."""

    def __init__(self, args: Args):
        try:
            import ray
        except ImportError:
            raise UserError("--ray-address needs Ray: pip install -r requirements-extras.txt") from None
        address = args.ray_address
        if ":" in address and not answers(address):
            advice = "`ray start --head` shows the address of a cluster"
            raise UserError(f"no Ray cluster answers at --ray-address {address}; {advice}")
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # of many kinds
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"there is no Ray cluster at --ray-address {address}: {reason}") from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needed = {"CPU": args.cpus_per_run, "GPU": args.gpus_per_run}
        self.about = f"on the Ray cluster {address} of {len(nodes)} nodes"
        if not any(all(node.get(name, 0) >= needed[name] for name in needed) for node in nodes):
            each = " and ".join(f"{count:g} {name}s" for name, count in needed.items())
            self.about += f"; none of them has {each}, waiting for one"
        # No retries by Ray: a run that died must be resumed.
        options = dict(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, max_retries=0)
        self.ray, self.references, self.stopped = ray, [], False
        self.task = ray.remote(**options)(execute)

    def submit(self, job: Job, environment: dict[str, str]) -> Future:
        """The future exit code of the job."""
        self.references.append(self.task.remote(job, environment, lambda: None))
        return self.references[-1].future()

    def stop(self) -> None:
        """Tell the runs to save and stop; told twice, they are killed."""
        for reference in self.references:
            self.ray.cancel(reference, force=self.stopped)
        self.stopped = True


# === What one sees of it ===
class View:
    """A live table on a terminal; anywhere else a line whenever a run ends."""

    def __init__(self, total: int, before: int):
        self.console = Console(highlight=False, soft_wrap=True)
        self.total, self.before, self.started = total, before, time.time()
        self.counts = Counter(finished=before)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style))

    def show(self, running: dict[Job, float], waiting: int) -> None:
        """Draw the table: the runs under way with their starting times, and the counts of all."""
        if not self.console.is_terminal:
            return
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("script", "task", "seed"):
            table.add_column(column, no_wrap=True)
        table.add_column("", width=20)
        for column in ("step", "of", "score", "time"):
            table.add_column(column, justify="right", no_wrap=True)
        for job, since in list(running.items())[: max(self.console.height - 6, 1)]:
            (step, score), total = progress(job), job.settings["total_steps"]
            bar = ProgressBar(total=total, completed=step, width=20)
            cells = f"{step:,}", f"{total:,}", score, clock(time.time() - since)
            table.add_row(job.script, job.env_id, str(job.seed), bar, *cells)
        ended = self.counts["finished"] + self.counts["failed"]
        now, passed = ended - self.before, time.time() - self.started
        counts = Text.assemble(
            (f"{self.counts['finished']} of {self.total} finished", "bold"),
            f", {len(running)} running, {waiting} waiting, ",
            (f"{self.counts['failed']} failed", "red" if self.counts["failed"] else ""),
            f"  {clock(passed)}",
            f", about {clock(passed / now * (self.total - ended))} left" if now else "",
        )
        footer = Table.grid(padding=(0, 2))
        footer.add_row(ProgressBar(total=self.total, completed=ended, width=20), counts)
        self.live.update(Group(table, Text(), footer), refresh=True)


def final_score(results: dict) -> str:
    """The score of a finished run's last evaluation, or else its return."""
    return show(results["final"]) if "final" in results else "not evaluated"


def clock(seconds: float) -> str:
    """1:02:03 for hours, minutes and seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


# === All runs ===
def outcome(future: Future) -> tuple[int, str]:
    """Exit code of a run, 1 for one that was lost with its machine; and what to call that."""
    if future.cancelled():
        return 130, "stopped"
    if error := future.exception():
        of_run = "RayTaskError" in type(error).__name__ or isinstance(error, OSError)
        return 1, str(error).strip().splitlines()[-1] if of_run else type(error).__name__
    code = future.result()
    return code, f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def catch_signals() -> list[int]:
    """A list that grows by each Ctrl-C, SIGTERM, and end of the terminal session from now on."""
    received = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:  # as by nohup, or by &
            signal.signal(number, lambda number, frame: received.append(number))
    return received


def run_all(jobs: list[Job], engine: ThisMachine | RayCluster, args: Args, view: View) -> None:
    """Make the runs, resume those that died, count how they end. KeyboardInterrupt once all are stopped."""
    environment = {"OMP_NUM_THREADS": str(args.cpus_per_run), "PYTHONUNBUFFERED": "1"}
    environment |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    received, stops, deaths = catch_signals(), 0, Counter()
    pending = {engine.submit(job, environment): job for job in jobs}
    submitted, running = dict.fromkeys(jobs, time.time()), {}  # job -> when

    while pending:
        if len(received) > stops:
            how = "killing them" if stops else "they save and stop; once more to kill them"
            view.say(f"interrupted with {len(pending)} runs to go: {how}", "bold")
            engine.stop()
            stops += 1
        done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
        for future in done:
            job = pending.pop(future)
            if received and job not in running:
                view.counts["stopped"] += 1
                continue
            seconds = time.time() - running.pop(job, time.time())
            (code, what), (state, _, results, _) = outcome(future), look_up(job)
            at = f"at step {results['step']:,}" if "step" in results else "before its first checkpoint"
            if code == 0 and state == "finished":
                view.counts["finished"] += 1
                view.say(f"finished  {job.name}: {final_score(results)} after {clock(seconds)}", "green")
            elif received:
                view.counts["stopped"] += 1
                if "step" in results:
                    view.say(f"stopped   {job.name} {at}")
            elif code != 2 and deaths[job] < args.retries:  # 2: a mistake, it would come to the same
                deaths[job] += 1
                view.say(
                    f"died      {job.name} {at}: {what}; retry {deaths[job]} of {args.retries}", "yellow"
                )
                submitted[job] = time.time()
                pending[engine.submit(job, environment)] = job
            else:
                view.counts["failed"] += 1
                view.say(f"failed    {job.name} {at}: {what}; {last_words(job)}\n  log: {job.log}", "red")
        for job in pending.values():
            if job not in running and job.log.exists() and job.log.stat().st_mtime >= submitted[job]:
                running[job] = time.time()
        view.show(running, waiting=len(pending) - len(running))
    if received:
        raise KeyboardInterrupt


def main(args: Args, words: list[str]) -> None:
    """Make the runs of the grid that are not finished yet; words are for the command line of each script."""
    for name, least in dict(workers=1, cpus_per_run=1, gpus_per_run=0, retries=0).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if args.ray_address and args.workers:
        raise UserError("--workers is for one machine; on a Ray cluster --cpus-per-run limits the runs")
    jobs = plan_grid(args, words)
    runs = read_runs(jobs[0].run_dir)
    found = {job: look_up(job, runs) for job in jobs}
    todo = [job for job in jobs if found[job][0] != "finished"]
    counts = Counter(state for state, *_ in found.values())
    view = View(len(jobs), counts["finished"])
    numbers = ", ".join(f"{counts[state]} {state}" for state in ("finished", "interrupted", "new"))
    view.say(f"{len(jobs)} runs in {jobs[0].run_dir}: {numbers}")
    if others := [job.name for job in todo if found[job][0] == "new" and found[job][3]]:
        view.say(f"runs with other settings, which do not count: {', '.join(others)}")
    if args.dry_run:
        for job in jobs:
            state, folder, results, _ = found[job]
            where = f" at step {results.get('step', 0):,} in {folder}" if folder else ""
            view.say(f"{state:12}{job.name}{where}")
        return
    if not todo:
        view.say("nothing to run")
        return
    engine = RayCluster(args) if args.ray_address else ThisMachine(args)
    view.say(engine.about)
    try:
        jobs[0].log.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(jobs[0].log.parent, error) from error
    started = time.time()
    try:
        with view.live if view.console.is_terminal else contextlib.nullcontext():
            run_all(todo, engine, args, view)
    finally:
        numbers = ", ".join(f"{view.counts[state]} {state}" for state in ("finished", "failed", "stopped"))
        view.say(f"{numbers}, of {len(jobs)} runs, after {clock(time.time() - started)}")
        if view.counts["finished"] < len(jobs):
            view.say("the same command goes on from here")
    if view.counts["finished"] < len(jobs):
        sys.exit(1)


if __name__ == "__main__":
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    run_command(partial(main, words=sys.argv[end + 1 :]), tyro.cli(Args, args=sys.argv[1:end]))
