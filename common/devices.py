"""The processor: which device, how many threads, how exact its products are, and what makes it fast.

device = use_device("auto", num_threads=1, matmul_precision="highest")
"""

import ctypes
import os
import platform
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from common.tasks import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def default_threads() -> int:
    """OMP_NUM_THREADS where it is a number, else 1: the networks are too small to gain from more."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(given)) if given.isdigit() else 1


def use_device(name: str, num_threads: int, matmul_precision: str) -> torch.device:
    """The device called auto, cpu, cuda or cuda:<i>, after a first use that shows that it works.

    num_threads and matmul_precision hold for the whole process. UserError: no such device, or many threads.
    """
    if num_threads > 1024:
        raise UserError(f"--num-threads is {num_threads}; above 1024 PyTorch may crash")
    torch.set_num_threads(num_threads)
    torch.set_float32_matmul_precision(matmul_precision)
    keep_freed_memory()
    if matmul_library() == "onednn":  # PyTorch takes it where bfloat16 is allowed; without AMX it is float32
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.empty(0, device=chosen).device
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("it is neither cpu nor cuda")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # CUDA graphs and their streams are those of the current one
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not available: {reason}; try --device cpu") from error


def matmul_library() -> str:
    """What multiplies float32 matrices on a CPU: onednn on AMD's Zen 5 or later, else mkl, PyTorch's own.

    MKL uses half the width of those processors. The environment variable MATMUL_LIBRARY overrules this.
    UserError: it is neither mkl nor onednn, or this PyTorch or processor has no float32 product of oneDNN.
    """
    about = about_processor()
    family = re.search(r"AuthenticAMD\ncpu family\s*: (\d+)", about)
    problem = ""
    if not torch.backends.mkldnn.is_available():
        problem = "this PyTorch has no oneDNN"
    elif "avx512bw" not in about or "amx" in about:
        problem = "without AVX-512 PyTorch does not use oneDNN, with AMX oneDNN might use bfloat16"
    default = "onednn" if family and int(family[1]) >= 26 and not problem else "mkl"
    chosen = os.environ.get("MATMUL_LIBRARY", default)
    if chosen not in ("mkl", "onednn"):
        problem = "it must be mkl or onednn"
    if problem and chosen != "mkl":
        raise UserError(f"MATMUL_LIBRARY is {chosen}: {problem}")
    return chosen


def about_processor() -> str:
    """What Linux says of an x86 processor: vendor, family, instruction sets; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors; page faults take a fifth of a step on a CPU otherwise."""
    if platform.libc_ver()[0] == "glibc":
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**30)


class CPUMish(torch.autograd.Function):
    """x tanh(softplus(x)) = 2 x / (1 + r^2) - x with r = sigmoid(-x); takes a third of F.mish's CPU time."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        minus_x = -x
        return minus_x.addcdiv_(x, minus_x.sigmoid().square_().add_(1), value=2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # (2 - d + 4 x r^2 (1 - r) / d) / d with d = 1 + r^2
        (x,) = ctx.saved_tensors
        r = (-x).sigmoid_()
        d = r.square().add_(1)
        return (2 - d).addcdiv_(x * (d - 1) * (1 - r), d, value=4).div_(d).mul_(grad)


def mish(x: Tensor) -> Tensor:
    """The activation x tanh(ln(1 + e^x)) of Misra 2019, element by element."""
    if x.device.type != "cpu":
        return F.mish(x)
    if torch.compiler.is_compiling():  # fuses these with their neighbours, forward and backward
        r2 = torch.sigmoid(-x).square()
        return x * (1 - r2) / (1 + r2)
    return CPUMish.apply(x)


@cache
def has_compiler() -> bool:
    """Whether torch.compile finds the C++ compiler that it needs; says so, once, where it does not."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
        return True
    except InvalidCxxCompiler:
        print("  --compile needs a C++ compiler, and finds none: install g++ or set CXX; goes on uncompiled")
        return False


def accelerated(
    update: Callable[[], dict[str, Tensor]], agent: nn.Module, args
) -> Callable[[], dict[str, Tensor]]:
    """The same update: losses compiled with --compile, on a GPU captured whole in a CUDA graph."""
    if args.compile and has_compiler():
        for name in dir(agent):
            if name.endswith("_loss") and name not in vars(agent):  # not compiled yet, for another update
                setattr(agent, name, torch.compile(getattr(agent, name)))
    if args.cuda_graph and agent.device.type == "cuda":
        from common.cuda_graphs import cuda_graphed

        return cuda_graphed(update)
    return update
