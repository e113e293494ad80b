"""Score a saved policy of any of the scripts, and film it.

    python tools/evaluate.py runs/hopper-mini-v0__dac__0__20261121-...          # the run's checkpoint
    python tools/evaluate.py checkpoint.pt --episodes 10                        # as the run itself evaluated
    python tools/evaluate.py checkpoint.pt --video hopper.mp4                   # and one episode as a film
    python tools/evaluate.py checkpoint.pt --video hopper.png                   # or as a strip of pictures
    python tools/evaluate.py runs/<run> -- --num-action-samples 50              # acting in another way

Script, arguments and task are read from the checkpoint. The evaluation is the script's own evaluate(), with
its seeds. docs/tools.md says more.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import Timer
from types import ModuleType
from typing import Annotated

import gymnasium as gym
import imageio.v2 as imageio
import mujoco
import numpy as np
import torch
import tyro
from imageio_ffmpeg import count_frames_and_secs
from torch import nn

import toolbox
from common.checkpoints import load_checkpoint
from common.datasets import task_reference
from common.devices import default_threads, use_device
from common.envs import make_env
from common.runs import run_command
from common.scores import normalized_score
from common.settings import Positive, check_bounds
from common.tasks import UserError

MOST_EPISODES = 10_000
OPENGL = """
MuJoCo needs OpenGL: without a screen or GPU, install Mesa's EGL (Debian: libegl1 and libgl1-mesa-dri), or
libosmesa6 and set MUJOCO_GL=osmesa."""


@dataclass
class Args:
    """The score of a saved policy; what stands after -- goes to its script: ... -- --num-action-samples 50"""

    checkpoint: Annotated[Path, tyro.conf.Positional]  # a checkpoint.pt, or the folder of its run
    episodes: Positive[int] = 100  # episodes, side by side; as many as in the run give its own numbers again
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:<i>
    num_threads: Positive[int] = default_threads()  # threads on a CPU; OMP_NUM_THREADS where that is set
    video: Path | None = None  # write a film of one more episode to this file, .mp4 or (eight frames) .png


def load_agent(
    path: Path, device: str, num_threads: int, words: Sequence[str] = ()
) -> tuple[ModuleType, object, nn.Module]:
    """The script that wrote a checkpoint, its arguments, and its agent as it was then, on the device.

    Words of the script's command line replace the arguments they name. UserError: they do not fit.
    """
    checkpoint = load_checkpoint(path)
    script = toolbox.load_script(str(checkpoint["results"].get("script")))
    try:
        args = script.Args(**checkpoint["args"])
        if words:
            args = tyro.cli(script.Args, args=words, default=args, prog=f"{script.__name__}.py")
        check_bounds(args)
        env = make_env(args.env_id, advice="a policy is scored in an environment")
        obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
        used = use_device(device, num_threads, args.matmul_precision)
        agent = toolbox.agent_class(script)(obs_dim, action_dim, args, used)
        agent.load_state_dict(checkpoint["agent"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        other = f"with {shlex.join(words)}" if words else "as it is today"
        raise UserError(f"{path} does not fit {script.__name__}.py {other}: {reason}") from error
    return script, args, agent


def describe(values: np.ndarray) -> str:
    """Mean and standard deviation, with the interval of the mean where there are several."""
    spread = f"{values.mean():.5g} +- {values.std():.4g}"
    ends = toolbox.interval(values)
    return f"{spread}, 95 % interval of the mean {ends[0]:.5g} to {ends[1]:.5g}" if ends else spread


def act_milliseconds(agent: nn.Module, obs_dim: int, batch: int) -> float:
    """How long act() takes for so many states, from and to the host."""
    obs = torch.zeros(batch, obs_dim)
    count, seconds = Timer(lambda: agent.act(obs.to(agent.device)).cpu()).autorange()
    return 1000 * seconds / count


# === Video ===
class Filmed(gym.Wrapper):
    """An environment that shows a frame before every step: the state that the action is for."""

    def __init__(self, env: gym.Env, video):
        super().__init__(env)
        self.video = video

    def step(self, action):
        self.video.append_data(self.render())
        return self.env.step(action)


class Strip(contextlib.AbstractContextManager):
    """Eight of the frames side by side, written in the end; used like imageio's writer."""

    def __init__(self, path: Path):
        self.path, self.frames = path, []

    def append_data(self, frame: np.ndarray) -> None:
        self.frames.append(frame[::3, ::3])

    def __exit__(self, *failure) -> None:
        shown = np.linspace(0, len(self.frames) - 1, 8).astype(int)
        imageio.imwrite(self.path, np.hstack([self.frames[i] for i in shown]))


