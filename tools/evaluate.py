"""Score a saved policy of any of the scripts on starts that its training never saw, and film it.

    python tools/evaluate.py runs/hopper-mini-v0__dac__0__20261121-...          # the run's last policy
    python tools/evaluate.py runs/<run> --best                                  # that of its best evaluation
    python tools/evaluate.py runs/<run> --episodes 10 --first-seed 10000        # as the run itself evaluated
    python tools/evaluate.py runs/<run> --video hopper.mp4                      # one episode as a film
    python tools/evaluate.py runs/<run> --video hopper.png                      # or as a strip of pictures
    python tools/evaluate.py runs/<run> -- --num-action-samples 50              # acting in another way

Script, arguments and task are the checkpoint's, the evaluation is the script's own: docs/tools.md says more.
"""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import tyro
from imageio_ffmpeg import count_frames_and_secs
from torch import nn

import toolbox
from common.checkpoints import load_checkpoint
from common.cli import NonNegative, Positive, Threads, UserError, check_bounds, run_command
from common.devices import use_device
from common.envs import make_env
from common.scores import normalized_score, reference_returns
from common.tasks import find_task

OPENGL = "without a screen it takes libegl1 and libgl1-mesa-dri (Debian), or libosmesa6 and MUJOCO_GL=osmesa"


@dataclass
class Args:
    """The score of a saved policy; what stands after -- goes to its script: ... -- --num-action-samples 50"""

    checkpoint: Annotated[Path, tyro.conf.Positional]  # the folder of a run, or a checkpoint.pt
    best: bool = False  # the policy of the run's best evaluation, best.pt, instead of its last one
    episodes: Positive[int] = 100  # episodes, side by side
    first_seed: NonNegative[int] = 1_000_000  # of the first episode; training evaluates from 10000 upwards
    env_kwargs: tuple[str, ...] = ()  # replace the run's own, one by one: max_episode_steps=500
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:<i>
    num_threads: Threads[int] = 1  # threads on a CPU
    video: Path | None = None  # write a film of one more episode to this file, .mp4 or (eight frames) .png


def describe(values: np.ndarray) -> str:
    """Mean and standard deviation, with the interval of the mean where there are several."""
    ends = toolbox.interval(values)
    spread = f"{values.mean():.5g} +- {values.std():.4g}"
    return f"{spread}, 95 % interval of the mean {ends[0]:.5g} to {ends[1]:.5g}" if ends else spread


# === Video ===
class Filmed(gym.Wrapper):
    """An environment that shows a frame before every step: the state that the action is for."""

    def __init__(self, env: gym.Env, show: Callable):
        super().__init__(env)
        self.show = show

    def step(self, action):
        self.show(self.render())
        return self.env.step(action)


