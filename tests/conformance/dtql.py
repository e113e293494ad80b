"""dtql.py against its golden files.

They hold float32 numbers and, of the training, those of a double-precision run, in which the noise levels
and the scalings made from them were still float32. Draws have float32 noise levels here, too, equal in the
last bit; where else that code rounded cannot be seen. So what depends on the denoiser's loss is held to 1e-6
there, the rest to 1e-9. tests/test_algorithms.py has that loss in double precision.
"""

from itertools import zip_longest

import torch
from conformance.files import CPU, arguments, statistics, units
from conformance.torch_formulas import choosing, compare_batch, drawn, fill, make_batch, uniforms

import dtql

# golden option: argument of dtql.py
OPTIONS = {
    "alpha": "alpha", "gamma": "nll_weight", "expectile": "expectile", "lr": "actor_lr",
    "critic_lr": "critic_lr", "lr_decay": "lr_decay", "lr_maxt": "total_steps", "discount": "gamma",
    "tau": "tau", "repeats": "num_action_samples",
}  # fmt: skip
# Options of the official code that dtql.py leaves out, with the value that it has built in.
FIXED = {
    "max_action": 1, "sigma_min": dtql.SIGMA_MIN, "sigma_max": dtql.SIGMA_MAX, "sigma_data": dtql.SIGMA_DATA,
}  # fmt: skip
SIZES = {"B", "S", "A", "step0", "gain"}  # used elsewhere; step0 is also in every step
OF_LEFT_OUT_TARGETS = {"ema_decay", "step_start_ema", "update_ema_every"}
LEFT_OUT_TARGETS = ("bc_actor_target.", "distill_actor_target.", "critic_target.v_model.")
NETWORKS = {"bc_actor": "denoiser", "critic": "critic", "distill_actor": "actor"}  # golden name: ours

# What a float32 number may be off, relative to 1 + |number|, in either precision; behind it the largest error
# in single precision over the instruction sets of PyTorch, MKL and oneDNN, 1 and 2 threads, on an AMD EPYC.
# After an optimizer step it is more: where a gradient is all rounding, as for 11 of the critics' 274,434
# weights here, Adam moves the weight by its learning rate either way.
NUMBER = units(10)  # 1.1e-6; a loss of the denoiser has 1 / c_out inside, too
GRADIENT = 3e-4  # 1.3e-4, through layer normalisation, which divides by a deviation
STEPPED_NUMBER = 5e-4  # 3.0e-5
STEPPED_GRADIENT = 5e-3  # 7.4e-4
GRADIENT_NORM = 5e-3  # 7.3e-5
PARAMETER = 1e-3  # 0.65 of what is allowed, with the gaps of the file


def make_args(case):
    options = dict(case.golden["meta"]["config"])
    return dtql.Args(**arguments(options, OPTIONS, FIXED, SIZES | OF_LEFT_OUT_TARGETS))


def layers_of(agent):
    """Golden name of a network -> its layers in the authors' order."""

    def critics(critic):
        pairs = [pair for member in critic.members for pair in zip_longest(member.layers, member.norms)]
        return [layer for pair in pairs for layer in pair if layer is not None]

    return {
        "bc_actor": [*agent.denoiser.time_mlp, *agent.denoiser.layers],
        "distill_actor": list(agent.actor.layers),
        "critic": [*critics(agent.critic), *agent.value.layers],
        "critic_target": critics(agent.critic_target),
    }


def parameters_of(case, agent, take=lambda parameter: parameter):
    """Golden name -> tensor in the layout [out, in]; take(parameter) may give its gradient instead."""
    tensors = {}
    for network, layers in layers_of(agent).items():
        names = [f"{network}.{name}" for name, _ in case.golden["params"][network.removesuffix("_target")]]
        values = [take(parameter) for layer in layers for parameter in (layer.weight, layer.bias)]
        assert len(values) == len(names) or network.endswith("_target")
        tensors |= dict(zip(names, values, strict=False))
    return tensors


@torch.no_grad()
def make_agent(case, gain=1.0):
    """The agent of a case, filled by formula; gain multiplies the weights."""
    sizes = case.golden["meta"]["config"]
    agent = dtql.DTQL(sizes["S"], sizes["A"], make_args(case), CPU)
    for network, layers in layers_of(agent).items():
        tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        fill(tensors, network.endswith("_target"), gain)
    return agent


