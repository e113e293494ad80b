"""Environments of all tasks: sizes, units, limits, and what they are refused for."""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from recordings import write
from runs import AGENTS, ROOT, finish, make_env, python, results_of, to_words, train

import dac
import qvpo_online
from common import envs
from common.cli import UserError
from common.tasks import find_task


@pytest.mark.parametrize(
    ("task", "env_id", "obs_dim", "action_dim"),
    [
        ("hopper-medium-v2", "Hopper-v4", 11, 3),
        ("walker2d-full-replay-v2", "Walker2d-v4", 17, 6),
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


def test_environment_of_another_size(tmp_path):
    path = write(tmp_path / "data.hdf5", actions=np.zeros((10, 4), np.float32))
    with pytest.raises(UserError, match=r"medium-v2 have sizes \[11, 3\], the data's \[11, 4\]"):
        make_env("hopper-medium-v2", dataset=path)


def test_environments_are_made_silently_and_only_ours(tmp_path):
    """Nothing on the screen, no MuJoCo log or maze in the working folder; warnings of other code stay.

    Two processes at the same time do not disturb each other's temporary files.
    """
    tasks = ["AdroitHandPen-v1", "halfcheetah-medium-v2", "antmaze-umaze-v2", "kitchen-mixed-v0"]
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import warnings; warnings.simplefilter('always')\n"
        "from common.envs import make_env; from common.tasks import find_task\n"
        "from types import SimpleNamespace\n"
        f"for task in {tasks}:\n"
        "    env = make_env(find_task(task), SimpleNamespace(env_kwargs=())); env.reset(seed=0)\n"
        "    env.step(env.action_space.sample())\n"
        "print('ours', file=sys.stderr)\n"
        "import gymnasium; gymnasium.make('HalfCheetah-v4')\n"
    )
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir(), temporary.mkdir()
    started = [python("-c", code, cwd=work, env={"TMPDIR": str(temporary)}) for _ in "12"]
    for process in started:
        code, out, err = finish(process)
        assert (code, out) == (0, "") and err.startswith("ours\n") and "out of date" in err, err
    assert not list(work.iterdir()) and not list(temporary.glob("*.xml"))


def test_an_environment_in_a_module_of_ones_own(tmp_path, monkeypatch):
    """module:Id, as gymnasium.make() has it, also with a namespace."""
    monkeypatch.syspath_prepend(tmp_path)
    code = "import gymnasium\n"
    for name in ("Mine-v0", "ours/Mine-v0"):
        code += f"gymnasium.register({name!r}, 'gymnasium.envs.mujoco.hopper_v4:HopperEnv')\n"
    (tmp_path / "my_robots.py").write_text(code)
    for name in ("Mine-v0", "ours/Mine-v0"):
        assert make_env(f"my_robots:{name}").observation_space.shape == (11,)
        gymnasium.registry.pop(name)
    (tmp_path / "my_arms.py").write_text("1 / 0")
    with pytest.raises(UserError, match="^cannot import my_arms .*: ZeroDivisionError"):
        find_task("my_arms:Mine-v0")
    with pytest.raises(UserError, match="unknown task 'my_robots:Other-v0'; nearest names: "):
        find_task("my_robots:Other-v0")
    with pytest.raises(UserError, match="my_legs .is its folder in PYTHONPATH.*No module named 'my_legs'"):
        find_task("my_legs:Mine-v0")


# --- Arguments, limits, drawing ---
def test_arguments_of_an_environment(tmp_path):
    """A value is JSON or text; in a run, too."""
    env = make_env("Hopper-v4", "healthy_reward=3.0", "healthy_z_range=[0.6, 9]", "max_episode_steps=7")
    assert (env.unwrapped._healthy_reward, env.unwrapped._healthy_z_range) == (3.0, [0.6, 9])
    assert env.spec.max_episode_steps == 7
    assert make_env("Walker2d-v5", "xml_file=walker2d_v5.xml").spec.kwargs["xml_file"] == "walker2d_v5.xml"
    assert not make_env("Hopper-v5", "terminate_when_unhealthy=False").unwrapped._terminate_when_unhealthy
    for task, word, message in (
        ("bandit-moons-v0", "wings=2", "cannot make the environment of bandit-moons-v0: .*wings"),
        ("Hopper-v4", "wings=2", "cannot make the environment of Hopper-v4: .*unexpected keyword"),
        ("Hopper-v4", "max_episode_steps=0", "to be positive, actually: 0"),
        ("Hopper-v4", "healthy_reward", "--env-kwargs healthy_reward is not key=value, such as"),
    ):
        with pytest.raises(UserError, match=message):
            make_env(task, word)
    data = write(tmp_path / "data.hdf5")
    given = dict(env_id="Hopper-v4", dataset=data, env_kwargs=("max_episode_steps=3",), reward_tune="none")
    results = results_of(train(tmp_path / "runs", dac, **given, total_steps=1))
    assert results["evaluations"][0]["lengths"] == [3, 3]


class Toy(gymnasium.Env):
    """Observations (2,) and actions in [-1, 1]; it never ends."""

    def __init__(self, observations=Box(-9, 9, (2,)), actions=Box(-1, 1, (1,))):  # noqa: B008
        self.observation_space, self.action_space = observations, actions

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}


