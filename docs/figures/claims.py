"""The headline claims of the papers, each shown in minutes on one core of a CPU.

    python docs/figures/claims.py dac_guidance                  # docs/claims/dac_guidance.png; seeds 0 1 2

Each trains what it needs, prints the rows of its table in docs/claims.md, and draws its figure.
"""
# ruff: noqa: E402

import contextlib
import io
import sys
import tempfile
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np
import speed
import torch
import tyro
from matplotlib import pyplot as plt
from torch import nn

import toolbox
from common.bandits import BANDITS, Bandit, bandit_reward
from common.cli import NonNegative, run_command, settings_for
from common.datasets import load_dataset
from common.devices import use_device
from common.envs import make_env
from common.scores import normalized_score, reference_returns
from common.tasks import find_task

CPU = torch.device("cpu")
plt.rcParams |= {"figure.constrained_layout.use": True, "font.size": 8, "axes.titlesize": 9}
SHARE = 1.0  # of all training steps; the tests take fewer
SURFACE = np.stack(np.mgrid[-1:1:101j, -1:1:101j][::-1], axis=-1).reshape(-1, 2)  # (101 * 101, 2), x fast


@dataclass
class Args:
    """One claim, or all of them that take minutes."""

    claim: Annotated[str, tyro.conf.Positional]  # its name (docs/claims.md has them), or all
    output: Path = ROOT / "docs" / "claims"  # folder for <claim>.png
    seeds: tuple[NonNegative[int], ...] = (0, 1, 2)  # of the training


def settings(script: str, task: str, **changes):
    """The script as a module, and its settings for a task, some of them changed."""
    module, changes = toolbox.load_script(script), dict(device="cpu", num_threads=1) | changes
    args = settings_for(module.Args, module.TASK_SETTINGS, task, **changes)
    for name in {"total_steps", "pretrain_steps", "learning_starts", "eval_every"} & vars(args).keys():
        setattr(args, name, max(2, round(SHARE * getattr(args, name))))
    return module, args


def trained(script: str, task: str, seed: int, **changes) -> tuple[list[dict], nn.Module]:
    """The evaluations of a run of the script, in a bandit none, and its agent at the end."""
    changes = ({"eval_episodes": 0} if task in BANDITS else {}) | changes
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        module, args = settings(script, task, seed=seed, run_dir=folder, **changes)
        evaluations = module.train(args)["evaluations"]
        [path] = Path(folder).glob("*/checkpoint.pt")
        state = torch.load(path, weights_only=True)["agent"]
    env = make_env(find_task(task), args)
    agent = toolbox.agent_class(module)(*env.observation_space.shape, *env.action_space.shape, args, CPU)
    agent.load_state_dict(state)
    return evaluations, agent


def chosen(agent: nn.Module, num_samples: int | None = None) -> np.ndarray:
    """1000 actions (1000, 2) in a bandit, each the choice among so many candidates (None: as evaluated)."""
    agent = acting_with(agent, num_action_samples=num_samples or agent.args.num_action_samples)
    torch.manual_seed(0)
    return torch.cat([agent.act(torch.zeros(100, 1)) for _ in range(10)]).numpy()


def acting_with(agent: nn.Module, **changes) -> nn.Module:
    """The same agent with other settings."""
    agent = copy(agent)
    agent.args = replace(agent.args, **changes)
    if "dpm_calls" in changes:
        agent.plan = sys.modules["edp_td3"].dpm_solver_plan(agent.schedule, agent.args.dpm_calls)
    return agent


def row(name: str, digits: int = 2, **columns) -> None:
    """Print numbers of docs/claims.md: of each column the mean over seeds, and the seeds."""
    for key, each in columns.items():
        values = ", ".join(f"{value:.{digits}f}" for value in each)
        name += f" | {key.replace('_', ' ')} {np.mean(each):.{digits}f} ({values})"
    print(name, flush=True)


def grid(rows: int, columns: int, size: float = 1.7):
    """A figure and its panels, (rows, columns), for actions in [-1, 1]^2."""
    shape = (size * columns, (size + 0.25) * rows)
    figure, panels = plt.subplots(rows, columns, figsize=shape, squeeze=False)
    plt.setp(panels, xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=(), yticks=())
    return figure, panels


