"""What qvpo_online.py's golden file does not have; its memory, time limits, and tasks it must learn."""

import math
import re

import gymnasium as gym
import numpy as np
import pytest
import reference
import torch
from agents import check_no_waiting, random_batch
from pictures import FourModes, trained_online
from runs import before_call, folder_in, load, resume, train

import qvpo_online
from common.bandits import Bandit
from common.envs import make_online_env
from common.settings import settings_for
from common.tasks import EnvironmentFailure, UserError
from qvpo_online import Batch, Experience

CPU = torch.device("cpu")
BATCH, T, DIMS = 6, 4, 2  # states in an update, denoising steps, numbers in an action


def small_agent(**options):
    sizes = {"hidden_dims": (16, 16), "diffusion_steps": T, "time_dim": 8, "batch_size": BATCH}
    args = qvpo_online.Args(**sizes | {"num_train_samples": 5} | options)
    torch.manual_seed(0)
    return qvpo_online.QVPO(obs_dim=4, action_dim=DIMS, args=args, device=CPU)


def batch_of(size=BATCH):
    return random_batch(qvpo_online, size)


def predicted_noise(actor, obs, x_t, t):
    """Of one row, from the definition: one network that sees action, timestep and state side by side."""
    parameters = [
        [[getattr(linear, name).detach().numpy() for linear in linears] for name in ("weight", "bias")]
        for linears in (actor.time_mlp, actor.layers)
    ]
    embedding = reference.mlp(reference.sinusoidal(t - 1, 8), *parameters[0], reference.mish)
    return reference.mlp(np.concatenate([x_t, embedding, obs]), *parameters[1], reference.mish)


# --- Components ---
@pytest.mark.parametrize("num_entropy_samples", [0, 3])
def test_actor_loss(float64, num_entropy_samples):
    """Each chosen action, and beside it uniform ones with a share of its weight; a mean over all of them."""
    agent = small_agent(num_chosen=2, num_entropy_samples=num_entropy_samples)
    obs, draws = torch.randn(3, 4), agent.draw(3)
    agent.entropy_weight.fill_(0.3)
    chosen, weights = agent.choose(obs, draws.candidate_noise)
    total = 0.0
    for j, b in np.ndindex(2 * (1 + num_entropy_samples), 3):
        action = chosen[j, b] if j < 2 else draws.uniform_actions[j - 2, b]
        weight = weights[j % 2, b].item() * (1 if j < 2 else 0.3)
        t, eps = draws.t[j, b].item(), draws.eps[j, b]
        pairs = zip(action.tolist(), eps.tolist(), strict=True)
        x_t = np.array([reference.noisy(x, e, agent.schedule.alpha_bar[t]) for x, e in pairs])
        error = predicted_noise(agent.actor, obs[b].numpy(), x_t, t) - eps.numpy()
        total += weight * np.square(error).sum()
    loss, metrics = agent.actor_loss(obs, draws)
    assert loss.item() == pytest.approx(total / (2 * (1 + num_entropy_samples) * 3 * DIMS), abs=1e-12)
    assert metrics["weight"] == weights.mean()


def test_candidates_are_the_same_however_many_pass_at_a_time(float64):
    """On a CPU 1,024 rows go through the chain at a time: here 2 candidates of 400 states, then the third."""
    agent, obs, noise = small_agent(), torch.randn(400, 4), torch.randn(T, 3, 400, DIMS)
    actions, q = agent.candidates(obs, noise)
    for j in range(3):
        alone, q_alone = agent.candidates(obs, noise[:, j : j + 1])
        torch.testing.assert_close(actions[j : j + 1], alone)
        torch.testing.assert_close(q[j : j + 1], q_alone)


def test_uniform_actions_fill_the_cube():
    actions = small_agent().draw(1000).uniform_actions
    assert actions.shape == (10, 1000, DIMS)
    assert -1 <= actions.min() < -0.99 and 0.99 < actions.max() <= 1
    assert actions.mean().abs() < 0.03 and (actions.var() - 1 / 3).abs() < 0.02


@pytest.mark.parametrize(("name", "n"), [("act", 7), ("explore", 3)])
def test_acting_draws_its_number_of_candidates(name, n, monkeypatch):
    agent = small_agent(num_action_samples=7, num_behavior_samples=3)
    calls = before_call(monkeypatch, agent, "candidates", at={})
    getattr(agent, name)(torch.randn(5, 4))
    assert calls[0][1].shape == (T, n, 5, DIMS)


def test_initial_weights():
    torch.manual_seed(0)
    agent = qvpo_online.QVPO(obs_dim=40, action_dim=8, args=qvpo_online.Args(), device=CPU)
    actor, critic = agent.actor.layers, agent.critic.layers
    for weight, n_in in [(actor[0].weight, 80), (actor[1].weight, 256), (critic[0].weight, 48)]:
        assert weight.std().item() == pytest.approx(0.5 / math.sqrt(n_in), rel=0.02)
        assert weight.abs().max() > 1.5 / math.sqrt(n_in)  # not cut off at two or three standard deviations
    assert not actor[0].bias.any() and not critic[0].bias.any()


