"""What the tools share: names, recorded runs, intervals, what they write. It loads no PyTorch.

Each tool imports this module first: then it finds the scripts and common/, wherever it is started.
"""

import contextlib
import difflib
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.tasks import UserError  # noqa: E402

FORMAT = 2  # of results.json, as in common/checkpoints.py
# Where and how a run is made, not what it learns: runs that differ in these alone are the same run.
WHERE_AND_HOW = {"run_dir", "resume", "device", "num_threads", "compile", "cuda_graph"}
WHERE_AND_HOW |= {"log_every", "save_every"}


# === What the user gives ===
def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """UserError, with the nearest of the known names, for another one."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, cutoff=0.3) or known
        raise UserError(f"there is no {kind} {name!r}; nearest names: {', '.join(near)}")


def take_words_for_scripts() -> list[str]:
    """What stands after -- on the command line, which is cut there."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words, sys.argv = sys.argv[end + 1 :], sys.argv[:end]
    return words


# === Scripts ===
def load_script(name: str) -> ModuleType:
    """The module of the script with that name. UserError: there is none, or it cannot be imported."""
    known = sorted(path.stem for path in ROOT.glob("*.py") if "\ndef train(" in path.read_text())
    name = name.removesuffix(".py")
    check_name("script", name, known)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UserError(f"{name}.py cannot be imported: {type(error).__name__}: {error}") from error


def agent_class(script: ModuleType) -> type:
    """The class in a script that updates and acts."""
    classes = [value for value in vars(script).values() if isinstance(value, type)]
    [agent] = [each for each in classes if hasattr(each, "update") and hasattr(each, "act")]
    return agent


# === Recorded runs ===
@dataclass
class RecordedRun:
    """What a run folder has in config.json and, from the first checkpoint on, in results.json."""

    folder: Path
    config: dict
    script: str
    args: dict  # every argument, env_id and seed among them
    sources: dict  # where the value of each came from: given, default, or a row of settings
    step: int = 0
    total_steps: int = 0
    finished: bool = False
    data: str | None = None  # what it was trained on; None: on what it did itself
    data_score: float | None = None  # the mean episode of the data, in the run's unit; None: unknown
    unit: str = "return"  # or score, where all evaluations have one
    evaluations: dict[int, float] | None = None  # step -> score or return
    hours: float = 0.0
    changes: list[tuple[int, dict]] = field(default_factory=list)  # step of a resume, setting -> its values


def read_run(folder: Path) -> RecordedRun:
    """UserError: a file there is damaged, or of another version of the scripts."""
    path = folder / "config.json"
    try:
        config = read_json(path)
        script, args, sources = text(config["script"]), dict(config["args"]), dict(config["sources"])
        run = RecordedRun(folder, config, script, args, sources)
        run.args |= {"env_id": text(run.args["env_id"]), "seed": whole(run.args["seed"])}
        path = folder / "results.json"
        if not path.exists():
            return run
        results = read_json(path)
        if results["format"] != FORMAT:
            raise ValueError(f"format {results['format']}, not {FORMAT}")
        scored = all(each["normalized_score"] is not None for each in results["evaluations"])
        run.unit, column = ("score", "normalized_score") if scored else ("return", "return_mean")
        run.evaluations = {whole(each["step"]): float(each[column]) for each in results["evaluations"]}
        run.step, run.total_steps = whole(results["step"]), whole(results["total_steps"])
        run.finished, run.hours = results["finished"] is True, float(results["train_seconds"]) / 3600
        for change in map(dict, results.get("changes", [])):
            step = whole(change.pop("step"))
            run.changes.append((step, {name: (old, new) for name, (old, new) in change.items()}))
        run.data = None if results["data"] is None else text(results["data"])
        mean = results["data_mean"][run.unit]
        run.data_score = None if mean is None else float(mean)
        return run
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged, or of another version of the scripts ({reason})") from error


def read_json(path: Path) -> object:
    if not path.is_file():  # to open a pipe would take forever
        raise OSError("it is no file")
    return json.loads(path.read_text())


def text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value} is no text")
    return value


def whole(value: object) -> int:
    """A number of 64 bits; ArithmeticError, TypeError or ValueError for anything else."""
    return int(np.int64(value))


# === Statistics ===
def interval(*samples: np.ndarray, statistic: Callable = np.mean) -> tuple[np.ndarray, np.ndarray] | None:
    """Ends of the 95 % bootstrap interval (percentiles) of a statistic of all samples together.

    The last axis, of seeds or episodes, is drawn anew within each sample; None where one has length 1.
    """
    if min(sample.shape[-1] for sample in samples) < 2:
        return None
    import scipy.stats  # here, because that takes a second

    found = scipy.stats.bootstrap(
        samples,
        lambda *drawn, axis: statistic(np.concatenate(drawn, axis=axis), axis=axis),
        vectorized=True,
        axis=-1,
        batch=500,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return found.confidence_interval.low, found.confidence_interval.high


# === Pictures and files ===
def pyplot() -> ModuleType:
    """matplotlib.pyplot, drawing without a screen. UserError: it cannot."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except (ImportError, ValueError) as error:
        raise UserError(f"the figures need matplotlib and its backend Agg: {error}") from error
    return plt


def png(figure, dpi: int = 90, num_colors: int | None = None) -> bytes:
    """The figure as a PNG, the same bytes each time; few colours suffice for lines, and take less space."""
    from PIL import Image  # brought by matplotlib

    picture, small = io.BytesIO(), io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi, metadata={"Software": None})
    pyplot().close(figure)
    if num_colors is None:
        return picture.getvalue()
    Image.open(picture).convert("RGB").quantize(num_colors).save(small, format="png", optimize=True)
    return small.getvalue()


def write_output(path: Path, content: bytes) -> None:
    """A file, whole or not at all, and its folder; without content only a trial. UserError: it cannot be."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        if content:
            part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --output") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