def curves(*titles: str):
    """A figure and a row of panels for curves."""
    figure, [panels] = plt.subplots(1, len(titles), figsize=(2.8 * len(titles), 2.6), squeeze=False)
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
    return figure, panels


def draw_seeds(panel, x: list, values, color: str = "C3", label: str | None = None) -> None:
    """Curves (seeds, points) thinly, and their mean."""
    panel.plot(x, np.transpose(values), color=color, linewidth=0.7, alpha=0.4)
    panel.plot(x, np.mean(values, axis=0), color=color, linewidth=1.8, marker="o", markersize=3, label=label)
    panel.set_ylim(0, 1.05 * max(np.max(line.get_ydata()) for line in panel.lines))
    if label:
        panel.legend()


def draw(panel, title: str, data: np.ndarray, rewards=None, actions=()) -> None:
    """Actions of the data, grey or bright where they pay, and those of a policy in red."""
    panel.scatter(*data[:2500].T, s=1.5, c="silver" if rewards is None else rewards[:2500], linewidths=0)
    panel.scatter(*np.reshape(actions, (-1, 2)).T, s=3, c="C3", alpha=0.5, linewidths=0)
    panel.set_title(title)


def show(panel, task: str, name: str, found: list[np.ndarray], title: str = "") -> None:
    """Print and draw actions (1000, 2) of several seeds in a bandit; near is within 0.15 of a mode."""
    hits = [np.linalg.norm(each[:, None] - BANDITS[task], axis=2) < 0.15 for each in found]  # (1000, modes)
    modes = [(each.mean(0) > 0.005).sum() for each in hits]
    near = [each.any(1).mean() for each in hits], [each[:, -1].mean() for each in hits]
    rewards = [bandit_reward(task, each).mean() for each in found]
    row(name, near_data=near[0], near_best=near[1], modes=modes, reward=rewards)
    draw(panel, title or name, load_dataset(find_task(task)).actions, actions=found[0])


def speeds(task: str, obs_dim: int, action_dim: int, commands: list[str]):
    """Updates/s and actions/s by tools/speed.py, and, to the first, their ratios."""
    words = [f"{command} --env-id {task}" for command in commands]
    rates = speed.measure(speed.Args(words, obs_dim=obs_dim, action_dim=action_dim))
    figure, panels = curves("updates/s", "actions/s")
    for panel, each in zip(panels, np.transpose(rates), strict=True):  # (2, commands, rounds)
        medians, ratios = np.median(each, axis=1), np.median(each / each[0], axis=1)
        for command, median, ratio in zip(commands, medians, ratios, strict=True):
            print(f"{panel.get_title()} | {command} | {median:.3g} | {ratio:.3g}", flush=True)
        panel.barh(commands, medians, log=bool(medians.max() > 100 * medians.min()))
        panel.invert_yaxis()
    panels[1].set_yticklabels([])
    return figure


def compare(panel, seeds, key: str, script: str, task: str, group: dict[str, dict]) -> dict[str, list]:
    """Learning curves of a script with each of several changes; returns the agents of all seeds."""
    agents = {}
    for i, (name, changes) in enumerate(group.items()):
        runs = [trained(script, task, seed, **changes) for seed in seeds]
        found = np.array([[each[key] for each in evaluations] for evaluations, _ in runs])
        row(name, 1, mean_of_all_evaluations=found.mean(1), last=found[:, -1])
        draw_seeds(panel, [each["step"] for each in runs[0][0]], found, f"C{i}", name)
        agents[name] = [agent for _, agent in runs]
    return agents


def sweep(panel, agents: list, task: str, knob: str, values: tuple, **others) -> None:
    """The mean score of ten episodes over a setting of agents, one of each seed, that only act."""
    scores, evaluate = [], sys.modules[type(agents[0]).__module__].evaluate
    for value in values:
        acting = [acting_with(agent, **others | {knob: value}) for agent in agents]
        envs = [make_env(find_task(task), agents[0].args) for _ in range(10)]
        returns = [evaluate(agent, envs)["returns"] for agent in acting]
        scores.append(normalized_score(np.array(returns), reference_returns(task)).mean(1))
        row(f"{knob} {value}", 1, score=scores[-1])
    draw_seeds(panel, [str(value) for value in values], np.transpose(scores))


