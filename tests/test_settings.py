"""The settings of each task against settings.csv, which was written from the papers and the official codes.

Its env_id * stands for every task that it has of the script. Names of settings and of reward rules are ours;
what the scripts do not have is left out (Diffusion-QL's top_k, the columns of EDP's table that are not read).
"""

import ast
import contextlib
import csv
import inspect
import math
import re
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import get_type_hints

import pytest
from runs import results_of, tiny_settings, train

import dac
import qvpo_online
from common.bandits import sample_bandit
from common.cli import UserError, check_bounds, parse_args, run_command, settings_for, sources_of

NUM_TASKS = dict(dac=15, diffusion_ql=20, dtql=26, edp_crr=20, edp_iql=20, edp_td3=20, qvpo_online=5)


def published_settings(script):
    """Task -> setting -> value: what the table has for a script."""
    with open(Path(__file__).with_name("settings.csv"), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["script"] == script.__name__]
    tasks = {row["env_id"]: {} for row in rows if row["env_id"] != "*"}
    for row in rows:
        with contextlib.suppress(ValueError):  # of a text, which stays as it is
            row["value"] = ast.literal_eval(row["value"])
        for task in tasks if row["env_id"] == "*" else [row["env_id"]]:
            assert row["source"] and row["setting"] not in tasks[task], row
            tasks[task][row["setting"]] = row["value"]
    return tasks


def resolve(script, env_id):
    """Settings of a task, and their sources."""
    args = settings_for(script.Args, script.TASK_SETTINGS, env_id)
    return args, sources_of(args, script.TASK_SETTINGS)


# === Published settings ===
def test_every_task_has_its_published_settings(script):
    published = published_settings(script)
    assert len(published) == NUM_TASKS[script.__name__]
    for task, expected in published.items():
        args, sources = resolve(script, task)
        assert {name: getattr(args, name) for name in expected} == expected, task
        assert sources.pop("env_id") == ("default" if task == script.Args.env_id else "given"), task
        row = "task" if task in script.TASK_SETTINGS else f"row ({task[:-1]}0)"  # DTQL's mazes-v2
        assert set(sources.values()) <= {row, "default"}, task
        assert script.TASK_SETTINGS.get(task, {}).keys() <= expected.keys(), task


# === Tasks without a row of their own ===
@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("antmaze-huge-v2", ["antmaze-huge-v0", "antmaze"]),
        ("antmaze-umaze-v2", ["antmaze-umaze-v0", "antmaze"]),
        ("D4RL/antmaze/umaze-v1", ["antmaze-umaze-v0", "antmaze"]),
        ("D4RL/door/human-v2", ["door-human-v1", "adroit"]),
        ("AdroitHandDoor-v1", ["adroit"]),
        ("bandit-corners-v0", ["bandit-corners-v0", "bandit"]),
    ],
)
def test_a_task_without_a_row_has_that_of_its_domain(script, task, rows):
    """Of the version that the papers train on, or of the domain."""
    found = next((row for row in rows if row in script.TASK_SETTINGS), None)
    row = script.TASK_SETTINGS.get(found, {})
    args, sources = resolve(script, task)
    assert args == replace(script.Args(), env_id=task, **row)
    word = "task" if found == task else f"row ({found})"
    assert {name for name, source in sources.items() if source == word} == row.keys()


# === The command line ===
def parsed(*words, script=dac):
    args = parse_args(script.Args, script.TASK_SETTINGS, words)
    return args, sources_of(args, script.TASK_SETTINGS)


def test_given_beats_task_beats_default():
    args, sources = parsed("--env-id", "halfcheetah-medium-expert-v2", "--eta", "0.5", "--num-qs", "10")
    assert (args.eta, sources["eta"], sources["env_id"]) == (0.5, "given", "given")
    assert (args.bc_threshold, sources["bc_threshold"]) == (0.1, "task")
    assert (args.num_qs, sources["num_qs"]) == (10, "default")
    args, sources = parsed("--eta=1.0", "--env-id=antmaze-umaze-v2", "--no-max-q-backup")
    assert (args.eta, sources["eta"]) == (dac.Args.eta, "given")  # though it is the default
    assert (args.max_q_backup, sources["max_q_backup"]) == (False, "given")
    assert (args.eta_lr, sources["eta_lr"]) == (0.0, "row (antmaze-umaze-v0)")


