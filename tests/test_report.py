"""tools/report.py: a golden report, statistics by hand, and what it flags."""

import json

import numpy as np
import pytest
import report
from report import Args
from runs import finish, python, write_records

import toolbox
from common.cli import UserError
from common.scores import reference_returns

TASK = "bandit-moons-v0"
HEAD = """\
# Report

11 runs of 3 scripts on 4 tasks in runs: 1.1 hours, with the code of abc.

## Problems

- dac on hopper-medium-v2, seed 2: not finished, at step 40 of 60; left out (dac hopper-medium-v2 2)
"""
SCORES = """\
| task | algorithm | seeds | last ten | averaged | oracle | published | data | steps | hours |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| InvertedPendulum-v5 | qvpo_online | 2 | 510 [20, 1000] (return) | 2 | 515 | - | - | 60 | 0.1 |
| bandit-corners-v0 | dac | 3 | 40.0 [30.0, 50.0] | 2 | 45.0 | - | 25.0 | 60 | 0.1 |
| bandit-corners-v0 | edp_td3 | 2 | 15.0 [10.0, 20.0] | 2 | 20.0 | - | 25.0 | 60 | 0.1 |
| bandit-moons-v0 | dac | 1 | 70.0 | 2 | 75.0 | - | 25.0 | 60 | 0.1 |
| hopper-medium-v2 | dac | 2 | 90.0 [85.0, 95.0] | 2 | 95.0 | 101.2 (evaluation not stated); 103.5 (final, run by others) | 44.3 | 60 | 0.1 |
| hopper-medium-v2 | edp_td3 | 1 | 80.0 | 2 | 85.0 | 81.9 (RAT); 98.6 (OMS) | 44.3 | 60 | 0.1 |
"""  # noqa: E501


def write_run(folder, script, env_id, seed, last_ten, finished=True, evaluations=2, **args):
    """A run folder as scripts leave it: evaluations 5 points below last_ten and 5 above."""
    zero, hundred = reference_returns(env_id) or (0.0, 100.0)
    scores = [last_ten + (5 if i % 2 else -5) for i in range(evaluations)]
    known = reference_returns(env_id) is not None
    results = {}
    if script != "qvpo_online":
        results["data"] = env_id
        data_score = 44.3 if env_id.startswith("hopper") else 25.0
        results |= {"data_mean": zero + (hundred - zero) * data_score / 100}
        results |= {"reference_returns": reference_returns(env_id)}
    results["evaluations"] = [
        {
            "step": 30 * (i + 1),
            "return_mean": zero + (hundred - zero) * score / 100,
            "normalized_score": score if known else None,
        }
        for i, score in enumerate(scores)
    ]
    total = 30 * max(evaluations, 1)
    results |= {"step": total if finished else 40, "total_steps": total, "finished": finished}
    defaults = {"env_id": env_id, "seed": seed, "dataset": None, "eta": 1.0, "run_dir": "x"}
    config = {"code": "abc", "sources": dict.fromkeys(args, "given")}
    write_records(folder, script, defaults | args, config, **results)
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder of the runs; the tests stand beside it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def grid(runs):
    """Runs with gaps."""
    for script, env_id, scores in [
        ("dac", "bandit-corners-v0", [30, 40, 50]),
        ("dac", "hopper-medium-v2", [85, 95]),
        ("edp_td3", "bandit-corners-v0", [10, 20]),
        ("edp_td3", "hopper-medium-v2", [80]),
        ("qvpo_online", "InvertedPendulum-v5", [20, 1000]),
        ("dac", TASK, [70]),
    ]:
        for seed, score in enumerate(scores):
            write_run(runs / f"{script} {env_id} {seed}", script, env_id, seed, score)
    write_run(runs / "dac hopper-medium-v2 2", "dac", "hopper-medium-v2", 2, 0, finished=False)
    return runs


