"""From run folders to a table of scores and pictures of learning curves.

    python tools/report.py runs/grid --output report

writes report/report.md, curves.png and selection.png; the same runs give the same bytes.
"""

import json
import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import toolbox
from common.cli import UserError, run_command
from toolbox import RecordedRun, interval

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_scores.json").read_text())
MARKERS = ("", "o", "s", "^", "v", "D", "x")  # tell the groups of one script apart, which share its colour
ABOUT_SCORES = """
The normalized score (0 random, 100 expert), or the return where a task has none. In brackets 95 % bootstrap
intervals over the seeds; of two or three seeds that is their range. *last ten*: mean of the last ten
evaluations (RAT), or of all if there are fewer, as *averaged* says. *oracle*: the best one (OMS), chosen by
the score itself. *published*: by others, and how; none was measured here. *data*: its mean episode.
All evaluations have the same few starts; a score to publish is that of `tools/evaluate.py`, on fresh ones.
"""
ABOUT_CURVES = """
Thick: mean over the seeds; shaded: its 95 % bootstrap interval; thin: each seed; dashed: the data's mean.

![Learning curves](curves.png)

The same of RAT, the mean of the last ten evaluations so far; dotted: OMS, the best one so far.

![RAT and OMS](selection.png)
"""


@dataclass
class Args:
    """A table of scores and learning curves of all runs in some folders."""

    folders: Annotated[list[str], tyro.conf.Positional]  # searched for runs, at any depth
    output: Path = Path("report")  # folder for report.md and the pictures
    unfinished: bool = False  # count runs that are not finished, too, as far as they have come


@dataclass
class Group:
    """The runs that differ in the seed alone."""

    settings: dict  # their arguments, but for the seed and those that change nothing
    runs: dict[int, RecordedRun] = field(default_factory=dict)  # by seed
    label: str = ""  # the script, and those of its settings in which its groups differ

    @property
    def one(self) -> RecordedRun:
        """Any of its runs, which have script, task, unit and data in common."""
        return next(iter(self.runs.values()))

    @property
    def task(self) -> str:
        """The env_id, and the dataset if it is another than the task's own."""
        return self.one.data or self.one.args["env_id"]

    def last_ten(self) -> np.ndarray:
        """The mean of each seed's last ten evaluations, (seeds,)."""
        seeds = [list(self.runs[seed].evaluations.values()) for seed in sorted(self.runs)]
        return np.array([np.mean(values[-10:]) for values in seeds])

    def best(self) -> float:
        """The best evaluation, mean over the seeds."""
        return float(np.mean([max(run.evaluations.values()) for run in self.runs.values()]))


# === Reading ===
def find_runs(folders: list[str]) -> list[RecordedRun]:
    """All runs, in the order of their folders' names. UserError: there are none, or one cannot be read."""
    found = {path.parent.resolve() for folder in folders for path in Path(folder).rglob("config.json")}
    if not found:
        raise UserError(f"there is no run in {', '.join(folders) or 'no folder'} or below: no config.json")
    return [toolbox.read_run(folder) for folder in sorted(found, key=lambda each: (each.name, str(each)))]


def flaw(run: RecordedRun, unfinished: bool) -> str | None:
    """Why a run does not count; None: it does. With `unfinished` those count that have not ended yet."""
    if run.evaluations is None:
        return "it stopped before its first checkpoint"
    if not (run.finished or unfinished):
        return f"not finished, at step {run.step:,} of {run.total_steps:,}"
    if not run.evaluations:
        return "not evaluated"
    bad = [step for step, value in run.evaluations.items() if not math.isfinite(value)]
    return f"the {run.unit} of step {bad[0]:,} is {run.evaluations[bad[0]]}" if bad else None


