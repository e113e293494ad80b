"""docs/figures/claims.py: each claim from tiny runs, the numbers that it prints, and clear failures."""

import sys
from functools import partial

import claims
import pytest
import speed

from common.cli import run_command

trained_as_a_script = claims.trained


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Runs of a few steps, short evaluations; speeds of 1, 2, ... updates/s and 10, 20, ... actions/s."""
    monkeypatch.setattr(claims, "trained", partial(trained_as_a_script, eval_episodes=1))
    monkeypatch.setattr(claims, "SHARE", 0.0004)
    rates = [[[1.0 + i, 10.0 + 10 * i] for i in range(10)]]
    monkeypatch.setattr(speed, "measure", lambda args: [each[: len(args.commands)] for each in rates])


def run(monkeypatch, *words):
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["claims.py", *map(str, words)])
    try:
        run_command(claims.main, claims.Args)
    except SystemExit as error:
        return error.code
    return 0


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_a_claim(name, tmp_path, monkeypatch, capsys):
    """Its picture is there, and its numbers are finite."""
    assert run(monkeypatch, name, "--output", tmp_path / "new", "--seeds", 3) == 0
    [path] = (tmp_path / "new").iterdir()
    assert path.name == f"{name}.png" and path.stat().st_size < 100_000
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1 or name == "dtql_trust_region"
    assert "nan" not in str(lines)


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        ("dac_guidence", "new", "error: there is no claim 'dac_guidence'; nearest names: dac_guidance"),
        ("dac_guidance", "file", "error: cannot write "),
    ],
)
def test_errors_before_anything_is_trained(name, output, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setitem(claims.CLAIMS, "dac_guidance", None)  # which would fail otherwise
    assert run(monkeypatch, name, "--output", tmp_path / output) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and "Traceback" not in error
    assert not (tmp_path / "new").exists()
