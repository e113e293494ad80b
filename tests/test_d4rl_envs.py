"""D4RL's AntMaze, Adroit and Kitchen, rebuilt: observations, rewards, horizons, starts, ends."""

import numpy as np
import pytest
from runs import make_env

from common.d4rl_envs import HAND_TO_OBJECT, make_d4rl_env
from common.tasks import D4RL_TASKS

ADROIT = ["pen-human-v1", "door-human-v1", "hammer-human-v1", "relocate-human-v1"]
MAPS = """
#####  ########  ############
#S  #  #S ##  #  #S   #     #
### #  #  #   #  # ## # # # #
#G  #  ##   ###  #      #   #
#####  #  #   #  # #### ### #
       # #  # #  #  # #     #
       #   # G#  ## # # # ###
       ########  #  #   # G #
                 ############
"""  # of d4rl/locomotion/maze_env.py: # wall, S start, G goal
COLUMNS = {"umaze": slice(0, 5), "medium": slice(7, 15), "large": slice(17, 29)}
D4RL_MAZES = {
    size: [line[of] for line in MAPS.splitlines() if line[of].strip()] for size, of in COLUMNS.items()
}


def goal_of(maze):
    """x and y (2,) of the goal in D4RL's frame, in metres."""
    return maze.maze.goal - maze.origin


def random_steps(env, count, seed=0):
    """(observation, reward, terminated, truncated) after each of up to `count` random actions."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        obs, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape))
        yield obs, reward, terminated, truncated
        if terminated or truncated:
            return


@pytest.mark.parametrize(
    ("task", "obs_dim", "action_dim"),
    [
        ("antmaze-umaze-v0", 29, 8),
        ("antmaze-large-diverse-v2", 29, 8),
        ("pen-cloned-v1", 45, 24),
        ("door-expert-v1", 39, 28),
        ("hammer-human-v1", 46, 26),
        ("relocate-human-v1", 39, 30),
        ("kitchen-complete-v0", 60, 9),
        ("kitchen-mixed-v0", 60, 9),
    ],
)
def test_sizes_seeds_and_horizon(task, obs_dim, action_dim):
    env = make_env(task)
    first, _ = env.reset(seed=3)
    assert first.shape == env.observation_space.shape == (obs_dim,) and first.dtype == np.float64
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    np.testing.assert_array_equal(env.reset(seed=3)[0], first)
    assert (env.reset(seed=4)[0] != first).any()
    assert env.get_wrapper_attr("_max_episode_steps") == D4RL_TASKS[task]["horizon"]


# --- AntMaze ---
@pytest.mark.parametrize("size", ["umaze", "medium", "large"])
def test_antmaze_has_walls_start_and_goal_where_d4rl_has_them(size):
    """Cell (row, column) of D4RL's map is centred at 4 (column - 1), 4 (row - 1), in its frame."""
    env = make_d4rl_env(f"antmaze-{size}", max_episode_steps=1000)
    model, origin = env.maze.ant_env.model, env.origin
    blocks = [i for i in range(model.ngeom) if model.geom(i).name.startswith("block")]
    walls = {tuple(np.round(model.geom_pos[i, :2] - origin, 9)) for i in blocks}
    cells = {(r, c): cell for r, row in enumerate(D4RL_MAZES[size]) for c, cell in enumerate(row)}
    assert walls == {(4.0 * c - 4, 4.0 * r - 4) for (r, c), cell in cells.items() if cell == "#"}
    np.testing.assert_array_equal(model.geom_size[blocks], [[2, 2, 1]] * len(blocks))

    row, column = next(place for place, cell in cells.items() if cell == "G")
    offsets, starts = [], []
    for seed in range(200):
        starts.append(env.reset(seed=seed)[0])
        offsets.append(goal_of(env) - [4 * column - 4, 4 * row - 4])
    assert np.min(offsets) >= 0 and np.max(offsets) <= 1.5
    np.testing.assert_allclose(np.mean(offsets, axis=0), 0.75, atol=0.1)  # U(0, 1) + U(0, 0.5)
    starts = np.array(starts) - [0, 0, 0.75, 1, *[0] * 25]
    assert np.abs(starts[:, :15]).max() <= 0.1 and np.abs(starts[:, :15]).max() > 0.099
    np.testing.assert_allclose(starts[:, 15:].std(axis=0), 0.1, rtol=0.2)