# === Diffusion-QL ===
def dql_corners(seeds):
    """A diffusion model keeps all modes of the data, a Gaussian none; Q picks the mode that pays most."""
    task, (figure, [panels]) = "bandit-corners-v0", grid(1, 4, 2.1)
    data = load_dataset(find_task(task))
    draw(panels[0], "data; bright pays", data.actions, data.rewards)
    moments = data.actions.mean(0), np.cov(data.actions.T), 1000  # of the most likely Gaussian
    gaussians = [np.random.default_rng(seed).multivariate_normal(*moments) for seed in seeds]
    show(panels[1], task, "Gaussian", gaussians)
    for panel, name, eta in zip(panels[2:], ("diffusion", "diffusion, Q"), (0.0, 0.3), strict=True):
        agents = [trained("diffusion_ql", task, seed, diffusion_steps=5, eta=eta)[1] for seed in seeds]
        show(panel, task, name, [chosen(agent, 1) for agent in agents])
    return figure


# === EDP ===
def edp_speed(seeds):
    """How training and acting slow down with the number of diffusion steps, Diffusion-QL beside EDP."""
    steps = {"edp_td3": (1000, 100, 50, 15), "diffusion_ql": (1000, 100, 50, 10, 5)}
    commands = [f"{name} --diffusion-steps {count}" for name, counts in steps.items() for count in counts]
    commands.append("edp_td3 --diffusion-steps 1000 --sampler ddpm")
    return speeds("hopper-medium-v2 --num-action-samples 10", 11, 3, commands)


def edp_acting(seeds):
    """RAT and OMS over the training; then what the score depends on when one trained policy acts."""
    knobs = dict(num_action_samples=(1, 2, 5, 10, 50, 200), dpm_calls=(3, 6, 9, 15, 30))
    knobs |= dict(policy_scale=(0.5, 0.75, 1.0, 1.5, 2.0), noise_scale=(0.0, 0.5, 1.0))
    figure, panels = curves("Fig. 3: score", *(f"Fig. {i}: {knob}" for i, knob in enumerate(knobs, start=4)))
    runs = [trained("edp_td3", "hopper-mini-v0", seed, eval_every=1000) for seed in seeds]
    steps = [each["step"] for each in runs[0][0]]
    found = np.array([[each["normalized_score"] for each in evaluations] for evaluations, _ in runs])
    rat = np.array([[each[max(i - 9, 0) : i + 1].mean() for i in range(len(steps))] for each in found])
    draw_seeds(panels[0], steps, np.maximum.accumulate(found, axis=1), "C0", "OMS, the best so far")
    draw_seeds(panels[0], steps, rat, "C3", "RAT, mean of the last ten")
    row("at the end", 1, OMS=found.max(1), RAT=rat[:, -1])
    for panel, (knob, values) in zip(panels[1:], knobs.items(), strict=True):
        alone = dict(num_action_samples=1) if knob == "noise_scale" else {}
        sweep(panel, [agent for _, agent in runs], "hopper-mini-v0", knob, values, **alone)
    return figure


# === DTQL ===
def dtql_speed(seeds):
    """How fast DTQL trains and acts beside Diffusion-QL and EDP, at equal settings and as published."""
    changes = ("", "--batch-size 256", "--num-action-samples 50", "--num-action-samples 1")
    commands = ["diffusion_ql", "edp_td3", *(f"dtql {each}".strip() for each in changes)]
    return speeds("antmaze-umaze-v0", 29, 8, commands)


@cache
def prepared(task: str, seed: int) -> nn.Module:
    """DTQL's denoiser and critics after their pretraining in a bandit."""
    changes = dict(pretrain_steps=3000, total_steps=1, batch_size=256, hidden_dims=(128, 128, 128))
    return trained("dtql", task, seed, **changes)[1]


