"""edp_td3.py, edp_crr.py and edp_iql.py against their golden files."""

import importlib
import math
import re

import numpy as np
import pytest
import torch
from conformance import jax_formulas
from conformance.files import CPU, LeftOut, rounded, whole_batch
from conformance.jax_formulas import drawn, fill, make_batch, raw_gradients, traced_sample

# golden option: argument of the scripts; a script ignores what it has no argument for
OPTIONS = {
    "num_timesteps": "diffusion_steps", "schedule_name": "noise_schedule", "sample_method": "sampler",
    "dpm_steps": "dpm_calls", "time_embed_size": "time_dim", "max_grad_norm": "max_grad_norm",
    "policy_tgt_freq": "actor_target_every", "use_pred_astart": "action_approximation",
    "guide_coef": "guidance_weight", "discount": "gamma", "tau": "tau", "alpha": "alpha",
    "crr_beta": "temperature", "crr_ratio_upper_bound": "max_weight", "crr_weight_mode": "likelihood",
    "sample_actions": "num_advantage_samples", "expectile": "expectile",
}  # fmt: skip
# Options that a script left out, with the value that it has built in; others do not change its algorithm.
BUILT_IN = {"sample_logp": False, "target_entropy": -1, "policy_temp": 1, "weight_decay": 0}
LIKELIHOOD = BUILT_IN | {"use_pred_astart": True, "diff_coef": 1, "adv_norm": False, "fixed_std": True}
BUILT_IN_OF = {
    "TD3": BUILT_IN | {"max_q_backup": False},
    "CRR": LIKELIHOOD | {"max_q_backup": False, "crr_fn": "exp", "crr_avg_fn": "mean"},
    "IQL": LIKELIHOOD,
}
OF_OTHERS = {"max_q_backup_samples", "max_q_backup_topk", "crr_multi_sample_mse"}.union(*BUILT_IN_OF.values())
CHOICES = {
    "schedule_name": {"linear": "linear", "vp": "vp"},
    "sample_method": {"dpm": "dpm", "ddpm": "ddpm"},
    "crr_weight_mode": {"mle": "gaussian", "elbo": "elbo"},
}
# Single precision: the tolerance of each kind of number, and behind it the largest error (in brackets the
# smallest) of 18 runs with several instruction sets on an AMD EPYC. "later": after an optimizer step, where
# Adam amplifies the rounding of gradients near zero. Double precision is the check, at 1e-9.
SINGLE = {
    "betas": 1e-7,  # 1.4e-8
    "alpha_bars": 1e-6,  # 9e-8
    "ELBO": 5e-4,  # 1.4e-4; the authors' single precision, whose 1 - alpha_bar cancels
    "forward": 1e-5,  # 1.0e-6 (7e-7)
    "times": 1e-4,  # 7e-7; the authors' last times carry the rounding of 1 - alpha_bar
    "dpm": 2e-4,  # 5.9e-6
    "ddpm": 5e-4,  # 9.0e-5, after 1000 steps
    "metric": 1e-5,  # 2.0e-6 (3e-7)
    "later metric": 5e-4,  # 2.0e-5 (1.9e-5)
    "gradient": 1e-3,  # 2.7e-5 (1.4e-5)
    "later gradient": 1e-2,  # 8.3e-5 (6.2e-5)
    "parameter": 2e-3,  # 3.0e-4 (7e-5), of sums of up to 65,536 weights
}
METRICS = {
    "qf_loss": "critic_loss", "policy_loss": "actor_loss", "guide_loss": "guidance_loss",
    "diff_loss": "bc_loss", "vf_loss": "value_loss", "policy_grad_norm": "actor_grad_norm",
    "vf_grad": "value_grad_norm",
}  # fmt: skip
METRICS_OF = {  # by algorithm: what one name means
    "TD3": {"lmbda": "q_weight"},
    "CRR": {"lmbda": "weight", "adv": "advantage"},
    "IQL": {"vf_adv": "advantage"},
}


def algorithm_of(case):
    return case.golden["config"]["loss_type"]


def script_of(case):
    return importlib.import_module(f"edp_{algorithm_of(case).lower()}")


