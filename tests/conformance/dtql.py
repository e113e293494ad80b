"""dtql.py against its golden files.

They hold float32 numbers and, for losses and parameters of the training, those of a double-precision run.
What does not depend on the denoiser's loss is met to 1e-9 there. In that run the noise levels and the
scalings made from them were still float32. Draws are given float32 noise levels here, too, equal in the last
bit; but where else that code rounded cannot be seen from outside: what depends on the denoiser's loss agrees
to about 1e-7, and is held to the 1e-6 stated for these files. tests/test_dtql.py has that loss in double
precision.
"""

from copy import copy

import torch
from conformance.files import CPU, statistics
from conformance.torch_formulas import batch_columns, drawn, filled, uniforms

import dtql

# golden option: argument of dtql.py
OPTIONS = {
    "alpha": "alpha", "gamma": "nll_weight", "expectile": "expectile", "lr": "actor_lr",
    "critic_lr": "critic_lr", "lr_decay": "lr_decay", "lr_maxt": "lr_decay_steps", "discount": "gamma",
    "tau": "tau", "sigma_min": "sigma_min", "sigma_max": "sigma_max", "sigma_data": "sigma_data",
    "repeats": "num_action_samples", "ema_decay": "ema_decay", "step_start_ema": "actor_target_start",
    "update_ema_every": "actor_target_every",
}  # fmt: skip
# Options of the official code that dtql.py does not have; a case may only hold them at these values.
FIXED = {"max_action": 1}
SIZES = {"B", "S", "A", "step0", "gain"}  # used elsewhere; step0 is also in every step
NETWORKS = {"bc_actor": "denoiser", "critic": "critic", "distill_actor": "actor"}  # golden name: ours


def make_args(case):
    options = {name: value for name, value in case.golden["meta"]["config"].items() if name not in SIZES}
    for name, value in FIXED.items():
        assert options.pop(name, value) == value, f"dtql.py has no option {name}"
    unknown = options.keys() - OPTIONS
    assert not unknown, f"options of the case that the harness cannot set: {unknown}"
    return dtql.Args(**dtql.DEFAULT_SETTINGS | {OPTIONS[name]: value for name, value in options.items()})


def parameters_of(case, agent, take=lambda parameter: parameter):
    """Golden name -> tensor in the layout [out, in]; take(parameter) may give its gradient instead.

    Of the authors' target networks dtql.py leaves out two that nothing reads: the denoiser's and that of V.
    """
    tensors = {}
    for name, network, target in (
        ("bc_actor", agent.denoiser, False),
        ("distill_actor", agent.actor, False),
        ("distill_actor", agent.actor_target, True),
    ):
        layers = [*getattr(network, "time_mlp", []), *network.layers]
        ours = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
        names = [parameter_name for parameter_name, _ in case.golden["params"][name]]
        tensors |= {
            f"{name}{'_target' * target}.{parameter_name}": take(parameter)
            for parameter_name, parameter in zip(names, ours, strict=True)
        }
    names = [parameter_name for parameter_name, _ in case.golden["params"]["critic"]]
    for name, critic in (("critic", agent.critic), ("critic_target", agent.critic_target)):
        ours = []
        for k in range(critic.num_qs):
            for layer, norm in zip(critic.layers, [*critic.norms, None], strict=True):
                weight, bias = take(layer.weight), take(layer.bias)
                ours += [weight[k].T, bias[k, 0]] if weight is not None else [None, None]
                for parameter in (norm.weight, norm.bias) if norm else ():
                    ours.append(take(parameter)[k, 0] if take(parameter) is not None else None)
        values = [take(parameter) for layer in agent.value.layers for parameter in (layer.weight, layer.bias)]
        ours += [None] * len(values) if name.endswith("_target") else values
        tensors |= {f"{name}.{parameter}": ours for parameter, ours in zip(names, ours, strict=True)}
    return tensors


@torch.no_grad()
def make_agent(case, gain=1.0):
    """The agent of a case, filled by formula."""
    sizes = case.golden["meta"]["config"]
    agent = dtql.DTQL(sizes["S"], sizes["A"], make_args(case), CPU)
    tensors = parameters_of(case, agent)
    for network in NETWORKS:
        for target in (False, True):
            for position, (parameter, shape) in enumerate(case.golden["params"][network]):
                kind = parameter.split(".")[-1] if len(shape) == 2 or parameter.endswith("bias") else "scale"
                tensor = tensors.get(f"{network}{'_target' * target}.{parameter}")
                if tensor is not None:
                    tensor.copy_(filled(shape, position, kind, target, gain))
    return agent


def make_batch(case):
    return dtql.Batch(*batch_columns(case.golden["meta"]["config"]))