def make_rendered_env(task: str) -> gym.Env:
    """An environment that draws itself, without a screen where there is none. UserError: it cannot."""
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        env = make_env(task, render_mode="rgb_array", advice="without --video it can still be scored")
        env.reset(seed=0)
        follow(env)
        frame = env.render()
    except UserError:
        raise
    except NotImplementedError:
        frame = None
    except Exception as error:  # of OpenGL, or of a package that draws and is not installed
        advice = OPENGL if hasattr(env.unwrapped, "mujoco_renderer") else ""
        reason = f"{type(error).__name__}: {error}{advice}"
        raise UserError(f"--video: {task} cannot be drawn here: {reason}") from error
    if not isinstance(frame, np.ndarray):
        raise UserError(f"--video: {task} cannot be drawn, it has no rgb_array rendering")
    return env


def follow(env: gym.Env) -> None:
    """Use the camera that follows a MuJoCo robot, if it has one; Gymnasium 1.4 takes one that stays."""
    if renderer := getattr(env.unwrapped, "mujoco_renderer", None):
        camera = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        renderer.camera_id = camera if camera >= 0 else renderer.camera_id


def film(path: Path, script: ModuleType, agent: nn.Module, env: gym.Env) -> str:
    """Play one episode and write it as a film or strip, whole or not at all; returns what to say of it."""
    part, fps = path.with_name(f".{path.stem}.part{path.suffix}"), env.metadata.get("render_fps", 30)
    is_strip = path.suffix == ".png"
    try:
        with Strip(part) if is_strip else imageio.get_writer(part, fps=fps, macro_block_size=2) as video:
            episode = script.evaluate(agent, [Filmed(env, video)])
        if not is_strip and count_frames_and_secs(part)[0] != episode["lengths"][0]:
            raise OSError("the file is incomplete")
        part.replace(path)
    except (OSError, RuntimeError) as error:  # imageio's, in writing or in counting
        reason = str(error).splitlines()[0]
        raise UserError(f"--video: cannot write {path}: {reason}") from error
    finally:
        part.unlink(missing_ok=True)
    return f"{path}: {episode['lengths'][0]:.0f} frames, return {episode['returns'][0]:.5g}"


# === The command ===
def main(args: Args, words: Sequence[str] = ()) -> dict:
    """Score, time and film a policy that acts as words ask for; returns the script's evaluation."""
    video = args.video
    if video and (video.suffix not in (".mp4", ".png") or not os.access(video.parent, os.W_OK)):
        raise UserError(f"--video {video} is not a .mp4 or .png file in a folder that can be written")
    if args.episodes > MOST_EPISODES:
        raise UserError(f"--episodes is {args.episodes}; side by side there can be {MOST_EPISODES}")
    script, run_args, agent = load_agent(args.checkpoint, args.device, args.num_threads, words)
    task = run_args.env_id
    rendered = make_rendered_env(task) if args.video else None
    print(f"{script.__name__} on {task}, seed {run_args.seed}: {args.checkpoint}")
    print(f"  {agent.device}, {args.episodes} episodes, seeds from {script.EVAL_SEED}")

    envs = [make_env(task) for _ in range(args.episodes)]
    evaluation = script.evaluate(agent, envs)
    returns, reference = np.array(evaluation["returns"]), task_reference(task)
    print(f"return  {describe(returns)}")
    if reference:
        print(f"score   {describe(normalized_score(returns, reference))}")
    else:
        print(f"score   unknown: no reference returns are known for {task}")
    print(f"length  {np.mean(evaluation['lengths']):.5g} steps per episode")
    obs_dim = envs[0].observation_space.shape[0]
    single, batch = act_milliseconds(agent, obs_dim, 1), act_milliseconds(agent, obs_dim, args.episodes)
    print(f"act()   {single:.3g} ms for one state, {batch:.3g} ms for {args.episodes} at once")
    if args.video:
        print(f"video   {film(args.video, script, agent, rendered)}")
    return evaluation


if __name__ == "__main__":
    run_command(partial(main, words=toolbox.take_words_for_scripts()), Args)
