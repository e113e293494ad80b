"""The scripts learn as the authors' code does: losses and Q values beside its curves, docs/parity/.

    pytest -m slow tests/test_learning.py                                   # 500 steps of four seeds each
    LEARNING_INTERVALS=6 pytest -m slow tests/test_learning.py -k dtql      # all of its curves

What is quick holds the kept curves to the test of docs/parity.md; what is slow trains anew, the seeds that
LEARNING_SEEDS="0 1 2 3" names, and also beside the curves in the folder GOLDEN_DIR, and in learning/ there.
"""

import hashlib
import json
import math
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import parity
import pytest
from matplotlib.image import imread

FILES = [path for path in sorted(parity.AUTHORS.glob("*.json")) if "__" not in path.name]
FOLDERS = [Path(os.environ["GOLDEN_DIR"])] if "GOLDEN_DIR" in os.environ else []
MORE = [path for each in FOLDERS for path in [*each.glob("*.json"), *(each / "learning").glob("*.json")]]
MORE = [path for path in MORE if '"interval"' in path.read_text() and '"ours"' in path.read_text()]
INTERVALS = int(os.environ.get("LEARNING_INTERVALS", "2"))
SEEDS = [int(seed) for seed in os.environ.get("LEARNING_SEEDS", "0 1 2 3").split()]
KEPT = parity.Args(seeds=())  # nothing is trained
MISTAKES = {"--gamma=0.9", "--tau=0", "--reward-tune=normalize"}


# === Beside the authors' code ===
def kept(path):
    curves = parity.read_curves(path)
    file = json.loads((parity.Args.output / path.name).read_text())
    assert file["conditions"] == curves.conditions
    return curves, file["curves"]


def corrected_p(curves, ours):
    return parity.SCRIPTS * parity.compare(curves, ours)[2]


def test_every_offline_script_has_kept_curves():
    scripts = {parity.read_curves(path).script for path in FILES}
    assert scripts == {"dac", "diffusion_ql", "dtql", "edp_crr", "edp_iql", "edp_td3"}
    assert len(FILES) == parity.SCRIPTS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_kept_curves_are_not_told_from_the_authors(path):
    curves, ours = kept(path)
    if len(ours[""]) < (12 if curves.script == "edp_crr" else 6):
        pytest.skip(f"{len(ours[''])} seeds of ours cannot fail the test: docs/parity.md says so")
    assert {"bc_loss", "critic_loss"} <= curves.authors.keys()
    assert corrected_p(curves, ours[""]) > 0.05


@pytest.mark.parametrize("name", ["edp_iql", "edp_crr"])
def test_every_kept_mistake_is_told(name):
    curves, ours = kept(parity.AUTHORS / f"{name}.json")
    assert ours.keys() - {""} == MISTAKES
    for mistake in MISTAKES:
        assert corrected_p(curves, ours[mistake]) < 0.05, mistake


def test_the_tables_of_the_page_are_of_the_kept_curves():
    files = [parity.read_curves(path) for path in sorted(parity.AUTHORS.glob("*.json"))]
    lines = parity.tables(files, {curves.name: parity.our_curves(curves, KEPT) for curves in files})
    page = (parity.ROOT / "docs" / "parity.md").read_text().splitlines()
    assert [line for line in lines if line not in page] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", [*FILES, *MORE], ids=lambda path: path.stem)
def test_new_seeds_are_not_told_from_the_authors(path):
    curves = parity.read_curves(path)
    count = len(next(iter(curves.authors.values())))
    if parity.SCRIPTS / math.comb(count + len(SEEDS), count) > 0.05:
        pytest.skip(f"{count} seeds of the authors' and {len(SEEDS)} of ours cannot differ significantly")
    ours = {str(seed): parity.train(curves, seed, INTERVALS) for seed in SEEDS}
    assert corrected_p(curves, ours) > 0.05


