"""tools/benchmark.py: what it runs, skips, resumes and retries, how it stops, and what it says.

Most tests run a small program in place of the scripts, which makes steps as they do, without PyTorch.
"""

import os
import re
import signal
import sys
import threading

import benchmark
import pytest
import torch
from benchmark import Args, look_up
from runs import finish, python, results_of, wait_for, write_records

import toolbox
from common import runs as common_runs
from common.cli import UserError
from common.tasks import D4RL_TASKS

TASK = "bandit-moons-v0"
COUNTER = '''
"""Counts to --total-steps, but 1 is killed at step 3, 2 is a mistake, and 3 crashes at each step from 2."""
import json, os, pathlib, signal, sys, time
from dataclasses import asdict, dataclass
from filelock import FileLock

@dataclass
class Args:
    env_id: str = "bandit-moons-v0"
    dataset: str | None = None
    action_bounds: tuple[float, float] = (-1.0, 1.0)
    env_kwargs: tuple[str, ...] = ()
    seed: int = 0
    total_steps: int = 5
    eval_episodes: int = 0
    gamma: float = 0.9
    pause: float = 0.0
    device: str = "auto"
    num_threads: int = 1
    run_dir: str = "runs"
    resume: str | None = None

TASK_SETTINGS = {}

def train(args):
    name = f"{args.env_id}__counter__{args.seed}__{time.time_ns()}"
    folder = pathlib.Path(args.resume or f"{args.run_dir}/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "run.lock")
    lock.acquire(blocking=False)
    config = {"script": "counter", "args": asdict(args), "sources": {}}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = folder / "checkpoint.pt"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    print(f"from step {first}, threads {args.num_threads} {os.environ['OMP_WAIT_POLICY']},",
          f"GPUs {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    if args.seed == 2:
        print("error: a mistake")
        sys.exit(2)
    def save(step):
        checkpoint.write_text(str(step))
        about = {"format": 3, "step": step, "total_steps": args.total_steps, "data": None}
        about |= {"finished": step == args.total_steps, "train_seconds": 1.0}
        about |= {"data_mean": None, "reference_returns": None}
        about["evaluations"] = [{"step": step, "return_mean": 7.0, "normalized_score": None}]
        (folder / "results.json").write_text(json.dumps(about))
    stopped = []
    signal.signal(signal.SIGTERM, lambda *event: stopped.append(event))
    for step in range(first + 1, args.total_steps + 1):
        time.sleep(args.pause)
        if stopped:
            save(step - 1)
            sys.exit(130)
        save(step)
        while "GATE" in os.environ and not os.path.exists(os.environ["GATE"]):
            time.sleep(0.05)
        if args.seed == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if args.seed == 3 and step >= 2:
            raise ValueError("what happened")

if __name__ == "__main__":
    import tyro
    train(tyro.cli(Args))
'''


