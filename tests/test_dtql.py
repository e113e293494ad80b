"""What dtql.py's golden file does not have, against tests/reference.py and closed forms; learning."""

import math

import numpy as np
import pytest
import reference
import torch
from agents import TASK, random_batch, sampled_actions

import dtql
from common.bandits import BANDITS


def small_agent(**options):
    torch.manual_seed(0)
    args = dtql.Args(**dict(hidden_dims=(16, 16), num_action_samples=7) | options)
    return dtql.DTQL(4, 2, args, torch.device("cpu"))


def values_of(layers):
    """Weights [out, in] and biases of linear layers."""
    return [[getattr(each, kind).detach().numpy() for each in layers] for kind in ("weight", "bias")]


# --- Noise levels ---
def test_drawn_noise_levels():
    sigma, noise = small_agent().draw_noise(20_000)
    assert sigma.dtype == torch.float32
    assert sigma.median().item() == pytest.approx(dtql.SIGMA_DATA, rel=0.03)
    assert sigma.min() >= dtql.SIGMA_MIN and sigma.max() <= dtql.SIGMA_MAX
    assert noise.std().item() == pytest.approx(1, rel=0.02)


def test_scalings_keep_variance_one(float64):
    """What they are made for: input and target of the network have variance 1, whatever sigma is, and the
    target asks for as little as possible of the network's error to be amplified (c_out is minimal)."""
    sigma, sigma_data = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0]), dtql.SIGMA_DATA
    c_skip, c_out, c_in = dtql.edm_scalings(sigma)
    expected = [reference.preconditioning(value, sigma_data) for value in sigma.tolist()]
    np.testing.assert_allclose(torch.stack([c_skip, c_out, c_in], dim=1), expected, rtol=1e-12)
    np.testing.assert_allclose(c_in**2 * (sigma**2 + sigma_data**2), np.ones(5))
    # variance of (x - c_skip (x + sigma z)) / c_out
    variance = ((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2) / c_out**2
    np.testing.assert_allclose(variance, np.ones(5))


# --- Networks and losses ---
def test_denoiser(float64):
    agent, batch = small_agent(), random_batch(dtql)
    t = torch.linspace(-1.5, 1.1, 5)
    output = agent.denoiser.network(batch.obs, batch.action, t.unsqueeze(1))
    weights, biases = values_of(agent.denoiser.layers)
    for row in range(5):
        embedding = reference.sinusoidal(t[row].item(), 16)
        embedding = reference.mlp(embedding, *values_of(agent.denoiser.time_mlp), reference.mish)
        x = weights[0] @ np.concatenate([batch.action[row], batch.obs[row], embedding]) + biases[0]
        expected = reference.mlp(x, weights[1:], biases[1:], reference.mish)
        np.testing.assert_allclose(output[row].detach(), expected, atol=1e-12)


def test_diffusion_loss(float64):
    agent, batch = small_agent(), random_batch(dtql)
    sigma, noise = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0]), torch.randn(5, 2)
    agent.denoiser.layers[-1].bias.data.fill_(2.0)  # leads out of the box where sigma is large
    loss = agent.diffusion_loss(batch.action, batch.obs, sigma, noise)
    errors, outside = [], 0
    for row in range(5):
        c_skip, c_out, c_in = reference.preconditioning(sigma[row].item(), dtql.SIGMA_DATA)
        x = (batch.action[row] + sigma[row] * noise[row]).unsqueeze(0)
        t = (sigma[row].log() / 4).view(1, 1)
        output = agent.denoiser.network(batch.obs[row : row + 1], c_in * x, t)
        for dim in range(2):
            denoised = c_skip * x[0, dim].item() + c_out * output[0, dim].item()
            outside += abs(denoised) > 1
            denoised = min(max(denoised, -1.0), 1.0)
            errors.append(((denoised - batch.action[row, dim].item()) / c_out) ** 2)
    assert outside > 0
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-12)


def test_trust_region_of_gaussian_data(float64):
    """For data N(m, s^2) the best denoiser is known, and with it the trust region loss of an action a in
    closed form: constant + (a - m)^2 ..., lowest at the mode m. So the loss fences in what the data holds."""
    mean, std = 0.2, 0.1
    agent = small_agent()
    agent.denoiser.forward = lambda obs, x, sigma: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)
    points, weights = np.polynomial.hermite_e.hermegauss(5)  # exact for a square under N(0, 1)
    actions = torch.linspace(-0.8, 0.9, 18)
    for sigma in (0.05, 0.5, 2.0):
        losses = []
        for action in actions.view(18, 1, 1).expand(18, 1, 2):
            noises = [torch.full((1, 2), z) for z in points]
            at = [agent.diffusion_loss(action, torch.zeros(1, 4), torch.tensor([sigma]), z) for z in noises]
            losses.append(np.dot(at, weights) / weights.sum())
        _, c_out, _ = reference.preconditioning(sigma, dtql.SIGMA_DATA)
        shrink = 1 / (1 + std**2 / sigma**2)  # of the distance to the mode that the denoiser undoes
        expected = ((actions - mean) ** 2 * shrink**2 + (1 - shrink) ** 2 * sigma**2) / c_out**2
        np.testing.assert_allclose(losses, expected, rtol=1e-9)
        assert actions[np.argmin(losses)] == pytest.approx(mean)


