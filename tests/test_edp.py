"""The EDP scripts piece by piece against tests/reference.py, closed forms, and a task they must learn."""

import math

import numpy as np
import pytest
import reference
import torch
import tyro
from agents import TASK, check_act_by_softmax, random_batch, sampled_actions
from test_dac import best_noise

import edp_crr
import edp_iql
import edp_td3
from common.datasets import BANDITS, UserError

CPU = torch.device("cpu")
SCRIPTS = {edp_td3: edp_td3.EDPTD3, edp_crr: edp_crr.EDPCRR, edp_iql: edp_iql.EDPIQL}


def small_agent(script, **options):
    settings = dict(hidden_dims=(16, 16), diffusion_steps=50, dpm_calls=6)
    torch.manual_seed(0)
    return SCRIPTS[script](4, 2, script.Args(**script.DEFAULT_SETTINGS | settings | options), CPU)


# --- Diffusion ---
def test_approximate_action_inverts_add_noise(float64):
    _, alpha_bar = edp_td3.noise_schedule("scaled_linear", 50)
    alpha_bar = torch.tensor(alpha_bar)
    action, eps, t = torch.rand(6, 2) * 2 - 1, torch.randn(6, 2), torch.tensor([1, 2, 10, 30, 49, 50])
    x_t = edp_td3.add_noise(action, t, eps, alpha_bar)
    torch.testing.assert_close(edp_td3.approximate_action(x_t, t, eps, alpha_bar), action)
    outside = edp_td3.approximate_action(10 * x_t, t, eps, alpha_bar)
    assert outside.abs().max() == 1


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("num_calls", "t_end"), [(15, 0.02), (15, 0.1), (13, 0.02), (2, 0.5), (1, 0.02)])
def test_dpm_solver(float64, num_calls, t_end, clip):
    beta, alpha_bar = edp_td3.noise_schedule("scaled_linear", 50)
    plan = edp_td3.dpm_solver_plan(alpha_bar, num_calls, t_end)
    assert sum(len(step) for step in plan) == num_calls
    assert max(len(step) for step in plan) <= 3
    x_T = torch.linspace(-2.5, 2.5, 7).unsqueeze(1)
    samples = edp_td3.dpm_sample(lambda x, t: torch.sin(x + t), x_T, alpha_bar, plan, clip)
    for x, sample in zip(x_T[:, 0].tolist(), samples[:, 0].tolist(), strict=True):
        expected = reference.dpm_solver(lambda x, t: math.sin(x + t), x, beta, num_calls, t_end, clip)
        assert sample == pytest.approx(expected, abs=1e-9)


def test_dpm_solver_times_are_whole_where_they_are_whole():
    """At K = 1000 two calls fall on timesteps 667 and 334; rounding must not push them below."""
    _, alpha_bar = edp_td3.noise_schedule("scaled_linear", 1000)
    plan = edp_td3.dpm_solver_plan(alpha_bar, 15, 1e-3)
    stages = {round(stage.t, 3): stage.clip_t for step in plan for stage in step}
    assert (stages[667.0], stages[334.0]) == (667, 334)
    assert stages[1000.0] == 1000


@pytest.mark.parametrize("num_steps", [20, 49, 98, 1000])  # 1 / 49 * 49 and 1 / 98 * 98 are less than 1
def test_dpm_solver_stops_at_timestep_1_unless_told_otherwise(num_steps):
    agent = small_agent(edp_td3, diffusion_steps=num_steps)
    _, alpha_bar = edp_td3.noise_schedule("scaled_linear", num_steps)
    weight = math.prod(step[-1].x_weight for step in agent.plan)  # x_weight is a ratio of sqrt(alpha_bar)
    assert weight == pytest.approx(math.sqrt(alpha_bar[1] / alpha_bar[-1]))
    assert all(stage.clip_t >= 1 for step in agent.plan for stage in step)


