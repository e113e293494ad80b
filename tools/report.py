"""From run folders to a table of scores and a picture of learning curves.

    python tools/report.py runs/grid --output report

writes report/report.md and report/curves.png; the same runs give the same bytes.
"""

import io
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.datasets import BUNDLED, UserError  # noqa: E402
from common.runs import run_command, write_atomically  # noqa: E402
from tools.benchmark import WHERE_AND_HOW  # noqa: E402

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_scores.json").read_text())
VERSIONS = ("git_commit", "torch", "mujoco", "gymnasium", "numpy", "python")
DOMAINS = {  # how D4RL's names of their tasks begin, and the bandits'
    "locomotion": ("halfcheetah-", "hopper-", "walker2d-", "ant-"),
    "AntMaze": "antmaze-",
    "Maze2D": "maze2d-",
    "Adroit": ("pen-", "hammer-", "door-", "relocate-"),
    "Kitchen": "kitchen-",
    "bandits": "bandit-",
}
ABOUT_SCORES = """
D4RL's normalized score (0 random, 100 expert), or the return where a task has none.

- *last ten*: mean of the last ten evaluations (RAT), then over the seeds, with its 95 % bootstrap interval
- *oracle*: the best evaluation of the training (OMS), chosen by the score itself, so not what one would get
- *paper*: what others have published, by their number of steps and evaluations; sources are below
- *data*: the mean episode of the training data
- *steps*: of each run, and in brackets how many evaluations it made
- *hours*: of training, per run
"""
ABOUT_DOMAINS = """
Averages of the last ten over tasks, for algorithms with runs on all tasks of a domain. *IQM* is the
interquartile mean over tasks x seeds, with a 95 % bootstrap interval that draws the seeds within each task.
"""
ABOUT_CURVES = """
Thick: mean over the seeds; shaded: its 95 % bootstrap interval; thin: each seed; dashed: the data's mean.
"""


@dataclass
class Args:
    """A table of scores and learning curves of all runs in some folders."""

    folders: Annotated[list[str], tyro.conf.Positional]  # searched for results.json, at any depth
    output: str = "report"  # folder for report.md and curves.png


@dataclass
class Group:
    """The finished runs that differ in the seed alone."""

    script: str
    task: str  # env_id, and the dataset if it is another than the task's own
    env_id: str
    settings: dict  # of config.json, but for seed, env_id and what does not count
    runs: dict[int, dict] = field(default_factory=dict)  # seed -> what results.json has
    label: str = ""  # the script, and what sets this group apart from its others on the task

    def scores(self, name: str) -> np.ndarray:
        """One number per seed, (seeds,), of final, best or last_ten, in the group's unit."""
        return np.array([self.runs[seed][name][self.unit] for seed in sorted(self.runs)])

    @property
    def unit(self) -> str:
        """score, or return for a task without reference returns."""
        return "return" if any(run["last_ten"]["score"] is None for run in self.runs.values()) else "score"

    @property
    def online(self) -> bool:
        """Whether it learned from what it did itself."""
        return any(run["data"] is None for run in self.runs.values())

    @property
    def domain(self) -> str:
        """The tasks with which its scores may be averaged; without such tasks, its own task."""
        known = (name for name, start in DOMAINS.items() if self.task.startswith(start))
        own = self.env_id == BUNDLED or self.settings.get("dataset")
        return self.task if own else next(known, self.task)


# === Reading ===
def find_runs(folders: list[str]) -> tuple[list[tuple[Path, dict, dict]], list[Path]]:
    """(folder, results, config) of all runs, by the folders' names; and the folders without results.

    UserError, naming every file, if there are no results or some that cannot be read.
    """
    found, bare, runs, bad = set(), set(), [], []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
        found |= {path.parent.resolve() for path in folder.rglob("results.json")}
        bare |= {path.parent.resolve() for path in folder.rglob("config.json")}
    if not found:
        where = f"{', '.join(folders)} or below"
        raise UserError(f"there is no results.json in {where}; a run writes it at its first checkpoint")
    for folder in sorted(found, key=lambda folder: (folder.name, str(folder))):
        try:
            runs.append((folder, *read_run(folder)))
        except (OSError, ValueError) as error:
            bad.append(f"  {folder / 'results.json'}: {error}")
    if bad:
        raise UserError("these cannot be read; repair them, or move their folders away:\n" + "\n".join(bad))
    return runs, sorted(bare - found, key=lambda folder: folder.name)


