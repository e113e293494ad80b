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


def scaled_linear_schedule(num_steps):
    """A line from 0.0001 to 0.02, scaled by 1000 / T; beta_t at most 0.999."""
    line = [1e-4 + (2e-2 - 1e-4) * t / (num_steps - 1) for t in range(num_steps)]
    return [0.0] + [min(1000 / num_steps * beta, 0.999) for beta in line]


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


def dpm_solver(predict_noise, x, betas, num_calls, t_end, clip):
    """Singlestep DPM-Solver on one number, as its paper's Algorithms 1, 4 and 5 state it.

    log alpha is linear between the timesteps, lambda = log(alpha / sigma), and a step of order m evaluates
    the noise at m times that divide it evenly. The last steps have order 2 and 1 if num_calls is a multiple
    of 3, else a last one has what is left.
    """
    bars, last = alpha_bars(betas), len(betas) - 1

    def log_alpha(t):
        low = min(int(t), last - 1)
        at = [0.5 * math.log(bars[low]), 0.5 * math.log(bars[low + 1])]
        return at[0] + (t - low) * (at[1] - at[0])

    def sigma(t):
        return math.sqrt(1 - math.exp(log_alpha(t)) ** 2)

    def lam(t):
        return log_alpha(t) - math.log(sigma(t))

    def time_of(target):  # lambda falls as t grows
        low, high = 1.0, float(last)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if lam(middle) > target else (low, middle)
        return (low + high) / 2

    def noise(x, t):
        eps = predict_noise(x, t)
        if clip:  # keep (x - sigma eps) / alpha in [-1, 1], with the schedule at the last whole timestep
            bar = bars[int(t + 1e-6)]
            bounds = sorted((x - sign * math.sqrt(bar)) / math.sqrt(1 - bar) for sign in (1, -1))
            eps = min(max(eps, bounds[0]), bounds[1])
        return eps

    left, s = num_calls, float(last)
    grid = (t_end * last - last) / num_calls
    while left:
        order = 3 if left > 3 else {3: 2, 2: 2, 1: 1}[left] if num_calls % 3 == 0 else left
        t = s + order * grid
        h = lam(t) - lam(s)
        eps_s = noise(x, s)
        ratio = math.exp(log_alpha(t) - log_alpha(s))
        if order == 1:
            x = ratio * x - sigma(t) * math.expm1(h) * eps_s
        else:
            r1 = (lam(s + (t - s) / order) - lam(s)) / h
            s1 = time_of(lam(s) + r1 * h)
            u1 = math.exp(log_alpha(s1) - log_alpha(s)) * x - sigma(s1) * math.expm1(r1 * h) * eps_s
            d1 = noise(u1, s1) - eps_s
            if order == 2:
                x = ratio * x - sigma(t) * math.expm1(h) * eps_s - sigma(t) / (2 * r1) * math.expm1(h) * d1
            else:
                r2 = (lam(s + 2 * (t - s) / 3) - lam(s)) / h
                s2 = time_of(lam(s) + r2 * h)
                u2 = math.exp(log_alpha(s2) - log_alpha(s)) * x - sigma(s2) * math.expm1(r2 * h) * eps_s
                u2 -= sigma(s2) * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
                d2 = noise(u2, s2) - eps_s
                x = ratio * x - sigma(t) * math.expm1(h) * eps_s
                x -= sigma(t) / r2 * (math.expm1(h) / h - 1) * d2
        left, s = left - order, t
    return x


def ensemble_target(reward, terminal, gamma, next_q, kind, rho, max_q_backup):
    """The target value of one transition: next_q[h][j] is critic h's value of next action j, kind is how the
    critics become one: lcb, rho standard deviations below their mean, or min."""
    values = [max(of_critic) if max_q_backup else sum(of_critic) / len(of_critic) for of_critic in next_q]
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    value = min(values) if kind == "min" else mean - rho * std
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


def preconditioning(sigma, sigma_data):
    """c_skip, c_out, c_in: the best linear guess of x from x + sigma z where x has standard deviation
    sigma_data, the standard deviation of what it leaves, and one over that of x + sigma z."""
    variance = sigma_data**2 + sigma**2
    c_skip = sigma_data**2 / variance
    c_out = math.sqrt((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * sigma**2)
    return c_skip, c_out, 1 / math.sqrt(variance)


def sinusoidal(t, size):
    """Sines, then cosines, of t times frequencies that fall geometrically from 1 to 1/10000."""
    angles = [t * 10_000 ** (-j / (size // 2 - 1)) for j in range(size // 2)]
    return np.array([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def normal_log_density(value, mean, std):
    return math.log(math.exp(-((value - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi)))
