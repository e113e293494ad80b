"""diffusion_ql.py against its golden files.

Most of their numbers are of a float32 run, for a check in either precision. The double-precision run keeps
the noise schedule in float32; with its coefficients ours agrees to 1e-9, with our own to 1e-6.
"""

import re

import numpy as np
import torch
from conformance import torch_formulas
from conformance.files import CPU, arguments, tensors_of, units, whole_batch
from conformance.torch_formulas import choosing, chosen, drawn, fill, make_batch, uniforms

import diffusion_ql

# golden option: argument of diffusion_ql.py
OPTIONS = {
    "T": "diffusion_steps", "eta": "eta", "max_q_backup": "max_q_backup", "grad_norm": "max_grad_norm",
    "lr": "actor_lr", "critic_lr": "critic_lr", "lr_decay": "lr_decay", "lr_maxt": "total_steps",
    "discount": "gamma", "tau": "tau", "step_start_ema": "actor_target_start",
    "update_ema_every": "actor_target_every",
}  # fmt: skip
SIZES = {"B", "S", "A", "step0", "strong_gain", "strong_clip"}  # used elsewhere; step0 is also in every step
CHAINS = {"actor": "of the actor chain", "actor_target": "of the ema_model"}
NETWORKS = {
    "actor": "actor", "ema_model": "actor_target", "critic": "critic", "critic_target": "critic_target",
}  # fmt: skip

# What a float32 number may be off, relative to 1 + |number|, in either precision; behind it the largest error
# in single precision over the instruction sets of PyTorch, MKL and oneDNN, 1 and 2 threads, on an AMD EPYC.
# The largest number in a chain is x_T / sqrt(alpha_bar_T), 12 x_T, up to 1.3; it is clipped only then.
NUMBER = units(1.3 / diffusion_ql.vp_schedule(5).alpha_bar[-1] ** 0.5)  # 7.7e-6
LATER_NUMBER = 1e-4  # 1.6e-5, in the second and third update
GRADIENT = 2e-4  # 5.3e-6
PARAMETER = 1e-3  # 7.7e-5: Adam moves a weight whose gradient is all rounding either way


def make_args(case, **overrides):
    config = dict(case.golden["meta"]["config"])
    built_in = {"beta_schedule": "vp", "max_action": 1, "ema_decay": 1 - config["tau"]}
    return diffusion_ql.Args(**arguments(config, OPTIONS, built_in, SIZES) | overrides)


def parameters_of(case, agent, authors_name, take=lambda parameter: parameter):
    """Golden name -> tensor in the layout [out, in]; take(parameter) may give its gradient instead."""
    tensors = tensors_of(getattr(agent, NETWORKS[authors_name]), take)
    names = [name for name, _ in case.golden["params"][authors_name]]
    return dict(zip(names, tensors, strict=True))


@torch.no_grad()
def make_agent(case, gain=1.0, **overrides):
    """The agent of a case, filled by formula; gain multiplies the weights."""
    config = case.golden["meta"]["config"]
    agent = diffusion_ql.DiffusionQL(config["S"], config["A"], make_args(case, **overrides), CPU)
    for ours in NETWORKS.values():
        fill(tensors_of(getattr(agent, ours)), ours.endswith("_target"), gain)
    return agent


def chain_noise(draws, network):
    """(T, rows, action_dim): x_T, then the noise of each step but the last, which is not used."""
    of_chain = [draw for draw in draws if CHAINS[network] in draw["why"]]
    return torch.stack([drawn(draw) for draw in of_chain[:-1]]) if of_chain else torch.empty(0)


def make_draws(draws):
    """Draws by meaning, from the entries of one update; what they do not have is left empty."""

    def found(words):
        return next((drawn(draw) for draw in draws if words in draw["why"]), torch.empty(0))

    return diffusion_ql.Draws(
        next_action_noise=chain_noise(draws, "actor_target"),
        t=found("timestep") + 1,
        eps=found("noise eps"),
        action_noise=chain_noise(draws, "actor"),
        member=(found("coin") <= 0.5).long().view(-1),
    )


def near(case, actual, expected, name):
    case.near(actual, expected, name, NUMBER)


