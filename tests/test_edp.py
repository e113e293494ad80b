"""What the EDP scripts' golden files do not have, against tests/reference.py and closed forms; learning."""

import math

import numpy as np
import pytest
import reference
import torch
from agents import TASK, check_act_by_softmax, random_batch, sampled_actions

import edp_crr
import edp_iql
import edp_td3
from common.bandits import BANDITS, bandit_mode
from common.tasks import UserError

SCRIPTS = {edp_td3: edp_td3.EDPTD3, edp_crr: edp_crr.EDPCRR, edp_iql: edp_iql.EDPIQL}
MEAN = 0.3  # of the Gaussian data of the samplers' tests
# What a linear sampler makes of these: mean, mean + std.
X_T = torch.tensor([[0.0], [1.0]], dtype=torch.float64)


def small_agent(script, **options):
    torch.manual_seed(0)
    args = script.Args(**dict(hidden_dims=(16, 16), diffusion_steps=50, dpm_calls=6) | options)
    return SCRIPTS[script](4, 2, args, torch.device("cpu"))


# --- Diffusion ---
@pytest.mark.parametrize("num_steps", [5, 50, 1000])
def test_schedules(num_steps):
    expected = {
        edp_td3.linear_schedule: reference.scaled_linear_schedule(num_steps),
        edp_td3.vp_schedule: reference.vp_schedule(num_steps),
    }
    for make_schedule, beta in expected.items():
        schedule = make_schedule(num_steps)
        np.testing.assert_allclose(schedule.beta, beta, rtol=1e-10)
        np.testing.assert_allclose(schedule.alpha_bar, reference.alpha_bars(beta), rtol=1e-10)
        variances = [reference.posterior(0, 0, t, beta)[1] for t in range(1, num_steps + 1)]
        np.testing.assert_allclose(edp_td3.posterior_std(schedule)[1:], np.sqrt(variances), atol=1e-7)


def test_each_schedule_has_its_word():
    for word, make_schedule in (("linear", edp_td3.linear_schedule), ("vp", edp_td3.vp_schedule)):
        assert all(small_agent(each, noise_schedule=word).schedule == make_schedule(50) for each in SCRIPTS)


@pytest.mark.parametrize("num_calls", [1, 2, 3, 13, 15, 50])
def test_dpm_solver(float64, num_calls):
    schedule = edp_td3.linear_schedule(50)
    plan = edp_td3.dpm_solver_plan(schedule, num_calls)
    assert sum(len(step) for step in plan) == num_calls
    assert max(len(step) for step in plan) <= 3
    x_T = torch.linspace(-2.5, 2.5, 7).unsqueeze(1)
    samples = edp_td3.dpm_sample(lambda x, t: torch.sin(x + t), x_T, schedule, plan)
    for x, sample in zip(x_T[:, 0].tolist(), samples[:, 0].tolist(), strict=True):
        args = lambda x, t: math.sin(x + t), x, schedule.beta, num_calls, 1 / 50
        assert sample == pytest.approx(reference.dpm_solver(*args, clip=True), abs=1e-9)


@pytest.mark.parametrize("num_steps", [2, 20, 49, 98, 1000])
def test_dpm_solver_goes_from_timestep_T_to_1(num_steps):
    """At K = 1000 two calls fall on timesteps 667 and 334; rounding must not push them below."""
    schedule = edp_td3.linear_schedule(num_steps)
    plan = edp_td3.dpm_solver_plan(schedule, min(15, num_steps))
    weight = math.prod(step[-1].x_weight for step in plan)  # x_weight is a ratio of sqrt(alpha_bar)
    assert weight == pytest.approx(math.sqrt(schedule.alpha_bar[1] / schedule.alpha_bar[-1]))
    whole = {round(call.t, 3): call.clip_t for step in plan for call in step}
    assert whole[num_steps] == num_steps and min(whole.values()) >= 1
    if num_steps == 1000:
        assert (whole[667], whole[334]) == (667, 334)


@pytest.mark.parametrize(("num_steps", "num_calls", "needed"), [(50, 51, 51), (1, 1, 2)])
def test_too_few_timesteps_for_the_calls(num_steps, num_calls, needed, tmp_path):
    message = f"--dpm-calls is {num_calls}; it needs --diffusion-steps {needed} or more"
    for script in SCRIPTS:
        args = script.Args(env_id=TASK, diffusion_steps=num_steps, dpm_calls=num_calls, run_dir=str(tmp_path))
        with pytest.raises(UserError, match=message):
            script.train(args)
    assert not list(tmp_path.iterdir())


