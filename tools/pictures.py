"""Draws figures of the papers anew, on the bandits. Each trains its policies first, minutes on one core.

    python tools/pictures.py diffusion_ql_corners           # docs/diffusion_ql_corners.png
    python tools/pictures.py dac_guidance --seed 3 --output pictures
    python tools/pictures.py all

Everything shown is computed here. docs/tools.md lists the figures; some stand on the pages of their scripts.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from evaluate import load_agent
from torch import nn

import toolbox
from common.bandits import BANDITS, Bandit, bandit_reward
from common.datasets import load_dataset
from common.devices import default_threads, use_device
from common.runs import run_command
from common.settings import NonNegative, settings_for
from common.tasks import user_path

LINE = np.linspace(-1, 1, 101)
SURFACE = np.stack(np.meshgrid(LINE, LINE), axis=-1).reshape(-1, 2)  # (101 * 101, 2), y slowly and x fast
SIGMAS = (0.02, 0.1, 0.3, 1.0, 5.0)
CALLS = (5, 15, 1000)
SCRIPTS = ("diffusion_ql", "dac", "dtql", "edp_td3", "edp_crr", "edp_iql", "qvpo_online")
PATTERNS = ("corners", "8gaussians", "moons", "spiral")


@dataclass
class Args:
    """A figure of the pages, or all of them."""

    figure: Annotated[str, tyro.conf.Positional]  # its name (docs/tools.md has them), or all
    output: str = str(toolbox.ROOT / "docs")  # folder for <figure>.png
    seed: NonNegative[int] = 0  # seed of the training


# === Policies ===
def trained(script: str, task: str, seed: int, **changes: object) -> nn.Module:
    """The agent at the end of a run with the task's settings, some of them changed."""
    module = toolbox.load_script(script)
    with tempfile.TemporaryDirectory() as folder:
        changes = dict(run_dir=folder, seed=seed, device="cpu", eval_episodes=0) | changes
        module.train(settings_for(module.Args, module.TASK_SETTINGS, task, **changes))
        [checkpoint] = Path(folder).glob("*/checkpoint.pt")
        return load_agent(checkpoint, "cpu", default_threads())[2]


def chosen(agent: nn.Module) -> np.ndarray:
    """1000 actions (1000, 2) as in an evaluation."""
    torch.manual_seed(0)
    return torch.cat([agent.act(torch.zeros(100, 1)) for _ in range(10)]).numpy()


def samples(agent: nn.Module) -> np.ndarray:
    """1000 actions (1000, 2) of the policy itself, without a choice among candidates."""
    agent.args.num_action_samples = 1
    return chosen(agent)


class FourModes(Bandit):
    """A bandit whose reward is 1 at each of four modes, and 0 away from them."""

    modes = 0.5 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])

    def reward(self, actions: np.ndarray) -> np.ndarray:
        """Of actions (N, 2): (N,)."""
        squared_distance = np.square(actions[:, None] - self.modes).sum(2).min(1)
        return np.exp(-squared_distance / (2 * 0.2**2))


def trained_online(steps: list[int], seed: int, **changes: object) -> dict[int, np.ndarray]:
    """QVPO in FourModes: 1000 actions of the policy itself after each of the steps."""
    qvpo = toolbox.load_script("qvpo_online")
    cheap = dict(total_steps=1000, learning_starts=200, batch_size=64, diffusion_steps=10, tau=0.05)
    cheap |= dict(hidden_dims=(64, 64, 64), num_train_samples=16, actor_lr=1e-3, critic_lr=3e-3)
    args = qvpo.Args(**cheap | dict(entropy_weight=0.1, entropy_weight_min=0.1) | changes)
    torch.manual_seed(seed)
    agent = qvpo.QVPO(1, 2, args, torch.device("cpu"))
    experience = qvpo.Experience(FourModes("four modes"), args, agent.device)
    obs, found = torch.zeros(1, 1), {}
    for step in range(max(steps)):
        agent.set_step(step)
        random = step < args.learning_starts
        experience.step((2 * torch.rand(2) - 1 if random else agent.explore(obs)[0]).numpy())
        if step + 1 >= args.learning_starts:
            agent.update(experience.data)
        if step + 1 in steps:
            noise = torch.randn(args.diffusion_steps, 1000, 1, 2)
            found[step + 1] = agent.candidates(obs, noise)[0][:, 0].numpy()
    return found


