"""qvpo_online.py against its golden files."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from conformance import torch_formulas
from conformance.files import CPU, rounded, tensors_of, units
from conformance.torch_formulas import drawn, draws_by_meaning, fill, make_batch, rounded_tables

import qvpo_online

# golden option: argument of qvpo_online.py
OPTIONS = {
    "n_timesteps": "diffusion_steps", "behavior_sample": "num_behavior_samples",
    "target_sample": "num_target_samples", "eval_sample": "num_action_samples", "chosen": "num_chosen",
    "train_sample": "num_train_samples", "cut": "weight_cut", "entropy_alpha": "entropy_weight",
    "diffusion_lr": "actor_lr", "critic_lr": "critic_lr", "ac_grad_norm": "max_grad_norm", "tau": "tau",
    "gamma": "gamma", "adam_eps": "adam_eps",
}  # fmt: skip
# Options of the official code that were left out, at the values at which it does what qvpo_online.py does.
LEFT_OUT = {
    "policy_type": "Diffusion", "weighted": True, "aug": True, "gradient": False, "policy_freq": 1,
    "epsilon": 0.0, "noise_ratio": 1.0, "beta_schedule": "cosine", "deterministic": False,
    "update_actor_target_every": 1,
}  # fmt: skip
CHAIN = ["noise_ratio", "beta_schedule"]  # those of them that a reverse chain depends on ...
TRAINING = [name for name in LEFT_OUT if name not in ("epsilon", "deterministic")]  # ... and an update
WEIGHTS = ["qadv", "qcut"]
LEFT_OUT_WEIGHTS = ["qrelu", "qexpn", "qcut0n", "qcut1n"]
# Sizes, the environment's range of actions, and options that matter only with others that were left out.
OTHER = {
    "B", "S", "A", "action_low", "action_high", "action_lr", "action_gradient_steps", "ratio", "beta",
    "q_neg", "alpha_mean", "alpha_std",
}  # fmt: skip

# Tolerances for numbers that the file has in single precision, on |error| / (1 + |number|); beside each the
# largest error of qvpo_a over several instruction sets, one and two threads, in both precisions.
ROUNDED = 1e-7  # 5.4e-8: only rounded to float32
SCHEDULE = 1e-5  # 6.5e-6: the authors compute in single precision, where 1 - beta_T has lost three digits
NETWORK = units(1)  # 7.5e-8
ACTION = 2e-5  # 2.2e-6: of a whole chain, with that schedule
VALUE = units(4)  # 3.4e-7: of such actions
FIRST_STEP = units(10)  # 5.3e-7
LATER_STEP = 5e-4  # 1.3e-6, but Adam's first steps can amplify the rounding of near-zero gradients
PARAMETER = 1e-3  # 6.8e-6, likewise


def options_of(case, overrides):
    options = case.golden["meta"]["config"] | overrides
    known = {*OPTIONS, *LEFT_OUT, *OTHER, "q_transform"}
    assert options.keys() <= known, f"options that the harness does not know: {options.keys() - known}"
    return options


def needs_left_out(case, names, overrides=None, section="the case"):
    """Whether the case has other values for some of these options than qvpo_online.py; recorded."""
    options = options_of(case, overrides or {})
    found = [name for name in names if options[name] != LEFT_OUT[name]]
    for name in found:
        case.left_out(f"{name} {options[name]} in {section}")
    return bool(found)


def make_args(case, overrides):
    options = options_of(case, overrides)
    if options["target_sample"] == -1:
        options["target_sample"] = options["behavior_sample"]
    options["gamma"] = float(np.float32(options["gamma"]))  # it lives in the mask, which is float32
    values = {OPTIONS[name]: value for name, value in options.items() if name in OPTIONS}
    assert options["q_transform"] in WEIGHTS + LEFT_OUT_WEIGHTS
    if options["q_transform"] in WEIGHTS:
        values["weight"] = options["q_transform"]
    values["num_entropy_samples"] = 10 if options["entropy_alpha"] > 0 else 0  # fixed in the official code
    return qvpo_online.Args(**values)


def parameters_of(agent, take=lambda parameter: parameter):
    """Network -> tensors in the authors' order and layout [out, in]; take(parameter) may give gradients."""
    networks = ("actor", "actor_target", "critic", "critic_target")
    return {name: tensors_of(getattr(agent, name), take) for name in networks}


