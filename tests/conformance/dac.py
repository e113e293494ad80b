"""dac.py against its golden files."""

import re

import numpy as np
import torch
from conformance import jax_formulas
from conformance.files import CPU, LeftOut, arguments, rounded, whole_batch
from conformance.jax_formulas import chain_noise, drawn, fill, make_batch, raw_gradients, traced_sample

import dac

# golden option: argument of dac.py
OPTIONS = {
    "T": "diffusion_steps", "hidden_dims": "hidden_dims", "time_dim": "time_dim", "num_qs": "num_qs",
    "rho": "rho", "num_q_samples": "num_q_samples", "maxQ": "max_q_backup", "max_q_backup": "max_q_backup",
    "Q_guidance": "q_guidance", "eta": "eta", "eta_lr": "eta_lr", "eta_min": "eta_min", "eta_max": "eta_max",
    "bc_threshold": "bc_threshold", "actor_lr": "actor_lr", "critic_lr": "critic_lr",
    "lr_decay_steps": "total_steps", "discount": "gamma", "ema_tau": "tau", "clip_grad_norm": "max_grad_norm",
    "update_ema_every": "actor_target_every", "step_start_ema": "actor_target_start",
    "num_action_samples": "num_action_samples",
}  # fmt: skip
# Options of the official code that dac.py leaves out, with the value that it has built in.
FIXED = {
    "beta_schedule": "vp", "q_tar": "lcb", "sampler": "ddpm", "clip_sampler": True, "temperature": 0,
    "layer_norm": False, "dropout_rate": 0, "action_prior": "normal", "resnet": False,
    "num_last_repeats": 0, "use_guidance_loss": True, "EPS": 1e-6,
}  # fmt: skip
METRICS = {
    "critic_loss": "critic_loss", "qs": "q_mean", "qs_std": "q_std", "actor_loss": "actor_loss",
    "bc_loss": "bc_loss", "guidance_loss": "guidance_loss", "eta": "eta", "Q_norm": "q_norm",
}  # fmt: skip


def make_args(case, overrides):
    options = case.golden.get("other_defaults", {}) | case.golden["config"] | overrides
    return dac.Args(**arguments(options, OPTIONS, FIXED))


def parameters_of(agent, take=lambda parameter: parameter):
    networks = {"actor": agent.actor, "actor_tar": agent.actor_target}
    networks |= {"critic.k{0}": agent.critic, "critic_tar.k{0}": agent.critic_target}
    return jax_formulas.parameters_of(networks, take)


@torch.no_grad()
def make_agent(case, **overrides):
    """The agent of a case, filled by formula; overrides are golden option names."""
    dims = case.golden["dims"]
    agent = dac.DAC(dims["S"], dims["A"], make_args(case, overrides), CPU)

    def shift_of(network):
        return 0.5 * int(network.partition(".k")[2] or 0) + 0.25 * ("_tar" in network)

    fill(parameters_of(agent), shift_of, dims.get("kernel_gain", 1))
    return agent


def make_draws(agent, draws):
    """Draws by meaning, from the entries of one update; what it does not have is drawn."""
    critic = [draw for draw in draws if "critic update" in draw["why"] and draw["kind"] == "normal"]
    denoised = [draw for draw in draws if "denoised" in draw["why"]]
    of = {
        "next_action_noise": [chain_noise(critic)] if critic else [],
        "t": [drawn(draw)[0] for draw in draws if draw["kind"] == "randint"],
        "eps": [drawn(draw)[0] for draw in draws if "noise eps" in draw["why"]],
        "action_noise": [chain_noise(denoised)] if denoised else [],
    }
    assert all(len(found) <= 1 for found in of.values()), "a meaning that occurs twice in one update"
    given = {name: found[0] for name, found in of.items() if found}
    return agent.draw(len(given["t"]) if "t" in given else agent.args.batch_size)._replace(**given)


