"""docs/your_own.md: its diff turns edp_iql.py into a script that all tools and checks accept.

If the diff no longer applies, let patch mark where, correct that in idql.py, and write the diff anew:

    patch --merge -o idql.py edp_iql.py docs/idql.diff
    diff -u --label edp_iql.py --label idql.py edp_iql.py idql.py > docs/idql.diff
"""

import importlib
import re
import shutil
import subprocess
import sys

import pytest
import shape_comments
import torch
from runs import AGENTS, ROOT
from siblings import SCRIPTS, check_anatomy, differences

DIFF = ROOT / "docs" / "idql.diff"
VARIANT = {"greedy": False, "sampler": "dpm", "noise_schedule": "linear"}  # what the defaults do not reach


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the repository in which idql.py was made by the command of the page."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("common", "docs", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "edp_iql.py", folder)
    text = (ROOT / "docs" / "your_own.md").read_text()
    [command] = re.findall(r"^    (patch .*)$", text, re.MULTILINE)
    done = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "fuzz" not in done.stdout, f"{done.stdout}\n{__doc__}"
    return folder


def python(folder, *words):
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_trains_and_is_evaluated(folder):
    sizes = "--total-steps 60 --eval-every 30 --eval-episodes 3 --batch-size 32 --hidden-dims 16 16"
    output = python(folder, "idql.py", "--env-id", "bandit-corners-v0", *sizes.split())
    assert "finished at step 60" in output
    [run] = (folder / "runs").iterdir()
    score = python(folder, "tools/evaluate.py", str(run), "--episodes", "3")
    final = re.findall(r"step 60: return (\S+)", output)
    assert re.findall(r"^return +(\S+)", score, re.MULTILINE) == final


def test_it_is_a_sibling(folder):
    assert check_anatomy(folder / "idql.py") == []
    assert [message for path in SCRIPTS for message in differences(path, folder / "idql.py")] == []


def test_its_style_is_that_of_the_scripts(folder):
    python(folder, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "idql.py")
    python(folder, "-m", "ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), "idql.py")


def test_its_default_task_has_settings(folder):
    python(folder, "idql.py", "--help")


def test_its_shape_comments_are_true(folder, monkeypatch):
    monkeypatch.setitem(AGENTS, "idql", ("IDQL", {}))
    monkeypatch.setattr(shape_comments, "VARIANTS", [{}, VARIANT])
    script = shape_comments.run_checked("idql", (folder / "idql.py").read_text())
    assert script.wrong == []
    assert script.checked == script.comments.keys()


def test_it_acts_by_q_or_by_the_weight_of_the_expectile(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    script = importlib.import_module("idql")
    torch.manual_seed(0)
    args = script.Args(hidden_dims=(16,), num_action_samples=7, expectile=0.9)
    agent = script.IDQL(3, 2, args, torch.device("cpu"))
    obs, noise = torch.randn(5, 3), torch.randn(args.diffusion_steps, 35, 2)
    with torch.no_grad():
        states = obs.repeat_interleave(7, dim=0)
        actions = agent.sample(agent.actor, states, noise)
        q, value = agent.critic_target(states, actions).amin(0).view(5, 7), agent.value(obs).unsqueeze(1)
    best = actions.view(5, 7, 2)[torch.arange(5), q.argmax(1)]
    torch.testing.assert_close(agent.act(obs, noise), best)

    def most_likely(weight, count):
        assert 0 < (q > value).sum() < 35
        torch.testing.assert_close(weight, torch.where(q > value, 0.9, 0.1))
        return weight.argmax(1, keepdim=True)

    args.greedy = False
    monkeypatch.setattr(torch, "multinomial", most_likely)
    chosen = torch.where(q > value, 0.9, 0.1).argmax(1)
    torch.testing.assert_close(agent.act(obs, noise), actions.view(5, 7, 2)[torch.arange(5), chosen])


def test_the_page_quotes_and_counts_the_diff():
    lines, text = DIFF.read_text().splitlines(), (ROOT / "docs" / "your_own.md").read_text()
    for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL):
        assert block in DIFF.read_text()
    removed, added = (len([line for line in lines[2:] if line[0] == sign]) for sign in "-+")
    assert f"takes away {removed} lines and adds {added}" in text
