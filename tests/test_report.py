"""tools/report.py: a golden report, statistics by hand, what it flags, and what the curves show."""

import json
import re
import struct
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import report
from report import Args
from runs import write_records

import toolbox
from common.scores import reference_returns
from common.tasks import UserError

TASK = "bandit-moons-v0"
HEAD = """\
# Report

11 runs of 3 scripts on 4 tasks in runs: 1.1 hours.

Versions: git_commit abc; torch 2.13.0; mujoco 3.11.0; gymnasium 1.4.0; numpy 2.4.6; python 3.11.7.

## Problems

- dac on hopper-medium-v2, seed 2: not finished, at step 40 of 60; left out (dac hopper-medium-v2 2)
- seed 1: no run counts for dac on bandit-moons-v0, edp_td3 on hopper-medium-v2
- seed 2: runs count only for dac on bandit-corners-v0
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
BASELINES = """
| task | BC | 10 % BC | DT | AWAC | OneStep RL | CQL | TD3+BC | CRR | IQL |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| hopper-medium-v2 | 52.9 | 56.9 | 67.6 | 57.0 | 59.6 | 58.5 | 59.3 | 58.5 | 66.3 |

Kang et al. 2023, arXiv 2305.20081, Table 2"""
VERSIONS = {"torch": "2.13.0", "mujoco": "3.11.0", "gymnasium": "1.4.0", "numpy": "2.4.6", "python": "3.11.7"}


def write_run(folder, script, env_id, seed, last_ten, finished=True, evaluations=2, **args):
    """A run folder as scripts leave it: evaluations 5 points below last_ten and 5 above."""
    zero, hundred = reference_returns(env_id) or (0.0, 100.0)
    scores = [last_ten + (5 if i % 2 else -5) for i in range(evaluations)]
    known = reference_returns(env_id) is not None
    results = {}
    if script != "qvpo_online":
        results["data"] = env_id
        results["data_mean"] = {"return": 1.0, "score": 44.3 if env_id.startswith("hopper") else 25.0}
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
    config = {"git_commit": "abc", **VERSIONS, "sources": dict.fromkeys(args, "given")}
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
    report.main(Args([str(folder) for folder in folders], output, **options))
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
    assert text.partition("\n\nOther methods on these tasks:\n")[2].startswith(BASELINES)
    assert "PPO" not in text  # of another task


def test_the_same_runs_give_the_same_bytes(grid):
    make("runs")
    make("runs", output="again")
    for name in ("report.md", "curves.png"):
        assert (grid.parent / "report" / name).read_bytes() == (grid.parent / "again" / name).read_bytes()
    assert sorted(path.name for path in (grid.parent / "report").iterdir()) == ["curves.png", "report.md"]


def test_last_ten_of_many(runs):
    """Of twelve evaluations the first two do not count."""
    folder = write_run(runs / "a", "dac", TASK, 0, 50, evaluations=12)
    results = json.loads((folder / "results.json").read_text())
    for each in results["evaluations"][:2]:
        each["normalized_score"] = 1000.0
    (folder / "results.json").write_text(json.dumps(results))
    assert cells_of(make("runs")[0], "| bandit-moons-v0 |")[3:6] == ["50.0", "10", "1000.0"]


def test_domains(runs):
    """Means over tasks, IQM over tasks x seeds, by hand; none for an algorithm that lacks a task."""
    for env_id, scores in [("bandit-corners-v0", [0, 10, 20]), ("bandit-moons-v0", [30, 50, 100])]:
        for seed, score in enumerate(scores):
            write_run(runs / f"{env_id}{seed}", "dac", env_id, seed, score)
    for seed in range(3):
        write_run(runs / f"td{seed}", "edp_td3", "bandit-moons-v0", seed, 0)
        write_run(runs / f"mini{seed}", "dac", "hopper-mini-v0", seed, 200)
    text, _ = make("runs")
    # of 6 one at each end goes: (10 + 20 + 30 + 50) / 4
    row = cells_of(text, "| bandit | dac |")
    assert [row[2], row[3], row[4].split()[0], row[5]] == ["2 of 2", f"{(10 + 60) / 2:.1f}", "27.5", "40.0"]
    assert cells_of(text, "| bandit | edp_td3 |")[2:] == ["1 of 2", "incomplete", "-", "-"]
    assert "| locomotion |" not in text  # the bundled recording is not one of D4RL's


@pytest.mark.parametrize(
    ("script", "env_id", "args", "expected"),
    [
        ("dac", "hopper-medium-v2", {"dataset": "mine.hdf5"}, "-"),
        ("dtql", "hopper-medium-v2", {}, "99.6 (evaluation not stated)"),
        ("dtql", "antmaze-umaze-v0", {}, "-"),  # published, but not compared with its source
        ("edp_iql", "pen-human-v1", {}, "72.7 (RAT, pen-human-v0); 130.3 (OMS, pen-human-v0)"),
        ("edp_td3", "pen-human-v1", {}, "48.2 (RAT, pen-human-v0); 98.3 (OMS)"),
        ("qvpo_online", "Hopper-v4", {}, "3728.5 (return, Hopper-v3)"),
        ("qvpo_online", "Hopper-v5", {}, "-"),
    ],
)
def test_published_scores_beside_a_run(script, env_id, args, expected, runs):
    """Only where the data is the paper's; another version of the task is named."""
    write_run(runs / "a", script, env_id, 0, 1, **args)
    assert cells_of(make("runs")[0], f"| {env_id} | {script} |")[6] == expected


