"""diffusion_ql.py against its golden files.

Most of their numbers are of a float32 run, for a check in either precision. The double-precision run keeps
the noise schedule in float32; with its coefficients ours agrees to 1e-9, with our own to 1e-6.
"""

import re

import numpy as np
import pytest
import torch
from conformance.files import CPU, statistics
from conformance.torch_formulas import batch_columns, chosen, drawn, filled, rounded_tables, uniforms

import diffusion_ql

FLOAT32_RUN, FLOAT64_RUN = 1e-5, 1e-6  # tolerances, with our own coefficients
# golden option: argument of diffusion_ql.py
OPTIONS = {
    "T": "diffusion_steps", "beta_schedule": "noise_schedule", "eta": "eta", "max_q_backup": "max_q_backup",
    "grad_norm": "max_grad_norm", "lr": "actor_lr", "critic_lr": "critic_lr", "lr_decay": "lr_decay",
    "lr_maxt": "lr_decay_steps", "discount": "gamma", "tau": "tau", "step_start_ema": "actor_target_start",
    "update_ema_every": "actor_target_every",
}  # fmt: skip
ABOUT_THE_CASE = {"B", "S", "A", "step0", "strong_gain", "strong_clip", "ema_decay", "max_action"}
CHAINS = {"actor": "of the actor chain", "actor_target": "of the ema_model"}
NETWORKS = {
    "actor": "actor", "ema_model": "actor_target", "critic": "critic", "critic_target": "critic_target",
}  # fmt: skip


def make_args(case, **overrides):
    config = case.golden["meta"]["config"]
    assert config["max_action"] == 1 and config["ema_decay"] == 1 - config["tau"]
    unknown = config.keys() - OPTIONS - ABOUT_THE_CASE
    assert not unknown, f"options of the case that the harness cannot set: {unknown}"
    values = {OPTIONS[name]: value for name, value in config.items() if name in OPTIONS}
    return diffusion_ql.Args(**diffusion_ql.DEFAULT_SETTINGS | values | overrides)


def parameters_of(network, take=lambda parameter: parameter):
    """The parameters in the authors' order and layout, [out, in]; take(parameter) may give its gradient."""
    if isinstance(network, diffusion_ql.EnsembleCritic):
        return [
            values
            for member in range(2)
            for layer in network.layers
            for values in (take(layer.weight)[member].T, take(layer.bias)[member, 0])
        ]
    layers = [*network.time_mlp, *network.layers]
    return [values for layer in layers for values in (take(layer.weight), take(layer.bias))]


def named_parameters_of(case, agent, authors_name, take=lambda parameter: parameter):
    names = [name for name, _ in case.golden["params"][authors_name]]
    return dict(zip(names, parameters_of(getattr(agent, NETWORKS[authors_name]), take), strict=True))


@torch.no_grad()
def make_agent(case, gain=1.0, **overrides):
    """The agent of a case, filled by formula; gain multiplies the weights."""
    config = case.golden["meta"]["config"]
    agent = diffusion_ql.DiffusionQL(config["S"], config["A"], make_args(case, **overrides), CPU)
    for authors_name in NETWORKS:
        parameters = named_parameters_of(case, agent, authors_name)
        for position, (name, parameter) in enumerate(parameters.items()):
            is_target = authors_name in ("ema_model", "critic_target")
            parameter.copy_(filled(parameter.shape, position, name.split(".")[-1], is_target, gain))
    return agent


def make_batch(case):
    return diffusion_ql.Batch(*batch_columns(case.golden["meta"]["config"]))


def chain_noise(draws, network):
    """(T, rows, action_dim): x_T, then the noise of each step but the last, which is not used."""
    of_chain = [draw for draw in draws if CHAINS[network] in draw["why"]]
    return torch.stack([drawn(draw) for draw in of_chain[:-1]]) if of_chain else torch.empty(0)


def make_draws(draws):
    def found(words):
        return [drawn(draw) for draw in draws if words in draw["why"]]

    coins, timesteps, eps = found("coin"), found("timestep"), found("noise eps")
    return diffusion_ql.Draws(
        next_action_noise=chain_noise(draws, "actor_target"),
        t=timesteps[0] + 1 if timesteps else torch.empty(0),
        eps=eps[0] if eps else torch.empty(0),
        action_noise=chain_noise(draws, "actor"),
        member=(coins[0] <= 0.5).long().view(1) if coins else torch.tensor([0]),
    )


def check_fill_and_inputs(case):
    columns = dict(
        zip(("state", "action", "reward", "next_state", "not_done"), make_batch(case), strict=True)
    )
    columns["not_done"] = 1 - columns["not_done"]
    for name, expected in case.golden["inputs_check"].items():
        case.close(statistics(columns[name]), expected, name)
    for authors_name, tensors in case.golden["params_filled"].items():
        for name, parameter in named_parameters_of(case, make_agent(case), authors_name).items():
            case.close(statistics(parameter), tensors[name], f"{authors_name} {name}")