def sigma_of(u, agent):
    """Noise levels for uniform numbers in float64: float32, as in the authors' code."""
    args = agent.args
    return dtql.sigma_quantile(u, args.sigma_min, args.sigma_max, args.sigma_data).float()


def make_draws(agent, draws, bc="BC", trust="distill"):
    """Draws by meaning, from the entries of one update; bc and trust: words for the denoiser's two losses."""

    def find(*words):
        found = [drawn(draw) for draw in draws if all(word in draw["why"] for word in words)]
        assert len(found) <= 1, f"{words} occurs twice in one update"
        return found[0] if found else torch.empty(0)

    return dtql.Draws(
        bc_sigma=sigma_of(find("sigma", bc), agent),
        bc_noise=find("noise added", bc),
        trust_sigma=sigma_of(find("sigma", trust), agent),
        trust_noise=find("noise added", trust),
        action_noise=find("rsample"),
    )


def near(case, actual, expected, name, tolerance=1e-5):
    """In either precision: the file has this number in float32 only, or with float32 inside."""
    case = copy(case)
    case.double = False
    case.close(actual, expected, name, tolerance)


def compare_tensors(case, actual, expected, name, tolerance, gaps=()):
    """Statistics of parameters or gradients by golden name, but for those that dtql.py does without.

    gaps: for each tensor what float32 rounding moved in the authors' own code, where Adam divided a gradient
    that is rounding noise by its size: the largest change of an entry, and how many changed by over 1e-6.
    """
    compared = [parameter for parameter in expected if actual.get(parameter) is not None]
    for parameter in compared:
        allowed = tolerance + (gaps[parameter][0] * gaps[parameter][1] if parameter in gaps else 0)
        near(case, statistics(actual[parameter]), expected[parameter], f"{name} of {parameter}", allowed)
    left_out = {parameter for parameter in expected if parameter not in compared}
    assert compared and all("critic_target.v_model" in parameter for parameter in left_out), left_out


def named(tensors):
    """{network: {parameter: value}} of a file as {network.parameter: value}."""
    return {f"{network}.{name}": value for network, of in tensors.items() for name, value in of.items()}


def gradients_of(case, agent):
    return parameters_of(case, agent, lambda parameter: parameter.grad)


def gradient_norm(case, agent, network):
    gradients = [value for name, value in gradients_of(case, agent).items() if name.startswith(network + ".")]
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()


def learning_rate(agent, network):
    return agent.optimizers[NETWORKS[network]].param_groups[0]["lr"]


def check_fill_and_inputs(case):
    """The file means by its formulas what the harness means by them."""
    parameters, expected = parameters_of(case, make_agent(case)), named(case.golden["params_filled"])
    expected = {name: value for name, value in expected.items() if not name.startswith("bc_actor_target")}
    compare_tensors(case, parameters, expected, "fill", 1e-6)
    batch, expected = make_batch(case), case.golden["inputs_check"]
    for name, column in {
        "state": batch.obs, "action": batch.action, "reward": batch.reward, "next_state": batch.next_obs,
        "not_done": 1 - batch.terminal,
    }.items():  # fmt: skip
        near(case, statistics(column), expected[name], name, 1e-6)


def check_noise_levels(case):
    """Equal in the last bit: the double-precision run of the file rests on these float32 numbers."""
    agent, schedule = make_agent(case), case.golden["schedule"]
    sigma = torch.tensor(schedule["scalings"]["sigma"], dtype=torch.float32)
    scalings = [*dtql.edm_scalings(sigma, agent.args.sigma_data), sigma.log() / 4]
    for name, ours in zip(("c_skip", "c_out", "c_in", "log_sigma_over_4"), scalings, strict=True):
        assert ours.dtype == torch.float32
        assert ours.tolist() == schedule["scalings"][name], name
    for draw in schedule["loglogistic"]["draws"]:
        u = uniforms(draw["n"], len(draw["u"]))
        assert u.tolist() == draw["u"]
        assert sigma_of(torch.as_tensor(u), agent).tolist() == draw["sigma"]


def check_forward(case):
    forward, agent, batch = case.golden["forward"], make_agent(case), make_batch(case)
    sigma = torch.tensor(forward["sigma"], dtype=torch.float32).unsqueeze(1)
    t = torch.tensor(forward["t"], dtype=torch.float32).unsqueeze(1)
    mean, std = agent.actor(batch.obs)
    q, q_target = (critic(batch.obs, batch.action) for critic in (agent.critic, agent.critic_target))
    for name, ours in {
        "score_net_raw": agent.denoiser.network(batch.obs, batch.action, t),
        "denoised_clean_input": agent.denoiser(batch.obs, batch.action, sigma),
        "q1": q[0], "q2": q[1], "q_min": q.amin(0), "q1_target": q_target[0], "q2_target": q_target[1],
        "v": agent.value(batch.obs), "v_next": agent.value(batch.next_obs),
        "policy_mu": mean, "policy_std": std,
        "policy_log_prob_of_data": -dtql.nll_of(batch.action, mean, std),
    }.items():  # fmt: skip
        near(case, ours, forward[name], name)


