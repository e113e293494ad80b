"""From run folders to a table of scores and a picture of learning curves.

    python tools/report.py runs/grid --output report

writes report/report.md and report/curves.png; the same runs give the same bytes.
"""

import json
import math
import os
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import toolbox
from common.tasks import BUNDLED, UserError, table_names, user_path
from toolbox import RecordedRun, interval

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_scores.json").read_text())
VERSIONS = ("git_commit", "torch", "mujoco", "gymnasium", "numpy", "python")
LOCOMOTION = ("halfcheetah-", "hopper-", "walker2d-", "ant-")
ABOUT_SCORES = """
The normalized score (0 random, 100 expert) by the reference returns of D4RL or of a Minari dataset; the
return where a task has none.

- *last ten*: the mean of the last ten evaluations (RAT), or of all of them if there are fewer, as *averaged*
  says; then the mean over the seeds, with its 95 % bootstrap interval
- *oracle*: the best evaluation of the training (OMS), chosen by the score itself, so not what one would get
- *published*: by others, and in brackets how; a task is named there if it is another version of this one
- *data*: the mean episode of the training data
- *steps*: of each run; *hours*: of each run, with its evaluations
"""
ABOUT_PUBLISHED = """
Numbers of others, none measured here. What may be compared:

- scores on the same version of a task; another version has other data, or is another environment;
- *RAT* with *last ten*, *OMS* with *oracle*, *final* with the end of a curve, and only where steps,
  evaluations and episodes are the same; *offline selection* and *evaluation not stated* with none of them.

Other methods on these tasks:
"""
ABOUT_DOMAINS = """
Averages of the last ten over tasks, for algorithms with runs on all tasks of a domain that are here. *IQM* is
the interquartile mean over tasks x seeds, with a 95 % bootstrap interval that draws the seeds within each
task.
"""
ABOUT_CURVES = """
Thick: mean over the seeds; shaded: its 95 % bootstrap interval; thin: each seed; dashed: the data's mean.
"""


@dataclass
class Args:
    """A table of scores and learning curves of all runs in some folders."""

    folders: Annotated[list[str], tyro.conf.Positional]  # searched for runs, at any depth
    output: str = "report"  # folder for report.md and curves.png
    unfinished: bool = False  # count runs that are not finished, too, as far as they have come


@dataclass
class Group:
    """The runs that differ in the seed alone."""

    script: str
    task: str  # env_id, and the dataset if it is another than the task's own
    env_id: str
    settings: dict  # the runs' arguments, but for seed, env_id and what does not count
    unit: str  # score or return
    online: bool  # whether it learned from what it did itself
    runs: dict[int, RecordedRun] = field(default_factory=dict)  # by seed
    label: str = ""  # the script, and those of its settings in which its groups differ

    @property
    def domain(self) -> str:
        """The tasks with which its scores may be averaged; without such tasks, its own task."""
        if self.env_id == BUNDLED or self.settings.get("dataset"):
            return self.task
        return "locomotion" if self.env_id.startswith(LOCOMOTION) else table_names(self.env_id)[-1]

    @property
    def given(self) -> set[str]:
        """Names of the settings that are neither defaults nor in the task's row."""
        first = next(iter(self.runs.values()))
        return {name for name, source in first.sources.items() if source == "given"}

    def last_ten(self) -> np.ndarray:
        """The mean of each seed's last ten evaluations, (seeds,)."""
        seeds = [list(self.runs[seed].evaluations.values()) for seed in sorted(self.runs)]
        return np.array([np.mean(values[-10:]) for values in seeds])

    def best(self) -> float:
        """The best evaluation, mean over the seeds."""
        return float(np.mean([max(run.evaluations.values()) for run in self.runs.values()]))

    def data_score(self) -> float | None:
        """The mean episode of the data; None: unknown."""
        scores = [run.data_score for run in self.runs.values()]
        return None if None in scores else float(np.mean(scores))


# === Reading ===
def find_runs(folders: list[str]) -> list[RecordedRun]:
    """All runs, in the order of their folders' names. UserError: there are none, or one cannot be read."""
    if not folders:
        raise UserError("name a folder with runs, such as runs")
    found = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
        found |= {path.parent.resolve() for path in folder.rglob("config.json")}
    if not found:
        raise UserError(f"there is no run in {', '.join(folders)} or below: no config.json")
    return [toolbox.read_run(folder) for folder in sorted(found, key=lambda each: (each.name, str(each)))]


