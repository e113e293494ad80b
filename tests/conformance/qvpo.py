"""qvpo_online.py against its golden files."""

import math
import re

import gymnasium as gym
import numpy as np
import torch
from conformance.files import CPU, rounded, statistics
from conformance.torch_formulas import batch_columns, drawn, draws_by_meaning, filled, rounded_tables

import qvpo_online

# golden option: argument of qvpo_online.py
OPTIONS = {
    "noise_ratio": "sampler_temperature", "beta_schedule": "noise_schedule", "n_timesteps": "diffusion_steps",
    "behavior_sample": "num_behavior_samples", "target_sample": "num_target_samples",
    "eval_sample": "num_action_samples", "deterministic": "deterministic_eval", "beta": "weight_beta",
    "alpha_mean": "q_mean_rate", "alpha_std": "q_std_rate", "chosen": "num_chosen", "q_neg": "weight_shift",
    "train_sample": "num_train_samples", "q_transform": "weight", "cut": "weight_cut",
    "entropy_alpha": "entropy_weight", "diffusion_lr": "actor_lr", "critic_lr": "critic_lr",
    "ac_grad_norm": "max_grad_norm", "tau": "tau", "update_actor_target_every": "actor_target_every",
    "gamma": "gamma", "adam_eps": "adam_eps",
}  # fmt: skip
# Options of the official code that qvpo_online.py does not have; a case may only hold them at these values.
FIXED = {
    "policy_type": "Diffusion", "weighted": True, "aug": True, "gradient": False, "policy_freq": 1,
    "epsilon": 0.0,
}  # fmt: skip
# Sizes, the range of the environment's actions, and options of the modes that FIXED rules out.
OTHER = {"B", "S", "A", "action_low", "action_high", "action_lr", "action_gradient_steps", "ratio"}


def make_args(case, overrides):
    options = case.golden["meta"]["config"] | overrides
    for name, value in FIXED.items():
        assert options.pop(name, value) == value, f"qvpo_online.py has no option {name}"
    if options["target_sample"] == -1:
        options["target_sample"] = options["behavior_sample"]
    num_entropy_samples = 10 if options["entropy_alpha"] > 0 else 0  # fixed in the official code
    options["gamma"] = float(np.float32(options["gamma"]))  # it lives in the mask, which is float32
    unknown = options.keys() - OPTIONS - OTHER
    assert not unknown, f"options of the case that the harness cannot set: {unknown}"
    values = {OPTIONS[name]: value for name, value in options.items() if name in OPTIONS}
    values = qvpo_online.DEFAULT_SETTINGS | {"num_entropy_samples": num_entropy_samples} | values
    return qvpo_online.Args(**values)


def parameters_of(agent, take=lambda parameter: parameter):
    """Network -> tensors in the authors' order and layout [out, in]; take(parameter) may give gradients."""
    tensors = {}
    for name in ("actor", "actor_target"):
        actor = getattr(agent, name)
        linears = [*actor.time_mlp, *actor.layers]
        tensors[name] = [take(parameter) for linear in linears for parameter in (linear.weight, linear.bias)]
    for name in ("critic", "critic_target"):
        critic, of_network = getattr(agent, name), []
        for k in range(critic.num_qs):
            for layer in critic.layers:
                weight, bias = take(layer.weight), take(layer.bias)
                of_network += [None, None] if weight is None else [weight[k].T, bias[k, 0]]
        tensors[name] = of_network
    return tensors


@torch.no_grad()
def make_agent(case, gain=1.0, **overrides):
    """The agent of a case, filled by formula; overrides are golden option names."""
    config = case.golden["meta"]["config"]
    agent = qvpo_online.QVPO(config["S"], config["A"], make_args(case, overrides), CPU)
    for network, tensors in parameters_of(agent).items():
        for position, tensor in enumerate(tensors):
            kind = "weight" if tensor.ndim == 2 else "bias"
            tensor.copy_(filled(tensor.shape, position, kind, network.endswith("_target"), gain))
    return agent


def names_of(case, network):
    return [name for name, _ in case.golden["params"][network.removesuffix("_target")]]


def make_batch(case):
    return qvpo_online.Batch(*batch_columns(case.golden["meta"]["config"]))


def close(case, actual, expected, name, float32_tolerance=1e-5):
    """Against numbers that the file has in single precision only: its tolerance in both precisions."""
    actual = np.asarray(torch.as_tensor(actual).detach(), np.float64)
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, name
    error = np.abs(actual - expected) / (1 + np.abs(expected))
    assert error.max() <= float32_tolerance, f"{name}: off by {error.max():.2e}"


def chain(draws, meaning):
    """(T, rows, A) from the draws of one reverse chain; that of the last step is not used."""
    return torch.stack(draws_by_meaning(draws, meaning)[:-1])