def dtql_trust_region(seeds):
    """The trust region loss of every action at five noise levels, but for a factor 1 / c_out^2."""
    figure, panels = grid(2, 6)
    actions, noises = torch.as_tensor(SURFACE, dtype=torch.float32), torch.randn(20, 1, 2)
    for line, pattern in zip(panels, ("8gaussians", "swissroll"), strict=True):
        task, obs = f"bandit-{pattern}-v0", torch.zeros(len(actions), 1)
        denoiser = deepcopy(prepared(task, seeds[0]).denoiser).requires_grad_(False)
        draw(line[0], "data", load_dataset(find_task(task)).actions)
        for panel, sigma in zip(line[1:], (0.02, 0.1, 0.3, 1.0, 5.0), strict=True):
            noisy = [(actions + sigma * noise, torch.full_like(obs, sigma)) for noise in noises]
            loss = sum((denoiser(obs, *each) - actions).square().mean(1) for each in noisy)  # (101 * 101,)
            shades = {"cmap": "viridis_r", "vmax": loss.quantile(0.9)}
            panel.imshow(loss.view(101, 101), origin="lower", extent=(-1, 1, -1, 1), **shades)
            panel.set_title(f"loss, σ = {sigma:g}")
    return figure


def one_step_policy(agent: nn.Module, kind: str, seed: int, q_weight: float, steps=3000) -> np.ndarray:
    """1000 actions of a one-step policy a(z), z ~ N(0, I), learned beside a prepared DTQL agent.

    It is a denoiser's network that sees only noise, so it can have several modes. Its loss but for Q:
    trust  DTQL's diffusion loss of a
    kl     has the gradient of KL(policy || data) for noisy actions x = a + sigma z: the difference
           (D_own(x) - D(x)) / c_out^2 of two denoisers; D_own learns from the policy's actions as D from data
    """
    dtql, obs, own = sys.modules["dtql"], torch.zeros(agent.args.batch_size, 1), deepcopy(agent)
    torch.manual_seed(seed)
    policy = dtql.DTQLDenoiser(1, 2, agent.args.time_dim, agent.args.hidden_dims)
    adam = torch.optim.Adam(policy.parameters(), lr=1e-3)
    adam_own = torch.optim.Adam(own.denoiser.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(max(2, round(SHARE * steps))):
        z = torch.randn(len(obs), 2)
        action = (z + policy.network(obs, z, obs)).tanh()  # (batch, 2)
        sigma, noise = agent.draw_noise(len(obs))
        if kind == "trust":
            loss = agent.diffusion_loss(action, obs, sigma, noise)
        else:
            adam_own.zero_grad()
            own.diffusion_loss(action.detach(), obs, *agent.draw_noise(len(obs))).backward()
            adam_own.step()
            with torch.no_grad():
                x, level = action + sigma[:, None] * noise, sigma[:, None]
                gradient = own.denoiser(obs, x, level) - agent.denoiser(obs, x, level)  # (batch, 2)
            loss = (gradient / dtql.edm_scalings(level)[1] ** 2 * action).mean()
        adam.zero_grad()
        (loss - q_weight * agent.critic(obs, action).amin(0).mean()).backward(inputs=[*policy.parameters()])
        adam.step()
        decay.step()
    obs, z = torch.zeros(1000, 1), torch.randn(1000, 2)
    return (z + policy.network(obs, z, obs)).tanh().detach().numpy()


def dtql_kl(seeds):
    """The trust region loss seeks modes of the data, a KL divergence covers them; without Q and with it."""
    figure, panels = grid(2, 5)
    pairs = [("8gaussians", 0.0), ("8gaussians", 0.05), ("swissroll", 0.0), ("swissroll", 0.05)]
    for column, (pattern, q_weight) in zip(panels.T, [*pairs, ("swissroll-far", 0.05)], strict=True):
        task = f"bandit-{pattern}-v0"
        for panel, kind in zip(column, ("kl", "trust"), strict=True):
            found = [one_step_policy(prepared(task, seed), kind, seed, q_weight) for seed in seeds]
            show(panel, task, f"{kind}, {pattern}{', Q' if q_weight else ''}", found)
    return figure


# === DAC ===
def dac_guidance(seeds):
    """Soft guidance raises the reward and stays in the data, hard and denoised guidance leave it."""
    random, (figure, [panels]) = np.random.default_rng(0), grid(1, 5)
    centres, peak = np.array([(-0.6, -0.5), (0.6, -0.5), (0.0, 0.6)]), np.array((0.0, -0.9))
    actions = random.normal(centres[random.integers(3, size=10_000)], 0.08).clip(-1, 1)
    columns = np.zeros((10_000, 1)), actions, -5 * np.linalg.norm(actions - peak, axis=1)
    draw(panels[0], "data; bright pays", *columns[1:])
    points, found = torch.as_tensor(SURFACE, dtype=torch.float32), {}
    for panel, kind in zip(panels[1:], ("none", "soft", "hard", "denoised"), strict=True):
        for seed in seeds:
            module, args = settings("dac", "bandit-corners-v0", q_guidance=kind, eta=0.3, total_steps=2000)
            torch.manual_seed(seed)
            data = [torch.as_tensor(each, dtype=torch.float32) for each in columns]
            data = module.Batch(*data, next_obs=data[0], terminal=torch.ones(10_000))
            agent = module.DAC(1, 2, args, CPU)
            for step in range(args.total_steps):
                agent.set_step(step)
                agent.update(data)
            found[seed] = chosen(agent, 1)
        rewards = [-5 * np.linalg.norm(each - peak, axis=1).mean() for each in found.values()]
        gaps = [[np.linalg.norm(actions - each, axis=1).min() for each in some] for some in found.values()]
        row(kind, reward=rewards, outside=(np.array(gaps) > 0.1).mean(1))
        q = agent.critic_target(torch.zeros(len(points), 1), points).mean(0).view(101, 101).detach()
        panel.contour(q, levels=8, linewidths=0.6, extent=(-1, 1, -1, 1))
        draw(panel, kind, actions, actions=found[seeds[-1]])
    return figure


def dac_speed(seeds):
    """Training with soft guidance beside denoised, with ten next actions, as published, and with one."""
    commands = [f"dac --num-q-samples {n} --q-guidance {g}" for n in (10, 1) for g in ("denoised", "soft")]
    return speeds("hopper-medium-v2", 11, 3, commands)


def dac_ensemble(seeds):
    """DAC's guidance, number of critics, and candidates when acting, in a hopper."""
    task, (figure, panels) = "hopper-mini-v0", curves("guidance", "critics", "candidates when acting")
    run = partial(compare, seeds=seeds, key="normalized_score", script="dac", task=task)
    kinds = ("soft", "hard", "denoised", "none")
    agents = run(panels[0], group={kind: dict(eval_every=1000, q_guidance=kind) for kind in kinds})
    run(panels[1], group={f"H = {count}": dict(eval_every=1000, num_qs=count) for count in (1, 2, 5, 10)})
    sweep(panels[2], agents["soft"], task, "num_action_samples", (1, 2, 5, 10, 20, 50))
    return figure


# === QVPO ===
class FourModes(Bandit):
    """A bandit that pays 1 at each of four modes, and 0 away from them."""

    modes = 0.5 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])

    def reward(self, actions: np.ndarray) -> np.ndarray:
        return np.exp(-np.square(actions[:, None] - self.modes).sum(2).min(1) / (2 * 0.2**2))  # (N,)

    def step(self, action: np.ndarray) -> tuple:
        return np.zeros(1, np.float32), self.reward(action[None]).item(), True, False, {}


