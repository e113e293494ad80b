"""The settings of each task against settings.csv, which was written from the papers and the official codes.

Its env_id * stands for every task that it has of the script. Names of settings and of reward rules are ours;
what the scripts do not have is left out (Diffusion-QL's top_k, the columns of EDP's table that are not read).
"""

import ast
import csv
import json
import sys
from dataclasses import fields
from pathlib import Path

import h5py
import numpy as np
import pytest

import dac
import diffusion_ql
import dtql
import edp_crr
import edp_iql
import edp_td3
from common.datasets import BANDITS, BUNDLED, D4RL_TASKS, names_in_tables
from common.runs import Run

NUM_TASKS = {diffusion_ql: 20, edp_td3: 20, edp_crr: 20, edp_iql: 20, dtql: 26, dac: 15}
DOMAINS = {"antmaze", "adroit", "kitchen"}


@pytest.fixture(params=NUM_TASKS, ids=lambda script: script.__name__)
def script(request):
    return request.param


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])


def value_of(text):
    """A number, a truth value or a tuple; else the text itself."""
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def published_settings(script):
    """Task -> setting -> value: what the table has for a script."""
    with open(Path(__file__).with_name("settings.csv"), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["script"] == script.__name__]
    tasks = {row["env_id"]: {} for row in rows if row["env_id"] != "*"}
    for row in rows:
        for task in tasks if row["env_id"] == "*" else [row["env_id"]]:
            assert row["source"] and row["setting"] not in tasks[task], row
            tasks[task][row["setting"]] = value_of(row["value"])
    return tasks


def resolve(script, **arguments):
    """Arguments, and the sources of those not given here, as a run has them; it makes no folder yet."""
    run = Run(script.__name__, script.Args(**arguments), script.DEFAULT_SETTINGS, script.TASK_SETTINGS)
    return run.args, {name: source for name, source in run.sources.items() if name not in arguments}


def wrong_settings(script):
    """Messages on the tasks of the table for which the script would use other values."""
    messages = []
    for task, expected in published_settings(script).items():
        args, _ = resolve(script, env_id=task)
        messages += [
            f"{task}: {name} is {getattr(args, name)}, published is {value}"
            for name, value in expected.items()
            if getattr(args, name) != value
        ]
    return messages


# --- Published settings ---
def test_every_task_has_its_published_settings(script):
    assert len(published_settings(script)) == NUM_TASKS[script]
    messages = wrong_settings(script)
    assert not messages, "\n".join(messages)


def test_a_wrong_cell_is_found(monkeypatch):
    row = dtql.TASK_SETTINGS["pen-cloned-v1"] | {"actor_lr": 1e-4}
    monkeypatch.setitem(dtql.TASK_SETTINGS, "pen-cloned-v1", row)
    assert wrong_settings(dtql) == ["pen-cloned-v1: actor_lr is 0.0001, published is 1e-05"]


def test_every_row_of_a_script_is_published_or_ours(script):
    """And a row names only what there is: a setting that DEFAULT_SETTINGS lacks would be ignored."""
    published = published_settings(script)
    own = {BUNDLED, *BANDITS}
    assert script.TASK_SETTINGS.keys() == published.keys() | DOMAINS | own
    assert published.keys() <= D4RL_TASKS.keys()
    for task, row in script.TASK_SETTINGS.items():
        assert row.keys() <= script.DEFAULT_SETTINGS.keys()
        assert task not in published or row.keys() <= published[task].keys()
    assert script.DEFAULT_SETTINGS.keys() <= {field.name for field in fields(script.Args)}


# --- Tasks without a row of their own ---
@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("antmaze-large-diverse-v2", ["antmaze-large-diverse-v0", "antmaze"]),
        ("D4RL/antmaze/umaze-v1", ["antmaze-umaze-v0", "antmaze"]),
        ("D4RL/kitchen/mixed-v2", ["kitchen-mixed-v0", "kitchen"]),
        ("D4RL/pen/human-v2", ["pen-human-v1", "adroit"]),
        ("relocate-expert-v1", ["relocate-expert-v1", "adroit"]),
        ("hammer-cloned-v1", ["hammer-cloned-v1", "adroit"]),
    ],
)
def test_names_of_a_task(task, names):
    assert names_in_tables(task) == [task, *names]


