"""Environments of all tasks: sizes, what they are refused for, and what one does that fails in the middle."""

import contextlib
import re
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.utils.env_checker import check_env
from recordings import write
from runs import ROOT

from common import envs
from common.datasets import load_dataset
from common.envs import make_env, make_online_env
from common.tasks import EnvironmentFailure, UserError


@pytest.mark.parametrize(
    ("task", "env_id", "obs_dim", "action_dim"),
    [
        ("hopper-medium-v2", "Hopper-v4", 11, 3),
        ("halfcheetah-random-v2", "HalfCheetah-v4", 17, 6),
        ("walker2d-full-replay-v2", "Walker2d-v4", 17, 6),
        ("ant-expert-v2", "Ant-v4", 111, 8),
        ("hopper-mini-v0", "Hopper-v4", 11, 3),
        ("Ant-v4", "Ant-v4", 27, 8),
        ("Pendulum-v1", "Pendulum-v1", 3, 1),
        ("AdroitHandPen-v1", "AdroitHandPen-v1", 45, 24),
    ],
)
def test_environments(task, env_id, obs_dim, action_dim):
    env = make_env(task)
    assert env.spec.id == env_id
    assert env.observation_space.shape == (obs_dim,)
    assert env.action_space == Box(-1, 1, (action_dim,))
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(env.action_space.sample())
    assert observation in env.observation_space
    if task.startswith("ant-"):
        assert (observation[27:] == 0).all() and (observation[:27] != 0).all()


def test_bandit_env():
    env = make_env("bandit-corners-v0")
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation, [0])
    observation, reward, terminated, truncated, _ = env.step(np.array([0.8, -0.8], np.float32))
    assert (reward, terminated, truncated) == (pytest.approx(1), True, False)
    check_env(env, skip_render_check=True)


def test_actions_are_scaled_to_the_environment():
    plain, scaled = gymnasium.make("Pendulum-v1"), make_env("Pendulum-v1")
    plain.reset(seed=0), scaled.reset(seed=0)
    np.testing.assert_allclose(scaled.step(np.float32([0.5]))[0], plain.step(np.float32([1.0]))[0], atol=1e-6)


def test_actions_are_clipped_as_in_d4rl():
    """Otherwise MuJoCo would clip the torque, but the reward count the cost of the whole action."""
    rewards = []
    for size in (1, 3):
        env = make_env("hopper-medium-v2")
        env.reset(seed=0)
        rewards.append(env.step(np.full(3, size, np.float32))[1])
    assert rewards[0] == rewards[1]


def test_tasks_without_an_environment_still_load(tmp_path):
    data = load_dataset("maze2d-umaze-v1", write(tmp_path / "data.hdf5"))
    with pytest.raises(UserError, match="environment of maze2d.* are not part of .*\n.*--eval-episodes 0"):
        data.make_env()


def test_environment_of_another_size(tmp_path):
    path = write(tmp_path / "data.hdf5", actions=np.zeros((10, 4), np.float32))
    sizes = "size 11 and actions of size 4, the environment of hopper-medium-v2 11 and 3"
    with pytest.raises(UserError, match=sizes):
        load_dataset("hopper-medium-v2", path).make_env()


@pytest.mark.parametrize("task", ["hopper-medium-v2", "mujoco/hopper/medium-v0"])
def test_nobody_learns_online_in_recorded_data(task):
    with pytest.raises(UserError, match=f"{task} names recorded data; .* such as Hopper-v4"):
        make_online_env(task)


