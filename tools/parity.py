"""Train the scripts beside the authors' own code, and draw and tabulate both learning curves.

    python tools/parity.py                                             # all six offline scripts
    python tools/parity.py tests/golden/learning/dtql.json --seeds 0   # one of them

A file of curves names script, data, settings and steps; tests/golden/README.md has its format. What was
trained is kept in <output>/<file>.json, and trained again if the file is deleted or the conditions change.
"""

import hashlib
import json
import math
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from unittest import mock

import numpy as np
import torch
import tyro

import toolbox
from common.runs import Run, describe_machine, run_command
from common.settings import NonNegative, Positive, check_bounds, parse_args
from common.tasks import UserError

GOLDEN = toolbox.ROOT / "tests" / "golden" / "learning"
# Half the height of the band around the mean of the authors' seeds, as a share of that mean.
# In tests/golden/learning/ and docs/parity/ no seed of either code gets further from the mean than MARGIN of
# this. Losses that regress on noise hardly depend on the seed; those of critics do, since they start from
# random networks; CRR's advantage does most of all.
MARGIN = 0.7
WIDTHS = {
    "critic_loss": 0.45,
    "value_loss": 0.55,
    "q_mean": 0.1,
    "q_std": 0.2,
    "q_norm": 0.13,
    "advantage": 0.75,
    "dac guidance_loss": 0.9,  # of this script alone
    "other": 0.09,
}
# These start near 0 or where random networks put them: a share of the largest mean of the curve.
OF_LARGEST = {"q_mean", "advantage", "dac guidance_loss"}
NOT_LOGGED = {"q_gradient_abs"}  # by our scripts


@dataclass
class Args:
    """Learning curves of the scripts and of the authors' code."""

    curves: Annotated[list[Path], tyro.conf.Positional] = field(default_factory=list)  # files; none: all
    seeds: tuple[NonNegative[int], ...] = (0, 1)  # seeds of our runs
    intervals: Positive[int] = 1000  # of the file's intervals, train this many, or all there are
    output: Path = toolbox.ROOT / "docs" / "parity"  # folder of our curves and of the pictures


# === The authors' curves ===
@dataclass
class Curves:
    """A file of the authors' learning curves, and the conditions under which they were made."""

    name: str
    script: str
    arguments: list[str]  # with which it is trained under the same conditions as the authors' code
    data: Path
    checksum: str  # SHA-256 of the data
    interval: int  # steps that a point is the mean of
    steps: list[int]  # at the ends of the intervals
    logged_every: int  # a point is the mean of every such step
    authors: dict[str, np.ndarray]  # our name of a metric -> (seeds, intervals)


def read_curves(path: Path) -> Curves:
    """UserError: the file is not there or damaged, or its data are not those that the authors' code had."""
    try:
        file = json.loads(path.read_text())
        interval, steps, seeds = toolbox.whole(file["interval"]), file["steps"], list(file["seeds"].values())
        if not steps or steps != [interval * (i + 1) for i in range(len(steps))]:
            raise ValueError(f"steps are {steps}, not the multiples of {interval}")
        authors = {}
        for theirs, ours in file["names"].items():
            sign, metric = our_metric(toolbox.text(ours))
            points = [[each["losses"][name] for name in theirs.split(" + ")] for each in seeds]
            curves = sign * np.array(points, dtype=float).sum(1)  # (seeds, intervals)
            if curves.shape != (len(seeds), len(steps)) or not np.isfinite(curves).all():
                raise ValueError(f"{theirs} does not have {len(steps)} numbers for each seed")
            if metric:
                authors[metric] = curves
        logged_every = min(toolbox.whole(each["logged_every"]) for each in seeds)
        if logged_every < 1 or not authors:
            raise ValueError(f"logged_every is {logged_every}, and names has {len(authors)} metrics of ours")
        # A script's learning rates fall over --total-steps, the authors' over a number of their own.
        command = shlex.split(toolbox.text(file["ours"]).replace("--lr-decay-steps", "--total-steps"))
        data = toolbox.text(file["data"]["file"])
        places = [toolbox.ROOT / data, path.parent / data, path.parent / Path(data).name]
        curves = Curves(
            name=path.stem,
            script=toolbox.text(file["script"]),
            arguments=command[2:],
            data=next((place for place in places if place.exists()), places[0]),
            checksum=toolbox.text(file["data"]["sha256"]),
            interval=interval,
            steps=steps,
            logged_every=logged_every,
            authors=authors,
        )
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is no file of learning curves, or damaged ({reason})") from error
    try:
        found = hashlib.sha256(curves.data.read_bytes()).hexdigest()
    except OSError as error:
        reason = f"{error.strerror}; put it beside the curves"
        raise UserError(f"{curves.data}, the data of {path}, cannot be read: {reason}") from error
    if found != curves.checksum:
        raise UserError(f"{curves.data} is not the data of {path}: its SHA-256 differs")
    return curves


