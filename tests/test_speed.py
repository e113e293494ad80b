"""tools/speed.py: that it measures what was asked for and says so; how fast anything is, no test asserts."""

import re
import shutil

import speed
from runs import finish, python

import toolbox

TINY = "--hidden-dims 8 8 --batch-size 4 --num-qs 2 --diffusion-steps"


def test_table(capsys):
    commands = [f"dac {TINY} 50", f"dac {TINY} 2 --matmul-precision medium"]
    speed.main(speed.Args(commands, rounds=2, seconds=0.2, num_threads=2, transitions=100))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(speed.processor()) and speed.processor()
    assert re.search(r"; 2 threads and the highest precision where .*; 2 rounds of 0.2 s$", lines[0])
    first, second = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[-2:])
    assert [first[0], second[0]] == [f"`{command}`" for command in commands]
    assert (first[2], first[4]) == ("1.00", "1.00")
    assert all(float(cell) > 0 for cell in first[1:] + second[1:])


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
    words += ["--rounds", 1, "--seconds", 0.1, "--transitions", 100]
    code, out, err = finish(python(*words, cwd="/"))
    assert (code, err) == (0, "of the other checkout\n")
    assert f"| `{tmp_path}/dac.py {TINY} 2` |" in out


def test_a_mistake_of_the_command():
    """From anywhere, with one message, of the process that makes it."""
    code, out, err = finish(python(speed.__file__, "dac --num-qs 0", cwd="/"))
    assert (code, out) == (2, "") and err.startswith("error: dac --num-qs 0: --num-qs is 0; it must be")
    assert err.count("\n") == 1
