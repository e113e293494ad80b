"""The scripts are siblings: what has one name is one code in one place, so that diff shows the algorithm.

The checks take paths and return messages; the last tests show on changed copies what they find.
"""

import ast
import difflib
import importlib
import re
from itertools import combinations
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
COMMON = sorted((ROOT / "common").glob("*.py"))
SECTIONS = ["Args", "Diffusion", "Critic", "Agent", "Evaluation", "Training"]

# What may differ under one name, since it is about the algorithm. Everything else may not.
MAY_DIFFER = {
    "Args",  # but see SHARED_FIELDS
    "DEFAULT_SETTINGS",  # the paper's hyperparameters ...
    "TASK_SETTINGS",  # ... and those per task
    "MINI", "BANDIT", "ANTMAZE", "ADROIT", "KITCHEN",  # ... and what several tasks share
    "Draws",  # the random numbers of one update
    "train",  # names the agent; online it also collects the transitions
}  # fmt: skip
# The first fields of Args, the same in every script: name, type, default and comment.
SHARED_FIELDS = [
    "env_id", "dataset", "seed", "device", "compile", "cuda_graph", "total_steps", "batch_size", "gamma",
    "tau", "eval_every", "eval_episodes", "log_every", "save_every", "run_dir", "resume",
]  # fmt: skip
ONLINE_DIFFERS = {"env_id", "total_steps"}  # *_online.py: a Gymnasium id, environment steps


# --- Checks ---
def named_statements(path, body=None):
    """Name -> source lines of each function, class, assignment and `if` of a script or a class body."""
    lines, found = path.read_text().splitlines(), {}
    for node in ast.parse(path.read_text()).body if body is None else body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [ast.unparse(target) for target in targets]
        elif isinstance(node, ast.If):
            names = [f"if {ast.unparse(node.test)}"]
        else:
            continue
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        found |= dict.fromkeys(names, lines[first - 1 : node.end_lineno])
    return found


def outline(path):
    """The names of a script and its section banners, in their order."""
    text = path.read_text()
    items = [(i, line) for i, line in enumerate(text.splitlines(), start=1) if line.startswith("# ===")]
    for node in ast.parse(text).body:
        items += [(node.lineno, name) for name in named_statements(path, [node])]
    return [item for _, item in sorted(items)]


def fields_of_args(path):
    tree = ast.parse(path.read_text())
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return named_statements(path, args.body)


def show_diff(what, first, second, first_lines, second_lines):
    diff = difflib.unified_diff(first_lines, second_lines, first.name, second.name, lineterm="", n=1)
    return "\n".join([f"{what} differs between {first.name} and {second.name}:", *diff])


def check_same_source(first, second):
    """Messages on the names of both scripts whose sources differ."""
    ours, theirs = named_statements(first), named_statements(second)
    shared = [name for name in ours if name in theirs and name not in MAY_DIFFER]
    return [
        show_diff(name, first, second, ours[name], theirs[name])
        for name in shared
        if ours[name] != theirs[name]
    ]


def check_same_order(first, second):
    """A message if what both scripts have comes in another order, or in another section."""
    ours, theirs = outline(first), outline(second)
    ours, theirs = [item for item in ours if item in theirs], [item for item in theirs if item in ours]
    return [show_diff("order", first, second, ours, theirs)] if ours != theirs else []


def check_same_arguments(first, second):
    """Messages on shared fields of Args whose type, default or comment differs."""
    ours, theirs = fields_of_args(first), fields_of_args(second)
    one_is_online = any(path.stem.endswith("_online") for path in (first, second))
    return [
        show_diff(f"Args.{name}", first, second, ours[name], theirs[name])
        for name in SHARED_FIELDS
        if name in ours
        and name in theirs
        and ours[name] != theirs[name]
        and not (one_is_online and name in ONLINE_DIFFERS)
    ]


def check_anatomy(path):
    """Messages on a script that lacks sections or shared arguments, or has them in another order."""
    messages = []
    banners = re.findall(r"^# ===.*", path.read_text(), re.MULTILINE)
    expected = [f"# === {section} ===" for section in SECTIONS]
    if banners != expected:
        messages.append("\n".join([f"sections of {path.name}:", *difflib.ndiff(expected, banners)]))
    fields = list(fields_of_args(path))[: len(SHARED_FIELDS)]
    if fields != SHARED_FIELDS:
        messages.append(
            "\n".join([f"first fields of Args in {path.name}:", *difflib.ndiff(SHARED_FIELDS, fields)])
        )
    return messages


def check_imports(path, scripts):
    """Messages on the imports of any of the scripts."""
    imported = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported += [node.module or "", *(alias.name for alias in node.names if node.level)]
    stems = {script.stem for script in scripts}
    return [f"{path.name} imports the script {name}" for name in imported if name.split(".")[0] in stems]


def check_no_networks(module):
    """Messages on classes of networks and on networks among the names of a module."""
    return [
        f"{module.__name__}.{name} is a network"
        for name, value in vars(module).items()
        if isinstance(value, nn.Module) or (isinstance(value, type) and issubclass(value, nn.Module))
    ]


# --- The scripts ---
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_sections_and_shared_arguments_are_there(path):
    messages = check_anatomy(path)
    assert not messages, "\n\n".join(messages)


def test_same_name_same_code_same_place():
    messages = []
    for first, second in combinations(SCRIPTS, 2):
        messages += check_same_source(first, second) + check_same_order(first, second)
        messages += check_same_arguments(first, second)
    assert not messages, "\n\n".join(messages)


@pytest.mark.parametrize("path", [*SCRIPTS, *COMMON], ids=lambda path: path.stem)
def test_nobody_imports_a_script(path):
    assert check_imports(path, SCRIPTS) == []