def best_noise(schedule, std):
    """E[eps | x_t] of data N(MEAN, std^2), also between timesteps, where the log of alpha_bar is linear."""
    logs = np.log(schedule.alpha_bar)

    def predict(x, t):
        alpha_bar = math.exp(np.interp(t, np.arange(len(logs)), logs))
        return (
            math.sqrt(1 - alpha_bar)
            * (x - math.sqrt(alpha_bar) * MEAN)
            / (alpha_bar * std**2 + 1 - alpha_bar)
        )

    return predict


def dpm_mean_and_std(num_steps, num_calls, std):
    """Of the samples, where the data has MEAN and std and the noise prediction is the best."""
    schedule = edp_td3.linear_schedule(num_steps)
    plan = edp_td3.dpm_solver_plan(schedule, num_calls)
    low, high = edp_td3.dpm_sample(best_noise(schedule, std), X_T, schedule, plan)[:, 0].tolist()
    return low, high - low


@pytest.mark.parametrize("num_steps", [200, 1000])
def test_samplers_of_gaussian_data(float64, num_steps):
    """With the best noise prediction each sampler lands on the data: its mean, its standard deviation 0.5."""
    np.testing.assert_allclose(dpm_mean_and_std(num_steps, 15, 0.5), (MEAN, 0.5), rtol=0.05)

    # DDPM adds noise: one row without any gives the mean, one row per unit noise the variance
    schedule = edp_td3.linear_schedule(num_steps)
    noise = torch.cat([torch.zeros(num_steps, 1), torch.eye(num_steps)], dim=1).unsqueeze(2)
    sigma = edp_td3.posterior_std(schedule)
    samples = edp_td3.ddpm_sample(best_noise(schedule, 0.5), noise, schedule, sigma)[:, 0]
    std_of_samples = (samples[1:] - samples[0]).square().sum().sqrt().item()
    np.testing.assert_allclose((samples[0].item(), std_of_samples), (MEAN, 0.5), rtol=0.04)


def test_15_calls_narrow_what_is_narrow(float64):
    """A fact about the authors' solver settings, told in docs/edp.md: the last steps are too long where the
    noise becomes as small as the data's spread. More calls are closer to the data."""
    found = [dpm_mean_and_std(1000, 15, std)[1] / std for std in (0.1, 0.2, 0.5)]
    np.testing.assert_allclose(found, [0.49, 0.71, 0.96], atol=0.01)
    errors = [abs(dpm_mean_and_std(1000, num_calls, 0.2)[1] - 0.2) for num_calls in (5, 15, 45)]
    assert errors[0] > errors[1] > 4 * errors[2]


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


# --- Losses ---
def squared_errors(agent, batch, next_values):
    """The critics' loss, row by row, from the values of the next states."""
    total = 0
    for row, next_value in enumerate(next_values):
        target = batch.reward[row].item() + (0 if batch.terminal[row] else 0.99 * next_value)
        q = agent.critic(batch.obs[row : row + 1], batch.action[row : row + 1])
        total += (q - target).square().sum().item() / len(next_values)
    return total


@pytest.mark.parametrize("script", [edp_td3, edp_crr])
def test_critic_loss(float64, script):
    agent, batch = small_agent(script), random_batch(script)
    draws = agent.draw(5)
    loss, _ = agent.critic_loss(batch, draws)
    actions = agent.sample(agent.actor_target, batch.next_obs, draws.next_action_noise)
    next_q = [agent.critic_target(batch.next_obs[[row]], actions[[row]]) for row in range(5)]
    expected = squared_errors(agent, batch, [min(q[0].item(), q[1].item()) for q in next_q])
    assert loss.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("likelihood", ["gaussian", "elbo"])