@torch.no_grad()
def make_agent(case, gain=1.0, **overrides):
    """The agent of a case, filled by formula; overrides are golden option names."""
    config = case.golden["meta"]["config"]
    agent = qvpo_online.QVPO(config["S"], config["A"], make_args(case, overrides), CPU)
    for network, tensors in parameters_of(agent).items():
        fill(tensors, network.endswith("_target"), gain)
    return agent


def compare_network(case, network, tensors, expected, name, *tolerances):
    names = [name for name, _ in case.golden["params"][network.removesuffix("_target")]]
    tensors = dict(zip(names, tensors, strict=True))
    case.same(tensors, {each: expected[each] for each in tensors}, f"{name} {network}", *tolerances)


def chain(case, n, batch, first=0):
    """(T, n, batch, A) from the normal draws first, first + 1, ..., for a section that lists none."""
    config = case.golden["meta"]["config"]
    numbers, shape = range(first, first + config["n_timesteps"]), [n * batch, config["A"]]
    noise = torch.stack([drawn({"kind": "normal", "n": number, "shape": shape}) for number in numbers])
    return noise.unflatten(1, (n, batch))


def listed_chain(draws, meaning, batch):
    """The same from the entries of one chain; the noise after its last step is not used."""
    return torch.stack(draws_by_meaning(draws, meaning)[:-1]).unflatten(1, (-1, batch))


def sections(case, *prefixes):
    """(name, section, gain) of the sections whose names start like this."""
    found = {name: of for name, of in case.golden["sections"].items() if name.startswith(prefixes)}
    assert found
    return [(name, section, section.get("gain", 1.0)) for name, section in found.items()]


def check_fill(case):
    for network, tensors in parameters_of(make_agent(case)).items():
        expected = case.golden["params_filled"][network]
        compare_network(case, network, tensors, expected, "fill", ROUNDED, ROUNDED)


def check_inputs(case):
    torch_formulas.compare_batch(case, make_batch(case, qvpo_online), ROUNDED, ROUNDED)


def check_schedule(case):
    """Every coefficient of the authors' tables, from beta and alpha_bar, to the float32 that they are in."""
    if needs_left_out(case, ["beta_schedule"]):
        return
    agent = make_agent(case)
    [tables] = case.golden["schedule"].values()
    beta, bar = map(np.array, agent.schedule)
    variance = beta[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    ours = {
        "betas": beta[1:],
        "alphas_cumprod": bar[1:],
        "sqrt_alphas_cumprod": np.sqrt(bar[1:]),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar[1:]),
        "sqrt_recip_alphas_cumprod": 1 / np.sqrt(bar[1:]),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar[1:] - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(variance.clip(1e-20)),
        "posterior_mean_coef1": np.sqrt(bar[:-1]) * beta[1:] / (1 - bar[1:]),
        "posterior_mean_coef2": np.sqrt(1 - beta[1:]) * (1 - bar[:-1]) / (1 - bar[1:]),
    }
    assert ours.keys() == tables.keys()
    for name, values in ours.items():
        case.near(values, tables[name], name, ROUNDED if name == "betas" else SCHEDULE)
    case.near(agent.sigma[1:], np.sqrt(tables["posterior_variance"]), "sigma", SCHEDULE)
    assert agent.alpha_bar.tolist() == torch.tensor(agent.schedule.alpha_bar).tolist()