def flaw(run: RecordedRun, unfinished: bool) -> str | None:
    """Why a run does not count; None: it does. With `unfinished` those count that have not ended yet."""
    if run.evaluations is None:
        return "it stopped before its first checkpoint"
    if not (run.finished or unfinished):
        return f"not finished, at step {run.step:,} of {run.total_steps:,}"
    if not run.evaluations:
        return "not evaluated"
    values = {f"the {run.unit} of step {step:,}": value for step, value in run.evaluations.items()}
    values |= {"the data's mean": run.data_score or 0.0, "the time": run.hours}
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    return bad[0] if bad else None


def group_runs(runs: list[RecordedRun], unfinished: bool = False) -> tuple[list[Group], list[str]]:
    """The runs that count in groups, by task and label; and a line for all that needs a remark."""
    groups, counted, problems, aside = {}, {}, [], toolbox.WHERE_AND_HOW | {"seed", "env_id"}
    for run in sorted(runs, key=lambda run: run.evaluations is None):  # those without results last
        env_id, seed = run.args["env_id"], run.args["seed"]
        settings = {name: value for name, value in run.args.items() if name not in aside}
        key = env_id, run.script, json.dumps(settings, sort_keys=True)
        earlier, who = counted.get((key, seed)), f"{run.script} on {env_id}, seed {seed}"
        if reason := flaw(run, unfinished):
            if run.evaluations is not None or not earlier:  # else it was killed early, and begun again
                problems.append(f"{who}: {reason}; left out ({run.folder.name})")
            continue
        if earlier:
            problems.append(f"{who}: made twice; counted {run.folder.name}, left out {earlier.folder.name}")
        counted[key, seed] = run
        problems += [f"{who}: {change}" for change in changes_of(run)]
        new = Group(run.script, run.data or env_id, env_id, settings, run.unit, run.data is None)
        groups.setdefault((*key, run.unit), new).runs[seed] = run
    problems += set_apart(list(groups.values()))
    in_order = sorted(groups.values(), key=lambda group: (group.task, group.script, group.label))
    return in_order, sorted(problems) + uneven_seeds(in_order)


def changes_of(run: RecordedRun) -> list[str]:
    """What to say of each time that the run was resumed with settings that change what it learns."""
    lines, aside = [], toolbox.WHERE_AND_HOW | {"total_steps"}
    for step, changes in run.changes:
        decisive = sorted(changes.keys() - aside)
        pairs = ", ".join(f"{name} {changes[name][0]} -> {changes[name][1]}" for name in decisive)
        lines += [f"resumed at step {step:,} with {pairs}"] if pairs else []
    return lines


def set_apart(groups: list[Group]) -> set[str]:
    """Give every group its label; returns a line for each script that has several groups on a task.

    The label names what the user chose, on every task if the script's groups differ in it on one; the steps
    and the evaluations have columns of their own.
    """
    kinds, differing, aside = defaultdict(list), {}, {"total_steps", "eval_every"}
    for group in groups:
        kinds[group.script, group.task].append(group)
    for kind, same in kinds.items():
        names = sorted(set().union(*(group.settings for group in same)))
        differing[kind] = [n for n in names if len({str(group.settings.get(n)) for group in same}) > 1]
    for (script, task), same in kinds.items():
        of_script = {name for kind, names in differing.items() if kind[0] == script for name in names}
        labels = [label_with(group, sorted(of_script & group.given - aside)) for group in same]
        if len(set(labels)) < len(same):  # the row of the task has changed, or the steps alone differ
            labels = [label_with(group, differing[script, task]) for group in same]
        for group, text in zip(same, labels, strict=True):
            group.label = text
    return {
        f"{script} on {task}: runs with different {', '.join(names)}, in rows of their own"
        for (script, task), names in differing.items()
        if names
    }


def label_with(group: Group, names: list[str]) -> str:
    """The script and the values of these settings: edp_td3 (guidance_weight 0.0)"""
    values = ", ".join(f"{name} {group.settings.get(name)}" for name in names)
    return f"{group.script} ({values})" if names else group.script


def uneven_seeds(groups: list[Group]) -> list[str]:
    """A line for each seed that some groups have and others lack; it names those that are fewer."""
    lines = []
    for seed in sorted({seed for group in groups for seed in group.runs}):
        having, lacking = [], []
        for group in groups:
            (having if seed in group.runs else lacking).append(f"{group.label} on {group.task}")
        if len(having) < len(lacking):
            lines.append(f"seed {seed}: runs count only for {', '.join(having)}")
        elif lacking:
            lines.append(f"seed {seed}: no run counts for {', '.join(lacking)}")
    return lines