def make(*folders, output="report", **options):
    """The report and its problems."""
    report.main(Args([str(folder) for folder in folders], report.Path(output), **options))
    text = (report.Path(output) / "report.md").read_text()
    section = text.partition("## Problems\n\n")[2].partition("\n\n##")[0]
    return text, [line.removeprefix("- ") for line in section.splitlines()]


def cells_of(text, start):
    """The cells of the one row that starts so."""
    [row] = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in row.split("|")[1:-1]]


# --- The tables ---
def test_golden(grid):
    text, _ = make("runs")
    assert text.partition("\n## Scores\n")[0] == HEAD
    assert SCORES in text
    assert "- results table in the README of the authors' code" in text
    assert "Kang et al. 2023, arXiv 2305.20081, Table 5" in text
    assert "Wang et al." not in text  # not asked for


def test_last_ten_of_many(runs):
    """Of twelve evaluations the first two do not count."""
    folder = write_run(runs / "a", "dac", TASK, 0, 50, evaluations=12)
    results = json.loads((folder / "results.json").read_text())
    for each in results["evaluations"][:2]:
        each["normalized_score"] = 1000.0
    (folder / "results.json").write_text(json.dumps(results))
    assert cells_of(make("runs")[0], "| bandit-moons-v0 |")[3:6] == ["50.0", "10", "1000.0"]


@pytest.mark.parametrize(
    ("script", "env_id", "args", "expected"),
    [
        ("dac", "hopper-medium-v2", {"dataset": "mine.hdf5"}, "-"),
        ("dtql", "hopper-medium-v2", {}, "99.6 (evaluation not stated)"),
        ("dtql", "antmaze-umaze-v0", {}, "-"),  # published, but not compared with its source
        ("edp_td3", "pen-human-v1", {}, "48.2 (RAT, pen-human-v0); 98.3 (OMS)"),
        ("qvpo_online", "Hopper-v4", {}, "3728.5 (return, Hopper-v3)"),
        ("qvpo_online", "Hopper-v5", {}, "-"),
    ],
)
def test_published_scores_beside_a_run(script, env_id, args, expected, runs):
    """Only where the data is the paper's; another version of the task is named."""
    write_run(runs / "a", script, env_id, 0, 1, **args)
    assert cells_of(make("runs")[0], f"| {env_id} | {script} |")[6] == expected


# --- Statistics ---
def test_rat_and_oms_over_the_steps(runs):
    """From 11 evaluations on, RAT forgets the first; OMS never falls."""
    for seed, score in enumerate([50, 70]):
        write_run(runs / str(seed), "dac", TASK, seed, score, evaluations=11)
    groups, _ = report.group_runs(report.find_runs(["runs"]))
    oms, rat, first, second, *_ = (line.get_ydata() for line in report.draw(groups, True).axes[0].lines)
    np.testing.assert_allclose(oms, [55] + 10 * [65])
    np.testing.assert_allclose(first[[0, 1, 2, 9, 10]], [45, 50, 48 + 1 / 3, 50, 50])
    np.testing.assert_allclose([second, rat], [first + 20, first + 10])


def test_interval_by_hand():
    """Of two seeds the mean is either of them a quarter of the time; of three, each extreme once in 27."""
    assert toolbox.interval(np.array([1.0, 5.0])) == (1, 5)
    assert toolbox.interval(np.array([1.0, 5.0, 30.0])) == (1, 30)
    # Of 20 zeros and ones: a binomial count, whose 2.5 % and 97.5 % quantiles are 6 and 14.
    assert toolbox.interval(np.repeat([0.0, 1.0], 10)) == pytest.approx((6 / 20, 14 / 20))
    assert toolbox.interval(np.array([3.0])) is None
    low, high = toolbox.interval(np.array([[1.0, 5.0], [2.0, 2.0]]))  # two evaluations of two seeds
    assert (low.tolist(), high.tolist()) == ([1, 2], [5, 2])


