"""docs/your_own.md: its diffs turn scripts into others, which all tools and checks accept, and which learn.

If a diff no longer applies, let patch mark where, correct that in the new script, and write the diff anew:

    patch --merge -o fql.py dtql.py docs/fql.diff
    diff -u --label dtql.py --label fql.py dtql.py fql.py > docs/fql.diff
"""

import importlib
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import shape_comments
import torch
from runs import AGENTS, ROOT, folder_in, load
from siblings import SCRIPTS, check_anatomy, differences

from common.bandits import BANDITS
from common.cli import settings_for
from common.datasets import load_dataset
from common.tasks import find_task

PAGE = (ROOT / "docs" / "your_own.md").read_text()
EXAMPLES = {  # script -> what it is made from, its agent, and options that the defaults do not reach
    "idql": ("edp_iql", "IDQL", {"greedy": False, "sampler": "dpm", "noise_schedule": "linear"}),
    "fql": ("dtql", "FQL", {"q_agg": "min", "normalize_q_loss": True}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the repository in which the commands of the page made the scripts."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("common", "docs", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name, (old, *_) in EXAMPLES.items():
        shutil.copy(ROOT / f"{old}.py", folder)
        [command] = re.findall(rf"^    (patch -o {name}.py .*?) &&", PAGE, re.MULTILINE)
        done = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and not re.search("fuzz|offset", done.stdout), f"{done.stdout}\n{__doc__}"
    return folder


@pytest.fixture(params=EXAMPLES)
def example(request, folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    path, script = folder / f"{request.param}.py", importlib.import_module(request.param)
    _, agent, options = EXAMPLES[request.param]
    return SimpleNamespace(name=request.param, agent=agent, options=options, path=path, script=script)


def python(folder, *words):
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_a_sibling_in_the_style_of_the_scripts(example, folder):
    assert check_anatomy(example.path) == []
    assert [message for path in SCRIPTS for message in differences(path, example.path)] == []
    for words in (["check"], ["format", "--check"]):
        python(folder, "-m", "ruff", *words, "--config", ROOT / "pyproject.toml", example.path)


def test_its_shape_comments_are_true(example, monkeypatch):
    monkeypatch.setitem(AGENTS, example.name, (example.agent, {}))
    monkeypatch.setattr(shape_comments, "VARIANTS", [{}, example.options])
    checked = shape_comments.run_checked(example.name, example.path.read_text())
    assert checked.wrong == []
    assert checked.checked == checked.comments.keys()


@pytest.mark.parametrize("example", ["fql", pytest.param("idql", marks=pytest.mark.slow)], indirect=True)
def test_it_finds_the_best_corner_and_is_evaluated(example, folder, tmp_path):
    given = dict(run_dir=str(tmp_path), eval_episodes=3, total_steps=500)
    args = settings_for(example.script.Args, example.script.TASK_SETTINGS, "bandit-corners-v0", **given)
    results, run = example.script.train(args), folder_in(tmp_path)
    assert results["script"] == example.name and results["finished"] and results["evaluations"]
    assert re.search(r"^return +\S+", python(folder, "tools/evaluate.py", run, "--episodes", "3"), re.M)
    agent = getattr(example.script, example.agent)(1, 2, args, torch.device("cpu"))
    agent.load_state_dict(load(run)["agent"])
    torch.manual_seed(0)
    actions = agent.act(torch.zeros(1000, 1)).numpy()
    best = BANDITS["bandit-corners-v0"][-1]
    assert (actions * best > 0).all(1).mean() > 0.9  # in its quarter: FQL stops beside it, says the page


def test_the_page_quotes_and_counts_the_diffs():
    diffs = {name: (ROOT / "docs" / f"{name}.diff").read_text() for name in EXAMPLES}
    assert all(block in "".join(diffs.values()) for block in re.findall(r"```diff\n(.*?)```", PAGE, re.S))
    for name, diff in diffs.items():
        removed, added = (sum(line[0] == sign for line in diff.splitlines()[2:]) for sign in "-+")
        assert f"[{name}.diff]({name}.diff): {removed} lines less, {added} more" in PAGE


# === IDQL ===
@pytest.mark.parametrize("example", ["idql"], indirect=True)
def test_idql_acts_by_q_or_by_the_weight_of_the_expectile(example, monkeypatch):
    torch.manual_seed(0)
    args = example.script.Args(hidden_dims=(16,), num_action_samples=7, expectile=0.9)
    agent = example.script.IDQL(3, 2, args, torch.device("cpu"))
    obs, noise = torch.randn(5, 3), torch.randn(args.diffusion_steps, 35, 2)
    with torch.no_grad():
        states = obs.repeat_interleave(7, dim=0)
        actions = agent.sample(agent.actor, states, noise)
        q, value = agent.critic_target(states, actions).amin(0).view(5, 7), agent.value(obs).unsqueeze(1)
    weight = torch.where(q > value, 0.9, 0.1)
    assert 0 < (q > value).sum() < 35

    def most_likely(given, count):
        torch.testing.assert_close(given, weight)
        return given.argmax(1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", most_likely)
    for args.greedy, chosen in ((True, q.argmax(1)), (False, weight.argmax(1))):
        torch.testing.assert_close(agent.act(obs, noise), actions.view(5, 7, 2)[torch.arange(5), chosen])


# === FQL ===
def outside(script, steps, **changes):
    """Losses that, as means over 250 steps, are four standard deviations and 10 % off the authors' mean."""
    curves = json.loads((ROOT / "docs" / "fql.json").read_text())["losses of each seed"]
    torch.manual_seed(0)
    dataset, args = load_dataset(find_task("hopper-mini-v0")), script.Args(**changes)
    actions = dataset.actions.clip(-1 + 1e-5, 1 - 1e-5)
    columns = (dataset.observations, actions, dataset.rewards, dataset.next_observations, dataset.terminals)
    data, agent = script.Batch(*map(torch.as_tensor, columns)), script.FQL(11, 3, args, torch.device("cpu"))
    found = []
    for i in range(steps // 250):
        losses = [agent.update(data) for _ in range(250)]
        for name, seeds in curves.items():
            ours, theirs = np.mean([each[name] for each in losses]), np.array(seeds)[:, i]
            width = max(4 * theirs.std(ddof=1), 0.1 * abs(theirs.mean()))
            if not abs(ours - theirs.mean()) <= width:
                found.append(f"{name} {ours:.4g}, not {theirs.mean():.4g} +- {width:.2g}, to {250 * (i + 1)}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("example", ["fql"], indirect=True)
def test_fql_learns_as_its_authors_code_does(example):
    assert outside(example.script, 500) == []
    for mistake in ({"alpha": -10.0}, {"flow_steps": 1}):
        assert any("distill_loss" in each for each in outside(example.script, 250, **mistake)), mistake
