"""Every shape comment is true: `x = ...  # (batch, action_dim)`, in the sections where the algorithm is.

A script is loaded with a check after each statement that bears such a comment; then its agent acts and
updates, with sizes that are all different. A comment may use numbers, the sizes below, and integers that are
local variables where it stands. Where a size may have several values, it has one of them throughout a call.
"""

import ast
import re
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
SECTIONS = ["Diffusion", "Critic", "Agent"]
NAMED_TUPLES = ["Batch", "Draws"]
COMMENT = re.compile(r"  # (\([^()]*,[^()]*\))")

SIZES = {
    "obs_dim": 3,
    "action_dim": 5,
    "num_qs": 11,
    "T": 13,
    "hidden": 17,
    "num_q_samples": 19,
    "num_action_samples": 23,
    "num_advantage_samples": 31,
    "num_likelihood_samples": 37,
    "time_dim": 2 * 29,
    "num_target_samples": 43,
    "num_train_samples": 47,
    "num_behavior_samples": 41,
    "num_chosen": 4,
    "num_entropy_samples": 6,
}
STORED, BATCH_SIZE, STATES = 101, 7, 2  # transitions in the data, in an update; states to act in
SAMPLES = [1, *(size for name, size in SIZES.items() if name.endswith("_samples"))]
SAMPLES += [1 + SIZES["num_advantage_samples"], SIZES["num_chosen"]]
SAMPLES += [SIZES["num_chosen"] * (SIZES["num_entropy_samples"] + 1)]
POSSIBLE = {name: {size} for name, size in SIZES.items()} | {
    "batch": {STORED, *(rows * samples for rows in (BATCH_SIZE, STATES) for samples in SAMPLES)},
    "num_qs": {SIZES["num_qs"], 2},  # two where it is no argument
    "num_members": {SIZES["num_qs"], 2},
    "next_rows": {BATCH_SIZE, BATCH_SIZE * SIZES["num_q_samples"]},
    "noise_steps": {1, SIZES["T"]},
    "n_out": {SIZES["hidden"], 1},
    "size": {SIZES["hidden"]},
}

EDP = [
    {"dpm_calls": 7, "likelihood": "sampled"},
    {"sampler": "ddpm", "likelihood": "gaussian", "max_q_backup": True},
    {"sampler": "ddim", "likelihood": "elbo", "action_approximation": False},
]
# script: its agent, and arguments that lead through all of its branches
SCRIPTS = {
    "dac": (
        "DAC",
        [
            {"q_guidance": "soft", "sampler": "ddpm", "q_target": "lcb"},
            {"q_guidance": "hard", "sampler": "ddim", "q_target": "min", "max_q_backup": True},
            {"q_guidance": "denoised", "sampler": "guided", "q_target": "convex", "action_temperature": 1.0},
            {"q_guidance": "none", "q_target": "rand_convex", "clip_sampler": False},
        ],
    ),
    "diffusion_ql": ("DiffusionQL", [{}, {"max_q_backup": True}]),
    "edp_td3": ("EDPTD3", EDP),
    "edp_crr": ("EDPCRR", EDP),
    "edp_iql": ("EDPIQL", EDP),
    "dtql": ("DTQL", [{"nll_weight": 1.0}, {"value_target": "target", "first_mish": True}]),
    "qvpo_online": ("QVPO", [{"weight": "qadv"}, {"weight": "qcut"}]),
}


class CheckedScript(ast.NodeTransformer):
    """A script whose shape comments are checked while it runs."""

    def __init__(self, path):
        lines = path.read_text().splitlines()
        self.comments = {}  # line number -> shape
        section = None
        for number, line in enumerate(lines, start=1):
            if banner := re.fullmatch(r"# === (\w+) ===", line):
                section = banner[1]
            if section in SECTIONS and (comment := COMMENT.search(line)):
                self.comments[number] = comment[1]
        self.checked, self.wrong, self.calls = set(), [], {}

        tree = ast.parse(path.read_text())
        fields = {
            node.name: {line.target.id: line.lineno for line in node.body if line.lineno in self.comments}
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name in NAMED_TUPLES
        }
        code = compile(ast.fix_missing_locations(self.visit(tree)), str(path), "exec")
        self.module = ModuleType(path.stem)
        self.module.check_shape = lambda line, value: self.check(line, value, sys._getframe(1))
        exec(code, vars(self.module))
        for name, lines in fields.items():
            setattr(self.module, name, self.checked_fields(getattr(self.module, name), lines))

    def add_check(self, statement):
        """The statement, followed by a check if it bears a comment."""
        line = statement.end_lineno
        if line not in self.comments:
            return statement
        match statement:
            case ast.Return():
                code = f"result = {ast.unparse(statement.value)}; check_shape({line}, result); return result"
            case ast.Assign(targets=[target]) | ast.AugAssign(target=target):
                code = f"{ast.unparse(statement)}; check_shape({line}, {ast.unparse(target)})"
            case ast.Expr(ast.Call(ast.Attribute(attr="register_buffer"), [ast.Constant(name), *_])):
                code = f"{ast.unparse(statement)}; check_shape({line}, self.{name})"
            case _:
                return statement
        return ast.parse(code).body

    visit_Return = visit_Assign = visit_AugAssign = visit_Expr = add_check

    def checked_fields(self, named_tuple, lines):
        """Creates the named tuple and checks the comments of its fields."""

        def create(*values, **named_values):
            created, call = named_tuple(*values, **named_values), object()
            for field, line in lines.items():
                self.check(line, getattr(created, field), call)
            return created

        return create

    def check(self, line, value, call):
        """Compare with the comment; what this leaves of the possible sizes holds for the rest of the call."""
        variables = getattr(call, "f_locals", {})
        integers = {name: {size} for name, size in variables.items() if type(size) is int}
        possible = self.calls.setdefault(call, POSSIBLE.copy()) | integers
        comment, shape = self.comments[line], tuple(value.shape)
        names = sorted(set(re.findall(r"[A-Za-z]\w*", comment)) - {"or"})
        if unknown := [name for name in names if name not in possible]:
            self.wrong.append(f"line {line} says {comment}, where {', '.join(unknown)} has no known value")
            return
        guesses = [
            dict(zip(names, sizes, strict=True)) for sizes in product(*(possible[name] for name in names))
        ]
        fitting = [guess for guess in guesses if shape in shapes(comment, guess)]
        if fitting:
            self.calls[call] |= {name: {guess[name] for guess in fitting} for name in names}
        else:
            self.wrong.append(f"line {line} says {comment}, the shape is {shape}")
        self.checked.add(line)


