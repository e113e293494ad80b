"""One golden file, and how numbers are compared with it."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")


def units(largest, count=8):
    """A few units in the last place of float32, for numbers that come from others as large as `largest`.

    What a float32 number may be off, as an error relative to 1 + |number|: the bound of our single precision,
    and of our double precision where the file has what the authors computed in float32.
    """
    return count * 2.0**-23 * largest


class LeftOut(Exception):
    """A case, or a section of one, needs an option of the official code that the script does not have."""


def rounded(values) -> torch.Tensor:
    """Numbers of a formula, rounded to float32 as the files say, in the precision of the run."""
    return torch.as_tensor(np.asarray(values, np.float64).astype(np.float32)).to(torch.get_default_dtype())


def statistics(tensor):
    """What a file holds of a tensor: sum, sum of squares, first three values."""
    values = tensor.detach().double().flatten()
    return [values.sum().item(), values.square().sum().item(), *values[:3].tolist()]


def arguments(options, names, built_in, used_elsewhere=frozenset()):
    """Golden options as arguments of a script, by `names`. LeftOut: one differs from what is built in."""
    for name, value in built_in.items():
        if options.pop(name, value) != value:
            raise LeftOut(f"{name} other than {value}")
    unknown = options.keys() - names.keys() - used_elsewhere
    assert not unknown, f"options of the case that the harness cannot set: {unknown}"
    return {names[name]: value for name, value in options.items() if name in names}


def members_of(network, take=lambda parameter: parameter):
    """Of each member of an ensemble, or of the one network: (weight [out, in], bias) of its layers.

    take(parameter) may give its gradient instead, or None.
    """
    layers = [*getattr(network, "time_mlp", []), *network.layers]
    taken = [(take(layer.weight), take(layer.bias)) for layer in layers]
    if layers[0].weight.dim() == 2:
        return [taken]
    members = range(len(layers[0].weight))
    return [[(None, None) if w is None else (w[k].T, b[k, 0]) for w, b in taken] for k in members]


def tensors_of(network, take=lambda parameter: parameter):
    """The same as one list."""
    return [tensor for layers in members_of(network, take) for pair in layers for tensor in pair]


@contextmanager
def whole_batch(agent, draws):
    """Within, an update takes all rows, in order, and these draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "draw", lambda batch_size: draws)
        patch.setattr(torch, "randint", lambda high, size, device: torch.arange(high))
        yield


class Case:
    """One golden file, in single or double precision."""

    def __init__(self, path, double):
        self.golden, self.double = json.loads(path.read_text()), double
        self.compared, self.skipped = 0, []
        self.inputs = {name: torch.tensor(value) for name, value in self.golden.get("inputs", {}).items()}

    def left_out(self, what):
        """Note that a section was not compared, because it needs `what`, an option that was left out."""
        self.skipped.append(str(what))

    def close(self, actual, expected, name, float32_tolerance=1e-5, double_tolerance=1e-9):
        """|actual - expected| <= tolerance * (1 + |expected|)."""
        tolerance = double_tolerance if self.double else float32_tolerance
        actual = np.asarray(torch.as_tensor(actual).detach(), np.float64)
        expected = np.asarray(expected, np.float64)
        assert actual.shape == expected.shape, name
        self.compared += 1
        error = np.abs(actual - expected) / (1 + np.abs(expected))
        assert error.max() <= tolerance, f"{name}: off by {error.max():.2e}, allowed {tolerance:.0e}"

    def near(self, actual, expected, name, tolerance):
        """The file has this number in single precision only: one tolerance for either of ours."""
        self.close(actual, expected, name, tolerance, tolerance)

    def same(self, tensors, expected, name, *tolerances):
        """Statistics of tensors by golden name, as many as the file has of each."""
        for each, values in expected.items():
            actual = statistics(tensors[each])[: len(values)]
            self.close(actual, values, f"{name} {each}", *tolerances)