def make_args(case, overrides):
    """The arguments of a case. LeftOut: it sets an option that the script does not have."""
    algorithm, fields = algorithm_of(case), script_of(case).Args.__dataclass_fields__
    options = {"sample_method": case.golden["sample_method"]} | case.golden["config"] | overrides
    for name, value in BUILT_IN_OF[algorithm].items():
        if options.pop(name, value) != value:
            raise LeftOut(f"{name} other than {value}")
    assert options.pop("loss_type") == algorithm
    values = {"actor_lr": options["lr"], "critic_lr": options.pop("lr")}
    options["max_grad_norm"] = options["max_grad_norm"] or 1e30  # 0 is no limit
    stop, nstep = options.pop("dpm_t_end"), options.pop("nstep")
    inverse_temperature = options.pop("awr_temperature")
    del options["lr_decay"], options["lr_decay_steps"]  # see set_learning_rate
    unknown = options.keys() - OPTIONS - OF_OTHERS
    assert not unknown, f"options of the case that the harness cannot set: {unknown}"
    for name, argument in OPTIONS.items():
        if argument not in fields:
            continue
        value = options[name]
        if name in CHOICES and value not in CHOICES[name]:
            raise LeftOut(f"{name} {value}")
        values[argument] = CHOICES[name][value] if name in CHOICES else value
    if values["sampler"] == "dpm" and not math.isclose(stop, 1 / values["diffusion_steps"]):
        raise LeftOut(f"DPM-Solver that stops at {stop} of {values['diffusion_steps']} steps")
    if algorithm == "IQL":
        values |= {"gamma": values["gamma"] ** nstep, "temperature": 1 / inverse_temperature}
        values["likelihood"] = "gaussian"  # the authors' IQL has no other
    return script_of(case).Args(**values)


def parameters_of(agent, take=lambda parameter: parameter):
    networks = {"policy": "actor", "target_policy": "actor_target", "vf": "value"}
    networks |= {"qf{1}": "critic", "target_qf{1}": "critic_target"}
    found = {name: getattr(agent, ours) for name, ours in networks.items() if hasattr(agent, ours)}
    return jax_formulas.parameters_of(found, take)


@torch.no_grad()
def make_agent(case, clip_t=None, **overrides):
    """The agent of a case, filled by formula; overrides are golden option names.

    clip_t: the timesteps, counted from 0, whose alpha_bar DPM-Solver clips the noise by. The authors' code
    truncates a rounded number, so that they depend on the last bit; the files record what was used.
    """
    dims, args = case.golden["dims"], make_args(case, overrides)
    agent = getattr(script_of(case), f"EDP{algorithm_of(case)}")(dims["S"], dims["A"], args, CPU)
    set_clip_t(agent, clip_t)

    def shift_of(network):
        member = {"qf1": 0, "qf2": 1, "vf": 2, "policy": 0}[network.removeprefix("target_")]
        return 0.5 * member + 0.25 * network.startswith("target_")

    fill(parameters_of(agent), shift_of, dims.get("kernel_gain", 1))
    return agent


def make_plain_agent(case, **overrides):
    """As make_agent, whatever the case chooses among the options that were left out of the training."""
    plain = BUILT_IN_OF[algorithm_of(case)] | {"sample_method": "ddpm", "crr_weight_mode": "mle"}
    return make_agent(case, **plain | overrides)


def make_learner(case, **overrides):
    """The agent for updates; IQL's never samples, so that the sampler of its case does not matter."""
    plain = {"sample_method": "ddpm"} if algorithm_of(case) == "IQL" else {}
    return make_agent(case, **plain | overrides)


def set_clip_t(agent, clip_t):
    if clip_t is not None and agent.args.sampler == "dpm":
        left = iter(clip_t)
        agent.plan = [[call._replace(clip_t=next(left) + 1) for call in step] for step in agent.plan]
        assert not list(left)


def set_learning_rate(case, agent, number):
    """The authors' option to let the actor's rate fall; it works only where the gradient norm is limited."""
    config = case.golden["config"]
    if config["lr_decay"] and config["max_grad_norm"]:
        share = min((number - 1) / config["lr_decay_steps"], 1)
        rate = agent.optimizers["actor"].param_groups[0]["lr"]
        rate.fill_(agent.args.actor_lr * 0.5 * (1 + math.cos(math.pi * share)))


def chain_noise(draws):
    """(noise_steps, rows, action_dim) of a sampler: x_T, then the noise of its steps but the last, unused."""
    prior = [drawn(draw) for draw in draws if "initial noise" in draw["why"]]
    steps = [drawn(draw)[:-1] for draw in draws if "per step DDPM" in draw["why"]]
    return torch.cat([*prior, *steps]).flatten(1, -2) if prior else torch.empty(0)


def make_draws(case, draws):
    """Draws by meaning, from the entries of one update; what an update does not use is left empty."""
    policy = [draw for draw in draws if "policy loss" in draw["why"]]

    def found(words):
        return [values for draw in policy if words in draw["why"] for values in drawn(draw)]

    values = {
        "next_action_noise": chain_noise([draw for draw in draws if "value loss" in draw["why"]]),
        "t": found("timesteps")[0] + 1,
        "eps": found("noise eps")[0],
        "action_noise": chain_noise(policy),
        "member": (found("which Q")[0] <= 0.5).long().view(1) if found("which Q") else None,
        "advantage_noise": found("action_dist")[0] if found("action_dist") else None,
    }
    Draws = script_of(case).Draws
    return Draws(**{name: values[name] for name in Draws._fields})


