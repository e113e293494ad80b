"""tools/pictures.py: each figure from tiny runs, the numbers in it, and clear failures."""

import os

import pictures
import pytest
import torch
from matplotlib.image import imread
from runs import AGENTS, ROOT, finish, python

import toolbox
from common.bandits import bandit_reward
from common.settings import settings_for
from common.tasks import UserError

TINY = {name: settings for name, (_, settings) in AGENTS.items()}
NUM_PANELS = dict(diffusion_ql_corners=3, dtql_trust_region=12, dtql_policy=8, dac_guidance=4)
NUM_PANELS |= dict(edp_samplers=7, qvpo_entropy=12, bandits=28)


@pytest.fixture
def tiny(monkeypatch):
    """Policies after a few steps; returns the list of script, task and changes of those that were trained."""
    calls, trained, trained_online = [], pictures.trained, pictures.trained_online

    def trained_briefly(script, task, seed, **changes):
        calls.append((script, task, changes))
        kept = {"q_guidance", "eta", "guidance_weight", "sampler", "noise_schedule", "diffusion_steps"}
        changes = {name: value for name, value in changes.items() if name in kept}
        return trained(script, task, seed, **TINY[script] | dict(total_steps=2) | changes)

    def online_briefly(steps, seed, **changes):
        calls.append(("qvpo_online", "four modes", changes))
        few = range(20, 20 + len(steps))
        found = trained_online(list(few), seed, **TINY["qvpo_online"] | dict(total_steps=30) | changes)
        return dict(zip(steps, found.values(), strict=True))

    monkeypatch.setattr(pictures, "trained", trained_briefly)
    monkeypatch.setattr(pictures, "trained_online", online_briefly)
    return calls


@pytest.mark.parametrize("name", pictures.FIGURES)
def test_figures(name, tiny, tmp_path, monkeypatch):
    """All panels are square, and have a title; what is written can be read."""
    figures, draw = [], pictures.FIGURES[name]
    monkeypatch.setitem(pictures.FIGURES, name, lambda seed: figures.append(draw(seed)) or figures[0])
    monkeypatch.setattr(pictures, "CALLS", (3, 5, 20))
    pictures.main(pictures.Args(name, str(tmp_path / "new")))
    [path] = (tmp_path / "new").iterdir()
    height, width, _ = imread(path).shape
    assert path.name == f"{name}.png" and width > height and path.stat().st_size < 150_000
    axes = figures[0].axes
    assert len(axes) == NUM_PANELS[name]
    assert all(panel.get_title() and panel.get_aspect() == 1 for panel in axes)
    assert len({str(call) for call in tiny}) == len(tiny) > 1  # no policy is drawn as if it were another


def test_a_title_has_the_mean_reward_of_the_policy_alone(tiny):
    task = "bandit-corners-v0"
    _, [panels] = pictures.grid(1, 1)
    agent = pictures.trained("dac", task, 0)
    actions = pictures.samples(agent)
    pictures.draw_policy(panels[0], task, actions, "policy")
    assert panels[0].get_title() == f"policy: {bandit_reward(task, actions).mean():.2f}"
    assert agent.args.num_action_samples == 1 and actions.shape == (1000, 2)


def test_trust_region_loss_is_the_loss_of_dtql():
    """At three actions, as the agent computes it."""
    dtql = toolbox.load_script("dtql")
    torch.manual_seed(0)
    args = settings_for(dtql.Args, {}, "bandit-moons-v0", hidden_dims=(8, 8))
    agent = dtql.DTQL(1, 2, args, torch.device("cpu"))
    loss = pictures.trust_region_loss(agent, 0.3, num_noises=2)
    noises = torch.randn(2, 1, 2, generator=torch.Generator().manual_seed(0))
    for y, x in [(0, 0), (50, 7), (100, 100)]:
        action = torch.tensor([[pictures.LINE[x], pictures.LINE[y]]], dtype=torch.float32)
        terms = [agent.diffusion_loss(action, torch.zeros(1, 1), torch.tensor([0.3]), z) for z in noises]
        assert loss[y, x] == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        ("dac_guidence", "new", "there is no figure 'dac_guidence'; nearest names: dac_guidance"),
        ("xyz", "new", "nearest names: diffusion_ql_corners, .*, all"),
        ("dac_guidance", "file", "cannot write .*file/dac_guidance.png: .*choose another --output"),
    ],
)
def test_errors_before_anything_is_trained(name, output, message, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        pictures.main(pictures.Args(name, str(tmp_path / output)))
    assert tiny == [] and not (tmp_path / "new").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tiny, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write .*Permission denied"):
        pictures.main(pictures.Args("dac_guidance", str(tmp_path)))


def test_exit_code_without_a_backend(tmp_path):
    """One error and no traceback; nothing is written."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no backend')")
    command = python(
        ROOT / "tools" / "pictures.py",
        "dac_guidance",
        "--output",
        tmp_path / "new",
        env=dict(PYTHONPATH=str(tmp_path)),
    )
    code, _, err = finish(command)
    assert code == 2 and "error: the figures need matplotlib and its backend Agg: no backend" in err
    assert "Traceback" not in err and not (tmp_path / "new").exists()