@pytest.mark.parametrize(
    ("num_calls", "t_end", "message"),
    [
        (51, 0.02, "--dpm-calls is 51; it must be in 1..50"),
        (0, 0.02, "--dpm-calls is 0"),
        (15, 0.019, "--dpm-t-end is 0.019; it must be at least 1 / 50"),
        (15, 1.0, "--dpm-t-end is 1.0"),
    ],
)
def test_plans_that_cannot_be(num_calls, t_end, message):
    with pytest.raises(UserError, match=message):
        small_agent(edp_td3, dpm_calls=num_calls, dpm_t_end=t_end)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (edp_td3, {"alpha": -1.0}, "--alpha is -1.0; it must be at least 0"),
        (edp_td3, {"max_q_backup": True, "num_q_samples": 3, "top_k": 4}, "--top-k is 4; there are only"),
        (edp_td3, {"diffusion_steps": 10}, "--dpm-calls is 15; it must be in 1..10, the diffusion steps"),
        (edp_crr, {"temperature": -1.0}, "--temperature is -1.0; it must be at least"),
        (edp_crr, {"temperature": 0.0}, "--temperature is 0.0; it must be at least"),
        (edp_iql, {"inverse_temperature": -3.0}, "--inverse-temperature is -3.0; it must be at least 0"),
        (edp_iql, {"expectile": 1.5}, "--expectile is 1.5; it must be at most 1"),
    ],
)
def test_mistakes(script, flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        script.train(script.Args(env_id=TASK, run_dir=str(tmp_path / "runs"), **flags))
    assert not (tmp_path / "runs").exists()


def test_unknown_sampler(capsys):
    """tyro refuses a word that is no choice, names the choices, and exits with 2."""
    with pytest.raises(SystemExit) as exit_info:
        tyro.cli(edp_td3.Args, args=["--sampler", "dpmm"])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("--sampler", "dpmm", "ddpm", "ddim"))


def test_clipped_ddim_sample(float64):
    beta, alpha_bar = edp_td3.noise_schedule("scaled_linear", 30)
    x_T = torch.linspace(-2, 2, 7).unsqueeze(1)
    samples = edp_td3.clipped_ddim_sample(lambda x, t: torch.sin(x + t), x_T, alpha_bar)
    for x, sample in zip(x_T[:, 0].tolist(), samples[:, 0].tolist(), strict=True):
        expected = reference.clipped_ddim(lambda x, t: math.sin(x + t), x, beta)
        assert sample == pytest.approx(expected, abs=1e-12)


MEAN = 0.3  # of the data


def best_noise_at_any_time(alpha_bar, std):
    """best_noise, also between two timesteps, where the logarithm of alpha_bar is linear."""
    log_bars = np.log(alpha_bar)

    class AlphaBar:
        def __getitem__(self, t):
            return math.exp(np.interp(t, np.arange(len(log_bars)), log_bars))

    return best_noise(AlphaBar(), MEAN, std)


def mean_and_std(sample, *arguments, **options):
    """Where a sampler that is linear in x_T takes N(0, 1): 0 to the mean, 1 to one deviation more."""
    low, high = sample(*arguments, **options)[:, 0].tolist()
    return low, high - low


@pytest.mark.parametrize("num_steps", [200, 1000])
def test_samplers_of_gaussian_data(float64, num_steps):
    """With the best noise prediction each sampler lands on the data: its mean, its standard deviation 0.5."""
    std, x_T = 0.5, torch.tensor([[0.0], [1.0]])
    beta, alpha_bar = edp_td3.noise_schedule("scaled_linear", num_steps)
    predict_noise = best_noise_at_any_time(alpha_bar, std)

    plan = edp_td3.dpm_solver_plan(alpha_bar, 15, 1 / num_steps)
    mean_of_15_calls = mean_and_std(edp_td3.dpm_sample, predict_noise, x_T, alpha_bar, plan, clip=False)
    np.testing.assert_allclose(mean_of_15_calls, (MEAN, std), rtol=0.05)

    all_calls = mean_and_std(edp_td3.clipped_ddim_sample, predict_noise, x_T, alpha_bar)
    np.testing.assert_allclose(all_calls, (MEAN, std), rtol=0.02)

    # DDPM adds noise: one row without any gives the mean, one row per unit noise the variance
    noise = torch.cat([torch.zeros(num_steps, 1), torch.eye(num_steps)], dim=1).unsqueeze(2)
    sigma = edp_td3.posterior_std(beta, alpha_bar)
    samples = edp_td3.ddpm_sample(predict_noise, noise, beta, alpha_bar, sigma, clip=False)[:, 0]
    std_of_samples = (samples[1:] - samples[0]).square().sum().sqrt().item()
    np.testing.assert_allclose((samples[0].item(), std_of_samples), (MEAN, std), rtol=0.04)