def our_metric(words: str) -> tuple[int, str]:
    """Sign and name of what the file calls `name`, `minus name` or `... (name follows it)`; else no name."""
    found = re.fullmatch(r"(minus )?(\w+)", words) or re.search(r"(minus )?\b(\w+) follows it\b", words)
    return (-1 if found and found[1] else 1), (found[2] if found else "")


# === Our curves ===
def train(curves: Curves, seed: int, intervals: int | None = None, changes: Sequence[str] = ()) -> dict:
    """A run of the script under the conditions of the file: metric -> the mean of each interval.

    changes are further arguments. The run ends with the last interval, also where --total-steps, to which the
    learning rates fall, is larger. UserError: the script does not take the arguments of the file.
    """
    script = toolbox.load_script(curves.script)
    last_step = curves.steps[:intervals][-1]
    points: dict[str, list[float]] = {}

    class ShortRun(Run):
        """It ends with the last interval, and keeps the means of all."""

        def unfinished(self) -> bool:
            return self.step < last_step and super().unfinished()

        def log(self) -> None:
            if self.history and self.step > 0:  # a pretraining comes before step 0
                means = torch.stack(self.history)[:: curves.logged_every].mean(0).tolist()
                for name, mean in zip(self.names, means, strict=True):
                    points.setdefault(name, []).append(mean)
            super().log()

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(script, "Run", ShortRun):
        words = [*curves.arguments, *changes, f"--seed={seed}", f"--dataset={curves.data}", "--device=cpu"]
        words += [f"--log-every={curves.interval}", f"--save-every={last_step}", "--eval-episodes=0"]
        try:
            args = parse_args(script.Args, script.TASK_SETTINGS, [*words, f"--run-dir={folder}"])
        except SystemExit as error:  # tyro has said why
            refused = f"the arguments of the file: {shlex.join(curves.arguments)}"
            raise UserError(f"{curves.script}.py does not take {refused}") from error
        check_bounds(args)
        script.train(args)
    return points


def our_curves(curves: Curves, args: Args) -> dict[str, dict]:
    """Seed -> metric -> the mean of each interval; kept in <output>/<file>.json, or trained."""
    path = args.output / f"{curves.name}.json"
    count = len(curves.steps[: args.intervals])
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):  # not there, or cut short
        kept = {}
    if kept.get("conditions") != conditions(curves):
        kept = {"conditions": conditions(curves), "seeds": {}, "made": {}}
    for seed in map(str, args.seeds):
        if min(map(len, kept["seeds"].get(seed, {"": []}).values())) < count:
            points = train(curves, int(seed), count)
            kept["seeds"][seed] = {name: [float(f"{x:.6g}") for x in points[name]] for name in points}
            kept["made"][seed] = describe_machine(torch.device("cpu"))
            toolbox.write_output(path, (json.dumps(kept, indent=1) + "\n").encode())
    seeds = {seed: kept["seeds"][seed] for seed in map(str, args.seeds)}
    return {seed: {name: points[:count] for name, points in seeds[seed].items()} for seed in seeds}


def conditions(curves: Curves) -> dict:
    """What our curves depend on, beside the code."""
    return {
        "arguments": shlex.join(curves.arguments),
        "sha256": curves.checksum,
        "logged_every": curves.logged_every,
    }