def check_fill_and_inputs(case):
    torch_formulas.compare_batch(case, make_batch(case, diffusion_ql))
    agent = make_agent(case)
    for authors_name, tensors in case.golden["params_filled"].items():
        case.same(parameters_of(case, agent, authors_name), tensors, authors_name)


def check_schedule(case):
    for key, tables in case.golden["schedule"].items():
        name, num_steps = re.fullmatch(r"(\w+)_T(\d+)", key).groups()
        if name != "vp":
            case.left_out(f"schedules {', '.join(tables)}" if "betas" not in tables else f"schedule {name}")
            continue
        schedule = diffusion_ql.vp_schedule(int(num_steps))
        case.close(schedule.beta[1:], tables["betas"], "betas", 1e-7, 1e-7)
        case.close(schedule.alpha_bar[1:], tables["alphas_cumprod"], "alphas_cumprod", 1e-7, 1e-7)
        variance = np.square(diffusion_ql.posterior_std(schedule))
        case.close(variance[1:], tables["posterior_variance"], "posterior variance", 1e-6, 1e-6)


def check_forward(case):
    for expected in (case.golden["forward"], case.golden["sections"].get("forward_strong", {})):
        agent, batch = make_agent(case, expected.get("gain", 1.0)), make_batch(case, diffusion_ql)
        q = agent.critic(batch.obs, batch.action)
        target_q = agent.critic_target(batch.obs, batch.action)
        t = torch.tensor(expected.get("t", [0])) + 1
        actual = {
            "noise_net": agent.actor(batch.obs, batch.action, t),
            "noise_net_ema": agent.actor_target(batch.obs, batch.action, t),
            "q1": q[0], "q2": q[1], "q_min": q.amin(0), "q1_target": target_q[0], "q2_target": target_q[1],
        }  # fmt: skip
        for name in expected.keys() & actual.keys():
            near(case, actual[name], expected[name], name)
    if "chain_actor_action" in expected:
        noise = chain_noise(case.golden["sections"]["chain_actor"]["draws"], "actor")
        action = agent.sample(agent.actor, batch.obs, noise)
        near(case, action, expected["chain_actor_action"], "strong chain")


def check_chains(case):
    sections, agent, batch = case.golden["sections"], make_agent(case), make_batch(case, diffusion_ql)
    chains = {"chain_actor": ("actor", batch.obs), "chain_ema": ("actor_target", batch.next_obs)}
    for name, (network, obs) in chains.items():
        expected, actor, seen = sections[name], getattr(agent, network), []
        hook = actor.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[1]))
        action = agent.sample(actor, obs, chain_noise(expected["draws"], network))
        hook.remove()
        near(case, torch.stack([x[0] for x in [*seen, action]]), expected["chain_row0"], f"{name}, row 0")
        near(case, action, expected["action"], name)


def check_max_q_backup(case):
    expected, batch = case.golden["sections"]["max_q_backup_targets"], make_batch(case, diffusion_ql)
    agent = make_agent(case, max_q_backup=True)
    n = agent.num_next_actions
    next_obs = batch.next_obs.repeat_interleave(n, dim=0)
    action = agent.sample(agent.actor_target, next_obs, chain_noise(expected["draws"], "actor_target"))
    q = agent.critic_target(next_obs, action).unflatten(1, (-1, n)).amax(2)
    near(case, action[:3], expected["action_first3"], "actions")
    near(case, q[0], expected["q1_max"], "best of Q1")
    near(case, q[1], expected["q2_max"], "best of Q2")
    near(case, q.amin(0), expected["target_before_bellman"], "their minimum")


