"""The scripts are siblings; common/ is what they share and no more: it knows no algorithm, and is small."""

import ast
import importlib
import re
import sys
from itertools import combinations

import pytest
from runs import AGENTS, ROOT
from siblings import (
    SCRIPTS,
    SHARED_FIELDS,
    check_anatomy,
    count_lines,
    differences,
    loaded_with,
    named_statements,
    parsed,
)
from torch import nn

COMMON = sorted((ROOT / "common").glob("*.py"))
DAC = ROOT / "dac.py"


# === The scripts ===
def test_sections_and_shared_arguments_are_there():
    assert [path.stem for path in SCRIPTS] == sorted(AGENTS)
    assert [message for path in SCRIPTS for message in check_anatomy(path)] == []


def test_same_name_same_code_same_place():
    assert [message for pair in combinations(SCRIPTS, 2) for message in differences(*pair)] == []


def test_edp_agents_differ_in_the_improvement_only():
    """Two of the three share every other method, so that their diff is that of TD3+BC, CRR and IQL."""
    names = ("td3", "crr", "iql")
    agents = [named_statements(ROOT / f"edp_{name}.py", f"EDP{name.upper()}") for name in names]
    for first, second in combinations(agents, 2):
        for name in ("sample", "descend", "act"):
            assert first[name] == second[name], name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# mean of q(x_{t-1} | x_t, x_0)", "# the mean", "ddpm_sample differs"),
        ("EPS = 1e-6", "EPS = 1e-8", "EPS differs"),
        ("= 0.99  # discount", "= 0.9  # discount", "Args.gamma differs"),
        ("# === Evaluation ===\n", "", "other sections than"),
        ("    run_dir: str", "    run_folder: str", "other first fields in Args than"),
        ("@torch.no_grad()\n    def act", "def act", ""),  # the agent is the algorithm
    ],
)
def test_the_checks_find_a_change_in_a_copy(old, new, message, tmp_path):
    text = DAC.read_text().replace("class DAC(", "class Copy(")
    assert text.count(old) == 1
    copy = tmp_path / "copy.py"
    copy.write_text(text.replace(old, new))
    found = check_anatomy(copy) or differences(DAC, copy)
    assert [message in each for each in found] == ([True] if message else [])


def test_the_checks_find_another_order(tmp_path):
    text, copy = DAC.read_text(), tmp_path / "copy.py"
    function = re.search(r"def polyak_update.*?\n\n\n", text, re.DOTALL)[0]
    before, after = text.replace(function, "").split("class EnsembleLinear(")
    copy.write_text(f"{before}{function}class EnsembleLinear({after}")
    assert differences(DAC, copy) == ["the order of what both have differs between dac.py and copy.py"]


# === common/ ===
@pytest.mark.parametrize("path", [*SCRIPTS, *COMMON], ids=lambda path: path.stem)
def test_imports(path):
    """Nobody imports a script; common/ comes before third-party packages: see its __init__.py."""
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
    packages = [(getattr(node, "module", None) or node.names[0].name).split(".")[0] for node in nodes]
    assert not set(packages) & set(AGENTS)
    at_top = [package for package, node in zip(packages, nodes, strict=True) if node in parsed(path).body]
    foreign = [package != "common" for package in at_top if package not in sys.stdlib_module_names]
    assert foreign == sorted(foreign)


def test_common_knows_no_algorithm():
    """It has no networks, and no word of it is the name of an argument of an algorithm."""
    arguments = {name for path in SCRIPTS for name in named_statements(path, "Args")} - set(SHARED_FIELDS)
    for path in COMMON:
        module = importlib.import_module(f"common.{path.stem}".removesuffix(".__init__"))
        classes = [each for each in vars(module).values() if isinstance(each, type)]
        assert not [each for each in classes if issubclass(each, nn.Module) and each is not nn.Module]
        words = {getattr(node, "attr", getattr(node, "value", None)) for node in ast.walk(parsed(path))}
        assert not {word for word in words if isinstance(word, str)} & arguments, path


# === Lines ===
def test_a_reader_has_little_to_load():
    most = {"edp_td3": 560, "edp_crr": 560, "edp_iql": 560, "qvpo_online": 540}
    for path in SCRIPTS:
        assert count_lines([path]) <= most.get(path.stem, 450), path
    assert count_lines(COMMON) <= 1_875
    assert count_lines(loaded_with(DAC) - {DAC}) <= 1_325
