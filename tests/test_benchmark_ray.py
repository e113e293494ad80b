"""tools/benchmark.py on Ray's local test cluster: a node dies, and its run goes on from its checkpoint."""

import os
import re
import shlex
import signal
import time
from pathlib import Path

import benchmark
import pytest
from runs import finish, python, results_of, wait_for

import toolbox

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-extras.txt")

from ray.cluster_utils import Cluster

pytestmark = pytest.mark.slow
STEPS = 800
GRID = shlex.split("--scripts dac --env-ids bandit-moons-v0 --seeds 0 1 2")
TINY = shlex.split("--hidden-dims 16 16 --diffusion-steps 3 --batch-size 32 --eval-every 200 --save-every 50")


@pytest.fixture
def cluster():
    """A head without CPUs, and two nodes that can make one run each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster, [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.shutdown()


def start(run_dir, address):
    words = [*GRID, "--run-dir", run_dir, "--ray-address", address, "--", "--total-steps", STEPS, *TINY]
    return python(benchmark.__file__, *words)


def steps_of(run_dir):
    """Run folder -> step of its last checkpoint."""
    folders = [path.parent for path in run_dir.glob("*/*/results.json")]
    return {folder: results_of(folder)["step"] for folder in folders}


def starts_of(run_dir):
    """Seed -> the steps at which its run was started."""
    logs = {path.parent.name: path.read_text() for path in run_dir.glob("*/log.txt")}
    found = {name: re.findall(rf", step ([\d,]+) of {STEPS}, ", log) for name, log in logs.items()}
    return {name.split("__")[2]: [int(step) for step in steps] for name, steps in found.items()}


def descendants(pid):
    """The ids of all processes below one."""
    of_threads = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for of_thread in of_threads for child in of_thread]
    return children + [each for child in children for each in descendants(child)]


def test_a_node_dies(cluster, tmp_path):
    """Nothing is lost, and no run begins a second time: the dead one goes on from its checkpoint."""
    cluster, (_, node) = cluster
    process = start(tmp_path, cluster.address)
    wait_for(lambda: len([step for step in steps_of(tmp_path).values() if step >= 100]) == 2, process)
    raylet = node.all_processes["raylet"][0].process.pid
    processes = descendants(raylet)
    commands = [Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in processes]
    [words] = [words for words in commands if str(toolbox.ROOT / "dac.py") in words]
    for number in (signal.SIGSTOP, signal.SIGKILL):  # all at once, as when a machine loses its power
        for pid in [raylet, *processes]:
            os.kill(pid, number)
    seed = words[words.index("--seed") + 1]
    [checkpoint] = [step for folder, step in steps_of(tmp_path).items() if f"__dac__{seed}__" in folder.name]
    cluster.remove_node(node, allow_graceful=False)
    code, out, err = finish(process)
    assert code == 0, out + err
    assert "3 finished, 0 failed, 0 stopped, of 3 runs" in out
    assert list(steps_of(tmp_path).values()) == [STEPS] * 3
    for folder in steps_of(tmp_path):
        evaluations = results_of(folder)["evaluations"]
        assert [each["step"] for each in evaluations] == list(range(200, STEPS + 1, 200))
    assert starts_of(tmp_path) == {"0": [0], "1": [0], "2": [0]} | {seed: [0, checkpoint]}
    assert 100 <= checkpoint < STEPS and checkpoint % 50 == 0


def test_ctrl_c(cluster, tmp_path):
    """The runs on the nodes save and stop; the same command goes on with them."""
    cluster, _ = cluster
    process = start(tmp_path, cluster.address)
    wait_for(lambda: len([step for step in steps_of(tmp_path).values() if step >= 100]) == 2, process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 130, out + err
    assert "0 finished, 0 failed, 3 stopped, of 3 runs" in out
    stopped = steps_of(tmp_path).values()
    assert len(stopped) == 2 and max(stopped) < STEPS
    assert any(step % 50 for step in stopped)  # saved when it was told to stop
    code, out, err = finish(start(tmp_path, cluster.address))
    assert code == 0, out + err
    assert ": 0 finished, 2 stopped, 1 new" in out
    assert list(steps_of(tmp_path).values()) == [STEPS] * 3
    assert sorted(starts_of(tmp_path).values()) == sorted([[0], *([0, step] for step in stopped)])


def test_nothing_answers(tmp_path):
    before = time.monotonic()
    code, out, err = finish(start(tmp_path / "grid", "127.0.0.1:1"))
    assert code == 2 and err.startswith("error: no Ray cluster answers at --ray-address 127.0.0.1:1; ")
    assert time.monotonic() - before < 60 and not (tmp_path / "grid").exists()