def begin(case, name):
    """What a check of one loss begins with: its section of the file, an agent, the batch."""
    return case.golden["sections"][name], make_agent(case), make_batch(case, dtql)


def sigma_of(u):
    """Noise levels for uniform numbers in float64: float32, as in the authors' code."""
    return dtql.sigma_quantile(u).float()


def make_draws(draws, bc="BC", trust="distill"):
    """Draws by meaning, from the entries of one update; bc and trust: words for the denoiser's two losses."""

    def find(*words):
        found = [drawn(draw) for draw in draws if all(word in draw["why"] for word in words)]
        assert len(found) <= 1, f"{words} occurs twice in one update"
        return found[0] if found else torch.empty(0)

    return dtql.Draws(
        bc_sigma=sigma_of(find("sigma", bc)),
        bc_noise=find("noise added", bc),
        trust_sigma=sigma_of(find("sigma", trust)),
        trust_noise=find("noise added", trust),
        action_noise=find("rsample"),
    )


def of_denoiser(sigma):
    """The bound of the denoiser's loss: its errors, rounded at the size of actions, are divided by c_out."""
    return units(max(10.0, (1 / dtql.edm_scalings(sigma)[1]).mean().item()))


def near(case, actual, expected, name, tolerance=NUMBER):
    case.near(actual, expected, name, tolerance)


def compare_tensors(case, actual, expected, name, tolerance, gaps=()):
    """Statistics of parameters or gradients by golden name, but for those that dtql.py does without.

    gaps: for each tensor what float32 rounding moved in the authors' own code, where Adam divided a gradient
    that is rounding noise by its size: the largest change of an entry, and how many changed by over 1e-6.
    """
    compared = {parameter: value for parameter, value in expected.items() if parameter in actual}
    assert compared
    for parameter, value in compared.items():
        allowed = tolerance + (gaps[parameter][0] * gaps[parameter][1] if parameter in gaps else 0)
        near(case, statistics(actual[parameter]), value, f"{name} of {parameter}", allowed)
    left_out = expected.keys() - compared
    assert all(parameter.startswith(LEFT_OUT_TARGETS) for parameter in left_out), left_out
    if left_out and not case.skipped:
        case.left_out("targets of denoiser, policy and V")


def named(tensors):
    """{network: {parameter: value}} of a file as {network.parameter: value}."""
    return {f"{network}.{name}": value for network, of in tensors.items() for name, value in of.items()}


def compare_gradients(case, agent, expected, stepped=()):
    """Gradients by golden name; stepped: networks whose loss comes after a step of an optimizer."""
    actual = parameters_of(case, agent, lambda parameter: parameter.grad)
    for parameter, value in expected.items():
        tolerance = STEPPED_GRADIENT if parameter.split(".")[0] in stepped else GRADIENT
        near(case, statistics(actual[parameter]), value, f"gradient of {parameter}", tolerance)


def compare_optimizer(case, agent, network, norm, lr):
    """The gradients' joint norm and the learning rate."""
    optimizer = agent.optimizers[NETWORKS[network]]
    gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
    near(case, torch.nn.utils.get_total_norm(gradients), norm, f"gradient norm of {network}", GRADIENT_NORM)
    near(case, optimizer.param_groups[0]["lr"], lr, f"learning rate of {network}", 1e-9)


def check_fill_and_inputs(case):
    """The file means by its formulas what the harness means by them."""
    expected = named({name: of for name, of in case.golden["params_filled"].items() if isinstance(of, dict)})
    compare_tensors(case, parameters_of(case, make_agent(case)), expected, "fill", 1e-6)
    compare_batch(case, make_batch(case, dtql), 1e-6, 1e-6)


def check_noise_levels(case):
    """Equal in the last bit: the double-precision run of the file rests on these float32 numbers."""
    make_args(case)  # with the noise levels of the script
    schedule = case.golden["schedule"]
    sigma = torch.tensor(schedule["scalings"]["sigma"], dtype=torch.float32)
    scalings = [*dtql.edm_scalings(sigma), sigma.log() / 4]
    for name, ours in zip(("c_skip", "c_out", "c_in", "log_sigma_over_4"), scalings, strict=True):
        assert ours.dtype == torch.float32
        case.close(ours, schedule["scalings"][name], name, 0, 0)
    for draw in schedule["loglogistic"]["draws"]:
        u = uniforms(draw["n"], len(draw["u"]))
        assert u.tolist() == draw["u"]
        case.close(sigma_of(torch.as_tensor(u)), draw["sigma"], "sigma", 0, 0)


