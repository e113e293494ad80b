"""What a run does besides its algorithm: its folder, curves, checkpoints; how it is stopped and resumed."""

import contextlib
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.cli import FORMAT, UserError, check_bounds, sources_of
from common.devices import matmul_library
from common.scores import reference_returns, scored, show, summarize

stop_requested = threading.Event()


# === Stopping ===
@contextlib.contextmanager
def stopping_between_steps() -> Iterator[None]:
    """Within, Ctrl-C, SIGTERM and SIGHUP only set a flag, for stop_if_asked(); what is ignored stays so."""
    stop_requested.clear()
    is_main_thread = threading.current_thread() is threading.main_thread()  # only that one hears signals
    names = ("SIGINT", "SIGTERM", "SIGHUP") if is_main_thread else ()
    known = {getattr(signal, name) for name in names if hasattr(signal, name)}  # Windows has no SIGHUP
    previous = {each: signal.getsignal(each) for each in known if signal.getsignal(each) != signal.SIG_IGN}

    def request_stop(number: int, frame: object) -> None:
        stop_requested.set()
        for each in {signal.SIGINT, signal.SIGTERM} & previous.keys():
            signal.signal(each, signal.SIG_DFL)  # a second one ends the process at once: a step may hang

    for each in previous:
        signal.signal(each, request_stop)
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def stop_if_asked() -> None:
    """KeyboardInterrupt if a signal asked for the end; called where a run can be left without harm."""
    if stop_requested.is_set():
        raise KeyboardInterrupt


# === Files ===
def write_atomically(path: Path, content: dict) -> None:
    """Write JSON or, as .pt, tensors: a file of that name is always whole. UserError: the disk is full."""
    buffer, temporary = io.BytesIO(), path.with_name(path.name + ".tmp")
    if path.suffix == ".pt":
        torch.save(content, buffer)
    else:
        buffer.write(json.dumps(content, indent=2).encode())
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut could leave an empty file
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # it is not there, or the folder is a file
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error}; make room or choose another --run-dir") from error


def lock_folder(folder: Path) -> FileLock:
    """The right to write into the folder, until released or the process ends. UserError: another has it."""
    lock = FileLock(folder / "run.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{folder} is in use by another process; wait until it has ended") from None
    except OSError:
        pass  # some file systems have no locks; a folder that cannot be written is noticed at config.json
    return lock