def check_forward(case):
    forward, agent, batch = case.golden["forward"], make_agent(case), make_batch(case, qvpo_online)
    t = torch.tensor(forward["t"]).unsqueeze(1) + 1  # (B, 1)
    for name, actor in (("noise_net", agent.actor), ("noise_net_target", agent.actor_target)):
        case.near(actor(batch.action, actor.shared(batch.obs, t)), forward[name], name, NETWORK)
    for suffix, critic in (("", agent.critic), ("_target", agent.critic_target)):
        q = critic(batch.obs, batch.action)
        expected = [forward[f"q{k + 1}{suffix}"] for k in range(len(q))]
        case.near(q, expected, f"critic{suffix}", NETWORK)


def check_sampler(case):
    """Also in double precision with the script's own coefficients."""
    if needs_left_out(case, CHAIN):
        return
    section, agent, obs = (
        case.golden["sections"]["chain_plain"],
        make_agent(case),
        make_batch(case, qvpo_online).obs,
    )
    noise = listed_chain(section["draws"], "", len(obs))
    actions, _ = agent.candidates(obs, noise)
    case.near(actions[0], section["action"], "action", ACTION)
    with rounded_tables(case, qvpo_online):
        actions, _ = agent.candidates(obs, noise)
    case.near(actions[0], section["action"], "action with rounded coefficients", ACTION)


def well_separated(section, gain):
    """Whether rounding cannot have made the authors' code choose another candidate."""
    margins = section.get("selection_margins", [section.get("selection_margin")])
    return min(margins) > 2e-6 * gain


def check_choices(case):
    """Best of several candidates: for the target value, for acting, and for the actor loss."""
    if needs_left_out(case, CHAIN):
        return
    compared, batch = [], make_batch(case, qvpo_online)
    size = len(batch.obs)
    for name, section, gain in sections(case, "target_action", "behavior_action", "sample_n_chosen"):
        agent = make_agent(case, gain)
        if not well_separated(section, gain):
            continue
        if name.startswith("target_action"):
            noise = chain(case, agent.args.num_target_samples, size)
            actions, q = agent.candidates(batch.next_obs, noise, target=True)
            chosen = actions[q.argmax(0), torch.arange(size)]
            case.near(chosen, section["action"], name, ACTION)
            case.near(q.amax(0), section["q_min"], f"{name}: q", VALUE)
        elif name.startswith("behavior_action"):
            noise = chain(case, agent.args.num_behavior_samples, size)
            case.near(agent.explore(batch.obs, noise), section["action"], name, ACTION)
        else:
            k = len(section["actions"]) // size
            agent = make_agent(case, gain, chosen=k, q_transform="qcut", cut=-100.0)  # then a weight is the q
            noise = chain(case, agent.args.num_train_samples, size)
            _, q = agent.candidates(batch.obs, noise)
            actions, weight = agent.choose(batch.obs, noise)  # (k, B, A), (k, B)
            case.near(actions.transpose(0, 1).flatten(0, 1), section["actions"], name, ACTION)
            case.near(weight.T.flatten(), section["q"], f"{name}: q", VALUE)
            case.near([q.mean(), q.std()], [section["mean"], section["std"]], f"{name}: all q", VALUE)
        compared.append(name)
    assert compared, "every section has choices that rounding could change"


def in_env_range(case, action):
    """An action in [-1, 1] as the environment receives it."""
    config = case.golden["meta"]["config"]
    env = gym.Env()
    low, high = (np.full(config["A"], config[name], np.float32) for name in ("action_low", "action_high"))
    env.action_space, env.observation_space = gym.spaces.Box(low, high), gym.spaces.Box(-1, 1, (1,))
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env.action(action.squeeze(0).float().numpy())


def check_act(case):
    for name, section, gain in sections(case, "sample_action_eval"):
        evaluates = "eval_True" in name
        if needs_left_out(case, [*CHAIN, "deterministic" if evaluates else "epsilon"], section=name):
            continue
        if not well_separated(section, gain):
            continue
        agent, obs = make_agent(case, gain), make_batch(case, qvpo_online).obs[:1]
        n = agent.args.num_action_samples if evaluates else agent.args.num_behavior_samples
        act = agent.act if evaluates else agent.explore
        case.near(in_env_range(case, act(obs, chain(case, n, 1))), section["action"], name, ACTION)


