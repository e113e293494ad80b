"""Slow, obvious float64 versions of what the scripts share, straight from the definitions.

The tests diff the scripts' pieces against these. Timesteps are 1..T, index 0 is clean data.
"""

import math

import numpy as np


def vp_schedule(num_steps, beta_min=0.1, beta_max=10.0):
    """beta_t of the variance-preserving SDE: its beta(s) = beta_min + s (beta_max - beta_min), integrated
    from s = (t - 1) / T to t / T, is the exponent by which the signal's variance falls in step t."""
    betas = [0.0]
    for t in range(1, num_steps + 1):
        start, end = (t - 1) / num_steps, t / num_steps
        integral = beta_min * (end - start) + (beta_max - beta_min) * (end**2 - start**2) / 2
        betas.append(1 - math.exp(-integral))
    return betas


def linear_schedule(num_steps, first=1e-4, last=2e-2):
    return [0.0] + [first + (last - first) * t / (num_steps - 1) for t in range(num_steps)]


def scaled_linear_schedule(num_steps):
    """The linear schedule of 1000 steps, its betas scaled by 1000 / T; beta_t at most 0.999."""
    scale = 1000 / num_steps
    return [min(beta, 0.999) for beta in linear_schedule(num_steps, scale * 1e-4, scale * 2e-2)]


def cosine_schedule(num_steps, s=0.008):
    """alpha_bar_t = f(t) / f(0) with f(t) = cos^2(pi / 2 (t / T + s) / (1 + s)), and beta_t at most 0.999."""

    def alpha_bar(t):
        def f(t):
            return math.cos(math.pi / 2 * (t / num_steps + s) / (1 + s)) ** 2

        return f(t) / f(0)

    return [0.0] + [min(1 - alpha_bar(t) / alpha_bar(t - 1), 0.999) for t in range(1, num_steps + 1)]


def alpha_bars(betas):
    products, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        products.append(product)
    return products


def noisy(x_0, eps, alpha_bar):
    """q(x_t | x_0), one number."""
    return math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * eps


def posterior(x_0, x_t, t, betas):
    """Mean and variance of q(x_{t-1} | x_t, x_0), by multiplying the two Gaussians that it consists of:
    q(x_{t-1} | x_0) and, read as a function of x_{t-1}, q(x_t | x_{t-1}). One number each."""
    bars = alpha_bars(betas)
    if t == 1:
        return x_0, 0.0
    prior_mean, prior_variance = math.sqrt(bars[t - 1]) * x_0, 1 - bars[t - 1]
    likelihood_mean, likelihood_variance = x_t / math.sqrt(1 - betas[t]), betas[t] / (1 - betas[t])
    precision = 1 / prior_variance + 1 / likelihood_variance
    return (prior_mean / prior_variance + likelihood_mean / likelihood_variance) / precision, 1 / precision


def ancestral_sample(predict_noise, noise, betas, clip):
    """x_0 of one number from x_T = noise[0]; step t > 1 adds sqrt(beta_t) times the next noise."""
    bars, x, num_steps = alpha_bars(betas), noise[0], len(noise)
    for t in range(num_steps, 0, -1):
        x_0 = (x - math.sqrt(1 - bars[t]) * predict_noise(x, t)) / math.sqrt(bars[t])
        if clip:
            x_0 = min(max(x_0, -1.0), 1.0)
        x, _ = posterior(x_0, x, t, betas)
        if t > 1:
            x += math.sqrt(betas[t]) * noise[num_steps - t + 1]
    return x


def ensemble_target(reward, terminal, gamma, next_q, kind, rho, max_q_backup):
    """The target value of one transition; next_q[h][j] is critic h's value of next action j."""
    values = [max(of_critic) if max_q_backup else sum(of_critic) / len(of_critic) for of_critic in next_q]
    if kind == "lcb":
        mean = sum(values) / len(values)
        value = mean - rho * math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    elif kind == "min":
        value = min(values)
    else:
        value = rho * min(values) + (1 - rho) * max(values)
    return reward + (0.0 if terminal else gamma * value)


def mlp(x, weights, biases, activation):
    """A fully connected network on one vector; weights are [out, in]; no activation at the end."""
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = np.array([float(np.dot(row, x)) + b for row, b in zip(weight, bias, strict=True)])
        if i < len(weights) - 1:
            x = np.array([activation(value) for value in x])
    return x


def mish(x):
    return x * math.tanh(math.log1p(math.exp(x)))


def best_candidate(actions, q):
    """The action with the highest of its critics' lowest values; q[h][j] is critic h's value of action j."""
    lowest = [min(of_action) for of_action in zip(*q, strict=True)]
    return actions[lowest.index(max(lowest))]


def q_weight(name, q, value, beta=1.0, cut=1.0, shift=0.0, mean=0.0, std=1.0):
    """QVPO's weight of one action, whose state's candidates have the mean q `value`."""
    if name == "qadv":
        return q - value if q > value else 0.0
    if name == "qcut":
        return q if q > cut else cut
    if name == "qrelu":
        return q + shift if q > -shift else 0.0
    if name == "qexpn":
        return math.exp(beta * min(max((q - mean) / std, -8.0), 8.0))
    return max(beta * (q - mean), {"qcut0n": 0.0, "qcut1n": 1.0}[name])