def test_actor_loss(float64):
    agent, batch = small_agent(alpha=3.0, nll_weight=0.7, q_weight=0.5), random_batch(dtql)
    draws = agent.draw(5)
    loss, _ = agent.actor_loss(batch, draws)
    actions, nlls = np.empty((5, 2)), []
    for row in range(5):
        output = reference.mlp(batch.obs[row].numpy(), *values_of(agent.actor.layers), lambda x: max(x, 0.0))
        nlls.append(0.0)
        for dim in range(2):
            mean, std = output[dim], math.exp(min(max(output[2 + dim], -5.0), 2.0))
            actions[row, dim] = math.tanh(mean + std * draws.action_noise[row, dim].item())
            value = math.atanh(batch.action[row, dim].item() / 1.001)
            nlls[-1] -= reference.normal_log_density(value, mean, std)
    actions = torch.tensor(actions)
    trust = agent.diffusion_loss(actions, batch.obs, draws.trust_sigma, draws.trust_noise).item()
    q = [min(q) for q in agent.critic(batch.obs, actions).T.tolist()]
    assert loss.item() == pytest.approx(3.0 * trust - 0.5 * np.mean(q) + 0.7 * np.mean(nlls), abs=1e-9)


def test_initial_weights_of_the_policy_are_orthogonal():
    for layer in dtql.OneStepPolicy(4, 2, (16, 16)).layers:
        weight = layer.weight.detach()
        product = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(product, torch.eye(len(product)), atol=1e-5, rtol=0)
        assert not layer.bias.any()


def test_log_std_is_clamped():
    agent = small_agent()
    agent.actor.layers[-1].bias.data = torch.tensor([0.0, 0.0, -100.0, 100.0])
    _, std = agent.actor(torch.zeros(1, 4))
    torch.testing.assert_close(std, torch.tensor([[math.exp(-5), math.exp(2)]]))


# --- Updates ---
def test_the_target_takes_no_part_in_training():
    """It could be anything. Only acting uses it."""
    agents, data = [small_agent(batch_size=5) for _ in range(2)], random_batch(dtql, 50)
    for parameter in agents[1].critic_target.parameters():
        torch.nn.init.normal_(parameter)
    for agent in agents:
        torch.manual_seed(1)
        for step in range(3):
            agent.set_step(step)
            agent.update(data)
    for name in ("denoiser", "critic", "value", "actor"):
        ours, theirs = (list(getattr(agent, name).parameters()) for agent in agents)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("lr_decay", "expected"), [(True, [1, 1, 0.5, 0, 0]), (False, [1, 1, 1, 1, 1])])
def test_learning_rates(lr_decay, expected):
    """All of them fall from the end of the pretraining on, if any does."""
    agent = small_agent(lr_decay=lr_decay, total_steps=100, actor_lr=1.0, critic_lr=2.0)
    for step, factor in zip((-50, 0, 50, 100, 150), expected, strict=True):
        agent.set_step(step)
        rates = {name: each.param_groups[0]["lr"].item() for name, each in agent.optimizers.items()}
        assert rates == pytest.approx({"denoiser": factor, "actor": factor, "critic": 2 * factor}, abs=1e-6)


# --- Acting ---
def test_act_takes_a_candidate_by_softmax_of_the_smaller_q(monkeypatch):
    agent, obs, noise = small_agent(), torch.randn(5, 4), torch.randn(5, 7, 2)
    picked, seen = [0, 3, 6, 1, 2], []

    def multinomial(probabilities, count):
        seen.append(probabilities)
        return torch.tensor(picked).unsqueeze(1)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    action = agent.act(obs, noise)
    for row, pick in enumerate(picked):
        mean, std = (each.detach() for each in agent.actor(obs[row : row + 1]))
        candidates = (mean + std * noise[row]).tanh()
        q = agent.critic_target(obs[row].expand(7, -1), candidates).amin(0)
        torch.testing.assert_close(seen[0][row], q.softmax(0))
        torch.testing.assert_close(action[row], candidates[pick])


def test_act_is_one_forward_pass_and_stays_in_the_box():
    agent, calls = small_agent(num_action_samples=50), []
    for network in (agent.actor, agent.critic_target, agent.denoiser):
        network.register_forward_pre_hook(lambda module, inputs: calls.append((type(module), len(inputs[0]))))
    action = agent.act(torch.randn(6, 4))
    assert calls == [(dtql.OneStepPolicy, 6), (dtql.TwinCritic, 300)]
    assert action.shape == (6, 2) and action.abs().max() <= 1


# --- A task that it must learn ---
def test_dtql_learns_the_best_mode_of_a_bandit(tmp_path, monkeypatch):
    """The best corner holds a sixth of the data. With Q the policy is there, without Q it is not."""
    best_corner = BANDITS[TASK][-1]
    short = dict(pretrain_steps=300, total_steps=500)
    actions = sampled_actions(dtql, "DTQL", tmp_path, monkeypatch, **short)
    assert (np.linalg.norm(actions - best_corner, axis=1) < 0.15).mean() > 0.9

    cloning = dict(q_weight=0.0, num_action_samples=1) | short
    actions = sampled_actions(dtql, "DTQL", tmp_path, monkeypatch, **cloning)
    assert (np.linalg.norm(actions - best_corner, axis=1) < 0.25).mean() < 0.4