@pytest.mark.parametrize(
    ("env_id", "args", "rows"),
    [
        ("kitchen-complete-v0", {}, ["| kitchen-complete-v0 | 65.0 | 7.2 | - |"]),
        ("pen-human-v1", {}, ["| pen-human-v0 | 63.9 | -2.0 | - |"]),  # the task as printed
        ("Ant-v4", {}, ["| Ant-v3 | 2781.9 | 2100.2 | 4583.8 | 5030.9 | 5665.9 | - |"]),
        ("Ant-v5", {}, []),
        ("hopper-medium-v2", {"dataset": "mine.hdf5"}, []),
        ("hopper-medium-v2", {}, ["| hopper-medium-v2 | 52.9 |", "| hopper-medium-v2 | 54.0 | 50.8 |"]),
    ],
)
def test_baselines(env_id, args, rows, runs):
    """Rows of the papers' tables for the tasks of the report, or nothing."""
    write_run(runs / "a", "qvpo_online" if env_id.startswith("Ant") else "dac", env_id, 0, 1, **args)
    section = make("runs")[0].partition("## Published scores")[2]
    found = re.findall(r"^\| \w+-.*", section, re.M)
    assert len(found) == len(rows)
    assert all(line.startswith(row) for line, row in zip(found, rows, strict=True))


def test_published_scores():
    """Every number has a source, every method a column, and none of them is an algorithm of ours."""
    names = {path.stem for path in toolbox.ROOT.glob("*.py")}
    tables, baselines = report.PUBLISHED["tables"], report.PUBLISHED["baselines"]
    assert {table["algorithm"] for table in tables} == names
    assert all(table.keys() == {"algorithm", "metric", "source", "scores"} for table in tables)
    assert all(table.keys() == {"methods", "metric", "source", "scores"} for table in baselines)
    rows = [(table, row) for table in baselines for row in table["scores"].values()]
    assert all(len(row) == len(table["methods"]) for table, row in rows)
    assert sum(len(table["scores"]) for table in tables) == 226
    assert sum(score is not None for _, row in rows for score in row) == 222


# --- Statistics ---
def test_interval_by_hand():
    """Of two seeds the mean is either of them a quarter of the time; of three, each extreme once in 27."""
    assert toolbox.interval(np.array([1.0, 5.0])) == (1, 5)
    assert toolbox.interval(np.array([1.0, 5.0, 30.0])) == (1, 30)
    # Of 20 zeros and ones: a binomial count, whose 2.5 % and 97.5 % quantiles are 6 and 14.
    assert toolbox.interval(np.repeat([0.0, 1.0], 10)) == pytest.approx((6 / 20, 14 / 20))
    assert toolbox.interval(np.array([3.0])) is None
    low, high = toolbox.interval(np.array([[1.0, 5.0], [2.0, 2.0]]))  # two evaluations of two seeds
    assert (low.tolist(), high.tolist()) == ([1, 2], [5, 2])


def test_interval_draws_seeds_within_each_task():
    """Tasks are not drawn: two tasks without spread have an interval without width."""
    assert toolbox.interval(np.array([1.0, 1.0]), np.array([9.0, 9.0])) == (5, 5)
    assert toolbox.interval(np.array([0.0, 2.0]), np.array([10.0])) is None


def test_iqm_by_hand():
    assert report.iqm(np.array([100.0, 1.0, 3.0, 2.0])) == 2.5
    assert report.iqm(np.array([1.0, 2.0, 6.0])) == 3  # a quarter of three is no whole number
    assert report.iqm(np.array([0.0, 1, 2, 3, 4, 5, 6, 700])) == pytest.approx(np.mean([2, 3, 4, 5]))