def read_run(folder: Path) -> tuple[dict, dict]:
    """What results.json and config.json hold. ValueError: not what runs write today."""
    needed = {
        "script",
        "env_id",
        "seed",
        "data",
        "data_mean",
        "evaluations",
        "step",
        "total_steps",
        "finished",
    }
    results = json.loads((folder / "results.json").read_text())
    if not isinstance(results, dict) or results.get("format") != 1:
        found = results.get("format") if isinstance(results, dict) else "no object"
        raise ValueError(f"format {found}, not 1; it is of another version of the scripts")
    if missing := sorted(needed - results.keys()):
        raise ValueError(f"it lacks {', '.join(missing)}")
    config = json.loads((folder / "config.json").read_text())
    if not isinstance(config, dict) or not isinstance(config.get("args"), dict):
        raise ValueError("config.json beside it has no arguments")
    return results, config


def group_runs(runs: list[tuple[Path, dict, dict]]) -> tuple[list[Group], list[str]]:
    """The finished runs in groups, by task and label; and a line for each run or row that needs a remark."""
    groups, kept, problems = {}, {}, []
    for folder, results, config in runs:
        who = f"{results['script']} on {results['env_id']}, seed {results['seed']}"
        if not results["finished"]:
            steps = f"step {results['step']:,} of {results['total_steps']:,}"
            problems.append(f"{who}: not finished, at {steps}; left out ({folder.name})")
            continue
        if "last_ten" not in results:
            problems.append(f"{who}: not evaluated; left out ({folder.name})")
            continue
        aside = WHERE_AND_HOW | {"seed", "env_id"}
        settings = {name: value for name, value in config["args"].items() if name not in aside}
        key = results["env_id"], results["script"], json.dumps(settings, sort_keys=True)
        task = results["data"] or results["env_id"]
        group = groups.setdefault(key, Group(results["script"], task, results["env_id"], settings))
        if earlier := kept.get((key, results["seed"])):
            problems.append(f"{who}: made twice; counted {folder.name}, left out {earlier}")
        kept[key, results["seed"]] = folder.name
        group.runs[results["seed"]] = results
    groups = [groups[key] for key in sorted(groups)]
    problems += set_apart(groups)
    return sorted(groups, key=lambda group: (group.task, group.script, group.label)), sorted(problems)


def set_apart(groups: list[Group]) -> list[str]:
    """Give every group its label; returns a line for each script that has several groups on a task."""
    problems = []
    for group in groups:
        same = [other for other in groups if (other.script, other.task) == (group.script, group.task)]
        differing = [
            name
            for name in sorted(set().union(*(other.settings for other in same)))
            if any(other.settings.get(name) != group.settings.get(name) for other in same)
        ]
        values = ", ".join(f"{name} {group.settings.get(name)}" for name in differing)
        group.label = f"{group.script} ({values})" if differing else group.script
        if differing and group is same[0]:
            names = ", ".join(differing)
            problems.append(
                f"{group.script} on {group.task}: runs with different {names}, in rows of their own"
            )
    return problems


def missing_runs(groups: list[Group]) -> list[str]:
    """A line for each group that lacks seeds which others have, and for each script without a task."""
    problems, seeds = [], {seed for group in groups for seed in group.runs}
    for group in groups:
        if missing := sorted(seeds - group.runs.keys()):
            named = ", ".join(map(str, missing))
            problems.append(
                f"{group.label} on {group.task}: no finished run of seed {named}, which others have"
            )
    for online in (False, True):
        done = {(group.script, group.task) for group in groups if group.online == online}
        scripts, tasks = sorted({script for script, _ in done}), sorted({task for _, task in done})
        for script in scripts:
            without = [task for task in tasks if (script, task) not in done]
            problems += [f"{script} on {task}: no finished run, which other scripts have" for task in without]
    return problems