# --- The update ---
def test_update_draws_two_batches_from_what_is_stored(monkeypatch):
    agent, seen = small_agent(batch_size=500), []
    data = Batch(*(torch.full((100, *column.shape[1:]), math.nan) for column in batch_of()))
    for column, values in zip(data, batch_of(20), strict=True):
        column[:20] = values
    data.obs[:20, 0] = torch.arange(20)
    monkeypatch.setattr(agent, "critic_loss", lambda batch, draws: (seen.append(batch.obs), {}))
    monkeypatch.setattr(agent, "actor_loss", lambda obs, draws: (seen.append(obs), {}))
    monkeypatch.setattr(agent, "descend", lambda name, loss, metrics: metrics)
    agent.set_step(19)
    agent.update(data)
    for obs in seen:
        counts = np.bincount(obs[:, 0].int(), minlength=20)
        assert counts.min() > 5 and counts.sum() == 500
    assert not torch.equal(*seen)


@pytest.mark.parametrize("weight", ["qadv", "qcut"])
def test_update_never_waits_for_a_value(weight):
    agent = small_agent(weight=weight, num_chosen=2)
    agent.set_step(40)
    names = check_no_waiting(lambda: agent.update(batch_of(50)))
    assert "topk" in names


def test_what_depends_on_the_step():
    agent = small_agent(total_steps=1000, entropy_weight=0.5, entropy_weight_min=0.2, replay_size=300)
    expected = {0: (0.5, 1), 100: (0.45, 101), 299: (0.3505, 300), 600: (0.2, 300), 900: (0.2, 300)}
    for step, (entropy_weight, num_stored) in expected.items():
        agent.set_step(step)
        assert agent.entropy_weight.item() == pytest.approx(entropy_weight)
        assert agent.num_stored.item() == num_stored


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


def test_the_oldest_transitions_are_replaced():
    experience = experience_in(Counter(), 4)
    play(experience, 6)
    assert experience.data.obs[:, 0].tolist() == [4, 5, 2, 3]
    expected = [np.random.default_rng(i).uniform(-1, 1, 2).astype(np.float32) for i in (4, 5, 2, 3)]
    np.testing.assert_array_equal(experience.data.action, expected)


def test_actions_are_stored_as_the_agent_gave_them():
    experience = experience_in(make_online_env("Pendulum-v1"))  # whose actions are in [-2, 2]
    experience.step(np.array([0.5], np.float32))
    assert experience.data.action[0].item() == 0.5


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
        with pytest.raises(UserError, match=f"--resume: .*{re.escape(str(path))}"):
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
def test_what_is_no_number_is_never_stored(tmp_path, monkeypatch):
    """A NaN before learning starts ends the run; what it saves can be resumed."""
    original, offsets = Bandit.step, iter([0.0, 0.0, math.nan])

    def step(env, action):
        obs, *others = original(env, action)
        return obs + next(offsets, 0.0), *others

    monkeypatch.setattr(Bandit, "step", step)
    with pytest.raises(EnvironmentFailure, match="the observation is .*nan"):
        train(tmp_path, qvpo_online, learning_starts=5)
    folder = folder_in(tmp_path)
    stored = np.fromfile(folder / "replay.bin", np.float32)
    assert load(folder)["step"] == 2 and stored.size == 2 * 6 and np.isfinite(stored).all()
    assert resume(folder, qvpo_online)["finished"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_id": "Hopper-v3"}, r"environment of Hopper-v3: .*\n.* choose another --env-id"),
        ({"num_chosen": 9}, "--num-chosen is 9, of only 4 candidates"),
        ({"num_chosen": 0}, "--num-chosen is 0; it must be above 0"),
        ({"entropy_weight": 0.0}, "--entropy-weight is 0.0; it must be above 0"),
        ({"num_entropy_samples": -1}, "--num-entropy-samples is -1; it must be at least 0"),
        ({"replay_size": 0}, "--replay-size is 0; it must be above 0"),
    ],
)
def test_mistakes(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        train(tmp_path / "runs", qvpo_online, **changes)
    assert "--eval-episodes 0" not in str(error.value)  # there is no learning without an environment
    assert not (tmp_path / "runs").exists()


# --- Learning ---
def test_the_entropy_term_keeps_the_policy_wide():
    """In a bandit with four equally good modes: with it samples reach all of them, without it they collapse.

    Of 1000 samples at each of three times and with each of two seeds; the paper's Figure 2.
    """
    cheap = {"batch_size": 32, "diffusion_steps": 5, "num_train_samples": 8}
    widths, modes_reached = [], []
    for changes in ({}, {"num_entropy_samples": 0}):
        samples = [
            actions
            for seed in (0, 1)
            for actions in trained_online([500, 600, 750], seed, **cheap, **changes).values()
        ]
        distances = [np.linalg.norm(actions[:, None] - FourModes.modes, axis=2) for actions in samples]
        widths.append(np.mean([actions.std(0).mean() for actions in samples]))
        modes_reached.append(np.mean([((each < 0.3).sum(0) > 0).sum() for each in distances]))
    assert widths[0] > 0.26 > 0.23 > widths[1]
    assert modes_reached[0] > 3.8 > 3.5 > modes_reached[1]


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