def chain_of_shape(case, rows):
    """The draws of a section that lists none: normal draws 0, 1, ..., T - 1 for one chain of these rows."""
    config = case.golden["meta"]["config"]
    draws = [{"kind": "normal", "n": n, "shape": [rows, config["A"]]} for n in range(config["n_timesteps"])]
    return torch.stack([drawn(draw) for draw in draws])


def sections(case, *prefixes):
    """(name, section, gain) of the sections whose names start like this."""
    found = [
        (name, section, section.get("gain", 1.0))
        for name, section in case.golden["sections"].items()
        if name.startswith(prefixes)
    ]
    assert found
    return found


def check_fill(case):
    for network, tensors in parameters_of(make_agent(case)).items():
        expected = case.golden["params_filled"][network]
        for name, tensor in zip(names_of(case, network), tensors, strict=True):
            close(case, statistics(tensor)[: len(expected[name])], expected[name], f"{network} {name}", 1e-7)


def check_inputs(case):
    batch, expected = make_batch(case), case.golden["inputs_check"]
    columns = {
        "state": batch.obs, "action": batch.action, "reward": batch.reward, "next_state": batch.next_obs,
        "not_done": 1 - batch.terminal,
    }  # fmt: skip
    for name, column in columns.items():
        close(case, statistics(column), expected[name], name, 1e-7)


def check_schedule(case):
    """Every coefficient of the authors' tables, from beta and alpha_bar, to the float32 that they are in."""
    agent = make_agent(case)
    [tables] = case.golden["schedule"].values()
    beta, bar = np.array(agent.beta), np.array(agent.alpha_bar)
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
        # the authors compute in single precision, where 1 - beta_T has lost three digits
        close(case, values, tables[name], name, 1e-7 if name == "betas" else 1e-5)
    sigma = [agent.args.sampler_temperature * math.sqrt(value) for value in tables["posterior_variance"]]
    close(case, agent.sigma[1:], sigma, "sigma", 3e-6)
    assert agent.alpha_bars.tolist() == torch.tensor(agent.alpha_bar).tolist()


def check_forward(case):
    forward, agent, batch = case.golden["forward"], make_agent(case), make_batch(case)
    t = torch.tensor(forward["t"])
    for name, actor in (("noise_net", agent.actor), ("noise_net_target", agent.actor_target)):
        time_share = actor.embed_time(agent.args.diffusion_steps)[t + 1]
        close(case, actor(actor.embed_obs(batch.obs), time_share, batch.action), forward[name], name, 2e-6)
    for suffix, critic in (("", agent.critic), ("_target", agent.critic_target)):
        q = critic(batch.obs, batch.action)
        expected = [forward[f"q{k + 1}{suffix}"] for k in range(critic.num_qs)]
        close(case, q, expected, f"critic{suffix}", 2e-6)


def check_sampler(case):
    """Also in double precision with the script's own coefficients."""
    section, agent = case.golden["sections"]["chain_plain"], make_agent(case)
    noise = torch.stack([drawn(draw) for draw in section["draws"]][:-1])
    obs = make_batch(case).obs
    actions, _ = agent.candidates(obs, noise, agent.sigma)
    close(case, actions[0], section["action"], "action", 5e-6)
    with rounded_tables(case, qvpo_online):
        actions, _ = agent.candidates(obs, noise, agent.sigma)
    close(case, actions[0], section["action"], "action with rounded coefficients", 5e-6)


def well_separated(section, gain):
    """Whether rounding cannot have made the authors' code choose another candidate."""
    margins = section.get("selection_margins", [section.get("selection_margin")])
    return min(margins) > 2e-6 * gain


def check_choices(case):
    """Best of several candidates: for the TD target, for acting, and for the actor loss."""
    compared = []
    for name, section, gain in sections(case, "target_action", "behavior_action", "sample_n_chosen"):
        agent, batch = make_agent(case, gain), make_batch(case)
        if not well_separated(section, gain):
            continue
        if name.startswith("target_action"):
            noise = chain_of_shape(case, agent.args.num_target_samples * len(batch.obs))
            actions, q = agent.candidates(batch.next_obs, noise, agent.sigma, target=True)
            chosen = actions[q.argmax(0), torch.arange(len(batch.obs))]
            close(case, chosen, section["action"], name, 2e-5)
            close(case, q.amax(0), section["q_min"], f"{name}: q", 1e-5)
        elif name.startswith("behavior_action"):
            noise = chain_of_shape(case, agent.args.num_behavior_samples * len(batch.obs))
            close(case, agent.explore(batch.obs, noise), section["action"], name, 2e-5)
        else:
            k = int(name.removeprefix("sample_n_chosen").split("_")[0])
            agent = make_agent(
                case, gain, chosen=k, q_transform="qrelu", q_neg=0.0, alpha_mean=1, alpha_std=1
            )
            noise = chain_of_shape(case, agent.args.num_train_samples * len(batch.obs))
            actions, weight = agent.choose(batch.obs, noise)
            close(case, actions, section["actions"], name, 2e-5)
            close(case, weight, np.maximum(section["q"], 0), f"{name}: q")
            close(case, agent.running_q_mean, section["mean"], f"{name}: mean")
            close(case, agent.running_q_std, section["std"], f"{name}: std")
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
        if not well_separated(section, gain):
            continue
        agent, obs = make_agent(case, gain), make_batch(case).obs[:1]
        evaluates = "eval_True" in name
        n = agent.args.num_action_samples if evaluates else agent.args.num_behavior_samples
        act = agent.act if evaluates else agent.explore
        action = act(obs, chain_of_shape(case, n))
        close(case, in_env_range(case, action), section["action"], name, 2e-5)


