"""tools/evaluate.py: the scripts' own numbers again, a film, and clear failures."""

import json
import os
import re
import subprocess
import sys

import imageio.v3 as imageio
import line
import numpy as np
import pytest
import torch
from test_datasets import flags, write
from test_runs import AGENTS, Malicious, train

import dac
import qvpo_online
from common.datasets import UserError
from tools import evaluate

TINY = {"total_steps": 20, "eval_every": 10, "eval_episodes": 4}


@pytest.fixture(autouse=True)
def little_time(monkeypatch):
    monkeypatch.setattr(evaluate, "TIMED", 0.02)


@pytest.fixture(scope="module", params=AGENTS, ids=lambda script: script.__name__)
def finished_by(request, tmp_path_factory):
    """Folder of a run of each script, with four evaluation episodes of several steps."""
    return run_of(request.param, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_of(dac, tmp_path_factory.mktemp("finished"))


def run_of(script, folder, env_id="Line-v0"):
    if script is qvpo_online:
        return train(folder / "runs", script, env_id=env_id, **TINY)
    random = np.random.default_rng(0)
    sizes = {"Line-v0": (2, 1), "InvertedPendulum-v5": (4, 1)}[env_id]
    data = write(
        folder / "data.hdf5",
        observations=random.normal(size=(50, sizes[0])),
        actions=random.uniform(-1, 1, size=(50, sizes[1])),
        rewards=random.normal(size=50),
        terminals=flags(20, 48, length=50),
        timeouts=flags(length=50),
    )
    return train(folder / "runs", script, env_id=env_id, dataset=data, **TINY)


def score(path, **options):
    return evaluate.main(evaluate.Args(path, **options))


def final_evaluation(folder):
    return json.loads((folder / "results.json").read_text())["evaluations"][-1]


# --- Scores ---
def test_the_final_evaluation_comes_out_again(finished_by):
    """Exactly, of every script, and without the data that it was trained on."""
    (finished_by.parent.parent / "data.hdf5").unlink(missing_ok=True)
    again, own = score(finished_by, episodes=4), final_evaluation(finished_by)
    assert again["returns"] == own["returns"] and len(set(own["returns"])) == 4
    for name in ("return_mean", "return_std", "length_mean", "first_seed"):
        assert again[name] == own[name]


def test_screen(tmp_path, capsys):
    """On a task with reference returns, 0 and 1, and from the file instead of its folder."""
    folder = train(tmp_path, eval_episodes=0)
    capsys.readouterr()
    score(folder / "checkpoint.pt", episodes=50)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"dac on bandit-moons-v0, 60 steps, seed 0: {folder}/checkpoint.pt"
    assert lines[1] == "  cpu, 50 episodes, seeds from 10000"
    number = r"(-?[\d.e-]+)"
    pattern = rf"return  {number} \+- {number}, 95 % interval of the mean {number} to {number}$"
    returns = [float(value) for value in re.match(pattern, lines[2]).groups()]
    scores = [float(value) for value in re.match(pattern.replace("return", "score "), lines[3]).groups()]
    assert scores == pytest.approx([100 * value for value in returns], rel=1e-3)
    assert returns[2] < returns[0] < returns[3]
    assert lines[4] == "length  1 steps per episode"
    assert re.match(rf"act\(\)   {number} ms for one state, {number} ms for 50 at once$", lines[5])


def test_a_task_without_reference_returns(finished, capsys):
    score(finished, episodes=1)
    out = capsys.readouterr().out
    assert "score   unknown: no reference returns are known for Line-v0" in out
    assert "interval" not in out  # of one episode


def test_confidence_interval():
    """That of the normal distribution, for numbers that are from it; wider for fewer numbers."""
    values = np.random.default_rng(1).normal(5, 2, size=200)
    half = 1.96 * values.std() / 200**0.5
    expected = [values.mean() - half, values.mean() + half]
    assert evaluate.confidence_interval(values) == pytest.approx(expected, abs=0.05 * half)
    low, high = evaluate.confidence_interval(values[:20])
    assert high - low > 3 * half


# --- Films ---
def test_video(finished, tmp_path):
    """A frame for every step, and what is drawn: white rows, as many as the place is high."""
    path = tmp_path / "line.mp4"
    score(finished, episodes=2, video=path)
    frames = imageio.imread(path)
    assert len(frames) == final_evaluation(finished)["length_mean"] == 10
    assert frames.shape[1:] == (32, 30, 3)  # 31 rows are no video
    white = (frames > 128).mean(axis=(1, 2, 3)) * 31
    env = line.Line()
    env.reset(seed=dac.EVAL_SEED)
    assert white[0] == pytest.approx(env.place + 15, abs=1.5)
    assert np.ptp(white) > 1
    assert imageio.immeta(path)["fps"] == 10
    assert [each.name for each in tmp_path.iterdir()] == ["line.mp4"]


def test_video_of_mujoco(tmp_path):
    """Without a screen; skipped where there is no OpenGL, which the message must say then."""
    folder = run_of(dac, tmp_path, "InvertedPendulum-v5")
    path = tmp_path / "pendulum.mp4"
    environ = {name: value for name, value in os.environ.items() if "DISPLAY" not in name}
    words = [sys.executable, evaluate.__file__, str(folder), "--episodes", "1", "--video", str(path)]
    done = subprocess.run(words, env=environ, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    if done.returncode == 2:
        assert re.match(
            r"error: --video: InvertedPendulum-v5 cannot be drawn here: .*\nMuJoCo needs", done.stderr
        )
        assert not path.exists()
        pytest.skip(f"no OpenGL here: {done.stderr.splitlines()[0]}")
    assert (done.returncode, done.stderr) == (0, "")
    frames = imageio.imread(path)
    assert f"video   {path}: {len(frames)} frames, return " in done.stdout
    assert frames.shape[1:] == (480, 480, 3)
    assert frames.std() > 10 and np.abs(np.diff(frames.astype(int), axis=0)).mean() > 0.1


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (RuntimeError("no OpenGL"), "cannot be drawn here: RuntimeError: no OpenGL\nMuJoCo needs OpenGL"),
        (None, "--video: Line-v0 cannot be drawn, it has no rgb_array rendering"),
    ],
)
def test_an_environment_that_cannot_be_drawn(failure, message, finished, tmp_path, monkeypatch, capsys):
    """It is said before the evaluation begins."""

    def render(env):
        if failure:
            raise failure

    monkeypatch.setattr(line.Line, "render", render)
    with pytest.raises(UserError, match=message):
        score(finished, video=tmp_path / "line.mp4")
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_film_that_cannot_be_written(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "count_frames_and_secs", lambda path: (3, 0.1))
    with pytest.raises(UserError, match="--video: cannot write .*line.mp4, is the disk full"):
        score(finished, episodes=1, video=tmp_path / "line.mp4")
    assert list(tmp_path.iterdir()) == []