@torch.no_grad()
def trust_region_loss(agent: nn.Module, sigma: float, num_noises: int = 50) -> np.ndarray:
    """DTQL's diffusion loss (101, 101) of the actions of SURFACE at one noise level, over the same noises."""
    edm_scalings = toolbox.load_script("dtql").edm_scalings
    actions, sigma = torch.as_tensor(SURFACE, dtype=torch.float32), torch.full((len(SURFACE), 1), sigma)
    loss = 0
    for noise in torch.randn(num_noises, 1, 2, generator=torch.Generator().manual_seed(0)):
        denoised = agent.denoiser(torch.zeros(len(actions), 1), actions + sigma * noise, sigma)
        loss += ((denoised - actions) / edm_scalings(sigma)[1]).square().mean(1) / num_noises
    return loss.view(101, 101).numpy()


def near_best(task: str, actions: np.ndarray) -> float:
    """The share of actions (N, 2) within 0.15 of the best mode."""
    return (np.linalg.norm(actions - BANDITS[task][-1], axis=1) < 0.15).mean()


# === Figures ===
def grid(rows: int, columns: int):
    """A figure and its panels, (rows, columns), for actions in [-1, 1]^2."""
    plt, size = toolbox.pyplot(), (2.3 * columns, 2.5 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat:
        panel.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        panel.tick_params(labelsize=7)
    return figure, panels


def draw_data(panel, task: str, title: str | None = None) -> None:
    """The actions of a bandit, by reward from dark to bright."""
    data = load_dataset(task)
    panel.scatter(*data.actions[:2500].T, s=2, c=data.rewards[:2500], cmap="viridis", linewidths=0)
    panel.set_title(title or task.removeprefix("bandit-").removesuffix("-v0"), fontsize=9)


def draw_policy(panel, task: str, actions: np.ndarray, title: str) -> None:
    """Actions of a policy in red over the data in grey, with their mean reward."""
    panel.scatter(*load_dataset(task).actions[:2500].T, s=1, c="lightgray", linewidths=0)
    panel.scatter(*actions.T, s=3, c="tab:red", alpha=0.5, linewidths=0)
    panel.set_title(f"{title}: {bandit_reward(task, actions).mean():.2f}", fontsize=9)


def bandits(seed: int):
    """Each script on each bandit, as in an evaluation. Prints rows of a table, also of the policy itself."""
    figure, panels = grid(len(PATTERNS), len(SCRIPTS))
    for row, pattern in zip(panels, PATTERNS, strict=True):
        row[0].set_ylabel(pattern)
        for panel, script in zip(row, SCRIPTS, strict=True):
            task, start = f"bandit-{pattern}-v0", time.process_time()
            agent = trained(script, task, seed)
            cells = [f"`{script}.py`", pattern, str(seed), f"{time.process_time() - start:.0f}"]
            actions = chosen(agent)
            draw_policy(panel, task, actions, f"{script}, {near_best(task, actions):.0%} near\nreward")
            for each in (actions, samples(agent)):
                cells += [f"{near_best(task, each):.3f}", f"{bandit_reward(task, each).mean():.3f}"]
            print(f"| {' | '.join(cells)} |")
    return figure


def diffusion_ql_corners(seed: int):
    """Cloning against Q, after the four corners of Diffusion-QL's paper."""
    task, (figure, [panels]) = "bandit-corners-v0", grid(1, 3)
    draw_data(panels[0], task, "data, bright: rewarded")
    for panel, title, changes in zip(panels[1:], ("cloning", "with Q"), (dict(eta=0.0), {}), strict=True):
        agent = trained("diffusion_ql", task, seed, diffusion_steps=5, **changes)  # as many as in the paper
        draw_policy(panel, task, samples(agent), f"{title}, reward")
    return figure


def dtql_trust_region(seed: int):
    """The trust region loss of every action at five noise levels, after DTQL's Figure 1."""
    tasks = ("bandit-25gaussians-v0", "bandit-swissroll-v0")
    figure, panels = grid(len(tasks), 1 + len(SIGMAS))
    for row, task in zip(panels, tasks, strict=True):
        draw_data(row[0], task)
        agent = trained("dtql", task, seed, pretrain_steps=2000, total_steps=1, hidden_dims=(128, 128, 128))
        for panel, sigma in zip(row[1:], SIGMAS, strict=True):
            loss = trust_region_loss(agent, sigma)
            shades = {"cmap": "viridis_r", "vmax": np.quantile(loss, 0.9)}
            panel.imshow(loss, origin="lower", extent=(-1, 1, -1, 1), **shades)
            panel.set_title(f"loss at σ = {sigma:g}", fontsize=9)
    return figure


def dtql_policy(seed: int):
    """Where the one-step policy ends if the centre pays, and if the outside pays; after DTQL's Figure 3."""
    figure, panels = grid(2, 4)
    for row, pattern in zip(panels, ("25gaussians", "swissroll"), strict=True):
        for i, task in enumerate((f"bandit-{pattern}-v0", f"bandit-{pattern}-far-v0")):
            draw_data(row[2 * i], task)
            draw_policy(row[2 * i + 1], task, samples(trained("dtql", task, seed)), "policy, reward")
    return figure


def dac_guidance(seed: int):
    """Soft, hard and denoised guidance over the level curves of Q, after DAC's Figure 2."""
    task, kinds = "bandit-corners-v0", ("soft", "hard", "denoised")
    figure, [panels] = grid(1, 1 + len(kinds))
    draw_data(panels[0], task)
    for panel, kind in zip(panels[1:], kinds, strict=True):
        agent = trained("dac", task, seed, q_guidance=kind)
        with torch.no_grad():
            actions = torch.as_tensor(SURFACE, dtype=torch.float32)
            q = agent.critic_target(torch.zeros(len(actions), 1), actions).mean(0).view(101, 101)
        panel.contour(LINE, LINE, q, levels=8, cmap="viridis", linewidths=0.6)
        draw_policy(panel, task, samples(agent), f"{kind}, reward")
    return figure


def edp_samplers(seed: int):
    """DPM-Solver on a policy of 1000 steps, and DDPM on policies of so many steps as it makes calls."""
    task, (figure, panels) = "bandit-corners-v0", grid(2, 1 + len(CALLS))
    cloning = dict(guidance_weight=0.0, total_steps=4000, hidden_dims=(128, 128, 128), actor_lr=1e-3)
    long = trained("edp_iql", task, seed, diffusion_steps=1000, noise_schedule="linear", **cloning)
    edp = toolbox.load_script("edp_iql")
    draw_data(panels[0, 0], task, "data")
    panels[1, 0].remove()
    for calls, (above, below) in zip(CALLS, panels[:, 1:].T, strict=True):
        long.plan = edp.dpm_solver_plan(long.schedule, calls)
        draw_policy(above, task, samples(long), f"DPM-Solver, {calls} calls\nreward")
        few = dict(diffusion_steps=calls, noise_schedule="vp" if calls < 100 else "linear", sampler="ddpm")
        actions = samples(trained("edp_iql", task, seed, **few, **cloning))
        draw_policy(below, task, actions, f"DDPM, {calls} calls\nreward")
    return figure


def qvpo_entropy(seed: int):
    """Samples of QVPO's policy with the entropy term and without, after its Figure 2."""
    steps = [200, 250, 350, 500, 750, 1000]
    figure, panels = grid(2, len(steps))
    surface = FourModes("four modes").reward(SURFACE).reshape(101, 101)
    kinds = {"with entropy term": {}, "without": dict(num_entropy_samples=0)}
    for row, (name, changes) in zip(panels, kinds.items(), strict=True):
        row[0].set_ylabel(name)
        for panel, (step, actions) in zip(row, trained_online(steps, seed, **changes).items(), strict=True):
            panel.contourf(LINE, LINE, surface, levels=8, cmap="Greys", alpha=0.6)
            panel.scatter(*actions.T, s=3, c="tab:red", alpha=0.5, linewidths=0)
            panel.set_title(f"step {step}", fontsize=9)
    return figure


FIGURES: dict[str, Callable] = {
    each.__name__: each
    for each in (
        diffusion_ql_corners,
        dtql_trust_region,
        dtql_policy,
        dac_guidance,
        edp_samplers,
        qvpo_entropy,
        bandits,
    )
}


# === The command ===
def main(args: Args) -> None:
    toolbox.check_name("figure", args.figure, [*FIGURES, "all"])
    toolbox.pyplot()  # fails, if it does, before minutes of training
    names = list(FIGURES) if args.figure == "all" else [args.figure]
    use_device("cpu", num_threads=1, matmul_precision="highest")
    paths = {name: user_path(args.output) / f"{name}.png" for name in names}
    for path in paths.values():
        toolbox.write_output(path, b"")  # so does this
    for name, path in paths.items():
        picture = toolbox.png(FIGURES[name](args.seed), num_colors=96)
        toolbox.write_output(path, picture)
        print(f"{path}: {len(picture) / 1000:.0f} kB")


if __name__ == "__main__":
    run_command(main, Args)
