"""kill -9 at random moments, and --resume after each: the run ends as if nothing had happened, bit for bit.

The processes are forks of this one, so that none of them has to import PyTorch again.
"""

import contextlib
import mmap
import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from functools import partial

import pytest
import runs
from runs import assert_same_run, curves_of, load, results_of
from tqdm import tqdm

from common import runs as run
from common.bandits import sample_bandit
from common.cli import UserError

OPERATIONS = ["starting", "opening", "training", "evaluating", "saving"]


def mark(owner, name, operation, now):
    """Let now[0] be the operation while owner.name is called."""
    original = getattr(owner, name)

    def call(*args, **options):
        before, now[0] = now[0], OPERATIONS.index(operation)
        try:
            return original(*args, **options)
        finally:
            now[0] = before or OPERATIONS.index("training")

    setattr(owner, name, call)


def fork(script, settings, now, log):
    """A process that makes or resumes a run; its exit code is 0 if that is finished then."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        mark(run.Run, "__init__", "opening", now)
        mark(script, "evaluate", "evaluating", now)
        mark(run.Run, "save", "saving", now)
        tqdm.set_lock(threading.RLock())  # its own is shared by all forks, also when one dies that has it
        with contextlib.suppress(UserError):  # it was finished when it was killed
            script.train(runs.tiny_settings(script, **settings))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def killed_run(script, run_dir, kills, settings, seconds):
    """The folder of a run that was killed so many times, and what it did at these moments.

    It takes so many seconds if nobody kills it. The lives of the processes add up to nine tenths of that, and
    each is uniform up to twice its mean: any moment of a run may be hit, in saves and evaluations, too.
    """
    generator, now, done = random.Random(0), mmap.mmap(-1, 1), Counter()
    while True:
        saved = [path.parent for path in run_dir.glob("*/checkpoint.pt")]
        resume = str(saved[0]) if saved else None
        now[0] = ended = 0
        pid = fork(script, settings | dict(run_dir=str(run_dir), resume=resume), now, run_dir / "log.txt")
        left = 0.9 - (load(saved[0])["step"] / settings["total_steps"] if saved else 0)
        limit = 2 * seconds * max(left, 0.02) / max(kills - done.total(), 1)
        limit = min(limit, 0.6 * seconds * (left + 0.1))  # it must not be finished before its last kill
        opened = generator.random() < 0.1  # mostly, the clock starts when the run has opened its folder
        start, latest = time.monotonic(), time.monotonic() + 300
        wait = generator.uniform(0, limit) if done.total() < kills else 300
        while not ended and time.monotonic() < start + wait:
            time.sleep(0.0005)
            ended, status = os.waitpid(pid, os.WNOHANG)
            opened = opened or now[0] > OPERATIONS.index("opening")
            assert time.monotonic() < latest, "it hangs: " + (run_dir / "log.txt").read_text()
            if not opened:
                start = time.monotonic()
        if ended:
            assert status == 0, (run_dir / "log.txt").read_text()
            [folder] = (path.parent for path in run_dir.glob("*/checkpoint.pt"))
            return folder, done
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            done[OPERATIONS[now[0]]] += 1


def soak(script, tmp_path, monkeypatch, kills):
    """Kill a run so many times, compare it with one that was left alone; where the kills fell."""
    monkeypatch.setattr("common.bandits.sample_bandit", partial(sample_bandit, size=200))
    settings = dict(eval_every=5, num_threads=1, total_steps=4 * kills + 40, save_every=3, log_every=2)
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    start = time.monotonic()
    whole = fork(script, settings | {"run_dir": str(tmp_path / "whole")}, bytearray(1), tmp_path / "log")
    assert os.waitpid(whole, 0)[1] == 0, (tmp_path / "log").read_text()
    folder, done = killed_run(script, tmp_path / "killed", kills, settings, time.monotonic() - start)
    other = runs.folder_in(tmp_path / "whole")
    assert_same_run(folder, other)
    assert results_of(folder)["finished"] and not list(folder.glob("*.tmp"))
    for file in ("best.pt", *(["pretrained.pt"] if (other / "pretrained.pt").exists() else [])):
        assert load(folder / file)["step"] == load(other / file)["step"]
    assert curves_of(folder) == curves_of(other)
    print(f"{script.__name__}: bit-identical after {done.total()} kills, {dict(done.most_common())}")
    return done


def test_a_few_random_kills(script, finished, tmp_path, monkeypatch):
    finished(script)  # imports all that its forks need
    assert soak(script, tmp_path, monkeypatch, kills=4).total() > 0  # a fast machine may be done earlier


@pytest.mark.slow
def test_two_hundred_random_kills(script, finished, tmp_path, monkeypatch):
    finished(script)
    done = soak(script, tmp_path, monkeypatch, kills=200)
    assert done.total() == 200 and done["evaluating"] > 0 and done["saving"] > 10