def compare_update(case, agent, entry, draws, number):
    """Run one update with the draws; compare metrics, gradients and parameters."""
    iql = algorithm_of(case) == "IQL"
    agent.set_step(entry.get("total_steps_after", 1004 + number) - 1)
    set_learning_rate(case, agent, number)
    set_clip_t(agent, entry.get("dpm_t_clip_index"))
    if hasattr(agent, "actor_target") and "policy_tgt_update" in entry:
        assert bool(agent.actor_tau > 0) == entry["policy_tgt_update"]
    compare_next_actions(case, agent, entry, draws)
    elbo = getattr(agent.args, "likelihood", "") == "elbo"
    with raw_gradients(agent) as gradients, whole_batch(agent, make_draws(case, draws)):
        metrics = agent.update(make_batch(case, script_of(case)))
    names = METRICS | METRICS_OF[algorithm_of(case)]
    compared = [name for name in names if name in entry["metrics"] and names[name] in metrics]
    for name in compared:
        later = number > 1 or iql and not name.startswith("vf")
        tolerance = SINGLE["later metric" if later else "ELBO" if elbo else "metric"]
        case.close(metrics[names[name]], entry["metrics"][name], name, tolerance)
    q_mean = (entry["metrics"]["cur_q1"] + entry["metrics"]["cur_q2"]) / 2
    later = "later " if number > 1 else ""
    case.close(metrics["q_mean"], q_mean, "mean Q", SINGLE[f"{later}metric"])
    actual = parameters_of(agent, lambda parameter: gradients.get(id(parameter)))
    expected = entry.get("raw_grads_before_clipping", {})
    expected = {name: values for name, values in expected.items() if name != "policy_dist.log_stds"}
    case.same(actual, expected, "gradient of", SINGLE[f"{later}gradient"])
    if "params_after" in entry:
        actual = parameters_of(agent)
        expected = {name: entry["params_after"][name] for name in actual}
        case.same(actual, expected, "parameter", SINGLE["parameter"])
    assert {"diff_loss", "guide_loss", "policy_loss"} <= set(compared)


def compare_next_actions(case, agent, entry, draws):
    """The actions sampled for the target value, where the update samples any and the file lists them."""
    expected = entry.get("intermediates", {}).get("value_loss_fn", {}).get("next_action")
    if expected is not None:
        noise = make_draws(case, draws).next_action_noise
        actions = agent.sample(agent.actor_target, case.inputs["next_observations"], noise)
        case.close(actions, expected, "next actions", SINGLE[agent.args.sampler])


def run_steps(case, agent, steps, draws):
    for number, entry in enumerate(steps, start=1):
        of_step = [draw for draw in draws if draw["why"].startswith(f"step {number},")]
        compare_update(case, agent, entry, of_step or draws, number)


def overrides_of(case, name, entry):
    """The options that an entry of `variants` sets: its fields, else words of its name."""
    known = case.golden["config"].keys() | {"sample_method"}
    found = {}
    for table in [entry, *(value for value in entry.values() if isinstance(value, dict))]:
        found |= {option: value for option, value in table.items() if option in known}
    for option, value in re.findall(r"(\w+)\s*[=:]\s*([\w.+-]+)", name):
        if option in known and option not in found:
            words = {"True": True, "False": False, "true": True, "false": False}
            old = case.golden["config"].get(option, "")
            found[option] = words[value] if isinstance(old, bool) else type(old)(value)
    return found


check_inputs_follow_their_formulas = jax_formulas.check_inputs_follow_their_formulas


def check_schedule(case):
    schedule, agent = case.golden["schedule"], make_plain_agent(case)
    beta, alpha_bar = np.array(agent.schedule)
    assert len(beta) == schedule["T"] + 1
    t = np.array(schedule["index"]) + 1
    expected = schedule["arrays"]
    case.close(beta[t], expected["betas"], "betas", SINGLE["betas"])
    case.close(alpha_bar[t], expected["alphas_cumprod"], "alphas_cumprod", SINGLE["alpha_bars"])
    variances = np.array(agent.sigma)[t] ** 2
    case.close(variances, expected["posterior_variance"], "posterior variance", SINGLE["alpha_bars"])
    if hasattr(agent, "elbo_weights") and "normalized_ts_weights" in expected:
        case.close(agent.elbo_weights[t], expected["normalized_ts_weights"], "ELBO weights", SINGLE["ELBO"])