def test_15_calls_narrow_what_is_narrow(float64):
    """A fact about the authors' solver settings, named D10 in docs/edp.md: the last steps are too long where
    the noise becomes as small as the data's spread."""
    ratios = []
    for std in (0.1, 0.2, 0.5):
        _, alpha_bar = edp_td3.noise_schedule("scaled_linear", 1000)
        plan = edp_td3.dpm_solver_plan(alpha_bar, 15, 1e-3)
        predict_noise = best_noise_at_any_time(alpha_bar, std)
        x_T = torch.tensor([[0.0], [1.0]])
        mean, found = mean_and_std(edp_td3.dpm_sample, predict_noise, x_T, alpha_bar, plan, clip=False)
        assert mean == pytest.approx(MEAN, rel=0.01)
        ratios.append(found / std)
    np.testing.assert_allclose(ratios, [0.49, 0.71, 0.96], atol=0.01)


def test_more_network_calls_are_closer_to_the_data(float64):
    errors = []
    for num_calls in (5, 15, 45):
        _, alpha_bar = edp_td3.noise_schedule("scaled_linear", 1000)
        plan = edp_td3.dpm_solver_plan(alpha_bar, num_calls, 1e-3)
        predict_noise = best_noise_at_any_time(alpha_bar, 0.2)
        x_T = torch.tensor([[0.0], [1.0]])
        _, found = mean_and_std(edp_td3.dpm_sample, predict_noise, x_T, alpha_bar, plan, clip=False)
        errors.append(abs(found - 0.2))
    assert errors[0] > errors[1] > 4 * errors[2]


@pytest.mark.parametrize("num_steps", [5, 50])
def test_posterior_std(num_steps):
    beta, alpha_bar = edp_td3.noise_schedule("scaled_linear", num_steps)
    std = edp_td3.posterior_std(beta, alpha_bar)
    for t in range(1, num_steps + 1):
        assert std[t] ** 2 == pytest.approx(reference.posterior(0, 0, t, beta)[1], abs=1e-14)


def test_elbo_weights(float64):
    """Ho et al. 2020, Eq. 12, with beta as the variance of the reverse step, and mean 1."""
    beta, alpha_bar = edp_crr.noise_schedule("scaled_linear", 50)
    weights = edp_crr.elbo_weights(beta, alpha_bar)
    expected = np.array([beta[t] / (2 * (1 - beta[t]) * (1 - alpha_bar[t])) for t in range(1, 51)])
    np.testing.assert_allclose(weights[1:], expected / expected.mean(), rtol=1e-12)


# --- Networks ---
def test_init_lecun():
    torch.manual_seed(0)
    critic = edp_td3.EnsembleCritic(100, 20, 2, (400, 400))
    edp_td3.init_lecun(critic)
    for layer in critic.layers[:2]:
        n_in = layer.weight.shape[1]
        assert layer.weight.std().item() == pytest.approx(n_in**-0.5, rel=0.02)
        assert layer.weight.abs().max() <= 2.001 * n_in**-0.5 / 0.87962566
        assert (layer.bias == 0).all()


def test_member_q(float64):
    """The chosen member's value and gradient, and nothing for the critic itself."""
    agent, batch = small_agent(edp_td3), random_batch(edp_td3)
    for member in (0, 1):
        action = batch.action.clone().requires_grad_()
        q = edp_td3.member_q(agent.critic, torch.tensor([member]), batch.obs, action)
        expected = agent.critic(batch.obs, action)[member]
        torch.testing.assert_close(q, expected)
        gradients = [torch.autograd.grad(value.sum(), action)[0] for value in (q, expected)]
        torch.testing.assert_close(*gradients)
        assert all(parameter.grad is None for parameter in agent.critic.parameters())


