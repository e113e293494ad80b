"""tools/benchmark.py: what it runs, skips, resumes and retries, how it stops, and what it says.

Most tests run a small program in place of the scripts, which makes steps as they do, without PyTorch.
"""

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from rich.console import Console

from common.datasets import UserError
from tools import benchmark
from tools.benchmark import Args, look_up

TASK = "bandit-moons-v0"
COUNTER = '''
"""Counts to --total-steps, but 1 is killed at step 3, 2 is a mistake, and 3 crashes at each step from 2."""
import json, os, pathlib, signal, sys, time
from dataclasses import asdict, dataclass

@dataclass
class Args:
    env_id: str = "bandit-moons-v0"
    dataset: str | None = None
    seed: int = 0
    total_steps: int | None = None
    eval_episodes: int = 0
    gamma: float = 0.9
    pause: float = 0.0
    save_every: int = 1
    device: str = "auto"
    run_dir: str = "runs"
    resume: str | None = None

DEFAULT_SETTINGS = {"total_steps": 5}
TASK_SETTINGS = {}

def train(args):
    name = f"{args.env_id}__counter__{args.seed}__{time.time_ns()}"
    folder = pathlib.Path(args.resume or f"{args.run_dir}/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    config = {"script": "counter", "args": {**asdict(args), "total_steps": args.total_steps or 5}}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = folder / "checkpoint.pt"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    total = config["args"]["total_steps"]
    print(f"  cpu, seed {args.seed}, step {first} of {total}, {folder}")
    print("threads", os.environ["OMP_NUM_THREADS"], "GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"))
    if args.seed == 2:
        print("error: a mistake")
        sys.exit(2)
    def save(step, finished):
        checkpoint.write_text(str(step))
        about = {"script": "counter", "step": step, "total_steps": total, "finished": finished}
        about |= {"final": {"return": 7.0, "score": None}} if finished else {}
        (folder / "results.json").write_text(json.dumps(about))
    for step in range(first + 1, total + 1):
        try:
            time.sleep(args.pause)
        except KeyboardInterrupt:
            save(step - 1, False)
            sys.exit(130)
        save(step, step == total)
        if args.seed == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if args.seed == 3 and step >= 2:
            raise ValueError("what happened")

if __name__ == "__main__":
    import tyro
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    train(tyro.cli(Args))
'''
TINY = ["--hidden-dims", "16", "--diffusion-steps", "2", "--batch-size", "8", "--eval-episodes", "2"]


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def counter(tmp_path, monkeypatch):
    """The program above is the only script."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "counter.py").write_text(COUNTER)
    (root / "notes.py").write_text("print('no script')")
    monkeypatch.setattr(benchmark, "ROOT", root)
    monkeypatch.syspath_prepend(root)
    yield tmp_path / "runs"
    sys.modules.pop("counter", None)


def args_for(run_dir, seeds=(0,), **changes):
    given = {"scripts": ["counter"], "env_ids": [TASK], "seeds": list(seeds), "run_dir": str(run_dir)}
    return Args(**given | {"workers": 2} | changes)


def run(run_dir, *words, **changes):
    benchmark.main(args_for(run_dir, **changes), list(words))


def only_job(run_dir, *words, **changes):
    [job] = benchmark.plan_grid(args_for(run_dir, **changes), list(words))
    return job


def starts(run_dir):
    """Seed -> the steps at which its runs started, in order."""
    logs = {path.name.split("__")[2]: path.read_text() for path in (run_dir / "logs").iterdir()}
    return {int(seed): re.findall(r", step (\d+) of", log) for seed, log in logs.items()}


# --- Running ---
def test_runs_all_then_nothing(counter, capsys):
    run(counter, seeds=[0, 4, 5], cpus_per_run=2)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"3 runs in {counter}: 0 finished, 0 interrupted, 3 new"
    finished = [line for line in out if line.startswith("finished")]
    assert sorted(line.split(":")[0] for line in finished) == [
        f"finished  counter {TASK} {i}" for i in (0, 4, 5)
    ]
    assert all("return 7 after 0:00:" in line for line in finished)
    assert out[-1].startswith("3 finished, 0 failed, 0 stopped, of 3 runs, after 0:00:")
    assert all("threads 2 GPUs \n" in path.read_text() for path in (counter / "logs").iterdir())

    run(counter, "--device", "cpu", seeds=[0, 5])
    assert capsys.readouterr().out.splitlines() == [
        f"2 runs in {counter}: 2 finished, 0 interrupted, 0 new", "nothing to run",
    ]  # fmt: skip
    assert starts(counter) == {0: ["0"], 4: ["0"], 5: ["0"]}
    run(counter, "--gamma", "0.5", seeds=[0])
    assert "which do not count: counter bandit-moons-v0 0\n" in capsys.readouterr().out
    assert sorted(starts(counter)) == [0, 4, 5] and len(list(counter.glob("*/config.json"))) == 4


def test_what_dies_is_resumed(counter, capsys):
    """Killed at step 3 it goes on from there; a mistake is not tried again; a crash as often as was said."""
    with pytest.raises(SystemExit) as exit_info:
        run(counter, seeds=[0, 1, 2, 3], retries=2)
    assert exit_info.value.code == 1
    out = capsys.readouterr().out
    assert starts(counter) == {0: ["0"], 1: ["0", "3"], 2: ["0"], 3: ["0", "2", "3"]}
    assert f"died      counter {TASK} 1 at step 3: killed by SIGKILL; retry 1 of 2" in out
    assert f"failed    counter {TASK} 2 before its first checkpoint: exit code 2; error: a mistake\n" in out
    assert f"failed    counter {TASK} 3 at step 4: exit code 1; ValueError: what happened\n" in out
    assert f"  log: {counter}/logs/{TASK}__counter__3__" in out
    assert "2 finished, 2 failed, 0 stopped, of 4 runs" in out
    assert out.endswith("the same command goes on from here\n")
    assert len(list(counter.glob("*/config.json"))) == 4


def when(condition, action):
    """Call action once the condition holds, from a thread."""

    def watch():
        while not condition():
            time.sleep(0.02)
        action()

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
def test_stop_and_go_on(number, counter, capsys):
    """The runs under way save and stop, the others do not start; then all go on."""
    when(lambda: len(list(counter.glob("*/results.json"))) == 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        run(counter, "--pause", "0.3", seeds=[0, 4, 5], total_steps=20)
    out = capsys.readouterr().out
    assert "interrupted with 3 runs to go" in out
    assert len(re.findall(rf"^stopped   counter {TASK} [04] at step \d", out, re.M)) == 2
    assert 5 not in starts(counter)
    assert "0 finished, 0 failed, 3 stopped, of 3 runs" in out
    steps = [json.loads(path.read_text())["step"] for path in counter.glob("*/results.json")]
    assert len(steps) == 2 and 0 < max(steps) < 20
    run(counter, "--pause", "0", seeds=[0, 4, 5], total_steps=20, dry_run=True)
    assert "0 finished, 0 interrupted, 3 new" in capsys.readouterr().out  # --pause is a setting like others
    jobs = benchmark.plan_grid(args_for(counter, seeds=[0, 4], total_steps=20), ["--pause", "0.3"])
    assert [look_up(job)[0] for job in jobs] == ["interrupted"] * 2


def test_stop_twice_kills(counter, capsys):
    """What does not save and stop is killed, and can still be resumed from its checkpoint."""
    code = COUNTER.replace("save(step - 1, False)\n", "time.sleep(60)\n")
    (benchmark.ROOT / "counter.py").write_text(code)
    results = lambda: list(counter.glob("*/results.json"))  # noqa: E731
    when(
        results,
        lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(1.5), os.kill(os.getpid(), signal.SIGINT)),
    )
    with pytest.raises(KeyboardInterrupt):
        run(counter, "--pause", "0.2", total_steps=100)
    assert "killing them" in capsys.readouterr().out
    assert json.loads(results()[0].read_text())["finished"] is False


def test_a_run_that_another_process_makes_is_waited_for(counter):
    """The lock on the log file; what the other one has finished does not start again."""
    job = only_job(counter)
    job.log.parent.mkdir(parents=True)
    with open(job.log, "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        asked = []
        assert benchmark.execute(job, {}, lambda: asked.append(1) or (15 if len(asked) > 1 else None)) == 130
        done = threading.Thread(target=lambda: asked.append(benchmark.execute(job, {}, lambda: None)))
        done.start()
        time.sleep(0.2)
        record(counter / "theirs", job, finished=True)
    done.join(timeout=20)
    assert asked[-1] == 0
    assert job.log.read_text() == ""


# --- Which runs are the same ---
def record(folder, job, step=5, finished=False, checkpoint=True, without=(), **changes):
    """A run folder as a script leaves it."""
    folder.mkdir(parents=True)
    args = {name: value for name, value in job.settings.items() if name not in without} | changes
    (folder / "config.json").write_text(json.dumps({"script": job.script, "args": args}))
    if checkpoint:
        (folder / "checkpoint.pt").touch()
        results = {"script": job.script, "step": step, "finished": finished}
        (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"finished": True}, "finished"),
        ({"finished": True, "device": "cuda", "run_dir": "elsewhere", "save_every": 7}, "finished"),
        ({"finished": True, "step": 4}, "interrupted"),  # resumed with more steps than it was finished with
        ({"step": 4}, "interrupted"),
        ({"checkpoint": False}, "new"),  # killed before its first checkpoint
        ({"finished": True, "total_steps": 6}, "new"),
        ({"finished": True, "seed": 1}, "new"),
        ({"finished": True, "env_id": "bandit-corners-v0"}, "new"),
        ({"finished": True, "dataset": "mine.hdf5"}, "new"),
        ({"finished": True, "gamma": 0.5}, "new"),
        ({"finished": True, "beta": 0.5}, "new"),  # an argument that the script has no more
        ({"finished": True, "without": ["gamma"]}, "finished"),  # one that it has got since
    ],
)
def test_states(changes, state, counter):
    job = only_job(counter)
    record(counter / "a", job, **changes)
    assert look_up(job)[0] == state


def test_an_argument_newer_than_the_run_counts_if_given(counter):
    record(counter / "a", only_job(counter), finished=True, without=["gamma"])
    assert look_up(only_job(counter, "--gamma", "0.9"))[0] == "new"


def test_the_run_that_got_furthest_is_resumed(counter):
    job = only_job(counter)
    for step, name in [(2, "a"), (4, "b"), (3, "c")]:
        record(counter / name, job, step=step)
    (counter / "d").mkdir()
    (counter / "d/config.json").write_text("{")  # damaged
    state, folder, results, _ = look_up(job)
    assert (state, folder.name, results["step"]) == ("interrupted", "b", 4)


def test_a_dataset_is_the_same_by_any_path(counter, tmp_path, monkeypatch):
    (tmp_path / "mine.hdf5").touch()
    monkeypatch.chdir(tmp_path)
    job = only_job(counter, "--dataset", "mine.hdf5")
    assert job.arguments[-2:] == ("--dataset", f"{tmp_path}/mine.hdf5")
    record(counter / "a", job, finished=True, dataset="./mine.hdf5")
    assert look_up(job)[0] == "finished"


def test_settings_and_logs():
    """Settings are the script's own for the task, and every run has a log file of its own."""
    args = Args(["dac", "dtql.py"], [TASK, "hopper-mini-v0"], [0, 1], run_dir="runs")
    jobs = benchmark.plan_grid(args, ["--batch-size", "256"])
    assert [job.name for job in jobs][:3] == [f"dac {TASK} 0", f"dtql {TASK} 0", f"dac {TASK} 1"]
    assert len({job.log for job in jobs}) == len(jobs) == 8
    assert {job.settings["total_steps"] for job in jobs if job.name.startswith("dac hopper")} == {12_000}
    assert {job.settings["batch_size"] for job in jobs} == {256}
    [longer, _] = benchmark.plan_grid(Args(["dac"], [TASK], [0, 1], total_steps=7), [])
    assert longer.settings["total_steps"] == 7 and longer.log != jobs[0].log