def check_deterministic_act(case):
    """First an evaluation, then an action of the behaviour policy, which takes the draws after it."""
    section = case.golden["sections"]["sample_action_deterministic"]
    agent = make_agent(case, section["gain"], deterministic=True)
    obs, num_steps = make_batch(case).obs[:1], agent.args.diffusion_steps
    action = agent.act(obs, chain_of_shape(case, agent.args.num_action_samples))
    close(case, in_env_range(case, action), section["action_eval"], "evaluation", 2e-5)
    shape = [agent.args.num_behavior_samples, agent.action_dim]
    draws = [{"kind": "normal", "n": num_steps + 1 + i, "shape": shape} for i in range(num_steps)]
    action = agent.explore(obs, torch.stack([drawn(draw) for draw in draws]))
    close(case, in_env_range(case, action), section["action_behavior_after"], "behaviour", 2e-5)


def check_actor_loss(case):
    section, agent, batch = case.golden["sections"]["actor_loss"], make_agent(case), make_batch(case)
    [t] = draws_by_meaning(section["draws"], "diffusion timesteps")
    [eps] = draws_by_meaning(section["draws"], "noise eps")
    weight = rounded(1 + 0.5 * np.sin(0.8 * np.arange(len(batch.obs))))
    one_block = (tensor.unsqueeze(0) for tensor in (batch.action, weight, t + 1, eps))
    loss = agent.actor_loss(batch.obs, *one_block)
    loss.backward()
    close(case, loss, section["loss"], "loss", 2e-6)
    gradients = parameters_of(agent, lambda parameter: parameter.grad)["actor"]
    for name, gradient in zip(names_of(case, "actor"), gradients, strict=True):
        close(case, statistics(gradient), section["grads"][name], f"gradient of {name}", 5e-5)


def check_weights(case):
    section = case.golden["sections"]["q_transforms"]
    settings = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", section["note"])}
    running = {name: settings.pop(name) for name in ("running_q_mean", "running_q_std")}
    assert settings.keys() == {"q_neg", "cut", "beta"}
    for chosen in (1, 2):
        expected = section[f"chosen{chosen}"]
        q = torch.tensor(expected["q_in"]).view(-1, chosen)
        value = torch.tensor(expected["v_in"]).unsqueeze(1)
        for name in ("qadv", "qcut", "qrelu", "qexpn", "qcut0n", "qcut1n"):
            agent = make_agent(case, q_transform=name, chosen=chosen, **settings)
            agent.running_q_mean.fill_(running["running_q_mean"])
            agent.running_q_std.fill_(running["running_q_std"])
            close(case, agent.q_weights(q, value).flatten(), expected[name], name, 1e-6)


def check_entropy_weight(case):
    schedule = case.golden["sections"]["entropy_alpha_schedule"]
    start, num_steps = re.search(r"--entropy_alpha ([\d.]+), num_steps ([\de]+)", schedule["note"]).groups()
    agent = make_agent(case, entropy_alpha=float(start))
    agent.args.total_steps = float(num_steps)
    for step, expected in schedule["values"].items():
        agent.set_step(int(step))
        case.close(agent.entropy_weight, expected, f"entropy weight at step {step}", 1e-7)


def make_draws(agent, draws, batch_size):
    """Draws by meaning, from the entries of one update."""
    [t] = draws_by_meaning(draws, "diffusion timesteps")
    [eps] = draws_by_meaning(draws, "noise eps")
    uniform = draws_by_meaning(draws, "uniform(-1,1) actions")
    uniform = rounded(2 * uniform[0] - 1) if uniform else torch.empty(0, agent.action_dim)
    chosen = agent.args.num_chosen * batch_size
    return qvpo_online.Draws(
        next_action_noise=chain(draws, "actor_target chain"),
        candidate_noise=chain(draws, "train_sample candidates"),
        uniform_actions=uniform.view(-1, chosen, agent.action_dim),
        t=t.view(-1, chosen) + 1,
        eps=eps.view(-1, chosen, agent.action_dim),
    )