@pytest.fixture
def counter(tmp_path, monkeypatch):
    """The program above is the only script; returns the folder of the grid."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "counter.py").write_text(COUNTER)
    monkeypatch.setattr(toolbox, "ROOT", root)
    monkeypatch.syspath_prepend(root)
    yield tmp_path / "grid"
    sys.modules.pop("counter", None)
    common_runs.stop_requested.clear()


def args_for(run_dir, seeds=(0,), **changes):
    given = {"scripts": ["counter"], "env_ids": [TASK], "seeds": tuple(seeds), "run_dir": str(run_dir)}
    return Args(**given | {"workers": 2} | changes)


def run(run_dir, *words, **changes):
    benchmark.main(args_for(run_dir, **changes), list(words))


def job_of(run_dir, *words, **changes):
    [job] = benchmark.plan_grid(args_for(run_dir, **changes), list(words))
    return job


def starts(run_dir):
    """Folder of each run -> the steps at which it was started, in order."""
    logs = {path.parent.name: path.read_text() for path in run_dir.glob("*/log.txt")}
    return {name: [int(step) for step in re.findall(r"from step (\d+)", log)] for name, log in logs.items()}


# --- Running ---
def test_runs_all_then_nothing(counter, capsys):
    run(counter, seeds=[0, 4, 5], cpus_per_run=2)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"3 runs in {counter}: 0 finished, 0 stopped, 3 new"
    finished = sorted(line for line in out if line.startswith("finished"))
    assert finished == [f"finished  counter {TASK} {seed}: return 7 after 0:00:01" for seed in (0, 4, 5)]
    assert re.fullmatch(r"3 finished, 0 failed, 0 stopped, of 3 runs, after \d:\d\d:\d\d", out[-1])
    assert all("threads 2 passive, GPUs \n" in path.read_text() for path in counter.glob("*/log.txt"))
    run(counter, "--device", "cpu", "--gamma", "0.9", seeds=[0, 5])  # where it is made, and the default
    assert capsys.readouterr().out == f"2 runs in {counter}: 2 finished, 0 stopped, 0 new\n"
    assert starts(counter) == {f"{TASK}__counter__{seed}": [0] for seed in (0, 4, 5)}


def test_given_settings_have_folders_of_their_own(counter, capsys):
    """The same settings, in any order of words, are the same run."""
    names = [job_of(counter, *words).folder.name for words in ([], ["--gamma", "0.5"], ["--gamma", "0.6"])]
    assert names[0] == f"{TASK}__counter__0" and len(set(names)) == 3
    assert all(re.fullmatch(rf"{names[0]}__[0-9a-f]{{8}}", name) for name in names[1:])
    run(counter, "--gamma", "0.5", "--total-steps", "3")
    run(counter, "--total-steps", "3", "--gamma=0.5")
    assert "1 runs in" in capsys.readouterr().out and list(starts(counter).values()) == [[0]]


def test_what_dies_is_resumed(counter, capsys):
    """Killed at step 3 it goes on from there; a mistake is not tried again; a crash as often as was said."""
    with pytest.raises(SystemExit, match="1"):
        run(counter, seeds=[0, 1, 2, 3], retries=2)
    out = capsys.readouterr().out
    assert [starts(counter)[f"{TASK}__counter__{seed}"] for seed in range(4)] == [[0], [0, 3], [0], [0, 2, 3]]
    mistake = "before its first checkpoint: exit code 2; error: a mistake"
    assert f"failed    counter {TASK} 2: {mistake}\n" in out
    assert f"failed    counter {TASK} 3: at step 4: exit code 1; ValueError: what happened\n" in out
    assert f"  log: {counter}/{TASK}__counter__3/log.txt\n" in out
    assert "2 finished, 2 failed, 0 stopped, of 4 runs" in out


def test_stop_and_go_on(counter, capsys):
    """The runs under way save and stop, the others do not start; then all go on. SIGTERM: test_command."""
    words, changes = ["--pause", "0.1", "--total-steps", "20"], {"seeds": [0, 4, 5]}

    def interrupt():
        wait_for(lambda: len(list(counter.glob("*/*/results.json"))) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(counter, *words, **changes)
    out = capsys.readouterr().out
    assert "interrupted: the runs under way save and stop\n" in out
    assert "0 finished, 0 failed, 3 stopped, of 3 runs" in out
    steps = [results_of(path.parent)["step"] for path in counter.glob("*/*/results.json")]
    assert len(steps) == len(starts(counter)) == 2 and 0 < max(steps) < 20
    run(counter, *words, **changes)
    assert sorted(map(tuple, starts(counter).values())) == sorted([(0,), *((0, step) for step in steps)])


def test_after_kill_9(counter):
    """The runs of a benchmark that was killed live on; the next one waits for them, and repeats nothing."""
    code = f"import runpy, toolbox; from pathlib import Path; toolbox.ROOT = Path({str(toolbox.ROOT)!r})"
    code += f"\nrunpy.run_path({benchmark.__file__!r}, run_name='__main__')"
    words = ["-c", code, "--scripts", "counter", "--env-ids", TASK, "--run-dir", counter]
    environment = {"PYTHONPATH": f"{toolbox.ROOT}:{os.path.dirname(benchmark.__file__)}"}
    environment["GATE"] = str(toolbox.ROOT / "gate")  # the run waits for this file after its first step
    killed = python(*words, env=environment)
    wait_for(lambda: list(counter.glob("*/*/results.json")), killed)
    killed.kill()
    killed.communicate()
    second = python(*words, env=environment)
    said = [second.stdout.readline(), second.stdout.readline()]
    assert said[0].endswith("0 finished, 1 stopped, 0 new\n") and " at a time on " in said[1]
    (toolbox.ROOT / "gate").touch()
    code, out, err = finish(second)
    assert (code, err) == (0, "") and out.startswith("finished  counter")
    assert list(starts(counter).values()) == [[0]]


# --- Which run is the job's ---
def record(job, step=5, finished=False, checkpoint=True, results=True, name="a", **changes):
    """A run folder as a script leaves it."""
    folder = job.folder / name
    args = {name: value for name, value in (job.settings | changes).items() if value != "missing"}
    write_records(folder, job.script, args, step=step, finished=finished)
    if checkpoint:
        (folder / "checkpoint.pt").touch()
    if not results:
        (folder / "results.json").unlink()


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"finished": True}, "finished"),
        ({"finished": True, "device": "cuda", "run_dir": "elsewhere", "num_threads": 7}, "finished"),
        ({"finished": True, "gamma": "missing"}, "finished"),  # an argument that the script has got since
        ({}, "stopped"),
        ({"results": False}, "stopped"),  # killed between the two files of its first save
        ({"checkpoint": False}, "new"),  # killed before
    ],
)
def test_states(changes, state, counter):
    job = job_of(counter)
    record(job, **changes)
    assert look_up(job)[0] == state


@pytest.mark.parametrize(("name", "value"), [("gamma", 0.5), ("total_steps", 6), ("beta", 1), ("seed", 1)])
def test_a_run_with_other_settings_in_the_folder(name, value, counter):
    """Because the script's defaults have changed, or an argument has gone."""
    job = job_of(counter)
    record(job, finished=True, **{name: value})
    with pytest.raises(UserError, match=f"counter__0/a was made with {name} {value}: move it away, or"):
        look_up(job)