# === The tables ===
def number(value: float | None, unit: str = "score", ends: tuple | None = None) -> str:
    """A score with one decimal, a return with five digits, and an interval: 52.3 [48.1, 56.0]"""
    if value is None:
        return "-"
    text = f"{value:.1f}" if unit == "score" else f"{value:.5g}"
    return f"{text} [{number(ends[0], unit)}, {number(ends[1], unit)}]" if ends else text


def is_of(task: str, group: Group) -> bool:
    """Whether a published task is that of the group, or another version of it.

    Not where the data is not the task's own, and not in Gymnasium's -v5, which are other environments.
    """
    if group.settings.get("dataset") or group.env_id.endswith("-v5"):
        return False
    return task.rpartition("-v")[0] == group.env_id.rpartition("-v")[0]


def published(group: Group) -> list[tuple[str, str]]:
    """(what is said of a score, its source) for the published scores of the algorithm in the task.

    Those of another version of the task name it: pen-human-v0 beside pen-human-v1.
    """
    found = []
    for each in PUBLISHED["tables"]:
        for task, score in each["scores"].items():
            if each["algorithm"] == group.script and is_of(task, group):
                where = "" if task == group.env_id else f", {task}"
                found.append((f"{score:g} ({each['metric']}{where})", each["source"]))
    return found


def baselines(groups: list[Group]) -> list[str]:
    """Tables of the published scores of other methods on the tasks of these groups, each with its source."""
    lines = []
    for each in PUBLISHED["baselines"]:
        known = [task for task in each["scores"] if any(is_of(task, group) for group in groups)]
        rows = [[task, *map(number, each["scores"][task])] for task in known]
        if rows:
            source = f"{each['source']}; {each['metric']}."
            lines += [*table(["task", *each["methods"]], rows), "", source, ""]
    return lines


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]


def score_row(group: Group) -> list[str]:
    """The row of one algorithm on one task."""
    last_ten, unit = group.last_ten(), group.unit
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
        number(group.data_score(), unit),
        steps,
        f"{np.mean([run.hours for run in group.runs.values()]):.2g}",
    ]