def make_rendered_env(args) -> gym.Env:
    """An environment that draws itself, without a screen where there is none. UserError: it cannot."""
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL") or "egl"
    env = make_env(find_task(args.env_id), args, render_mode="rgb_array")
    try:
        if renderer := getattr(env.unwrapped, "mujoco_renderer", None):
            import mujoco  # not before it draws: the import fails where MUJOCO_GL names what is not there

            camera = mujoco.mj_name2id(renderer.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")  # it follows
            renderer.camera_id = camera if camera >= 0 else renderer.camera_id
        env.reset(seed=0)
        if not isinstance(env.render(), np.ndarray):
            raise TypeError("it has no rgb_array rendering")
    except Exception as error:  # of OpenGL, or of a package that draws and is not installed
        reason = f"{args.env_id} cannot be drawn here: {str(error) or type(error).__name__}"
        raise UserError(f"--video: {reason}; {OPENGL}") from error
    return env


def film(path: Path, play: Callable, env: gym.Env) -> str:
    """Play one episode and write it, as a film or as eight frames; returns what to say of it."""
    part, frames = path.with_name(f".{path.stem}.part{path.suffix}"), []
    try:
        if path.suffix == ".png":
            episode = play([Filmed(env, lambda frame: frames.append(frame[::3, ::3]))])
            shown = np.linspace(0, len(frames) - 1, 8).astype(int)
            imageio.imwrite(part, np.hstack([frames[i] for i in shown]))
        else:
            fps = env.metadata.get("render_fps", 30)
            with imageio.get_writer(part, fps=fps, macro_block_size=2) as video:
                episode = play([Filmed(env, video.append_data)])
            if count_frames_and_secs(part)[0] != episode["lengths"][0]:  # as on a full disk
                raise OSError("the file is incomplete")
        part.replace(path)
    except OSError as error:
        raise UserError(f"--video: cannot write {path}: {str(error).splitlines()[0]}") from error
    finally:
        part.unlink(missing_ok=True)
    return f"{path}: {episode['lengths'][0]:.0f} frames, return {episode['returns'][0]:.5g}"


# === The command ===
def evaluate(script: ModuleType, agent: nn.Module, first_seed: int, envs: list[gym.Env]) -> dict:
    """What the script's evaluate() returns for episodes seeded first_seed, first_seed + 1, ..."""
    own, script.EVAL_SEED = script.EVAL_SEED, first_seed
    try:
        return script.evaluate(agent, envs)
    finally:
        script.EVAL_SEED = own


def main(args: Args, words: Sequence[str] = ()) -> dict:
    """Score and film a policy that acts as words ask for; returns the script's evaluation."""
    video, path, last = args.video, args.checkpoint, args.first_seed + args.episodes - 1
    if video and (video.suffix not in (".mp4", ".png") or not os.access(video.parent, os.W_OK)):
        raise UserError(f"--video {video} is not a .mp4 or .png file in a folder that can be written")
    if args.best:
        path = (path if path.is_dir() else path.parent) / "best.pt"
    checkpoint = load_checkpoint(path)
    script = toolbox.load_script(checkpoint["results"]["script"])
    misfit = f"{path} does not fit {script.__name__}.py {shlex.join(words) or 'as it is today'}"
    try:
        run_args = script.Args(**checkpoint["args"])
    except TypeError as error:
        raise UserError(f"{misfit}: {error}") from error
    if words:
        run_args = tyro.cli(script.Args, args=words, default=run_args, prog=f"{script.__name__}.py")
    check_bounds(run_args)
    run_args = replace(run_args, env_kwargs=(*run_args.env_kwargs, *args.env_kwargs))
    task = find_task(run_args.env_id)
    rendered = make_rendered_env(run_args) if video else None  # the first: whether it draws is settled once
    envs = [make_env(task, run_args) for _ in range(args.episodes)]
    sizes = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    device = use_device(args.device, args.num_threads, run_args.matmul_precision)
    agent = toolbox.agent_class(script)(*sizes, run_args, device)
    try:
        agent.load_state_dict(checkpoint["agent"])
    except RuntimeError as error:
        raise UserError(f"{misfit}: {str(error).splitlines()[-1].strip()}") from error
    own = [each["first_seed"] + len(each["returns"]) for each in checkpoint["results"]["evaluations"]]
    fresh = "none" if args.first_seed >= max(own, default=0) else "some"
    print(f"{script.__name__} on {task.name}, seed {run_args.seed}, step {checkpoint['step']:,}: {path}")
    seeds = f"seeds {args.first_seed} to {last}, {fresh} of which the training evaluated on"
    print(f"  {device}, {args.episodes} episodes, {seeds}")

    play = partial(evaluate, script, agent, args.first_seed)
    evaluation = play(envs)
    returns, trained = np.array(evaluation["returns"]), checkpoint["results"]
    is_same = task.name == trained["env_id"]  # another environment has its own
    reference = trained["reference_returns"] if is_same else reference_returns(task.name)
    print(f"return  {describe(returns)}")
    unknown = f"unknown: no reference returns are known for {task.name}"
    print(f"score   {describe(normalized_score(returns, reference)) if reference else unknown}")
    print(f"length  {np.mean(evaluation['lengths']):.5g} steps per episode")
    if video:
        print(f"video   {film(video, play, rendered)}")
    return evaluation


if __name__ == "__main__":
    run_command(partial(main, words=toolbox.take_words_for_scripts()), Args)
