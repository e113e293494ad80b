"""The scripts are siblings; common/ is what they share and no more: it knows no algorithm, and is small."""

import ast
import importlib
from itertools import combinations

import pytest
import runs
from runs import AGENTS, ROOT
from siblings import SCRIPTS, SHARED_FIELDS, check_anatomy, differences, named_statements, parsed
from torch import nn

import dac

COMMON = sorted((ROOT / "common").glob("*.py"))


# === The scripts ===
def test_sections_and_shared_arguments_are_there():
    assert [path.stem for path in SCRIPTS] == sorted(AGENTS)
    assert [message for path in SCRIPTS for message in check_anatomy(path)] == []


def test_same_name_same_code_same_place():
    assert [message for pair in combinations(SCRIPTS, 2) for message in differences(*pair)] == []


def test_edp_agents_differ_in_the_improvement_only():
    """Sampling and acting are the same, so that their diff is that of TD3+BC, CRR and IQL."""
    names = ("td3", "crr", "iql")
    agents = [named_statements(ROOT / f"edp_{name}.py", f"EDP{name.upper()}") for name in names]
    for first, second in combinations(agents, 2):
        assert (first["sample"], first["act"]) == (second["sample"], second["act"])


# === common/ ===
def imports_of(nodes):
    """The modules that import statements name."""
    nodes = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return {getattr(node, "module", None) or node.names[0].name for node in nodes}


@pytest.mark.parametrize("path", [*SCRIPTS, *COMMON], ids=lambda path: path.stem)
def test_nobody_imports_a_script(path):
    assert not {name.split(".")[0] for name in imports_of(ast.walk(parsed(path)))} & set(AGENTS)


def test_no_circle_between_the_rooms():
    needs = {f"common.{path.stem}": imports_of(parsed(path).body) for path in COMMON}
    while free := [room for room in needs if not needs[room] & needs.keys()]:
        needs = {room: needs[room] for room in needs.keys() - set(free)}
    assert not needs


def test_common_knows_no_algorithm():
    """It has no networks, and no word of it is the name of an argument of an algorithm."""
    arguments = {name for path in SCRIPTS for name in named_statements(path, "Args")} - set(SHARED_FIELDS)
    for path in COMMON:
        module = importlib.import_module(f"common.{path.stem}".removesuffix(".__init__"))
        classes = [each for each in vars(module).values() if isinstance(each, type)]
        assert not [each for each in classes if issubclass(each, nn.Module) and each is not nn.Module]
        words = {getattr(node, "attr", getattr(node, "value", None)) for node in ast.walk(parsed(path))}
        assert not {word for word in words if isinstance(word, str)} & arguments, path


def test_what_need_not_be_loaded_is_not():
    """--help and tools do without PyTorch; a name without arrays; Hopper without other domains and Minari."""
    code = "import sys, common.cli, common.tasks; print(*sys.modules)\n"
    code += "from common.datasets import load_dataset as load\n"
    code += "load(common.tasks.find_task('hopper-mini-v0')); print(*sys.modules)"
    _, out, _ = runs.finish(runs.python("-c", code, cwd=ROOT))
    names, hopper = (set(line.split()) for line in out.splitlines()[:2])
    assert not names & {"torch", "h5py", "minari"}
    others = {"common.d4rl_envs", "common.downloads", "common.other_data"}
    assert not hopper & {"torch", "minari", "gymnasium_robotics", *others}


# === Lines ===
def count_lines(paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_a_reader_has_little_to_read(tmp_path):
    """common/, each script, and dac.py with all it loads until it has trained and evaluated."""
    most = {"edp_td3": 560, "edp_crr": 560, "edp_iql": 560, "qvpo_online": 540}
    long = {path.name: count_lines([path]) for path in SCRIPTS}
    assert {name: lines for name, lines in long.items() if lines > most.get(name[:-3], 460)} == {}
    assert count_lines(COMMON) <= 1_350
    settings = runs.tiny_settings(dac, env_id="hopper-mini-v0", run_dir=str(tmp_path), reward_tune="none")
    code = "import sys, dac\ndac.run_command(dac.train, dac.Args, dac.TASK_SETTINGS)\n"
    code += "print(*(getattr(module, '__file__', None) for module in sys.modules.values()))"
    given = {name: value for name, value in vars(settings).items() if value not in (None, ())}
    _, out, err = runs.finish(runs.python("-c", code, *runs.to_words(**given), cwd=ROOT))
    assert "finished: " in out, err
    loaded = {path for path in [ROOT / "dac.py", *COMMON] if str(path) in out.splitlines()[-1]}
    assert len(loaded) > 5 and count_lines(loaded) <= 1_350
