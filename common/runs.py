"""What a run does besides its algorithm: its folder, log and checkpoints, and how it starts and stops.

An agent is a module with .device, .optimizers (a dict) and .set_step(step). What an online run keeps beside
it is a memory, with .save(folder) -> state and .load(folder, state).
"""

import contextlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from importlib import metadata
from operator import index
from pathlib import Path
from typing import Any

from common.checkpoints import FORMAT, cannot_write, load_checkpoint, lock_folder, write_atomically
from common.datasets import Dataset
from common.devices import matmul_library, use_device
from common.scores import reference_returns, scored, show, summarize
from common.settings import TaskSettings, check_bounds, parse_args, sources_of
from common.tasks import EnvironmentFailure, UserError, user_path

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
stop_requested = threading.Event()


# === Starting and stopping ===
def run_command(main: Callable, args_class: type, task_settings: TaskSettings | None = None) -> None:
    """Run main(the arguments on the command line), of a script or, without task_settings, of a tool.

    Exit codes: 2 after a user's mistake, with one message; 130 after Ctrl-C; 141 if nobody reads the output.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # the imports are done: see common/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.excepthook = lambda failure: None  # TensorBoard's thread; its errors come again in this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        args: Any = tyro.cli(args_class) if task_settings is None else parse_args(args_class, task_settings)
        check_bounds(args)
        main(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes what Python still wants to print
        sys.exit(141)


@contextlib.contextmanager
def stopping_between_steps() -> Iterator[None]:
    """Within, Ctrl-C, SIGTERM and SIGHUP only set a flag, for raise_if_interrupted().

    A second Ctrl-C or SIGTERM ends the process at once: a step may hang. What nohup ignores stays ignored.
    """

    def request_stop(number: int, frame: object) -> None:
        stop_requested.set()
        for each in {signal.SIGINT, signal.SIGTERM}.intersection(heard):
            signal.signal(each, signal.SIG_DFL)

    stop_requested.clear()
    heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, request_stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_if_interrupted() -> None:
    """KeyboardInterrupt if a signal asked for the end; called where a run can be left without harm."""
    if stop_requested.is_set():
        raise KeyboardInterrupt


# === The run ===
class Run:
    """The folder, log and checkpoints of one run; `with run:` saves it at its end and when it is stopped.

    device and step (finished updates; online, environment steps) are there from the start, folder after
    begin().
    """

    def __init__(self, script: str, args, task_settings: TaskSettings):
        """For a script, by its file: check the settings, read the checkpoint to resume, seed the randomness.

        UserError: a setting out of bounds, no such device, or a checkpoint that these settings cannot resume.
        """
        check_bounds(args)
        self.script, self.args = Path(script).stem, args
        self.sources = sources_of(args, task_settings)
        self.checkpoint: dict = {}
        self.step = 0
        self.results: dict = {"evaluations": [], "losses": {}, "train_seconds": 0.0}
        if args.resume:
            self.read_checkpoint(user_path(args.resume))
        self.device = use_device(args.device, args.num_threads, args.matmul_precision)
        torch.manual_seed(args.seed)

    def read_checkpoint(self, path: Path) -> None:
        """Take over step and results. UserError: the run is finished, or the checkpoint is of another run."""
        self.folder = load_checkpoint(path)["folder"]
        if path.is_file() and path.name != "checkpoint.pt" and (self.folder / "checkpoint.pt").exists():
            raise UserError(f"{self.folder} has a checkpoint.pt; copy {path.name} elsewhere to resume it")
        self.lock = lock_folder(self.folder)
        self.checkpoint = load_checkpoint(path)  # once more: another process may have written it until now
        self.step, self.results = self.checkpoint["step"], self.checkpoint["results"]
        for name, given in [("script", self.script), ("env_id", self.args.env_id), ("seed", self.args.seed)]:
            if self.results[name] != given:
                raise UserError(f"{path} is of {name} {self.results[name]}, not {given}: start a new run")
        if self.results["finished"] and self.step >= self.args.total_steps:
            self.write_results()  # which a crash may have kept from being written
            raise UserError(f"{path} is finished, at step {self.step:,}; --total-steps can add more")
        if self.step > self.args.total_steps:
            raise UserError(f"{path} is at step {self.step:,}, past --total-steps {self.args.total_steps:,}")
        elsewhere = user_path(self.args.run_dir).resolve() != self.folder.resolve().parent
        if elsewhere and self.args.run_dir != self.checkpoint["args"]["run_dir"]:
            raise UserError(f"--run-dir {self.args.run_dir} is for a new run; {self.folder} stays in place")
        saved = self.checkpoint["args"] | {"resume": self.args.resume, "run_dir": self.args.run_dir}
        changed = {name: [saved[name], new] for name, new in asdict(self.args).items() if new != saved[name]}
        if changed:
            self.results.setdefault("changes", []).append({"step": self.step} | changed)
            print("resumed with", ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items()))

    def begin(self, agent: Any, dataset: Dataset | None = None, memory: Any = None) -> None:
        """Restore agent, memory and random state on resuming, open the folder, say what is trained on what.

        Without a dataset the agent learns from what it does itself, and a step is one of the environment.
        """
        self.agent, self.memory = agent, memory
        self.reference = dataset.reference_returns if dataset else reference_returns(self.args.env_id)
        about = {"format": FORMAT, "script": self.script, "env_id": self.args.env_id, "seed": self.args.seed}
        about |= self.describe_data(dataset)
        if self.checkpoint:
            same_data = about["data_checksum"] == self.results.get("data_checksum")
            same_name = vars(self.args).get("dataset") == self.checkpoint["args"].get("dataset")
            if same_name and not same_data:
                raise UserError(f"the data of {about['data']} changed since the run in {self.folder} began")
            self.restore()
        self.results = about | self.results | about
        self.open_folder()
        self.announce(dataset)
        self.history: list[Tensor] = []
        self.logged = time.time()
        self.started = time.time() - self.results["train_seconds"]
        before = max(-self.step, 0)  # steps of a pretraining
        counts = {"initial": self.step + before, "total": self.args.total_steps + before}
        # Without a terminal the bar is drawn into nothing, and record() prints it about once a minute.
        screen = sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")  # noqa: SIM115
        self.bar = tqdm(**counts, dynamic_ncols=True, file=screen, unit="step")
        self.next_line = time.time() + 60

    def describe_data(self, dataset: Dataset | None) -> dict:
        """What results.json says about the transitions: their name, checksum and mean episode."""
        if dataset is None:
            return {"data": None, "data_checksum": None, "data_mean": scored(None, None)}
        check = 0
        for column in (dataset.observations, dataset.actions, dataset.rewards, dataset.terminals):
            check = zlib.crc32(column.data, check)
        returns = dataset.episode_returns
        mean = scored(returns.mean().item() if len(returns) else None, self.reference)
        return {"data": dataset.task, "data_checksum": check, "data_mean": mean}

    def open_folder(self) -> None:
        """Make the run's folder unless there is one, and write config.json. UserError: it is not writable."""
        config = {"script": self.script, "args": asdict(self.args), "sources": self.sources}
        config |= describe_machine(self.device)
        if not self.checkpoint:
            now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # runs that start together have own folders
            name = f"{self.args.env_id.replace('/', '-')}__{self.script}__{self.args.seed}__{now}"
            self.folder = user_path(self.args.run_dir) / name
        try:
            self.folder.mkdir(parents=True, exist_ok=bool(self.checkpoint))
            self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
        except (OSError, UnicodeError) as error:
            raise cannot_write(self.folder, error) from error
        if not self.checkpoint:
            self.lock = lock_folder(self.folder)
        write_atomically(self.folder / "config.json", json.dumps(config, indent=2).encode())

    def announce(self, dataset: Dataset | None) -> None:
        """Say what is trained on what, with which settings, and where each of them came from."""
        args, sources = self.args, self.sources
        if dataset:
            counts = f"{len(dataset.rewards):,} transitions, {len(dataset.episode_returns):,} episodes"
            print(f"{self.script} on {dataset.task}: {counts}, mean {show(self.results['data_mean'])}")
        else:
            print(f"{self.script} in {args.env_id}: learns from its own transitions")
        for source in sorted(set(sources.values()), key=lambda of: (of == "default", of != "given")):
            values = [f"{name} {getattr(args, name)}" for name in sources if sources[name] == source]
            print(f"  {source}: {', '.join(values)}")
        where = f"{self.device}, {matmul_library()}" if self.device.type == "cpu" else self.device
        print(f"  {where}, seed {args.seed}, step {self.step:,} of {args.total_steps:,}, {self.folder}")
        if self.reference is None:
            print(f"  no reference returns are known for {args.env_id}: raw returns only")

    # --- Between steps ---
    def unfinished(self) -> bool:
        """Whether a step or an evaluation is left. KeyboardInterrupt: a signal asked for the end."""
        raise_if_interrupted()
        return self.step < self.args.total_steps or self.evaluation_due()

    def reached(self, every: int) -> bool:
        """Whether this step is a multiple of `every`, or the last one."""
        return self.step % every == 0 or self.step == self.args.total_steps

    def record(self, losses: dict[str, Tensor]) -> None:
        """Count one step and keep its losses, on the device; there are none in a step without an update."""
        if losses:
            self.names = list(losses)
            self.history.append(torch.stack(list(losses.values())))
        self.step += 1
        self.bar.update()
        if not sys.stderr.isatty() and time.time() > self.next_line:
            print(f"  {self.bar}")
            self.next_line = time.time() + 60

    def log(self) -> None:
        """The mean losses since the last call, to TensorBoard. UserError: a loss is not finite."""
        self.check_finite()
        if self.history:
            means = torch.stack(self.history).mean(0).tolist()
            self.results["losses"] = dict(zip(self.names, means, strict=True))
            self.add_to_curves("losses", self.results["losses"])
            speed = len(self.history) / (time.time() - self.logged)
            self.add_to_curves("charts", {"steps_per_second": speed})
        self.history, self.logged = [], time.time()

    def check_finite(self) -> None:
        """UserError: a loss since the last log is infinite or NaN, or a weight is, or is too large to act."""
        found = ""
        if self.history:
            losses = torch.stack(self.history)  # (steps, losses)
            if not losses.isfinite().all():
                row, column = (~losses.isfinite()).nonzero()[0].tolist()
                step = self.step - len(losses) + 1 + row
                found = f"{self.names[column]} is {losses[row, column].item()} at step {step:,}"
        largest = torch.stack([weight.abs().max() for weight in self.agent.parameters()]).max().item()
        if not found and not largest < 1e6:  # NaN is not; a network of larger weights overflows when it acts
            found = f"a weight is {largest:.3g} after step {self.step:,}"
        if found:
            saved = (self.folder / "checkpoint.pt").exists()
            advice = f"; the checkpoint in {self.folder} is from before" if saved else ""
            raise UserError(f"{found}; try a lower learning rate{advice}")

    def add_to_curves(self, group: str, values: dict) -> None:
        """Write the values that are floats to TensorBoard."""
        try:
            for name, value in values.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{group}/{name}", value, self.step)
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def evaluation_due(self) -> bool:
        """Whether this step ends with an evaluation not made yet; starts its clock. UserError: bad losses."""
        done = self.results["evaluations"][-1]["step"] if self.results["evaluations"] else 0
        if self.args.eval_episodes == 0 or self.step <= done or not self.reached(self.args.eval_every):
            return False
        self.check_finite()
        self.evaluation_began = time.time()
        return True

    def add_evaluation(self, evaluation: dict) -> None:
        """Log an evaluation of some returns and lengths, with its normalized score, and print its line."""
        returns = np.array(evaluation["returns"])
        evaluation["return_mean"], evaluation["return_std"] = returns.mean().item(), returns.std().item()
        evaluation["length_mean"] = np.mean(evaluation["lengths"]).item()
        evaluation["normalized_score"] = scored(evaluation["return_mean"], self.reference)["score"]
        evaluation["seconds"] = time.time() - self.evaluation_began
        self.results["evaluations"].append({"step": self.step, **evaluation})
        self.add_to_curves("eval", evaluation)
        final, best, last_ten = map(show, summarize(self.results["evaluations"], self.reference).values())
        spread = f"return {evaluation['return_mean']:.5g} +- {evaluation['return_std']:.4g}"
        self.bar.set_postfix_str(final)
        self.bar.write(f"step {self.step:,}: {spread}, {final} (best {best}, last ten {last_ten})")
        self.logged += evaluation["seconds"]  # so that they do not count in steps_per_second

    # --- Saving and restoring ---
    def save(self, finished: bool = False) -> None:
        """Write checkpoint.pt, which is the truth, and results.json, which is what people read of it."""
        self.log()
        self.results |= {"step": self.step, "total_steps": self.args.total_steps, "finished": finished}
        self.results |= {"train_seconds": time.time() - self.started}
        self.results |= summarize(self.results["evaluations"], self.reference)
        args = asdict(self.args)
        args |= {name: value.item() for name, value in args.items() if isinstance(value, np.generic)}
        state = {
            "format": FORMAT,
            "args": args,  # in types of Python: load_checkpoint() refuses those of NumPy
            "step": self.step,
            "results": self.results,
            "agent": self.agent.state_dict(),
            "memory": self.memory.save(self.folder) if self.memory else None,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.agent.optimizers.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.folder / "checkpoint.pt", buffer.getvalue())
        self.write_results()

    def write_results(self) -> None:
        write_atomically(self.folder / "results.json", json.dumps(self.results, indent=2).encode())

    def restore(self) -> None:
        """Put agent, memory and random state back to where the checkpoint was written. UserError: no fit."""
        saved = self.checkpoint
        try:
            self.agent.load_state_dict(saved["agent"])
            check_tensors("agent", self.agent.state_dict())
            for name, optimizer in self.agent.optimizers.items():
                own = optimizer.state_dict()["param_groups"]  # of this device and these arguments
                optimizer.load_state_dict(saved["optimizers"][name] | {"param_groups": own})
                weights = [weight for group in optimizer.param_groups for weight in group["params"]]
                was_used = optimizer.state or f"{name}_grad_norm" in self.results["losses"]
                for weight in weights if was_used else []:
                    shapes = {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}  # of Adam
                    check_tensors(f"{name} optimizer", optimizer.state[weight], shapes)
            if self.step >= self.args.total_steps:  # no step is left that would set the learning rates
                self.agent.set_step(self.step - 1)
            torch.set_rng_state(saved["rng"])
            if self.device.type == "cuda" and saved["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
            if self.memory:
                counts = {name: index(number) for name, number in saved["memory"].items()}
                self.memory.load(self.folder, counts)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{self.folder}: the checkpoint is damaged or does not fit: {reason}") from error

    def __enter__(self) -> "Run":
        self.stopping = contextlib.ExitStack()
        self.stopping.enter_context(stopping_between_steps())
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        """Save at the end, and where a run is left between two steps; close everything, print a summary."""
        self.bar.close()
        try:
            if kind in (None, KeyboardInterrupt, BrokenPipeError, EnvironmentFailure):
                self.save(finished=kind is None)
        finally:
            with contextlib.suppress(OSError):  # of a full disk, which save() or add_to_curves() reported
                self.writer.close()
            self.lock.release()
            self.stopping.close()
        if kind in (None, KeyboardInterrupt):
            summary = summarize(self.results["evaluations"], self.reference).items()
            scores = ", ".join(f"{name.replace('_', ' ')} {show(result)}" for name, result in summary)
            how = "finished" if kind is None else "stopped"
            minutes = f"{self.results['train_seconds'] / 60:.1f} min"
            print(f"{how} at step {self.step:,} after {minutes}: {scores or 'not evaluated'}")
            print(f"  in {self.folder}" + ("" if kind is None else f"; go on with --resume {self.folder}"))
        elif stop_requested.is_set() and kind.__name__ == "InductorError":  # the signal ended g++, too
            print(f"stopped in step {self.step + 1:,}, while compiling: no new checkpoint in {self.folder}")
            raise KeyboardInterrupt from None


def check_tensors(owner: str, tensors: dict, shapes: dict | None = None) -> None:
    """ValueError unless all are finite and, if shapes are given, have these; other errors: no tensors."""
    if shapes not in (None, {name: tensor.shape for name, tensor in tensors.items()}):
        raise ValueError(f"{owner}: other sizes, or not all there")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{owner}: not finite")


def describe_machine(device: torch.device) -> dict[str, str]:
    """Device, git commit and versions, for config.json."""
    try:
        here = Path(__file__).parent
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
        commit = git.stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    machine = {"device": str(device), "matmul_library": matmul_library(), "git_commit": commit}
    machine["python"] = platform.python_version()
    return machine | {name: metadata.version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}
