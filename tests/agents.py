"""What the tests of several scripts do with an agent."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.cli import settings_for

TASK = "bandit-corners-v0"


def random_batch(script, size=5):
    """Transitions for agents of 4 observations and 2 actions."""
    return script.Batch(
        obs=torch.randn(size, 4),
        action=torch.rand(size, 2) * 2 - 1,
        reward=torch.randn(size),
        next_obs=torch.randn(size, 4),
        terminal=(torch.arange(size) % 2).to(torch.get_default_dtype()),
    )


def sampled_actions(script, agent_name, tmp_path, monkeypatch, **options):
    """Train an agent on the four corners, then 1000 actions of its policy."""
    agents, original = [], getattr(script, agent_name)

    class Recorded(original):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            agents.append(self)

    monkeypatch.setattr(script, agent_name, Recorded)
    given = dict(run_dir=str(tmp_path), eval_episodes=0) | options
    script.train(settings_for(script.Args, script.TASK_SETTINGS, TASK, **given))
    monkeypatch.undo()
    torch.manual_seed(0)
    return agents[0].act(torch.zeros(1000, 1)).numpy()


def check_no_waiting(update):
    """None of its operations reads a number back to the host, or has a shape that depends on one."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            names.add(operation._schema.name.removeprefix("aten::"))
            return operation(*args, **kwargs or {})

    names = set()
    with Recorder():
        update()
    assert {"addmm", "_fused_adam_", "randint"} <= names
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"} & names
    return names
