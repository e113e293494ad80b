"""The processor: which device, how many threads, how exact its products are, and what makes it fast."""

import ctypes
import platform
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.cli import UserError

Update = Callable[[], dict[str, Tensor]]  # one gradient step; its losses


def use_device(name: str, num_threads: int, matmul_precision: str) -> torch.device:
    """The device called auto, cpu, cuda or cuda:<i>, after a first use that shows that it works.

    num_threads and matmul_precision hold for the whole process. UserError: there is no such device.
    """
    torch.set_num_threads(num_threads)
    if platform.libc_ver()[0] == "glibc":  # keep freed memory: page faults would take a fifth of a step
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**30)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.empty(0, device=chosen).device
        assert device.type in ("cpu", "cuda"), "it is neither cpu nor cuda"
    except Exception as error:  # for hpu a ModuleNotFoundError
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not available: {reason}; try --device cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs and their streams are those of the current one
    if device.type == "cpu" and matmul_library() == "onednn":
        matmul_precision = "medium"  # lets PyTorch take it; its products are float32 all the same without AMX
    torch.set_float32_matmul_precision(matmul_precision)
    return device


def matmul_library() -> str:
    """What multiplies matrices on a CPU: onednn on Zen 5 or later (MKL uses half its width), else mkl."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux: vendor, family, instruction sets
    about = cpuinfo.read_text() if cpuinfo.exists() else ""
    family = re.search(r"AuthenticAMD\ncpu family\s*: (\d+)", about)
    works = torch.backends.mkldnn.is_available() and "avx512bw" in about and "amx" not in about
    return "onednn" if works and family and int(family[1]) >= 26 else "mkl"


class CPUMish(torch.autograd.Function):
    """y = x tanh(softplus(x)) = x (2 / d - 1) with d = 1 + r^2, r = sigmoid(-x); one exponential in all."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        minus_x = -x
        r = minus_x.sigmoid()
        d = r.square().add_(1)
        y = minus_x.addcdiv_(x, d, value=2)
        ctx.save_for_backward(x, y, r, d)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # y' = w + (x - y w) (1 - r) with w = 2 / d - 1
        x, y, r, d = ctx.saved_tensors
        w = (2 / d).sub_(1)
        rest = torch.addcmul(x, y, w, value=-1)
        return rest.addcmul_(rest, r, value=-1).add_(w).mul_(grad)


def mish(x: Tensor) -> Tensor:
    """The activation x tanh(ln(1 + e^x)) of Misra 2019, element by element."""
    if x.device.type != "cpu":
        return F.mish(x)
    if torch.compiler.is_compiling():  # fuses these with their neighbours, forward and backward
        r2 = torch.sigmoid(-x).square()
        return x * (1 - r2) / (1 + r2)
    return CPUMish.apply(x)


def cuda_graphed(update: Update, device: torch.device, wanted: bool) -> Update:
    """On CUDA, if it is wanted, the same update as one graph: launched at once, not kernel by kernel.

    It runs eagerly three times, on a side stream; then it is captured, and replayed into the same outputs.
    """
    if not wanted or device.type != "cuda":
        return update

    def steps() -> Iterator[dict[str, Tensor]]:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        for _ in range(3):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = update()
            torch.cuda.current_stream().wait_stream(stream)
            yield outputs
        with torch.cuda.graph(graph):
            outputs = update()
        while True:
            graph.replay()
            yield outputs

    return partial(next, steps())