# --- What it flags ---
def test_runs_with_different_settings_have_rows_of_their_own(runs):
    for seed, eta, score in [(0, 1.0, 10), (1, 1.0, 30), (0, 5.0, 90), (1, 5.0, 70)]:
        where = {"run_dir": f"{eta}{seed}", "device": f"{seed}"}
        write_run(runs / f"{eta} {seed}", "dac", TASK, seed, score, eta=eta, **where)
    text, problems = make("runs")
    assert problems == ["dac on bandit-moons-v0: runs with different eta, in rows of their own"]
    assert cells_of(text, "| bandit-moons-v0 | dac (eta 1.0) |")[2:4] == ["2", "20.0 [10.0, 30.0]"]
    assert cells_of(text, "| bandit-moons-v0 | dac (eta 5.0) |")[2:4] == ["2", "80.0 [70.0, 90.0]"]


def test_a_row_is_named_by_what_was_chosen(runs):
    """Not by defaults that differ from another row's, nor by its steps and evaluations, if that is clear."""
    write_run(runs / "a", "dac", TASK, 0, 10)
    write_run(runs / "b", "dac", TASK, 0, 20, eta=5.0, total_steps=30, eval_every=5)
    write_run(runs / "c", "dtql", TASK, 0, 30, total_steps=30)
    write_run(runs / "d", "dtql", TASK, 0, 40, total_steps=60)
    write_run(runs / "e", "dac", "bandit-corners-v0", 0, 50, eta=5.0)  # alone there, but not in the picture
    text, problems = make("runs")
    assert "| bandit-corners-v0 | dac (eta 5.0) |" in text
    names = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith(f"| {TASK} |")]
    assert names == ["dac", "dac (eta 5.0)", "dtql (total_steps 30)", "dtql (total_steps 60)"]
    different = "eta, eval_every, total_steps"
    assert problems[0] == f"dac on {TASK}: runs with different {different}, in rows of their own"


def test_a_run_that_was_resumed_with_other_settings_is_named(runs):
    more_steps = {"step": 7, "total_steps": [10, 20], "device": ["cpu", "cuda"]}
    write_run(runs / "a", "dac", TASK, 0, 10)
    results = json.loads((runs / "a" / "results.json").read_text())
    results["changes"] = [more_steps, {"step": 1200, "dataset": [None, "mine"], "total_steps": [20, 30]}]
    (runs / "a" / "results.json").write_text(json.dumps(results))
    _, problems = make("runs")
    assert problems == [f"dac on {TASK}, seed 0: resumed at step 1,200 with dataset None -> mine"]


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
    write_run(runs / "f", "qvpo_online", "Hopper-v5", 0, float("inf"))
    text, problems = make("runs")
    assert problems == [
        "dac on bandit-moons-v0, seed 1: it stopped before its first checkpoint; left out (c)",
        "dac on bandit-moons-v0, seed 2: not evaluated; left out (d)",
        "dac on bandit-moons-v0, seed 3: the score of step 30 is nan; left out (e)",
        "qvpo_online on Hopper-v5, seed 0: the return of step 30 is inf; left out (f)",
    ]
    assert cells_of(text, "| bandit-moons-v0 |")[2:4] == ["1", "50.0"]


# --- The curves ---
def test_curves(grid):
    groups, _ = report.group_runs(report.find_runs([str(grid)]))
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


@pytest.mark.parametrize("num_scripts", [5, 6])
def test_many_curves_of_one_task_have_a_panel_for_each_script(num_scripts, runs):
    scripts = ["dac", "diffusion_ql", "dtql", "edp_crr", "edp_iql", "edp_td3"][:num_scripts]
    for i, script in enumerate(scripts):
        write_run(runs / script, script, TASK, 0, 10 * i)
    figure = report.draw_curves(report.group_runs(report.find_runs(["runs"]))[0])
    thick = [[line.get_ydata()[0] for line in ax.lines if line.get_linewidth() == 2] for ax in figure.axes]
    if num_scripts == 6:
        assert [ax.get_title() for ax in figure.axes] == scripts and figure.get_suptitle() == TASK
        assert thick == [[10 * i - 5] for i in range(6)]
        assert len({ax.get_ylim() for ax in figure.axes}) == 1
    else:
        assert [ax.get_title() for ax in figure.axes] == [TASK]
        assert thick == [[10 * i - 5 for i in range(5)]]
    plt.close(figure)


def test_many_curves_of_several_tasks_have_a_row_for_each_script(runs):
    """One task lacks a script, so a place is empty; a column has its task above and one scale."""
    scripts = ["dac", "diffusion_ql", "dtql", "edp_crr", "edp_iql", "edp_td3"]
    other = "bandit-corners-v0"
    for i, script in enumerate(scripts):
        write_run(runs / script, script, TASK, 0, 10 * i)
        if script != "dac":
            write_run(runs / f"{script} corners", script, other, 0, 100 + 10 * i)
    for tau in (0.1, 0.2):
        write_run(runs / f"tau {tau}", "dtql", other, 0, 100, tau=tau)
    figure = report.draw_curves(report.group_runs(report.find_runs(["runs"]))[0])
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == [other, f"{TASK}\ndac", *(script for script in scripts[1:] for _ in range(2))]
    thick = [[line.get_ydata()[0] for line in ax.lines if line.get_linewidth() == 2] for ax in figure.axes]
    assert thick[:6] == [[], [-5], [105], [5], [115, 95, 95], [15]] and not figure.axes[0].axison
    assert len({ax.get_ylim() for ax in figure.axes}) == 2
    plt.close(figure)


