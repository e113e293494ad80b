"""Our learning curves over those of the authors' own code: trains, tests, draws and tabulates.

    python docs/figures/parity.py                     # all of docs/parity.md, from the curves that are kept
    python docs/figures/parity.py --runs runs/long    # first takes the long curves from the run folders there
    python docs/figures/parity.py docs/parity/authors/edp_iql.json --seeds 0 1 2 3 --changes=--gamma=0.9

docs/parity/authors/ has the authors' curves, docs/parity/<same name>.json ours. A seed that is not kept there
is trained by the command in the file, with --changes as a deliberate mistake. docs/parity.md has the format.
"""
# ruff: noqa: E402

import contextlib
import hashlib
import json
import math
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Annotated, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import toolbox
from common.cli import NonNegative, Positive, UserError, check_bounds, parse_args, run_command

AUTHORS = ROOT / "docs" / "parity" / "authors"
SCRIPTS = 6  # are tested: their p-values are multiplied by this (Bonferroni)
SHOWN = ("score", "bc_loss", "critic_loss", "q_mean", "actor_q", "q_loss")  # in pictures of several scripts
CHOSEN = {"env_id", "seed", "dataset", "total_steps", "eval_every", "eval_episodes"}  # free in a long run
Points = dict[str, list[float]]  # quantity -> the mean of each interval; of score, what it is at the end


@dataclass
class Args:
    """Our learning curves over the authors'."""

    curves: Annotated[list[Path], tyro.conf.Positional] = field(default_factory=list)  # files; none: all
    seeds: tuple[NonNegative[int], ...] = (0, 1, 2, 3, 4, 5)  # of our runs: trained unless they are kept
    changes: str = ""  # further arguments of the script: a mistake, which the test should find
    intervals: Positive[int] = 1000  # of the file's intervals, train this many, or all there are
    runs: Path | None = None  # take what is long from the run folders in here
    output: Path = ROOT / "docs" / "parity"  # folder of our curves and of the pictures


# === The authors' curves ===
class Curves(NamedTuple):
    """A file of the authors' learning curves."""

    name: str
    script: str
    long: bool  # with scores; too long to be trained here
    data: Path
    conditions: dict  # under which they were made, and ours are: settings, command, sha256, logged_every
    interval: int  # steps that a point is the mean of
    steps: list[int]  # at the ends of the intervals
    authors: dict[str, np.ndarray]  # our name of a quantity -> (seeds, intervals)