def draws_of(case, name, agent, num_steps):
    """The draws of each step; sections other than `train` mostly refer to it, with sizes that may differ."""
    section = case.golden["sections"][name]
    listed = section["draws"]
    if isinstance(listed, str):
        listed = case.golden["sections"]["train"]["draws"]
    args, B = agent.args, case.golden["meta"]["config"]["B"]
    entropy = args.num_entropy_samples
    rows = {
        "actor_target chain": args.num_target_samples * B,
        "train_sample candidates": args.num_train_samples * B,
        "uniform(-1,1) actions": args.num_chosen * B * entropy,
        "diffusion timesteps": args.num_chosen * B * (1 + entropy),
        "noise eps": args.num_chosen * B * (1 + entropy),
    }
    steps = []
    for step in range(1, num_steps + 1):
        of_step = []
        for draw in (draw for draw in listed if draw["step"] == step):
            [size] = [size for meaning, size in rows.items() if meaning in draw["why"]]
            if size > 0:
                of_step.append(draw | {"shape": [size, *draw["shape"][1:]]})
        steps.append(of_step)
    return steps


def run_train_section(case, name, gain):
    """All the steps of a section; losses, gradients, statistics and parameters after each."""
    section = case.golden["sections"][name]
    overrides = {key: type_of(value) for key, value in section["overrides"].items()}
    agent, batch, tolerance = make_agent(case, gain, **overrides), make_batch(case), 1e-5
    policy_obs = batch.obs
    if "sin(0.11k+2.5)" in section["note"]:
        numbers = np.arange(batch.obs.numel())
        policy_obs = rounded(np.sin(0.11 * numbers + 2.5).reshape(batch.obs.shape))
    steps = section["steps"]
    for number, (entry, draws) in enumerate(zip(steps, draws_of(case, name, agent, len(steps)), strict=True)):
        agent.set_step(number)
        agent.entropy_weight.fill_(agent.args.entropy_weight)  # the files leave its schedule out
        draws = make_draws(agent, draws, len(batch.obs))
        metrics = agent.update_critic(batch, draws)
        if "critic_grads_after_clip" in entry:
            compare_gradients(case, agent, "critic", entry["critic_grads_after_clip"])
        metrics |= agent.update_actor(policy_obs, draws)
        if "actor_grads_after_clip" in entry:
            compare_gradients(case, agent, "actor", entry["actor_grads_after_clip"])
        agent.update_targets()
        if number > 0:
            tolerance = 5e-4  # Adam has amplified the rounding of near-zero gradients
        for metric in ("critic_loss", "actor_loss", "critic_grad_norm", "actor_grad_norm"):
            close(case, metrics[metric], entry[metric], f"{metric} of step {number + 1}", tolerance)
        close(case, metrics["target_mean"], np.mean(entry["target_q"]), "target", tolerance)
        running = [agent.running_q_mean.item(), agent.running_q_std.item()]
        close(case, running, entry["running_q_mean_std_after"], "running mean and deviation")
        if case.double:
            for metric, value in section["losses_in_float64_run"][number].items():
                case.close(metrics[metric], value, f"{metric} of step {number + 1}, in double precision")
        if "params_after" in entry:
            compare_parameters(case, agent, entry["params_after"], 1e-3)
    if case.double:
        compare_parameters(case, agent, section["params_after_float64_run"], None)


def type_of(text):
    """The value of an option that the file holds as text."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and "." not in str(text) else number


def compare_gradients(case, agent, network, expected):
    gradients = parameters_of(agent, lambda parameter: parameter.grad)[network]
    for name, gradient in zip(names_of(case, network), gradients, strict=True):
        actual = statistics(gradient)[: len(expected[name])]
        close(case, actual, expected[name], f"gradient of {network} {name}", 5e-4)


def compare_parameters(case, agent, expected, float32_tolerance):
    """Strictly without a tolerance, which is for numbers of the single-precision run."""
    for network, tensors in parameters_of(agent).items():
        for name, tensor in zip(names_of(case, network), tensors, strict=True):
            value = expected[network][name]
            actual = statistics(tensor)[: len(value)]
            if float32_tolerance is None:
                case.close(actual, value, f"{network} {name}, in double precision")
            else:
                close(case, actual, value, f"{network} {name}", float32_tolerance)


def check_updates(case):
    with rounded_tables(case, qvpo_online):
        for name, _, gain in sections(case, "train"):
            run_train_section(case, name, gain)