def test_environments_are_made_silently_and_only_ours(tmp_path):
    """Nothing on the screen, no MuJoCo log in the working folder; warnings of other code stay."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import warnings; warnings.simplefilter('always')\n"
        "from common.envs import make_env\n"
        "tasks = ['AdroitHandPen-v1', 'halfcheetah-medium-v2', 'ant-medium-v2', 'Pendulum-v1', 'Hopper-v5']\n"
        "tasks += ['antmaze-umaze-v2', 'pen-human-v1', 'hammer-human-v1', 'kitchen-mixed-v0']\n"
        "for task in tasks:\n"
        "    env = make_env(task); env.reset(seed=0); env.step(env.action_space.sample())\n"
        "print('ours', file=sys.stderr)\n"
        "import gymnasium; gymnasium.make('HalfCheetah-v4')\n"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr.startswith("ours\n") and "out of date" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_environment_in_a_module_of_ones_own(tmp_path, monkeypatch):
    """module:Id, as gymnasium.make() has it."""
    monkeypatch.syspath_prepend(tmp_path)
    code = "import gymnasium\ngymnasium.register('Mine-v0', 'gymnasium.envs.mujoco.hopper_v4:HopperEnv')\n"
    (tmp_path / "my_robots.py").write_text(code)
    assert make_env("my_robots:Mine-v0").observation_space.shape == (11,)
    gymnasium.registry.pop("Mine-v0")
    (tmp_path / "my_arms.py").write_text("1 / 0")
    with pytest.raises(UserError, match="cannot import my_arms of my_arms:Mine-v0: ZeroDivisionError"):
        make_env("my_arms:Mine-v0")
    with pytest.raises(UserError, match="unknown task 'my_robots:Other-v0'; nearest names: "):
        make_env("my_robots:Other-v0")


# --- Environments that cannot be used ---


NOTHING = object()  # stands for an entry that is left out


class Toy(gymnasium.Env):
    """Observations (2,) and actions in [-1, 1]; the changes replace parts of what step() returns."""

    def __init__(self, observations=Box(-9, 9, (2,)), actions=Box(-1, 1, (1,)), error=None, **changes):  # noqa: B008
        self.observation_space, self.action_space = observations, actions
        self.error, self.changes = error, changes

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.changes.pop("first", np.zeros(2)), {}

    def step(self, action):
        if self.error:
            raise self.error
        given = {"obs": np.zeros(2), "reward": 1.0, "terminated": False, "truncated": False, "info": {}}
        return tuple(value for value in (given | self.changes).values() if value is not NOTHING)


@pytest.fixture
def toy():
    """Registers Toy-v0, with the given arguments."""

    def register(**kwargs):
        gymnasium.register("Toy-v0", Toy, kwargs=kwargs, disable_env_checker=True)
        return "Toy-v0"

    yield register
    gymnasium.registry.pop("Toy-v0", None)


@pytest.mark.parametrize(
    "spaces",
    [
        {"observations": Discrete(3)},
        {"observations": Dict(place=Box(-1, 1, (2,)), kind=Discrete(3))},
        {"observations": Dict()},
        {"observations": Box(-1, 1, (0,))},
        {"actions": Discrete(3)},
        {"actions": Box(-1, 1, (0,))},
        {"actions": Box(-1, 1, (2, 2))},
        {"actions": Box(-np.inf, np.inf, (2,))},
        {"actions": Box(0, 5, (2,), np.int32)},
        {"actions": Box(np.array([0, 1], np.float32), np.array([1, 1], np.float32))},
    ],
    ids=str,
)
def test_spaces_that_cannot_be_learned_in(spaces, toy):
    with pytest.raises(UserError, match="^Toy-v0: observations .* are not numbers"):
        make_env(toy(**spaces))


def test_an_environment_that_cannot_be_made():
    with pytest.raises(UserError, match="cannot make the environment of Hopper-v2: .*\n.*--eval-episodes 0"):
        make_env("Hopper-v2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": RuntimeError("the arm broke")}, "step.*: RuntimeError: the arm broke"),
        ({"reward": None}, "step.*: TypeError: .*NoneType"),
        ({"reward": np.ones(1)}, "step.*: TypeError"),
        ({"reward": np.nan}, "step.*: the reward is nan"),
        ({"reward": np.float32(-np.inf)}, "step.*: the reward is -inf"),
        ({"reward": 1e300}, r"step.*: the reward is 1e\+300"),
        ({"obs": np.array([0, np.nan])}, r"step.*: the observation is \[ 0. nan\]"),
        ({"obs": np.array([0, 1e300])}, "step.*: the observation is"),
        ({"obs": np.zeros(3)}, r"step.*: the observation is .*, not an array \(2,\)"),
        ({"obs": [0.0, 0.0]}, "step.*: the observation is .*, not an array"),
        ({"obs": np.array([None, 1])}, "step.*: TypeError"),
        ({"info": NOTHING}, "step.*: ValueError: not enough values to unpack"),
        ({"terminated": np.zeros(2)}, "step.*: ValueError: .*ambiguous"),
        ({"first": np.full(2, np.inf)}, r"reset.*: the observation is \[inf inf\]"),
    ],
)
@pytest.mark.parametrize("make", [make_env, make_online_env])
def test_an_environment_that_fails_in_the_middle(change, message, make, toy):
    env = make(toy(**change))
    with pytest.raises(EnvironmentFailure, match=f"^the environment of Toy-v0 failed in {message}"):
        env.reset(seed=0)
        env.step(np.zeros(1, np.float32))


def test_a_failure_names_its_line(toy):
    env = make_env(toy(error=RuntimeError("the arm broke")))
    env.reset(seed=0)
    with pytest.raises(EnvironmentFailure, match=rf"the arm broke \({re.escape(__file__)}:\d+\)$"):
        env.step(np.zeros(1, np.float32))


def test_an_action_that_is_not_finite_is_named(toy):
    env = make_env(toy(error=RuntimeError("unstable")))
    env.reset(seed=0)
    with pytest.raises(EnvironmentFailure, match="of an action that is not finite: RuntimeError: unstable"):
        env.step(np.array([np.nan], np.float32))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_failure(interrupt, monkeypatch):
    env = make_env("bandit-moons-v0")
    monkeypatch.setattr(env.unwrapped, "step", lambda action: (_ for _ in ()).throw(interrupt))
    env.reset(seed=0)
    with pytest.raises(interrupt):
        env.step(np.zeros(2))


def test_an_episode_without_an_end_is_cut(toy, monkeypatch):
    monkeypatch.setattr(envs, "LONGEST_EPISODE", 50)
    env = make_env(toy())
    for _ in range(2):
        env.reset(seed=0)
        outcomes = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(50)]
        assert outcomes == [(False, False)] * 49 + [(False, True)]
    with contextlib.closing(make_env("Pendulum-v1")) as limited:
        assert limited.spec.max_episode_steps == 200  # its own limit stays
