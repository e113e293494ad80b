"""A check of shape comments, `x = ...  # (batch, action_dim)`, in the sections where the algorithm is.

A script is loaded with a check after each statement that bears such a comment; then its agent acts and
updates, with sizes that are all different. A comment may use numbers, the sizes below, and integers that are
local variables where it stands. Where a size may have several values, it has one of them throughout a call.
"""

import ast
import re
import sys
from functools import cache
from itertools import product
from types import ModuleType

import numpy as np
import torch
from runs import AGENTS

SECTIONS = ["Diffusion", "Critic", "Agent"]
COMMENT = re.compile(r"  # (\([^()]*,[^()]*\))")
SIZES = dict(obs_dim=3, action_dim=5, num_qs=11, T=13, hidden=17, time_dim=2 * 29)
SIZES |= dict(num_q_samples=19, num_action_samples=23, num_advantage_samples=31, num_behavior_samples=41)
SIZES |= dict(num_target_samples=43, num_train_samples=47, num_chosen=4, num_entropy_samples=6)
STORED, BATCH_SIZE, STATES = 101, 7, 2  # transitions in the data, in an update; states to act in
SAMPLES = [1, *(size for name, size in SIZES.items() if name.endswith("_samples"))]
SAMPLES += [1 + SIZES["num_advantage_samples"], SIZES["num_chosen"]]
SAMPLES += [SIZES["num_chosen"] * (SIZES["num_entropy_samples"] + 1)]
POSSIBLE = {name: {size} for name, size in SIZES.items()} | {
    "batch": {STORED, *(rows * samples for rows in (BATCH_SIZE, STATES) for samples in SAMPLES)},
    "num_qs": {SIZES["num_qs"], 2, 1},  # two where it is no argument, one for a member of them
    "num_members": {SIZES["num_qs"], 2, 1},
    "n": set(SAMPLES),
    "next_rows": {BATCH_SIZE, BATCH_SIZE * SIZES["num_q_samples"]},
    "noise_steps": {1, SIZES["T"]},
    "n_out": {SIZES["hidden"], 1},
    "size": {SIZES["hidden"]},
}
# Options that lead through all branches of a script; those that a script does not have are left out.
VARIANTS = [
    dict(),
    dict(q_guidance="hard", max_q_backup=True, sampler="ddpm", noise_schedule="vp", nll_weight=1.0),
    dict(q_guidance="denoised", likelihood="elbo", action_approximation=False, weight="qcut"),
]


class CheckedScript(ast.NodeTransformer):
    """A script whose shape comments are checked while it runs."""

    def __init__(self, name, text):
        self.comments, section = {}, None  # line number -> shape
        for number, line in enumerate(text.splitlines(), start=1):
            if banner := re.fullmatch(r"# === (\w+) ===", line):
                section = banner[1]
            if section in SECTIONS and (comment := COMMENT.search(line)):
                self.comments[number] = comment[1]
        self.checked, self.wrong, self.calls = set(), [], {}
        tree = ast.parse(text)
        tuples = [node for node in tree.body if getattr(node, "name", "") in ("Batch", "Draws")]
        self.module = ModuleType(name)
        self.module.check_shape = lambda line, value: self.check(line, value, sys._getframe(1))
        exec(compile(ast.fix_missing_locations(self.visit(tree)), f"{name}.py", "exec"), vars(self.module))
        for node in tuples:
            fields = {line.target.id: line.lineno for line in node.body if line.lineno in self.comments}
            setattr(self.module, node.name, self.checked_fields(getattr(self.module, node.name), fields))

    def add_check(self, statement):
        """The statement, followed by a check if it bears a comment."""
        line = statement.end_lineno
        if line not in self.comments:
            return statement
        match statement:
            case ast.Return():
                code = f"result = {ast.unparse(statement.value)}; check_shape({line}, result); return result"
            case ast.Assign(targets=[target]) | ast.AugAssign(target=target):
                targets = target.elts if isinstance(target, ast.Tuple) else [target]
                checks = [f"check_shape({line}, {ast.unparse(each)})" for each in targets]
                code = "; ".join([ast.unparse(statement), *checks])
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
        comment, shape = self.comments[line], tuple(np.shape(value))
        names = sorted(set(re.findall(r"[A-Za-z]\w*", comment)) - {"or"})
        if unknown := [name for name in names if name not in possible]:
            self.wrong.append((line, f"says {comment}, where {', '.join(unknown)} has no known value"))
            return
        guesses = [tuple(zip(names, sizes, strict=True)) for sizes in product(*map(possible.get, names))]
        fitting = [dict(guess) for guess in guesses if shape in shapes(comment, guess)]
        if fitting:
            self.calls[call] |= {name: {guess[name] for guess in fitting} for name in names}
        else:
            self.wrong.append((line, f"says {comment}, the shape is {shape}"))
        self.checked.add(line)


@cache
def shapes(comment, sizes):
    """The shapes that a comment stands for: one, or more where it says `or`."""
    dims = [dim for dim in comment[1:-1].split(",") if dim.strip()]
    return list(product(*([eval(choice, {}, dict(sizes)) for choice in dim.split(" or ")] for dim in dims)))


def run_checked(name, text):
    """A script with this text, after its agent acted and updated once in each of the variants."""
    script = CheckedScript(name, text)
    module = script.module
    sizes = SIZES | {"diffusion_steps": SIZES["T"], "dpm_calls": 7, "batch_size": BATCH_SIZE}
    sizes |= {"hidden_dims": (SIZES["hidden"], SIZES["hidden"])}
    for variant in VARIANTS:
        known = {name: value for name, value in (sizes | variant).items() if hasattr(module.Args, name)}
        agent_class = getattr(module, AGENTS[name][0])
        agent = agent_class(SIZES["obs_dim"], SIZES["action_dim"], module.Args(**known), torch.device("cpu"))
        agent.set_step(1)
        data = module.Batch(
            obs=torch.randn(STORED, SIZES["obs_dim"]),
            action=torch.rand(STORED, SIZES["action_dim"]),
            reward=torch.randn(STORED),
            next_obs=torch.randn(STORED, SIZES["obs_dim"]),
            terminal=torch.zeros(STORED),
        )
        agent.update(data)
        assert agent.act(torch.randn(STATES, SIZES["obs_dim"])).shape == (STATES, SIZES["action_dim"])
    return script
