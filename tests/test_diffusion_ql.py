"""diffusion_ql.py: what its golden file does not have, and a task that it must learn."""

import numpy as np
import pytest
import torch
from agents import TASK, check_act_by_softmax, random_batch, sampled_actions

import diffusion_ql
from common.bandits import BANDITS, bandit_mode


def small_agent(**options):
    torch.manual_seed(0)
    args = diffusion_ql.Args(**dict(hidden_dims=(16, 16)) | options)
    return diffusion_ql.DiffusionQL(4, 2, args, torch.device("cpu"))


def test_init_uniform():
    torch.manual_seed(0)
    critic = diffusion_ql.EnsembleCritic(100, 20, 2, (400, 400))
    diffusion_ql.init_uniform(critic)
    for layer in critic.layers[:2]:
        bound = layer.weight.shape[1] ** -0.5
        for parameter in (layer.weight, layer.bias):
            assert 0.95 * bound < parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_critic_loss(float64, max_q_backup):
    agent = small_agent(max_q_backup=max_q_backup, num_q_samples=4)
    batch, draws = random_batch(diffusion_ql), agent.draw(5)
    loss, _ = agent.critic_loss(batch, draws)
    n = 4 if max_q_backup else 1
    next_obs = batch.next_obs.repeat_interleave(n, dim=0)
    actions = agent.sample(agent.actor_target, next_obs, draws.next_action_noise)
    next_q = agent.critic_target(next_obs, actions).view(2, 5, n).tolist()
    q = agent.critic(batch.obs, batch.action).tolist()
    errors = []
    for row in range(5):
        value = min(max(next_q[member][row]) for member in (0, 1))
        target = batch.reward[row].item() + (0 if batch.terminal[row] else agent.args.gamma * value)
        errors.append(sum((q[member][row] - target) ** 2 for member in (0, 1)))
    assert loss.item() == pytest.approx(np.mean(errors), abs=1e-12)


def test_target_actor_moves_every_fifth_step_from_the_thousandth():
    agent = small_agent()
    moved = [step for step in range(994, 1021) if agent.set_step(step) or agent.actor_tau > 0]
    assert moved == [1000, 1005, 1010, 1015, 1020]


@pytest.mark.parametrize("lr_decay", [False, True])
def test_learning_rates(lr_decay):
    agent = small_agent(lr_decay=lr_decay, total_steps=100, actor_lr=1.0, critic_lr=2.0)
    rates = []
    for step in (0, 50, 100, 150):
        agent.set_step(step)
        rates.append([agent.optimizers[name].param_groups[0]["lr"].item() for name in ("actor", "critic")])
    expected = [[1, 2], [0.5, 1], [0, 0], [0, 0]] if lr_decay else [[1, 2]] * 4
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_gradients_are_limited_unless_the_limit_is_0():
    batch = random_batch(diffusion_ql)
    for limit in (0.01, 0):
        agent = small_agent(max_grad_norm=limit)
        norm = agent.descend("critic", *agent.critic_loss(batch, agent.draw(5)))["critic_grad_norm"]
        left = torch.nn.utils.get_total_norm([each.grad for each in agent.critic.parameters()])
        assert left.item() == pytest.approx(0.01 if limit else norm.item(), rel=1e-3)


def test_act_takes_a_candidate_by_softmax_of_q(monkeypatch):
    agent = small_agent(num_action_samples=7)
    noise = torch.randn(agent.args.diffusion_steps, 35, 2)
    check_act_by_softmax(agent, agent.critic_target, noise, monkeypatch)


@pytest.mark.slow
def test_learns_the_best_mode_of_a_bandit(tmp_path, monkeypatch):
    actions = sampled_actions(diffusion_ql, "DiffusionQL", tmp_path, monkeypatch)
    assert (np.linalg.norm(actions - BANDITS[TASK][-1], axis=1) < 0.15).mean() > 0.9


def test_q_moves_the_policy_to_the_best_mode_of_a_bandit(tmp_path, monkeypatch):
    """The best corner holds a sixth of the data. Behaviour cloning leaves it at that."""
    short = dict(total_steps=400, hidden_dims=(64, 64), batch_size=256, diffusion_steps=5, lr_decay=True)
    with_q = dict(tau=0.03, critic_lr=3e-3, num_action_samples=50, reward_tune="normalize") | short
    actions = sampled_actions(diffusion_ql, "DiffusionQL", tmp_path, monkeypatch, **with_q)
    assert np.bincount(bandit_mode(TASK, actions))[-1] > 800  # of 1000

    cloning = dict(eta=0.0, num_action_samples=1) | short
    actions = sampled_actions(diffusion_ql, "DiffusionQL", tmp_path, monkeypatch, **cloning)
    counts = np.bincount(bandit_mode(TASK, actions), minlength=4)
    assert counts.min() > 100 and counts[-1] < 250  # all four are still there
