"""qvpo_online.py piece by piece against tests/reference.py; its memory, time limits, tasks it must learn."""

import math
import re

import gymnasium as gym
import numpy as np
import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qvpo_online
from common.datasets import UserError, make_online_env
from qvpo_online import Batch, Experience
from tools.qvpo_bandit import MODES
from tools.qvpo_bandit import train as train_bandit

CPU = torch.device("cpu")
WEIGHTS = ["qadv", "qcut", "qrelu", "qexpn", "qcut0n", "qcut1n"]


def small_agent(**options):
    settings = dict(hidden_dims=(16, 16), diffusion_steps=4, time_dim=8, num_train_samples=5, batch_size=6)
    torch.manual_seed(0)
    args = qvpo_online.Args(**qvpo_online.DEFAULT_SETTINGS | settings | options)
    return qvpo_online.QVPO(obs_dim=4, action_dim=2, args=args, device=CPU)


def random_batch(size=6):
    return Batch(
        obs=torch.randn(size, 4),
        action=torch.rand(size, 2) * 2 - 1,
        reward=torch.randn(size),
        next_obs=torch.randn(size, 4),
        terminal=(torch.arange(size) % 2).to(torch.get_default_dtype()),
    )


def noise_for(agent, rows):
    return torch.randn(agent.args.diffusion_steps, rows, 2)


def predicted_noise(actor, obs, x_t, t):
    """Of one row, from the definition: one network that sees action, timestep and state side by side."""
    frequencies = [10_000 ** (-i / 3) for i in range(4)]
    angles = [(t - 1) * frequency for frequency in frequencies]
    time = np.array([*map(math.sin, angles), *map(math.cos, angles)])
    parameters = [
        [[getattr(linear, name).detach().numpy() for linear in linears] for name in ("weight", "bias")]
        for linears in (actor.time_mlp, actor.layers)
    ]
    time = reference.mlp(time, *parameters[0], reference.mish)
    return reference.mlp(np.concatenate([x_t, time, obs]), *parameters[1], reference.mish)


def q_values(critic, obs, action):
    """Every critic's value of one state and one action."""
    values = []
    for h in range(critic.num_qs):
        weights = [layer.weight[h].T.detach().numpy() for layer in critic.layers]
        biases = [layer.bias[h, 0].detach().numpy() for layer in critic.layers]
        values.append(reference.mlp(np.concatenate([obs, action]), weights, biases, reference.mish)[0])
    return values


# --- Components ---
def test_noise_predictor(float64):
    agent, batch = small_agent(), random_batch()
    t = torch.tensor([1, 2, 3, 4, 1, 4])
    time_share = agent.actor.embed_time(4)[t]
    eps = agent.actor(agent.actor.embed_obs(batch.obs), time_share, batch.action)
    for row in range(6):
        inputs = batch.obs[row].numpy(), batch.action[row].numpy(), t[row].item()
        np.testing.assert_allclose(eps[row].detach(), predicted_noise(agent.actor, *inputs), atol=1e-12)


def test_sampler_adds_the_noise_of_the_posterior(float64):
    agent = small_agent(sampler_temperature=0.5)
    for t in range(1, 5):
        _, variance = reference.posterior(0.0, 0.0, t, agent.beta)
        assert agent.sigma[t] == pytest.approx(0.5 * math.sqrt(variance), abs=1e-12)
    assert small_agent(deterministic_eval=True).eval_sigma == [0.0] * 5