def check_policy_sample(case):
    section, agent, obs = case.golden["sections"]["policy_sample"], make_agent(case), make_batch(case).obs
    agent.args.num_action_samples = 1
    action = agent.act(obs, drawn(section["draws"][0]).unsqueeze(1))
    near(case, action, section["action"], "action")


def check_diffusion_loss(case):
    section, agent, batch = case.golden["sections"]["diffusion_loss"], make_agent(case), make_batch(case)
    draws = make_draws(agent, section["draws"], bc="loss loss")
    sigma, noise = draws.bc_sigma, draws.bc_noise
    assert sigma.tolist() == section["sigma"]
    action = batch.action.requires_grad_()
    loss = agent.diffusion_loss(action, batch.obs, sigma, noise)
    near(case, loss, section["loss"], "loss")
    sigma = sigma.unsqueeze(1)
    denoised = agent.denoiser(batch.obs, action + sigma * noise, sigma)
    near(case, denoised, section["denoised"], "denoised action")
    loss.backward()
    near(case, action.grad, section["grad_x"], "gradient of the action")
    expected = named({"bc_actor": section["grads"].get("bc_actor", section["grads"])})
    compare_tensors(case, gradients_of(case, agent), expected, "gradient", 1e-4)


def check_critic_loss(case):
    section, agent, batch = case.golden["sections"]["critic_loss"], make_agent(case), make_batch(case)
    loss, metrics = agent.critic_loss(batch)
    near(case, loss, section["loss"], "loss")
    near(case, metrics["q_loss"], section["q1_mse"] + section["q2_mse"], "loss of the critics")
    loss.backward()
    expected = named({"critic": section["grads"].get("critic", section["grads"])})
    compare_tensors(case, gradients_of(case, agent), expected, "gradient", 1e-4)


def check_actor_loss(case):
    section, agent, batch = case.golden["sections"]["actor_loss"], make_agent(case), make_batch(case)
    draws = make_draws(agent, section["draws"], trust="loss loss")
    loss, metrics = agent.actor_loss(batch, draws)
    mean, std = agent.actor(batch.obs)
    for name, ours in {
        "distill_loss": metrics["trust_loss"], "ql_loss": -metrics["actor_q"], "actor_loss": loss,
        "gamma_loss": dtql.nll_of(batch.action, mean, std).mean(),
    }.items():  # fmt: skip
        near(case, ours, section[name], name)
    loss.backward()
    expected = named({"distill_actor": section["grads"].get("distill_actor", section["grads"])})
    compare_tensors(case, gradients_of(case, agent), expected, "gradient", 1e-4)

    action = torch.tensor(section["new_action"], requires_grad=True)
    total = agent.args.alpha * agent.diffusion_loss(action, batch.obs, draws.trust_sigma, draws.trust_noise)
    total = total - agent.critic(batch.obs, action).amin(0).mean()
    [gradient] = torch.autograd.grad(total, action)
    near(case, gradient, section["dtotal_dnew_action"], "gradient of the action")


def check_act(case):
    section, agent = case.golden["sections"]["eval_action"], make_agent(case)
    obs, noise = make_batch(case).obs[:1], drawn(section["draws"][0])
    mean, std = agent.actor(obs)
    candidates = (mean + std * noise).tanh()
    q = agent.critic_target(obs.expand(len(noise), -1), candidates).amin(0)
    near(case, candidates[:2], section["candidates_first2"], "candidates")
    near(case, statistics(candidates), section["candidates_stats"], "candidates")
    near(case, q[:8], section["q_min_target_first8"], "q of the candidates")
    near(case, statistics(q), section["q_min_target_stats"], "q of the candidates")
    near(case, statistics(q.softmax(0)), section["probs_stats"], "probabilities")
    for u, index in {section["u"]: section["index"], **section["index_for_other_u"]}.items():
        action = agent.act(obs, noise.unsqueeze(0), torch.tensor([float(u)]))
        near(case, action[0], candidates[index].tolist(), f"action for {u}", 1e-12)
    near(case, agent.act(obs, noise[None], torch.tensor([section["u"]]))[0], section["action"], "action")


def prepare(agent, updates, step):
    """Learning rates by the updates so far, since the file's schedulers start at 0; the rest by the step."""
    agent.set_step(step)
    actor_tau = agent.actor_tau.clone()
    agent.set_step(updates)
    agent.actor_tau.copy_(actor_tau)


