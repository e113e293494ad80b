"""README and docs are true: commands parse, links and pictures exist, numbers and versions are today's."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import benchmark
import pytest
import report
import siblings
import tyro
from runs import ROOT
from siblings import count_lines, loaded_with

import toolbox
from common.settings import check_bounds, parse_args
from common.tasks import check_task

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BUNDLED = ROOT / "common" / "data" / "README.md"  # has the versions with which the data was recorded
PAGES += [ROOT / "tests" / "golden" / "README.md", BUNDLED]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
FILES = [*PAGES, *(ROOT / f"{name}.py" for name in SCRIPTS), *sorted((ROOT / "tools").glob("*.py"))]
FILES += sorted((ROOT / "docs" / "figures").glob("*.py"))
PINNED = dict(re.findall(r"^([\w-]+)(?:\[.*\])?==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M))


def name_of(path):
    return str(path.relative_to(ROOT))


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
            if re.match(r"(python [a-z][\w/]*\.py|pytest|pip|diff)\b", command):
                found.append(command)
    return found


MADE = re.findall(r"^\+\+\+ (\S+)", (ROOT / "docs" / "idql.diff").read_text(), re.M)  # by docs/your_own.md
ALL_COMMANDS = sorted({command for path in FILES for command in commands(path)})


def check_script(name, words):
    module = importlib.import_module(Path(name).stem)
    if "--resume" in words:  # of a run that is not here
        del words[words.index("--resume") : words.index("--resume") + 2]
    args = parse_args(module.Args, module.TASK_SETTINGS, words)
    check_bounds(args)
    if args.env_id != "0":
        check_task(args.env_id)
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
    program, *words = shlex.split(command)
    if program == "python" and words[0] not in MADE:
        check = check_tool if words[0].startswith(("tools/", "docs/figures/")) else check_script
        assert check(words[0], [word for word in words[1:] if word != "--help"])
    elif program == "pip":
        assert all(PINNED.get(name) == version for name, version in re.findall(r"([\w-]+)==(\S+)", command))
    files = [word for word in words if re.match(r"[\w/-]+\.(py|txt)", word)]
    assert all((ROOT / file).exists() for file in files if file not in MADE)


def test_there_are_commands():
    assert {f"python {name}.py" for name in SCRIPTS} <= set(ALL_COMMANDS)
    assert {" ".join(command.split()[:2]) for command in ALL_COMMANDS} >= {
        f"python tools/{path.name}"
        for path in (ROOT / "tools").glob("*.py")
        if "class Args" in path.read_text()
    }


def test_recipes_count_runs_and_steps():
    text = read(ROOT / "docs" / "reproduce.md")
    before = r"    # (?:each )?(\d+) runs, ([\d.]+) million steps\n"
    recipes = re.findall(before + r" +(?:for .*?; do )?python tools/benchmark.py (.*?)[;\n]", text)
    assert len(recipes) == text.count("million steps\n") == text.count("tools/benchmark.py") > 10
    for num_runs, millions, command in recipes:
        first, _, last = command.partition(" -- ")
        jobs = benchmark.plan_grid(tyro.cli(benchmark.Args, args=first.split()), last.split())
        steps = sum(job.settings["total_steps"] + job.settings.get("pretrain_steps", 0) for job in jobs)
        assert (len(jobs), steps / 1e6) == (int(num_runs), float(millions)), command


# === Recorded runs ===
@pytest.mark.parametrize(("page", "robot"), [("hopper.md", "hopper"), ("README.md", "halfcheetah")])
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


def scores_of(folder, name):
    """All scores of docs/results/<folder>/<name>__<seed>, for every seed there is."""
    runs = sorted((ROOT / "docs" / "results" / folder).glob(f"{name}__[0-9]"))
    return [list(toolbox.read_run(run).evaluations.values()) for run in runs]


def test_the_table_of_hopper_mini_is_that_of_its_results():
    page = (ROOT / "docs" / "results" / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)\.py` \| [\d,]+ \| ([-\d., ]+ \| [-\d.]+) \| (.*) \|$", page, re.M)
    means = {}
    for name, own, cloning in rows:
        for cells, run in [(own, name), (cloning, f"{name}__cloning")]:
            finals = [scores[-1] for scores in scores_of("mini", run)]
            if finals:
                means[run] = f"{sum(finals) / 3:.1f}"
                assert cells == f"{', '.join(f'{score:.1f}' for score in finals)} | {means[run]}", run
            else:
                assert cells == "as `edp_td3.py` | "
    order = ["dtql", "diffusion_ql", "edp_td3", "edp_crr", "dac", "edp_iql"]
    assert f"| {' | '.join(means[name] for name in order)} |\n" in README.read_text()


def test_the_readme_has_the_scores_of_the_long_runs():
    rows = re.findall(r"^\| (cloning, )?`(\w+)\.py` \| (\d+\.\d \(.*) \|$", README.read_text(), re.M)
    assert len(rows) == 6
    for cloning, script, cells in rows:
        name, expected = script + ("__cloning" if cloning else ""), []
        for recording in ("medium-replay", "medium", "medium-expert"):
            seeds = scores_of("hopper", f"hopper-{recording}__{name}")
            expected.append(", ".join(f"{each[-1]:.1f} ({sum(each) / len(each):.1f})" for each in seeds))
        assert cells.split(" | ") == expected, name


def test_the_returns_of_qvpo_are_those_of_its_results():
    page = (ROOT / "docs" / "qvpo_online.md").read_text()
    folders = sorted((ROOT / "docs" / "results" / "qvpo").glob("*__0"))
    assert folders
    for folder in folders:
        text = page.partition(f"\n**{folder.name.removesuffix('__0')} ")[2].partition("\n![")[0]
        run = json.loads((folder / "results.json").read_text())
        written = defaultdict(list)
        for name, cells in re.findall(r"^\| (steps|return|length) \| (.*) \|$", text, re.M):
            written[name] += cells.split(" | ")
        every = int(written["steps"][0].replace(",", ""))
        evaluations = [each for each in run["evaluations"] if each["step"] % every == 0]
        assert {"steps", "return"} <= written.keys()
        for name in written:
            key = {"steps": "step", "return": "return_mean", "length": "length_mean"}[name]
            assert written[name] == [f"{each[key]:,.0f}" for each in evaluations], (folder, name)


@pytest.mark.parametrize("name", ["mini", "hopper", "halfcheetah", "qvpo"])
def test_the_report_of_recorded_runs_is_todays(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = f"docs/results/{name}"
    groups, problems = report.group_runs(report.find_runs([folder]), unfinished=True)
    assert report.write_report(groups, problems, [folder]) == Path(folder, "report.md").read_text()


# === Links ===
def anchors(path):
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
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


# === Differences ===
def table_of_scripts():
    """Script -> lines, lines with all it imports, page; as the README has them."""
    row = r"^\| `(\w+)\.py` \| .* \| ([\d,]+) \| ([\d,]+) \| .* h \| \[.*\]\((.*)\) \|$"
    return {
        name: (int(lines.replace(",", "")), int(closure.replace(",", "")), page)
        for name, lines, closure, page in re.findall(row, README.read_text(), re.M)
    }


TABLE = table_of_scripts()


@pytest.mark.parametrize("page", sorted({page for _, _, page in TABLE.values()}))
def test_differences_stand_on_the_page_and_at_their_lines(page):
    text = (ROOT / page).read_text()
    explained = re.findall(r"^- \*\*D(\d+)\b", text, re.M)
    assert explained == [str(i + 1) for i in range(len(explained))]
    marked = set()
    for name in [name for name in TABLE if TABLE[name][2] == page]:
        code = (ROOT / f"{name}.py").read_text().split('"""', 2)[2]  # after the header
        marked |= set(re.findall(r"\bD(\d+)\b", code))
    assert marked == set(explained)
    assert set(re.findall(r"\bD(\d+)\b", text)) == marked


