"""What the tests of several scripts share as fixtures."""

import os
import signal
import sys
from functools import cache

os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CHECKED_GPU", "")  # of gpu.py; else none, in no process

import pytest
import torch
from runs import AGENTS, load_script, train
from tensorboard.summary.writer import event_file_writer

from common.devices import use_device

# As in a run, also in tests that make none; "medium" takes the products of oneDNN, where .ci/run asks for it.
use_device("cpu", int(os.environ.get("OMP_NUM_THREADS", 1)), os.environ.get("MATMUL_PRECISION", "highest"))

# Files of one second are read in the order of their names, which end with this: .10 would come before .9.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)

# Where tests run in the background, by a shell's & or by CI, Ctrl-C is ignored, and under nohup the end of
# the terminal session, also by what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def golden_checks_on_the_device(request, monkeypatch):
    """What the checks make is made there, and compared on the host."""
    if not os.environ.get("CHECKED_GPU") or "check" not in request.fixturenames:
        yield
        return
    numpy, module = torch.Tensor.numpy, sys.modules[request.getfixturevalue("check").__module__]
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: numpy(tensor.cpu()))
    monkeypatch.setattr(module, "CPU", torch.device("cuda"), raising=False)
    with torch.device("cuda"):
        yield


@pytest.fixture(scope="session", params=AGENTS)
def script(request):
    """Each of the seven scripts."""
    return load_script(request.param)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A function from a script to the folder of a finished tiny run of it, which is not to be changed."""
    return cache(lambda script: train(tmp_path_factory.mktemp("finished"), script))


@pytest.fixture
def float64():
    """Double precision by default, for the test that asks for it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def minari_folder(tmp_path, monkeypatch):
    """An empty folder of Minari datasets, and no network."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path