def compare_update(case, agent, entry, draws, update_number=1):
    """Update the networks that the draws belong to; compare metrics, gradients, parameters and eta."""
    # In float32, gradients of the authors' own code are up to 4e-5 from their double-precision run in a first
    # update; in later updates Adam has amplified the rounding of near-zero gradients.
    later = update_number > 1
    batch = make_batch(case, dac)
    agent.args.batch_size = len(batch.obs)
    for name in ("critic", "actor"):
        if not any(f"{name} update" in draw["why"] for draw in draws):  # then it stays as it is
            agent.optimizers[name].param_groups[0]["lr"].fill_(0)
            if name == "critic":
                agent.args.tau = 0.0
            else:
                agent.actor_tau.fill_(0)
    with raw_gradients(agent) as gradients, whole_batch(agent, make_draws(agent, draws)):
        metrics = agent.update(batch)

    compared = set()
    for name, expected in entry.items():
        if name == "info":
            for metric, value in expected.items():
                if metric in ("Q_grad", "Q_grad_abs"):  # not logged; the gradients of the loss contain them
                    continue
                case.close(metrics[METRICS[metric]], value, metric, 5e-4 if later else 1e-5)
        elif name in METRICS and isinstance(expected, float) and name != "eta":
            case.close(metrics[METRICS[name]], expected, name, 5e-4 if later else 1e-5)
        elif name == "eta_after":
            case.close(agent.eta, expected, name)
        elif name.endswith("_raw_grad_norm"):
            case.close(metrics[name.replace("_raw", "")], expected, name, 5e-3 if later else 1e-5)
        elif name.startswith("raw_grads"):
            actual = parameters_of(agent, lambda parameter: gradients.get(id(parameter)))
            case.same(actual, expected, "gradient of", 5e-3 if later else 2e-4)
        elif isinstance(expected, dict) and all(each.startswith(("actor", "critic")) for each in expected):
            case.same(parameters_of(agent), expected, "parameter", 1e-3)
        else:
            continue
        compared.add(name)
    return compared


def overrides_of(name, entry):
    """The options that an entry of `q_targets` or `variants` sets: its fields, else words of its name."""
    tables = [entry, *(value for value in entry.values() if isinstance(value, dict))]
    known = OPTIONS.keys() | FIXED.keys()
    found = {option: value for option, value in entry.items() if option in known}
    for table in tables[1:]:
        found |= table if table.keys() <= known else {}
    if found:
        return found
    q_target = re.search(r"(?<![a-z_])(rand_convex|convex|min|lcb)(?![a-z_])", name)
    guidance = re.search(r"soft|hard|denoised", name)
    max_q = re.search(r"((?:no|without)[ _]?)?max_?q(?:[ =:]*(false|0))?", name, re.IGNORECASE)
    found |= {"q_tar": q_target[0]} if q_target else {}
    found |= {"Q_guidance": guidance[0]} if guidance else {}
    return found | ({"maxQ": not (max_q[1] or max_q[2])} if max_q else {})


def entries_of(section, name="", draws=()):
    """(name, entry, draws) of every single update or list of updates in a section, however deep."""
    draws = section.get("draws", draws)
    if "info" in section or "steps" in section or section.keys() & METRICS.keys():
        return [(name, section, draws)]
    tables = [(key, value) for key, value in section.items() if isinstance(value, dict)]
    return [leaf for key, value in tables for leaf in entries_of(value, f"{name} {key}", draws)]


check_inputs_follow_their_formulas = jax_formulas.check_inputs_follow_their_formulas


def check_schedule(case):
    schedule = case.golden["schedule"]
    if schedule["name"] != "vp":
        raise LeftOut(f"schedule {schedule['name']}")
    beta, alpha_bar = dac.vp_schedule(schedule["T"])
    case.close(beta, schedule["betas"], "betas", 1e-7)
    case.close(alpha_bar, schedule["alpha_hats"], "alpha_hats", 1e-7)


def check_forward(case):
    forward, agent = case.golden["forward"], make_agent(case)
    obs, action = case.inputs["observations"], case.inputs["actions"]
    for expected in (value for name, value in forward.items() if name.startswith("t=")):
        t = torch.tensor(expected["t"])
        case.close(agent.actor(obs, action, t), expected["actor"], "actor")
        case.close(agent.actor_target(obs, action, t), expected["actor_tar"], "actor_tar")
    case.close(agent.critic(obs, action), forward["critic[H][B]"], "critic")
    case.close(agent.critic_target(obs, action), forward["critic_tar[H][B]"], "critic_tar")
    name = next(name for name in forward if name.startswith("mish"))
    points = rounded([float(number) for number in re.findall(r"-?\d+\.?\d*", name)])
    case.close(dac.mish(points), forward[name], "mish")