# --- GPUs ---
@pytest.mark.parametrize(
    ("share", "workers", "visible", "expected"),
    [
        (0.5, None, None, ["0", "0", "1", "1"]),
        (1, 2, None, ["0", "1"]),
        (1, 2, "3,5", ["3", "5"]),
        (2, 1, None, ["0,1"]),
        (0.4, 4, None, ["0", "0", "0,1", "1"]),
        (0, 3, None, ["", "", ""]),
    ],
)
def test_gpus_of_each_worker(share, workers, visible, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = benchmark.ThisMachine(Args(["dac"], [TASK], workers=workers, gpus_per_run=share))
    assert [machine.gpus.get() for _ in expected] == expected
    assert machine.gpus.empty()


# --- What one sees ---
def test_live_table(counter):
    job, other = only_job(counter), only_job(counter, env_ids=["bandit-corners-v0"])
    record(counter / "a", job, step=2)
    job.log.parent.mkdir()
    lines = [
        "=== today",
        "=== counter.py",
        ", seed 0, step 0 of 5, x",
        "step 2: return 3 +- 1, score 40.5 (best 50, x)",
    ]
    job.log.write_text("\n".join(lines))
    view = benchmark.View(total=9, before=3)
    view.counts["failed"] = 1
    view.show({job: time.time()}, waiting=4)  # not a terminal: nothing
    view.console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20, color_system=None)
    view.live.console = view.console
    view.show({job: time.time() - 3700, other: time.time()}, waiting=4)
    with view.live:
        view.show({job: time.time() - 3700, other: time.time()}, waiting=4)
    shown = view.console.file.getvalue()
    assert re.search(rf"counter +{TASK} +0 .* 2 +5 +40.5 +1:01:40", shown)
    assert re.search(r"counter +bandit-corners-v0 +0 .* 0 +5 +0:00:00", shown)
    assert "3 of 9 finished, 2 running, 4 waiting, 1 failed" in shown


