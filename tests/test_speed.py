"""tools/speed.py and gpu.py: that they measure what was asked for and say so, not how fast anything is."""

import shutil
import subprocess
from types import SimpleNamespace

import gpu
import pytest
import speed
import torch
from runs import python

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
def test_table(tmp_path, capfd):
    """A script named by its path is run with all that lies beside it there."""
    for name in ("common", "tools"):
        shutil.copytree(toolbox.ROOT / name, tmp_path / name)
    script = (toolbox.ROOT / "dac.py").read_text()
    (tmp_path / "dac.py").write_text(f"{script}\nimport sys\nprint('of the other checkout', file=sys.stderr)")
    commands = [f"dac {TINY} 50", f"{tmp_path}/dac.py {TINY} 2 --num-threads 2 --matmul-precision medium"]
    speed.main(speed.Args(commands, rounds=2, seconds=0.2))
    out, err = capfd.readouterr()
    assert out.startswith("2 rounds of 0.2 s\n") and err == "of the other checkout\n"
    first, second = (rows_of(out)[f"`{command}`"] for command in commands)
    assert (first[1], first[3]) == ("1.00", "1.00")
    assert all(float(cell) > 0 for cell in first + second)


def test_ratios_are_medians_of_those_within_a_round(capsys, monkeypatch):
    rounds = [[[2, 10], [4, 20]], [[4, 10], [20, 5]], [[10, 40], [60, 40]]]  # [round][script][train, act]
    monkeypatch.setattr(speed, "measure", lambda args: rounds)
    speed.main(speed.Args(["dac", "dtql"]))
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows == ["| `dac` | 4.0 | 1.00 | 10.0 | 1.00 |", "| `dtql` | 20.0 | 5.00 | 20.0 | 1.00 |"]


def test_a_mistake_of_the_command(tmp_path, monkeypatch, capfd):
    """From anywhere, with one message, of the process that makes it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        speed.main(speed.Args(["dac --num-qs 0"]))
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: dac --num-qs 0: --num-qs is 0; it must be")
    assert err.count("\n") == 1


def test_nothing_to_measure():
    with pytest.raises(UserError, match=r"--gpu needs a GPU, and PyTorch 2\.\d.* finds none"):
        speed.main(speed.Args(gpu=True))
    with pytest.raises(UserError, match="name the scripts to measure, .* or give --gpu alone"):
        speed.main(speed.Args())


# --- All of a GPU, on a CPU ---
@pytest.fixture
def on_cpu(monkeypatch):
    """One tiny script. compiled has other networks, both is a mistake."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "SECONDS", 0.01)
    monkeypatch.setattr(gpu, "COMMANDS", {"dac": f"{TINY} 2"})
    changes = {"compiled": "--hidden-dims 9 9 --no-cuda-graph", "both": "--num-qs 0"}
    monkeypatch.setattr(gpu, "WAYS", gpu.WAYS | changes)


def test_row_of_the_gpu_table(on_cpu, monkeypatch, capsys):
    """What fails is a gap, and stops nothing else; losses that differ are said."""
    monkeypatch.setattr(speed, "start", lambda command, args: SimpleNamespace(kill=lambda: None))
    monkeypatch.setattr(speed, "rate", lambda process, which: 2.0)
    found = gpu.measure("dac", list(gpu.WAYS))
    assert set(gpu.COLUMNS) - found.keys() == {"both", "losses off by, both"}
    assert found["losses off by, graphed"] == 0 and found["losses off by, compiled"] > 0.01
    assert found["five seeds / one"] == 10 / found["graphed"] and 0.2 < found["in kernels, eager"] < 3
    wrong, mistake = capsys.readouterr().err.splitlines()
    assert wrong.startswith("error: dac, compiled: the first losses are off by 0.")
    assert mistake.startswith("error: dac, both: --num-qs is 0; it must be")


def test_gpu_without_time(on_cpu, monkeypatch, capfd):
    """It says what is missing."""
    monkeypatch.setattr(gpu, "LIMIT", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "start_checks", lambda: python("-c", "input()", stdin=subprocess.PIPE))
    gpu.main()
    out = capfd.readouterr().out
    assert out.startswith("a GPU, PyTorch ") and "| script, steps/s | eager | graphed |" in out
    assert out.endswith(": dac in the first part, checks in the first part, dac\n")
