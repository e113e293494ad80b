"""What the tools share: scripts by name, recorded runs, intervals, what they write. It loads no PyTorch.

Each tool imports this module before common/: it makes that, and the scripts, importable from any folder.
"""

import difflib
import importlib
import io
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.cli import FORMAT, UserError  # noqa: E402
from common.scores import normalized_score  # noqa: E402

# Where and how a run is made, not what it learns: runs that differ in these alone are the same run.
WHERE_AND_HOW = {"run_dir", "resume", "device", "num_threads", "compile", "cuda_graph"}
WHERE_AND_HOW |= {"log_every", "save_every"}
# Okabe and Ito's colours, which the colour-blind can tell apart: in every figure the same for a script.
COLORS = {"dac": "#0072B2", "diffusion_ql": "#D55E00", "dtql": "#009E73", "edp_crr": "#E69F00"}
COLORS |= {"edp_iql": "#56B4E9", "edp_td3": "#CC79A7", "qvpo_online": "#000000"}


# === Scripts ===
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


def load_script(name: str) -> ModuleType:
    """The module of the script with that name. UserError: there is none."""
    name = name.removesuffix(".py")
    check_name("script", name, sorted(p.stem for p in ROOT.glob("*.py") if "\ndef train(" in p.read_text()))
    return importlib.import_module(name)


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


def read_run(folder: Path) -> RecordedRun:
    """UserError: a file there is damaged, or of another version of the scripts."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        run = RecordedRun(folder, config, config["script"], dict(config["args"]), dict(config["sources"]))
        path = folder / "results.json"
        if not path.exists():
            return run
        results = json.loads(path.read_text())
        if results["format"] != FORMAT:
            raise ValueError(f"format {results['format']}, not {FORMAT}")
        run.step, run.total_steps = results["step"], results["total_steps"]
        run.finished, run.hours = results["finished"], results["train_seconds"] / 3600
        returns = {each["step"]: float(each["return_mean"]) for each in results["evaluations"]}
        scores = {each["step"]: each["normalized_score"] for each in results["evaluations"]}
        run.unit = "score" if scores and None not in scores.values() else "return"
        run.evaluations = returns if run.unit == "return" else scores
        run.data, run.data_score = results["data"], results["data_mean"]
        if run.unit == "score" and run.data_score is not None:
            run.data_score = normalized_score(run.data_score, results["reference_returns"])
        return run
    except (OSError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged, or of another version of the scripts ({reason})") from error


# === Statistics and files ===
def interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Ends of the 95 % bootstrap interval of the mean over the last axis; None: there is one sample only."""
    if samples.shape[-1] < 2:
        return None
    from scipy.stats import bootstrap  # here, because that takes a second

    options = {"axis": -1, "batch": 500, "method": "percentile", "rng": np.random.default_rng(0)}
    found = bootstrap([samples], np.mean, **options).confidence_interval
    return found.low, found.high


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]


def pyplot() -> ModuleType:
    """matplotlib.pyplot, drawing without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def png(figure, dpi: int = 120, num_colors: int = 96) -> bytes:
    """The figure as a PNG, the same bytes each time; few colours suffice for lines, and take less space."""
    from PIL import Image  # brought by matplotlib

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    pyplot().close(figure)
    Image.open(drawn).convert("RGB").quantize(num_colors).save(small, format="png", optimize=True)
    return small.getvalue()


def write_output(path: Path, content: bytes) -> None:
    """A file, whole or not at all, and its folder; without content only a trial. UserError: it cannot be."""
    part = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path) if content else part.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}; make room or choose another folder") from error