def check_schedule(case):
    for key, arrays in case.golden["schedule"].items():
        name, num_steps = re.fullmatch(r"(\w+)_T(\d+)", key).groups()
        tables = arrays if name == "betas_other_schedules" else {name: arrays["betas"]}
        for schedule, expected in tables.items():
            beta, _ = diffusion_ql.noise_schedule(schedule, int(num_steps))
            case.close(beta[1:], expected, schedule, 1e-7, 1e-7)
        if "posterior_variance" in arrays:
            beta, alpha_bar = diffusion_ql.noise_schedule(name, int(num_steps))
            variance = np.square(diffusion_ql.posterior_std(beta, alpha_bar))
            case.close(alpha_bar[1:], arrays["alphas_cumprod"], "alphas_cumprod", 1e-7, 1e-7)
            case.close(variance[1:], arrays["posterior_variance"], "posterior variance", 1e-6, 1e-6)


def check_forward(case):
    for expected in (case.golden["forward"], case.golden["sections"].get("forward_strong", {})):
        agent, batch = make_agent(case, expected.get("gain", 1.0)), make_batch(case)
        q = agent.critic(batch.obs, batch.action)
        target_q = agent.critic_target(batch.obs, batch.action)
        t = torch.tensor(expected.get("t", [0])) + 1
        actual = {
            "noise_net": agent.actor(batch.obs, batch.action, t),
            "noise_net_ema": agent.actor_target(batch.obs, batch.action, t),
            "q1": q[0], "q2": q[1], "q_min": q.amin(0), "q1_target": target_q[0], "q2_target": target_q[1],
        }  # fmt: skip
        for name in expected.keys() & actual.keys():
            case.close(actual[name], expected[name], name, FLOAT32_RUN, FLOAT32_RUN)
    if "chain_actor_action" in expected:
        noise = chain_noise(case.golden["sections"]["chain_actor"]["draws"], "actor")
        action = agent.sample(agent.actor, batch.obs, noise)
        case.close(action, expected["chain_actor_action"], "strong chain", FLOAT32_RUN, FLOAT32_RUN)


def check_chains(case):
    sections, agent, batch = case.golden["sections"], make_agent(case), make_batch(case)
    for name, network, obs in (
        ("chain_actor", "actor", batch.obs),
        ("chain_ema", "actor_target", batch.next_obs),
    ):
        expected, seen = sections[name], []
        actor = getattr(agent, network)
        hook = actor.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[1]))
        action = agent.sample(actor, obs, chain_noise(expected["draws"], network))
        hook.remove()
        rows = torch.stack([x[0] for x in [*seen, action]])
        case.close(rows, expected["chain_row0"], f"{name}, row 0", FLOAT32_RUN, FLOAT32_RUN)
        case.close(action, expected["action"], name, FLOAT32_RUN, FLOAT32_RUN)


def check_max_q_backup(case):
    expected, batch = case.golden["sections"]["max_q_backup_targets"], make_batch(case)
    agent = make_agent(case, max_q_backup=True)
    n = agent.num_next_actions
    next_obs = batch.next_obs.repeat_interleave(n, dim=0)
    action = agent.sample(agent.actor_target, next_obs, chain_noise(expected["draws"], "actor_target"))
    q = agent.critic_target(next_obs, action).unflatten(1, (-1, n)).amax(2)
    case.close(action[:3], expected["action_first3"], "actions", FLOAT32_RUN, FLOAT32_RUN)
    case.close(q[0], expected["q1_max"], "best of Q1", FLOAT32_RUN, FLOAT32_RUN)
    case.close(q[1], expected["q2_max"], "best of Q2", FLOAT32_RUN, FLOAT32_RUN)
    case.close(q.amin(0), expected["target_before_bellman"], "their minimum", FLOAT32_RUN, FLOAT32_RUN)


def close_gradients(case, agent, authors_name, loss, expected):
    network = getattr(agent, NETWORKS[authors_name])
    gradients = dict(
        zip(network.parameters(), torch.autograd.grad(loss, [*network.parameters()]), strict=True)
    )
    for name, gradient in named_parameters_of(case, agent, authors_name, gradients.get).items():
        case.close(statistics(gradient), expected[name], f"gradient of {name}", FLOAT32_RUN, FLOAT32_RUN)


def check_actor_losses(case):
    sections, batch = case.golden["sections"], make_batch(case)
    agent, expected = make_agent(case), sections["bc_loss"]
    action_draws = sections["q_loss_use_q1"]["draws"]
    _, metrics = agent.actor_loss(batch, make_draws(expected["draws"] + action_draws))
    case.close(metrics["bc_loss"], expected["loss"], "BC loss", FLOAT32_RUN, FLOAT32_RUN)
    close_gradients(case, agent, "actor", metrics["bc_loss"], expected["grads"])
    for member, name in enumerate(("q_loss_use_q1", "q_loss_use_q2")):
        agent, expected = make_agent(case), sections[name]
        draws = make_draws(sections["bc_loss"]["draws"] + expected["draws"])
        _, metrics = agent.actor_loss(batch, draws._replace(member=torch.tensor([member])))
        case.close(metrics["q_loss"], expected["q_loss"], name, FLOAT32_RUN, FLOAT32_RUN)
        close_gradients(case, agent, "actor", metrics["q_loss"], expected["actor_grads"])