# --- Mistakes ---
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"script": "sac"}, "there is no script 'sac'; nearest names: dac"),
        ({"script": "tools/collect"}, "there is no script 'tools/collect'"),
        ({"args": {"beta_max": 10}}, "the checkpoint is of another version of dac.py: beta_max"),
        ({"args": {"hidden_dims": (8,)}}, r"the checkpoint does not fit Line-v0: .*actor\.layers"),
        ({"args": {"env_id": "Lime-v0"}}, "unknown task 'Lime-v0'; nearest names: Line-v0"),
    ],
)
def test_checkpoints_that_cannot_be_used(change, message, finished, tmp_path):
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    changed = {"args": checkpoint["args"] | change.get("args", {})}
    torch.save(checkpoint | change | changed, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=message):
        score(tmp_path)
    torch.save({"script": "dac", "args": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="the checkpoint lacks agent, step: it is not one of a run"):
        score(tmp_path)


def test_files_that_are_no_checkpoint(finished, tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(UserError, match=f"^there is no checkpoint at {path}"):
        score(tmp_path)
    whole = (finished / "checkpoint.pt").read_bytes()
    torch.save({"script": "dac", "args": Malicious(tmp_path / "harm")}, path)
    for content in (whole[: len(whole) // 2], b"", b"text", path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path} is no checkpoint, or a damaged one"):
            score(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "--episodes is 0; it must be at least 1"),
        ({"video": "line.gif"}, "--video line.gif is not a .mp4 file in a folder that exists"),
        ({"video": "none/line.mp4"}, "--video none/line.mp4 is not"),
        ({"device": "tpu"}, "--device tpu is not available"),
    ],
)
def test_mistakes(options, message, finished):
    if "video" in options:
        options = {"video": evaluate.Path(options["video"])}
    with pytest.raises(UserError, match=message):
        score(finished, **options)