def near_gradients(case, agent, loss, expected):
    parameters = list(agent.actor.parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
    of_actor = parameters_of(case, agent, "actor", gradients.get)
    case.same(of_actor, {name: expected[name] for name in of_actor}, "gradient of", NUMBER, NUMBER)


def check_actor_losses(case):
    sections, batch = case.golden["sections"], make_batch(case, diffusion_ql)
    bc_loss = sections["bc_loss"]
    for member, name in enumerate(("q_loss_use_q1", "q_loss_use_q2")):
        q_loss, agent = sections[name], make_agent(case)
        draws = make_draws(bc_loss["draws"] + q_loss["draws"])._replace(member=torch.tensor([member]))
        _, metrics = agent.actor_loss(batch, draws)
        near(case, metrics["q_loss"], q_loss["q_loss"], name)
        near_gradients(case, agent, metrics["q_loss"], q_loss["actor_grads"])
        near(case, metrics["bc_loss"], bc_loss["loss"], "BC loss")
        near_gradients(case, agent, metrics["bc_loss"], bc_loss["grads"])


def check_act(case):
    expected = case.golden["sections"]["eval_action"]
    agent = make_agent(case, num_action_samples=len(expected["q_min_target"]))
    shape = [agent.args.num_action_samples, agent.action_dim]
    normals = [{"kind": "normal", "n": n, "shape": shape} for n in range(agent.args.diffusion_steps)]
    noise = torch.stack([drawn(draw) for draw in normals])
    with choosing(uniforms(0, 1).item()) as seen:
        action = agent.act(make_batch(case, diffusion_ql).obs[:1], noise)
    near(case, seen[0][0], expected["probs"], "probabilities of the candidates")
    near(case, action[0], expected["action"], "action")
    for u, index in expected["index_for_other_u"].items():
        assert chosen(seen[0][0], float(u)) == index


def run_updates(case, agent, draws, steps):
    """Updates on the batch of the file, with its draws; in single precision each of them is compared."""
    batch, losses = make_batch(case, diffusion_ql), []
    for number, entry in enumerate(steps, start=1):
        agent.set_step(entry.get("agent_step_before", 0))
        assert bool(agent.actor_tau > 0) == entry.get("ema_updated", agent.actor_tau > 0)
        for name in ("actor", "critic"):  # the authors' schedulers stand still within a call of train()
            if f"{name}_lr" in entry:
                agent.optimizers[name].param_groups[0]["lr"].fill_(entry[f"{name}_lr"])
        agent.args.max_grad_norm = entry.get("grad_norm_limit", agent.args.max_grad_norm)
        of_step = make_draws([draw for draw in draws if draw["step"] == number])
        with whole_batch(agent, of_step):
            metrics = agent.update(batch)
        losses.append({name: metric.item() for name, metric in metrics.items()})
        if not case.double:
            compare_update(case, agent, entry, metrics, LATER_NUMBER if number > 1 else NUMBER)
    return losses


def compare_update(case, agent, entry, metrics, tolerance):
    for name in entry.keys() & metrics.keys():
        case.close(metrics[name], entry[name], name, tolerance)
    for authors_name in ("actor", "critic"):
        gradients = parameters_of(case, agent, authors_name, lambda parameter: parameter.grad)
        case.same(gradients, entry.get(f"{authors_name}_grads_after_clip", {}), "gradient of", GRADIENT)
    compare_parameters(case, agent, entry.get("params_after", {}))


def compare_parameters(case, agent, networks, double_tolerance=1e-9):
    for authors_name, tensors in networks.items():
        parameters = parameters_of(case, agent, authors_name)
        case.same(parameters, tensors, authors_name, PARAMETER, double_tolerance)


def check_updates(case):
    compare_updates(case, 1e-6)
    with torch_formulas.rounded_tables(case, diffusion_ql):
        compare_updates(case, 1e-9)


def compare_updates(case, double_tolerance):
    sections = case.golden["sections"]
    for name in ("train", "train_strong"):
        section = sections[name]
        agent = make_agent(case, section.get("gain", 1.0))
        losses = run_updates(case, agent, sections["train"]["draws"], section["steps"])
        if not case.double:
            continue
        names = {"bc_loss": "bc_loss", "ql_loss": "q_loss", "actor_loss": "actor_loss"}
        for expected_name, values in section["losses_in_float64_run"].items():
            actual = [of_step[names.get(expected_name, expected_name)] for of_step in losses]
            case.close(actual, values, f"{name}: {expected_name}", double_tolerance=double_tolerance)
        compare_parameters(case, agent, section["params_after_float64_run"], double_tolerance)


def check_first_update_leaves_the_target_actor(case):
    expected, agent = case.golden["sections"]["train_from_step0"], make_agent(case)
    run_updates(case, agent, case.golden["sections"]["train"]["draws"], [expected])
    for authors_name in ("ema_model", "critic_target"):
        parameters = parameters_of(case, agent, authors_name)
        of_network = {name: expected[authors_name][name] for name in parameters}
        case.same(parameters, of_network, authors_name, NUMBER, NUMBER)
