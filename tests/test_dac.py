"""dac.py: what its golden files do not have, and a task that it must learn."""

import math

import numpy as np
import pytest
import torch
from agents import TASK, random_batch, sampled_actions
from runs import load, resume, train

import dac
from common.bandits import bandit_mode


def small_agent(**options):
    torch.manual_seed(0)
    args = dac.Args(**dict(hidden_dims=(16, 16), num_qs=3, num_q_samples=2, batch_size=5) | options)
    return dac.DAC(obs_dim=4, action_dim=2, args=args, device=torch.device("cpu"))


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_critic_loss(float64, max_q_backup):
    """Row by row from the formula, with a target 0.7 standard deviations below the ensemble's mean."""
    agent = small_agent(rho=0.7, max_q_backup=max_q_backup)
    batch, draws = random_batch(dac), agent.draw(5)
    next_obs = batch.next_obs.repeat_interleave(2, dim=0)
    next_action = agent.sample(agent.actor_target, next_obs, draws.next_action_noise)
    next_q = agent.critic_target(next_obs, next_action).view(3, 5, 2)
    values = next_q.amax(2) if max_q_backup else next_q.mean(2)  # (3, 5)
    value = values.mean(0) - 0.7 * values.var(0, correction=0).sqrt()
    target = batch.reward + 0.99 * (1 - batch.terminal) * value
    errors = agent.critic(batch.obs, batch.action) - target
    assert agent.critic_loss(batch, draws)[0].item() == pytest.approx(
        errors.square().mean().item(), abs=1e-12
    )


def test_initial_weights_of_the_critics():
    """Uniform as of Glorot and Bengio 2010, by the sizes of each member's own layer."""
    torch.manual_seed(0)
    critic = dac.EnsembleCritic(100, 20, 2, (400, 400))
    dac.init_xavier(critic)
    for layer in critic.layers[:2]:
        _, n_in, n_out = layer.weight.shape
        bound = math.sqrt(6 / (n_in + n_out))
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


def test_nothing_is_drawn_or_computed_for_guidance_that_is_off(monkeypatch):
    for guidance in ("soft", "hard", "none"):
        assert small_agent(q_guidance=guidance).draw(5).action_noise.numel() == 0
    agent, batch = small_agent(q_guidance="none"), random_batch(dac)
    monkeypatch.setattr(agent.critic_target, "forward", None)
    assert "guidance_loss" not in agent.actor_loss(batch, agent.draw(5))[1]


def test_eta_follows_the_constraint_within_its_bounds():
    for threshold, expected in ((-100.0, 1.1), (100.0, 0.9)):  # far below and far above any loss: a full step
        for bounds, eta in (({}, expected), (dict(eta_min=0.95, eta_max=1.05), (1 + expected) / 2)):
            agent = small_agent(eta=1.0, eta_lr=0.1, bc_threshold=threshold, **bounds)
            agent.update(random_batch(dac))
            assert agent.eta.item() == pytest.approx(eta)


def test_a_fixed_eta_is_that_of_the_resumed_run(tmp_path):
    folder = train(tmp_path, dac, total_steps=2, eta_lr=0.0, eta=1.0)
    assert "eta" not in load(folder)["agent"]
    resume(folder, dac, total_steps=3, eta=2.0)


def test_q_moves_the_policy_to_the_best_mode_of_a_bandit(tmp_path, monkeypatch):
    """The best corner holds a sixth of the data. Behaviour cloning leaves it at that."""
    short = dict(total_steps=400, hidden_dims=(64, 64), batch_size=256, diffusion_steps=5)
    critic = dict(tau=0.005, critic_lr=3e-3, eta=3.0, reward_tune="iql_locomotion")
    with_q = dict(num_action_samples=10) | critic | short
    actions = sampled_actions(dac, "DAC", tmp_path, monkeypatch, **with_q)
    assert np.bincount(bandit_mode(TASK, actions))[-1] > 800  # of 1000

    cloning = dict(q_guidance="none", num_action_samples=1) | short
    actions = sampled_actions(dac, "DAC", tmp_path, monkeypatch, **cloning)
    counts = np.bincount(bandit_mode(TASK, actions), minlength=4)
    assert counts.min() > 100 and counts[-1] < 250  # all four corners are still there
