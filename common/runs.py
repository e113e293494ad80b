"""What a run does besides its algorithm: its folder, curves, checkpoints, and how it is stopped and resumed.

An agent is a module with .device, .optimizers (a dict) and .set_step(step). What an online run keeps beside
it is a memory, with .save(folder) -> state and .load(folder, state).
"""

import contextlib
import errno
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
import zipfile
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

from common.cli import UserError, check_bounds, sources_of
from common.devices import Update, matmul_library
from common.scores import reference_returns, scored, show, summarize

FORMAT = 3  # of checkpoint.pt and results.json; another format is refused
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # what some file systems answer
stop_requested = threading.Event()


# === Stopping ===
@contextlib.contextmanager
def stopping_between_steps() -> Iterator[None]:
    """Within, Ctrl-C, SIGTERM and SIGHUP only set a flag, for stop_if_asked(); what nohup ignores stays so.

    A second Ctrl-C or SIGTERM ends the process at once: a step may hang. Only a main thread hears signals.
    """
    stop_requested.clear()
    names = ("SIGINT", "SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    known = {getattr(signal, name) for name in names if hasattr(signal, name)}
    previous = {each: signal.getsignal(each) for each in known if signal.getsignal(each) != signal.SIG_IGN}

    def request_stop(number: int, frame: object) -> None:
        stop_requested.set()
        for each in {signal.SIGINT, signal.SIGTERM} & previous.keys():
            signal.signal(each, signal.SIG_DFL)

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
    """Write JSON or, as .pt, tensors: the final name always has a whole file, also after a power cut.

    UserError: the disk is full or not writable.
    """
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
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}; make room or choose another --run-dir") from error


def lock_folder(folder: Path) -> FileLock:
    """The right to write into a run folder, until it is released or the process ends. UserError: taken."""
    lock = FileLock(folder / "run.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{folder} is in use by another process; wait until it has ended") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"cannot write into {folder}: {error}") from error
    return lock


