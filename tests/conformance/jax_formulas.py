"""Weights and draws by the formulas of the golden files of the JAX codes (dac_*, edp_*)."""

import re
from contextlib import contextmanager

import numpy as np
import torch
from conformance.files import members_of, rounded


def kernel(shape, layer, shift, gain):
    """Weight [out, in] of layer number `layer`."""
    values = np.sin(0.37 * np.arange(np.prod(shape)) + 2 * layer + shift).reshape(shape)
    return rounded(gain * values / np.sqrt(shape[1]))


def bias(size, layer, shift):
    return rounded(0.1 * np.sin(0.53 * np.arange(size) + 2 * layer + 1 + shift))


def parameters_of(networks, take=lambda parameter: parameter):
    """Golden name -> tensor. networks: golden name, with {0} or {1} where a member counts from 0 or 1."""
    return {
        f"{name.format(k, k + 1)}.l{layer}.{kind}": tensor
        for name, network in networks.items()
        for k, layers in enumerate(members_of(network, take))
        for layer, pair in enumerate(layers)
        for kind, tensor in zip(("weight", "bias"), pair, strict=True)
    }


def fill(tensors, shift_of, gain):
    """Fill tensors by golden name; shift_of: from the name of a network to the shift of its formulas."""
    for name, tensor in tensors.items():
        network, layer, kind = re.fullmatch(r"(.*)\.l(\d+)\.(\w+)", name).groups()
        formula = (int(layer), shift_of(network))
        is_weight = kind == "weight"
        tensor.copy_(kernel(tensor.shape, *formula, gain) if is_weight else bias(len(tensor), *formula))


def make_batch(case, script):
    names = ("observations", "actions", "rewards", "next_observations", "dones")
    return script.Batch(*(case.inputs[name] for name in names))


def traced_sample(agent, obs, noise):
    """The sampled actions, and x before each network call, which is what the call before it led to."""
    seen = []
    hook = agent.actor.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    with torch.no_grad():
        actions = agent.sample(agent.actor, obs, noise)
    hook.remove()
    return actions, [*seen, actions]


def drawn(draw) -> torch.Tensor:
    """The numbers of one entry of a list of draws; a run of draws n_first..n_last is stacked in front."""
    index = np.arange(np.prod(draw["shape"]))
    stack = []
    for n in range(draw["n_first"], draw["n_last"] + 1):
        if draw["kind"] == "normal":
            values = 1.3 * np.sin(0.9 * index + 0.31 * n)
        elif draw["kind"] == "uniform":
            values = np.mod(0.137 * index + 0.29 * n + 0.05, 1)
        else:
            low, high = map(int, re.findall(r"-?\d+", draw["range"]))
            values = low + (7 * index + 3 * n) % (high - low)
        stack.append(values.reshape(draw["shape"]))
    values = np.stack(stack)
    return torch.as_tensor(values.astype(np.int64)) if draw["kind"] == "randint" else rounded(values)


def chain_noise(draws) -> torch.Tensor:
    """(T, rows, action_dim) for a sampler: x_T, then its noise but for the last draw, which is not used."""
    prior = next(draw for draw in draws if "prior" in draw["why"])
    steps = next(draw for draw in draws if "per step" in draw["why"])
    return torch.cat([drawn(prior), drawn(steps)[:-1]])


@contextmanager
def raw_gradients(agent):
    """Within, id(parameter) -> its gradient as a loss has it, before it is clipped."""
    gradients = {}

    def keep(parameter):
        gradients[id(parameter)] = parameter.grad.clone()

    learned = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(keep) for parameter in learned]
    yield gradients
    for hook in hooks:
        hook.remove()


def check_inputs_follow_their_formulas(case):
    """The file means by its formulas what the harness means by them."""
    B, S, A = (case.golden["dims"][name] for name in "BSA")
    case.close(rounded(np.sin(0.11 * np.arange(B * S) + 0.5)).view(B, S), case.inputs["observations"], "obs")
    case.close(rounded(0.9 * np.sin(0.23 * np.arange(B * A))).view(B, A), case.inputs["actions"], "actions")
