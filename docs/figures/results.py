"""Figures and tables (printed) of docs/results/README.md, from the runs recorded beside it, in seconds.

Folders of runs: <panel><script>__<seed>; <panel><script>__cloning__<seed> has no Q.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import toolbox  # noqa: E402
from common.cli import UserError, run_command  # noqa: E402

HOPPER = {f"hopper/hopper-{x}__": f"Hopper, {x}" for x in ("medium", "medium-replay", "medium-expert")}
CHEETAH = {f"halfcheetah/halfcheetah-{x}__": f"HalfCheetah, {x}" for x in ("medium", "medium-replay")}
ONLINE = {"qvpo/Hopper-v4__": "Hopper-v4, online", "qvpo/HalfCheetah-v4__": "HalfCheetah-v4, online"}
PANELS = HOPPER | CHEETAH | {"mini/": "hopper-mini-v0"}
LINES = {"diffusion_ql": "o-", "dac": "s-", "dtql": "D-", "edp_td3": "^:", "edp_crr": "v--", "edp_iql": "x:"}


@dataclass
class Args:
    """Figures and tables of docs/results/README.md."""

    folder: Path = toolbox.ROOT / "docs" / "results"  # has the runs, and gets the figures


def find(folder: Path, panel: str) -> dict[str, tuple[toolbox.RecordedRun, np.ndarray]]:
    """A run and the scores (evaluations, seeds) of each; dac's have tau = 0.02 in Hopper. UserError: none."""
    runs = {}
    for path in sorted(folder.glob(f"{panel}*[0-9]")):
        name = path.relative_to(folder).as_posix().removeprefix(panel).rpartition("__")[0] or "qvpo_online"
        runs.setdefault(name.replace("dac__tau", "dac"), []).append(toolbox.read_run(path))
    if not runs:
        raise UserError(f"there is no run {folder / panel}...")
    return {k: (v[0], np.array([[*run.evaluations.values()] for run in v]).T) for k, v in runs.items()}


def table(rows: list[list[str]]) -> str:
    """Markdown, headings first."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def of_last(folder: Path) -> str:
    """Table of the means of the last evaluations, and of how many seeds; the mean of the data."""
    rows = [["recording", "data", "cloning", *LINES]]
    for panel, title in PANELS.items():
        found = find(folder, panel)
        cells = {name: f"{scores[-1].mean():.1f} ({scores.shape[1]})" for name, (_, scores) in found.items()}
        cloning = ", ".join(cells[f"{name}__cloning"] for name in LINES if f"{name}__cloning" in cells)
        data = f"{found['dtql'][0].data_score:.1f}"
        rows.append([title, data, cloning, *(cells.get(name, "") for name in LINES)])
    return table(rows)


def of_controls(folder: Path) -> str:
    """Table of what choosing and what learning is worth, in 100 fresh episodes of each of three seeds."""
    rows = [["script", "choosing", "one sample", "cloning, choosing", "cloning, one sample"]]
    fresh = json.loads((folder / "mini" / "fresh.json").read_text())  # run -> score: its choice, one sample
    for script in LINES:
        found = [[fresh.get(f"{script}{x}__{i}", [np.nan] * 2) for i in range(3)] for x in ("", "__cloning")]
        rows.append([script, *(f"{mean:.1f}".replace("nan", "") for mean in np.mean(found, axis=1).flat)])
    return table(rows)


def bars(ax, found: dict) -> None:
    """Of each script the last evaluations: seeds as points, their mean as a bar, that of cloning dotted."""
    for i, script in enumerate(LINES):
        if script in found:
            run, [*_, scores] = found[script]
            hatch = "" if run.sources["tau"] == "default" else "//"  # settings chosen by a score: README.md
            ax.bar(i, scores.mean(), color=toolbox.COLORS[script], hatch=hatch, edgecolor="white")
            ax.plot([i] * len(scores), scores, "o", color="white", mec="black", ms=4, label="a seed")
            ax.text(i, -9, f"n={len(scores)}", ha="center", fontsize=8)
            if cloning := found.get("edp_td3__cloning" if "edp" in script else f"{script}__cloning"):
                ax.hlines(cloning[1][-1].mean(), i - 0.4, i + 0.4, "black", ":", label="cloning")
    ax.set_xticks(range(len(LINES)), [script.replace("_", "\n") for script in LINES], fontsize=7)
    ax.set_ylim(-13, 112)


def curves(ax, found: dict) -> None:
    """Of each script all evaluations: the mean of the seeds, and thinly each of several."""
    for script in [name for name in toolbox.COLORS if name in found]:
        run, scores = found[script]
        look = {"color": toolbox.COLORS[script], "ms": 4}
        ax.plot([*run.evaluations], scores.mean(1), LINES.get(script, "-"), label=script, **look)
        ax.plot([*run.evaluations], scores, linewidth=0.5 * (scores.shape[1] > 1), **look)
    ax.locator_params(axis="x", nbins=4)
    ax.set_xlabel("steps")


def draw(path: Path, folder: Path, panels: dict[str, str], panel=curves, rows: int = 1) -> None:
    """A picture with a panel for each recording, all of the same scale."""
    width, options = len(panels) // rows, {"sharex": True, "sharey": True, "layout": "constrained"}
    size = (1 + 2.7 * width, 1 + 2.5 * rows)
    figure, axes = toolbox.pyplot().subplots(rows, width, figsize=size, **options)
    for ax, (name, title) in zip(axes.flat, panels.items(), strict=True):
        panel(ax, found := find(folder, name))
        ax.set_title(title, fontsize=10)
        if data := next(iter(found.values()))[0].data_score:
            ax.axhline(data, color="black", linestyle="--", linewidth=1, label="mean episode of the data")
    shown = dict(zip(*axes.flat[-1].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=4, fontsize=8)
    figure.supylabel("normalized score", fontsize=9)
    toolbox.write_output(path, toolbox.png(figure, num_colors=64))


def main(args: Args) -> None:
    print(of_last(args.folder), of_controls(args.folder), sep="\n\n")
    draw(args.folder / "scores.png", args.folder, PANELS, bars, rows=2)
    for name, panels in {"hopper": HOPPER, "halfcheetah": CHEETAH, "qvpo": ONLINE}.items():
        draw(args.folder / name / "curves.png", args.folder, panels)


if __name__ == "__main__":
    run_command(main, Args)
