"""What a run does besides its algorithm: settings, device, Ctrl-C, logging, results and checkpoints.

Nothing here knows an algorithm: an agent is a module with .device, .optimizers (a dict) and .set_step(step).
What an online run keeps beside it is a memory, with .save(folder) -> state and .load(folder, state).
"""

import contextlib
import ctypes
import io
import json
import platform
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.datasets import Dataset, UserError, names_in_tables
from common.scores import normalized_score, reference_returns

# Smallest and largest values that make sense; every num_* is at least 1, too.
AT_LEAST_0 = """seed eval_episodes gamma tau actor_lr critic_lr weight_decay max_grad_norm pretrain_steps
    eta alpha q_weight guidance_weight bc_weight nll_weight max_weight expectile inverse_temperature
    noise_scale ema_decay learning_starts entropy_weight entropy_weight_min num_entropy_samples"""
AT_LEAST_1 = """total_steps batch_size eval_every log_every save_every lr_decay_steps diffusion_steps
    actor_target_every top_k replay_size"""
ABOVE_0 = "temperature policy_scale sigma_min sigma_max sigma_data"
LEAST = dict.fromkeys(AT_LEAST_0.split(), 0) | dict.fromkeys(AT_LEAST_1.split(), 1)
LEAST |= dict.fromkeys(ABOVE_0.split(), 1e-9) | {"time_dim": 4}
MOST = {"seed": 2**63 - 1, "gamma": 1, "tau": 1, "expectile": 1, "ema_decay": 1}
SUMMARY = ("final", "best", "last_ten")