def test_grid():
    """Task by task, seed by seed; sets of tasks are those of the papers' tables."""
    args = Args(["dac.py", "edp_td3"], ["hopper-medium-v2"], ["d4rl-gym", "d4rl-kitchen"], seeds=(0, 1, 0))
    jobs = benchmark.plan_grid(args, ["--batch-size", "64"])
    first = [f"{script} hopper-medium-v2 {seed}" for seed in (0, 1) for script in ("dac", "edp_td3")]
    assert [job.name for job in jobs[:4]] == first and jobs[4].env_id == "halfcheetah-medium-v2"
    assert len(jobs) == 2 * 2 * 12 and {job.settings["batch_size"] for job in jobs} == {64}
    assert {job.settings["rho"] for job in jobs if job.name.startswith("dac hopper")} == {1.5}
    sizes = {name: len(tasks) for name, tasks in benchmark.TASK_SETS.items()}
    assert sizes.pop("mujoco-online") == 5 and sizes.pop("d4rl") == sum(sizes.values())
    assert sizes == {"d4rl-gym": 9, "d4rl-antmaze": 6, "d4rl-adroit": 2, "d4rl-kitchen": 3}
    assert set(benchmark.TASK_SETS["d4rl"]) <= D4RL_TASKS.keys()


@pytest.mark.parametrize(
    ("share", "workers", "visible", "expected"),
    [
        (0.5, 0, None, ["0", "1", "0", "1"]),
        (1.0, 2, "3,5", ["3", "5"]),
        (0.0, 3, None, ["", "", ""]),
    ],
)
def test_gpus_of_each_run(share, workers, visible, expected, monkeypatch, tmp_path):
    """Runs take turns on the GPUs; as many at a time as fit."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16), raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    together = threading.Barrier(len(expected))  # that so many are under way at a time

    def execute(job, environment, retries):
        together.wait(timeout=60)
        return environment["CUDA_VISIBLE_DEVICES"]

    monkeypatch.setattr(benchmark, "execute", execute)
    submit, _, about = benchmark.this_machine(Args(["dac"], [TASK], workers=workers, gpus_per_run=share))
    futures = [submit(None, {}, 0) for _ in expected]
    assert sorted(future.result() for future in futures) == sorted(expected)
    assert about.startswith(f"{len(expected)} at a time on ")


# --- The command, with a script ---
TINY = ["--hidden-dims", 16, "--diffusion-steps", 2, "--batch-size", 8, "--eval-episodes", 2]


def test_command(tmp_path, capsys):
    """A script gets SIGTERM when it has saved once; the same grid goes on from there."""
    settings = ["--total-steps", "200", "--save-every", "20", "--eval-every", "100", *map(str, TINY)]
    words = ["--run-dir", tmp_path, "--seeds", 3, "--scripts", "dac", "--env-ids", TASK, "--", *settings]
    process = python(benchmark.__file__, *words, cwd="/")
    wait_for(lambda: list(tmp_path.glob("*/*/results.json")), process)
    process.terminate()
    code, out, err = finish(process)
    assert (code, err) == (130, ""), out
    [folder] = [path.parent for path in tmp_path.glob("*/*/results.json")]
    step = results_of(folder)["step"]
    assert 20 <= step < 200 and "0 finished, 0 failed, 1 stopped, of 1 runs" in out
    args = Args(["dac"], [TASK], seeds=(3,), run_dir=str(tmp_path))
    benchmark.main(args, settings)
    assert re.search(rf"^finished  dac {TASK} 3: score [\d.e-]+ after 0:", capsys.readouterr().out, re.M)
    log = (folder.parent / "log.txt").read_text()
    assert re.findall(r", seed 3, step (\d+) of 200, ", log) == ["0", str(step)]
    finished = results_of(folder)
    assert finished["finished"] and [each["step"] for each in finished["evaluations"]] == [100, 200]


# --- Mistakes ---
@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"scripts": ["dacc"]}, [], "there is no script 'dacc'; nearest names: dac"),
        ({"env_ids": ["bandit-mons-v0"]}, [], "unknown task .* nearest names: bandit-moons-v0"),
        ({"env_ids": []}, [], "nothing to run: name --scripts, and tasks by --env-ids or --tasks"),
        ({"gpus_per_run": 1.0, "workers": 999}, [], "0 GPUs here have room for 0 runs"),
        ({"env_ids": ["Hopper-v4"]}, [], "dac cannot be trained on Hopper-v4: .* no transitions of its own"),
        ({}, ["--batch-size", "0"], "--batch-size is 0; it must be above 0"),
        ({}, ["--seed", "4"], "--seed after --: the grid sets it"),
        ({"ray_address": "auto", "workers": 2}, [], "--workers is for one machine"),
    ],
)  # fmt: skip
def test_mistakes(changes, words, message, tmp_path):
    given = {"scripts": ["dac"], "env_ids": [TASK], "run_dir": str(tmp_path / "grid")}
    with pytest.raises(UserError, match=message):
        benchmark.main(Args(**given | changes), words)
    assert not (tmp_path / "grid").exists()