def check_act(case):
    """One of the candidates; the multinomial draw is replaced by the file's, by its formula."""
    expected, seen = case.golden["sections"]["eval_action"], []

    def multinomial(probabilities, count):
        seen.append(probabilities)
        return torch.tensor([[chosen(probabilities[0], uniforms(0, 1).item())]])

    agent = make_agent(case)
    agent.args.num_action_samples = len(expected["q_min_target"])
    shape = [agent.args.num_action_samples, agent.action_dim]
    normals = range(agent.args.diffusion_steps)
    noise = torch.stack([drawn({"kind": "normal", "n": n, "shape": shape}) for n in normals])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        action = agent.act(make_batch(case).obs[:1], noise)
    case.close(seen[0][0], expected["probs"], "probabilities of the candidates", FLOAT32_RUN, FLOAT32_RUN)
    case.close(action[0], expected["action"], "action", FLOAT32_RUN, FLOAT32_RUN)
    for u, index in expected["index_for_other_u"].items():
        assert chosen(seen[0][0], float(u)) == index


def run_steps(case, agent, section, draws, num_steps):
    """Updates with the draws of the file; in single precision each of them is compared."""
    batch, losses = make_batch(case), []
    for number in range(1, num_steps + 1):
        entry = section["steps"][number - 1] if "steps" in section else section
        agent.set_step(entry.get("agent_step_before", 0))
        for name in ("actor", "critic"):  # the authors' schedulers stand still within a call of train()
            if f"{name}_lr" in entry:
                agent.optimizers[name].param_groups[0]["lr"].fill_(entry[f"{name}_lr"])
        agent.args.max_grad_norm = entry.get("grad_norm_limit", agent.args.max_grad_norm)
        of_step = make_draws([draw for draw in draws if draw["step"] == number])
        metrics = agent.update_critic(batch, of_step) | agent.update_actor(batch, of_step)
        losses.append({name: metrics[name].item() for name in metrics})
        if not case.double:
            compare_step(case, agent, entry, metrics, number)
    return losses


def compare_step(case, agent, entry, metrics, number):
    later = number > 1
    for name in entry.keys() & metrics.keys():
        case.close(metrics[name], entry[name], name, 5e-4 if later else 1e-5)
    for authors_name in ("actor", "critic"):
        if f"{authors_name}_grads_after_clip" in entry:
            expected = entry[f"{authors_name}_grads_after_clip"]
            take = lambda parameter: parameter.grad  # noqa: E731
            for name, gradient in named_parameters_of(case, agent, authors_name, take).items():
                tolerance = 5e-3 if later else 2e-4
                case.close(statistics(gradient), expected[name], f"gradient of {name}", tolerance)
    for authors_name, tensors in entry.get("params_after", {}).items():
        for name, parameter in named_parameters_of(case, agent, authors_name).items():
            if name in tensors:
                case.close(statistics(parameter), tensors[name], f"{authors_name} {name}", 1e-3)


def check_updates(case):
    run_updates(case, FLOAT64_RUN)


def check_updates_with_rounded_coefficients(case):
    if case.double:
        with rounded_tables(case, diffusion_ql):
            run_updates(case, 1e-9)


def run_updates(case, tolerance):
    sections = case.golden["sections"]
    for name in ("train", "train_strong"):
        section = sections[name]
        agent = make_agent(case, section.get("gain", 1.0))
        losses = run_steps(case, agent, section, sections["train"]["draws"], len(section["steps"]))
        if not case.double:
            continue
        names = {"bc_loss": "bc_loss", "ql_loss": "q_loss", "actor_loss": "actor_loss"}
        for expected_name, values in section["losses_in_float64_run"].items():
            actual = [of_step[names.get(expected_name, expected_name)] for of_step in losses]
            case.close(actual, values, f"{name}: {expected_name}", double_tolerance=tolerance)
        for authors_name, tensors in section["params_after_float64_run"].items():
            for parameter_name, parameter in named_parameters_of(case, agent, authors_name).items():
                if parameter_name in tensors:
                    expected = tensors[parameter_name]
                    what = f"{name}: {authors_name} {parameter_name}"
                    case.close(statistics(parameter), expected, what, double_tolerance=tolerance)


def check_first_update_leaves_the_target_actor(case):
    expected = case.golden["sections"]["train_from_step0"]
    agent = make_agent(case)
    run_steps(case, agent, expected, case.golden["sections"]["train"]["draws"], 1)
    for authors_name in ("ema_model", "critic_target"):
        for name, parameter in named_parameters_of(case, agent, authors_name).items():
            case.close(statistics(parameter), expected[authors_name][name], name, FLOAT32_RUN, FLOAT32_RUN)