def trained_online(steps: list[int], seed: int, **changes) -> list[np.ndarray]:
    """QVPO in FourModes: 1000 actions of the policy itself after each of the steps."""
    qvpo, obs, found = toolbox.load_script("qvpo_online"), torch.zeros(1, 1), []
    cheap = dict(total_steps=1000, learning_starts=200, batch_size=64, diffusion_steps=10, tau=0.05)
    cheap |= dict(hidden_dims=(64, 64, 64), num_train_samples=16, actor_lr=1e-3, critic_lr=3e-3)
    args = qvpo.Args(**cheap | dict(entropy_weight=0.1, entropy_weight_min=0.1) | changes)
    torch.manual_seed(seed)
    agent = qvpo.QVPO(1, 2, args, CPU)
    experience = qvpo.Experience(FourModes("four modes"), args, CPU)
    for step in range(1, max(steps) + 1):
        agent.set_step(step - 1)
        action = agent.explore(obs)[0] if step > args.learning_starts else 2 * torch.rand(2) - 1
        experience.step(action.numpy())
        if step >= args.learning_starts:
            agent.update(experience.data)
        if step in steps:
            noise = torch.randn(args.diffusion_steps, 1000, 1, 2)
            found.append(agent.candidates(obs, noise)[0][:, 0].numpy())
    return found