def check_add_noise(case):
    expected = case.golden["action_approximation"]
    agent, action, t = make_agent(case), case.inputs["actions"], torch.tensor(expected["t"])
    x_t = dac.add_noise(action, t, drawn(expected["draws"][0])[0], agent.alpha_bar)
    case.close(x_t, expected["noisy_actions"], "noisy actions")
    case.close(agent.actor(case.inputs["observations"], x_t, t), expected["eps_pred"], "predicted noise")


def check_sampler(case):
    agent = make_agent(case)
    for name, expected in case.golden["samplers"].items():
        if re.search(r"ddim|q_guidance|without clip|temperature (?!1\b)", name):
            case.left_out(f"sampler {name}")
            continue
        noise = chain_noise(expected["draws"])
        action, (*inputs, _) = traced_sample(agent, case.inputs["observations"], noise)
        case.close(torch.stack(inputs), [step["x_in"] for step in expected["trace"]], f"{name}: x_t", 1e-4)
        case.close(action, expected["actions"], name, 1e-4)


def check_act(case):
    for name, rows in (("batch", None), ("single", 1)):
        expected = case.golden["sample_actions"][name]
        obs, noise = case.inputs["observations"][:rows], chain_noise(expected["draws"])
        actions = expected.get("actions", expected.get("action"))
        case.close(make_agent(case).act(obs, noise).squeeze(0), actions, f"{name} action", 1e-4)


@torch.no_grad()
def check_candidates(case):
    expected, agent = case.golden["sample_actions"]["detail"], make_agent(case)
    obs, n = case.inputs["observations"], agent.args.num_action_samples
    repeated = obs.repeat_interleave(n, dim=0)
    candidates = agent.sample(agent.actor, repeated, chain_noise(expected["draws"]))
    q = agent.critic_target(repeated, candidates).mean(0).unflatten(0, (len(obs), -1))
    case.close(candidates[:n], expected["candidates_row0"], "candidates", 1e-4)
    case.close(q, expected["q_mean_over_heads"], "q of the candidates")
    assert q.argmax(1).tolist() == expected["argmax"]


def check_guidance_losses(case):
    entries = case.golden["guidance_losses"].items()
    for name, entry in [(name, entry) for name, entry in entries if isinstance(entry, dict)]:
        agent = make_agent(case, Q_guidance=name)
        agent.actor_tau.fill_(agent.args.tau)
        compared = compare_update(case, agent, entry, entry["draws"])
        assert compared >= {"info", "raw_grads", "actor_after"}


def set_learning_rates(agent, step):
    decay = 0.5 * (1 + np.cos(np.pi * min(step / agent.args.total_steps, 1)))
    agent.optimizers["actor"].param_groups[0]["lr"].fill_(agent.args.actor_lr * decay)
    agent.optimizers["critic"].param_groups[0]["lr"].fill_(agent.args.critic_lr * decay)


def run_steps(case, agent, steps, draws):
    for number, entry in enumerate(steps, start=1):
        agent.set_step(entry["n_training_steps_before"])
        set_learning_rates(agent, number - 1)  # the optimizers of the file start at 0
        assert bool(agent.actor_tau > 0) == entry.get("actor_target_updated", agent.actor_tau > 0)
        of_step = [draw for draw in draws if draw["why"].startswith(f"step {number},")]
        compared = compare_update(case, agent, entry, of_step, number)
        assert compared >= {"info", "params_after"}


def check_three_updates(case):
    train = case.golden["train"]
    run_steps(case, make_agent(case), train["steps"], train["draws"])


def check_options(case):
    """Held-back cases try other options: clipping, limits of eta, guidance, targets of the ensemble."""
    sections = [case.golden.get(name, {}) for name in ("q_targets", "variants")]
    for name, entry, draws in [leaf for section in sections for leaf in entries_of(section)]:
        try:
            agent = make_agent(case, **overrides_of(name, entry))
        except LeftOut as option:
            case.left_out(f"{name.strip()} ({option})")
            continue
        if "steps" in entry:
            run_steps(case, agent, entry["steps"], draws)
            continue
        agent.set_step(entry.get("n_training_steps_before", 1005))
        set_learning_rates(agent, 0)
        compared = compare_update(case, agent, entry, draws)
        assert compared, f"nothing in {name} could be compared: {sorted(entry)}"