def shapes(comment, sizes):
    """The shapes that a comment stands for: one, or more where it says `or`."""
    dims = [dim for dim in comment[1:-1].split(",") if dim.strip()]
    return list(product(*([eval(choice, {}, sizes) for choice in dim.split(" or ")] for dim in dims)))


def run_checked(path, agent_name, variants):
    """The script, after its agent acted and updated once with each of the variants of its arguments."""
    script = CheckedScript(path)
    module = script.module
    obs_dim, action_dim = SIZES["obs_dim"], SIZES["action_dim"]
    for variant in variants:
        arguments = module.DEFAULT_SETTINGS | {
            "batch_size": BATCH_SIZE,
            "hidden_dims": (SIZES["hidden"], SIZES["hidden"]),
        }
        sizes = SIZES | {"diffusion_steps": SIZES["T"]}
        arguments |= {name: size for name, size in sizes.items() if hasattr(module.Args(), name)}
        known = {name: value for name, value in variant.items() if hasattr(module.Args(), name)}
        args = module.Args(**arguments | known)
        agent = getattr(module, agent_name)(obs_dim, action_dim, args, torch.device("cpu"))
        agent.set_step(1)
        data = {
            "obs": torch.randn(STORED, obs_dim),
            "action": torch.rand(STORED, action_dim),
            "reward": torch.randn(STORED),
            "next_obs": torch.randn(STORED, obs_dim),
            "terminal": torch.zeros(STORED),
        }
        agent.update(module.Batch(**data))
        assert agent.act(torch.randn(STATES, obs_dim)).shape == (STATES, action_dim)
    return script


def test_every_script_is_here():
    assert sorted(SCRIPTS) == sorted(path.stem for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_shape_comments_are_true(name):
    script = run_checked(ROOT / f"{name}.py", *SCRIPTS[name])
    assert not script.wrong, "\n".join(script.wrong)
    assert script.checked == script.comments.keys(), "lines whose comments were not checked"
    assert len(script.checked) >= 25


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_wrong_comment_goes_unnoticed(name, tmp_path):
    """In a copy where one more is added to each size, in turn, every comment is reported."""
    text = (ROOT / f"{name}.py").read_text()
    copy = tmp_path / f"{name}.py"
    for position in range(3):

        def off_by_one(comment, position=position):
            dims = [dim for dim in comment[1][1:-1].split(",") if dim.strip()]
            at = min(position, len(dims) - 1)
            dims[at] = " or ".join(f"{choice} + 1" for choice in dims[at].split(" or "))
            return f"  # ({','.join(dims)},)"

        copy.write_text(COMMENT.sub(off_by_one, text))
        script = run_checked(copy, *SCRIPTS[name])
        reported = {int(re.match(r"line (\d+)", message)[1]) for message in script.wrong}
        assert reported == script.comments.keys()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # then `batch` has another value here than in the rest of act()
        (
            "  # (batch * n, obs_dim)\n        if",
            "  # (batch, obs_dim)\n        if",
            r"says \(batch \* n, action_dim",
        ),
        ("  # (batch,), uniform in 1..T", "  # (T,), uniform in 1..T", r"says \(T,\), the shape is \(7,\)"),
        ("  # (num_qs, batch, n)", "  # (num_qs, batch, samples)", "samples has no known value"),
    ],
)
def test_a_wrong_comment_is_named(old, new, message, tmp_path):
    copy = tmp_path / "dac.py"
    text = (ROOT / "dac.py").read_text()
    assert text.count(old) == 1
    copy.write_text(text.replace(old, new))
    assert re.search(message, run_checked(copy, *SCRIPTS["dac"]).wrong[0])


def test_a_comment_that_cannot_be_checked_is_not_counted(tmp_path):
    copy = tmp_path / "dac.py"
    copy.write_text((ROOT / "dac.py").read_text().replace("[:-1]:\n", "[:-1]:  # (num_qs, batch)\n"))
    script = run_checked(copy, *SCRIPTS["dac"])
    assert script.wrong == []
    assert len(script.comments.keys() - script.checked) == 2