# === The run ===
class Run:
    """The folder, curves and checkpoints of one run; `with run:` saves it at its end and when it is stopped.

    step is the number of finished updates (online, of environment steps); the script counts it. An agent is
    a module with .device, .optimizers (a dict) and .set_step(step); a memory is what an online run keeps
    beside it, with .save(folder) -> state and .load(folder, state).
    """

    def __init__(self, script: str, args, task_settings, agent, dataset=None, memory=None, first_step=0):
        """A new run of a script, by its file; with args.resume agent, memory, randomness and step come back.

        UserError: a setting is out of bounds, the checkpoint not resumable, or the folder not writable.
        """
        check_bounds(args)
        self.args, self.agent, self.dataset, self.memory = args, agent, dataset, memory
        self.step, self.in_update = first_step, False
        self.names: list[str] = []  # of the losses
        self.losses: list[Tensor] = []  # of each step since the last log, on the device
        self.best: dict | None = None  # the policy of the best evaluation, until it is saved
        about: dict = {"data": None, "data_mean": None, "data_checksum": 0}
        about |= dataset.about() if dataset else {"reference_returns": reference_returns(args.env_id)}
        self.reference = about["reference_returns"]
        self.results: dict = {"script": Path(script).stem, "env_id": args.env_id, "seed": args.seed}
        self.results |= {"evaluations": [], "losses": {}, "train_seconds": 0.0} | about
        name = f"{args.env_id}__{Path(script).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        path = Path(args.resume or Path(args.run_dir) / re.sub(r"[^-\w.]", "-", name)).expanduser()
        self.folder = path.parent if args.resume and not path.is_dir() else path
        self.lock = lock_folder(self.folder)
        if args.resume:
            from common.checkpoints import restore

            restore(self, path, about)
        self.announce(sources_of(args, task_settings))
        self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)  # from there on drawn anew
        self.first, self.started, self.seconds_before = self.step, time.time(), self.results["train_seconds"]
        counts = {"initial": self.step - first_step, "total": args.total_steps - first_step}
        self.bar = tqdm(**counts, unit="step", mininterval=0.1 if sys.stderr.isatty() else 60)  # seconds

    def announce(self, sources: dict[str, str]) -> None:
        """Say what is trained on what, with which settings and where each came from; write config.json."""
        args, device, data = self.args, self.agent.device, self.dataset
        where = f"{device}, {matmul_library()}" if device.type == "cpu" else str(device)
        git, code = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], ""
        with contextlib.suppress(OSError):  # it is not installed
            code = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        versions = {name: metadata.version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
        config = {"script": self.results["script"], "args": asdict(args), "sources": sources, "device": where}
        config |= {"code": code, "python": platform.python_version()} | versions
        write_atomically(self.folder / "config.json", config)
        what = "its own transitions"
        if data:
            counts = f"{len(data.rewards):,} transitions, {len(data.episode_returns):,} episodes"
            what = f"{data.name}: {counts}, mean {show(scored(self.results['data_mean'], self.reference))}"
        print(f"{self.results['script']} in {args.env_id} learns from {what}")
        for source in sorted(set(sources.values()), key=lambda of: (of == "default", of != "given")):
            values = [f"{name} {getattr(args, name)}" for name in sources if sources[name] == source]
            print(f"  {source}: {', '.join(values)}")
        print(f"  {where}, seed {args.seed}, step {self.step:,} of {args.total_steps:,}, {self.folder}")
        if threading.current_thread() is not threading.main_thread():
            print("  not reproducible: threads share PyTorch's random state")

    # --- Steps ---
    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Within, half a step is done: if it fails there, the run is not saved."""
        self.in_update = True
        yield
        self.in_update = False

    def add_losses(self, losses: dict[str, Tensor]) -> None:
        """Keep the losses of one step, on the device; there are none in a step without an update."""
        if losses:
            self.names = list(losses)
            self.losses.append(torch.stack(list(losses.values())))
        self.bar.update()

    def reached(self, every: int) -> bool:
        """Whether this step is a multiple of `every`, or the last one."""
        return self.step % every == 0 or self.step == self.args.total_steps

    def evaluation_due(self) -> bool:
        """Whether this step ends with an evaluation that is not made yet."""
        done = self.results["evaluations"][-1]["step"] if self.results["evaluations"] else 0
        return self.args.eval_episodes > 0 and self.step > done and self.reached(self.args.eval_every)

    # --- Curves ---
    def add_to_curves(self, group: str, values: dict) -> None:
        """Write the values that are floats to TensorBoard."""
        for name, value in values.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"{group}/{name}", value, self.step)
        self.writer.flush()  # before a checkpoint, after which it is not drawn again

    def log_losses(self) -> None:
        """The mean losses since the last call, as losses/*. UserError: one is not finite."""
        losses = self.checked_losses()
        if self.losses:
            self.results["losses"] = dict(zip(self.names, losses.mean(0).tolist(), strict=True))
            self.add_to_curves("losses", self.results["losses"])
            speed = (self.step - self.first) / (time.time() - self.started)
            self.add_to_curves("charts", {"steps_per_second": speed})
        self.losses = []

    def log_evaluation(self, evaluation: dict) -> None:
        """The returns and lengths of an evaluation, with its score, as eval/*. UserError: as log_losses()."""
        self.checked_losses()
        returns, lengths = np.array(evaluation["returns"]), np.array(evaluation["lengths"])
        mean, spread = returns.mean().item(), returns.std().item()
        found = {"return_mean": mean, "return_std": spread, "length_mean": lengths.mean().item()}
        found["normalized_score"] = scored(mean, self.reference)["score"]
        evaluation = {"step": self.step} | evaluation | found
        self.results["evaluations"].append(evaluation)
        if mean == max(each["return_mean"] for each in self.results["evaluations"]):
            weights = {name: value.clone() for name, value in self.agent.state_dict().items()}
            self.best = {"step": self.step, "agent": weights}
        self.bar.write(f"step {self.step:,}: return {mean:.5g} +- {spread:.4g}, {self.summary()}")
        if self.step == self.first:  # owed since before a stop: kept before it is drawn, or drawn twice
            self.save()
        self.add_to_curves("eval", evaluation)

    def summary(self) -> str:
        """The scores of the evaluations, for the screen."""
        results = summarize(self.results["evaluations"], self.reference).items()
        return ", ".join(f"{name.replace('_', ' ')} {show(result)}" for name, result in results)

    def checked_losses(self) -> Tensor:
        """The losses (steps, losses) since the last log. UserError: one, named, is not finite."""
        losses = torch.stack(self.losses) if self.losses else torch.empty(0, len(self.names))
        if len(bad := (~losses.isfinite()).nonzero()):
            row, column = bad[0].tolist()
            step, advice = self.step - len(losses) + 1 + row, "try a lower learning rate"
            inputs = [self.dataset.rewards, self.dataset.observations] if self.dataset else [[0.0]]
            largest = np.abs(np.column_stack(inputs)).max(0)  # (1 + obs_dim,)
            if largest.max() > 1e4:
                name = f"observations[:, {largest.argmax() - 1}]" if largest.argmax() else "rewards"
                advice = f"the data's {name} are up to {largest.max():.3g}: scale them down"
            what = f"{self.names[column]} is {losses[row, column].item()} at step {step:,}"
            raise UserError(f"{what}; {advice}; nothing is saved after it in {self.folder}")
        return losses

    # --- Saving ---
    def save(self, name: str = "checkpoint.pt") -> None:
        """Write checkpoint, best.pt and results.json. UserError: a loss is not finite, or the disk full."""
        losses, device = self.checked_losses(), self.agent.device
        about = {"format": FORMAT, "step": self.step, "total_steps": self.args.total_steps}
        about["finished"] = self.step == self.args.total_steps and not self.evaluation_due()
        about["train_seconds"] = self.seconds_before + time.time() - self.started
        self.results |= about | summarize(self.results["evaluations"], self.reference)
        state = {"format": FORMAT, "args": asdict(self.args), "results": self.results, "step": self.step}
        if self.best:
            best, self.best = state | self.best, None
            write_atomically(self.folder / "best.pt", best)
        state |= {
            "agent": self.agent.state_dict(),
            "optimizers": {each: optimizer.state_dict() for each, optimizer in self.agent.optimizers.items()},
            "memory": self.memory.save(self.folder) if self.memory else None,
            "loss_names": self.names,
            "losses": losses,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        write_atomically(self.folder / name, state)
        self.write_results()

    def write_results(self) -> None:
        """Write results.json, which people and tools read."""
        write_atomically(self.folder / "results.json", self.results)

    def __enter__(self) -> None:
        self.stopping = stopping_between_steps()
        self.stopping.__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        """Save, unless half a step is done or the run itself found what is wrong; close everything."""
        self.bar.close()
        try:
            if not self.in_update and kind is not UserError:
                self.save()
                how = f"stopped: go on with --resume {self.folder}" if kind else f"finished: {self.folder}"
                minutes = f"{self.results['train_seconds'] / 60:.1f} min"
                print(f"step {self.step:,} after {minutes}, {self.summary() or 'not evaluated'}\n  {how}")
        finally:
            with contextlib.suppress(OSError):  # of a full disk, which was reported before
                self.writer.close()
            self.lock.release()
            self.stopping.__exit__(None, None, None)