def test_clip_by_member_norm(float64):
    agent = small_agent(edp_td3)
    for parameter in agent.critic.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in agent.critic.parameters()]
    lengths = [math.sqrt(sum(gradient[k].square().sum() for gradient in before)) for k in (0, 1)]
    limit = sum(lengths) / 2  # between the two
    norms = edp_td3.clip_by_member_norm(agent.critic.parameters(), limit)
    np.testing.assert_allclose(norms, lengths)
    for parameter, old in zip(agent.critic.parameters(), before, strict=True):
        for k in (0, 1):
            torch.testing.assert_close(parameter.grad[k], old[k] * min(1, limit / lengths[k]))


def test_networks_without_batching(float64):
    agent, batch = small_agent(edp_iql), random_batch(edp_iql)
    value = agent.value(batch.obs)
    weights = [layer.weight.detach().numpy() for layer in agent.value.layers]
    biases = [layer.bias.detach().numpy() for layer in agent.value.layers]
    for row in range(5):
        expected = reference.mlp(batch.obs[row].numpy(), weights, biases, reference.mish)
        assert value[row].item() == pytest.approx(expected[0], abs=1e-12)


# --- Losses ---
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("max_q_backup", [False, True])
@pytest.mark.parametrize("script", [edp_td3, edp_crr])
def test_critic_loss(float64, script, max_q_backup, top_k):
    agent = small_agent(script, max_q_backup=max_q_backup, num_q_samples=4, top_k=top_k)
    batch, draws = random_batch(script), agent.draw(5)
    loss, _ = agent.critic_loss(batch, draws)
    n = 4 if max_q_backup else 1
    actions = agent.sample(
        agent.actor_target, batch.next_obs.repeat_interleave(n, dim=0), draws.next_action_noise
    )
    expected = 0
    for row in range(5):
        candidates = actions[row * n : (row + 1) * n]
        values = []
        for member in (0, 1):
            of_member = [
                agent.critic_target(batch.next_obs[row : row + 1], candidate.clamp(-1, 1).unsqueeze(0))
                if max_q_backup
                else agent.critic_target(batch.next_obs[row : row + 1], candidate.unsqueeze(0))
                for candidate in candidates
            ]
            ranked = sorted((q[member, 0].item() for q in of_member), reverse=True)
            values.append(ranked[top_k - 1 if max_q_backup else 0])
        target = batch.reward[row].item() + (0 if batch.terminal[row] else 0.99 * min(values))
        q = agent.critic(batch.obs[row : row + 1], batch.action[row : row + 1])[:, 0]
        expected += ((q - target) ** 2).sum().item() / 5
    assert loss.item() == pytest.approx(expected, abs=1e-10)


def log_normal(x, mean, std):
    return sum(
        -((a - m) ** 2) / (2 * s**2) - math.log(s * math.sqrt(2 * math.pi))
        for a, m, s in zip(x, mean, std, strict=True)
    )


def test_crr_weights_and_likelihood(float64):
    agent = small_agent(edp_crr, learn_std=True, max_weight=1.02, temperature=0.5)
    agent.log_std.data = torch.tensor([0.2, -0.3])
    batch, draws = random_batch(edp_crr), agent.draw(5)
    loss, metrics = agent.actor_loss(batch, draws)
    x_t = edp_crr.add_noise(batch.action, draws.t, draws.eps, agent.alpha_bars)
    eps = agent.actor(batch.obs, x_t, draws.t)
    action = edp_crr.approximate_action(x_t, draws.t, eps, agent.alpha_bars)
    std = [math.exp(0.2), math.exp(-0.3)]
    guidance, weights = 0, []
    for row in range(5):
        around = [action[row] + torch.tensor(std) * noise[row] for noise in draws.advantage_noise]
        q = [
            agent.critic(batch.obs[row : row + 1], a.unsqueeze(0)).amin().item()
            for a in [batch.action[row], *around]
        ]
        weights.append(min(math.exp((q[0] - np.mean(q[1:])) / 0.5), 1.02))
        guidance -= weights[-1] * log_normal(batch.action[row].tolist(), action[row].tolist(), std) / 5
    assert 1.02 in weights and min(weights) < 1.02  # on both sides of the bound
    assert metrics["guidance_loss"].item() == pytest.approx(guidance, abs=1e-10)
    assert loss.item() == pytest.approx(guidance + (eps - draws.eps).square().mean().item(), abs=1e-10)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [math.exp(0.5), math.exp(-1), 20.0]),
        ({"temperature": 0.5}, [math.exp(1), math.exp(-2), 20.0]),
        ({"advantage_weight": "heaviside"}, [1.0, 0.0, 1.0]),
        ({"advantage_weight": "softmax"}, np.exp([0.5, -1, 10]) / np.exp([0.5, -1, 10]).sum()),
    ],
)
def test_crr_advantage_weights(float64, options, expected):
    agent = small_agent(edp_crr, **options)
    np.testing.assert_allclose(agent.advantage_weight(torch.tensor([0.5, -1.0, 10.0])), expected)


