"""Tiny runs of every script for the tests: to start, stop and resume them, and to read their files."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import envs
from common.cli import FORMAT, parse_args, settings_for
from common.datasets import load_dataset
from common.tasks import find_task

ROOT = Path(__file__).parent.parent
TASK = "bandit-moons-v0"
TINY = dict(hidden_dims=(8, 8), batch_size=16, total_steps=24, eval_every=6, eval_episodes=2)
TINY |= dict(log_every=4, save_every=8)
OFFLINE = TINY | dict(diffusion_steps=3, actor_target_start=3, actor_target_every=2)
EDP = OFFLINE | dict(dpm_calls=3)
AGENTS = {  # script -> its agent, and settings of a run of 24 steps, which takes half a second
    "dac": ("DAC", OFFLINE | dict(num_qs=2, num_q_samples=2, eta_lr=0.01)),
    "diffusion_ql": ("DiffusionQL", OFFLINE),
    "dtql": ("DTQL", TINY | dict(pretrain_steps=10, num_action_samples=4, lr_decay=True)),
    "edp_crr": ("EDPCRR", EDP),
    "edp_iql": ("EDPIQL", TINY | dict(diffusion_steps=3, dpm_calls=3)),
    "edp_td3": ("EDPTD3", EDP),
    "qvpo_online": ("QVPO", TINY | dict(diffusion_steps=3, learning_starts=3, num_train_samples=4)),
}


def load_script(name):
    return importlib.import_module(name)


def agent_class(script):
    return getattr(script, AGENTS[script.__name__][0])


def critic_losses_before(script):
    """How many critic losses a tiny run computes before its step 0; below 0 where it begins after that."""
    settings = AGENTS[script.__name__][1]
    return settings.get("pretrain_steps", 0) - max(settings.get("learning_starts", 0) - 1, 0)


def random_batch(script, size=5):
    """Transitions for agents of 4 observations and 2 actions."""
    return script.Batch(
        obs=torch.randn(size, 4),
        action=torch.rand(size, 2) * 2 - 1,
        reward=torch.randn(size),
        next_obs=torch.randn(size, 4),
        terminal=(torch.arange(size) % 2).to(torch.get_default_dtype()),
    )


def tiny_settings(script, **changes):
    """The tiny run's settings of a script, some of them changed."""
    settings = dict(env_id=TASK) | AGENTS[script.__name__][1] | changes
    return settings_for(script.Args, script.TASK_SETTINGS, **settings)


def make_env(name, *env_kwargs, dataset=None):
    """An environment as a run makes it; with other data than the task's own, after a look at them."""
    task, args = find_task(name), SimpleNamespace(env_kwargs=env_kwargs, dataset=dataset)
    data = load_dataset(task, dataset) if dataset else None
    return envs.make_envs(task, 1, args, data)[0] if dataset else envs.make_env(task, args)


def train(run_dir, script, **changes):
    """Run a script; returns the run's folder."""
    script.train(tiny_settings(script, run_dir=str(run_dir), **changes))
    return folder_in(run_dir)


def resume(path, script, **changes):
    """What `--resume <path>` does, with the changes as further arguments."""
    return script.train(parse_args(script.Args, script.TASK_SETTINGS, to_words(resume=path, **changes)))


def to_words(**settings):
    """Settings as words of a command line."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{flag}" if value else f"--no-{flag}"]
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def folder_in(run_dir):
    [folder] = Path(run_dir).iterdir()
    return folder


# === Files of a run ===
def load(path):
    """A checkpoint, from its file or its run's folder."""
    return torch.load(path / "checkpoint.pt" if path.is_dir() else path, weights_only=True)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def curves_of(folder):
    """Tag -> list of (step, value), from the TensorBoard events; without the speed, which varies."""
    for path in Path(folder).glob("events.*"):  # those of one second it reads by their numbers, 10 before 9
        *name, pid, number = path.name.split(".")
        path.rename(path.with_name(".".join([*name, pid.zfill(9), number.zfill(9)])))
    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/steps_per_second"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def assert_same_state(folder, other):
    """Networks, targets, buffers, optimizers, random state and memory are equal, bit for bit."""
    for part in ("agent", "optimizers", "rng", "step", "memory"):
        torch.testing.assert_close(load(folder)[part], load(other)[part], rtol=0, atol=0)


def assert_same_run(folder, other):
    """The states are equal, and all results but the time."""
    assert_same_state(folder, other)
    ours, theirs = results_of(folder), results_of(other)
    assert ours | {"train_seconds": None} == theirs | {"train_seconds": None}


def write_records(folder, script, args, config=None, **results):
    """A folder with config.json and results.json of a run; at the end of 5 steps, if not told otherwise."""
    known = {"format": FORMAT, "step": 5, "total_steps": 5, "finished": True, "evaluations": []}
    known |= {"data": None, "data_mean": None, "train_seconds": 360.0}
    folder.mkdir(parents=True)
    config = {"script": script, "args": args, "sources": {}} | (config or {})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps(known | results))


# === Events in a run ===
def before_call(monkeypatch, owner, name, at):
    """Before the n-th call of owner.name do at[n]: raise an error, send a signal, or call a function.

    Returns the list of the arguments of all calls, which grows.
    """
    original, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append(args)
        event = at.get(len(calls))
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, signal.Signals):
            signal.raise_signal(event)
        elif event:
            event()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


# === Commands ===
def python(*words, env=None, **options):
    """A process of Python."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen([sys.executable, *map(str, words)], env=os.environ | (env or {}), **options)


def finish(process):
    """Exit code, stdout and stderr of a process."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(condition, process=None):
    """Until it is true; the process, if there is one, must live until then."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)
