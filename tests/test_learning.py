"""The scripts learn as the authors' code does: losses and Q values beside its curves, tests/golden/learning/.

    pytest -m slow tests/test_learning.py
    LEARNING_INTERVALS=2 pytest -m slow tests/test_learning.py -k dac    # the first two points of each curve

Further curves are read from the folder that GOLDEN_DIR names, and from learning/ in it. LEARNING_SEEDS="0 1"
trains two seeds instead of one. tools/parity.py trains and compares; it explains the band.
"""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import parity
import pytest
from matplotlib.image import imread

from common.tasks import UserError

MORE = Path(os.environ.get("GOLDEN_DIR") or parity.GOLDEN)  # may also hold files for test_conformance.py
FOLDERS = dict.fromkeys([parity.GOLDEN, MORE, MORE / "learning"])
FILES = [path for folder in FOLDERS for path in folder.glob("*.json") if '"interval"' in path.read_text()]
INTERVALS = int(os.environ.get("LEARNING_INTERVALS", "1000000"))
SEEDS = [int(seed) for seed in os.environ.get("LEARNING_SEEDS", "0").split()]


# === Beside the authors' code ===
@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: path.stem)
def test_losses_and_q_values_stay_near_those_of_the_authors(path, seed):
    curves = parity.read_curves(path)
    assert parity.outside(curves, parity.train(curves, seed, INTERVALS)) == []


