"""docs/figures/claims.py: each claim from tiny runs, and the numbers that it prints."""

from functools import partial
from types import SimpleNamespace

import claims
import pytest
import speed

from common.cli import UserError
from common.envs import make_env

trained_as_a_script = claims.trained


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Runs of a few steps, short evaluations; speeds of 1, 2, ... updates/s and 10, 20, ... actions/s."""
    short, bandits = SimpleNamespace(env_kwargs=("max_episode_steps=3",)), SimpleNamespace(env_kwargs=())
    given = {"bandit": bandits}  # which have no steps to cut
    monkeypatch.setattr(claims, "make_env", lambda task, args: make_env(task, given.get(task.kind, short)))
    monkeypatch.setattr(claims, "trained", partial(trained_as_a_script, eval_episodes=1))
    monkeypatch.setattr(claims, "SHARE", 0.0004)
    rates = [[[1.0 + i, 10.0 + 10 * i] for i in range(10)]]
    monkeypatch.setattr(speed, "measure", lambda args: [each[: len(args.commands)] for each in rates])


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_a_claim(name, tmp_path, capsys):
    """Its picture is there, and its numbers are finite."""
    claims.main(claims.Args(name, tmp_path / "new", seeds=(3,)))
    [path] = (tmp_path / "new").iterdir()
    assert path.name == f"{name}.png" and path.stat().st_size < 100_000
    lines = capsys.readouterr().out.splitlines()
    assert "nan" not in str(lines) and (len(lines) > 1 or name == "dtql_trust_region")


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="there is no claim 'dac_ensembles'; nearest names: dac_ensemble"):
        claims.main(claims.Args("dac_ensembles", tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/edp_speed.png: "):
        claims.main(claims.Args("edp_speed", tmp_path / "file"))