@pytest.mark.parametrize("path", COMMON, ids=lambda path: path.stem)
def test_common_has_no_network(path):
    assert check_no_networks(importlib.import_module(f"common.{path.stem}")) == []


# --- The checks, on copies of a script ---
def copy(folder, old="", new="", name="sibling.py"):
    """A copy of dac.py under another name; `old`, which must occur once, becomes `new`."""
    text = (ROOT / "dac.py").read_text()
    assert not old or text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    path = folder / name
    path.write_text(text.replace(old, new) if old else text)
    return path


def differences(first, second):
    return (
        check_same_source(first, second)
        + check_same_order(first, second)
        + check_same_arguments(first, second)
    )


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("x_t: Tensor, t: Tensor) -> Tensor:", "x_t: Tensor, t: int) -> Tensor:", "DACNoisePredictor"),
        (
            "target_parameter.lerp_(parameter, tau)",
            "target_parameter.lerp_(parameter, 1 - tau)",
            "polyak_update",
        ),
        ("# mean of q(x_{t-1} | x_t, x_0)", "# the mean", "ddpm_sample"),
        ("EPS = 1e-6", "EPS = 1e-8", "EPS"),
        ("class Mish(", "@staticmethod\nclass Mish(", "Mish"),
        ("gamma: float = 0.99", "gamma: float = 0.9", "Args.gamma"),
        ("seed: int", "seed: float", "Args.seed"),
        ("# seed of initial weights", "# of initial weights", "Args.seed"),
    ],
)
def test_a_changed_copy_is_found(old, new, name, tmp_path):
    messages = differences(ROOT / "dac.py", copy(tmp_path, old, new))
    assert [message.splitlines()[0] for message in messages] == [
        f"{name} differs between dac.py and sibling.py:"
    ]
    old_line, new_line = (line.splitlines()[0].strip() for line in (old, new))
    assert re.search(rf"^\+.*{re.escape(new_line)}", messages[0], re.MULTILINE)
    assert re.search(rf"^[- ].*{re.escape(old_line)}", messages[0], re.MULTILINE)


def test_a_copy_and_what_may_differ_pass(tmp_path):
    assert differences(ROOT / "dac.py", copy(tmp_path)) == []
    for old, new in {
        "eta_min: float = 1e-3": "eta_min: float = 1e-4",
        "total_steps=2_000_000": "total_steps=1_000_000",
        "    next_action_noise: Tensor": "    other_noise: Tensor",
        'Run("dac", args': 'Run("sibling", args',
        "class DAC(": "class Sibling(",
    }.items():
        assert differences(ROOT / "dac.py", copy(tmp_path, old, new)) == []


def test_only_an_online_script_has_its_own_task_and_steps(tmp_path):
    for change in [
        ('env_id: str = "hopper-mini-v0"', 'env_id: str = "Hopper-v4"'),
        ("# gradient steps", "# steps"),
    ]:
        assert len(differences(ROOT / "dac.py", copy(tmp_path, *change))) == 1
        assert differences(ROOT / "dac.py", copy(tmp_path, *change, name="sibling_online.py")) == []


def move(text, pattern, anchor):
    """The text with what matches the pattern moved in front of the anchor."""
    moved = re.search(pattern, text, re.DOTALL)[0]
    return text.replace(moved, "").replace(anchor, moved + anchor)


@pytest.mark.parametrize(
    ("function", "anchor"),
    [
        ("cosine_decay", "class EnsembleLinear"),
        ("cosine_decay", "# === Critic ==="),
        ("clip_by_global_norm", "class Batch"),  # over the banner of its section, past no other name
    ],
)
def test_a_moved_function_is_found(function, anchor, tmp_path):
    sibling = copy(tmp_path)
    sibling.write_text(move(sibling.read_text(), rf"def {function}.*?\n\n\n", anchor))
    assert check_same_source(ROOT / "dac.py", sibling) == []
    [message] = check_same_order(ROOT / "dac.py", sibling)
    assert message.startswith("order differs") and function in message


def test_a_moved_section_is_found(tmp_path):
    sibling = copy(tmp_path)
    sibling.write_text(
        move(sibling.read_text(), "# === Critic ===.*?(?=# === Agent ===)", "# === Diffusion ===")
    )
    assert check_same_source(ROOT / "dac.py", sibling) == []
    assert "\n+# === Critic ===" in check_same_order(ROOT / "dac.py", sibling)[0]
    assert "\n+ # === Critic ===" in check_anatomy(sibling)[0]


def test_missing_sections_and_arguments_are_found(tmp_path):
    for old in ["# === Evaluation ===\n", "    gamma: float = 0.99  # discount factor, in [0, 1]\n"]:
        messages = check_anatomy(copy(tmp_path, old, ""))
        assert len(messages) == 1


@pytest.mark.parametrize(
    "line", ["import dac", "from dac import mish", "def late():\n    import dac.mish", "from . import dac"]
)
def test_an_import_of_a_script_is_found(line, tmp_path):
    path = tmp_path / "sibling.py"
    path.write_text(f"import math\nfrom dacite import x\n{line}\n")
    assert len(check_imports(path, SCRIPTS)) == 1


def test_a_network_in_common_is_found(monkeypatch):
    module = importlib.import_module("common.scores")
    monkeypatch.setattr(module, "Network", nn.Linear, raising=False)
    monkeypatch.setattr(module, "network", nn.Linear(1, 1), raising=False)
    assert check_no_networks(module) == [
        "common.scores.Network is a network",
        "common.scores.network is a network",
    ]
