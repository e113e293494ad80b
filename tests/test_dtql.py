"""dtql.py: what its golden file does not have, or only in single precision; learning."""

import math

import numpy as np
import pytest
import torch
from agents import TASK, random_batch, sampled_actions

import dtql
from common.bandits import BANDITS


def small_agent(**options):
    torch.manual_seed(0)
    args = dtql.Args(**dict(hidden_dims=(16, 16), num_action_samples=7) | options)
    return dtql.DTQL(4, 2, args, torch.device("cpu"))


# --- Noise levels and the denoiser's loss ---
def test_drawn_noise_levels():
    sigma, noise = small_agent().draw_noise(20_000)
    assert sigma.dtype == torch.float32
    assert sigma.median().item() == pytest.approx(dtql.SIGMA_DATA, rel=0.03)
    assert sigma.min() >= dtql.SIGMA_MIN and sigma.max() <= dtql.SIGMA_MAX
    assert noise.std().item() == pytest.approx(1, rel=0.02)


def preconditioning(sigma):
    """c_skip, c_out, c_in of one number: the best linear guess of x from x + sigma z where x has standard
    deviation SIGMA_DATA, the standard deviation of what it leaves, and one over that of x + sigma z."""
    variance = dtql.SIGMA_DATA**2 + sigma**2
    c_skip = dtql.SIGMA_DATA**2 / variance
    c_out = math.sqrt((1 - c_skip) ** 2 * dtql.SIGMA_DATA**2 + c_skip**2 * sigma**2)
    return c_skip, c_out, 1 / math.sqrt(variance)


def test_scalings(float64):
    sigma = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0])
    found = torch.stack(dtql.edm_scalings(sigma), dim=1)
    np.testing.assert_allclose(found, [preconditioning(value) for value in sigma.tolist()], rtol=1e-12)


def test_diffusion_loss(float64):
    """In double precision, which no golden file has: there the noise levels are float32."""
    agent, batch = small_agent(), random_batch(dtql)
    sigma, noise = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0]), torch.randn(5, 2)
    agent.denoiser.layers[-1].bias.data.fill_(2.0)  # leads out of the box where sigma is large
    loss = agent.diffusion_loss(batch.action, batch.obs, sigma, noise)
    errors, outside = [], 0
    for row in range(5):
        c_skip, c_out, c_in = preconditioning(sigma[row].item())
        x = (batch.action[row] + sigma[row] * noise[row]).unsqueeze(0)
        t = (sigma[row].log() / 4).view(1, 1)
        output = agent.denoiser.network(batch.obs[row : row + 1], c_in * x, t)
        denoised = (c_skip * x + c_out * output)[0]  # (action_dim,)
        outside += (denoised.abs() > 1).sum().item()
        errors.append((denoised.clamp(-1, 1) - batch.action[row]).detach().numpy() / c_out)
    assert outside > 0
    assert loss.item() == pytest.approx(np.square(errors).mean(), rel=1e-12)


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
        _, c_out, _ = preconditioning(sigma)
        shrink = 1 / (1 + std**2 / sigma**2)  # of the distance to the mode that the denoiser undoes
        expected = ((actions - mean) ** 2 * shrink**2 + (1 - shrink) ** 2 * sigma**2) / c_out**2
        np.testing.assert_allclose(losses, expected, rtol=1e-9)
        assert actions[np.argmin(losses)] == pytest.approx(mean)


# --- The policy ---
def test_likelihood_of_the_data_in_the_actor_loss(float64):
    """ln N(atanh(a / 1.001); mean, std), summed over the numbers of an action."""
    agent, batch = small_agent(nll_weight=0.7), random_batch(dtql)
    mean, std = agent.actor(batch.obs)
    z = (torch.atanh(batch.action / 1.001) - mean) / std
    nll = (z.square() / 2 + std.log() + math.log(2 * math.pi) / 2).sum(1).mean()
    draws = agent.draw(5)
    loss, metrics = agent.actor_loss(batch, draws)
    agent.args.nll_weight = 0.0
    without, _ = agent.actor_loss(batch, draws)
    assert metrics["nll"].item() == pytest.approx(nll.item(), rel=1e-9)
    assert (loss - without).item() == pytest.approx(0.7 * nll.item(), rel=1e-9)


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


# --- Acting and learning ---
def test_act_is_one_forward_pass_and_stays_in_the_box():
    agent, calls = small_agent(num_action_samples=50), []
    for network in (agent.actor, agent.critic_target, agent.denoiser):
        network.register_forward_pre_hook(lambda module, inputs: calls.append((type(module), len(inputs[0]))))
    action = agent.act(torch.randn(6, 4))
    assert calls == [(dtql.OneStepPolicy, 6), (dtql.TwinCritic, 300)]
    assert action.shape == (6, 2) and action.abs().max() <= 1


def test_learning_the_best_mode_of_a_bandit(tmp_path, monkeypatch):
    """The best corner holds a sixth of the data. With Q the policy is there, without Q it is not."""
    best_corner = BANDITS[TASK][-1]
    short = dict(pretrain_steps=300, total_steps=500)
    actions = sampled_actions(dtql, "DTQL", tmp_path, monkeypatch, **short)
    assert (np.linalg.norm(actions - best_corner, axis=1) < 0.15).mean() > 0.9

    cloning = dict(q_weight=0.0, num_action_samples=1) | short
    actions = sampled_actions(dtql, "DTQL", tmp_path, monkeypatch, **cloning)
    assert (np.linalg.norm(actions - best_corner, axis=1) < 0.25).mean() < 0.4
