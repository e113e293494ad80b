"""Weights, batches and draws by the formulas of the PyTorch codes' golden files (dql_*, dtql_*, qvpo_*)."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from conformance.files import rounded, statistics


def fill(tensors, is_target, gain):
    """The parameters of a network, in the authors' order; gain multiplies matrices only."""
    for position, tensor in enumerate(tensors):
        numbers, shift = np.arange(tensor.numel()), position + 0.25 * is_target
        if tensor.dim() == 2:
            values = gain * (np.sin(0.37 * numbers + shift) / np.sqrt(tensor.shape[1]))
        else:  # vectors are biases, or LayerNorm's weights
            is_scale = position % 2 == 0
            values = is_scale + 0.1 * np.sin(0.53 * numbers + shift)
        tensor.copy_(rounded(values.reshape(tensor.shape)))


def make_batch(case, script):
    """The batch of a case."""
    B, S, A = (case.golden["meta"]["config"][name] for name in "BSA")
    return script.Batch(
        rounded(np.sin(0.11 * np.arange(B * S) + 0.5).reshape(B, S)),
        rounded(0.9 * np.sin(0.23 * np.arange(B * A)).reshape(B, A)),
        rounded(np.cos(0.7 * np.arange(B))),
        rounded(np.sin(0.11 * np.arange(B * S) + 1.5).reshape(B, S)),
        rounded(np.arange(B) % 4 == 3),
    )


def compare_batch(case, batch, *tolerances):
    """The file means by its formulas what make_batch() means by them."""
    columns = {"state": batch.obs, "action": batch.action, "reward": batch.reward}
    columns |= {"next_state": batch.next_obs, "not_done": 1 - batch.terminal}
    expected = case.golden["inputs_check"]
    assert {"state", "action"} <= expected.keys()
    for name in columns.keys() & expected.keys():
        case.close(statistics(columns[name]), expected[name], name, *tolerances)


def uniforms(n, count):
    """The n-th uniform draw, in float64."""
    values = 0.137 * np.arange(count) + 0.29 * n + 0.05
    return values - np.floor(values)


def drawn(draw) -> torch.Tensor:
    """The numbers of one entry of a list of draws; uniform ones stay in float64."""
    n, shape = draw["n"], draw["shape"]
    numbers = np.arange(int(np.prod(shape)))
    if draw["kind"] == "normal":
        return rounded(1.3 * np.sin(0.9 * numbers + 0.31 * n).reshape(shape))
    if draw["kind"] == "integer":
        low, high = draw["lo"], draw["hi"]
        return torch.as_tensor((low + (7 * numbers + 3 * n) % (high - low)).reshape(shape))
    return torch.as_tensor(uniforms(n, len(numbers)).reshape(shape))


def draws_by_meaning(draws, meaning):
    """Those of the draws whose `why` holds the words, in their order."""
    return [drawn(draw) for draw in draws if meaning in draw["why"]]


def chosen(probabilities, u):
    """The index that the authors' multinomial takes for the uniform number u."""
    return int((probabilities.cumsum(0) / probabilities.sum() <= u).sum())


@contextmanager
def choosing(u):
    """Within, torch.multinomial chooses by the uniform number u; yields what it was given, as a list."""
    seen = []

    def multinomial(probabilities, count):
        seen.append(probabilities)
        return torch.tensor([[chosen(probabilities[0], u)]])

    with mock.patch.object(torch, "multinomial", multinomial):
        yield seen


@contextmanager
def rounded_tables(case, script):
    """In the double-precision runs of the files the coefficients are rounded to float32, each by itself.

    So there the sampler and the forward process of the script take them from the file's tables. That the
    script's own functions have these coefficients is left to other checks.
    """
    if not case.double:
        yield
        return
    [tables] = [each for each in case.golden["schedule"].values() if "posterior_mean_coef1" in each]
    tables = {name: torch.tensor(values) for name, values in tables.items()}

    def ddpm_sample(predict_noise, noise, schedule, sigma):
        x = noise[0]
        for i in reversed(range(len(noise))):
            eps = predict_noise(x, i + 1)
            x_0 = tables["sqrt_recip_alphas_cumprod"][i] * x
            x_0 = (x_0 - tables["sqrt_recipm1_alphas_cumprod"][i] * eps).clamp(-1, 1)
            x = tables["posterior_mean_coef1"][i] * x_0 + tables["posterior_mean_coef2"][i] * x
            if i > 0:
                std = (0.5 * tables["posterior_log_variance_clipped"][i]).exp()
                x = x + std * noise[len(noise) - i]
        return x.clamp(-1, 1)

    def add_noise(x_0, t, eps, alpha_bar):
        signal, noise = tables["sqrt_alphas_cumprod"], tables["sqrt_one_minus_alphas_cumprod"]
        return signal[t - 1].unsqueeze(1) * x_0 + noise[t - 1].unsqueeze(1) * eps

    with mock.patch.multiple(script, ddpm_sample=ddpm_sample, add_noise=add_noise):
        yield
