"""README and docs: commands name arguments that exist, links lead somewhere, tables are the results'."""

import importlib
import re
import shlex
from pathlib import Path

import benchmark
import pytest
import results
import tyro
from runs import ROOT

import toolbox
from common.cli import UserError, check_bounds, parse_args
from common.tasks import find_task

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "tests" / "golden" / "README.md"]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
FILES = [*PAGES, *(ROOT / f"{name}.py" for name in SCRIPTS), *sorted((ROOT / "tools").glob("*.py"))]
FILES += sorted((ROOT / "docs" / "figures").glob("*.py"))
MADE = {  # by the diffs of docs/your_own.md
    name
    for diff in (ROOT / "docs").glob("*.diff")
    for name in re.findall(r"^\+\+\+ (\S+)", diff.read_text(), re.M)
}


# === Commands ===
def read(path):
    """The text of a file; lines that \\ broke are whole, and shell variables have their (first) value."""
    text = re.sub(r"\\\n *", " ", path.read_text())
    variables = re.findall(r'^    (\w+)="(.*)"$', text, re.M) + re.findall(r"\bfor (\w+) in ([^\s;]+)", text)
    for name, value in variables:
        text = re.sub(rf"\${name}\b", value, text)
    return text


def commands(path):
    """The commands on a page or in the docstring of a file, without comments; <placeholders> became 0."""
    text = read(path)
    indented = re.findall(r"^    (.*)$", text, re.M)
    quoted = re.findall(r"(?<!`)`([^`]+)`(?!`)", text) if path.suffix == ".md" else []
    found = []
    for line in [*indented, *quoted]:
        line = re.sub(r"<[^<>]*>", "0", re.sub(r"\s+", " ", line.partition("  #")[0]))
        for part in re.split(r"&&|\||; do |; done", line):
            command = re.sub(r"^([A-Z0-9_]+=\S+ )*", "", part.strip())  # without variables
            if re.match(r"python [a-z][\w/]*\.py\b", command):
                found.append(command)
    return found


ALL_COMMANDS = sorted({command for path in FILES for command in commands(path)})


def check_script(name, words):
    module = importlib.import_module(Path(name).stem)
    if "--resume" in words:  # of a run that is not here
        del words[words.index("--resume") : words.index("--resume") + 2]
    args = parse_args(module.Args, module.TASK_SETTINGS, words)
    check_bounds(args)
    if args.env_id != "0":
        find_task(args.env_id)
    return True


def check_tool(name, words):
    """Words after -- are for a script: of a grid, or of the run in a benchmark's folder."""
    end = words.index("--") if "--" in words else len(words)
    module = importlib.import_module(Path(name).stem)
    if not hasattr(module, "Args"):
        return words == []
    args = tyro.cli(module.Args, args=words[:end])
    check_bounds(args)
    if name == "tools/benchmark.py":
        return bool(benchmark.plan_grid(args, words[end + 1 :]))
    if name == "tools/evaluate.py":
        [script] = re.findall(r"__(\w+?)__", words[0]) or ["dac"]
        return check_script(script, words[end + 1 :])
    commands = args.commands if name == "tools/speed.py" else []
    given = [shlex.split(command) for command in commands]
    return all(f"{script}.py" in MADE or check_script(script, words) for script, *words in given)


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=str)
def test_commands_parse(command):
    _, file, *words = shlex.split(command)
    if file not in MADE:
        check = check_tool if "/" in file else check_script
        assert check(file, [word for word in words if word != "--help"]) and (ROOT / file).exists()


# === Recorded runs ===
@pytest.mark.parametrize(("page", "robot"), [("hopper.md", "hopper"), ("halfcheetah.md", "halfcheetah")])
def test_the_table_of_long_runs_is_that_of_their_results(page, robot):
    page = ROOT / "docs" / "results" / page
    [text] = re.findall(r"^(\| recording \| run \|.*?)\n\n", page.read_text(), re.M | re.S)
    header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
    linked = set()
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        [(name, link)] = re.findall(r"`(\w+)\.py`.*\]\((.*)/results\.json\)", cells["run"])
        run = toolbox.read_run(page.parent / link)
        assert (f"{robot}-{cells['recording']}-v2", name) == (run.args["env_id"], run.script)
        for step in [column for column in header if column[0].isdigit()]:
            score = run.evaluations.get(int(step.replace(",", "")))
            assert cells[step] == ("" if score is None else f"{score:.1f}"), row
        last_ten = list(run.evaluations.values())[-10:]
        averages = [f"{sum(last_ten) / len(last_ten):.1f}", f"{run.step:,}", f"{run.hours:.1f}"]
        assert [cells["last ten"], cells["steps"], cells["hours"]] == averages, row
        linked.add(page.parent / link)
    assert linked == {path.parent for path in (page.parent / robot).glob("*/config.json")}
    assert len(linked) == len(rows)


def test_the_tables_of_scores_are_those_of_the_runs():
    folder = ROOT / "docs" / "results"
    page, runs = (folder / "README.md").read_text(), results.find(folder, "mini/")
    assert results.of_last(folder) in page and results.of_controls(folder) in page
    table = re.findall(r"^\| `(\w+)\.py` \|.*\| ([\d.]+) \| \[page\]", README.read_text(), re.M)
    assert dict(table) == {name: f"{runs[name][1][-1].mean():.1f}" for name in results.LINES}


def test_figures_of_scores(tmp_path):
    for panel in (results.bars, results.curves):
        results.draw(tmp_path / "a.png", ROOT / "docs" / "results", results.PANELS, panel, rows=2)
        assert (tmp_path / "a.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="there is no run"):
        results.main(results.Args(tmp_path))


# === Links ===
def anchors(path):
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pictures_links_and_files_exist(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for file in re.findall(r"`((?:docs|tests|tools|common)/[\w/.*-]+|\w+\.(?:py|md))`", text):
        near = [*ROOT.glob(file), *path.parent.glob(file), *ROOT.glob(f"*/{file}")]
        assert near or file in MADE, f"there is no {file}"
