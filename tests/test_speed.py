"""tools/speed.py and gpu.py: that they measure what was asked for and say so, not how fast anything is."""

import json
import re
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import gpu
import numpy as np
import pytest
import speed
from runs import finish, python

import toolbox
from common.cli import UserError

TINY = "--hidden-dims 8 8 --batch-size 4 --num-qs 2 --diffusion-steps"


def rows_of(text):
    """The cells of a Markdown table, by the first of each row."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:2] == "| "
    ]
    return {first: rest for first, *rest in rows}


# --- Scripts side by side ---
def test_table(capsys):
    commands = [f"dac {TINY} 50", f"dac {TINY} 2 --num-threads 2 --matmul-precision medium"]
    speed.main(speed.Args(commands, rounds=2, seconds=0.2))
    out = capsys.readouterr().out
    assert out.startswith("2 rounds of 0.2 s\n")
    first, second = (rows_of(out)[f"`{command}`"] for command in commands)
    assert (first[1], first[3]) == ("1.00", "1.00")
    assert all(float(cell) > 0 for cell in first + second)


def test_ratios_are_medians_of_those_within_a_round(capsys, monkeypatch):
    rounds = [[[2, 10], [4, 20]], [[4, 10], [20, 5]], [[10, 40], [60, 40]]]  # [round][script][train, act]
    monkeypatch.setattr(speed, "measure", lambda args: rounds)
    speed.main(speed.Args(["dac", "dtql"]))
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows == ["| `dac` | 4.0 | 1.00 | 10.0 | 1.00 |", "| `dtql` | 20.0 | 5.00 | 20.0 | 1.00 |"]


def test_another_checkout(tmp_path):
    """A script named by its path is run with all that lies beside it there."""
    for name in ("common", "tools"):
        shutil.copytree(toolbox.ROOT / name, tmp_path / name)
    script = (toolbox.ROOT / "dac.py").read_text()
    (tmp_path / "dac.py").write_text(f"{script}\nimport sys\nprint('of the other checkout', file=sys.stderr)")
    words = [speed.__file__, f"dac {TINY} 2", f"{tmp_path}/dac.py {TINY} 2"]
    words += ["--rounds", 1, "--seconds", 0.1]
    code, out, err = finish(python(*words, cwd="/"))
    assert (code, err) == (0, "of the other checkout\n")
    assert f"`{tmp_path}/dac.py {TINY} 2`" in rows_of(out)


def test_a_mistake_of_the_command():
    """From anywhere, with one message, of the process that makes it."""
    code, out, err = finish(python(speed.__file__, "dac --num-qs 0", cwd="/"))
    assert (code, out) == (2, "") and err.startswith("error: dac --num-qs 0: --num-qs is 0; it must be")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (speed.Args(gpu=True), r"--gpu needs a GPU, and PyTorch 2\.\d.* finds none"),
        (speed.Args(), "name the scripts to measure, each in quotes with its arguments, or give --gpu alone"),
    ],
)
def test_nothing_to_measure(args, message):
    with pytest.raises(UserError, match=message):
        speed.main(args)


# --- All of a GPU, on a CPU ---
@pytest.fixture
def on_cpu(monkeypatch):
    """Two tiny scripts in this process. compiled: other networks; both: a mistake, as all of the second."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "COMMANDS", {"dac": f"{TINY} 2", "diffusion_ql": "--nonsense"})
    changes = {"compiled": "--hidden-dims 9 9 --no-cuda-graph", "both": "--num-qs 0"}
    monkeypatch.setattr(gpu, "WAYS", gpu.WAYS | changes)
    monkeypatch.setattr(
        gpu, "QUESTIONS", {what: each.replace("1)", "0.01)") for what, each in gpu.QUESTIONS.items()}
    )
    monkeypatch.setattr(
        gpu, "start_checks", lambda: subprocess.Popen([sys.executable, "-c", "print('checked')"])
    )

    def start(command, args):
        try:
            train, act = speed.prepare(command, speed.Args())
            losses = speed.first_losses(train)
        except (UserError, SystemExit):
            train = act = losses = None
        return SimpleNamespace(train=train, act=act, losses=losses, kill=lambda: None)

    def ask(process, question):
        if not process.train:
            sys.exit(2)
        return process.losses if "losses" in question else eval(question, vars(speed) | vars(process))

    monkeypatch.setattr(speed, "start", start)
    monkeypatch.setattr(speed, "ask", ask)


def test_gpu_table(on_cpu, capfd):
    """What fails is a gap in the table, and stops nothing else; losses that differ are said."""
    gpu.main()
    out, err = capfd.readouterr()
    rows = rows_of(out)
    header, found, failed = rows["script"], rows["dac"], rows["diffusion_ql"]
    cells = dict(zip(header, found, strict=True))
    missing = {name for name, cell in cells.items() if cell == "-"}
    assert missing == {"both, steps/s", "losses off by, both"} and set(failed) == {"-"}
    assert cells["losses off by, graphed"] == "0" and float(cells["losses off by, compiled"]) > 0.01
    assert err.count("error: dac, compiled: the losses of the first steps are off by 0.") == 1
    assert all(
        float(cell) > 0 for name, cell in cells.items() if name not in missing | {"losses off by, graphed"}
    )
    assert 0.2 < float(cells["in kernels, eager"]) < 3
    assert out.startswith("no GPU, ") and "checked\n" in out
    assert out.endswith("after an error: diffusion_ql compiled\n")


def test_gpu_without_time(on_cpu, monkeypatch, capfd):
    """It says what is missing."""
    monkeypatch.setattr(gpu, "LIMIT", 0)
    monkeypatch.setattr(gpu, "measure", lambda *args: pytest.fail("it measures"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    gpu.main()
    assert capfd.readouterr().out.endswith("dac, diffusion_ql\n")


def test_a_process_that_is_late(monkeypatch):
    """It is killed, and the others have their answers."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    start = lambda command, args: subprocess.Popen([sys.executable, "-c", command], **pipes)  # noqa: E731
    monkeypatch.setattr(speed, "start", start)
    late = "import time; time.sleep(300)"
    workers = gpu.Workers({"late": late, "good": "print(input() and 5)"}, time.monotonic() + 1)
    workers.ask("losses", "good", "late")
    assert workers.answers["good", "losses"] == 5 and np.isnan(workers.answers["late", "losses"])
    assert workers.processes["late"].wait() < 0


def test_gpu_checks(tmp_path, monkeypatch, capfd):
    """Golden numbers, one of them changed, and a resumed run."""
    golden = json.loads((toolbox.ROOT / "tests/golden/dql_a.json").read_text())
    golden["forward"]["q1"][0] += 0.01
    (tmp_path / "dql_b.json").write_text(json.dumps(golden))
    monkeypatch.setenv("GOLDEN_DIR", str(tmp_path))
    monkeypatch.setenv("CHECKED_DEVICE", "cpu")
    monkeypatch.setattr(
        gpu, "CHECKS", [*gpu.CHECKS, "-k", "dql and single-check_forward or test_resume and dtql"]
    )
    assert gpu.start_checks().wait() == 1
    out = capfd.readouterr().out
    assert re.search(
        r"^FAILED .*dql_b-single-check_forward\] - AssertionError: q1: off by \S+, allowed", out, re.M
    )
    assert "1 failed, 2 passed" in out
