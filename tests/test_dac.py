"""dac.py against tests/reference.py and closed forms, and a task that it must learn.

Its networks, sampler and whole updates are compared with the official code's in test_conformance.py.
"""

import math

import numpy as np
import pytest
import reference
import torch
from agents import TASK, random_batch, sampled_actions
from runs import load, resume, train

import dac
from common.bandits import BANDITS, bandit_mode

CPU = torch.device("cpu")


def small_agent(**options):
    torch.manual_seed(0)
    args = dac.Args(**dict(hidden_dims=(16, 16), num_qs=3, num_q_samples=2) | options)
    return dac.DAC(obs_dim=4, action_dim=2, args=args, device=CPU)


def test_mish_and_its_gradient(float64):
    x = torch.cat([torch.linspace(-60, 60, 241), torch.tensor([0.0, 1e-9])]).requires_grad_()
    expected = [reference.mish(value) for value in x.tolist()]
    np.testing.assert_allclose(dac.mish(x).detach(), expected, atol=1e-13)
    assert torch.autograd.gradcheck(dac.mish, x)


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_critic_loss(float64, max_q_backup):
    agent = small_agent(rho=0.7, max_q_backup=max_q_backup)
    batch, draws = random_batch(dac), agent.draw(5)
    loss, _ = agent.critic_loss(batch, draws)
    next_obs = batch.next_obs.repeat_interleave(2, dim=0)
    next_action = agent.sample(agent.actor_target, next_obs, draws.next_action_noise)
    next_q = agent.critic_target(next_obs, next_action).view(3, 5, 2)
    q = agent.critic(batch.obs, batch.action)
    errors = []
    for row in range(5):
        transition = batch.reward[row].item(), bool(batch.terminal[row]), agent.args.gamma
        target = reference.ensemble_target(*transition, next_q[:, row].tolist(), "lcb", 0.7, max_q_backup)
        errors += [(q[h, row].item() - target) ** 2 for h in range(3)]
    assert loss.item() == pytest.approx(np.mean(errors), abs=1e-12)


@pytest.mark.parametrize("guidance", ["denoised", "none"])
def test_actor_loss(float64, guidance):
    """eta times the noise regression, and the guidance: Q is divided by its mean size, whatever its signs."""
    agent = small_agent(q_guidance=guidance, eta=0.3)
    batch, draws = random_batch(dac), agent.draw(5)
    loss, metrics = agent.actor_loss(batch, draws)
    x_t = dac.add_noise(batch.action, draws.t, draws.eps, agent.alpha_bar)
    expected = 0.3 * (agent.actor(batch.obs, x_t, draws.t) - draws.eps).square().mean()
    if guidance == "denoised":
        q = agent.critic_target(batch.obs, batch.action)
        assert q.min() < 0 < q.max()
        action = agent.sample(agent.actor, batch.obs, draws.action_noise)
        expected -= agent.critic_target(batch.obs, action).mean() / (q.abs().mean() + dac.EPS)
    torch.testing.assert_close(loss, expected, atol=1e-8, rtol=0)
    assert ("guidance_loss" in metrics) == (guidance != "none")


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
    draws = agent.draw(5)
    monkeypatch.setattr(agent.critic_target, "forward", None)
    agent.actor_loss(batch, draws)


def test_target_actor_moves_every_fifth_step_after_the_first_thousand():
    agent = small_agent()
    moved = [step for step in range(998, 1021) if agent.set_step(step) or agent.actor_tau > 0]
    assert moved == [1005, 1010, 1015, 1020]


def test_eta_follows_the_constraint_within_its_bounds():
    batch = random_batch(dac)
    for threshold, expected in ((-100.0, 1.1), (100.0, 0.9)):  # far below and far above any loss: a full step
        agent = small_agent(eta=1.0, eta_lr=0.1, bc_threshold=threshold)
        agent.update_actor(batch, agent.draw(5))
        assert agent.eta.item() == pytest.approx(expected)
        agent = small_agent(eta=1.0, eta_lr=0.1, bc_threshold=threshold, eta_min=0.95, eta_max=1.05)
        agent.update_actor(batch, agent.draw(5))
        assert agent.eta.item() == pytest.approx((1 + expected) / 2)


def test_a_fixed_eta_is_that_of_the_resumed_run(tmp_path):
    folder = train(tmp_path, dac, total_steps=2, eta_lr=0.0, eta=1.0)
    resume(folder, dac, total_steps=3, eta=2.0)
    assert load(folder)["agent"]["eta"] == 2.0


@pytest.mark.slow
def test_dac_learns_the_best_mode_of_a_bandit(tmp_path, monkeypatch):
    actions = sampled_actions(dac, "DAC", tmp_path, monkeypatch)
    assert (np.linalg.norm(actions - BANDITS[TASK][-1], axis=1) < 0.15).mean() > 0.9


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
