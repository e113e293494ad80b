"""Numbers and picture of docs/results/bandits.md: each script in four bandits, an hour on one core.

    python docs/figures/bandits.py                       # docs/results/bandits.png
    python docs/figures/bandits.py --output pictures --seeds 0

It prints the numbers for seeds 0, 1 and 2; the picture is of the first.
"""

from dataclasses import dataclass
from pathlib import Path

import claims
from matplotlib import pyplot as plt

import toolbox
from common.cli import NonNegative, run_command

SCRIPTS = ("diffusion_ql", "dac", "dtql", "edp_td3", "edp_crr", "edp_iql", "qvpo_online")
PATTERNS = ("corners", "8gaussians", "moons", "spiral")


@dataclass
class Args:
    """Every script in every bandit, as in an evaluation, and, as numbers only, the policy alone."""

    output: Path = toolbox.ROOT / "docs" / "results"  # folder for bandits.png
    seeds: tuple[NonNegative[int], ...] = (0, 1, 2)  # of the training; the picture is of the first


def main(args: Args) -> None:
    path = args.output / "bandits.png"
    toolbox.write_output(path, b"")  # fails, if it does, before an hour of training
    claims.use_device("cpu", num_threads=1, matmul_precision="highest")
    figure, panels = claims.grid(len(PATTERNS), len(SCRIPTS))
    [[hidden]] = plt.subplots(squeeze=False)[1]
    for line, pattern in zip(panels, PATTERNS, strict=True):
        task = f"bandit-{pattern}-v0"
        for panel, script in zip(line, SCRIPTS, strict=True):
            agents = [claims.trained(script, task, seed)[1] for seed in args.seeds]
            name, found = f"{script}, {pattern}", [claims.chosen(agent) for agent in agents]
            claims.show(panel, task, f"{name}, as evaluated", found, script)
            claims.show(hidden, task, f"{name}, alone", [claims.chosen(agent, 1) for agent in agents])
    toolbox.write_output(path, toolbox.png(figure, num_colors=96))


if __name__ == "__main__":
    run_command(main, Args)
