"""The scripts are siblings: what has one name is one code in one place, so that diff shows the algorithm.

The checks take paths and return messages.
"""

import ast
import re
from functools import cache

from runs import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
SECTIONS = ["Args", "Diffusion", "Critic", "Agent", "Evaluation", "Training"]

# What may differ under one name: Args but for its first fields, the papers' settings, the random numbers of
# an update, and train, which names the agent and, online, collects the transitions. Nothing else may.
MAY_DIFFER = {"Args", "TASK_SETTINGS", "MAZE", "ANTMAZE", "ADROIT", "KITCHEN", "Draws", "train"}
SHARED_FIELDS = [  # name, type, default and comment are the same in every script
    *("env_id", "dataset", "action_bounds", "env_kwargs", "seed", "device", "num_threads"),
    *("matmul_precision", "compile", "cuda_graph", "total_steps", "batch_size", "gamma", "tau", "eval_every"),
    *("eval_episodes", "log_every", "save_every", "run_dir", "resume"),
]
OTHER_DEFAULTS = {"total_steps", "eval_every", "save_every"}  # here only the default may differ
OF_DATA = {"dataset", "action_bounds"}  # which a script that learns online does not have
ONLINE_DIFFERS = {"env_id", "total_steps"} | OF_DATA  # a Gymnasium id, environment steps


def is_online(path):
    return path.stem.endswith("_online")


@cache
def parsed(path):
    return ast.parse(path.read_text())


def named_statements(path, class_name=None):
    """Name -> source of each function, class, assignment and `if` of a script, or of a class of it."""
    lines, found, body = path.read_text().splitlines(), {}, parsed(path).body
    if class_name:
        [body] = [node.body for node in body if getattr(node, "name", "") == class_name]
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                pass
            case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
                name = ast.unparse(target)
            case ast.If():
                name = f"if {ast.unparse(node.test)}"
            case _:
                continue
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        found[name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def outline(path):
    """The names of a script and its section banners, in their order."""
    lines = path.read_text().splitlines()
    items = {line: number for number, line in enumerate(lines) if line.startswith("# ===")}
    items |= {name: lines.index(code.splitlines()[0]) for name, code in named_statements(path).items()}
    return sorted(items, key=items.get)


def shared_fields(path):
    """Name -> source of the shared fields of Args; without the default where it is the paper's."""
    found = named_statements(path, "Args")
    return found | {name: re.sub(" = .*?  #", "  #", found.get(name, "")) for name in OTHER_DEFAULTS}


def differences(first, second):
    """Messages on what both scripts have by one name and with another source, or in another order."""
    ours, theirs = named_statements(first), named_statements(second)
    our_fields, their_fields = shared_fields(first), shared_fields(second)
    fields = set(SHARED_FIELDS) - (ONLINE_DIFFERS if is_online(first) or is_online(second) else set())
    shared = (ours.keys() & theirs.keys()) - MAY_DIFFER
    found = [name for name in sorted(shared) if ours[name] != theirs[name]]
    found += [f"Args.{name}" for name in sorted(fields) if our_fields.get(name) != their_fields.get(name)]
    our_order, their_order = outline(first), outline(second)
    both = set(our_order) & set(their_order)
    if [item for item in our_order if item in both] != [item for item in their_order if item in both]:
        found.append("the order of what both have")
    return [f"{what} differs between {first.name} and {second.name}" for what in found]


def check_anatomy(path):
    """Messages on a script that lacks sections or shared arguments, or has them in another order."""
    fields = [name for name in SHARED_FIELDS if not (is_online(path) and name in OF_DATA)]
    messages = []
    if re.findall(r"^# === (.*) ===$", path.read_text(), re.MULTILINE) != SECTIONS:
        messages.append(f"{path.name} has other sections than {', '.join(SECTIONS)}")
    if list(named_statements(path, "Args"))[: len(fields)] != fields:
        messages.append(f"{path.name} has other first fields in Args than {', '.join(fields)}")
    return messages