def group_runs(runs: list[RecordedRun], unfinished: bool = False) -> tuple[list[Group], list[str]]:
    """The runs that count in groups, by task and label; and a line for all that needs a remark."""
    groups, problems, aside = {}, set(), toolbox.WHERE_AND_HOW | {"seed"}
    for run in sorted(runs, key=lambda run: run.evaluations is None):  # those without results last
        settings = {name: value for name, value in run.args.items() if name not in aside}
        key, seed = (run.script, json.dumps(settings, sort_keys=True), run.unit), run.args["seed"]
        alike = [group.runs for other, group in groups.items() if other[:2] == key[:2]]
        earlier = next((runs[seed] for runs in alike if seed in runs), None)
        who = f"{run.script} on {run.args['env_id']}, seed {seed}"
        if reason := flaw(run, unfinished):
            if run.evaluations is not None or not earlier:  # else it was killed early, and begun again
                problems.add(f"{who}: {reason}; left out ({run.folder.name})")
            continue
        if earlier:
            problems.add(f"{who}: made twice; counted {run.folder.name}, left out {earlier.folder.name}")
        groups.setdefault(key, Group(settings)).runs[seed] = run
    problems |= set_apart(list(groups.values()))
    return sorted(groups.values(), key=lambda group: (group.task, group.label)), sorted(problems)


def differing(groups: list[Group]) -> set[str]:
    """The settings in which groups differ."""
    names = set().union(*(group.settings for group in groups))
    return {name for name in names if len({str(each.settings.get(name)) for each in groups}) > 1}


def set_apart(groups: list[Group]) -> set[str]:
    """Give every group its label; returns a line for each script that has several groups on a task.

    The label names what the user chose, where the groups of the script differ in it; the task, the steps and
    the evaluations have columns of their own.
    """
    problems, aside = set(), {"env_id", "dataset", "total_steps", "eval_every"}
    for group in groups:
        of_script = [each for each in groups if each.one.script == group.one.script]
        given = {name for name, source in group.one.sources.items() if source == "given"}
        names = sorted(given & (differing(of_script) - aside))
        values = ", ".join(f"{name} {group.settings[name]}" for name in names)
        group.label = f"{group.one.script} ({values})" if values else group.one.script
        if names := ", ".join(sorted(differing([each for each in of_script if each.task == group.task]))):
            where = f"{group.one.script} on {group.task}"
            problems.add(f"{where}: runs with different {names}, in rows of their own")
    return problems


# === The tables ===
def number(value: float | None, unit: str = "score", ends: tuple | None = None) -> str:
    """A score with one decimal, a return with five digits, and an interval: 52.3 [48.1, 56.0]"""
    if value is None:
        return "-"
    text = f"{value:.1f}" if unit == "score" else f"{value:.5g}"
    return f"{text} [{number(ends[0], unit)}, {number(ends[1], unit)}]" if ends else text


def published(group: Group) -> list[tuple[str, str]]:
    """(what is said of a score, its source) for the published scores of the algorithm in the task.

    Those of another version of the task name it: pen-human-v0 beside pen-human-v1. There are none for other
    data, and none for Gymnasium's -v5, which are other environments.
    """
    found, env_id = [], group.one.args["env_id"]
    if group.settings.get("dataset") or env_id.endswith("-v5"):
        return []
    for each in [each for each in PUBLISHED["tables"] if each["algorithm"] == group.one.script]:
        for task, score in each["scores"].items():
            if task.rpartition("-v")[0] == env_id.rpartition("-v")[0]:
                where = "" if task == group.task else f", {task}"
                found.append((f"{score:g} ({each['metric']}{where})", each["source"]))
    return found


def score_row(group: Group) -> list[str]:
    """The row of one algorithm on one task."""
    last_ten, unit = group.last_ten(), group.one.unit
    run = min(group.runs.values(), key=lambda run: run.step)
    steps = f"{run.step:,}" if run.finished else f"{run.step:,} of {run.total_steps:,}"
    return [
        group.task,
        group.label,
        str(len(group.runs)),
        number(last_ten.mean(), unit, interval(last_ten)) + (" (return)" if unit == "return" else ""),
        str(min(10, len(run.evaluations))),
        number(group.best(), unit),
        "; ".join(text for text, _ in published(group)) or "-",
        number(group.one.data_score, unit),
        steps,
        f"{np.mean([run.hours for run in group.runs.values()]):.2g}",
    ]


