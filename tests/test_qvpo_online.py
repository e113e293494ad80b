"""What qvpo_online.py's golden file does not have; its memory, time limits, and tasks it must learn."""

import math
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from runs import before_call, random_batch, train

import qvpo_online
from common.cli import UserError, settings_for
from qvpo_online import Batch, Experience

CPU = torch.device("cpu")
BATCH, T, DIMS = 6, 4, 2  # states in an update, denoising steps, numbers in an action


def small_agent(**options):
    sizes = {"hidden_dims": (16, 16), "diffusion_steps": T, "time_dim": 8, "batch_size": BATCH}
    args = qvpo_online.Args(**sizes | {"num_train_samples": 5} | options)
    torch.manual_seed(0)
    return qvpo_online.QVPO(obs_dim=4, action_dim=DIMS, args=args, device=CPU)


# --- The update ---
def test_update_draws_two_batches_from_what_is_stored(monkeypatch):
    agent = small_agent(batch_size=500)
    data = Batch(*(torch.full((100, *column.shape[1:]), math.nan) for column in random_batch(qvpo_online)))
    for column, values in zip(data, random_batch(qvpo_online, 20), strict=True):
        column[:20] = values
    data.obs[:20, 0] = torch.arange(20)
    losses = (
        before_call(monkeypatch, agent, "critic_loss", {}),
        before_call(monkeypatch, agent, "actor_loss", {}),
    )
    agent.set_step(19)
    agent.update(data)
    seen = losses[0][0][0].obs, losses[1][0][0]
    for obs in seen:
        counts = np.bincount(obs[:, 0].int(), minlength=20)
        assert counts.min() > 5 and counts.sum() == 500
    assert not torch.equal(*seen)