def test_crr_baselines(float64):
    batch, actions = random_batch(edp_crr), torch.randn(3, 5, 2)
    of_data = small_agent(edp_crr).critic(batch.obs, batch.action).amin(0)
    of_others = torch.stack([small_agent(edp_crr).critic(batch.obs, each).amin(0) for each in actions])
    for name, baseline in (("mean", of_others.mean(0)), ("max", of_others.amax(0))):
        advantage = small_agent(edp_crr, advantage_baseline=name).advantage(batch, actions)
        torch.testing.assert_close(advantage, of_data - baseline)


def test_iql_losses(float64):
    agent, batch = small_agent(edp_iql, expectile=0.9), random_batch(edp_iql)
    loss, _ = agent.value_loss(batch)
    q = agent.critic_target(batch.obs, batch.action).amin(0)
    gaps = (q - agent.value(batch.obs)).tolist()
    assert min(gaps) < 0 < max(gaps)
    expected = np.mean([(0.9 if gap > 0 else 0.1) * gap**2 for gap in gaps])
    assert loss.item() == pytest.approx(expected, abs=1e-12)

    loss, _ = agent.critic_loss(batch)
    targets = batch.reward + 0.99 * (1 - batch.terminal) * agent.value(batch.next_obs)
    errors = (agent.critic(batch.obs, batch.action) - targets).square()
    assert loss.item() == pytest.approx(errors.mean(1).sum().item(), abs=1e-12)

    weights = agent.advantage_weight(torch.tensor([0.5, -1.0, 10.0]))
    np.testing.assert_allclose(weights, [math.exp(1.5), math.exp(-3), 100])


def test_td3_guidance_has_the_size_of_alpha(float64):
    """alpha mean(Q) / mean |Q|: the critic's scale does not matter."""
    agent, batch = small_agent(edp_td3, alpha=2.5), random_batch(edp_td3)
    draws = agent.draw(5)
    _, metrics = agent.actor_loss(batch, draws)
    agent.critic.layers[-1].weight.data.mul_(10)
    agent.critic.layers[-1].bias.data.mul_(10)
    _, scaled = agent.actor_loss(batch, draws)
    assert scaled["guidance_loss"].item() == pytest.approx(metrics["guidance_loss"].item())
    assert scaled["q_weight"].item() == pytest.approx(metrics["q_weight"].item() / 10)


@pytest.mark.parametrize("sampler", ["dpm", "ddpm"])  # DDIM too, but of an untrained network it is clipped
@pytest.mark.parametrize("script", SCRIPTS)
def test_without_action_approximation_the_gradient_runs_through_the_chain(script, sampler):
    agent = small_agent(script, action_approximation=False, sampler=sampler)
    batch, draws = random_batch(script), agent.draw(5)
    action = agent.policy_action(batch, draws, None, None)
    torch.testing.assert_close(action, agent.sample(agent.actor, batch.obs, draws.action_noise))
    action.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in agent.actor.layers.parameters())


