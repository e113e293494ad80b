"""What the authors' numbers in conformance/ do not have: initial weights, options, acting; and learning."""

import math

import numpy as np
import pytest
import torch
from runs import agent_class, folder_in, load, random_batch

import dac
import diffusion_ql
import dtql
import edp_crr
import edp_iql
import edp_td3
import qvpo_online
from common.bandits import BANDITS
from common.cli import UserError, settings_for

TASK = "bandit-corners-v0"
EDP = [edp_td3, edp_crr, edp_iql]


def small_agent(script, **options):
    torch.manual_seed(0)
    sizes = dict(hidden_dims=(16, 16), batch_size=5)
    sizes |= dict(diffusion_steps=50, dpm_calls=6) if script in EDP else {}
    return agent_class(script)(4, 2, script.Args(**sizes | options), torch.device("cpu"))


# === Initial weights ===
@pytest.mark.parametrize(
    ("script", "initialise", "bound"),  # of uniform weights, by the sizes of each member's own layer
    [
        (dac, "init_xavier", lambda n_in, n_out: math.sqrt(6 / (n_in + n_out))),
        (diffusion_ql, "init_uniform", lambda n_in, n_out: n_in**-0.5),
        (edp_td3, "init_lecun", None),  # a normal distribution, cut off at two standard deviations
    ],
)
def test_initial_weights_of_the_critics(script, initialise, bound):
    torch.manual_seed(0)
    critic = script.EnsembleCritic(100, 20, 2, (400, 400))
    getattr(script, initialise)(critic)
    for layer in critic.layers[:2]:
        _, n_in, n_out = layer.weight.shape
        if bound is None:
            assert layer.weight.std().item() == pytest.approx(n_in**-0.5, rel=0.02)
            assert layer.weight.abs().max() <= 2.001 * n_in**-0.5 / 0.87962566
        else:
            assert 0.95 * bound(n_in, n_out) < layer.weight.abs().max() <= bound(n_in, n_out)
            assert layer.weight.std().item() == pytest.approx(bound(n_in, n_out) / 3**0.5, rel=0.1)
        assert layer.bias.any() == (script is diffusion_ql)


def test_initial_weights_of_qvpo():
    torch.manual_seed(0)
    agent = qvpo_online.QVPO(obs_dim=40, action_dim=8, args=qvpo_online.Args(), device=torch.device("cpu"))
    actor, critic = agent.actor.layers, agent.critic.layers
    for weight, n_in in [(actor[0].weight, 80), (actor[1].weight, 256), (critic[0].weight, 48)]:
        assert weight.std().item() == pytest.approx(0.5 / math.sqrt(n_in), rel=0.02)
        assert weight.abs().max() > 1.5 / math.sqrt(n_in)  # not cut off at two or three standard deviations
    assert not actor[0].bias.any() and not critic[0].bias.any()


# === Losses ===
def test_max_q_backup_of_dac(float64):
    """Each critic's best of four next actions; their pessimistic mean."""
    agent = small_agent(dac, max_q_backup=True, num_q_samples=4)
    batch, draws = random_batch(dac), agent.draw(5)
    next_obs = batch.next_obs.repeat_interleave(4, dim=0)
    actions = agent.sample(agent.actor_target, next_obs, draws.next_action_noise)
    value = agent.critic_target(next_obs, actions).unflatten(1, (5, 4)).amax(2)
    value = value.mean(0) - value.var(0, correction=0).sqrt()
    errors = agent.critic(batch.obs, batch.action) - (batch.reward + 0.99 * (1 - batch.terminal) * value)
    assert agent.critic_loss(batch, draws)[0].item() == pytest.approx(
        errors.square().mean().item(), abs=1e-12
    )


def test_nothing_is_drawn_or_computed_for_guidance_that_is_off(monkeypatch):
    for guidance in ("soft", "hard", "none"):
        assert small_agent(dac, q_guidance=guidance).draw(5).action_noise.numel() == 0
    agent, batch = small_agent(dac, q_guidance="none"), random_batch(dac)
    monkeypatch.setattr(agent.critic_target, "forward", None)
    assert "guidance_loss" not in agent.actor_loss(batch, agent.draw(5))[1]


def test_eta_follows_the_constraint_within_its_bounds():
    for threshold, expected in ((-100.0, 1.1), (100.0, 0.9)):  # far below and far above any loss: a full step
        for bounds, eta in (({}, expected), (dict(eta_min=0.95, eta_max=1.05), (1 + expected) / 2)):
            agent = small_agent(dac, eta=1.0, eta_lr=0.1, bc_threshold=threshold, **bounds)
            agent.update(random_batch(dac))
            assert agent.eta.item() == pytest.approx(eta)