def test_progress_of_real_lines(counter):
    job = only_job(counter)
    assert benchmark.progress(job) == (0, "")
    job.log.parent.mkdir(parents=True)
    for lines, expected in [
        ("=== a\n=== b\n  cpu, seed 0, step 0 of 60, runs/x", (0, "")),
        (
            "step 1,000: return 5.4e-05 +- 5.43e-05, score -0.1 (best score 0.0, last ten score 0.0)",
            (1000, "-0.1"),
        ),
        ("step 2,000: return 3728 +- 4, return 3728 (best return 3728, last ten 3)", (2000, "return 3728")),
        ("=== a\n=== b\n  cuda:0, seed 0, step 1,500 of 60, runs/x", (1500, "")),
    ]:
        with open(job.log, "a") as log:
            print(lines, file=log)
        assert benchmark.progress(job) == expected


# --- The command, with the scripts ---
def command(*words):
    words = [sys.executable, benchmark.__file__, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, **pipes, cwd="/", env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_command(tmp_path):
    """A script gets SIGTERM when it has saved once; the same command, from anywhere, goes on from there."""
    words = ["--run-dir", str(tmp_path), "--total-steps", "200", "--seeds", "3", "--scripts", "dac"]
    words += ["--env-ids", TASK, "--", *TINY, "--eval-every", "100", "--save-every", "20"]
    process = command(*words)
    while not list(tmp_path.glob("*/results.json")) and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, ""), out
    [path] = tmp_path.glob("*/results.json")
    step = json.loads(path.read_text())["step"]
    assert 20 <= step < 200
    assert f"stopped   dac {TASK} 3 at step {step}\n" in out

    process = command(*words)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), out
    assert re.search(rf"^finished  dac {TASK} 3: score [\d.]+ after 0:", out, re.M)
    [log] = (tmp_path / "logs").iterdir()
    assert re.findall(r", seed 3, step (\d+) of 200, ", log.read_text()) == ["0", str(step)]
    results = json.loads(path.read_text())
    assert [each["step"] for each in results["evaluations"]] == [100, 200]
    assert results["finished"]


