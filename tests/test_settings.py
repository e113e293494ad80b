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
from typing import get_args, get_origin, get_type_hints

import benchmark
import collect
import evaluate
import parity
import pictures
import pytest
import speed
from runs import results_of, train

import dac
from common.bandits import sample_bandit
from common.runs import run_command
from common.settings import Bound, check_bounds, parse_args, settings_for, sources_of
from common.tasks import BANDIT_TASKS, BUNDLED, UserError, check_task, table_names

NUM_TASKS = dict(dac=15, diffusion_ql=20, dtql=26, edp_crr=20, edp_iql=20, edp_td3=20, qvpo_online=5)
OUR_ROWS = (
    {"antmaze", "adroit", "kitchen", "bandit", BUNDLED},
    {"antmaze", "adroit", "kitchen", "bandit", BANDIT_TASKS[0], BUNDLED},
    {"InvertedPendulum-v5", "Pendulum-v1", "bandit"},
)


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
        assert set(sources.values()) <= {"task", "default"}, task


def test_every_row_of_a_script_is_published_or_ours(script):
    published = published_settings(script)
    assert script.TASK_SETTINGS.keys() - published.keys() in OUR_ROWS
    for task, row in script.TASK_SETTINGS.items():
        assert task not in published or (row.keys() <= published[task].keys() and check_task(task) is None)
        check_bounds(resolve(script, task)[0])  # also: every setting of a row is one of Args


def test_every_setting_has_a_value(script):
    """There are no defaults to look for elsewhere."""
    check_bounds(script.Args())
    assert {name for name, value in vars(script.Args()).items() if value is None} <= {"dataset", "resume"}


# === Tasks without a row of their own ===
@pytest.mark.parametrize("task", ["antmaze-huge-v2", "D4RL/door/human-v2", "kitchen-new-v0", BANDIT_TASKS[1]])
def test_a_task_without_a_row_has_that_of_its_domain(script, task):
    domain = table_names(task)[-1]
    row = script.TASK_SETTINGS.get(domain, {})
    args, sources = resolve(script, task)
    assert args == replace(script.Args(), env_id=task, **row)
    assert {name for name, source in sources.items() if source == f"row ({domain})"} == row.keys()
    assert set(sources.values()) <= {f"row ({domain})", "default", "given"}


def test_locomotion_without_a_row_has_the_defaults(script):
    for task in ("hopper-random-v2", "ant-expert-v2", "mujoco/hopper/medium-v0"):
        assert resolve(script, task)[0] == replace(script.Args(), env_id=task)


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


def test_a_checkpoint_has_the_defaults_of_a_resumed_run(tmp_path, capsys):
    """They beat those of the task, and are what --help shows then."""
    folder = str(train(tmp_path, dac, total_steps=1, env_id="bandit-corners-v0", eta=1.0))
    args, sources = parsed("--resume", folder, "--tau", "0.5")
    assert (args.env_id, args.eta, args.hidden_dims, args.tau) == ("bandit-corners-v0", 1.0, (8, 8), 0.5)
    assert (sources["eta"], sources["diffusion_steps"], sources["gamma"]) == ("given", "given", "default")
    assert args.resume == folder
    assert "itsstart(default:1.0)" in help_of("--resume", folder, capsys=capsys)


def help_of(*words, capsys, script=dac):
    """What --help shows, without white space: its table breaks the lines."""
    with pytest.raises(SystemExit) as exit_info:
        parsed(*words, "--help", script=script)
    assert exit_info.value.code == 0
    return re.sub(r"[\s│]", "", capsys.readouterr().out)


@pytest.mark.parametrize("env_id", [BUNDLED, "antmaze-umaze-v0", "door-human-v1", "bandit-moons-v0"])
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
    return [name for name, kind in hints if any(isinstance(part, Bound) for part in get_args(kind))]


def test_every_number_has_a_bound(script):
    values = {field.name: field.default for field in fields(script.Args)}
    assert names_of_numbers(script) == [name for name in values if type(values[name]) in (int, float)]
    assert [name for name in values if isinstance(values[name], tuple)] == ["hidden_dims"]


TOOLS = (benchmark, collect, evaluate, parity, pictures, speed)
NEEDED = {benchmark: ["dac"], evaluate: Path("run"), pictures: "all", speed: ["dac"]}  # their first argument


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_every_number_of_a_tool_has_a_bound(tool):
    hints = get_type_hints(tool.Args, include_extras=True)
    numbers = {name: kind for name, kind in hints.items() if re.search(r"\b(int|float)\b", str(kind))}
    first = [NEEDED[tool]] if tool in NEEDED else []
    assert numbers
    for name, kind in numbers.items():
        for value in (-1, math.nan):  # which no bound takes, or the type does not
            given = (value,) if get_origin(kind) is tuple else value
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is "):
                check_bounds(tool.Args(*first, **{name: given}))


def test_every_number_is_refused_by_name_or_works(script, tmp_path, monkeypatch):
    """Each of VALUES for each of the numbers: one message, or two steps and an evaluation, all finite."""
    monkeypatch.setattr("common.bandits.sample_bandit", partial(sample_bandit, size=100))
    trials = [(name, value) for name in names_of_numbers(script) for value in VALUES]
    trials += [("hidden_dims", values) for value in VALUES for values in [(value, 8), (8, value)]]
    for name, value in [*trials, ("hidden_dims", ())]:
        short = {key: SHORT[key] for key in SHORT if hasattr(script.Args, key)} | {name: value}
        try:
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
        (["--hidden-dims"], "--hidden-dims is empty; it must have at least one number"),
        (["--time-dim", "7"], "--time-dim is 7; it must be even and at least 4"),
        (["--resume", ""], "--resume is empty; it takes a checkpoint or a run folder"),
        (["--env-id", "bandit-moon-v0"], "unknown task 'bandit-moon-v0'; nearest names: bandit-moons-v0"),
        (["--env-id", "antmaze-umaze-v0", "--dataset", "none.hdf5"], "there is no file none.hdf5"),
        (["--device", "meta"], "--device meta is not available: "),
        (["--device", "cuda:99"], "--device cuda:99 is not available: "),
    ],
)
def test_a_mistake_is_one_message(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dac.py", "--run-dir", str(tmp_path / "runs"), *words])
    with pytest.raises(SystemExit) as exit_info:
        run_command(dac.train, dac.Args, dac.TASK_SETTINGS)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("flag", "value"), [("--seed", "nan"), ("--reward-tune", "fair")])
def test_an_argument_of_another_type(flag, value, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parsed(flag, value)
    assert exit_info.value.code == 2
    assert flag in capsys.readouterr().err