@pytest.fixture
def toy():
    """Registers Toy-v0, with the given arguments."""

    def register(**kwargs):
        gymnasium.register("Toy-v0", Toy, kwargs=kwargs, disable_env_checker=True)
        return "Toy-v0"

    yield register
    gymnasium.registry.pop("Toy-v0", None)


def test_an_episode_without_an_end_is_cut_and_it_is_said(toy, monkeypatch, capsys):
    monkeypatch.setattr(envs, "LONGEST_EPISODE", 50)
    args = SimpleNamespace(env_kwargs=(), dataset=None)
    env = envs.make_envs(find_task(toy()), 2, args)[0]
    said = "Toy-v0 is cut after 50 steps; --env-kwargs max_episode_steps=...\n"
    assert capsys.readouterr().out == said
    for _ in range(2):
        env.reset(seed=0)
        assert [env.step(np.zeros(1, np.float32))[3] for _ in range(50)] == [False] * 49 + [True]
    for task, words, limit in (("Toy-v0", ("max_episode_steps=5",), 5), ("Pendulum-v1", (), 200)):
        args.env_kwargs = words
        assert envs.make_envs(find_task(task), 1, args)[0].spec.max_episode_steps == limit
    assert capsys.readouterr().out == ""


def test_what_mujoco_gl_names_need_not_work_where_nothing_is_drawn(tmp_path):
    """A film that names it: test_evaluate.py."""
    given = dict(env_id="hopper-mini-v0", run_dir=tmp_path, reward_tune="none") | AGENTS["dac"][1]
    words = to_words(**given | dict(total_steps=2, eval_every=2))
    code, out, err = finish(python("dac.py", *words, cwd=ROOT, env={"MUJOCO_GL": "osmesa"}))
    assert code == 0 and "finished: " in out, err


# --- Observations and actions ---
@pytest.mark.parametrize(
    ("space", "size"),
    [
        (Box(-9, 9, (), np.float64), 1),
        (Box(0, 9, (2,), np.int64), 2),
        (Box(0, 255, (2, 3), np.uint8), 6),
        (Dict(place=Box(-1, 1, (2,)), speed=Box(-1, 1, (1,), np.float64)), 3),
        (Dict(place=Box(-1, 1, (2,)), kind=Discrete(3)), 5),
    ],
    ids=["scalar", "integers", "matrix", "dict", "one of three"],
)
def test_other_observations(space, size, toy, tmp_path):
    """They become a vector of numbers, from which a script learns."""
    env = make_env(toy(observations=space))
    assert env.reset(seed=0)[0].shape == env.observation_space.shape == (size,)
    given = dict(env_id="Toy-v0", env_kwargs=("max_episode_steps=3",), total_steps=4, eval_every=4)
    assert results_of(train(tmp_path, qvpo_online, **given))["finished"]


@pytest.mark.parametrize(
    "space",
    [
        Discrete(3),
        Box(-1, 1, (2, 2)),
        Box(-np.inf, np.inf, (2,)),
        Box(0, 5, (2,), np.int32),
        Box(np.array([0, 1], np.float32), np.array([1, 1], np.float32)),
    ],
    ids=str,
)
def test_actions_that_cannot_be_learned(space, toy):
    with pytest.raises(UserError, match="^Toy-v0: actions .* are not a bounded continuous vector"):
        make_env(toy(actions=space))


@pytest.mark.parametrize("task", ["Hopper-v2", "Hopper-v3"])
def test_an_old_version_names_the_one_that_works(task):
    with pytest.raises(UserError, match=f"environment of {task}: [^$]*Gymnasium has Hopper-v4"):
        make_env(task)
