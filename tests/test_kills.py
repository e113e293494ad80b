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
from runs import agent_class, assert_same_run, load, results_of
from tqdm import tqdm

from common import runs as run
from common.bandits import sample_bandit
from common.tasks import UserError

OPERATIONS = ["starting", "opening", "between steps", "updating", "evaluating", "saving"]
OPERATIONS += ["config.json", "replay.bin", "checkpoint.pt", "pretrained.pt", "results.json"]


def mark(owner, name, operation, now):
    """Let now[0] be the operation, or the file that is written, while owner.name is called."""
    original = getattr(owner, name)

    def call(*args, **options):
        before, now[0] = now[0], OPERATIONS.index(operation or args[0].name)
        try:
            return original(*args, **options)
        finally:
            now[0] = before or OPERATIONS.index("between steps")

    setattr(owner, name, call)


def fork(script, settings, now, log):
    """A process that makes or resumes a run; its exit code is 0 if that is finished then."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        for owner, name, operation in [
            (run.Run, "begin", "opening"),
            (agent_class(script), "update", "updating"),
            (script, "evaluate", "evaluating"),
            (run.Run, "save", "saving"),
            (run, "write_atomically", None),
        ]:
            mark(owner, name, operation, now)
        if hasattr(script, "Experience"):
            mark(script.Experience, "save", "replay.bin", now)
        tqdm.set_lock(threading.RLock())  # its own is shared by all forks, also when one dies that has it
        with contextlib.suppress(UserError):  # it was finished when it was killed
            script.train(runs.tiny_settings(script, **settings))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def killed_run(script, run_dir, kills, settings, delay):
    """The folder of a run that was killed so many times, and what it did at these moments.

    It is killed within so many seconds, at first; they adapt, so that the run has its kills before its end.
    """
    generator, now, done = random.Random(0), mmap.mmap(-1, 1), Counter()
    while True:
        saved = [path.parent for path in run_dir.glob("*/checkpoint.pt")]
        resume = str(saved[0]) if saved else None
        now[0] = ended = 0
        pid = fork(script, settings | dict(run_dir=str(run_dir), resume=resume), now, run_dir / "log.txt")
        start, opened = time.monotonic(), generator.random() < 0.1  # mostly, wait until it opens its folder
        wait = generator.uniform(0, delay) if done.total() < kills else 300
        latest = start + 300
        while not ended and time.monotonic() < start + wait:
            time.sleep(0.0005)
            ended, status = os.waitpid(pid, os.WNOHANG)
            opened = opened or now[0]
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
        steps = load(saved[0])["step"] if saved else 0
        is_late = steps < 0.8 * settings["total_steps"] * done.total() / kills
        delay = delay * 1.2 if is_late else delay / 1.2


def soak(script, tmp_path, monkeypatch, kills):
    """Kill a run so many times, compare it with one that was left alone; how many kills it were."""
    monkeypatch.setattr("common.bandits.sample_bandit", partial(sample_bandit, size=200))
    settings = dict(eval_every=5, num_threads=1, total_steps=4 * kills + 40, save_every=3, log_every=2)
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    start = time.monotonic()
    whole = fork(script, settings | {"run_dir": str(tmp_path / "whole")}, bytearray(1), tmp_path / "log")
    assert os.waitpid(whole, 0)[1] == 0, (tmp_path / "log").read_text()
    a_quarter = (time.monotonic() - start) / 4
    folder, done = killed_run(script, tmp_path / "killed", kills, settings, a_quarter)
    assert_same_run(folder, runs.folder_in(tmp_path / "whole"))
    assert results_of(folder)["finished"]
    print(f"{script.__name__}: {done.total()} kills, bit-identical; {dict(done.most_common())}")
    return done.total()


def test_a_few_random_kills(script, finished, tmp_path, monkeypatch):
    finished(script)  # imports all that its forks need
    assert soak(script, tmp_path, monkeypatch, kills=4) > 0  # a fast machine may be done earlier


@pytest.mark.slow
def test_two_hundred_random_kills(script, finished, tmp_path, monkeypatch):
    finished(script)
    assert soak(script, tmp_path, monkeypatch, kills=200) == 200