def run_command(train: Callable, args: object) -> None:
    """Run train(args) as a command: exit code 2 with one message for a user's mistake, 130 after Ctrl-C.

    SIGTERM, which a cluster sends before it takes a machine away, counts as Ctrl-C.
    """
    threading.excepthook = report_thread
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        train(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def report_thread(failure: threading.ExceptHookArgs) -> None:
    """Keep quiet on a full disk in TensorBoard's thread: the main thread will meet it too, and reports it."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def given_arguments(args, command_line: list[str] | None = None) -> dict[str, object]:
    """The arguments that somebody gave: they differ from the default or stand on the command line."""
    command_line = sys.argv[1:] if command_line is None else command_line
    words = {word.split("=")[0].replace("_", "-").replace("--no-", "--") for word in command_line}
    defaults = vars(type(args)())
    return {
        name: value
        for name, value in vars(args).items()
        if value != defaults[name] or f"--{name.replace('_', '-')}" in words
    }


def resolve_settings(args, defaults: dict, task_settings: dict[str, dict]) -> tuple[object, dict[str, str]]:
    """Arguments left at None filled in for the task, and where the value of each of them came from.

    A task without a row of its own gets that of the papers' version of it, or that of its domain.
    """
    row = next((name for name in names_in_tables(args.env_id) if name in task_settings), None)
    of_task, source = task_settings.get(row, {}), "task" if row == args.env_id else f"domain ({row})"
    values, sources = {}, {}
    for name, default in defaults.items():
        values[name] = getattr(args, name)
        sources[name] = "given"
        if values[name] is None:
            values[name] = of_task.get(name, default)
            sources[name] = source if name in of_task else "default"
    args = replace(args, **values)
    for name, value in vars(args).items():
        least, most = LEAST.get(name, 1 if name.startswith("num_") else None), MOST.get(name, value)
        if None not in (least, value) and not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {bound}")
    return args, sources


def select_device(name: str) -> torch.device:
    """The device called auto, cpu, cuda or cuda:<i>, after a first use that shows that it works."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not available: {reason}; try --device cpu") from error


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors; page faults take a fifth of a step on a CPU otherwise."""
    if platform.libc_ver()[0] == "glibc":
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**30)


def accelerated(
    update: Callable[[], dict[str, Tensor]], agent: nn.Module, args
) -> Callable[[], dict[str, Tensor]]:
    """The same update, its networks compiled with --compile, captured whole in a CUDA graph on a GPU."""
    if args.compile:
        for network in agent.children():
            network.compile()
    return cuda_graphed(update) if args.cuda_graph and agent.device.type == "cuda" else update


def cuda_graphed(update: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """Run update eagerly three times, on a side stream; then capture it as a CUDA graph and replay that."""
    graph, stream, calls, outputs = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, {}

    def step() -> dict[str, Tensor]:
        nonlocal calls, outputs
        calls += 1
        if calls <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = update()
            torch.cuda.current_stream().wait_stream(stream)
            return outputs
        if calls == 4:
            with torch.cuda.graph(graph):
                outputs = update()
        graph.replay()
        return outputs

    return step


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block is done, so that no update is left half applied."""
    pending = []
    numbers = signal.SIGINT, signal.SIGTERM
    previous = [signal.signal(number, lambda *received: pending.append(received)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
    for number, _ in pending[:1]:
        signal.raise_signal(number)  # now it takes the effect that it has outside the block


def scored(episode_return: float, reference: tuple[float, float] | None) -> dict[str, float | None]:
    """A return beside its normalized score, which is None where the task has no reference returns."""
    return {
        "return": episode_return,
        "score": normalized_score(episode_return, reference) if reference else None,
    }


def show(result: dict[str, float | None]) -> str:
    """The score where there is one, else the return."""
    return f"return {result['return']:.5g}" if result["score"] is None else f"score {result['score']:.1f}"


def summarize(evaluations: list[dict], reference: tuple[float, float] | None) -> dict[str, dict]:
    """The final evaluation, the best one (OMS) and the mean of the last ten (RAT)."""
    means = [evaluation["return_mean"] for evaluation in evaluations]
    values = (means[-1], max(means), float(np.mean(means[-10:]))) if means else ()
    return {name: scored(value, reference) for name, value in zip(SUMMARY, values, strict=False)}


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: nothing half-written ever bears the final name."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; make room or choose another --run-dir")


def load_checkpoint(path: Path, script: str | None = None) -> dict:
    """What Run.save wrote, from the file or its run folder; only tensors and plain values are unpickled.

    With a script, its checkpoint is wanted to resume that script; without, any will do.
    """
    path = path / "checkpoint.pt" if path.is_dir() else path
    asked = "--resume: " if script else ""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        written_by = checkpoint["script"]
    except FileNotFoundError:
        raise UserError(f"{asked}there is no checkpoint at {path}") from None
    except Exception as error:  # whatever a damaged file provokes
        raise UserError(
            f"{asked}{path} is no checkpoint, or a damaged one ({type(error).__name__})"
        ) from error
    if script not in (None, written_by):
        raise UserError(f"{asked}{path} was written by {written_by}.py; resume it with that script")
    return checkpoint | {"folder": path.parent}


def describe_machine(device: torch.device) -> dict[str, str]:
    """Versions and git commit, for config.json."""
    here = Path(__file__).parent
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=here, capture_output=True, text=True)
    machine = {"device": str(device), "git_commit": git.stdout.strip(), "python": platform.python_version()}
    return machine | {name: metadata.version(name) for name in ("torch", "numpy", "gymnasium", "mujoco")}