def test_names_of_environments_and_of_other_tasks():
    environments = {
        "AntMaze_UMaze-v4": "antmaze",
        "AdroitHandDoor-v1": "adroit",
        "FrankaKitchen-v1": "kitchen",
    }
    for task, domain in environments.items():
        assert names_in_tables(task)[0] == task and names_in_tables(task)[-1] == domain
    for task in ("Pendulum-v1", "hopper-expert-v2", "mujoco/hopper/medium-v0", "local/pen-v0", BUNDLED):
        assert names_in_tables(task) == [task]


@pytest.mark.parametrize("task", ["door-human-v1", "pen-expert-v1", "D4RL/door/human-v2"])
def test_a_task_without_a_row_has_those_of_its_domain(script, task):
    row = script.TASK_SETTINGS["adroit"]
    args, sources = resolve(script, env_id=task)
    assert {name: getattr(args, name) for name in row} == row
    assert {name for name, source in sources.items() if source == "domain (adroit)"} == row.keys()
    assert set(sources.values()) == {"domain (adroit)", "default"}
    assert args.eval_episodes == 100


def test_locomotion_without_a_row_has_the_defaults(script):
    for task in ("hopper-random-v2", "ant-expert-v2", "mujoco/hopper/medium-v0"):
        args, sources = resolve(script, env_id=task)
        assert set(sources.values()) == {"default"}
        assert args.eval_episodes == 10


@pytest.mark.parametrize("maze", ["umaze", "medium-play", "large-diverse"])
def test_a_maze_has_the_same_settings_in_all_versions(script, maze):
    expected, _ = resolve(script, env_id=f"antmaze-{maze}-v0")
    for task in (f"antmaze-{maze}-v1", f"antmaze-{maze}-v2", f"D4RL/antmaze/{maze}-v1"):
        args, sources = resolve(script, env_id=task)
        assert vars(args) == vars(expected) | {"env_id": task}
        source = "task" if task in script.TASK_SETTINGS else f"domain (antmaze-{maze}-v0)"
        assert set(sources.values()) == {source, "default"}


def test_given_beats_domain_and_the_screen_says_which(tmp_path, capsys):
    random = np.random.default_rng(0)
    with h5py.File(tmp_path / "door.hdf5", "w") as file:
        file["observations"] = random.normal(size=(50, 39))
        file["actions"] = random.uniform(-1, 1, (50, 28))
        file["rewards"] = np.tile([0, 1, 6, 3, 0], 10)
        file["terminals"] = np.zeros(50, bool)
        file["timeouts"] = np.arange(50) % 25 == 24
    edp_iql.train(
        edp_iql.Args(
            env_id="door-human-v1",
            dataset=str(tmp_path / "door.hdf5"),
            run_dir=str(tmp_path),
            total_steps=2,
            eval_episodes=0,
            hidden_dims=(8,),
            batch_size=4,
            diffusion_steps=20,
        )
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rewards by minmax: [0, 6], mean 2.083, sum 100 -> [-1, 1], mean -0.3056, sum -14.67"
    settings = dict(line.strip().split(": ", 1) for line in lines if line.startswith("  ") and ": " in line)
    assert list(settings) == ["given", "domain (adroit)", "default"]
    assert {"total_steps 2", "eval_episodes 0"} <= set(settings["given"].split(", "))
    domain = "actor_lr 3e-05, critic_lr 3e-05, reward_tune minmax, guidance_weight 0.1"
    assert sorted(settings["domain (adroit)"].split(", ")) == sorted(domain.split(", "))
    assert {"max_grad_norm 5.0", "inverse_temperature 3.0"} <= set(settings["default"].split(", "))
    [config] = tmp_path.glob("*/config.json")
    assert json.loads(config.read_text())["sources"]["reward_tune"] == "domain (adroit)"
