"""tools/report.py: a golden report, statistics by hand, what it flags, and what the curves show."""

import json
import struct
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from common.datasets import UserError
from common.runs import summarize
from common.scores import reference_returns
from tools import report
from tools.report import Args

HEAD = """\
# Report

11 finished runs of 3 scripts on 4 tasks in runs:
1.1 hours of training.

Versions: git_commit abc; torch 2.13.0; mujoco 3.11.0; gymnasium 1.4.0; numpy 2.4.6; python 3.11.7.

## Problems

- dac on hopper-medium-v2, seed 2: not finished, at step 40 of 60; left out (dac hopper-medium-v2 2)
- qvpo_online on InvertedPendulum-v5: no finished run of seed 2, which others have
- edp_td3 on bandit-corners-v0: no finished run of seed 2, which others have
- dac on bandit-moons-v0: no finished run of seed 1, 2, which others have
- dac on hopper-medium-v2: no finished run of seed 2, which others have
- edp_td3 on hopper-medium-v2: no finished run of seed 1, 2, which others have
- edp_td3 on bandit-moons-v0: no finished run, which other scripts have
"""
SCORES = """\
| task | algorithm | seeds | last ten | oracle | paper | data | steps | hours |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| InvertedPendulum-v5 | qvpo_online | 2 | 510 [20, 1000] (return) | 515 | - | - | 60 (2) | 0.1 |
| bandit-corners-v0 | dac | 3 | 40.0 [30.0, 50.0] | 45.0 | - | 25.0 | 60 (2) | 0.1 |
| bandit-corners-v0 | edp_td3 | 2 | 15.0 [10.0, 20.0] | 20.0 | - | 25.0 | 60 (2) | 0.1 |
| bandit-moons-v0 | dac | 1 | 70.0 | 75.0 | - | 25.0 | 60 (2) | 0.1 |
| hopper-medium-v2 | dac | 2 | 90.0 [85.0, 95.0] | 95.0 | 101.2 (evaluation not stated) | 44.3 | 60 (2) | 0.1 |
| hopper-medium-v2 | edp_td3 | 1 | 80.0 | 85.0 | 81.9 (RAT); 98.6 (OMS) | 44.3 | 60 (2) | 0.1 |
"""  # noqa: E501
VERSIONS = {"torch": "2.13.0", "mujoco": "3.11.0", "gymnasium": "1.4.0", "numpy": "2.4.6", "python": "3.11.7"}


