"""What makes a run fast: it changes rounding only, and says where it cannot be had."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ROOT, finish, python, results_of, train

from common.cli import UserError
from common.devices import matmul_library, mish, use_device


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


ZEN5 = "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t: avx512bw"
INTEL, ZEN4 = ZEN5.replace("AuthenticAMD", "GenuineIntel"), ZEN5.replace("26", "25")


@pytest.mark.parametrize(
    ("about", "has_onednn", "expected"),
    [
        (ZEN5, True, "onednn"),
        (ZEN5, False, "mkl"),
        (ZEN4, True, "mkl"),
        (INTEL, True, "mkl"),
        (ZEN5 + " amx_tile", True, "mkl"),  # where oneDNN might use bfloat16
        (ZEN5.replace("avx512bw", "avx2"), True, "mkl"),  # PyTorch does not use oneDNN there
        ("CPU implementer : 0x41", True, "mkl"),
    ],
)
def test_which_library(about, has_onednn, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    monkeypatch.setattr(Path, "read_text", lambda path: about)
    assert matmul_library() == expected


def test_neither_cpu_nor_cuda():
    with pytest.raises(UserError, match="--device meta is not available: it is neither cpu nor cuda"):
        use_device("meta", 1, "highest")


def test_an_unknown_task_where_mujoco_cannot_be_loaded():
    code, _, err = finish(python("dac.py", "--env-id", "Nothing-v0", cwd=ROOT, env={"MUJOCO_GL": "bogus"}))
    assert code == 2 and err.startswith("error: unknown task 'Nothing-v0'")