# === Statistics ===
def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: without the lowest and the highest quarter of the values, each rounded down."""
    return scipy.stats.trim_mean(values, 0.25, axis=axis)


def interval(*samples: np.ndarray, statistic: Callable = np.mean) -> tuple[np.ndarray, np.ndarray] | None:
    """Ends of the 95 % bootstrap interval (percentiles) of a statistic of all samples together.

    Seeds, the last axis, are drawn anew within each sample; None where one of them has a single seed.
    """
    if min(sample.shape[-1] for sample in samples) < 2:
        return None
    found = scipy.stats.bootstrap(
        samples,
        lambda *drawn, axis: statistic(np.concatenate(drawn, axis=axis), axis=axis),
        vectorized=True,
        axis=-1,
        batch=500,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return found.confidence_interval.low, found.confidence_interval.high


# === The tables ===
def number(value: float, unit: str = "score") -> str:
    """A score with one decimal, a return with five digits."""
    return f"{value:.1f}" if unit == "score" else f"{value:.5g}"


def with_interval(value: float, ends: tuple | None, unit: str = "score") -> str:
    """52.3 [48.1, 56.0]"""
    return number(value, unit) + (f" [{number(ends[0], unit)}, {number(ends[1], unit)}]" if ends else "")


def published(group: Group) -> list[dict]:
    """The published scores of the algorithm in the task; for a Gymnasium -v4 those in its -v3."""
    if group.settings.get("dataset"):  # other data than theirs
        return []
    names = [group.env_id]
    if group.env_id.endswith("-v4"):
        names.append(group.env_id.removesuffix("-v4") + "-v3")
    scores = PUBLISHED["scores"]
    return [each for each in scores if each["algorithm"] == group.script and each["env_id"] in names]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def score_row(group: Group) -> list[str]:
    """The row of one algorithm on one task."""
    last_ten, best, unit = group.scores("last_ten"), group.scores("best"), group.unit
    data = [run["data_mean"][unit] for run in group.runs.values()]
    papers = []
    for each in published(group):
        where = f", {each['env_id']}" if each["env_id"] != group.env_id else ""
        papers.append(f"{each['score']:g} ({each['metric']}{where})")
    run = group.runs[min(group.runs)]
    seconds = np.mean([run["train_seconds"] for run in group.runs.values()])
    return [
        group.task,
        group.label,
        str(len(group.runs)),
        with_interval(last_ten.mean(), interval(last_ten), unit) + (" (return)" if unit == "return" else ""),
        number(best.mean(), unit),
        "; ".join(papers) or "-",
        "-" if None in data else number(np.mean(data), unit),
        f"{run['total_steps']:,} ({len(run['evaluations'])})",
        f"{seconds / 3600:.2g}",
    ]


def by_domain(groups: list[Group]) -> dict[str, list[Group]]:
    """The groups with scores, trained on recorded data, by domains of several tasks; and all together."""
    domains = defaultdict(list)
    for group in groups:
        if group.unit == "score" and not group.online:
            domains[group.domain].append(group)
    several = {name: found for name, found in domains.items() if len({group.task for group in found}) > 1}
    together = [group for found in domains.values() for group in found]
    return several | ({"all": together} if len(domains) > 1 else {})


def domain_rows(domain: str, members: list[Group]) -> list[list[str]]:
    """A row for each algorithm; averages only if it has runs on all tasks of the domain."""
    tasks, rows = sorted({group.task for group in members}), []
    for label in sorted({group.label for group in members}):
        own = {group.task: group for group in members if group.label == label}
        row = [domain, label, f"{len(own)} of {len(tasks)}"]
        if len(own) < len(tasks):
            rows.append([*row, "incomplete", "-", "-"])
            continue
        samples = [own[task].scores("last_ten") for task in tasks]
        mean = np.mean([sample.mean() for sample in samples])  # each task counts once
        best = np.mean([own[task].scores("best").mean() for task in tasks])
        middle, ends = iqm(np.concatenate(samples)), interval(*samples, statistic=iqm)
        rows.append([*row, number(mean), with_interval(middle, ends), number(best)])
    return rows


def write_report(groups: list[Group], problems: list[str], configs: list[dict], folders: list[str]) -> str:
    """The text of report.md."""
    count = sum(len(group.runs) for group in groups)
    tasks, scripts = {group.task for group in groups}, {group.script for group in groups}
    seconds = sum(run["train_seconds"] for group in groups for run in group.runs.values())
    versions = [
        f"{name} {', '.join(sorted({str(config.get(name, 'unknown')) for config in configs}))}"
        for name in VERSIONS
    ]
    lines = ["# Report", ""]
    lines += [
        f"{count} finished runs of {len(scripts)} scripts on {len(tasks)} tasks in {', '.join(folders)}:"
    ]
    lines += [f"{seconds / 3600:.2g} hours of training.", "", f"Versions: {'; '.join(versions)}.", ""]
    lines += ["## Problems", ""]
    lines += [f"- {problem}" for problem in problems] or ["None: every run is finished, no seed is missing."]
    lines += ["", "## Scores", ABOUT_SCORES]
    header = ["task", "algorithm", "seeds", "last ten", "oracle", "paper", "data", "steps", "hours"]
    lines += table(header, [score_row(group) for group in groups])
    rows = [row for domain, members in by_domain(groups).items() for row in domain_rows(domain, members)]
    if rows:
        header = ["domain", "algorithm", "tasks", "mean", "IQM", "oracle"]
        lines += ["", "## Domains", ABOUT_DOMAINS, *table(header, rows)]
    lines += ["", "## Learning curves", ABOUT_CURVES, "![Learning curves](curves.png)"]
    if sources := sorted({each["source"] for group in groups for each in published(group)}):
        lines += ["", "## Sources of the published scores", "", *[f"- {source}" for source in sources]]
    return "\n".join(lines) + "\n"


# === The curves ===
def curve(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Steps (E,) of the evaluations that all seeds have, and the values (E, seeds)."""
    name = "normalized_score" if group.unit == "score" else "return_mean"
    seeds = [
        {each["step"]: each[name] for each in run["evaluations"]} for _, run in sorted(group.runs.items())
    ]
    steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
    return np.array(steps), np.array([[seed[step] for seed in seeds] for step in steps])


