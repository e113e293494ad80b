"""Score a saved policy of any of the scripts, and film it.

    python tools/evaluate.py runs/hopper-mini-v0__dac__0__20261121-...          # the run's checkpoint
    python tools/evaluate.py checkpoint.pt --episodes 10                        # as the run itself evaluated
    python tools/evaluate.py checkpoint.pt --video hopper.mp4                   # and one episode as a film

All that is needed is read from the checkpoint: the script, its arguments, the task. The evaluation is the
script's own evaluate(), with its seeds. docs/tools_collect.md says more.
"""

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Annotated

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
import tyro
from imageio_ffmpeg import count_frames_and_secs
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common.datasets import UserError, make_env, task_reference  # noqa: E402
from common.runs import load_checkpoint, resolve_settings, run_command, select_device  # noqa: E402
from common.scores import normalized_score  # noqa: E402
from tools.speed import agent_class, load_script, seconds_for, warm_up  # noqa: E402

TIMED = 1.0  # seconds for which act() is timed


@dataclass
class Args:
    """The score of a saved policy."""

    checkpoint: Annotated[Path, tyro.conf.Positional]  # a checkpoint.pt, or the folder of its run
    episodes: int = 100  # episodes, side by side; with as many as the run evaluated, its numbers come out
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda or cuda:<i>
    video: Path | None = None  # write a film of the first episode to this file, .mp4


def load_agent(checkpoint: dict, device: str) -> tuple[ModuleType, object, nn.Module]:
    """The script that wrote a checkpoint, its arguments, and its agent as it was then. UserError: unknown."""
    if missing := {"args", "agent", "step"} - checkpoint.keys():
        raise UserError(f"the checkpoint lacks {', '.join(sorted(missing))}: it is not one of a run")
    script = load_script(str(checkpoint["script"]))
    known = {field.name for field in fields(script.Args)}
    if unknown := checkpoint["args"].keys() - known:
        raise UserError(f"the checkpoint is of another version of {script.__name__}.py: {', '.join(unknown)}")
    args = script.Args(**dict.fromkeys(script.DEFAULT_SETTINGS) | checkpoint["args"] | {"device": device})
    args, _ = resolve_settings(args, script.DEFAULT_SETTINGS, script.TASK_SETTINGS)
    env = make_env(args.env_id, advice="a policy is scored in an environment")
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    env.close()
    agent = agent_class(script)(obs_dim, action_dim, args, select_device(device))
    try:
        agent.load_state_dict(checkpoint["agent"])
    except RuntimeError as error:
        difference = str(error).splitlines()[1].strip()
        raise UserError(f"the checkpoint does not fit {args.env_id}: {difference}") from error
    return script, args, agent