def check_forward(case):
    forward, agent, batch = case.golden["forward"], make_agent(case), make_batch(case, dtql)
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
    section, agent, batch = begin(case, "policy_sample")
    agent.args.num_action_samples = 1
    action = agent.act(batch.obs, drawn(section["draws"][0]).unsqueeze(1))
    near(case, action, section["action"], "action")


def check_diffusion_loss(case):
    section, agent, batch = begin(case, "diffusion_loss")
    draws = make_draws(section["draws"], bc="loss loss")
    sigma, noise = draws.bc_sigma, draws.bc_noise
    near(case, sigma, section["sigma"], "sigma", 0)
    action = batch.action.requires_grad_()
    loss = agent.diffusion_loss(action, batch.obs, sigma, noise)
    near(case, loss, section["loss"], "loss", of_denoiser(sigma))
    sigma = sigma.unsqueeze(1)
    denoised = agent.denoiser(batch.obs, action + sigma * noise, sigma)
    near(case, denoised, section["denoised"], "denoised action")
    loss.backward()
    near(case, action.grad, section["grad_x"], "gradient of the action")
    compare_gradients(case, agent, named({"bc_actor": section["grads"].get("bc_actor", section["grads"])}))


def check_critic_loss(case):
    section, agent, batch = begin(case, "critic_loss")
    loss, metrics = agent.critic_loss(batch)
    near(case, loss, section["loss"], "loss")
    near(case, metrics["q_loss"], section["q1_mse"] + section["q2_mse"], "loss of the critics")
    loss.backward()
    compare_gradients(case, agent, named({"critic": section["grads"].get("critic", section["grads"])}))


def check_actor_loss(case):
    section, agent, batch = begin(case, "actor_loss")
    draws = make_draws(section["draws"], trust="loss loss")
    loss, metrics = agent.actor_loss(batch, draws)
    mean, std = agent.actor(batch.obs)
    for name, ours in {
        "distill_loss": metrics["trust_loss"], "ql_loss": -metrics["actor_q"], "actor_loss": loss,
        "gamma_loss": dtql.nll_of(batch.action, mean, std).mean(),
    }.items():  # fmt: skip
        near(case, ours, section[name], name, of_denoiser(draws.trust_sigma))
    loss.backward()
    expected = section["grads"].get("distill_actor", section["grads"])
    compare_gradients(case, agent, named({"distill_actor": expected}))

    action = torch.tensor(section["new_action"], requires_grad=True)
    total = agent.args.alpha * agent.diffusion_loss(action, batch.obs, draws.trust_sigma, draws.trust_noise)
    total = total - agent.critic(batch.obs, action).amin(0).mean()
    [gradient] = torch.autograd.grad(total, action)
    near(case, gradient, section["dtotal_dnew_action"], "gradient of the action")