@pytest.mark.parametrize("script", SCRIPTS)
def test_gradients_stay_where_they_belong(script):
    """No loss computes gradients for a network that it does not train."""
    agent, batch = small_agent(script), random_batch(script)
    draws = agent.draw(5)
    losses = {"actor": agent.actor_loss(batch, draws)}
    if script is edp_iql:
        losses |= {"critic": agent.critic_loss(batch), "value": agent.value_loss(batch)}
    else:
        losses |= {"critic": agent.critic_loss(batch, draws)}
    for trained, (loss, _) in losses.items():
        agent.zero_grad()
        loss.backward()
        for name, network in agent.named_children():
            gradients = [parameter.grad is not None for parameter in network.parameters()]
            assert all(gradients) if name == trained else not any(gradients), (trained, name)


# --- Updates ---
def test_target_actor_moves_every_fifth_step_after_the_first_thousand():
    agent = small_agent(edp_td3)
    moved = [step + 1 for step in range(998, 1021) if agent.set_step(step) or agent.actor_tau > 0]
    assert moved == [1005, 1010, 1015, 1020]


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_the_learning_rate_of_the_actor_falls(script):
    agent = small_agent(script, lr_decay=True, lr_decay_steps=100, actor_lr=1.0, critic_lr=2.0)
    rates = []
    for step in (0, 50, 100, 150):
        agent.set_step(step)
        rates.append({name: each.param_groups[0]["lr"].item() for name, each in agent.optimizers.items()})
    np.testing.assert_allclose([each["actor"] for each in rates], [1, 0.5, 0, 0], atol=1e-6)
    assert all(rate == 2 for each in rates for name, rate in each.items() if name != "actor")


def test_a_learned_standard_deviation_is_trained():
    for script in (edp_crr, edp_iql):
        for learn_std in (False, True):
            agent = small_agent(script, learn_std=learn_std)
            agent.update(random_batch(script, 300))
            assert bool((agent.log_std != 0).all()) == learn_std


# --- Acting ---
@pytest.mark.parametrize("sampler", ["dpm", "ddpm", "ddim"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_act_takes_a_candidate_by_softmax_of_q(script, sampler, monkeypatch):
    agent = small_agent(script, num_action_samples=7, sampler=sampler)
    check_act_by_softmax(agent, agent.critic, torch.randn(agent.noise_steps, 35, 2), monkeypatch)


def test_controlled_sampling():
    """Without initial noise DPM-Solver is deterministic; a larger policy scale narrows the policy."""
    obs = torch.zeros(200, 4)
    agent = small_agent(edp_td3, noise_scale=0.0, num_action_samples=1)
    assert len(agent.act(obs).unique(dim=0)) == 1
    spreads = []
    for scale in (0.5, 1.0, 1.5):
        agent = small_agent(edp_td3, policy_scale=scale, num_action_samples=1)
        agent.actor.forward = lambda obs, x, t: 0.5 * x  # as if the data were N(0, 1) at half the noise level
        torch.manual_seed(0)
        spreads.append(agent.act(obs).std().item())
    assert spreads[0] > spreads[1] > spreads[2]


# --- Learning ---
def share_of_the_best_corner(script, *arguments, **options):
    actions = sampled_actions(script, SCRIPTS[script].__name__, *arguments, **options)
    return (np.linalg.norm(actions - BANDITS[TASK][-1], axis=1) < 0.25).mean()


@pytest.mark.parametrize(
    ("script", "share"),
    [(edp_td3, 0.45), (edp_crr, 0.35), (edp_iql, 0.6)],
    ids=lambda value: str(value)[9:16],
)
def test_learns_the_best_mode_of_a_bandit(script, share, tmp_path, monkeypatch):
    """The best corner holds a sixth of the data. CRR, by the advantage over far actions, gains least."""
    assert share_of_the_best_corner(script, tmp_path, monkeypatch) > share


def test_behaviour_cloning_learns_all_modes(tmp_path, monkeypatch):
    cloning = dict(guidance_weight=0.0, num_action_samples=1, total_steps=1000)
    assert 0.1 < share_of_the_best_corner(edp_iql, tmp_path, monkeypatch, **cloning) < 0.25
