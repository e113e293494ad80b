"""What makes a run fast: it changes rounding only, and says where it cannot be had."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import results_of, train

import dac
from common.cli import UserError
from common.devices import matmul_library, mish


def test_mish_and_its_gradient(float64):
    x = torch.cat([torch.linspace(-60, 60, 241), torch.tensor([0.0, 1e-9])]).requires_grad_()
    expected = [value * math.tanh(math.log1p(math.exp(value))) for value in x.tolist()]
    np.testing.assert_allclose(mish(x).detach(), expected, atol=1e-13)
    assert torch.autograd.gradcheck(mish, x)


@pytest.mark.slow
def test_compiled_losses(script, finished, tmp_path):
    """--compile changes rounding only. Slow, and it needs a C++ compiler."""
    plain = results_of(finished(script))["losses"]
    compiled = results_of(train(tmp_path, script, compile=True))["losses"]
    assert plain.keys() == compiled.keys() and plain != compiled
    np.testing.assert_allclose(list(plain.values()), list(compiled.values()), rtol=1e-3, atol=1e-5)


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="--compile needs a C\\+\\+ compiler, and finds none"):
        train(tmp_path, dac, compile=True)
    assert not list(tmp_path.iterdir())


# --- Matrix products ---
ZEN5 = "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t: avx512bw"


INTEL, ZEN4 = ZEN5.replace("AuthenticAMD", "GenuineIntel"), ZEN5.replace("26", "25")
CHOICES = [(ZEN5, None, "onednn"), (ZEN4, None, "mkl"), (INTEL, None, "mkl")]
CHOICES += [(ZEN5, "mkl", "mkl"), (INTEL, "onednn", "onednn")]


@pytest.mark.parametrize(("about", "given", "expected"), CHOICES)
def test_which_library(about, given, expected, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: about)
    monkeypatch.delenv("MATMUL_LIBRARY", raising=False)
    if given:
        monkeypatch.setenv("MATMUL_LIBRARY", given)
    assert matmul_library() == expected


@pytest.mark.parametrize(
    ("has_onednn", "about", "given"),
    [
        (False, ZEN5, "onednn"),
        (True, ZEN5, "blas"),
        (True, ZEN5 + " amx_tile", "onednn"),  # which might use bfloat16
        (True, ZEN5.replace("avx512bw", "avx2"), "onednn"),  # PyTorch does not use it there
        (True, "CPU implementer : 0x41", "onednn"),
    ],
)
def test_a_library_that_is_not_there(has_onednn, about, given, monkeypatch):
    """An error where it was asked for, and else MKL."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    monkeypatch.setattr(Path, "read_text", lambda path: about)
    monkeypatch.setenv("MATMUL_LIBRARY", given)
    with pytest.raises(UserError, match=f"MATMUL_LIBRARY is {given}; it must be mkl or, with AVX-512"):
        matmul_library()
    monkeypatch.delenv("MATMUL_LIBRARY")
    assert matmul_library() == ("onednn" if given == "blas" else "mkl")