# --- Mistakes ---
@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"scripts": ["dacc"]}, [], "there is no script 'dacc'; nearest names: dac"),
        ({"scripts": ["zzz"]}, [], "nearest names: dac, diffusion_ql, dtql, edp_crr, edp_iql"),
        ({"env_ids": ["bandit-mons-v0"]}, [], "unknown task .* nearest names: bandit-moons-v0"),
        ({"seeds": []}, [], "nothing to run: --seeds is empty"),
        ({"total_steps": 0}, [], "--total-steps is 0; it must be at least 1"),
        ({"workers": 0}, [], "--workers is 0; it must be at least 1"),
        ({"retries": -1}, [], "--retries is -1; it must be at least 0"),
        ({"gpus_per_run": 1000.0, "workers": 1}, [], "1000 with 1 runs at a time and \\d+ GPUs here"),
        ({"scripts": ["qvpo_online"], "env_ids": ["hopper-mini-v0"]}, [],
         "qvpo_online cannot be trained on hopper-mini-v0: .* an environment, such as Hopper-v4"),
        ({"env_ids": ["Hopper-v4"]}, [], "dac cannot be trained on Hopper-v4: .* no transitions of its own"),
        ({"env_ids": ["maze2d-umaze-v1"]}, [], "trained on maze2d-umaze-v1: "),
        ({}, ["--dataset", "none.hdf5"], "no such file: none.hdf5"),
        ({}, ["--seed", "4"], "--seed after --: the grid sets it"),
        ({}, ["--resume", "runs/x"], "--resume: interrupted runs of the grid are found"),
        ({"ray_address": "auto", "workers": 2}, [], "--workers is for one machine"),
    ],
)  # fmt: skip
def test_mistakes(changes, words, message, tmp_path):
    given = {"scripts": ["dac"], "env_ids": [TASK], "run_dir": str(tmp_path / "runs")}
    with pytest.raises(UserError, match=message):
        benchmark.main(Args(**given | changes), words)
    assert not (tmp_path / "runs").exists()


def test_a_file_in_the_way_of_the_run_folder(counter):
    counter.write_text("mine")
    with pytest.raises(UserError, match=f"cannot write {counter}/logs: .*choose another --run-dir"):
        run(counter)


def test_an_argument_that_one_script_lacks(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        benchmark.main(Args(["dac", "edp_td3"], [TASK], run_dir=str(tmp_path / "runs")), ["--num-qs", "3"])
    assert exit_info.value.code == 2
    assert "edp_td3.py" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_without_ray(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="needs Ray: pip install -r requirements-extras.txt"):
        benchmark.main(Args(["dac"], [TASK], run_dir=str(tmp_path / "runs"), ray_address="auto"), [])