@pytest.mark.parametrize("script", [edp_crr, edp_iql])
def test_weighted_likelihood(float64, script, likelihood):
    """Row by row: weights on both sides of their bound, times Eq. 13 or Eq. 12."""
    options = dict(likelihood=likelihood, temperature=0.5, guidance_weight=0.7)
    agent, batch = small_agent(script, **options), random_batch(script)
    draws = agent.draw(5)
    x_t = script.add_noise(batch.action, draws.t, draws.eps, agent.alpha_bar)
    eps = agent.actor(batch.obs, x_t, draws.t)
    action = script.approximate_action(x_t, draws.t, eps, agent.alpha_bar)
    errors = (eps - draws.eps).square().mean(1)
    advantages, guidance = [], 0
    for row in range(5):
        q = agent.critic if script is edp_crr else agent.critic_target
        of_data = q(batch.obs[[row]], batch.action[[row]]).amin().item()
        if script is edp_crr:
            around = [action[[row]] + noise[row] for noise in draws.advantage_noise]
            baseline = np.mean([agent.critic(batch.obs[[row]], each).amin().item() for each in around])
        else:
            baseline = agent.value(batch.obs[[row]]).item()
        advantages.append(of_data - baseline)
    weights = np.exp(np.array(advantages) / 0.5)
    agent.args.max_weight = np.median(weights).item()
    for row, weight in enumerate(weights):
        pairs = zip(batch.action[row].tolist(), action[row].tolist(), strict=True)
        density = sum(reference.normal_log_density(a, a_hat, 1.0) for a, a_hat in pairs)
        bound = -agent.elbo_weights[draws.t[row]].item() * errors[row].item()
        guidance -= min(weight, agent.args.max_weight) * (density if likelihood == "gaussian" else bound) / 5
    loss, metrics = agent.actor_loss(batch, draws)
    assert metrics["guidance_loss"].item() == pytest.approx(guidance, abs=1e-10)
    assert loss.item() == pytest.approx(errors.mean().item() + 0.7 * guidance, abs=1e-10)


@pytest.mark.parametrize("sampler", ["dpm", "ddpm"])
def test_without_action_approximation_the_gradient_runs_through_the_chain(sampler):
    agent = small_agent(edp_td3, action_approximation=False, sampler=sampler)
    batch, draws = random_batch(edp_td3), agent.draw(5)
    action = agent.policy_action(batch, draws, None, None)
    torch.testing.assert_close(action, agent.sample(agent.actor, batch.obs, draws.action_noise))
    action.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in agent.actor.layers.parameters())


# --- Updates ---
@pytest.mark.parametrize("script", [edp_td3, edp_crr])
def test_target_actor_moves_every_fifth_step_after_the_first_thousand(script):
    agent = small_agent(script)
    moved = [step + 1 for step in range(998, 1021) if agent.set_step(step) or agent.actor_tau > 0]
    assert moved == [1005, 1010, 1015, 1020]


# --- Acting ---
@pytest.mark.parametrize("sampler", ["dpm", "ddpm"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_act_takes_a_candidate_by_softmax_of_q(script, sampler, monkeypatch):
    agent = small_agent(script, num_action_samples=7, sampler=sampler)
    check_act_by_softmax(agent, agent.critic, torch.randn(agent.noise_steps, 35, 2), monkeypatch)


def test_controlled_sampling():
    """Without initial noise DPM-Solver is deterministic; a larger policy scale narrows the policy."""
    obs = torch.zeros(200, 4)
    agent = small_agent(edp_td3, noise_scale=0.0, num_action_samples=1)
    assert len(agent.act(obs).unique(dim=0)) == 1
    agent = small_agent(edp_td3, noise_scale=0.0, num_action_samples=1, sampler="ddpm")
    assert len(agent.act(obs).unique(dim=0)) > 100  # the noise of the steps is left as it is
    spreads = []
    for scale in (0.5, 1.0, 1.5):
        agent = small_agent(edp_td3, policy_scale=scale, num_action_samples=1)
        agent.actor.forward = lambda obs, x, t: 0.5 * x  # as if the data were N(0, 1) at half the noise level
        torch.manual_seed(0)
        spreads.append(agent.act(obs).std().item())
    assert spreads[0] > spreads[1] > spreads[2]


# --- Learning ---
@pytest.mark.parametrize("script", SCRIPTS)
def test_learns_the_best_mode_of_a_bandit(script, tmp_path, monkeypatch):
    """The best corner holds a sixth of the data."""
    actions = sampled_actions(script, SCRIPTS[script].__name__, tmp_path, monkeypatch)
    assert (np.linalg.norm(actions - BANDITS[TASK][-1], axis=1) < 0.15).mean() > 0.9


def test_behaviour_cloning_learns_all_modes_in_proportion(tmp_path, monkeypatch):
    cloning = dict(guidance_weight=0.0, num_action_samples=1, total_steps=1500)
    cloning |= dict(hidden_dims=(128, 128, 128), batch_size=512, actor_lr=5e-4)
    actions = sampled_actions(edp_iql, "EDPIQL", tmp_path, monkeypatch, **cloning)
    modes = bandit_mode(TASK, actions)
    frequency = np.linspace(2, 1, 4) / np.linspace(2, 1, 4).sum()
    np.testing.assert_allclose(np.bincount(modes) / len(modes), frequency, atol=0.1)
    assert (np.linalg.norm(actions - BANDITS[TASK][modes], axis=1) < 0.25).mean() > 0.7
