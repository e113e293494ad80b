"""What makes a run fast: it changes rounding only, and says where it cannot be had."""

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ROOT, assert_same_run, finish, python, results_of, train

import dac
import dtql
from common.devices import has_compiler, matmul_library, use_device
from common.tasks import UserError


@pytest.mark.slow
def test_compiled_losses(script, finished, tmp_path):
    """--compile changes rounding only. Slow, and it needs a C++ compiler."""
    plain = results_of(finished(script))["losses"]
    compiled = results_of(train(tmp_path, script, compile=True))["losses"]
    assert plain.keys() == compiled.keys() and plain != compiled
    np.testing.assert_allclose(list(plain.values()), list(compiled.values()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("script", [dac, dtql])  # dtql has two updates
def test_no_compiler(script, finished, tmp_path, capsys):
    has_compiler.cache_clear()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        folder = train(tmp_path, script, compile=True)
    has_compiler.cache_clear()
    assert capsys.readouterr().out.count("--compile needs a C++ compiler, and finds none") == 1
    assert_same_run(folder, finished(script))


def test_threads_and_precision():
    before = torch.get_num_threads()
    try:
        use_device("cpu", 3, "medium")
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (3, "medium")
    finally:
        use_device("cpu", before, "highest")


def test_more_threads_than_pytorch_takes():
    with pytest.raises(UserError, match="--num-threads is 3000000000; above 1024 PyTorch may crash"):
        use_device("cpu", 3_000_000_000, "highest")


# --- Matrix products ---
ZEN5 = "vendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t: avx512bw"
PRODUCTS = """
import sys
import common
from common.devices import use_device
import torch
use_device("cpu", 1, "highest")
torch.manual_seed(0)
a, b = torch.randn(4, 256, 120), torch.randn(4, 120, 64)
found = []
for dtype in (torch.float32, torch.float64):
    a, b = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
    bias = a[:, :1, :64]
    products = [a[0] @ b[0], a[0, ::2] @ b[0], a[0, :2] @ b[0], a @ b, a[:1].expand(4, -1, -1) @ b]
    products += [torch.addmm(bias[0, 0], a[0], b[0]), torch.addmm(bias[0, 0], a[0], b[0], beta=2, alpha=3)]
    products += [torch.baddbmm(bias, a, b)]
    for product in products:
        found += [product.detach(), *torch.autograd.grad(product.square().sum(), (a, b))]
    found.append(torch.mm(a[0].data, b[0].data, out=torch.empty(256, 64, dtype=dtype)))
torch.save(found, sys.argv[1])
"""


def test_products_of_onednn(tmp_path, monkeypatch):
    """Forward and backward: single precision is the same to rounding, double precision to the last bit."""
    monkeypatch.setenv("MATMUL_LIBRARY", "onednn")
    try:
        matmul_library()
    except UserError as error:
        pytest.skip(str(error))
    found = []
    for library in ("mkl", "onednn"):
        path = tmp_path / library
        env = dict(MATMUL_LIBRARY=library, ONEDNN_MAX_CPU_ISA="DEFAULT")
        assert finish(python("-c", PRODUCTS, path, cwd=ROOT, env=env)) == (0, "", "")
        found.append(torch.load(path))
    single, double = ([each[part] for each in found] for part in (slice(25), slice(25, None)))
    assert len(double[0]) == 25 and any(not torch.equal(*pair) for pair in zip(*single, strict=True))
    for one, other in zip(*single, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())
    for one, other in zip(*double, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "vendor, family, given, expected",
    [
        ("AuthenticAMD", 26, None, "onednn"),
        ("AuthenticAMD", 25, None, "mkl"),
        ("GenuineIntel", 26, None, "mkl"),
        ("AuthenticAMD", 26, "mkl", "mkl"),
        ("GenuineIntel", 6, "onednn", "onednn"),
    ],
)
def test_which_library(vendor, family, given, expected, monkeypatch):
    about = ZEN5.replace("AuthenticAMD", vendor).replace("26", str(family))
    monkeypatch.setattr(Path, "read_text", lambda path: about)
    monkeypatch.delenv("MATMUL_LIBRARY", raising=False)
    if given:
        monkeypatch.setenv("MATMUL_LIBRARY", given)
    assert matmul_library() == expected


@pytest.mark.parametrize(
    "has_onednn, about, given, message",
    [
        (False, ZEN5, "onednn", "this PyTorch has no oneDNN"),
        (True, ZEN5, "blas", "it must be mkl or onednn"),
        (True, ZEN5 + " amx_tile", "onednn", "without AVX-512 .*, with AMX oneDNN might use bfloat16"),
        (True, ZEN5.replace("avx512bw", "avx2"), "onednn", "without AVX-512 PyTorch does not use oneDNN"),
        (True, "CPU implementer : 0x41", "onednn", "without AVX-512 PyTorch does not use oneDNN"),
    ],
)
def test_a_library_that_is_not_there(has_onednn, about, given, message, monkeypatch):
    """An error where it was asked for, and else MKL."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    monkeypatch.setattr(Path, "read_text", lambda path: about)
    monkeypatch.setenv("MATMUL_LIBRARY", given)
    with pytest.raises(UserError, match=f"MATMUL_LIBRARY is {given}: {message}"):
        matmul_library()
    monkeypatch.delenv("MATMUL_LIBRARY")
    assert matmul_library() == ("onednn" if given == "blas" else "mkl")