# === Counts and versions ===
def test_readme_counts_lines():
    today = {path.stem: (count_lines([path]), count_lines(loaded_with(path))) for path in siblings.SCRIPTS}
    assert {name: TABLE[name][:2] for name in TABLE} == today, "\n".join(map(str, today.items()))
    [command] = re.findall(r"^    (wc -l dac\.py .*)$", README.read_text(), re.M)
    command = command.replace("python", sys.executable)
    printed = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True).stdout
    assert printed.split()[-2:] == [str(today["dac"][1]), "total"]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_count_differing_lines(path):
    counts = re.findall(r"`diff (\S+) (\S+)`(?: shows| \|) (\d+)\b", path.read_text())
    assert len(counts) == 3 or path.name != "edp.md"  # each pair of the three
    for first, second, count in counts:
        printed = subprocess.run(["diff", first, second], cwd=ROOT, capture_output=True, text=True).stdout
        assert len(re.findall("^[<>]", printed, re.M)) == int(count), f"diff {first} {second}"


@pytest.mark.parametrize("path", [page for page in PAGES if page != BUNDLED], ids=name_of)
def test_versions_are_those_of_the_requirements(path):
    names = {"pytorch": "torch"} | {name: name for name in PINNED}
    versions = re.findall(r"(?<!recorded with )\b([A-Za-z][\w-]+) (\d+\.\d+(?:\.\d+)?)\b", path.read_text())
    for name, version in versions:
        if package := names.get(name.lower()):
            assert f"{PINNED[package]}.".startswith(f"{version}."), f"{name} {version}"