def qvpo_entropy(seeds):
    """Samples of QVPO's policy with the entropy term and without."""
    steps = [round(max(SHARE, 0.02) * step) for step in (200, 250, 350, 500, 750, 1000)]
    figure, panels = grid(2, len(steps))
    surface = FourModes("four modes").reward(SURFACE).reshape(101, 101)
    for line, name, count in zip(panels, ("with entropy term", "without"), (10, 0), strict=True):
        runs = [trained_online(steps, seed, num_entropy_samples=count) for seed in seeds]
        distances = [np.linalg.norm(run[-1][:, None] - FourModes.modes, axis=2) for run in runs]
        modes = [((each < 0.3).mean(0) > 0.005).sum() for each in distances]
        row(name, modes=modes, deviation=[run[-1].std(0).mean() for run in runs])
        line[0].set_ylabel(name)
        for panel, step, actions in zip(line, steps, runs[0], strict=True):
            panel.contourf(surface, levels=8, cmap="Greys", alpha=0.6, extent=(-1, 1, -1, 1))
            draw(panel, f"step {step}", actions[:0], actions=actions)
    return figure


def qvpo_ablations(seeds):
    """QVPO's entropy term, diffusion steps and numbers of candidates, balancing a pendulum. 2.5 hours."""
    figure, panels = curves("Fig. 4: T, N_e", "Fig. 5: K_b, K_t")
    run = partial(compare, seeds=seeds, key="return_mean", script="qvpo_online", task="InvertedPendulum-v5")
    cheap, pairs = partial(dict, batch_size=64, diffusion_steps=5), [(t, n) for t in (5, 20) for n in (10, 0)]
    run(panels[0], group={f"{t}, {n}": cheap(diffusion_steps=t, num_entropy_samples=n) for t, n in pairs})
    pairs = (4, 4), (4, 2), (1, 1), (20, 2)
    run(panels[1], group={f"{b}, {t}": cheap(num_behavior_samples=b, num_target_samples=t) for b, t in pairs})
    return figure


def qvpo_hopper(seeds):
    """QVPO's recorded runs in Hopper (docs/qvpo_online.md), beside SAC, trained here. An hour per seed."""
    import stable_baselines3 as sb3

    task, (figure, [panel]), scores = "Hopper-v4", curves("score in Hopper-v4"), []
    for folder in sorted(ROOT.glob(f"docs/results/qvpo/{task}__*")):
        found = toolbox.read_run(folder).evaluations
        draw_seeds(panel, [*found], [[*found.values()]], "C0", "QVPO")
    steps = [max(2, round(SHARE * 10_000)) * i for i in range(1, 21)]
    for seed in seeds:
        env, to_score = (make_env(find_task(task), settings("qvpo_online", task)[1]) for _ in range(2))
        model = sb3.SAC("MlpPolicy", env, seed=seed, learning_starts=10_000, device="cpu")
        learn = partial(model.learn, steps[0], reset_num_timesteps=False)
        evaluate = partial(sb3.common.evaluation.evaluate_policy, env=to_score, warn=False)
        returns = np.array([evaluate(learn())[0] for _ in steps])
        scores.append(normalized_score(returns, reference_returns(task)))
    row("SAC", 1, mean_of_all_evaluations=np.mean(scores, axis=1), last=np.array(scores)[:, -1])
    draw_seeds(panel, steps, scores, "C1", "SAC")
    return figure


MINUTES = (dql_corners, edp_speed, edp_acting, dtql_speed, dtql_trust_region, dtql_kl)
MINUTES += (dac_guidance, dac_speed, dac_ensemble, qvpo_entropy)
CLAIMS = {each.__name__: each for each in (*MINUTES, qvpo_ablations, qvpo_hopper)}


def main(args: Args) -> None:
    toolbox.check_name("claim", args.claim, [*CLAIMS, "all"])
    use_device("cpu", num_threads=1, matmul_precision="highest")
    names = [each.__name__ for each in MINUTES] if args.claim == "all" else [args.claim]
    for name in names:  # fails, if it does, before minutes of training
        toolbox.write_output(args.output / f"{name}.png", b"")
    for name in names:
        picture = toolbox.png(CLAIMS[name](args.seeds), num_colors=64)
        toolbox.write_output(args.output / f"{name}.png", picture)
        print(f"{args.output / name}.png: {len(picture) / 1000:.0f} kB")


if __name__ == "__main__":
    run_command(main, Args)