def check_act(case):
    section, agent = case.golden["sections"]["eval_action"], make_agent(case)
    obs, noise = make_batch(case, dtql).obs[:1], drawn(section["draws"][0])
    mean, std = agent.actor(obs)
    candidates = (mean + std * noise).tanh()
    q = agent.critic_target(obs.expand(len(noise), -1), candidates).amin(0)
    near(case, candidates[:2], section["candidates_first2"], "candidates")
    near(case, statistics(candidates), section["candidates_stats"], "candidates")
    near(case, q[:8], section["q_min_target_first8"], "q of the candidates")
    near(case, statistics(q), section["q_min_target_stats"], "q of the candidates")
    near(case, statistics(q.softmax(0)), section["probs_stats"], "probabilities")
    near(case, candidates[section["index"]], section["action"], "action")
    rounding = 0.0 if case.double else 1e-6  # of the probabilities' sums, which may step over u
    for u, index in {section["u"]: section["index"], **section["index_for_other_u"]}.items():
        found = []
        for shifted in (float(u), float(u) - rounding, float(u) + rounding):
            with choosing(shifted):
                found.append(agent.act(obs, noise.unsqueeze(0))[0])
        actions = torch.stack(found)
        nearest = (actions - candidates[index]).abs().amax(1).argmin()
        near(case, actions[nearest], candidates[index].tolist(), f"action for {u}", 1e-12)


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
        agent, batch = make_agent(case, section["gain"]), make_batch(case, dtql)
        agent.sample_batch = lambda data: data
        for number, entry in enumerate(section["steps"]):
            step_draws = make_draws([draw for draw in draws if draw["step"] == number + 1])
            near(case, step_draws.bc_sigma, entry["sigma_bc"], "sigma", 0)
            near(case, step_draws.trust_sigma, entry["sigma_distill"], "sigma", 0)
            agent.draw = lambda batch_size, step_draws=step_draws: step_draws
            agent.set_step(number)  # the file's schedulers start at 0
            metrics = agent.update(batch)
            compare_update(case, agent, section, number, golden_losses(metrics))
        if case.double:
            ours, in_double = parameters_of(case, agent), named(section["params_after_float64_run"])
            compare_tensors(case, ours, in_double, "parameters", 1e-6, named(section["f64_gap"]))
            critics = {name: value for name, value in in_double.items() if name.startswith("critic")}
            compare_tensors(case, ours, critics, "parameters", 1e-9)


def compare_update(case, agent, section, number, losses):
    entry = section["steps"][number]
    for name, loss in losses.items():
        stepped = number > 0 or name in ("distill_loss", "ql_loss", "actor_loss")  # after the critics' step
        first = of_denoiser(torch.tensor(entry["sigma_bc"])) if name == "bc_loss" else NUMBER
        near(case, loss, entry[name], name, STEPPED_NUMBER if stepped else first)
        in_double = section["losses_in_float64_run"][name][number]
        if name == "critic_loss" or (name == "ql_loss" and number == 0):
            case.close(loss, in_double, name, STEPPED_NUMBER)
        elif case.double:
            near(case, loss, in_double, name, 1e-6)
    for network, norm in entry["grad_norms"].items():
        compare_optimizer(case, agent, network, norm, entry["lr"][network])
    stepped = NETWORKS if number > 0 else ["distill_actor"]
    compare_gradients(case, agent, named(entry.get("grads", {})), stepped)
    if parameters := named(entry.get("params_after", {})):
        gaps = named(section["f64_gap"])
        compare_tensors(case, parameters_of(case, agent), parameters, "parameters", PARAMETER, gaps)


def check_pretraining(case):
    section, agent, batch = case.golden["sections"]["pretrain"], make_agent(case), make_batch(case, dtql)
    waiting = [*agent.critic_target.parameters(), *agent.actor.parameters()]
    before = [parameter.clone() for parameter in waiting]
    steps = max(step for step, _, _ in section["losses"])
    agent.sample_batch = lambda data: data
    for number in range(1, steps + 1):
        draws = make_draws([draw for draw in section["draws"] if draw["step"] == number])
        agent.draw_noise = lambda batch_size, draws=draws: (draws.bc_sigma, draws.bc_noise)
        agent.set_step(number - 1 - steps)  # below 0
        metrics = agent.pretrain(batch)
        losses = {"diffusion_loss": metrics["bc_loss"], "critic_loss": metrics["critic_loss"]}
        of_step = [entry[1:] for entry in section["losses"] if entry[0] == number]
        assert [name for name, _ in of_step] == list(losses)
        for name, value in of_step:
            first = of_denoiser(draws.bc_sigma) if name == "diffusion_loss" else NUMBER
            near(case, losses[name], value, name, STEPPED_NUMBER if number > 1 else first)
        for name, value in [entry[1:] for entry in section["losses_in_float64_run"] if entry[0] == number]:
            if case.double:
                near(case, losses[name], value, name, 1e-9 if name == "critic_loss" else 1e-6)
        for entry in [entry for entry in section["grads"] if entry["step"] == number]:
            compare_optimizer(case, agent, entry["opt"], entry["norm"], entry["lr"])
    ours, gaps = parameters_of(case, agent), named(section["f64_gap"])
    compare_tensors(case, ours, named(section["params_after"]), "parameters", PARAMETER, gaps)
    assert all(torch.equal(old, new) for old, new in zip(before, waiting, strict=True))