def draw_curves(groups: list[Group]) -> Figure:
    """One panel for each task."""
    tasks, labels = sorted({group.task for group in groups}), sorted({group.label for group in groups})
    palette = plt.get_cmap("tab10" if len(labels) <= 10 else "tab20")
    colors = {label: palette(i % palette.N) for i, label in enumerate(labels)}
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    size = (4.4 * columns, 3.2 * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(tasks) :]:
        ax.remove()
    lines = {}
    for ax, task in zip(axes.flat, tasks, strict=False):
        for group in (group for group in groups if group.task == task):
            steps, values = curve(group)
            look = {"color": colors[group.label], "marker": "o" if len(steps) == 1 else None}
            ax.plot(steps, values, linewidth=0.6, alpha=0.5, markersize=3, **look)
            [lines[group.label]] = ax.plot(steps, values.mean(1), linewidth=2, **look)
            if ends := interval(values):
                ax.fill_between(steps, *ends, color=colors[group.label], alpha=0.15, linewidth=0)
        data = [run["data_mean"][group.unit] for run in group.runs.values()]
        if None not in data:
            ax.axhline(np.mean(data), color="gray", linestyle="--", linewidth=0.8)
        ax.set(title=task, xlabel="steps", ylabel="normalized score" if group.unit == "score" else "return")
        ax.grid(alpha=0.3)
    ordered = [lines[label] for label in labels]
    figure.legend(ordered, labels, loc="outside lower center", ncols=min(2 * columns, len(labels)))
    return figure


def main(args: Args) -> None:
    runs, bare = find_runs(args.folders)
    groups, problems = group_runs(runs)
    problems += [f"{folder.name}: no results; it stopped before its first checkpoint" for folder in bare]
    problems += missing_runs(groups)
    if not groups:
        raise UserError("no finished and evaluated run:\n  " + "\n  ".join(problems))
    figure = draw_curves(groups)
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
        write_atomically(output / "curves.png", picture.getvalue())
        text = write_report(groups, problems, [config for _, _, config in runs], args.folders)
        write_atomically(output / "report.md", text.encode())
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or error.__cause__.strerror
        raise UserError(
            f"cannot write to {output}: {reason}; make room or choose another --output"
        ) from error
    finally:
        plt.close(figure)
    for problem in problems:
        print(f"  {problem}")
    print(f"{len(problems)} problems; {output / 'report.md'} and {output / 'curves.png'} are written")


if __name__ == "__main__":
    run_command(main, tyro.cli(Args))