def write_run(folder, script, env_id, seed, last_ten, finished=True, config=None):
    """A run folder as scripts leave it: two evaluations, 5 points below last_ten and 5 above."""
    zero, hundred = reference_returns(env_id) or (0.0, 100.0)
    evaluations = []
    for step, score in ((30, last_ten - 5), (60, last_ten + 5)):
        mean = zero + (hundred - zero) * score / 100
        known = score if reference_returns(env_id) else None
        evaluations.append({"step": step, "return_mean": mean, "normalized_score": known})
    if script == "qvpo_online":
        data, data_mean = None, {"return": None, "score": None}
    else:
        data, data_mean = env_id, {"return": 1.0, "score": 44.3 if env_id.startswith("hopper") else 25.0}
    results = {"format": 1, "script": script, "env_id": env_id, "seed": seed, "data": data}
    results |= {"data_mean": data_mean, "evaluations": evaluations, "train_seconds": 360.0}
    results |= {"step": 60 if finished else 40, "total_steps": 60, "finished": finished}
    results |= summarize(evaluations, reference_returns(env_id))
    args = {"env_id": env_id, "seed": seed, "dataset": None, "eta": 1.0, "run_dir": "x"} | (config or {})
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps({"args": args, "git_commit": "abc", **VERSIONS}))
    return folder


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A folder of runs with gaps, and the tests stand beside it."""
    monkeypatch.chdir(tmp_path)
    for script, env_id, scores in [
        ("dac", "bandit-corners-v0", [30, 40, 50]),
        ("dac", "hopper-medium-v2", [85, 95]),
        ("edp_td3", "bandit-corners-v0", [10, 20]),
        ("edp_td3", "hopper-medium-v2", [80]),
        ("qvpo_online", "InvertedPendulum-v5", [20, 1000]),
        ("dac", "bandit-moons-v0", [70]),
    ]:
        for seed, score in enumerate(scores):
            write_run(tmp_path / "runs" / f"{script} {env_id} {seed}", script, env_id, seed, score)
    write_run(tmp_path / "runs/dac hopper-medium-v2 2", "dac", "hopper-medium-v2", 2, 0, finished=False)
    return tmp_path / "runs"


def make(*folders, output="report"):
    report.main(Args([str(folder) for folder in folders], output))
    text = (report.Path(output) / "report.md").read_text()
    return text, problems_of(text)


def problems_of(text):
    section = text.partition("## Problems\n\n")[2].partition("\n\n##")[0]
    return [line.removeprefix("- ") for line in section.splitlines()]


def cells_of(text, start):
    """The cells of the one row that starts so."""
    [row] = [line for line in text.splitlines() if line.startswith(start)]
    return split_row(row)


def split_row(row):
    return [cell.strip() for cell in row.split("|")[1:-1]]


# --- The tables ---
def test_golden(grid):
    text, _ = make("runs")
    assert text.partition("\n## Scores\n")[0] == HEAD
    assert text.partition("per run\n\n")[2].partition("\n## ")[0] == SCORES
    assert "- results table in the README of the authors' code" in text
    assert "Kang et al. 2023, arXiv 2305.20081, Table 5" in text
    assert "Wang et al." not in text  # not asked for


def test_the_same_runs_give_the_same_bytes(grid):
    make("runs")
    make("runs", output="again")
    for name in ("report.md", "curves.png"):
        assert (grid.parent / "report" / name).read_bytes() == (grid.parent / "again" / name).read_bytes()
    assert sorted(path.name for path in (grid.parent / "report").iterdir()) == ["curves.png", "report.md"]


def test_domains(tmp_path, monkeypatch):
    """Means over tasks, IQM over tasks x seeds, by hand; none for an algorithm that lacks a task."""
    monkeypatch.chdir(tmp_path)
    for env_id, scores in [("bandit-corners-v0", [0, 10, 20]), ("bandit-moons-v0", [30, 50, 100])]:
        for seed, score in enumerate(scores):
            write_run(tmp_path / f"runs/{env_id}{seed}", "dac", env_id, seed, score)
    for seed in range(3):
        write_run(tmp_path / f"runs/td{seed}", "edp_td3", "bandit-moons-v0", seed, 0)
        write_run(tmp_path / f"runs/mini{seed}", "dac", "hopper-mini-v0", seed, 200)
        write_run(tmp_path / f"runs/hopper{seed}", "dac", "hopper-medium-v2", seed, 300)
    text, problems = make("runs")
    # of 6 one at each end goes: (10 + 20 + 30 + 50) / 4
    row = cells_of(text, "| bandits | dac |")
    assert [row[2], row[3], row[4].split()[0], row[5]] == ["2 of 2", f"{(10 + 60) / 2:.1f}", "27.5", "40.0"]
    assert cells_of(text, "| bandits | edp_td3 |")[2:] == ["1 of 2", "incomplete", "-", "-"]
    row = cells_of(text, "| all | dac |")
    assert row[2] == "4 of 4"
    assert float(row[3]) == pytest.approx((10 + 60 + 200 + 300) / 4)
    # of 12 three go at each end: 0, 10, 20 and 300 three times
    assert float(row[4].split()[0]) == pytest.approx((30 + 50 + 100 + 3 * 200) / 6, abs=0.05)
    assert "| locomotion |" not in text  # the bundled recording is not one of D4RL's
    assert "edp_td3 on bandit-corners-v0: no finished run, which other scripts have" in problems


def test_published_numbers_are_shown_beside_their_own_task_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/a", "dac", "hopper-medium-v2", 0, 1, config={"dataset": "mine.hdf5"})
    write_run(tmp_path / "runs/b", "dtql", "hopper-medium-v2", 0, 1)
    write_run(tmp_path / "runs/c", "dtql", "antmaze-umaze-v0", 0, 1)  # published, but not verified by us
    write_run(tmp_path / "runs/d", "qvpo_online", "Hopper-v4", 0, 1)
    write_run(tmp_path / "runs/e", "qvpo_online", "Hopper-v5", 0, 1)
    text, _ = make("runs")
    rows = text.partition("per run\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    papers = {f"{cells[1]} {cells[0]}": cells[5] for cells in map(split_row, rows)}
    assert papers == {
        "dac hopper-medium-v2": "-",
        "dtql hopper-medium-v2": "99.6 (evaluation not stated)",
        "dtql antmaze-umaze-v0": "-",
        "qvpo_online Hopper-v4": "3728.5 (return, Hopper-v3)",
        "qvpo_online Hopper-v5": "-",
    }


def test_published_scores():
    """Every number has a source, and the file says where they are from."""
    scores = report.PUBLISHED["scores"]
    assert all(each.keys() == {"algorithm", "env_id", "score", "metric", "source"} for each in scores)
    assert len({(each["algorithm"], each["env_id"], each["metric"]) for each in scores}) == len(scores) > 150
    names = {path.stem for path in report.ROOT.glob("*.py")}
    assert {each["algorithm"] for each in scores} == names
    assert all(each["source"] for each in scores) and report.PUBLISHED["notes"]


# --- Statistics ---
def test_interval_by_hand():
    """Of two seeds the mean is either of them a quarter of the time; of three, each extreme once in 27."""
    assert report.interval(np.array([1.0, 5.0])) == (1, 5)
    assert report.interval(np.array([1.0, 5.0, 30.0])) == (1, 30)
    # Of 20 zeros and ones: a binomial count, whose 2.5 % and 97.5 % quantiles are 6 and 14.
    assert report.interval(np.repeat([0.0, 1.0], 10)) == pytest.approx((6 / 20, 14 / 20))
    assert report.interval(np.array([3.0])) is None
    low, high = report.interval(np.array([[1.0, 5.0], [2.0, 2.0]]))  # two evaluations of two seeds
    assert (low.tolist(), high.tolist()) == ([1, 2], [5, 2])


def test_interval_draws_seeds_within_each_task():
    """Tasks are not drawn: two tasks without spread have an interval without width."""
    assert report.interval(np.array([1.0, 1.0]), np.array([9.0, 9.0])) == (5, 5)
    low, high = report.interval(np.array([0.0, 2.0]), np.array([10.0, 10.0]))
    assert (low, high) == (5, 6)
    assert report.interval(np.array([0.0, 2.0]), np.array([10.0])) is None


def test_iqm_by_hand():
    assert report.iqm(np.array([100.0, 1.0, 3.0, 2.0])) == 2.5
    assert report.iqm(np.array([1.0, 2.0, 6.0])) == 3  # a quarter of three is no whole number
    assert report.iqm(np.array([0.0, 1, 2, 3, 4, 5, 6, 700])) == pytest.approx(np.mean([2, 3, 4, 5]))


# --- What it flags ---
def test_nothing_to_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        write_run(tmp_path / f"runs/{seed}", "dac", "bandit-moons-v0", seed, 50)
    text, problems = make("runs")
    assert problems == ["None: every run is finished, no seed is missing."]
    assert "## Domains" not in text


def test_runs_with_different_settings_have_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, eta, score in [(0, 1.0, 10), (1, 1.0, 30), (0, 5.0, 90), (1, 5.0, 70)]:
        config = {"eta": eta, "run_dir": f"{eta}{seed}", "device": f"{seed}"}
        write_run(tmp_path / f"runs/{eta} {seed}", "dac", "bandit-moons-v0", seed, score, config=config)
    text, problems = make("runs")
    assert problems == ["dac on bandit-moons-v0: runs with different eta, in rows of their own"]
    assert cells_of(text, "| bandit-moons-v0 | dac (eta 1.0) |")[2:4] == ["2", "20.0 [10.0, 30.0]"]
    assert cells_of(text, "| bandit-moons-v0 | dac (eta 5.0) |")[2:4] == ["2", "80.0 [70.0, 90.0]"]


def test_a_seed_that_was_run_twice_counts_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, score in [("20260101", 10), ("20260102", 30)]:
        write_run(tmp_path / "runs" / name, "dac", "bandit-moons-v0", 0, score)
    text, problems = make("runs", "runs/20260101")  # by two ways
    assert problems == ["dac on bandit-moons-v0, seed 0: made twice; counted 20260102, left out 20260101"]
    assert cells_of(text, "| bandit-moons-v0 |")[2:4] == ["1", "30.0"]


def test_runs_that_do_not_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/a", "dac", "bandit-moons-v0", 0, 50)
    folder = write_run(tmp_path / "runs/b", "dac", "bandit-moons-v0", 1, 50)
    results = json.loads((folder / "results.json").read_text())
    del results["last_ten"], results["best"], results["final"]
    (folder / "results.json").write_text(json.dumps(results))
    bare = write_run(tmp_path / "runs/c", "dac", "bandit-moons-v0", 2, 50)
    (bare / "results.json").unlink()
    text, problems = make("runs")
    assert problems == [
        "dac on bandit-moons-v0, seed 1: not evaluated; left out (b)",
        "c: no results; it stopped before its first checkpoint",
    ]
    assert cells_of(text, "| bandit-moons-v0 |")[2:4] == ["1", "50.0"]


# --- The curves ---
def test_curves(grid):
    groups, _ = report.group_runs(report.find_runs([str(grid)])[0])
    figure = report.draw_curves(groups)
    panels = {ax.get_title(): ax for ax in figure.axes}
    assert list(panels) == ["InvertedPendulum-v5", "bandit-corners-v0", "bandit-moons-v0", "hopper-medium-v2"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dac", "edp_td3", "qvpo_online"]
    corners = panels["bandit-corners-v0"]
    thin = [line.get_ydata().tolist() for line in corners.lines if line.get_linewidth() == 0.6]
    assert thin == [[25, 35], [35, 45], [45, 55], [5, 15], [15, 25]]  # seeds of dac, of edp_td3
    thick = [line for line in corners.lines if line.get_linewidth() == 2]
    assert [line.get_ydata().tolist() for line in thick] == [[35, 45], [10, 20]]
    assert all(line.get_xdata().tolist() == [30, 60] for line in thick)
    [dashed] = {tuple(line.get_ydata()) for line in corners.lines if line.get_linestyle() == "--"}
    assert dashed == (25, 25)
    shades = [shade.get_paths()[0].vertices[:, 1] for shade in corners.collections]
    assert [(shade.min(), shade.max()) for shade in shades] == [(25, 55), (5, 25)]
    assert [ax.get_ylabel() for ax in panels.values()] == ["return", *["normalized score"] * 3]
    assert not panels["bandit-moons-v0"].collections  # one seed has no interval
    assert panels["InvertedPendulum-v5"].lines[0].get_ydata().tolist() == [15, 25]
    plt.close(figure)


def test_picture(grid):
    make("runs")
    content = (grid.parent / "report/curves.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG") and width > 1000 and height > 500
    pixels = plt.imread(grid.parent / "report/curves.png")[:, :, :3].reshape(-1, 3)
    for color in plt.get_cmap("tab10").colors[:3]:  # the line of each algorithm
        assert np.isclose(pixels, color, atol=0.01).all(1).sum() > 100


# --- Mistakes ---
def test_mistakes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder: runs"):
        make("runs")
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"there is no results.json in runs or below"):
        make("runs")
    for name, content, _ in DAMAGED:
        folder = write_run(tmp_path / "runs" / name, "dac", "bandit-moons-v0", 0, 50)
        (folder / "results.json").write_text(content)
    write_run(tmp_path / "runs/good", "dac", "bandit-moons-v0", 0, 50)
    with pytest.raises(UserError) as error:
        make("runs")
    lines = str(error.value).splitlines()
    assert lines[0] == "these cannot be read; repair them, or move their folders away:"
    for (name, _, found), line in zip(DAMAGED, lines[1:], strict=True):
        assert line.startswith(f"  {tmp_path}/runs/{name}/results.json: {found}")
    assert not (tmp_path / "report").exists()


DAMAGED = [
    ("a", '{"format": 1, "scr', "Unterminated string"),
    ("b", '{"format": 2}', "format 2, not 1; it is of another version of the scripts"),
    ("c", "[]", "format no object, not 1"),
    ("d", '{"format": 1, "script": "dac"}', "it lacks data, data_mean, env_id, evaluations, "),
]


def test_only_unfinished_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/a", "dac", "bandit-moons-v0", 0, 50, finished=False)
    with pytest.raises(UserError, match="no finished and evaluated run:\n  dac on .*, seed 0: not"):
        make("runs")


def test_command(grid, tmp_path):
    """From anywhere; one message where it cannot write."""
    words = [sys.executable, report.__file__, str(grid), "--output"]
    done = subprocess.run([*words, str(tmp_path / "out")], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path}/out/report.md and {tmp_path}/out/curves.png are written" in done.stdout
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}/file/x: Not a directory; make room or"):
        make(grid, output=str(tmp_path / "file/x"))