# === The comparison, with made-up curves ===
def made_up(folder, **changes):
    """A file of two seeds' curves over 24 steps, some of its fields changed; without those that are None."""
    data = parity.ROOT / "common" / "data" / "hopper-mini-v0.hdf5"
    losses = {"diff": [1, 2], "qf1": [3, 4], "qf2": [1, 1], "ql": [-10, 5], "tgt": [1, 8], "v": [0, 0]}
    file = {
        "script": "dac",
        "settings": "small",
        "ours": "python dac.py --hidden-dims 8 8 --batch-size 16 --total-steps 24 --lr-decay-steps 1000",
        "data": {"file": str(data), "sha256": hashlib.sha256(data.read_bytes()).hexdigest()},
        "interval": 12,
        "steps": [12, 24],
        "names": {"diff": "bc_loss", "qf1 + qf2": "critic_loss", "tgt": "mean target (q_mean follows it)"},
        "seeds": {seed: {"losses": losses, "logged_every": 3} for seed in "01"},
    } | changes
    path = folder / "made_up.json"
    path.write_text(json.dumps({name: value for name, value in file.items() if value is not None}))
    return path


def test_the_p_value_is_the_share_of_all_ways_to_divide_the_seeds(tmp_path):
    draws = np.random.default_rng(0)
    theirs, ours = draws.normal(size=(4, 2, 2)), draws.normal(0.8, size=(3, 2, 2))  # (seed, quantity, step)
    curves = parity.read_curves(made_up(tmp_path))._replace(authors={"a": theirs[:, 0], "b": theirs[:, 1]})
    seeds = {str(i): {"a": seed[0].tolist(), "b": seed[1].tolist()} for i, seed in enumerate(ours)}
    difference, place, p = parity.compare(curves, seeds)

    every = np.concatenate([theirs, ours])

    def apart(group):
        rest = [i for i in range(7) if i not in group]
        gap = np.abs(every[list(group)].mean(0) - every[rest].mean(0))  # (quantities, steps)
        return gap / every.std(0, ddof=1)

    found = apart((0, 1, 2, 3))
    ways = [apart(group).max() >= found.max() - 1e-9 for group in combinations(range(7), 4)]
    assert p == np.mean(ways) and 1 / 35 < p < 1
    assert difference == pytest.approx(found.max())
    metric, step = np.unravel_index(found.argmax(), found.shape)
    assert place == f"`{'ab'[metric]}` at step {curves.steps[step]:,}"
    shifted = {seed: {"a": points["a"], "b": [x + 9 for x in points["b"]]} for seed, points in seeds.items()}
    assert parity.compare(curves, shifted)[2] == 1 / 35  # no other way is as far apart


# === Our curves ===
def test_a_point_is_the_mean_over_the_steps_that_the_authors_logged(tmp_path):
    every_step = {"interval": 1, "steps": list(range(1, 25)), "names": {"diff": "bc_loss"}}
    every_step |= {"seeds": {"0": {"losses": {"diff": [0] * 24}, "logged_every": 1}}}
    steps = parity.train(parity.read_curves(made_up(tmp_path, **every_step)), seed=3)
    points = parity.train(parity.read_curves(made_up(tmp_path)), seed=3)
    assert len(steps["bc_loss"]) == 24 and len(set(steps["bc_loss"])) == 24
    for name in ("bc_loss", "critic_loss", "q_mean"):
        expected = np.reshape(steps[name], (2, 12))[:, ::3].mean(1)
        np.testing.assert_allclose(points[name], expected, rtol=1e-5, atol=1e-7)


def test_it_trains_once_draws_tests_and_tabulates(tmp_path, capsys, monkeypatch):
    args = parity.Args([made_up(tmp_path)], seeds=(0, 1), output=tmp_path / "made")
    parity.main(args)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in printed[-3:]] == ["`bc_loss`", "`critic_loss`", "`q_mean`"]
    assert " | 5 ± 0 (2) | " in printed[-2]
    assert any(line.startswith("| `dac` |  | 2, 2 | ") for line in printed)
    assert imread(tmp_path / "made" / "made_up.png").shape[1] > 600
    monkeypatch.delattr(parity, "train")  # what is kept is not trained again
    parity.main(args)
    assert capsys.readouterr().out.splitlines() == printed[-9:]