def test_antmaze_observes_a_state_of_the_data_as_it_was_recorded():
    """qpos (15), beginning with x and y in D4RL's frame, and qvel (14)."""
    env = make_d4rl_env("antmaze-umaze-v2", max_episode_steps=700)
    env.reset(seed=0)
    joints, velocities = np.linspace(-0.5, 1, 8), np.linspace(-2, 3, 14)
    recorded = np.array([8.3, 0.7, 0.6, 0.9, 0.1, -0.2, 0.37, *joints, *velocities])
    place_ant(env, recorded)
    ant = env.maze.ant_env
    np.testing.assert_allclose(env.flat(env.maze._get_obs(ant._get_obs())), recorded, atol=1e-12)
    _, reward, *_ = env.step(np.zeros(8))
    assert reward == 0 and np.abs(ant.data.qpos[:2] - env.origin - recorded[:2]).max() < 0.5


def place_ant(env, obs):
    qpos = np.concatenate([obs[:2] + env.origin, obs[2:15]])
    env.maze.ant_env.set_state(qpos, obs[15:])


def test_antmaze_rewards_and_ends_within_half_a_metre_of_the_goal():
    env = make_d4rl_env("antmaze-large-play-v2", max_episode_steps=1000)
    start, _ = env.reset(seed=0)
    for distance in (0.4, 0.48, 0.55, 1.0):
        obs = start.copy()
        obs[:2], obs[15:] = goal_of(env) + [distance, 0], 0
        place_ant(env, obs)
        after, reward, terminated, truncated, info = env.step(np.zeros(8))
        reached = np.linalg.norm(after[:2] - goal_of(env)) <= 0.5
        assert reached == (distance < 0.5)  # the ant has hardly moved
        assert (reward, terminated, info["success"]) == (float(reached), reached, reached) and not truncated


def test_antmaze_has_the_ant_of_d4rl():
    """d4rl/locomotion/assets/ant.xml: steps of 0.02 s, five a step, torques up to 30, solimp .8 .8 .01."""
    env = make_d4rl_env("antmaze-umaze-v2", max_episode_steps=700)
    env.reset(seed=0)
    ant = env.maze.ant_env
    env.step(np.full(8, 0.5))
    assert ant.data.time == pytest.approx(0.1)
    np.testing.assert_allclose(np.sort(np.abs(ant.data.qfrc_actuator))[-8:], 15)
    np.testing.assert_array_equal(ant.model.geom_solimp[:, :3], [[0.8, 0.8, 0.01]] * ant.model.ngeom)
    np.testing.assert_array_equal(ant.model.geom_solref, [[0.02, 1]] * ant.model.ngeom)


# --- Adroit ---
def adroit_state(env, task, solved):
    """After random steps; if `solved`, with door open, nail in, object at the target, pen as desired."""
    env.reset(seed=0)
    list(random_steps(env, 20 if task != "pen" else 2))
    inner = env.unwrapped
    if solved:
        qpos, qvel = inner.data.qpos.copy(), np.zeros_like(inner.data.qvel)
        if task == "door":
            qpos[inner.door_hinge_addrs] = 1.45
        elif task == "hammer":
            qpos[26] = 0.09  # the nail
        elif task == "relocate":
            target = inner.model.site_pos[inner.target_obj_site_id]
            qpos[30:33] = target - inner.model.body_pos[inner.obj_body_id]
        else:
            inner.model.body_quat[inner.target_obj_body_id] = inner.data.xquat[inner.obj_body_id]
        inner.set_state(qpos, qvel)
    return env.step(np.zeros(env.action_space.shape))