BREAKS = {  # how to break a script, and after how many points it shows
    "discount": ("--gamma=0.9", None),  # at the end of the curves
    "target update": ("--tau=0", 2),
    "reward rule": ("--reward-tune=normalize", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edp_iql", "edp_crr"])
@pytest.mark.parametrize("what", BREAKS)
def test_the_band_catches_a_wrong(what, name):
    curves = parity.read_curves(parity.GOLDEN / f"{name}.json")
    change, intervals = BREAKS[what]
    assert parity.outside(curves, parity.train(curves, 0, intervals, [change]))


def test_there_are_curves_of_every_offline_script():
    curves = [parity.read_curves(path) for path in parity.GOLDEN.glob("*.json")]
    offline = {"dac", "diffusion_ql", "dtql", "edp_crr", "edp_iql", "edp_td3"}
    assert {each.script for each in curves} == offline
    for each in curves:
        assert {"bc_loss", "critic_loss"} <= each.authors.keys()


@pytest.mark.parametrize("path", sorted(parity.GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_the_band_is_as_wide_as_the_spread_of_the_seeds_asks_for(path):
    curves = parity.read_curves(path)
    kept = json.loads((parity.Args.output / path.name).read_text())
    assert kept["conditions"] == parity.conditions(curves)
    for metric in parity.compared(curves, kept["seeds"]["0"]):
        seeds = [*curves.authors[metric], *(seed[metric] for seed in kept["seeds"].values())]
        allowed = parity.MARGIN * parity.width_of(curves.script, metric)
        assert parity.furthest(curves, metric, np.array(seeds)) <= allowed, metric


# === The comparison, with made-up curves ===
def made_up(folder, **changes):
    """A file of two seeds' curves over 24 steps, some of its fields changed; without those that are None."""
    data = parity.toolbox.ROOT / "common" / "data" / "hopper-mini-v0.hdf5"
    losses = {
        "diff": [1.0, 2.0],
        "qf1": [3.0, 4.0],
        "qf2": [1.0, 1.0],
        "ql": [-10, 5],
        "tgt": [1, 8],
        "v": [0, 0],
    }
    command = "python dac.py --hidden-dims 8 8 --batch-size 16 --total-steps 24 --lr-decay-steps 1000"
    file = {
        "script": "dac",
        "ours": command,
        "data": {"file": str(data), "sha256": hashlib.sha256(data.read_bytes()).hexdigest()},
        "interval": 12,
        "steps": [12, 24],
        "names": {"diff": "bc_loss", "qf1 + qf2": "critic_loss", "ql": "minus actor_q"}
        | {"tgt": "mean target (q_mean follows it)", "v": "mean of V"},
        "seeds": {seed: {"losses": losses, "logged_every": 3} for seed in "01"},
    } | changes
    path = folder / "made_up.json"
    path.write_text(json.dumps({name: value for name, value in file.items() if value is not None}))
    return path


def test_names_of_the_authors_become_ours(tmp_path):
    authors = parity.read_curves(made_up(tmp_path)).authors
    expected = {"bc_loss": [1, 2], "critic_loss": [4, 5], "actor_q": [10, -5], "q_mean": [1, 8]}
    assert {name: rows[1].tolist() for name, rows in authors.items()} == expected


def test_points_outside_the_band_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "WIDTHS", {"other": 0.1, "critic_loss": 0.5, "dac q_mean": 0.2})
    curves = parity.read_curves(made_up(tmp_path))
    curves.logged_every = 1
    inside = {
        "bc_loss": [1.09, 1.81],
        "critic_loss": [2.1, 7.4],
        "actor_q": [9.1, -4.6],
        "q_mean": [-0.5, 6.5],
    }
    assert parity.outside(curves, inside) == []
    assert parity.outside(curves, {name: points[:1] for name, points in inside.items()}) == []
    for name, points in inside.items():
        for i in range(2):
            wrong = [point + (5 if i == j else 0) * np.sign(points[j]) for j, point in enumerate(points)]
            [line] = parity.outside(curves, inside | {name: wrong})
            assert line.startswith(f"{name} at step {curves.steps[i]} is {wrong[i]:.4g}, not in [")
    curves.logged_every = 10  # the very first step weighs too much in the first point
    assert parity.outside(curves, {name: [99, points[1]] for name, points in inside.items()}) == []
    with pytest.raises(UserError, match="dac.py does not log actor_q"):
        parity.outside(curves, {name: inside[name] for name in ("bc_loss", "critic_loss", "q_mean")})


DAMAGE = {name: {name: None} for name in ("script", "ours", "data", "interval", "steps", "names", "seeds")}
DAMAGE |= {
    "number of points": {"steps": [12]},
    "steps": {"steps": [10, 24]},
    "no seeds": {"seeds": {}},
    "a name": {"names": {"missing": "bc_loss"}},
    "type": {"names": {"diff": 1}},
    "no metric": {"names": {"diff": "mean of V"}},
    "logged every": {
        "seeds": {"0": {"losses": {"diff": [1, 2]}, "logged_every": 0}},
        "names": {"diff": "bc_loss"},
    },
    "command": {"ours": "python 'dac.py"},
    "losses": {"seeds": {"0": {"logged_every": 1}}},
    "not finite": {
        "seeds": {"0": {"losses": {"diff": [1, float("nan")]}, "logged_every": 1}},
        "names": {"diff": "bc_loss"},
    },
    "checksum": {"data": {"file": "README.md"}},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_gets_one_clear_error(tmp_path, damage):
    with pytest.raises(UserError, match="made_up.json is no file of learning curves, or damaged"):
        parity.read_curves(made_up(tmp_path, **DAMAGE[damage]))


def test_other_data_are_noticed(tmp_path):
    with pytest.raises(UserError, match="is not the data of .*SHA-256"):
        parity.read_curves(made_up(tmp_path, data={"file": "README.md", "sha256": "0"}))
    with pytest.raises(UserError, match="cannot be read"):
        parity.read_curves(made_up(tmp_path, data={"file": "missing.hdf5", "sha256": "0"}))


def test_other_arguments_than_the_script_has_are_named(tmp_path):
    curves = parity.read_curves(made_up(tmp_path, ours="python dac.py --unknown 1"))
    with pytest.raises(UserError, match="dac.py does not take the arguments of the file: --unknown 1"):
        parity.train(curves, seed=0)


# === Our curves ===
def test_a_point_is_the_mean_over_the_steps_that_the_authors_logged(tmp_path):
    every_step = {"interval": 1, "steps": list(range(1, 25)), "names": {"diff": "bc_loss"}}
    every_step |= {"seeds": {"0": {"losses": {"diff": [0] * 24}, "logged_every": 1}}}
    steps = parity.train(parity.read_curves(made_up(tmp_path, **every_step)), seed=3)
    points = parity.train(parity.read_curves(made_up(tmp_path)), seed=3)
    assert len(steps["bc_loss"]) == 24 and len(set(steps["bc_loss"])) == 24
    for name in steps:
        expected = np.reshape(steps[name], (2, 12))[:, ::3].mean(1)
        np.testing.assert_allclose(points[name], expected, rtol=1e-5, atol=1e-7)


def test_what_comes_before_the_first_step_is_not_in_the_curves(tmp_path):
    command = "python dtql.py --hidden-dims 8 8 --batch-size 16 --total-steps 24 --pretrain-steps 12"
    curves = parity.read_curves(made_up(tmp_path, script="dtql", ours=command))
    assert {len(points) for points in parity.train(curves, seed=0).values()} == {2}
    assert {len(points) for points in parity.train(curves, seed=0, intervals=1).values()} == {1}


def test_the_tool_trains_once_draws_and_tabulates(tmp_path, capsys, monkeypatch):
    names = {"diff": "bc_loss", "qf1 + qf2": "critic_loss", "tgt": "(q_mean follows it)"}
    args = parity.Args([made_up(tmp_path, names=names)], seeds=(0, 1), output=tmp_path / "made")
    parity.main(args)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in printed[-3:]] == ["`bc_loss`", "`critic_loss`", "`q_mean`"]
    assert " | 5 ± 0 | " in printed[-2]
    assert imread(tmp_path / "made" / "made_up.png").shape[1] > 600
    monkeypatch.delattr(parity, "train")
    parity.main(args)
    assert capsys.readouterr().out.splitlines() == printed[-5:]
    with pytest.raises(UserError, match="cannot write"):
        parity.main(parity.Args(args.curves, output=tmp_path / "made_up.json"))


def test_fewer_intervals_than_are_kept(tmp_path, capsys):
    """Curves of different lengths are compared as far as --intervals says."""
    names = {"diff": "bc_loss", "qf1 + qf2": "critic_loss"}
    args = parity.Args([made_up(tmp_path, names=names)], seeds=(0,), output=tmp_path / "made")
    parity.main(args)
    parity.main(replace(args, seeds=(0, 1), intervals=1))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| `dac`")]
    assert [row[2] for row in rows] == ["24"] * (len(rows) // 2) + ["12"] * (len(rows) // 2) and len(rows) > 1
    kept = json.loads((tmp_path / "made" / "made_up.json").read_text())["seeds"]
    assert {name: len(points) for name, points in kept["0"].items()} == dict.fromkeys(kept["0"], 2)