def domain_rows(groups: list[Group]) -> list[list[str]]:
    """The averages over the tasks of a domain; only of scores of training on recorded data."""
    domains, rows = defaultdict(list), []
    for group in groups:
        if group.unit == "score" and not group.online:
            domains[group.domain].append(group)
    for domain, members in domains.items():
        tasks = sorted({group.task for group in members})
        for label in sorted({group.label for group in members}) if len(tasks) > 1 else []:
            own = {group.task: group for group in members if group.label == label}
            row = [domain, label, f"{len(own)} of {len(tasks)}"]
            if len(own) < len(tasks):
                rows.append([*row, "incomplete", "-", "-"])
                continue
            samples = [own[task].last_ten() for task in tasks]
            mean = np.mean([sample.mean() for sample in samples])  # each task counts once
            middle = number(iqm(np.concatenate(samples)), ends=interval(*samples, statistic=iqm))
            rows.append([*row, number(mean), middle, number(np.mean([own[task].best() for task in tasks]))])
    return rows


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: without the lowest and the highest quarter of the values, each rounded down."""
    from scipy.stats import trim_mean

    return trim_mean(values, 0.25, axis=axis)


def write_report(groups: list[Group], problems: list[str], folders: list[str]) -> str:
    """The text of report.md."""
    runs = [run for group in groups for run in group.runs.values()]
    tasks, scripts = {group.task for group in groups}, {group.script for group in groups}
    counts = f"{len(runs)} runs of {len(scripts)} scripts on {len(tasks)} tasks"
    hours = sum(run.hours for run in runs)
    found = {name: sorted({str(run.config.get(name, "unknown")) for run in runs}) for name in VERSIONS}
    versions = "; ".join(f"{name} {', '.join(values)}" for name, values in found.items())
    lines = ["# Report", "", f"{counts} in {', '.join(folders)}: {hours:.2g} hours.", ""]
    lines += [f"Versions: {versions}.", "", "## Problems", ""]
    lines += [f"- {problem}" for problem in problems] or ["None: every run counts, no seed is missing."]
    header = ["task", "algorithm", "seeds", "last ten", "averaged", "oracle", "published", "data"]
    rows = [score_row(group) for group in groups]
    lines += ["", "## Scores", ABOUT_SCORES, *table([*header, "steps", "hours"], rows)]
    if rows := domain_rows(groups):
        header = ["domain", "algorithm", "tasks", "mean", "IQM", "oracle"]
        lines += ["", "## Domains", ABOUT_DOMAINS, *table(header, rows)]
    lines += ["", "## Learning curves", ABOUT_CURVES, "![Learning curves](curves.png)"]
    if tables := baselines(groups):
        sources = sorted({f"- {source}" for group in groups for _, source in published(group)})
        lines += ["", "## Published scores", ABOUT_PUBLISHED, *tables]
        lines += ["Sources of the column *published*:", "", *(sources or ["- none"])]
    return "\n".join(lines) + "\n"


# === The curves ===
def draw_curves(groups: list[Group]):
    """A panel for each task; for each script on it, if up to three tasks have over five curves on average."""
    tasks, labels = sorted({group.task for group in groups}), sorted({group.label for group in groups})
    apart = len(tasks) <= 3 and len(groups) > 5 * len(tasks)
    scripts = sorted({group.script for group in groups}) if apart else [""]
    panels = [(script, task) for script in scripts for task in tasks]
    plt = toolbox.pyplot()
    palette = plt.get_cmap("tab10" if len(labels) <= 10 else "tab20")
    colors = {label: palette(i % palette.N) for i, label in enumerate(labels)}
    side_by_side = apart and len(tasks) > 1  # a column for each task
    columns = len(tasks) if side_by_side else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = max(6.0, 4.4 * columns)  # inches
    across = max(1, int(width / (0.6 + 0.08 * max(map(len, labels)))))  # columns of the legend
    size = (width, (2.4 if side_by_side else 3.2) * rows + 0.2 + 0.2 * math.ceil(len(labels) / across))
    figure = plt.figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey="col" if side_by_side else apart)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    lines = {}
    for ax, (script, task) in zip(axes.flat, panels, strict=False):
        members = [group for group in groups if group.task == task and script in ("", group.script)]
        title = [script] if apart and members else []
        if not apart or side_by_side and ax.get_subplotspec().is_first_row():
            title = [*textwrap.wrap(task, 40, break_on_hyphens=False), *title]
        ax.set_title("\n".join(title), fontsize=10)
        if not members:
            ax.set_axis_off()
            continue
        for group in members:
            curves = [group.runs[seed].evaluations for seed in sorted(group.runs)]
            steps = sorted(set.intersection(*map(set, curves)))  # that all seeds have
            values = np.array([[curve[step] for step in steps] for curve in curves]).T  # (steps, seeds)
            look = {"color": colors[group.label], "marker": "o" if len(steps) == 1 else None}
            ax.plot(steps, values, linewidth=0.6, alpha=0.5, markersize=3, **look)
            [lines[group.label]] = ax.plot(steps, values.mean(-1), linewidth=2, **look)
            if steps and (ends := interval(values)):
                ax.fill_between(steps, *ends, color=colors[group.label], alpha=0.15, linewidth=0)
        if members[0].data_score() is not None:
            ax.axhline(members[0].data_score(), color="gray", linestyle="--", linewidth=0.8)
        ax.locator_params(axis="x", nbins=6)
        ax.set(xlabel="steps", ylabel="normalized score" if members[0].unit == "score" else "return")
        ax.grid(alpha=0.3)
    if apart and not side_by_side:
        figure.suptitle(tasks[0], fontsize=11)
    ordered = [lines[label] for label in labels]
    figure.legend(ordered, labels, loc="outside lower center", ncols=across, fontsize=9)
    return figure


def main(args: Args) -> None:
    groups, problems = group_runs(find_runs(args.folders), args.unfinished)
    if not groups:
        advice = "" if args.unfinished else "\n--unfinished counts runs as far as they have come"
        raise UserError("no run counts:\n  " + "\n  ".join(problems) + advice)
    picture = toolbox.png(draw_curves(groups), dpi=120)
    text = write_report(groups, problems, args.folders).encode(errors="surrogateescape")
    output = user_path(args.output)
    toolbox.write_output(output / "curves.png", picture)
    toolbox.write_output(output / "report.md", text)
    for problem in problems:
        print(f"  {problem}")
    print(f"{len(problems)} problems; {output / 'report.md'} and {output / 'curves.png'} are written")


if __name__ == "__main__":  # without common.runs.run_command(), which loads PyTorch
    if sys.stdout:  # else it was closed by the shell
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(tyro.cli(Args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # nobody reads the output; the report is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