def adroit_reward(task, obs, inner):
    """D4RL's rewards (d4rl/hand_manipulation_suite/*_v0.py), from observations as far as these suffice."""
    norm = np.linalg.norm
    if task == "door":
        hinge = obs[28]
        bonus = 2 * (hinge > 0.2) + 8 * (hinge > 1) + 10 * (hinge > 1.35)
        reach = -0.1 * norm(obs[29:32] - obs[32:35])
        return reach - 0.1 * (hinge - 1.57) ** 2 - 1e-5 * np.square(inner.data.qvel).sum() + bonus
    if task == "hammer":
        tool = inner.data.site("tool").xpos
        nail, nail_goal = obs[42:45], inner.data.site("nail_goal").xpos
        bonus = 2 * (obs[38] > 0.04 and tool[2] > 0.04)
        bonus += 25 * (norm(nail - nail_goal) < 0.02) + 75 * (norm(nail - nail_goal) < 0.01)
        reach = -0.1 * norm(obs[33:36] - obs[36:39]) - norm(tool - nail)
        return reach - 10 * norm(nail - nail_goal) - 0.01 * norm(inner.data.qvel) + bonus
    if task == "relocate":
        palm_object, palm_target, object_target = obs[30:33], obs[33:36], obs[36:39]
        lifted = inner.data.body("Object").xpos[2] > 0.04
        carry = lifted * (1 - 0.5 * norm(palm_target) - 0.5 * norm(object_target))
        bonus = 10 * (norm(object_target) < 0.1) + 20 * (norm(object_target) < 0.05)
        return -0.1 * norm(palm_object) + carry + bonus
    distance, similarity = norm(obs[39:42]), obs[33:36] @ obs[36:39]  # pen
    bonus = 10 * (distance < 0.075 and similarity > 0.9) + 50 * (distance < 0.075 and similarity > 0.95)
    return -distance + similarity + bonus - 5 * (obs[26] < 0.075)


@pytest.mark.parametrize("task", ADROIT)
@pytest.mark.parametrize(("solved", "at_least"), [(False, -20), (True, 15)])
def test_adroit_rewards_as_d4rl_does(task, solved, at_least):
    env, family = make_env(task), task.split("-")[0]
    obs, reward, *_ = adroit_state(env, family, solved)
    assert reward == pytest.approx(adroit_reward(family, obs, env.unwrapped), abs=1e-9)
    assert at_least < reward < at_least + 100
    if family != "pen":
        assert np.linalg.norm(HAND_TO_OBJECT[family](obs)) > 0.01  # else the sign would not show


def test_the_pen_ends_when_it_drops():
    env = make_env("pen-human-v1")
    for seed in range(5):
        env.reset(seed=seed)
        steps = list(random_steps(env, 200, seed))
        heights = [obs[26] for obs, *_ in steps]
        assert [terminated for _, _, terminated, _ in steps] == [height < 0.075 for height in heights]
        for obs, reward, *_ in steps:
            assert reward == pytest.approx(adroit_reward("pen", obs, None), abs=1e-9)
        if steps[-1][2]:
            return
    pytest.fail("no pen was dropped in five episodes")


# --- Kitchen ---
def set_joints(env, values):
    inner = env.unwrapped.robot_env
    qpos = inner.data.qpos.copy()
    for index, value in values.items():
        qpos[index] = value
    inner.set_state(qpos, np.zeros_like(inner.data.qvel))


DONE = {  # joint positions that make a subtask done
    "microwave": {22: -0.75},
    "light switch": {17: -0.69, 18: -0.05},
    "slide cabinet": {19: 0.37},
    "bottom burner": {11: -0.88, 12: -0.01},
    "kettle": dict(zip(range(23, 30), [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06], strict=True)),
}


def test_kitchen_observes_joints_objects_and_the_goal():
    env = make_env("kitchen-mixed-v0")
    env.reset(seed=0)
    values = {index: value for joints in DONE.values() for index, value in joints.items()}
    set_joints(env, values)
    obs, *_ = env.step(np.zeros(9))
    qpos = env.unwrapped.robot_env.data.qpos
    assert 0 < np.abs(obs[:9] - qpos[:9]).max() <= 0.01  # noise of 0.1 of 0.1
    assert 0 < np.abs(obs[9:30] - qpos[9:30]).max() <= 0.01
    goal = np.zeros(30)
    for subtask in ("microwave", "kettle", "bottom burner", "light switch"):
        for index, value in DONE[subtask].items():
            goal[index] = value
    np.testing.assert_array_equal(obs[30:], goal)


def test_kitchen_rewards_each_subtask_once_and_ends_after_four():
    env = make_env("kitchen-complete-v0")
    env.reset(seed=0)
    rewards, ends = [], []
    for subtask in ("microwave", None, "bottom burner", "light switch", "slide cabinet", "kettle"):
        set_joints(env, DONE.get(subtask, {}))
        _, reward, terminated, truncated, _ = env.step(np.zeros(9))
        rewards.append(reward)
        ends.append(terminated)
        assert not truncated
    assert rewards == [1, 0, 0, 1, 1, 1]  # the bottom burner is not among the four
    assert ends == [False] * 5 + [True]