@pytest.mark.parametrize("rows", [1, 4, 1024])
def test_candidates_and_their_values(float64, rows, monkeypatch):
    """Row j * batch + b is candidate j of state b, however many rows go through the chain together."""
    monkeypatch.setattr(qvpo_online, "CPU_ROWS", rows)
    agent, obs = small_agent(), torch.randn(3, 4)
    noise = noise_for(agent, 6)
    actions, q = agent.candidates(obs, noise, agent.sigma)
    assert actions.shape == (2, 3, 2) and q.shape == (2, 3)
    for j in range(2):
        for b in range(3):
            x = noise[0, j * 3 + b].numpy()
            for t in range(4, 0, -1):
                eps, bar = predicted_noise(agent.actor, obs[b].numpy(), x, t), agent.alpha_bar[t]
                x_0 = np.clip((x - math.sqrt(1 - bar) * eps) / math.sqrt(bar), -1, 1)
                pairs = zip(x_0, x, strict=True)
                mean, variance = np.array([reference.posterior(*pair, t, agent.beta) for pair in pairs]).T
                z = noise[4 - t + 1, j * 3 + b].numpy() if t > 1 else 0.0
                x = mean + np.sqrt(variance) * z
            np.testing.assert_allclose(actions[j, b], x, atol=1e-10)
            assert q[j, b].item() == pytest.approx(min(q_values(agent.critic, obs[b].numpy(), x)), abs=1e-10)


def test_critic_loss(float64):
    agent, batch = small_agent(num_target_samples=3, gamma=0.9), random_batch()
    draws = agent.draw(6)
    loss, _ = agent.critic_loss(batch, draws)
    actions, _ = agent.candidates(batch.next_obs, draws.next_action_noise, agent.sigma, target=True)
    expected = 0.0
    for b in range(6):
        next_obs = batch.next_obs[b].numpy()
        next_q = max(min(q_values(agent.critic_target, next_obs, actions[j, b].numpy())) for j in range(3))
        target = batch.reward[b].item() + (0 if b % 2 else 0.9 * next_q)
        for q in q_values(agent.critic, batch.obs[b].numpy(), batch.action[b].numpy()):
            expected += (q - target) ** 2 / 6
    assert loss.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(float64, name):
    agent = small_agent(weight=name, weight_beta=1.5, weight_cut=0.3, weight_shift=0.4)
    agent.running_q_mean.fill_(0.1)
    agent.running_q_std.fill_(0.2)
    q, value = torch.linspace(-3, 3, 30), torch.linspace(1, -1, 30)
    settings = dict(beta=1.5, cut=0.3, shift=0.4, mean=0.1, std=0.2)
    pairs = zip(q.tolist(), value.tolist(), strict=True)
    expected = [reference.q_weight(name, *pair, **settings) for pair in pairs]
    np.testing.assert_allclose(agent.q_weights(q, value), expected, atol=1e-12)
    assert min(expected) < max(expected)


@pytest.mark.parametrize("num_chosen", [1, 3])
def test_chosen_actions(float64, num_chosen):
    agent, obs = small_agent(num_chosen=num_chosen, q_mean_rate=0.25, q_std_rate=0.5), torch.randn(6, 4)
    noise = noise_for(agent, 30)
    actions, q = agent.candidates(obs, noise, agent.sigma)  # (5, 6, 2), (5, 6)
    chosen, weight = agent.choose(obs, noise)
    for b in range(6):
        order = sorted(range(5), key=lambda j, b=b: -q[j, b].item())
        for k in range(num_chosen):
            row = b * num_chosen + k
            torch.testing.assert_close(chosen[row], actions[order[k], b])
            advantage = max(q[order[k], b].item() - q[:, b].mean().item(), 0)
            assert weight[row].item() == pytest.approx(advantage, abs=1e-12)
    assert agent.running_q_mean.item() == pytest.approx(0.25 * q.mean().item())
    assert agent.running_q_std.item() == pytest.approx(0.5 + 0.5 * np.std(q.numpy(), ddof=1))