class Run:
    """Settings, folder, logs and checkpoint of one run; `with run:` sees to its end, whatever that is.

    args, device and step (finished updates; online, environment steps) are there from the start, the folder
    after begin().
    """

    def __init__(self, script: str, args, defaults: dict, task_settings: dict[str, dict]):
        """Resolve the settings; on resuming, those of the checkpoint, except where others are given now."""
        self.script = script
        self.checkpoint = load_checkpoint(Path(args.resume), script) if args.resume else {}
        given = given_arguments(args)
        if unknown := self.checkpoint.get("args", {}).keys() - vars(args):
            raise UserError(f"--resume: the checkpoint is of another version, with {', '.join(unknown)}")
        # None for what is in the tables, so that they may set a field that has a default of its own
        args = type(args)(**dict.fromkeys(defaults) | self.checkpoint.get("args", {}) | given)
        self.args, self.sources = resolve_settings(args, defaults, task_settings)
        self.sources |= self.checkpoint.get("sources", {}) | dict.fromkeys(given, "given")
        self.results = self.checkpoint.get("results", {"evaluations": [], "losses": {}, "train_seconds": 0.0})
        self.step = self.checkpoint.get("step", 0)
        if self.results.get("finished") and self.step >= self.args.total_steps:
            raise UserError(
                f"--resume: this run is finished, at step {self.step:,}; --total-steps can add more"
            )
        self.device = select_device(self.args.device)
        keep_freed_memory()
        torch.manual_seed(self.args.seed)

    def begin(self, agent: nn.Module, dataset: Dataset | None = None, memory: object = None) -> None:
        """Restore agent, memory and random state on resuming, open the folder, say what is trained on what.

        Without a dataset the agent learns from what it does itself, and a step is one of the environment.
        """
        args = self.args
        self.agent, self.memory = agent, memory
        self.reference = dataset.reference_returns if dataset else reference_returns(args.env_id)
        if self.checkpoint:
            self.restore()
        now = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # runs that start together have their own folders
        name = f"{args.env_id.replace('/', '-')}__{self.script}__{args.seed}__{now}"
        self.folder = self.checkpoint.get("folder", Path(args.run_dir) / name)
        try:
            self.folder.mkdir(parents=True, exist_ok=bool(self.checkpoint))
            self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        config = {"script": self.script, "args": asdict(args), "sources": self.sources}
        config |= describe_machine(self.device)
        write_atomically(self.folder / "config.json", json.dumps(config, indent=2).encode())

        returns = dataset.episode_returns if dataset else ()
        unknown = {"return": None, "score": None}  # no complete episode
        data = scored(returns.mean().item(), self.reference) if len(returns) else unknown
        about = {"format": 1, "script": self.script, "env_id": args.env_id, "seed": args.seed}
        about |= {"data": dataset and dataset.task, "data_mean": data}
        self.results = about | self.results | about  # resumed, it may be of another task or seed than before
        if dataset:
            counts = f"{len(dataset.rewards):,} transitions, {len(returns):,} episodes"
            mean = show(data) if len(returns) else "unknown"
            print(f"{self.script} on {dataset.task}: {counts}, mean {mean}")
        else:
            print(f"{self.script} in {args.env_id}: learns from its own transitions")
        domains = sorted({source for source in self.sources.values() if source.startswith("domain")})
        for source in ("given", "task", *domains, "default"):
            names = [name for name in self.sources if self.sources[name] == source]
            if names:
                print(f"  {source}: {', '.join(f'{name} {getattr(args, name)}' for name in names)}")
        print(f"  {self.device}, seed {args.seed}, step {self.step:,} of {args.total_steps:,}, {self.folder}")
        if self.reference is None:
            print(f"  no reference returns are known for {args.env_id}: raw returns only")
        self.history, self.logged = [], time.time()
        self.started = time.time() - self.results["train_seconds"]
        before = max(-self.step, 0)  # steps of a pretraining
        counts = {"initial": self.step + before, "total": args.total_steps + before}
        self.bar = tqdm(**counts, dynamic_ncols=True, disable=None)

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

    def log(self) -> None:
        """The mean losses since the last call, to TensorBoard. UserError: a loss is not finite."""
        if not self.history:
            self.logged = time.time()
            return
        values = torch.stack(self.history).cpu()  # (steps, losses)
        self.history.clear()
        if not values.isfinite().all():
            row, column = (~values.isfinite()).nonzero()[0].tolist()
            found, at = values[row, column].item(), self.step - len(values) + 1 + row
            advice = "try a lower learning rate"
            if (self.folder / "checkpoint.pt").exists():
                advice += f"; the checkpoint in {self.folder} is from before"
            raise UserError(f"{self.names[column]} is {found} at step {at:,}; {advice}")
        self.results["losses"] = dict(zip(self.names, values.mean(0).tolist(), strict=True))
        self.add_to_curves("losses", self.results["losses"])
        self.add_to_curves("charts", {"steps_per_second": len(values) / (time.time() - self.logged)})
        self.logged = time.time()

    def add_to_curves(self, group: str, values: dict) -> None:
        """Write the values that are floats to TensorBoard."""
        try:
            for name, value in values.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{group}/{name}", value, self.step)
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def evaluation_due(self) -> bool:
        """Whether this step ends with an evaluation that has not been made yet."""
        done = max((evaluation["step"] for evaluation in self.results["evaluations"][-1:]), default=0)
        return self.args.eval_episodes > 0 and self.step > done and self.reached(self.args.eval_every)

    def add_evaluation(self, evaluation: dict) -> None:
        """Log one evaluation, with its normalized score where there is one, and print its line."""
        score = scored(evaluation["return_mean"], self.reference)["score"]
        self.results["evaluations"].append({"step": self.step, "normalized_score": score, **evaluation})
        self.add_to_curves("eval", {"normalized_score": score, **evaluation})
        final, best, last_ten = map(show, summarize(self.results["evaluations"], self.reference).values())
        spread = f"return {evaluation['return_mean']:.5g} +- {evaluation['return_std']:.4g}"
        self.bar.set_postfix_str(final)
        self.bar.write(f"step {self.step:,}: {spread}, {final} (best {best}, last ten {last_ten})")
        self.logged = time.time()

    def save(self, finished: bool = False) -> None:
        """Write checkpoint.pt and results.json, once all losses so far are known to be finite."""
        self.log()
        self.results |= {"step": self.step, "total_steps": self.args.total_steps, "finished": finished}
        self.results |= {"train_seconds": time.time() - self.started}
        self.results |= summarize(self.results["evaluations"], self.reference)
        state = {
            "script": self.script,
            "args": asdict(self.args),
            "sources": self.sources,
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
        write_atomically(self.folder / "results.json", json.dumps(self.results, indent=2).encode())

    def restore(self) -> None:
        """Put agent, memory and random state back to where the checkpoint was written."""
        try:
            self.agent.load_state_dict(self.checkpoint["agent"])
        except RuntimeError as error:
            difference = str(error).splitlines()[1].strip()
            raise UserError(f"--resume: the checkpoint does not fit: {difference}") from error
        for name, optimizer in self.agent.optimizers.items():
            own = optimizer.state_dict()["param_groups"]  # of this device and these arguments
            optimizer.load_state_dict(self.checkpoint["optimizers"][name] | {"param_groups": own})
        if self.memory:
            self.memory.load(self.checkpoint["folder"], self.checkpoint["memory"])
        torch.set_rng_state(self.checkpoint["rng"])
        if self.device.type == "cuda" and self.checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(self.checkpoint["cuda_rng"], self.device)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        """Save at the end and on Ctrl-C, close bar and log, print a summary."""
        self.bar.close()
        try:
            if kind not in (None, KeyboardInterrupt):
                return
            with uninterrupted():
                self.save(finished=kind is None)
        finally:
            with contextlib.suppress(OSError):  # of a full disk, which save() or add_to_curves() reported
                self.writer.close()
        how = "finished" if kind is None else "stopped"
        scores = [
            f"{name.replace('_', ' ')} {show(self.results[name])}" for name in SUMMARY if name in self.results
        ]
        minutes = f"{self.results['train_seconds'] / 60:.1f} min"
        print(f"{how} at step {self.step:,} after {minutes}: {', '.join(scores) or 'not evaluated'}")
        print(f"  in {self.folder}" + ("" if kind is None else f"; go on with --resume {self.folder}"))
