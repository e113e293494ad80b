"""tools/speed.py: what it measures is not asserted, only that it measures what was asked for, and says so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.datasets import UserError
from tools import speed

TINY = "--hidden-dims 8 8 --batch-size 4 --diffusion-steps"


def test_agent_class():
    for name, agent in (("dac", "DAC"), ("edp_td3.py", "EDPTD3")):
        assert speed.agent_class(speed.load_script(name)).__name__ == agent


def test_table(capsys):
    commands = [f"diffusion_ql {TINY} 50", f"diffusion_ql {TINY} 2"]
    speed.main(speed.Args(commands, rounds=2, seconds=0.2, transitions=100))
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r".*, \d+ threads, 2 rounds of 0.2 s$", lines[0])
    first, second = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[-2:])
    assert [first[0], second[0]] == [f"`{command}`" for command in commands]
    assert (first[2], first[4]) == ("1.00", "1.00")
    assert float(second[2]) > 1 and float(second[4]) > 1  # a 25th of the network calls


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("edp_td", "there is no script 'edp_td'; nearest names: edp_td3"),
        ("dac --device tpu", "--device tpu is not available"),
        ("edp_td3 --dpm-calls 2000", "--dpm-calls is 2000"),
    ],
)
def test_mistakes(command, message):
    with pytest.raises(UserError, match=message):
        speed.main(speed.Args([command]))


def test_command():
    """From anywhere, with one message for a mistake."""
    script = Path(speed.__file__)
    done = subprocess.run([sys.executable, script, "dacc"], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no script 'dacc'; nearest names: dac")
