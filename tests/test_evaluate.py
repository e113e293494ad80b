"""tools/evaluate.py: the scripts' own numbers again, a film, and clear failures."""

import evaluate
import imageio.v3 as imageio
import line
import numpy as np
import pytest
import torch
from recordings import flags, write
from runs import AGENTS, finish, load_script, python, results_of, tiny_settings, train

import toolbox
from common.cli import UserError


@pytest.fixture(scope="module", params=AGENTS)
def finished_by(request, tmp_path_factory):
    """Folder of a run of each script, with four evaluation episodes of several steps."""
    return run_of(request.param, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_of("dac", tmp_path_factory.mktemp("finished"))


def run_of(script, folder, env_id="Line-v0", obs_dim=2):
    """The folder of a tiny run; its data, if it has any, is data.hdf5 beside the runs."""
    settings = {"env_id": env_id, "eval_episodes": 4}
    if script != "qvpo_online":
        random = np.random.default_rng(0)
        observations, actions = random.normal(size=(50, obs_dim)), random.uniform(-1, 1, size=(50, 1))
        fields = {"observations": observations, "actions": actions, "rewards": random.normal(size=50)}
        ends = {"terminals": flags(20, 48, length=50), "timeouts": flags(length=50)}
        settings["dataset"] = write(folder / "data.hdf5", **fields, **ends)
    return train(folder / "runs", load_script(script), **settings)


def score(path, *words, **options):
    return evaluate.main(evaluate.Args(path, **options), list(words))


# --- Scores ---
def test_the_final_evaluation_comes_out_again(finished_by):
    """Exactly, of every script, without the data that it was trained on; by default the starts are others."""
    (finished_by.parent.parent / "data.hdf5").unlink(missing_ok=True)
    own = results_of(finished_by)["evaluations"][-1]
    again, fresh = score(finished_by, episodes=4, first_seed=10_000), score(finished_by, episodes=4)
    assert len(set(own["returns"])) == 4
    for name in ("returns", "lengths", "first_seed"):
        assert again[name] == own[name]
    assert fresh["first_seed"] == 1_000_000 and not set(fresh["returns"]) & set(own["returns"])
    assert load_script(results_of(finished_by)["script"]).EVAL_SEED == 10_000  # for what is trained after it


def test_the_best_policy(tmp_path):
    """best.pt scores as the best evaluation did, also where the last one is another."""
    changes = {"env_id": "bandit-8gaussians-v0", "eval_episodes": 20, "num_action_samples": 1}
    run = train(tmp_path, load_script("dac"), **changes)
    own = [each["returns"] for each in results_of(run)["evaluations"]]
    assert (best := max(own, key=np.mean)) != own[-1]
    for path in (run, run / "checkpoint.pt"):
        assert score(path, episodes=20, first_seed=10_000, best=True)["returns"] == best


def test_arguments_of_the_environment(tmp_path):
    """The run's own, but for those that are given."""
    words = ("nested=true", "max_episode_steps=3")
    run = train(tmp_path / "runs", load_script("qvpo_online"), env_id="Line-v0", env_kwargs=words)
    assert score(run, episodes=2)["lengths"] == [3, 3]
    assert score(run, episodes=1, env_kwargs=("max_episode_steps=5",))["lengths"] == [5]


def test_acting_in_another_way(finished):
    """Arguments after -- replace the run's own, if the networks are the same."""
    own = score(finished, episodes=4)["returns"]
    number = tiny_settings(load_script("dac"), env_id="Line-v0").num_action_samples
    assert score(finished, "--num-action-samples", str(number), episodes=4)["returns"] == own
    assert score(finished, "--num-action-samples", "1", episodes=4)["returns"] != own
    with pytest.raises(UserError, match="--num-action-samples is 0; it must be"):
        score(finished, "--num-action-samples", "0")
    with pytest.raises(UserError, match="does not fit dac.py --hidden-dims 4 4: size mismatch"):
        score(finished, "--hidden-dims", "4", "4")
    with pytest.raises(SystemExit, match="^2$"):
        score(finished, "--number-of-samples", "1")


def test_screen(tmp_path, capsys):
    """On a task with reference returns, 0 and 1, and from the file instead of its folder."""
    path = train(tmp_path / "dac", load_script("dac"), num_action_samples=1) / "checkpoint.pt"
    returns = np.array(score(path, episodes=50)["returns"])
    out = capsys.readouterr().out
    assert "cpu, 50 episodes, seeds 1000000 to 1000049, none of which the training evaluated on\n" in out
    for name, values in (("return", returns), ("score ", 100 * returns)):
        low, high = toolbox.interval(values)
        interval = f"95 % interval of the mean {low:.5g} to {high:.5g}"
        assert f"\n{name}  {values.mean():.5g} +- {values.std():.4g}, {interval}\n" in out
    score(path, episodes=2, first_seed=10_001)
    assert "seeds 10001 to 10002, some of which the training" in capsys.readouterr().out
    run = train(tmp_path / "hopper", load_script("qvpo_online"), env_id="Hopper-v4")
    score(run, "--env-id", "Hopper-v5", episodes=1)
    assert "score   unknown: no reference returns are known for Hopper-v5" in capsys.readouterr().out


# --- Films ---
def test_video(finished, tmp_path, capsys):
    """A frame for every step, and what is drawn: white rows, as many as the place is high."""
    path = tmp_path / "line.mp4"
    score(finished, episodes=2, video=path)
    frames = imageio.imread(path)
    assert f"video   {path}: {len(frames)} frames, return " in capsys.readouterr().out and len(frames) > 1
    assert frames.shape[1:] == (32, 30, 3)  # 31 rows are no video
    white = (frames > 128).mean(axis=(1, 2, 3)) * 31
    env = line.Line()
    env.reset(seed=1_000_000)
    assert white[0] == pytest.approx(env.place + 15, abs=1.5)
    assert np.ptp(white) > 1
    assert imageio.immeta(path)["fps"] == 10
    assert [each.name for each in tmp_path.iterdir()] == ["line.mp4"]


def test_opengl_that_is_not_there(tmp_path):
    """MUJOCO_GL is named where a film is wanted."""
    run, nonsense = run_of("dac", tmp_path, "InvertedPendulum-v5", obs_dim=4), {"MUJOCO_GL": "bogus"}
    code, _, err = finish(python(evaluate.__file__, run, "--video", tmp_path / "film.mp4", env=nonsense))
    assert code == 2 and err.startswith("error: cannot make the environment of InvertedPendulum-v5: ")
    assert "MUJOCO_GL is bogus" in err and err.count("\n") == 2


def test_what_cannot_be_drawn(finished, tmp_path, monkeypatch, capsys):
    """It is said before the evaluation begins."""
    with pytest.raises(UserError, match="--video line.gif is not a .mp4 or .png file in a folder"):
        score(finished, video=evaluate.Path("line.gif"))
    monkeypatch.setattr(line.Line, "render", lambda env: None)
    with pytest.raises(UserError, match="Line-v0 cannot be drawn here: it has no rgb_array rendering"):
        score(finished, video=tmp_path / "line.mp4")
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


# --- Mistakes ---
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"results": {"script": "sac"}}, "there is no script 'sac'; nearest names: dac"),
        ({"args": {"beta_max": 10}}, "does not fit dac.py as it is today: .*beta_max"),
        ({"args": {"hidden_dims": (9,)}}, "does not fit dac.py as it is today: size mismatch"),
        ({"args": {"gamma": float("nan")}}, "--gamma is nan; it must be from 0 to 1"),
    ],
)
def test_checkpoints_that_cannot_be_used(change, message, finished, tmp_path):
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    for part, values in change.items():
        checkpoint[part] = checkpoint[part] | values
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=message):
        score(tmp_path)