def confidence_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean: percentiles of the means of 10,000 bootstrap samples."""
    random = np.random.default_rng(0)
    means = random.choice(values, (10_000, len(values))).mean(axis=1)
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def describe(values: np.ndarray) -> str:
    """Mean and standard deviation, with the interval where there are several."""
    spread = f"{values.mean():.5g} +- {values.std():.4g}"
    if len(values) == 1:
        return spread
    low, high = confidence_interval(values)
    return f"{spread}, 95 % interval of the mean {low:.5g} to {high:.5g}"


def act_milliseconds(agent: nn.Module, obs_dim: int, batch: int) -> float:
    """How long act() takes for so many states, from and to the host."""
    obs = torch.zeros(batch, obs_dim)

    def act() -> None:
        agent.act(obs.to(agent.device)).cpu()

    count = warm_up(act, TIMED)
    return 1000 * seconds_for(act, count) / count


# --- Video ---
class Filmed(gym.Wrapper):
    """An environment that shows a frame before every step: the state that the action is for."""

    def __init__(self, env: gym.Env, video):
        super().__init__(env)
        self.video, self.frames = video, 0
        self.bar = tqdm(desc="video", unit=" frames", dynamic_ncols=True, disable=None, leave=False)

    def step(self, action):
        self.video.append_data(self.render())
        self.frames += 1
        self.bar.update()
        return self.env.step(action)


def make_rendered_env(task: str) -> gym.Env:
    """An environment that draws itself, without a screen where there is none. UserError: it cannot."""
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not screen:
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        env = make_env(task, render_mode="rgb_array", advice="without --video it can still be scored")
        env.reset(seed=0)
        frame = env.render()
    except UserError:
        raise
    except Exception as error:  # of OpenGL, or of a package that draws and is not installed
        raise UserError(
            f"--video: {task} cannot be drawn here: {type(error).__name__}: {error}\n"
            "MuJoCo needs OpenGL: without a screen or GPU, install Mesa's EGL (Debian: libegl1 and "
            "libgl1-mesa-dri), or libosmesa6 and set MUJOCO_GL=osmesa."
        ) from error
    if not isinstance(frame, np.ndarray):
        raise UserError(f"--video: {task} cannot be drawn, it has no rgb_array rendering")
    return env


def film(path: Path, script: ModuleType, agent: nn.Module, env: gym.Env) -> dict:
    """Evaluate one episode and write it to an MP4, complete or not at all; returns the evaluation."""
    part = path.with_name(f".{path.stem}.part.mp4")
    try:
        with imageio.get_writer(part, fps=env.metadata.get("render_fps", 30), macro_block_size=2) as video:
            filmed = Filmed(env, video)
            evaluation = script.evaluate(agent, [filmed])
            filmed.bar.close()
        if count_frames_and_secs(part)[0] != filmed.frames:
            raise OSError("the file is incomplete")
        part.replace(path)
    except (OSError, RuntimeError) as error:  # imageio's, in writing or in counting
        reason = str(error).splitlines()[0]
        raise UserError(f"--video: cannot write {path}, is the disk full? ({reason})") from error
    finally:
        part.unlink(missing_ok=True)
    return evaluation


# --- The command ---
def main(args: Args) -> dict:
    """Score, time and film; returns the script's evaluation."""
    if args.episodes < 1:
        raise UserError(f"--episodes is {args.episodes}; it must be at least 1")
    if args.video and (args.video.suffix != ".mp4" or not args.video.parent.is_dir()):
        raise UserError(f"--video {args.video} is not a .mp4 file in a folder that exists")
    checkpoint = load_checkpoint(args.checkpoint)
    script, run_args, agent = load_agent(checkpoint, args.device)
    task = run_args.env_id
    rendered = make_rendered_env(task) if args.video else None
    print(
        f"{script.__name__} on {task}, {checkpoint['step']:,} steps, seed {run_args.seed}: {args.checkpoint}"
    )
    print(f"  {agent.device}, {args.episodes} episodes, seeds from {script.EVAL_SEED}", flush=True)

    envs = [make_env(task) for _ in range(args.episodes)]
    evaluation = script.evaluate(agent, envs)
    returns, reference = np.array(evaluation["returns"]), task_reference(task)
    print(f"return  {describe(returns)}")
    if reference:
        print(f"score   {describe(normalized_score(returns, reference))}")
    else:
        print(f"score   unknown: no reference returns are known for {task}")
    print(f"length  {evaluation['length_mean']:.5g} steps per episode")
    obs_dim = envs[0].observation_space.shape[0]
    single, batch = act_milliseconds(agent, obs_dim, 1), act_milliseconds(agent, obs_dim, args.episodes)
    print(f"act()   {single:.3g} ms for one state, {batch:.3g} ms for {args.episodes} at once")
    if args.video:
        episode = film(args.video, script, agent, rendered)
        print(
            f"video   {args.video}: {episode['length_mean']:.0f} frames, return {episode['return_mean']:.5g}"
        )
        rendered.close()
    return evaluation


if __name__ == "__main__":
    run_command(main, tyro.cli(Args))