def check_act_after_a_deterministic_evaluation(case):
    """The evaluation itself was left out; its chain has taken the first draws."""
    section = case.golden["sections"]["sample_action_deterministic"]
    case.left_out("deterministic evaluation in sample_action_deterministic")
    if needs_left_out(case, [*CHAIN, "epsilon"]):
        return
    agent, obs = make_agent(case, section["gain"]), make_batch(case, qvpo_online).obs[:1]
    noise = chain(case, agent.args.num_behavior_samples, 1, first=agent.args.diffusion_steps + 1)
    action = in_env_range(case, agent.explore(obs, noise))
    case.near(action, section["action_behavior_after"], "behaviour", ACTION)


def check_actor_loss(case):
    if needs_left_out(case, ["beta_schedule"]):
        return
    section, agent = case.golden["sections"]["actor_loss"], make_agent(case)
    batch = make_batch(case, qvpo_online)
    [t] = draws_by_meaning(section["draws"], "diffusion timesteps")
    [eps] = draws_by_meaning(section["draws"], "noise eps")
    weight = rounded(1 + 0.5 * np.sin(0.8 * np.arange(len(batch.obs))))
    one_action = (tensor.unsqueeze(0) for tensor in (batch.action, weight, t + 1, eps))
    loss = agent.weighted_loss(batch.obs, *one_action)
    loss.backward()
    case.near(loss, section["loss"], "loss", FIRST_STEP)
    gradients = parameters_of(agent, lambda parameter: parameter.grad)["actor"]
    compare_network(case, "actor", gradients, section["grads"], "gradient of", FIRST_STEP, FIRST_STEP)


def check_weights(case):
    section = case.golden["sections"]["q_transforms"]
    cut = float(re.search(r"\bcut=([\d.]+)", section["note"])[1])  # which no field of the section has
    for chosen in (1, 2):
        expected = section[f"chosen{chosen}"]
        q, value = torch.tensor(expected["q_in"]).view(-1, chosen).T, torch.tensor(expected["v_in"])
        for name in WEIGHTS:
            agent = make_agent(case, q_transform=name, chosen=chosen, cut=cut)
            case.near(agent.q_weight(q, value).T.flatten(), expected[name], name, ROUNDED)
    case.left_out(f"weights {LEFT_OUT_WEIGHTS}")


def check_entropy_weight(case):
    schedule = case.golden["sections"]["entropy_alpha_schedule"]
    start, num_steps = re.search(r"--entropy_alpha ([\d.]+), num_steps ([\de]+)", schedule["note"]).groups()
    agent = make_agent(case, entropy_alpha=float(start))  # the note has what no field has
    agent.args.total_steps = float(num_steps)
    for step, expected in schedule["values"].items():
        agent.set_step(int(step))
        case.close(agent.entropy_weight, expected, f"entropy weight at step {step}", ROUNDED)


def make_draws(agent, draws, batch):
    """Draws by meaning, from the entries of one update. The authors' rows go by state first."""
    [t] = draws_by_meaning(draws, "diffusion timesteps")
    [eps] = draws_by_meaning(draws, "noise eps")
    uniform = draws_by_meaning(draws, "uniform(-1,1) actions")
    uniform = rounded(2 * uniform[0] - 1) if uniform else torch.empty(0, agent.action_dim)

    def by_action(rows):
        return rows.unflatten(0, (-1, batch, agent.args.num_chosen)).transpose(1, 2).flatten(0, 1)

    return qvpo_online.Draws(
        next_action_noise=listed_chain(draws, "actor_target chain", batch),
        candidate_noise=listed_chain(draws, "train_sample candidates", batch),
        uniform_actions=by_action(uniform),
        t=by_action(t) + 1,
        eps=by_action(eps),
    )