def check_forward(case):
    forward, agent = case.golden["forward"], make_plain_agent(case)
    obs, action = case.inputs["observations"], case.inputs["actions"]
    t = torch.tensor(forward["t"]) + 1
    q, target_q = agent.critic(obs, action), agent.critic_target(obs, action)
    actual = {"noise_network(obs, actions, t)": agent.actor(obs, action, t)}
    actual |= {"qf1": q[0], "qf2": q[1], "target_qf1": target_q[0], "target_qf2": target_q[1]}
    if hasattr(agent, "actor_target"):
        actual["target_noise_network(obs, actions, t)"] = agent.actor_target(obs, action, t)
    if hasattr(agent, "value"):
        actual["vf"] = agent.value(obs)
    for name, value in actual.items():
        case.close(value, forward[name], name, SINGLE["forward"])


def check_action_approximation(case):
    expected, agent = case.golden["action_approximation"], make_plain_agent(case)
    action, t = case.inputs["actions"], torch.tensor(expected["t"]) + 1
    noise = drawn(expected["draws"][0])[0]
    x_t = script_of(case).add_noise(action, t, noise, agent.alpha_bar)
    eps = agent.actor(case.inputs["observations"], x_t, t)
    actual = {
        "x_t": x_t,
        "eps_pred": eps,
        "mse_per_row": (eps - noise).square().mean(1),
        "pred_xstart_clipped": script_of(case).approximate_action(x_t, t, eps, agent.alpha_bar),
    }
    for name, value in actual.items():
        case.close(value, expected[name], name, SINGLE["forward"])


def check_dpm_solver(case):
    for name, expected in case.golden["samplers"].items():
        if not name.startswith("dpm"):
            continue
        options = {"sample_method": "dpm", "dpm_t_end": expected["args"]["t_0"]}
        options["dpm_steps"] = expected["args"]["steps"]
        calls = expected["model_calls"]
        try:
            agent = make_plain_agent(case, clip_t=[call["t_clip_index"] for call in calls], **options)
        except LeftOut as option:
            case.left_out(option)
            continue
        plan = [call for step in agent.plan for call in step]
        case.close([call.t - 1 for call in plan], [call["t_network"] for call in calls], "t", SINGLE["times"])
        assert [len(step) for step in agent.plan] == expected["orders"]
        actions, x = traced_sample(agent, case.inputs["observations"], drawn(expected["draws"][0])[0:1])
        ends = np.cumsum(expected["orders"])
        for end, step in zip(ends, expected["outer"], strict=True):
            rows = torch.tensor(step["x"]).shape[0]
            case.close(x[end][:rows], step["x"], f"x after {end} calls", SINGLE["dpm"])
        case.close(actions, expected["actions"], name, SINGLE["dpm"])


def check_all_step_samplers(case):
    expected, agent = case.golden["samplers"]["ddpm_sample"], make_plain_agent(case)
    actions, x = traced_sample(agent, case.inputs["observations"], chain_noise(expected["draws"]))
    for step in expected["trace"]:
        rows = torch.tensor(step["x_after"])
        case.close(x[-1 - step["t"]][: len(rows)], rows, f"x after t={step['t']}", SINGLE["ddpm"])
    case.close(actions, expected["actions"], "ddpm", SINGLE["ddpm"])
    if "ddim_sample" in case.golden["samplers"]:
        case.left_out("ddim sampler")


def check_act(case):
    """Energy-based action selection; the categorical draw is replaced by the file's, by its formula."""
    expected = case.golden["evaluation_action_selection"]
    options = {"sample_method": case.golden["sample_method"]}
    agent = make_plain_agent(case, clip_t=expected.get("dpm_t_clip_index"), **options)
    agent.args.num_action_samples = expected["num_samples"]
    seen = []

    def categorical(probabilities, count):
        seen.append(probabilities)
        numbers = np.arange(probabilities.numel()).reshape(probabilities.shape)
        u = rounded(np.mod(0.137 * numbers + 0.05, 1))
        return (probabilities.log() - (-u.log()).log()).argmax(1, keepdim=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", categorical)
        action = agent.act(case.inputs["observations"][:1], chain_noise(expected["draws"]))
    # q up to the constant that softmax takes away
    q = torch.tensor(expected["q_min"])
    case.close(seen[0], q.softmax(1), "probabilities of the candidates", SINGLE["forward"])
    case.close(action, expected["action"][0], "action", SINGLE[agent.args.sampler])


def check_three_updates(case):
    train = case.golden["train"]
    run_steps(case, make_learner(case), train["steps"], train["draws"])


def check_variants(case):
    """Held-back cases try other options in short runs, which begin with update 1005."""
    variants = case.golden.get("variants", {})
    if isinstance(variants, list):
        variants = {str(entry.get("name", i)): entry for i, entry in enumerate(variants)}
    for name, entry in variants.items():
        if isinstance(entry, dict) and ("steps" in entry or "metrics" in entry):
            try:
                agent = make_learner(case, **overrides_of(case, name, entry))
            except LeftOut as option:
                case.left_out(f"{name} ({option})")
                continue
            run_steps(case, agent, entry.get("steps", [entry]), entry["draws"])