def write_report(groups: list[Group], problems: list[str], folders: list[str]) -> str:
    """The text of report.md."""
    runs = [run for group in groups for run in group.runs.values()]
    tasks, scripts = {group.task for group in groups}, {group.one.script for group in groups}
    counts = f"{len(runs)} runs of {len(scripts)} scripts on {len(tasks)} tasks"
    hours = sum(run.hours for run in runs)
    code = ", ".join(sorted({str(run.config["code"]) for run in runs}))
    lines = ["# Report", "", f"{counts} in {', '.join(folders)}: {hours:.2g} hours, with the code of {code}."]
    lines += ["", "## Problems", ""]
    lines += [f"- {problem}" for problem in problems] or ["None: every run counts, no seed is missing."]
    header = ["task", "algorithm", "seeds", "last ten", "averaged", "oracle", "published", "data"]
    rows = [score_row(group) for group in groups]
    lines += ["", "## Scores", ABOUT_SCORES, *toolbox.table([*header, "steps", "hours"], rows)]
    lines += ["", "## Learning curves", ABOUT_CURVES]
    if sources := sorted({f"- {source}" for group in groups for _, source in published(group)}):
        lines += ["## Published scores", "", *sources]
    return "\n".join(lines) + "\n"


# === The curves ===
def draw(groups: list[Group], selection: bool = False):
    """A panel for each task, with the seeds and intervals of each group, or of its RAT, and OMS."""
    tasks, labels = sorted({group.task for group in groups}), sorted({group.label for group in groups})
    columns = min(3, len(tasks))
    width, rows = max(6.0, 4.4 * columns), math.ceil(len(tasks) / columns)  # in inches
    across = max(1, int(width / (0.9 + 0.08 * max(map(len, labels)))))  # columns of the legend
    size = (width, 3.2 * rows + 0.4 + 0.2 * math.ceil(len(labels) / across))
    figure, lines = toolbox.pyplot().figure(figsize=size, layout="constrained"), {}
    for i, task in enumerate(tasks):
        members = [group for group in groups if group.task == task]
        ax = figure.add_subplot(rows, columns, i + 1)
        ax.set_title("\n".join(textwrap.wrap(task, 40, break_on_hyphens=False)), fontsize=10)
        for group in members:
            curves = [group.runs[seed].evaluations for seed in sorted(group.runs)]
            steps = sorted(set.intersection(*map(set, curves)))  # that all seeds have
            values = np.array([[curve[step] for step in steps] for curve in curves]).T  # (steps, seeds)
            color = toolbox.COLORS.get(group.one.script, "gray")
            variants = sorted({each.label for each in groups if each.one.script == group.one.script})
            marker = MARKERS[variants.index(group.label) % len(MARKERS)] or ("." if len(steps) == 1 else "")
            look = {"color": color, "marker": marker, "markersize": 4, "markevery": 1 + len(steps) // 10}
            if selection and steps:
                ax.plot(steps, np.maximum.accumulate(values).mean(-1), linestyle=":", color=color)
                values = np.array([values[max(0, i - 9) : i + 1].mean(0) for i in range(len(steps))])
            [lines[group.label]] = ax.plot(steps, values.mean(-1), linewidth=2, **look)
            if len(curves) > 1 and steps:
                ax.plot(steps, values, linewidth=0.6, alpha=0.5, color=color)
                ax.fill_between(steps, *interval(values), color=color, alpha=0.15, linewidth=0)
        if members[0].one.data_score is not None:
            ax.axhline(members[0].one.data_score, color="gray", linestyle="--", linewidth=0.8)
        ax.locator_params(axis="x", nbins=6)
        unit = "normalized score" if members[0].one.unit == "score" else "return"
        ax.set(xlabel="steps", ylabel=f"{unit}: RAT, dotted OMS" if selection else unit)
        ax.grid(alpha=0.3)
    seeds = {label: sorted({len(each.runs) for each in groups if each.label == label}) for label in labels}
    names = [f"{label}, n = {', '.join(map(str, counts))}" for label, counts in seeds.items()]
    place = {"loc": "outside lower center", "ncols": across, "fontsize": 9}
    figure.legend([lines[each] for each in labels], names, **place)
    return figure


def main(args: Args) -> None:
    groups, problems = group_runs(find_runs(args.folders), args.unfinished)
    if not groups:
        advice = "" if args.unfinished else "\n--unfinished counts runs as far as they have come"
        raise UserError("no run counts:\n  " + "\n  ".join(problems) + advice)
    for name, selection in (("curves", False), ("selection", True)):
        toolbox.write_output(args.output / f"{name}.png", toolbox.png(draw(groups, selection)))
    text = write_report(groups, problems, args.folders).encode(errors="surrogateescape")
    toolbox.write_output(args.output / "report.md", text)
    print(*problems, f"{len(problems)} problems; report.md and its pictures are in {args.output}", sep="\n")


if __name__ == "__main__":
    run_command(main, Args)