def draws_of(case, name, agent, num_steps):
    """The draws of each step; sections other than `train` mostly refer to it, with sizes that may differ."""
    listed = case.golden["sections"][name]["draws"]
    if isinstance(listed, str):
        listed = case.golden["sections"]["train"]["draws"]
    args, batch = agent.args, case.golden["meta"]["config"]["B"]
    chosen, uniform = args.num_chosen * batch, args.num_chosen * batch * args.num_entropy_samples
    rows = {
        "actor_target chain": args.num_target_samples * batch,
        "train_sample candidates": args.num_train_samples * batch,
        "uniform(-1,1) actions": uniform,
        "diffusion timesteps": chosen + uniform,
        "noise eps": chosen + uniform,
    }

    def with_rows(draw):
        [size] = [size for meaning, size in rows.items() if meaning in draw["why"]]
        return draw | {"shape": [size, *draw["shape"][1:]]}

    sized = [draw for draw in map(with_rows, listed) if draw["shape"][0] > 0]
    return [[draw for draw in sized if draw["step"] == step] for step in range(1, num_steps + 1)]


def update(agent, number, batch, policy_obs, draws):
    """One update with these states for the critics and for the actor, and these draws."""
    data = qvpo_online.Batch(*(torch.cat([column, column]) for column in batch))
    data.obs[len(policy_obs) :] = policy_obs
    rows = torch.arange(len(data.obs)).view(2, -1)
    agent.set_step(number)
    agent.entropy_weight.fill_(agent.args.entropy_weight)  # the files leave its schedule out
    agent.num_stored.fill_(len(data.obs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "draw", lambda batch_size: draws)
        patch.setattr(torch, "randint", lambda high, shape, device: rows)
        return agent.update(data)


def run_train_section(case, name, gain):
    """All the steps of a section; losses, gradients and parameters after each."""
    section = case.golden["sections"][name]
    overrides = {key: type_of(value) for key, value in section["overrides"].items()}
    if needs_left_out(case, TRAINING, overrides, name):
        return
    weight = options_of(case, overrides)["q_transform"]
    if weight not in WEIGHTS:
        case.left_out(f"weight {weight} in {name}")
        return
    agent, batch, tolerance = make_agent(case, gain, **overrides), make_batch(case, qvpo_online), FIRST_STEP
    policy_obs = batch.obs
    if "sin(0.11k+2.5)" in section["note"]:
        numbers = np.arange(batch.obs.numel())
        policy_obs = rounded(np.sin(0.11 * numbers + 2.5).reshape(batch.obs.shape))
    steps = section["steps"]
    for number, (entry, draws) in enumerate(zip(steps, draws_of(case, name, agent, len(steps)), strict=True)):
        metrics = update(agent, number, batch, policy_obs, make_draws(agent, draws, len(batch.obs)))
        gradients = parameters_of(agent, lambda parameter: parameter.grad)
        for network in ("critic", "actor"):
            if expected := entry.get(f"{network}_grads_after_clip"):
                of_network = (case, network, gradients[network], expected)
                compare_network(*of_network, "gradient of", LATER_STEP, LATER_STEP)
        if number > 0:
            tolerance = LATER_STEP
        for metric in ("critic_loss", "actor_loss", "critic_grad_norm", "actor_grad_norm"):
            case.near(metrics[metric], entry[metric], f"{metric} of step {number + 1}", tolerance)
        case.near(metrics["target_mean"], np.mean(entry["target_q"]), "target", tolerance)
        if case.double:
            for metric, value in section["losses_in_float64_run"][number].items():
                case.close(metrics[metric], value, f"{metric} of step {number + 1}, in double precision")
        if "params_after" in entry:
            compare_parameters(case, agent, entry["params_after"], PARAMETER, PARAMETER)
    if case.double:
        compare_parameters(case, agent, section["params_after_float64_run"])


def type_of(text):
    """The value of an option that the file holds as text."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and "." not in str(text) else number


def compare_parameters(case, agent, expected, *tolerances):
    for network, tensors in parameters_of(agent).items():
        compare_network(case, network, tensors, expected[network], "parameter", *tolerances)


def check_updates(case):
    case.left_out("running mean and deviation of Q, after each update")
    with rounded_tables(case, qvpo_online):
        for name, _, gain in sections(case, "train"):
            run_train_section(case, name, gain)