def golden_losses(metrics):
    """The metrics of an update under the names of the file."""
    return {
        "bc_loss": metrics["bc_loss"], "critic_loss": metrics["critic_loss"],
        "distill_loss": metrics["trust_loss"], "ql_loss": -metrics["actor_q"],
        "actor_loss": metrics["actor_loss"], "gamma_loss": metrics.get("nll", torch.tensor(0.0)),
    }  # fmt: skip


def check_training(case):
    sections = case.golden["sections"]
    for section in [section for name, section in sections.items() if name.startswith("train")]:
        draws = section["draws"] if isinstance(section["draws"], list) else sections["train"]["draws"]
        agent, batch = make_agent(case, section["gain"]), make_batch(case)
        for number, entry in enumerate(section["steps"]):
            step_draws = make_draws(agent, [draw for draw in draws if draw["step"] == number + 1])
            prepare(agent, number, entry["agent_step_before"])
            assert bool(agent.actor_tau > 0) == entry["distill_target_ema_updated"]
            for network, lr in entry["lr"].items():
                near(case, learning_rate(agent, network), lr, "learning rate", 1e-9)
            assert step_draws.bc_sigma.tolist() == entry["sigma_bc"]
            assert step_draws.trust_sigma.tolist() == entry["sigma_distill"]
            metrics = agent.update_critic(batch)
            metrics |= agent.update_denoiser(batch, step_draws.bc_sigma, step_draws.bc_noise)
            metrics |= agent.update_actor(batch, step_draws)
            agent.update_targets()

            # From the second step on Adam has amplified the rounding of near-zero gradients.
            for name, loss in golden_losses(metrics).items():
                near(case, loss, entry[name], name, 5e-4 if number else 1e-5)
                in_double = section["losses_in_float64_run"][name][number]
                if name == "critic_loss" or (name == "ql_loss" and number == 0):
                    case.close(loss, in_double, name, 5e-4)
                elif case.double:
                    near(case, loss, in_double, name, 1e-6)
            for network, norm in entry["grad_norms"].items():
                near(case, gradient_norm(case, agent, network), norm, f"gradient norm of {network}", 5e-3)
            if gradients := named(entry.get("grads", {})):
                ours = gradients_of(case, agent)
                compare_tensors(case, ours, gradients, "gradient", 5e-3 if number else 1e-4)
            if parameters := named(entry.get("params_after", {})):
                ours = parameters_of(case, agent)
                compare_tensors(case, ours, parameters, "parameters", 1e-3, named(section["f64_gap"]))
        if case.double:
            ours, in_double = parameters_of(case, agent), named(section["params_after_float64_run"])
            compare_tensors(case, ours, in_double, "parameters", 1e-6, named(section["f64_gap"]))
            critics = {name: value for name, value in in_double.items() if name.startswith("critic")}
            compare_tensors(case, ours, critics, "parameters", 1e-9)


def check_pretraining(case):
    section, agent, batch = case.golden["sections"]["pretrain"], make_agent(case), make_batch(case)
    before = [
        parameter.clone() for parameter in (*agent.critic_target.parameters(), *agent.actor.parameters())
    ]
    steps = max(step for step, _, _ in section["losses"])
    for number in range(1, steps + 1):
        draws = make_draws(agent, [draw for draw in section["draws"] if draw["step"] == number])
        agent.set_step(number - 1 - steps)  # below 0
        metrics = agent.update_denoiser(batch, draws.bc_sigma, draws.bc_noise) | agent.update_critic(batch)
        losses = {"diffusion_loss": metrics["bc_loss"], "critic_loss": metrics["critic_loss"]}
        of_step = [entry[1:] for entry in section["losses"] if entry[0] == number]
        assert [name for name, _ in of_step] == list(losses)
        for name, value in of_step:
            near(case, losses[name], value, name, 5e-4 if number > 1 else 1e-5)
        for name, value in [entry[1:] for entry in section["losses_in_float64_run"] if entry[0] == number]:
            if case.double:
                near(case, losses[name], value, name, 1e-9 if name == "critic_loss" else 1e-6)
        for entry in [entry for entry in section["grads"] if entry["step"] == number]:
            near(case, gradient_norm(case, agent, entry["opt"]), entry["norm"], "gradient norm", 5e-3)
            near(case, learning_rate(agent, entry["opt"]), entry["lr"], "learning rate", 1e-9)
    ours, gaps = parameters_of(case, agent), named(section["f64_gap"])
    compare_tensors(case, ours, named(section["params_after"]), "parameters", 1e-3, gaps)
    after = [*agent.critic_target.parameters(), *agent.actor.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