def load_checkpoint(path: Path) -> dict:
    """What Run.save() wrote, from the file or its run folder, and that folder as "folder".

    Only tensors and plain values are unpickled. UserError: no checkpoint, or one that is damaged or too old.
    """
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():  # to open a pipe would take forever
        raise UserError(f"there is no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = checkpoint["format"]
    except Exception as error:  # whatever a damaged file provokes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} cannot be read, or is no checkpoint, or a damaged one ({reason})") from error
    if version != FORMAT:
        raise UserError(f"{path} is of another version of this project: format {version}, not {FORMAT}")
    return checkpoint | {"folder": path.parent}


# === The run ===
class Run:
    """The folder, curves and checkpoints of one run; `with run:` saves it at its end and when it is stopped.

    step is the number of finished updates (online, of environment steps); the script counts it.
    """

    def __init__(self, script: str, args, task_settings, agent, dataset=None, memory=None, first_step=0):
        """A new run of a script, by its file; with args.resume agent, memory, randomness and step come back.

        Without a dataset the agent learns from what it does itself. UserError: a setting out of bounds, a
        checkpoint that these settings cannot resume, or a folder that cannot be written.
        """
        check_bounds(args)
        self.args, self.agent, self.dataset, self.memory = args, agent, dataset, memory
        self.reference = dataset.reference_returns if dataset else reference_returns(args.env_id)
        self.step, self.in_update = first_step, False
        self.names: list[str] = []  # of the losses
        self.losses: list[Tensor] = []  # of each step since the last log, on the device
        self.best: dict | None = None  # the policy of the best evaluation, until it is saved
        self.results: dict = {"script": Path(script).stem, "env_id": args.env_id, "seed": args.seed}
        self.results |= {"data": None, "data_checksum": 0, "data_mean": None}
        if dataset:
            mean = dataset.episode_returns.mean().item() if len(dataset.episode_returns) else None
            self.results |= {"data": dataset.name, "data_checksum": dataset.checksum(), "data_mean": mean}
        self.results |= {"reference_returns": self.reference}
        self.results |= {"evaluations": [], "losses": {}, "train_seconds": 0.0}
        name = f"{args.env_id}__{Path(script).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.folder = Path(args.run_dir).expanduser() / re.sub(r"[^-\w.]", "-", name)
        if args.resume:
            self.resume(Path(args.resume).expanduser())
        owed = self.evaluation_due()
        try:
            self.folder.mkdir(parents=True, exist_ok=bool(args.resume))
            # What was drawn after the checkpoint is drawn again, and an evaluation that it does not have.
            self.writer = SummaryWriter(self.folder, purge_step=self.step + 1 - owed)
        except (OSError, UnicodeError) as error:
            raise UserError(f"cannot write into {self.folder}: {error}; choose another --run-dir") from error
        if not args.resume:
            self.lock = lock_folder(self.folder)
        elif owed and self.reached(args.log_every):
            self.add_to_curves("losses", self.results["losses"])
        self.announce(sources_of(args, task_settings))
        self.started = self.logged = time.time()
        self.logged_step, start = self.step, min(self.step, 0)
        pause = 0.1 if sys.stderr.isatty() else 60  # seconds between two states of the bar
        counts = {"initial": self.step - start, "total": args.total_steps - start}
        self.bar = tqdm(**counts, unit="step", dynamic_ncols=True, mininterval=pause)

    def resume(self, path: Path) -> None:
        """Go on where a checkpoint was written. UserError: it is finished, another run's, or does not fit."""
        self.folder = load_checkpoint(path)["folder"]
        if path.is_file() and path.name != "checkpoint.pt" and (self.folder / "checkpoint.pt").exists():
            raise UserError(f"{self.folder} has a checkpoint.pt; copy {path.name} elsewhere to resume it")
        self.lock = lock_folder(self.folder)
        saved = load_checkpoint(path)  # once more: another process may have written it until now
        new, self.results, self.step = self.results, saved["results"], saved["step"]
        for name in ("script", "env_id", "seed"):
            if self.results[name] != new[name]:
                raise UserError(f"{path} is of {name} {self.results[name]}, not {new[name]}: start a new run")
        if self.step >= self.args.total_steps and not self.evaluation_due():
            raise UserError(f"{path} is finished, at step {self.step:,}; larger --total-steps add more")
        old = saved["args"] | {"resume": self.args.resume}
        changed = {name: value for name, value in asdict(self.args).items() if value != old[name]}
        if "run_dir" in changed and Path(changed["run_dir"]).resolve() != self.folder.resolve().parent:
            raise UserError(f"--run-dir {self.args.run_dir} is for a new run; {self.folder} stays in place")
        if new["data_checksum"] != self.results["data_checksum"] and "dataset" not in changed:
            raise UserError(f"the data of {new['data']} changed since the run in {self.folder} began")
        self.results |= {name: new[name] for name in ("data", "data_checksum", "data_mean")}
        if changed:
            print("resumed with", ", ".join(f"{name} {old[name]} -> {new}" for name, new in changed.items()))
        try:
            self.agent.load_state_dict(saved["agent"])
            for name, optimizer in self.agent.optimizers.items():
                own = optimizer.state_dict()["param_groups"]  # of this device and these arguments
                optimizer.load_state_dict(saved["optimizers"][name] | {"param_groups": own})
            self.agent.set_step(self.step - 1)
            self.names, self.losses = saved["loss_names"], list(saved["losses"].to(self.agent.device))
            torch.set_rng_state(saved["rng"])
            if self.agent.device.type == "cuda" and saved["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["cuda_rng"], self.agent.device)
            if self.memory:
                self.memory.load(self.folder, saved["memory"])
        except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{path} is damaged or does not fit: {reason}") from error

    def announce(self, sources: dict[str, str]) -> None:
        """Say what is trained on what, with which settings and where each came from; write config.json."""
        args, device, data = self.args, self.agent.device, self.dataset
        where = f"{device}, {matmul_library()}" if device.type == "cpu" else str(device)
        config = {"script": self.results["script"], "args": asdict(args), "sources": sources, "device": where}
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        with contextlib.suppress(OSError):  # it is not installed
            config["code"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        config["python"] = platform.python_version()
        config |= {name: metadata.version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
        write_atomically(self.folder / "config.json", config)
        what = f"in {args.env_id}: learns from its own transitions"
        if data:
            counts = f"{len(data.rewards):,} transitions, {len(data.episode_returns):,} episodes"
            what = f"on {data.name}: {counts}, mean {show(scored(self.results['data_mean'], self.reference))}"
        print(self.results["script"], what)
        for source in sorted(set(sources.values()), key=lambda of: (of == "default", of != "given")):
            values = [f"{name} {getattr(args, name)}" for name in sources if sources[name] == source]
            print(f"  {source}: {', '.join(values)}")
        print(f"  {where}, seed {args.seed}, step {self.step:,} of {args.total_steps:,}, {self.folder}")
        if self.reference is None:
            print(f"  no reference returns are known for {args.env_id}: raw returns only")
        if threading.current_thread() is not threading.main_thread():
            print("  not reproducible: threads share PyTorch's random state")

    # --- Steps ---
    def guarded(self, update: Update) -> Update:
        """The same update; where it fails, half a step is done, and the run is not saved."""

        def whole_update() -> dict[str, Tensor]:
            self.in_update = True
            losses = update()
            self.in_update = False
            return losses

        return whole_update

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

    def log_losses(self) -> None:
        """The mean losses since the last call, as losses/*. UserError: one is not finite."""
        self.check_losses()
        if self.losses:
            means = torch.stack(self.losses).mean(0).tolist()
            self.results["losses"] = dict(zip(self.names, means, strict=True))
            self.add_to_curves("losses", self.results["losses"])
            speed = (self.step - self.logged_step) / (time.time() - self.logged)
            self.add_to_curves("charts", {"steps_per_second": speed})
        self.losses, self.logged, self.logged_step = [], time.time(), self.step

    def log_evaluation(self, evaluation: dict) -> None:
        """The returns and lengths of an evaluation, with its score, as eval/*. UserError: as log_losses()."""
        self.check_losses()
        returns, mean = np.array(evaluation["returns"]), float(np.mean(evaluation["returns"]))
        evaluation = {
            "step": self.step,
            **evaluation,
            "return_mean": mean,
            "return_std": returns.std().item(),
        }
        evaluation["length_mean"] = float(np.mean(evaluation["lengths"]))
        evaluation["normalized_score"] = scored(mean, self.reference)["score"]
        self.results["evaluations"].append(evaluation)
        self.add_to_curves("eval", evaluation)
        if mean == max(each["return_mean"] for each in self.results["evaluations"]):
            weights = {name: value.clone() for name, value in self.agent.state_dict().items()}
            self.best = {"step": self.step, "agent": weights}
        final, best, last_ten = map(show, summarize(self.results["evaluations"], self.reference).values())
        self.bar.set_postfix_str(final)
        spread = f"return {mean:.5g} +- {returns.std():.4g}"
        self.bar.write(f"step {self.step:,}: {spread}, {final} (best {best}, last ten {last_ten})")
        self.logged, self.logged_step = time.time(), self.step  # an evaluation is no step

    def check_losses(self) -> None:
        """UserError, with its name and step, if a loss since the last log is infinite or NaN."""
        losses = torch.stack(self.losses) if self.losses else torch.zeros(1, 1)  # (steps, losses)
        if not losses.isfinite().all():
            row, column = (~losses.isfinite()).nonzero()[0].tolist()
            step = self.step - len(losses) + 1 + row
            raise self.diverged(f"{self.names[column]} is {losses[row, column].item()} at step {step:,}")

    def diverged(self, what: str) -> UserError:
        """What is not finite, what may have caused it, and where the last good checkpoint is."""
        advice = "try a lower learning rate"
        if self.dataset and (found := self.dataset.largest())[1] > 1e4:
            advice = f"the data's {found[0]} are up to {found[1]:.3g}: scale them down"
        saved = (self.folder / "checkpoint.pt").exists()
        where = f"; the checkpoint in {self.folder} is from before" if saved else ""
        return UserError(f"{what}; {advice}{where}")

    # --- Saving ---
    def save(self, name: str = "checkpoint.pt") -> None:
        """Write the checkpoint, which is the truth, best.pt, and results.json, which people read.

        UserError: a loss or a weight is not finite, or the disk is full.
        """
        self.check_losses()
        agent, device = self.agent.state_dict(), self.agent.device
        if bad := [each for each, value in agent.items() if not value.isfinite().all()]:
            raise self.diverged(f"{bad[0]} is not finite after step {self.step:,}")
        self.results["train_seconds"] += time.time() - self.started
        self.started = time.time()
        finished = self.step == self.args.total_steps and not self.evaluation_due()
        self.results |= {"format": FORMAT, "step": self.step, "total_steps": self.args.total_steps}
        self.results |= {"finished": finished} | summarize(self.results["evaluations"], self.reference)
        state = {"format": FORMAT, "args": asdict(self.args), "results": self.results}
        if self.best:
            best, self.best = state | self.best, None
            write_atomically(self.folder / "best.pt", best)
        state |= {
            "step": self.step,
            "agent": agent,
            "optimizers": {each: optimizer.state_dict() for each, optimizer in self.agent.optimizers.items()},
            "memory": self.memory.save(self.folder) if self.memory else None,
            "loss_names": self.names,
            "losses": torch.stack(self.losses) if self.losses else torch.empty(0, len(self.names)),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        write_atomically(self.folder / name, state)
        write_atomically(self.folder / "results.json", self.results)

    def __enter__(self) -> "Run":
        self.stopping = contextlib.ExitStack()
        self.stopping.enter_context(stopping_between_steps())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        """Save, unless half a step is done or the run itself found what is wrong; close everything."""
        self.bar.close()
        try:
            if not self.in_update and kind is not UserError:
                self.save()
                how = "finished" if kind is None else "stopped"
                summary = summarize(self.results["evaluations"], self.reference).items()
                scores = ", ".join(f"{name.replace('_', ' ')} {show(result)}" for name, result in summary)
                minutes = f"{self.results['train_seconds'] / 60:.1f} min"
                print(f"{how} at step {self.step:,} after {minutes}: {scores or 'not evaluated'}")
                print(
                    f"  in {self.folder}" + ("" if kind is None else f"; go on with --resume {self.folder}")
                )
        finally:
            with contextlib.suppress(OSError):  # of a full disk, which was reported before
                self.writer.close()
            self.lock.release()
            self.stopping.close()
