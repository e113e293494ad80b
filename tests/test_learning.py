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
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import parity
import pytest
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from common.cli import UserError

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


def test_names_of_the_authors_become_ours(tmp_path):
    names = {"diff": "bc_loss", "qf1 + qf2": "critic_loss", "ql": "minus actor_q", "v": "mean of V"}
    authors = parity.read_curves(
        made_up(tmp_path, names=names | {"tgt": "target (q_mean follows it)"})
    ).authors
    expected = {"bc_loss": [1, 2], "critic_loss": [4, 5], "actor_q": [10, -5], "q_mean": [1, 8]}
    assert {name: rows[1].tolist() for name, rows in authors.items()} == expected


def test_the_p_value_is_the_share_of_all_ways_to_divide_the_seeds(tmp_path):
    draws = np.random.default_rng(0)
    theirs, ours = (
        draws.normal(size=(4, 2, 2)),
        draws.normal(0.8, size=(3, 2, 2)),
    )  # (seeds, quantities, steps)
    curves = parity.read_curves(made_up(tmp_path))._replace(authors={"a": theirs[:, 0], "b": theirs[:, 1]})
    seeds = {str(i): {"a": seed[0].tolist(), "b": seed[1].tolist()} for i, seed in enumerate(ours)}
    difference, place, p = parity.compare(curves, seeds)

    every = np.concatenate([theirs, ours])

    def apart(group):
        rest = [i for i in range(7) if i not in group]
        return np.abs(every[list(group)].mean(0) - every[rest].mean(0)) / every.std(
            0, ddof=1
        )  # (quantities, steps)

    found = apart((0, 1, 2, 3))
    ways = [apart(group).max() >= found.max() - 1e-9 for group in combinations(range(7), 4)]
    assert p == np.mean(ways) and 1 / 35 < p < 1
    assert difference == pytest.approx(found.max())
    metric, step = np.unravel_index(found.argmax(), found.shape)
    assert place == f"`{'ab'[metric]}` at step {curves.steps[step]:,}"
    shifted = {seed: {"a": points["a"], "b": [x + 9 for x in points["b"]]} for seed, points in seeds.items()}
    assert parity.compare(curves, shifted)[2] == 1 / 35  # no other way is as far apart


# === Bad input ===
FIELDS = ("script", "settings", "ours", "data", "interval", "steps", "names", "seeds")
DAMAGE = {f"lacks the field '{name}'": {name: None} for name in FIELDS}
DAMAGE |= {
    "lacks the field 'missing'": {"names": {"missing": "bc_loss"}},
    "lacks the field 'losses'": {"seeds": {"0": {"logged_every": 1}}},
    "lacks the field 'sha256'": {"data": {"file": "README.md"}},
    "a number at each of 1 steps": {"steps": [12]},
    "a number at each of 2 steps": {"steps": [10, 24]},
    "AxisError": {"seeds": {}},
    "TypeError": {"names": {"diff": 1}},
    "No closing quotation": {"ours": "python 'dac.py"},
    "its SHA-256 differs": {"data": {"file": "README.md", "sha256": "0"}},
    "No such file": {"data": {"file": "missing.hdf5", "sha256": "0"}},
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_file_gets_one_clear_error(tmp_path, message):
    with pytest.raises(UserError, match=f"made_up.json.*{message}"):
        parity.read_curves(made_up(tmp_path, **DAMAGE[message]))


def test_other_arguments_than_the_script_has_are_named(tmp_path):
    curves = parity.read_curves(made_up(tmp_path, ours="python dac.py --unknown 1"))
    with pytest.raises(UserError, match="dac.py does not take --unknown 1"):
        parity.train(curves, seed=0)


def test_a_figure_without_its_runs(tmp_path):
    path = parity.AUTHORS / "edp_iql__hopper-medium-sac.json"
    message = "no run in .* is one to compare with the authors': edp_iql on hopper-medium-sac.hdf5"
    with pytest.raises(UserError, match=message):
        parity.main(parity.Args([path], runs=tmp_path, output=tmp_path))
    words = ["docs/figures/parity.py", path, "--output", tmp_path, "--runs", tmp_path / "none"]
    found = subprocess.run([sys.executable, *words], cwd=parity.ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and re.match(f"error: {message}\n$", found.stderr)


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


def test_what_comes_before_the_first_step_is_not_in_the_curves(tmp_path):
    command = "python dtql.py --hidden-dims 8 8 --batch-size 16 --total-steps 24 --pretrain-steps 12"
    curves = parity.read_curves(made_up(tmp_path, script="dtql", ours=command))
    assert len(parity.train(curves, seed=0)["critic_loss"]) == 2
    assert len(parity.train(curves, seed=0, intervals=1)["critic_loss"]) == 1


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


def test_long_curves_are_read_from_run_folders(tmp_path, capsys):
    seed = {"scores": [10, 20], "losses": {"diff": [1, 2]}}
    long = {
        "data": "some.hdf5",
        "settings": "of hopper-medium-v2",
        "logged_every": 10,
        "names": {"diff": "bc_loss"},
    }
    path = made_up(tmp_path, **long, seeds={"0": seed}, interval=20, steps=[20, 40])

    def add_run(name, seed, env_id="hopper-medium-v2", **given):
        folder = tmp_path / "runs" / name
        args = {"env_id": env_id, "seed": seed, "dataset": "elsewhere/some.hdf5"}
        config = {"script": "dac", "args": args | given, "sources": dict.fromkeys(args | given, "given")}
        with SummaryWriter(folder) as writer:
            for step in (10, 20, 30, 40):
                writer.add_scalar("losses/bc_loss", step, step)
        (folder / "config.json").write_text(json.dumps(config))
        evaluations = [
            {"step": step, "normalized_score": seed + step, "return_mean": 0} for step in (20, 30, 40)
        ]
        results = {
            "format": parity.toolbox.FORMATS[-1],
            "evaluations": evaluations,
            "step": 40,
            "total_steps": 40,
        }
        results |= {"finished": True, "train_seconds": 1, "data": "some", "data_mean": {"score": 1}}
        (folder / "results.json").write_text(json.dumps(results))

    add_run("a", seed=1)
    add_run("b", seed=2)
    add_run("other task", seed=3, env_id="hopper-expert-v2")
    add_run("other settings", seed=4, tau=0.1)
    parity.main(parity.Args([path], runs=tmp_path / "runs", output=tmp_path))
    seeds = json.loads((tmp_path / "made_up.json").read_text())["curves"][""]
    assert seeds == {str(i): {"score": [20 + i, 40 + i], "bc_loss": [15, 35]} for i in (1, 2)}
    rows = capsys.readouterr().out.splitlines()
    assert rows[-1] == "| `dac`, `some` | `bc_loss` | 40 | 2 (1) | 35 ± 0 (2) |"
    assert imread(tmp_path / "long.png").shape[1] > 600