@pytest.mark.parametrize("script", [edp_crr, edp_iql])
def test_likelihood_by_the_elbo(float64, script):
    """Eq. 12, which no golden file of ours has, with a weight of 1 where the bound is 0.5."""
    options = dict(likelihood="elbo", temperature=1e15, max_weight=0.5, guidance_weight=0.7)
    agent, batch = small_agent(script, **options), random_batch(script)
    draws = agent.draw(5)
    x_t = script.add_noise(batch.action, draws.t, draws.eps, agent.alpha_bar)
    errors = (agent.actor(batch.obs, x_t, draws.t) - draws.eps).square().mean(1)
    guidance = (0.5 * agent.elbo_weights[draws.t] * errors).mean().item()
    loss, metrics = agent.actor_loss(batch, draws)
    assert metrics["guidance_loss"].item() == pytest.approx(guidance, abs=1e-10)
    assert loss.item() == pytest.approx(errors.mean().item() + 0.7 * guidance, abs=1e-10)


# === Sampling and acting ===
def test_whole_timesteps_of_dpm_solver():
    """At K = 1000 two calls fall on timesteps 667 and 334; rounding must not push them below."""
    plan = edp_td3.dpm_solver_plan(edp_td3.linear_schedule(1000), 15)
    whole = {round(call.t, 3): call.clip_t for step in plan for call in step}
    assert (whole[1000], whole[667], whole[334]) == (1000, 667, 334) and min(whole.values()) >= 1


@pytest.mark.parametrize("script", EDP)
def test_too_few_timesteps_for_the_calls(script, tmp_path):
    args = script.Args(env_id=TASK, diffusion_steps=50, dpm_calls=51, run_dir=str(tmp_path))
    with pytest.raises(UserError, match="--dpm-calls is 51; it needs --diffusion-steps 51 or more"):
        script.train(args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [diffusion_ql, dtql])
@pytest.mark.parametrize("lr_decay", [True, False])
def test_learning_rates_fall_if_they_are_to(script, lr_decay):
    """DTQL's from the end of the pretraining on."""
    agent = small_agent(script, lr_decay=lr_decay, total_steps=100, actor_lr=1.0, critic_lr=2.0)
    for step, expected in {0: 2, 50: 1, 100: 0, 150: 0}.items():
        agent.set_step(step)
        rates = [agent.optimizers[name].param_groups[0]["lr"].item() for name in ("actor", "critic")]
        assert rates == pytest.approx([expected / 2, expected] if lr_decay else [1, 2], abs=1e-6)


# === Learning ===
SHORT = dict(total_steps=400, hidden_dims=(64, 64), batch_size=256, diffusion_steps=5)
OF_DAC = SHORT | dict(tau=0.005, critic_lr=3e-3, eta=3.0, reward_tune="iql_locomotion")
OF_DQL = SHORT | dict(tau=0.03, critic_lr=3e-3, reward_tune="normalize", lr_decay=True)
WITH_Q = {  # DTQL learns it in docs/notebook.ipynb, QVPO in test_qvpo_online.py
    dac: OF_DAC | dict(num_action_samples=10),
    diffusion_ql: OF_DQL | dict(num_action_samples=50),
    **{script: dict(total_steps=1_000, dpm_calls=6) for script in EDP},
}


@pytest.mark.parametrize("script", WITH_Q)
def test_learns_the_best_mode_of_a_bandit(script, tmp_path):
    """The best corner holds a sixth of the data, and is where the policy goes."""
    given = dict(run_dir=str(tmp_path), eval_episodes=0) | WITH_Q[script]
    args = settings_for(script.Args, script.TASK_SETTINGS, TASK, **given)
    script.train(args)
    agent = agent_class(script)(1, 2, args, torch.device("cpu"))
    agent.load_state_dict(load(folder_in(tmp_path))["agent"])
    torch.manual_seed(0)
    actions = agent.act(torch.zeros(1000, 1)).numpy()
    if script in (dac, diffusion_ql):
        assert (actions * BANDITS[TASK][-1] > 0).all(1).sum() > 800  # of 1000, in the best corner's quarter
    else:
        assert (np.linalg.norm(actions - BANDITS[TASK][-1], axis=1) < 0.15).mean() > 0.9
