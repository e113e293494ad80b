"""docs/notebook.ipynb runs from top to bottom, as plain Python."""

import json
import subprocess

import matplotlib
import pytest
from runs import ROOT, python


@pytest.fixture(scope="module")
def can_draw():
    """Whether MuJoCo can draw here without a screen."""
    code = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8)"
    return python("-c", code, env={"MUJOCO_GL": "egl"}, stderr=subprocess.DEVNULL).wait() == 0


def test_notebook(tmp_path, monkeypatch, can_draw):
    """It trains, loads, plots, and films where there is OpenGL; its policy goes to the best mode."""
    matplotlib.use("Agg")
    (tmp_path / "dtql.py").symlink_to(ROOT / "dtql.py")  # it is started in the root of the repository
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())["cells"]
    names = {}
    for source in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        if "--video" not in source or can_draw:
            short = source.replace("short = dict(", "short = dict(env_kwargs=['max_episode_steps=50'], ")
            exec(compile(short, "notebook", "exec"), names)
    best = names["BANDITS"][names["task"]][-1]
    distance = ((names["actions"].numpy() - best) ** 2).sum(1) ** 0.5
    assert (distance < 0.3).mean() > 0.8
    assert (tmp_path / "hopper.png").exists() == can_draw