def read_curves(path: Path) -> Curves:
    """UserError: the file is not there or damaged, or its data are not those that the authors' code had."""
    try:
        file = json.loads(path.read_text())
        steps, seeds, interval = file["steps"], list(file["seeds"].values()), file["interval"]
        long = any("scores" in seed for seed in seeds)
        rows = {"score": [seed["scores"] for seed in seeds]} if long else {}
        for theirs, ours in file["names"].items():
            match = re.fullmatch(r"(minus )?(\w+)", ours) or re.search(r"()\b(\w+) follows it\b", ours)
            parts = [[seed["losses"][name] for name in theirs.split(" + ")] for seed in seeds]
            if match and match[2] != "q_gradient_abs":  # which our scripts do not log
                rows[match[2]] = (-1 if match[1] else 1) * np.array(parts, dtype=float).sum(1)
        authors = {metric: np.array(row, dtype=float) for metric, row in rows.items()}
        shapes = {row.shape for row in authors.values() if np.isfinite(row).all()}
        if shapes != {(len(seeds), len(steps))} or steps != [interval * (i + 1) for i in range(len(steps))]:
            raise ValueError(f"not every curve has a number at each of {len(steps)} steps {interval} apart")
        data = {"file": file["data"], "sha256": ""} if long else file["data"]
        # A script's learning rates fall over --total-steps, the authors' over a number of their own.
        command = "" if long else file["ours"].replace("--lr-decay-steps", "--total-steps")
        logged_every = min(int(each["logged_every"]) for each in ([file] if long else seeds))
        conditions = {"settings": file["settings"], "command": shlex.join(shlex.split(command))}
        conditions |= {"sha256": data["sha256"], "logged_every": max(logged_every, 1)}
        places = [ROOT / data["file"], path.parent / Path(data["file"]).name]
        place = next((place for place in places if place.exists()), places[0])
        found = "" if long else hashlib.sha256(place.read_bytes()).hexdigest()
        name = file["script"]
    except KeyError as error:
        raise UserError(f"{path} is no file of learning curves: it lacks the field {error}") from error
    except (OSError, ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is of no use: {type(error).__name__}: {error}") from error
    if found != conditions["sha256"]:
        raise UserError(f"{place} is not the data of {path}: its SHA-256 differs")
    return Curves(path.stem, name, long, place, conditions, interval, steps, authors)


# === Our curves ===
def interval_means(folder: Path, curves: Curves, every: int = 1) -> Points:
    """Mean losses of a run over the intervals that it has reached; every: of every such logged step."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    points = {}
    for tag in events.Tags()["scalars"]:
        steps, values = np.array([(event.step, event.value) for event in events.Scalars(tag)]).T
        ends = [end for end in curves.steps if end <= steps[-1]]
        inside = [(end - curves.interval < steps) & (steps <= end) for end in ends]
        points[tag.removeprefix("losses/")] = [values[each][::every].mean().item() for each in inside]
    return points


def train(curves: Curves, seed: int, intervals: int | None = None, changes: str = "") -> Points:
    """A run of the script under the conditions of the file, with further arguments.

    It ends with the last interval, also where --total-steps, to which the learning rates fall, is larger.
    UserError: the script does not take the arguments of the file.
    """
    script = toolbox.load_script(curves.script)
    agent, last_step = toolbox.agent_class(script), curves.steps[:intervals][-1]
    set_step = agent.set_step

    def stop_at_the_end(self, step: int) -> None:
        if step == last_step:
            raise KeyboardInterrupt  # as Ctrl-C does between two steps
        set_step(self, step)

    with tempfile.TemporaryDirectory() as folder:
        words = [*shlex.split(curves.conditions["command"])[2:], *shlex.split(changes), f"--seed={seed}"]
        words += [f"--dataset={curves.data}", "--device=cpu", "--num-threads=1", "--eval-episodes=0"]
        try:
            words += ["--log-every=1", f"--run-dir={folder}"]
            args = parse_args(script.Args, script.TASK_SETTINGS, words)
        except SystemExit as error:  # tyro has said why
            raise UserError(f"{curves.script}.py does not take {shlex.join(words)}") from error
        check_bounds(args)
        with mock.patch.object(agent, "set_step", stop_at_the_end), contextlib.suppress(KeyboardInterrupt):
            script.train(args)
        [run] = Path(folder).iterdir()
        return interval_means(run, curves, curves.conditions["logged_every"])


def read_runs(folder: Path, curves: Curves) -> dict[str, Points]:
    """Seed -> scores, and losses where its events are, of each run of the same script, data and settings."""
    found: dict[str, Points] = {}
    for path in sorted(folder.rglob("config.json")):
        run = toolbox.read_run(path.parent)
        given = {name for name, source in run.sources.items() if source == "given"}
        same = run.script == curves.script and Path(run.args["dataset"] or "").name == curves.data.name
        same = same and run.args["env_id"] in curves.conditions["settings"]
        ends = [end for end in curves.steps if end in (run.evaluations or {})]
        if same and ends and given <= toolbox.WHERE_AND_HOW | CHOSEN:
            scores = [run.evaluations[end] for end in ends]
            found[str(run.args["seed"])] = {"score": scores} | interval_means(path.parent, curves)
    return found


def our_curves(curves: Curves, args: Args) -> dict[str, dict[str, Points]]:
    """Changes ("" for none) -> seed -> its points, as <output>/<name>.json keeps them.

    What the arguments ask for and is not kept yet is trained, or read from run folders.
    """
    path = args.output / f"{curves.name}.json"
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):  # not there, or cut short
        kept = {}
    if kept.get("conditions") != curves.conditions:
        kept = {"conditions": curves.conditions, "curves": {"": {}}}
    seeds, count = kept["curves"].setdefault(args.changes, {}), len(curves.steps[: args.intervals])
    new = read_runs(args.runs, curves) if curves.long and args.runs else {}
    for seed in new if curves.long else map(str, args.seeds):
        has = min(map(len, seeds.get(seed, {"": []}).values()))
        if has < count if not curves.long else has <= len(new[seed]["score"]):
            points = new.get(seed) or train(curves, int(seed), count, args.changes)
            if missing := [] if curves.long else sorted(curves.authors.keys() - points.keys()):
                raise UserError(f"{curves.script}.py does not log {', '.join(missing)}")
            names = [name for name in curves.authors if name in points]
            seeds[seed] = {name: [float(f"{x:.5g}") for x in points[name]] for name in names}
            toolbox.write_output(path, json.dumps(kept, separators=(",", ":")).encode() + b"\n")
    return {changes: found for changes, found in kept["curves"].items() if found}


# === The test ===
def compare(curves: Curves, ours: dict[str, Points]) -> tuple[float, str, float]:
    """The largest standardised difference over all quantities and intervals, its place, and its p-value.

    The difference of the two codes' means is divided by the standard deviation of the seeds of both together.
    p is exact: the share of all ways to divide these seeds into two groups of the same sizes in which the
    largest difference is as large.
    """
    count = min(len(points) for seed in ours.values() for points in seed.values())
    places = [(metric, i) for metric in curves.authors for i in range(count)]
    theirs = np.stack([curves.authors[metric][:, i] for metric, i in places], axis=1)
    seeds = np.vstack([theirs, [[seed[metric][i] for metric, i in places] for seed in ours.values()]])
    seeds = (seeds - seeds.mean(0)) / np.maximum(seeds.std(0, ddof=1), 1e-12)  # (seeds, places)
    groups = np.array(list(combinations(range(len(seeds)), len(theirs))))  # the first is as it is
    shares = np.full((len(groups), len(seeds)), -1 / len(ours))
    np.put_along_axis(shares, groups, 1 / len(theirs), axis=1)
    differences = np.abs(shares @ seeds)  # (ways, places)
    largest = differences.max(1)
    metric, i = places[differences[0].argmax()]
    p = (largest >= largest[0] - 1e-9).mean().item()
    return largest[0].item(), f"`{metric}` at step {curves.steps[i]:,}", p


# === Pictures and tables ===
def draw(panels: list[tuple[Curves, str]], kept: dict[str, dict], columns: int, path: Path) -> None:
    """One axes for each quantity of some curves, row by row: the authors' seeds black, ours red over them."""
    rows = math.ceil(len(panels) / columns)
    plt, size = toolbox.pyplot(), (9, 1.6 * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (curves, metric) in zip(axes.flat, panels, strict=False):
        ours = [seed.get(metric, []) for seed in kept[curves.name].get("", {}).values()]
        for color, width, seeds in (("black", 1.5, curves.authors[metric]), ("tab:red", 0.8, ours)):
            for seed in seeds:
                axis.plot(curves.steps[: len(seed)], seed, ".-", color=color, linewidth=width, markersize=3)
        data = f" on {curves.data.stem}" if curves.long else ""
        axis.set_title(f"{curves.script}{data}\n{metric}", fontsize=8)
        axis.set_xlim(0, curves.steps[-1] * 1.03)
        axis.locator_params(nbins=4)
        axis.ticklabel_format(useOffset=False)
        axis.tick_params(labelsize=6)
    figure.supxlabel("gradient steps", fontsize=8)
    lines = [plt.Line2D([], [], color=color) for color in ("black", "tab:red")]
    names = ["authors' code, each seed", "this repository, each seed"]
    figure.legend(lines, names, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    toolbox.write_output(path, toolbox.png(figure, num_colors=64))


def mean_and_spread(values: np.ndarray) -> str:
    spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
    return f"{values.mean():.4g}{spread} ({len(values)})"


def tables(files: list[Curves], kept: dict[str, dict]) -> list[str]:
    """Lines of Markdown: the test of each script and of its mistakes; the last numbers of both codes."""
    lines = ["| script | mistake | seeds: authors, ours | largest difference | of | p | corrected |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for curves in files:
        for changes, ours in {} if curves.long else kept[curves.name].items():
            (difference, place, p), theirs = compare(curves, ours), next(iter(curves.authors.values()))
            cells = [f"`{curves.script}`", f"`{changes}`" if changes else "", f"{len(theirs)}, {len(ours)}"]
            cells += [f"{difference:.2f}", place, f"{p:.4f}", f"{min(1, SCRIPTS * p):.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| script | quantity | step | authors (seeds) | ours (seeds) |", "|---|---|---|---|---|"]
    for curves in files:
        name = f"`{curves.script}`, `{curves.data.stem}`" if curves.long else f"`{curves.script}`"
        for metric, theirs in curves.authors.items():
            ours = [seed[metric] for seed in kept[curves.name].get("", {}).values() if seed.get(metric)]
            for i in [min(map(len, ours)) - 1] if ours else []:
                cells = [name, f"`{metric}`", f"{curves.steps[i]:,}"]
                cells += map(mean_and_spread, (theirs[:, i], np.array([seed[i] for seed in ours])))
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(args: Args) -> None:
    """Train or read what is not kept yet, draw the pictures, print the tables of docs/parity.md."""
    files = [read_curves(path) for path in args.curves or sorted(AUTHORS.glob("*.json"))]
    toolbox.pyplot()  # fails, if it does, before minutes of training
    kept = {curves.name: our_curves(curves, args) for curves in files}
    short, long = ([curves for curves in files if curves.long == each] for each in (False, True))
    if args.runs and not any(kept[curves.name] for curves in long):
        asked = ", ".join(f"{curves.script} on {curves.data.name}" for curves in long) or "no long curves"
        raise UserError(f"no run in {args.runs} is one to compare with the authors': {asked}")
    for curves in short:
        panels = [(curves, metric) for metric in curves.authors]
        draw(panels, kept, 4 if len(panels) in (4, 7, 8) else 3, args.output / f"{curves.name}.png")
    for name, chosen in {"short": short[1:] and short, "long": long}.items():
        rows = zip(*([metric for metric in SHOWN if metric in each.authors] for each in chosen), strict=False)
        if panels := [(curves, metric) for row in rows for curves, metric in zip(chosen, row, strict=True)]:
            draw(panels, kept, len(chosen), args.output / f"{name}.png")
    print(*tables(files, kept), sep="\n")


if __name__ == "__main__":
    run_command(main, Args)