# === Comparison ===
def band(curves: Curves, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends (intervals,) of where a seed of ours may lie."""
    authors = curves.authors[metric]  # (seeds, intervals)
    half = width_of(curves.script, metric) * scale_of(curves.script, metric, authors)
    return authors.mean(0) - half, authors.mean(0) + half


def width_of(script: str, metric: str) -> float:
    return WIDTHS.get(f"{script} {metric}", WIDTHS.get(metric, WIDTHS["other"]))


def scale_of(script: str, metric: str, authors: np.ndarray) -> np.ndarray:
    """What a width is a share of: the authors' mean, for OF_LARGEST the largest of the curve (intervals,)."""
    size = np.abs(authors.mean(0))
    return np.full_like(size, size.max()) if {metric, f"{script} {metric}"} & OF_LARGEST else size


def compared(curves: Curves, ours: dict[str, list[float]]) -> list[str]:
    """The metrics in both. UserError: the script does not log one that it should."""
    missing = curves.authors.keys() - ours.keys() - NOT_LOGGED
    if missing:
        raise UserError(f"{curves.script}.py does not log {', '.join(sorted(missing))}")
    return [metric for metric in curves.authors if metric in ours]


def outside(curves: Curves, ours: dict[str, list[float]]) -> list[str]:
    """A line for each point of a seed of ours that is outside its band."""
    lines = []
    # Where not every step was logged, the very first, of random networks, weighs too much in its interval.
    start = 0 if curves.logged_every == 1 else curves.interval
    for metric in compared(curves, ours):
        for step, value, low, high in zip(curves.steps, ours[metric], *band(curves, metric), strict=False):
            if step > start and not low <= value <= high:
                lines.append(f"{metric} at step {step:,} is {value:.4g}, not in [{low:.4g}, {high:.4g}]")
    return lines


# === Table and pictures ===
def table(curves: Curves, ours: dict[str, dict]) -> str:
    """Rows of Markdown: metric, last step, mean and standard deviation over the seeds of both, width."""
    rows = []
    for metric in compared(curves, next(iter(ours.values()))):
        values = np.array([seed[metric] for seed in ours.values()])  # (seeds, intervals)
        count, mine = values.shape[1], values[:, -1]
        theirs = curves.authors[metric][:, count - 1]
        cells = [f"`{curves.script}`", f"`{metric}`", f"{curves.steps[count - 1]:,}"]
        cells += [
            f"{each.mean():.4g} ± {each.std(ddof=1):.2g}" if len(each) > 1 else f"{each[0]:.4g}"
            for each in (theirs, mine)
        ]
        largest = max(
            furthest(curves, metric, values),
            furthest(curves, metric, curves.authors[metric]),
        )
        rows.append(f"| {' | '.join([*cells, f'{largest:.1%}', f'{width_of(curves.script, metric):.0%}'])} |")
    return "\n".join(rows)


def furthest(curves: Curves, metric: str, seeds: np.ndarray) -> float:
    """How far a seed (of seeds, intervals) gets from the authors' mean, as a share of the metric's scale."""
    authors = curves.authors[metric]
    count = seeds.shape[1]
    size = scale_of(curves.script, metric, authors)[:count]
    return (np.abs(seeds - authors.mean(0)[:count]) / size).max().item()


def draw(curves: Curves, ours: dict[str, dict], path: Path) -> None:
    """One axes for each metric: the authors' seeds and ours as thin lines, the band of the test shaded."""
    metrics = compared(curves, next(iter(ours.values())))
    columns = 4 if len(metrics) in (4, 7, 8) else 3
    rows = math.ceil(len(metrics) / columns)
    plt = toolbox.pyplot()
    size = (9, 2 * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for each, metric in zip(axes.flat, metrics, strict=False):
        low, high = band(curves, metric)
        each.fill_between(curves.steps, low, high, color="tab:gray", alpha=0.2, linewidth=0)
        for seed in curves.authors[metric]:
            each.plot(curves.steps, seed, color="black", linewidth=1)
        for seed in ours.values():
            each.plot(curves.steps[: len(seed[metric])], seed[metric], color="tab:red", linewidth=1)
        each.set_title(metric, fontsize=9)
        each.set_xticks([0, *curves.steps[1 - len(curves.steps) % 2 :: 2]])
        each.tick_params(labelsize=7)
    for each in axes[-1]:
        each.set_xlabel("gradient steps", fontsize=8)
    for each in list(axes.flat)[len(metrics) :]:
        each.set_axis_off()
    lines = [
        plt.Line2D([], [], color="black"),
        plt.Line2D([], [], color="tab:red"),
        plt.Rectangle((0, 0), 1, 1, color="tab:gray", alpha=0.2),
    ]
    names = ["authors' code, each seed", f"{curves.script}.py, each seed", "band of the test"]
    figure.legend(lines, names, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    toolbox.write_output(path, toolbox.png(figure, num_colors=64))


def main(args: Args) -> None:
    """Train what is not there yet, draw a picture for each file, print one table for all."""
    files = [read_curves(path) for path in args.curves or sorted(GOLDEN.glob("*.json"))]
    toolbox.pyplot()  # fails, if it does, before minutes of training
    pictures = [args.output / f"{curves.name}.png" for curves in files]
    for path in pictures:
        toolbox.write_output(path, b"")  # so does this
    rows = []
    for curves, path in zip(files, pictures, strict=True):
        ours = our_curves(curves, args)
        draw(curves, ours, path)
        rows.append(table(curves, ours))
    print("| script | quantity | step | authors | ours | furthest seed | band |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    run_command(main, Args)