# --- Experience ---
class Counter(gym.Env):
    """The observation counts the steps of an episode; it ends itself after `ends_after` steps."""

    action_space, observation_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-100, 100, (1,))

    def __init__(self, ends_after=None):
        self.ends_after = ends_after

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.array([0.0], np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.array([self.steps], np.float32), float(self.steps), self.steps == self.ends_after, False, {}


class Noisy(Counter):
    """Differs from one playing to the next, whatever the seed."""

    def step(self, action):
        return np.random.default_rng().normal(size=1).astype(np.float32), 0.0, False, False, {}


def experience_in(env, capacity=50, **options):
    return Experience(env, qvpo_online.Args(replay_size=capacity, **options), CPU)


def play(experience, steps):
    """Random actions; the finished episodes."""
    found = [experience.step(np.random.default_rng(i).uniform(-1, 1, 2)) for i in range(steps)]
    return [episode for episode in found if episode]


@pytest.mark.parametrize(
    ("ends_after", "limit", "flag", "terminal"),
    [
        (None, 3, False, [0, 0, 0, 0, 0, 0]),  # a time limit is not a terminal state ...
        (None, 3, True, [0, 0, 1, 0, 0, 1]),  # ... unless asked for, as in the official code
        (3, 100, False, [0, 0, 1, 0, 0, 1]),
        (3, 3, False, [0, 0, 1, 0, 0, 1]),  # both at once: the environment ended
    ],
)
def test_time_limits(ends_after, limit, flag, terminal):
    env = gym.wrappers.TimeLimit(Counter(ends_after), limit)
    experience = experience_in(env, 10, time_limit_is_terminal=flag)
    assert play(experience, 6) == [{"episode_return": 6.0, "episode_length": 3.0}] * 2
    data = experience.data
    assert data.terminal[:6].tolist() == terminal
    assert data.obs[:6, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert data.next_obs[:6, 0].tolist() == [1, 2, 3, 1, 2, 3]  # never that of the next episode
    assert data.reward[:6].tolist() == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("capacity", [4, 50])
@pytest.mark.parametrize("counts", [(0,), (3, 4, 1)])
def test_saving_and_loading(tmp_path, capacity, counts):
    experience = experience_in(Counter(ends_after=5), capacity)
    for steps in counts:
        play(experience, steps)
        state = experience.save(tmp_path)
    size = (tmp_path / "replay.bin").stat().st_size
    assert size == sum(counts) * 4 * (1 + 2 + 1 + 1 + 1)  # every transition once
    loaded = experience_in(Counter(ends_after=5), capacity)
    loaded.load(tmp_path, state)
    stored = min(capacity, sum(counts))
    assert torch.equal(loaded.rows[:stored], experience.rows[:stored])
    for name in ("count", "saved", "checksum", "episode_start", "episode_seed", "obs", "episode_return"):
        assert getattr(loaded, name) == getattr(experience, name), name
    assert loaded.env.steps == experience.env.steps == sum(counts) % 5
    assert play(loaded, 5) == play(experience, 5) != []


def test_what_a_crash_left_behind_the_checkpoint_is_dropped(tmp_path):
    experience = experience_in(Counter())
    play(experience, 3)
    state = experience.save(tmp_path)
    play(experience, 9)
    experience.save(tmp_path)
    loaded = experience_in(Counter())
    loaded.load(tmp_path, state)
    play(loaded, 2)
    state = loaded.save(tmp_path)
    assert (tmp_path / "replay.bin").stat().st_size == 5 * 4 * 6
    again = experience_in(Counter())
    again.load(tmp_path, state)
    assert torch.equal(again.rows[:5], loaded.rows[:5])


def test_every_transition_is_saved_before_it_is_replaced(tmp_path, monkeypatch):
    """Also where there are fewer places than steps between checkpoints."""
    rows, original = [], Experience.play

    def play(experience, action):
        row, over = original(experience, action)
        rows.append(row)
        return row, over

    monkeypatch.setattr(Experience, "play", play)
    folder = train(tmp_path, qvpo_online, replay_size=4, save_every=8)
    assert np.fromfile(folder / "replay.bin", np.float32).tolist() == torch.cat(rows).tolist()


def test_a_damaged_file(tmp_path):
    experience = experience_in(Counter())
    play(experience, 20)
    state, path = experience.save(tmp_path), tmp_path / "replay.bin"
    whole = path.read_bytes()
    one_bit_off = bytearray(whole)
    one_bit_off[100] ^= 1
    for content in (one_bit_off, whole[:-24], whole[:-1], b"", None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises((ValueError, OSError), match=re.escape(str(path))):
            experience_in(Counter()).load(tmp_path, state)


@pytest.mark.parametrize("env, capacity", [(Noisy(), 50), (Counter(), 5)], ids=["not repeatable", "no start"])
def test_an_episode_that_cannot_be_played_again(env, capacity, tmp_path, capsys):
    experience = experience_in(env, capacity)
    play(experience, 7)
    state = experience.save(tmp_path)
    loaded = experience_in(env, capacity)
    loaded.load(tmp_path, state)
    assert "the episode under way cannot be played again: a new one begins" in capsys.readouterr().out
    assert (loaded.count, loaded.episode_start, loaded.episode_return) == (7, 7, 0.0)
    assert loaded.episode_seed != state["episode_seed"]


# --- Whole runs ---
def test_more_actions_than_candidates(tmp_path):
    with pytest.raises(UserError, match="--num-chosen is 9, of only 4 candidates"):
        train(tmp_path / "runs", qvpo_online, num_chosen=9)
    assert not (tmp_path / "runs").exists()


def trained(task, **changes):
    """The results of a run with the settings of a task."""
    return qvpo_online.train(settings_for(qvpo_online.Args, qvpo_online.TASK_SETTINGS, task, **changes))


def test_learning_the_best_mode_of_a_bandit(tmp_path):
    """From random actions that reach the best corner now and then; only there the return is above 0.45."""
    short = {"total_steps": 1_000, "learning_starts": 200, "batch_size": 64, "num_train_samples": 8}
    short |= {"actor_lr": 1e-3, "critic_lr": 3e-3}
    results = trained("bandit-corners-v0", run_dir=str(tmp_path), **short)
    assert results["final"]["return"] > 0.7


@pytest.mark.slow
def test_learning_to_balance_a_pendulum(tmp_path):
    """An episode has at most 1000 steps with reward 1; random actions last 5 to 10 of them."""
    results = trained("InvertedPendulum-v5", total_steps=7_000, run_dir=str(tmp_path))
    assert results["best"]["return"] > 900