def test_seeds_without_a_common_step(runs):
    """There is nothing to average, so they have no curve."""
    for seed in (0, 1):
        path = write_run(runs / str(seed), "dac", TASK, seed, 50, evaluations=1) / "results.json"
        path.write_text(path.read_text().replace('"step": 30', f'"step": {20 + seed}'))
    figure = report.draw_curves(report.group_runs(report.find_runs(["runs"]), unfinished=True)[0])
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines if line.get_linewidth() == 2] == [[]]
    plt.close(figure)


@pytest.mark.parametrize("columns", [1, 3])
def test_a_legend_of_long_names_is_seen_whole(grid, columns):
    groups, _ = report.group_runs(report.find_runs([str(grid)]))
    tasks = sorted({group.task for group in groups})[:columns]
    groups = [group for group in groups if group.task in tasks]
    for i, group in enumerate(groups):
        group.label += f" (num_action_samples {i}, guidance_weight 1.0, and what else)"
    figure = report.draw_curves(groups)
    figure.canvas.draw()
    low, high = figure.legends[0].get_window_extent().get_points()
    assert (low >= 0).all() and (high <= figure.bbox.size).all()
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
def test_folders_without_runs(runs):
    for found, message in [
        (lambda: None, "no such folder: runs"),
        (runs.mkdir, "there is no run in runs or below: no config.json"),
        (
            lambda: write_run(runs / "a", "dac", TASK, 0, 50, finished=False),
            "no run counts:\n  dac.*\n--unfinished counts",
        ),
    ]:
        found()
        with pytest.raises(UserError, match=message):
            make("runs")
    assert not (runs.parent / "report").exists()


def edited(content):
    """Every value of a JSON object in turn replaced by others, and left out."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield {key: each for key, each in content.items() if key != name}
            yield from ({**content, name: each} for each in edited(value))
    elif isinstance(content, list) and content:
        yield from ([each, *content[1:]] for each in edited(content[0]))
    yield from (None, True, -1, 10**400, 1e400, float("nan"), "text", [], [[]], {}, {"a": {}})


@pytest.mark.parametrize("name", ["results.json", "config.json"])
def test_edited_files(name, runs):
    """A report, or one message that names the file; the good run is in every report."""
    write_run(runs / "good", "dac", TASK, 0, 50)
    path = write_run(runs / "bad", "dac", TASK, 1, 50) / name
    refused, right = 0, json.loads(path.read_text())
    if name == "results.json":
        right["changes"] = [{"step": 30, "eta": [1.0, 5.0]}]
    contents = list(edited(right))
    for content in contents:
        path.write_text(json.dumps(content))
        try:
            groups, problems = report.group_runs(report.find_runs(["runs"]))
            assert "| nan" not in report.write_report(groups, problems, ["runs"]).partition("## Scores")[2]
            if content.get("evaluations") != right.get("evaluations"):
                plt.close(report.draw_curves(groups))
        except UserError as error:
            assert str(error).startswith(f"{path} is damaged, or of another version of the scripts (")
            refused += 1
    assert len(contents) > 100 and refused > 30
    for text in ("", "{", "[" * 100_000, "\xff", '{"format": 1}'):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=f"^{path} is damaged, or of another version"):
            report.find_runs(["runs"])


def test_command(grid, tmp_path):
    """From anywhere, without PyTorch; one message where it cannot write."""
    words = [sys.executable, "-X", "importtime", report.__file__, str(grid), "--output"]
    done = subprocess.run([*words, str(tmp_path / "out")], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported and not {"torch", "rich"} & imported
    assert f"{tmp_path}/out/report.md and {tmp_path}/out/curves.png are written" in done.stdout
    (tmp_path / "file").touch()
    done = subprocess.run([*words, str(tmp_path / "file/x")], capture_output=True, text=True)
    assert done.returncode == 2
    message = f"error: cannot write {tmp_path}/file/x/curves.png: Not a directory; choose another --output"
    assert done.stderr.splitlines()[-1] == message
    (tmp_path / "folder/report.md/x").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write .*folder/report.md: "):
        report.main(Args([str(grid)], str(tmp_path / "folder")))
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"report.md", "curves.png"}