# --- What it flags ---
def test_runs_with_different_settings_have_rows_of_their_own(runs):
    for seed, eta, score in [(0, 1.0, 10), (1, 1.0, 30), (0, 5.0, 90), (1, 5.0, 70)]:
        where = {"run_dir": f"{eta}{seed}", "device": f"{seed}"}
        write_run(runs / f"{eta} {seed}", "dac", TASK, seed, score, eta=eta, **where)
    text, problems = make("runs")
    assert problems == ["dac on bandit-moons-v0: runs with different eta, in rows of their own"]
    assert cells_of(text, "| bandit-moons-v0 | dac (eta 1.0) |")[2:4] == ["2", "20.0 [10.0, 30.0]"]
    assert cells_of(text, "| bandit-moons-v0 | dac (eta 5.0) |")[2:4] == ["2", "80.0 [70.0, 90.0]"]


def test_a_seed_that_was_run_twice_counts_once(runs):
    for name, score in [("20260101", 10), ("20260102", 30)]:
        write_run(runs / name, "dac", TASK, 0, score)
    text, problems = make("runs", "runs/20260101")  # by two ways
    assert problems == ["dac on bandit-moons-v0, seed 0: made twice; counted 20260102, left out 20260101"]
    assert cells_of(text, "| bandit-moons-v0 |")[2:4] == ["1", "30.0"]


def test_unfinished_runs_count_on_request(runs):
    for seed, finished in enumerate([True, False]):
        write_run(runs / str(seed), "dac", TASK, seed, 50 + 20 * seed, finished)
    assert make("runs")[1][0].startswith("dac on bandit-moons-v0, seed 1: not finished, at step 40")
    text, problems = make("runs", unfinished=True)
    assert problems == ["None: every run counts, no seed is missing."]
    cells = cells_of(text, "| bandit-moons-v0 |")
    assert cells[3] == "60.0 [50.0, 70.0]" and cells[8] == "40 of 60"


def test_runs_that_do_not_count(runs):
    """They are named, but for one without a checkpoint that was begun again."""
    write_run(runs / "a", "dac", TASK, 0, 50)
    for name, seed in [("b", 0), ("c", 1)]:
        (write_run(runs / name, "dac", TASK, seed, 50) / "results.json").unlink()
    write_run(runs / "d", "dac", TASK, 2, 50, evaluations=0)
    write_run(runs / "e", "dac", TASK, 3, float("nan"))
    text, problems = make("runs")
    assert problems == [
        "dac on bandit-moons-v0, seed 1: it stopped before its first checkpoint; left out (c)",
        "dac on bandit-moons-v0, seed 2: not evaluated; left out (d)",
        "dac on bandit-moons-v0, seed 3: the score of step 30 is nan; left out (e)",
    ]
    assert cells_of(text, "| bandit-moons-v0 |")[2:4] == ["1", "50.0"]


# --- Mistakes ---
def test_folders_without_runs(runs):
    message = "there is no run in runs or below: no config.json"
    with pytest.raises(UserError, match=message):
        make("runs")
    write_run(runs / "a", "dac", TASK, 0, 50, finished=False)
    with pytest.raises(UserError, match="no run counts:\n  dac.*\n--unfinished counts"):
        make("runs")
    assert not (runs.parent / "report").exists()


@pytest.mark.parametrize("name", ["results.json", "config.json"])
def test_damaged_files(name, runs):
    path = write_run(runs / "bad", "dac", TASK, 1, 50) / name
    for text in ("", "{", "[]", '{"format": 1}', "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=f"^{path} is damaged, or of another version"):
            report.find_runs(["runs"])


def test_command(grid, tmp_path):
    """From anywhere, without PyTorch; one message where it cannot write."""
    words = ["-X", "importtime", report.__file__, grid, "--output", tmp_path / "out"]
    code, out, err = finish(python(*words, cwd="/"))
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines()}
    assert code == 0 and "numpy" in imported and "torch" not in imported
    assert out.endswith(f"1 problems; report.md and its pictures are in {tmp_path}/out\n")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/x/curves.png: "):
        make(grid, output=tmp_path / "file/x")