@pytest.mark.parametrize("num_entropy_samples", [0, 3])
def test_actor_loss(float64, num_entropy_samples):
    """Each chosen action, and beside it uniform ones with a share of its weight; a mean over all of them."""
    agent = small_agent(num_chosen=2, num_entropy_samples=num_entropy_samples)
    obs, draws = torch.randn(3, 4), agent.draw(3)
    agent.entropy_weight.fill_(0.3)
    action, weight = agent.choose(obs, draws.candidate_noise)
    total, before = 0.0, [parameter.clone() for parameter in agent.actor.parameters()]
    _, alpha_bar = qvpo_online.noise_schedule("cosine", 4)
    for block in range(1 + num_entropy_samples):
        for row in range(6):
            a = action[row] if block == 0 else draws.uniform_actions[block - 1, row]
            w = weight[row].item() * (1 if block == 0 else 0.3)
            t, eps = draws.t[block, row].item(), draws.eps[block, row]
            pairs = zip(a.tolist(), eps.tolist(), strict=True)
            x_t = np.array([reference.noisy(x, e, alpha_bar[t]) for x, e in pairs])
            error = predicted_noise(agent.actor, obs[row // 2].numpy(), x_t, t) - eps.numpy()
            total += w * np.square(error).sum()
    metrics = agent.update_actor(obs, draws)
    expected = total / (6 * (1 + num_entropy_samples) * 2)
    assert metrics["actor_loss"].item() == pytest.approx(expected, abs=1e-12)
    assert metrics["actor_grad_norm"] > 0
    pairs = zip(before, agent.actor.parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in pairs)


def test_uniform_actions_fill_the_cube():
    actions = small_agent(num_entropy_samples=10).draw(1000).uniform_actions
    assert actions.shape == (10, 1000, 2)
    assert -1 <= actions.min() < -0.99 and 0.99 < actions.max() <= 1
    assert actions.mean().abs() < 0.03 and (actions.var() - 1 / 3).abs() < 0.02


@pytest.mark.parametrize("name", ["act", "explore"])
def test_acting_takes_the_best_of_its_candidates(float64, name):
    agent, obs = small_agent(num_action_samples=7, num_behavior_samples=3), torch.randn(5, 4)
    n = {"act": 7, "explore": 3}[name]
    noise = noise_for(agent, n * 5)
    candidates, _ = agent.candidates(obs, noise, agent.sigma)
    actions = getattr(agent, name)(obs, noise)
    for b in range(5):
        q = [q_values(agent.critic, obs[b].numpy(), candidates[j, b].numpy()) for j in range(n)]
        expected = reference.best_candidate(candidates[:, b].numpy(), list(zip(*q, strict=True)))
        np.testing.assert_array_equal(actions[b], expected)


def test_a_deterministic_evaluation_adds_no_noise(float64):
    agent, obs = small_agent(num_action_samples=1, deterministic_eval=True), torch.randn(5, 4)
    noise = noise_for(agent, 5)
    only_first = torch.cat([noise[:1], torch.zeros_like(noise[1:])])
    torch.testing.assert_close(agent.act(obs, noise), agent.act(obs, only_first))
    agent.args.num_behavior_samples = 1
    assert not torch.allclose(agent.explore(obs, noise), agent.explore(obs, only_first))


def test_initial_weights():
    torch.manual_seed(0)
    args = qvpo_online.Args(**qvpo_online.DEFAULT_SETTINGS)
    agent = qvpo_online.QVPO(obs_dim=40, action_dim=8, args=args, device=CPU)
    actor, critic = agent.actor.layers, agent.critic.layers
    for weight, n_in in [(actor[0].weight, 80), (actor[1].weight, 256), (critic[0].weight, 48)]:
        assert weight.std().item() == pytest.approx(0.5 / math.sqrt(n_in), rel=0.02)
        assert weight.abs().max() > 1.5 / math.sqrt(n_in)  # not cut off at two or three standard deviations
    assert not actor[0].bias.any() and not critic[0].bias.any()


# --- The update ---
def test_gradients_stay_where_they_belong():
    """Neither update computes gradients for a network that it does not train, or through a reverse chain."""
    agent, batch = small_agent(), random_batch()
    agent.update_critic(batch, agent.draw(6))
    assert all(parameter.grad is None for parameter in agent.actor.parameters())
    agent.critic.zero_grad()
    agent.update_actor(batch.obs, agent.draw(6))
    assert all(parameter.grad is not None for parameter in agent.actor.parameters())
    for network in (agent.critic, agent.critic_target, agent.actor_target):
        assert all(parameter.grad is None for parameter in network.parameters())
    actions, weight = agent.choose(batch.obs, noise_for(agent, 30))
    assert not actions.requires_grad and not weight.requires_grad


def test_update_draws_two_batches_from_what_is_stored(monkeypatch):
    agent = small_agent(batch_size=500)
    data = Batch(*(torch.full((100, *column.shape[1:]), math.nan) for column in random_batch()))
    for column, values in zip(data, random_batch(20), strict=True):
        column[:20] = values
    data.obs[:20, 0] = torch.arange(20)
    seen = []
    monkeypatch.setattr(agent, "update_critic", lambda batch, draws: seen.append(batch.obs) or {})
    monkeypatch.setattr(agent, "update_actor", lambda obs, draws: seen.append(obs) or {})
    agent.set_step(19)
    agent.update(data)
    for obs in seen:
        counts = np.bincount(obs[:, 0].int(), minlength=20)
        assert counts.min() > 5 and counts.sum() == 500
    assert not torch.equal(*seen)


@pytest.mark.parametrize("name", WEIGHTS)
def test_update_never_waits_for_a_value(name):
    """No operation that reads a number back to the host, or whose result's shape depends on one."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            names.add(operation._schema.name.removeprefix("aten::"))
            return operation(*args, **kwargs or {})

    agent, data, names = small_agent(weight=name, num_chosen=2), random_batch(50), set()
    agent.set_step(40)
    with Recorder():
        agent.update(data)
    assert {"addmm", "_fused_adam_", "topk", "randint"} <= names
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"} & names


def test_what_depends_on_the_step():
    agent = small_agent(
        total_steps=1000, entropy_weight=0.5, entropy_weight_min=0.2, replay_size=300, actor_target_every=3
    )
    expected = {
        0: (0.5, 1, True),
        100: (0.45, 101, False),
        299: (0.3505, 300, False),
        600: (0.2, 300, True),
        900: (0.2, 300, True),
    }
    for step, (entropy_weight, num_stored, moves) in expected.items():
        agent.set_step(step)
        assert agent.entropy_weight.item() == pytest.approx(entropy_weight)
        assert (agent.num_stored.item(), agent.actor_tau.item() > 0) == (num_stored, moves)


def test_targets_follow_after_both_updates():
    agent = small_agent(tau=0.25)
    agent.set_step(0)
    before = [agent.critic_target.layers[0].weight.clone(), agent.actor_target.layers[0].weight.clone()]
    agent.update(random_batch())
    for old, name in zip(before, ("critic", "actor"), strict=True):
        online, target = getattr(agent, name), getattr(agent, f"{name}_target")
        expected = 0.75 * old + 0.25 * online.layers[0].weight
        torch.testing.assert_close(target.layers[0].weight, expected)
        assert not torch.equal(target.layers[0].weight, old)


# --- Experience ---
class Counter(gym.Env):
    """The observation counts the steps of an episode; it ends itself after `ends_after` steps."""

    action_space, observation_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-100, 100, (1,))

    def __init__(self, ends_after=None):
        self.ends_after, self.resets = ends_after, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.resets = 0, self.resets + 1
        return np.array([0.0], np.float32), {}

    def step(self, action):
        self.steps += 1
        obs = np.array([self.steps], np.float32)
        return obs, float(self.steps), self.steps == self.ends_after, False, {}


class Noisy(Counter):
    """Differs from one playing to the next, whatever the seed."""

    def step(self, action):
        return np.random.default_rng().normal(size=1).astype(np.float32), 0.0, False, False, {}


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
    experience = Experience(env, 10, flag, CPU)
    episodes = play(experience, 6)
    assert episodes == [{"episode_return": 6.0, "episode_length": 3.0}] * 2
    data = experience.data
    assert data.terminal[:6].tolist() == terminal
    assert data.obs[:6, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert data.next_obs[:6, 0].tolist() == [1, 2, 3, 1, 2, 3]  # never that of the next episode
    assert data.reward[:6].tolist() == [1, 2, 3, 1, 2, 3]


def test_a_time_limit_is_bootstrapped(float64):
    """The target of a transition that a time limit cut off has the value of the next state in it."""
    agent, batch = small_agent(gamma=1.0), random_batch()
    agent.critic_target.layers[-1].bias.add_(5.0)  # next states are worth about 5
    draws = agent.draw(6)
    targets = [
        agent.critic_loss(batch._replace(terminal=torch.full((6,), end)), draws)[1]["target_mean"]
        for end in (0.0, 1.0)
    ]
    assert targets[1].item() == pytest.approx(batch.reward.mean().item())
    assert 4 < targets[0] - targets[1] < 6


def test_the_oldest_transitions_are_replaced():
    experience = Experience(Counter(), 4, False, CPU)
    play(experience, 6)
    assert experience.data.obs[:, 0].tolist() == [4, 5, 2, 3]
    expected = [np.random.default_rng(i).uniform(-1, 1, 2).astype(np.float32) for i in (4, 5, 2, 3)]
    np.testing.assert_array_equal(experience.data.action, expected)


@pytest.mark.parametrize("capacity", [4, 50])
def test_saving_and_loading(tmp_path, capacity):
    experience = Experience(Counter(ends_after=5), capacity, False, CPU)
    for steps in (3, 4, 1):
        play(experience, steps)
        state = experience.save(tmp_path)
    size = (tmp_path / "replay.bin").stat().st_size
    assert size == 8 * 4 * (1 + 2 + 1 + 1 + 1)  # every transition once
    loaded = Experience(Counter(ends_after=5), capacity, False, CPU)
    loaded.load(tmp_path, state)
    stored = min(capacity, 8)
    torch.testing.assert_close(loaded.rows[:stored], experience.rows[:stored], rtol=0, atol=0)
    for name in ("count", "saved", "checksum", "episode_start", "episode_seed", "obs", "episode_return"):
        assert getattr(loaded, name) == getattr(experience, name), name
    assert loaded.env.steps == experience.env.steps == 3
    assert play(loaded, 2) == play(experience, 2) != []


def test_what_a_crash_left_behind_the_checkpoint_is_dropped(tmp_path):
    experience = Experience(Counter(), 50, False, CPU)
    play(experience, 3)
    state = experience.save(tmp_path)
    play(experience, 9)
    experience.save(tmp_path)
    loaded = Experience(Counter(), 50, False, CPU)
    loaded.load(tmp_path, state)
    play(loaded, 2)
    state = loaded.save(tmp_path)
    assert (tmp_path / "replay.bin").stat().st_size == 5 * 4 * 6
    again = Experience(Counter(), 50, False, CPU)
    again.load(tmp_path, state)
    assert torch.equal(again.rows[:5], loaded.rows[:5])


def test_a_damaged_file(tmp_path):
    experience = Experience(Counter(), 50, False, CPU)
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
            Experience(Counter(), 50, False, CPU).load(tmp_path, state)


@pytest.mark.parametrize(
    ("env", "capacity"), [(Noisy(), 50), (Counter(), 5)], ids=["not repeatable", "its start is gone"]
)
def test_an_episode_that_cannot_be_played_again(env, capacity, tmp_path, capsys):
    experience = Experience(env, capacity, False, CPU)
    play(experience, 7)
    state = experience.save(tmp_path)
    loaded = Experience(env, capacity, False, CPU)
    loaded.load(tmp_path, state)
    assert "the episode under way cannot be played again: a new one begins" in capsys.readouterr().out
    assert (loaded.count, loaded.episode_start, loaded.episode_return) == (7, 7, 0.0)
    assert loaded.episode_seed != state["episode_seed"]


# --- Environments ---
def test_observations_of_any_shape_and_actions_of_any_range():
    class Odd(Counter):
        action_space = gym.spaces.Box(np.array([-0.2, 0.0], np.float32), np.array([0.6, 10.0], np.float32))
        observation_space = gym.spaces.Box(-1, 1, (2, 3))

        def reset(self, **options):
            super().reset(**options)
            return np.zeros((2, 3), np.float32), {}

        def step(self, action):
            self.received = action
            return np.ones((2, 3), np.float32), 0.0, False, False, {}

    gym.register("Odd-v0", Odd)
    try:
        env = make_online_env("Odd-v0")
        experience = Experience(env, 5, False, CPU)
        experience.step(np.array([-1.0, 0.5], np.float32))
        np.testing.assert_allclose(env.unwrapped.received, [-0.2, 7.5], rtol=1e-6)
        assert experience.data.obs.shape == (5, 6)
        assert experience.data.action[0].tolist() == [-1.0, 0.5]  # as the agent gave it
    finally:
        del gym.registry["Odd-v0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env_id": "Hoper-v4"}, "unknown task 'Hoper-v4'; nearest names: Hopper-v4"),
        ({"env_id": "CartPole-v1"}, r"CartPole-v1: .*Discrete\(2\) are not numbers .* continuous vector"),
        ({"env_id": "FrozenLake-v1"}, "FrozenLake-v1: observations Discrete"),
        ({"env_id": "hopper-medium-v2"}, "names recorded data; .* name an environment, such as Hopper-v4"),
        ({"env_id": "mujoco/hopper/medium-v0"}, "names recorded data"),
        (
            {"env_id": "Hopper-v3"},
            r"cannot make the environment of Hopper-v3: .*\n.* choose another --env-id",
        ),
        ({"dataset": "mine.hdf5"}, r"--dataset: qvpo_online\.py learns from what it does itself"),
        ({"num_chosen": 9}, "--num-chosen is 9, of only 4 candidates"),
        ({"num_chosen": 0}, "--num-chosen is 0; it must be at least 1"),
        ({"num_train_samples": 0}, "--num-train-samples is 0"),
        ({"num_entropy_samples": -1}, "--num-entropy-samples is -1; it must be at least 0"),
        ({"learning_starts": -1}, "--learning-starts is -1"),
        ({"replay_size": 0}, "--replay-size is 0"),
        ({"entropy_weight": -0.1}, "--entropy-weight is -0.1"),
    ],
)
def test_mistakes(changes, message, tmp_path):
    arguments = {"env_id": "bandit-moons-v0", "num_train_samples": 4, "run_dir": str(tmp_path / "runs")}
    with pytest.raises(UserError, match=message) as error:
        qvpo_online.train(qvpo_online.Args(**arguments | changes))
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
            for actions in train_bandit([500, 600, 750], seed, **cheap, **changes).values()
        ]
        distances = [np.linalg.norm(actions[:, None] - MODES, axis=2) for actions in samples]
        widths.append(np.mean([actions.std(0).mean() for actions in samples]))
        modes_reached.append(np.mean([((each < 0.3).sum(0) > 0).sum() for each in distances]))
    assert widths[0] > 0.26 > 0.23 > widths[1]
    assert modes_reached[0] > 3.8 > 3.5 > modes_reached[1]


def test_learning_the_best_mode_of_a_bandit(tmp_path):
    """From random actions that reach the best corner now and then; only there the return is above 0.45."""
    args = {"env_id": "bandit-corners-v0", "batch_size": 64, "run_dir": str(tmp_path)}
    results = qvpo_online.train(qvpo_online.Args(**args))
    assert results["final"]["return"] > 0.7


@pytest.mark.slow
def test_learning_to_balance_a_pendulum(tmp_path):
    """An episode has at most 1000 steps with reward 1; random actions last 5 to 10 of them."""
    args = {"env_id": "InvertedPendulum-v5", "total_steps": 7_000, "run_dir": str(tmp_path)}
    results = qvpo_online.train(qvpo_online.Args(**args))
    assert results["best"]["return"] > 900