def help_of(*words, capsys, script=dac):
    """What --help shows, without white space: its table breaks the lines."""
    with pytest.raises(SystemExit) as exit_info:
        parsed(*words, "--help", script=script)
    assert exit_info.value.code == 0
    return re.sub(r"[\s│]", "", capsys.readouterr().out)


@pytest.mark.parametrize("env_id", ["antmaze-umaze-v0", "bandit-moons-v0"])
def test_help_explains_every_argument_and_shows_the_settings_of_the_task(env_id, script, capsys):
    shown, source = help_of("--env-id", env_id, capsys=capsys, script=script), inspect.getsource(script.Args)
    for name, value in vars(resolve(script, env_id)[0]).items():
        [comment] = re.findall(rf"\n    {name}: .*  # (.*)", source)
        value = " ".join(map(str, value)) if isinstance(value, tuple) else value
        assert f"--{name.replace('_', '-')}" in shown
        assert re.sub(r"\s", "", f"{comment} (default: {value})") in shown, name


# === Numbers out of range ===
VALUES = [math.nan, math.inf, -math.inf, 0, -1]
SHORT = dict(total_steps=2, eval_every=2, eval_episodes=1, log_every=1, pretrain_steps=1, learning_starts=1)


def names_of_numbers(script):
    """The settings of one number, which have a bound."""
    hints = get_type_hints(script.Args, include_extras=True).items()
    return [name for name, kind in hints if hasattr(kind, "__metadata__")]


def test_every_number_has_a_bound(script):
    values = {field.name: field.default for field in fields(script.Args)}
    assert names_of_numbers(script) == [name for name in values if type(values[name]) in (int, float)]
    known = {"hidden_dims", "env_kwargs", "action_bounds"}
    assert {name for name in values if isinstance(values[name], tuple)} <= known


def test_every_number_is_refused_by_name_or_works(script, tmp_path, monkeypatch):
    """Each of VALUES for each of the numbers: one message, or two steps and an evaluation, all finite."""
    monkeypatch.setattr("common.bandits.sample_bandit", partial(sample_bandit, size=100))
    trials = [(name, value) for name in names_of_numbers(script) for value in VALUES]
    trials += [("hidden_dims", values) for value in VALUES for values in [(value, 8), (8, value)]]
    for name, value in [*trials, ("hidden_dims", ())]:
        short = {key: SHORT[key] for key in SHORT if hasattr(script.Args, key)} | {name: value}
        try:
            check_bounds(tiny_settings(script, **short))  # as run_command() does
            results = results_of(train(tmp_path / f"{name} {value}", script, **short))
        except UserError as error:
            assert re.match(rf"--{name.replace('_', '-')} is .*; it must ", str(error)), (name, value, error)
        else:
            returns = [each["return_mean"] for each in results["evaluations"]]
            assert all(map(math.isfinite, [*results["losses"].values(), *returns])), (name, value, results)
            assert results["finished"] and len(returns) == (name != "eval_episodes"), (name, value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tau", "nan"], "--tau is nan; it must be from 0 to 1"),
        (["--time-dim", "7"], "--time-dim is 7; it must be even and at least 4"),
        (["--num-threads", "3000000000"], "--num-threads is 3000000000; it must be from 1 to 1024"),
        (["--env-id", "bandit-moon-v0"], "unknown task 'bandit-moon-v0'; nearest names: bandit-moons-v0"),
        (["--env-id", "antmaze-umaze-v0", "--dataset", "none.hdf5"], "there is no file none.hdf5"),
        (["--device", "cuda:99"], "--device cuda:99 is not available: "),
        (["--device", "hpu"], "--device hpu is not available: No module named"),
    ],
)
@pytest.mark.parametrize("script", [dac, qvpo_online], ids=["dac", "qvpo_online"])
def test_a_mistake_is_one_message(script, words, message, tmp_path, monkeypatch, capsys):
    if "--dataset" in words and script is qvpo_online:
        pytest.skip("it reads no data")
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--run-dir", str(tmp_path / "runs"), *words])
    with pytest.raises(SystemExit) as exit_info:
        run_command(script.train, script.Args, script.TASK_SETTINGS)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "runs").exists()
