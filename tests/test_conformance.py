"""The scripts against numbers from the authors' own code, on formula-filled weights and injected draws.

Reads every *.json in tests/golden/ and in the folder named by GOLDEN_DIR; tests/golden/README.md says what
they are. The first word of a file's name chooses the module of tests/conformance/ whose check_* functions it
goes through. Sizes, options and formulas come from the file; nothing about a case is written in a check.
"""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from conformance.files import Case, LeftOut

HERE = Path(__file__).parent
FOLDERS = [HERE / "golden", *map(Path, filter(None, [os.environ.get("GOLDEN_DIR")]))]
FILES = sorted(path for folder in FOLDERS for path in folder.glob("*.json"))


def checks(path):
    """The checks of a file, in the precisions that it has."""
    module = importlib.import_module(f"conformance.{path.stem.split('_')[0]}")
    found = [check for name, check in vars(module).items() if name.startswith("check_")]
    precision = json.loads(path.read_text()).get("precision", "both").split()[0].strip(",")
    precisions = {"float32": ["single"], "float64": ["double"], "both": ["single", "double"]}[precision]
    return [
        pytest.param(path, each == "double", check, id=f"{path.stem}-{each}-{check.__name__}")
        for each in precisions
        for check in found
    ]


@pytest.mark.parametrize(("path", "double", "check"), [each for path in FILES for each in checks(path)])
def test_conformance(path, double, check):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    case = Case(path, double)
    try:
        check(case)
    except LeftOut as option:
        case.left_out(option)
    finally:
        torch.set_default_dtype(before)
    if not case.compared:
        pytest.skip(f"left out: {case.skipped}" if case.skipped else "the file has no numbers for this check")


def test_there_are_cases():
    of_jax = {f"{name}_{case}_f64" for name in ("dac", "edp_td3", "edp_crr", "edp_iql") for case in "ac"}
    assert {path.stem for path in FILES} >= {"dql_a", "dtql_a", "qvpo_a"} | of_jax
