"""The house: which files there are, who imports whom, what every function and flag must have, and
that names and commands in README.md exist."""

import ast
import importlib
import json
import math
import re
import statistics
import sys
from fnmatch import fnmatch
from functools import cache

import numpy as np
import pytest
from conftest import ROOT, TINY
from PIL import Image

import train
from appendix import baselines
from model import table_row

TOP = ["data", "diffusion", "model", "train", "probe"]
MAY_IMPORT = {  # of our own modules; those of the appendix may import all of them
    "data": set(),
    "diffusion": set(),
    "model": set(),
    "train": {"data", "diffusion", "model"},
    "probe": {"data", "diffusion", "model", "train"},
}
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("appendix/*.py")]
TESTS = list(ROOT.glob("tests/*.py"))
LONGEST, LONGEST_LOOP = 60, 100  # lines of a function, and of train.train
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in SOURCES
    if '__name__ == "__main__"' in path.read_text()
]
README = ROOT / "README.md"
needs_readme = pytest.mark.skipif(not README.exists(), reason="README.md is not written yet")


@cache
def parse(path):
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


def imports(path):
    """The names of the modules that a file imports anywhere, up to the first dot."""
    for node in ast.walk(parse(path)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names.append("appendix" if node.level else node.module)
        yield from (name.split(".")[0] for name in names)


def functions(node, prefix=""):
    """(name, node) of all functions below a node; methods and inner functions as OUTER.NAME."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (*FUNCTION, ast.ClassDef))
        if isinstance(child, FUNCTION):
            yield prefix + child.name, child
        yield from functions(child, f"{prefix}{child.name}." if named else prefix)


# ---------------------------------------------------------------------------- files and imports


def test_there_are_five_modules_at_the_top_and_no_sixth():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(TOP)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_imports_go_one_way_and_need_only_torch_numpy_and_pillow(path):
    own = MAY_IMPORT[path.stem] if path.parent == ROOT else {*TOP, "appendix"}
    if path.name == "bench.py":
        own = own | {"reference"}  # the plain networks of tests/reference.py are its yardstick
    allowed = {"torch", "numpy", "PIL", *sys.stdlib_module_names} | own
    assert set(imports(path)) <= allowed


# ---------------------------------------------------------------------------- functions and flags


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: path.stem)
def test_no_function_is_longer_than_a_screen(path):
    for name, node in functions(parse(path)):
        lines = node.end_lineno - node.lineno + 1
        loop = path == ROOT / "train.py" and name == "train"
        assert lines <= (LONGEST_LOOP if loop else LONGEST), f"{name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_public_function_has_a_docstring(path):
    """Longer than five lines; the docstring of a class serves its __init__ and forward, and an
    inner function is not public."""
    tree = parse(path)
    assert ast.get_docstring(tree) or not tree.body
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for owner in (tree, *classes):
        for node in owner.body:
            public = isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_")
            if public and node.name != "forward" and node.end_lineno - node.lineno >= 5:
                assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: path.stem)
def test_only_tables_are_laid_out_by_hand(path):
    """A table stands between off and on; in tests it may end in skip: a list, or parametrize."""
    off, on, skip = (f"# fmt: {word}" for word in ("off", "on", "skip"))
    text = path.read_text()
    literals = ast.List, ast.Tuple, ast.Dict, ast.Set
    tables = {n.end_lineno for n in ast.walk(parse(path)) if isinstance(n, literals)}
    tables |= {d.end_lineno for _, node in functions(parse(path)) for d in node.decorator_list}
    skipped = {k for k, line in enumerate(text.splitlines(), 1) if skip in line}
    assert skipped <= (tables if path in TESTS else set())
    for block in text.split(off)[1:]:
        table, end, _ = block.partition(on)
        assert end and not re.search(r"^\s*(def|class|if|for|with) ", table, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_help(command):
    parser = importlib.import_module(command).build_parser()
    assert parser.format_help()  # a lone % in a text would raise
    for action in parser._actions:
        assert action.help and len(action.help) > 5, action.option_strings


# ---------------------------------------------------------------------------- commands in texts


def commands(text):
    """(script, [argument, ...]) of each command in a text: it ends at two spaces, a comment, or
    what the shell reads."""
    text = re.sub(r" *\\\n *", " ", text).replace("$set", "mnist")
    script = r"(?:python3? (?:-m )?|torchrun (?:-\S+ )*)((?:train|probe)\.py|appendix\.\w+)"
    for match in re.finditer(rf"{script}((?: [^\s`#;|&>]+)*)", text):
        yield match[1].removesuffix(".py"), match[2].split()


def check_commands(text):
    """Let the parsers read every command of a text; returns the scripts."""
    found = list(commands(text))
    for script, arguments in found:
        importlib.import_module(script).build_parser().parse_args(arguments)
    return {script for script, _ in found}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_at_the_top_of_a_script_are_understood(command):
    assert command in check_commands(importlib.import_module(command).__doc__)


@needs_readme
def test_commands_of_the_readme_are_understood():
    text = README.read_text()
    code = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M))
    assert check_commands("\n".join(code)) >= {"train", "probe"}
    check_commands("\n".join(spans))


@needs_readme
def test_flags_of_the_readme_exist():
    parsers = [importlib.import_module(command).build_parser() for command in COMMANDS]
    known = {flag for p in parsers for action in p._actions for flag in action.option_strings}
    text = re.sub(r"torchrun (?:-\S+ )*", "", README.read_text().replace("\\\n", " "))
    lines = [line for line in text.splitlines() if not re.search(r"\b(pip|git|ruff) ", line)]
    flags = re.findall(r"(?<![\w-])--[a-z][\w-]+", "\n".join(lines))
    unknown = set(flags) - known - {"--nproc_per_node", "--max-restarts"}  # of torchrun
    assert flags and not unknown


@needs_readme
def test_each_equation_of_the_readme_has_a_function_and_a_test():
    text = README.read_text()
    row = r"^\|.*`((?:appendix/)?\w+\.py):([\w.]+)`.*`(tests/test_\w+\.py)::(\w+)`"
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) >= 15
    header = re.search(r"^\|.*\bfunction\b.*\btest\b.*\|\n\|[-| :]+\|\n((?:\|.*\n)+)", text, re.M)
    assert header[1].count("\n") == len(rows)  # every row of the table was understood
    for source, function in re.findall(r"`((?:appendix/|tests/)?\w+\.py)::?([\w.]+)`", text):
        tree = parse(ROOT / source)
        names = {name for name, _ in functions(tree)}
        names |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        assert function in names, f"{source}:{function}"


@needs_readme
def test_the_lines_of_the_readme_that_load_a_run_give_v(folder):
    """The Python block, run as it stands, on a run of that name and a picture of that name."""
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    train.main([*TINY, "--data", folder, "--epochs", "1", "--name", "mnist"])
    Image.new("L", (30, 20), 200).save("digit.png")
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["v"].shape == (1, 1024) and names["v"].std() > 0


def record(name):
    """A file of results/."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


@needs_readme
def test_accuracies_of_the_readme_are_those_of_the_records():
    text = README.read_text()
    rung = r"\| `python train\.py(?: --data (\w+))?` \| (\d+) \+ (\d+) min \| "
    ladder = re.findall(rung + r"([^|]*) \| ([^|]*) \| ([\d.]*) ?\|", text)
    assert [row[0] for row in ladder] == ["", "mnist", "cifar10"]
    paper = record("paper")["table1"]["DiER"]
    for name, training, probing, top1, floors, published in ladder:
        runs = [record(f"{name or 'glyphs'}{seed}") for seed in ("", "-seed-1", "-seed-2")]
        found = [f"{run['test_top1']:.2f} ({run['chosen_t']})" for run in runs]
        assert top1.replace("t = ", "") == ", ".join(found), name
        assert floors == ", ".join(f"{x:.2f}" for x in runs[0]["floors"].values()), name
        seconds = (runs[0]["training"]["seconds"], runs[0]["seconds"])
        assert [training, probing] == [f"{s / 60:.0f}" for s in seconds], name
        assert published == (str(paper[name]) if name else ""), name
    pattern = r"\(top-1 on one: (\S+)\),.*\(top-1 in fp32: (\S+)\)"
    said = re.search(pattern, text, re.DOTALL).groups()
    again = [record(name)["test_top1"] for name in ("glyphs-one-thread", "mnist-fp32")]
    assert list(said) == [f"{top1:.2f}" for top1 in again]
    rows = [row for name in ("glyphs-fp32", "glyphs-one-thread") for row in record(name)["rows"]]
    at_400 = [f"{row['top1']:.2f}" for row in rows if row["t"] == 400]
    assert f"rounding differs; top-1 {' to '.join(at_400)})" in text
    said = re.search(r"\(so ours have (\S+) by seed 2, (\S+), (\S+)\)\.\n", text).groups()
    none = [record(f"{name}-norm-none")["oracle_top1"] for name in ("glyphs", "mnist", "cifar10")]
    assert list(said) == [f"{top1:.2f}" for top1 in none]
    slow, fast = (record(name)["training"]["seconds"] for name in ("mnist-fp32", "mnist"))
    assert f"in fp32 up to {slow / fast:.1f} times that" in text
    lab = (ROOT / "results/README.md").read_text()
    for name in ("glyphs", "mnist", "cifar10"):
        cells = " | ".join(f"{row['top1']:.2f}" for row in record(name)["rows"])
        assert f"| top-1 | {cells} |" in lab, name


@needs_readme
def test_the_verdict_of_the_readme_is_that_of_the_records():
    text = README.read_text()
    runs = [record(name) for name in ("cifar10", "cifar10-seed-1", "cifar10-seed-2")]
    leads = []
    for run in runs:
        second, best = sorted(run["rows"], key=lambda row: row["top1"])[-2:]
        assert best["t"] == 100
        leads.append(best["top1"] - second["top1"])
    assert f"by {min(leads):.1f} to {max(leads):.1f} points; glyphs" in text
    top1, random = [run["test_top1"] for run in runs], [run["floors"]["random"] for run in runs]
    said = f"{min(top1):.1f} to {max(top1):.1f} on CIFAR-10, three seeds; raw pixels have "
    pixels = runs[0]["floors"]["pixels"]
    said += f"{pixels:.1f}, a random encoder {min(random):.1f} to {max(random):.1f}."
    assert said in text
    means, below = [], []
    for name in ("bccd", "oct2017"):
        runs = [record(f"{name}-part{seed}") for seed in ("", "-seed-1", "-seed-2")]
        table = {row["method"]: row["top1"] for row in record(f"table1-{name}")["rows"]}
        pairs = [(run["test_top1"], run["floors"]) for run in runs] + [(table["dier"], table)]
        assert all(top1 < max(floors["pixels"], floors["random"]) for top1, floors in pairs), name
        means.append(statistics.mean(run["test_top1"] for run in runs))
        below.append(runs[0]["floors"]["pixels"] - means[-1])
    assert "not on our parts of BCCD and OCT2017" in text
    page = " ".join((ROOT / "results/README.md").read_text().split())
    said = "their means of three seeds, {:.2f} (chance 25) and {:.2f}, are {:.0f} and {:.0f} points"
    assert said.format(*means, *below) in page
    behind = []
    for name in ("glyphs", "mnist", "cifar10"):
        for seed in ("", "-seed-1", "-seed-2"):
            top1 = {row["t"]: row["top1"] for row in record(name + seed)["rows"]}
            behind.append(max(top1.values()) - top1[700])
    assert f"just {min(behind):.1f} to {max(behind):.1f} points below\nthe best" in text
    means, leads, at_0 = [], [], []
    for name in ("mnist", "cifar10"):
        cells = {(c["method"], c["seed"]): c for c in record(f"time-{name}")["cells"]}
        for seed in range(3):
            seeing, blind = cells["dier", seed], cells["dier-notime", seed]["top1"]
            leads.append(seeing["top1"] - blind)
            at_0.append(seeing["probe"][0]["top1"] - blind)
        for method in ("dier", "dier-notime"):
            means.append(np.mean([cells[method, seed]["top1"] for seed in range(3)]))
    shown = [f"{x:.1f}" for x in means]
    said = f"MNIST {shown[0]}, always told t = 0 {shown[1]}, CIFAR-10 {shown[2]} and {shown[3]};"
    assert said + " ahead in five of six pairs, but not if probed at t = 0" in text
    assert sum(lead > 0 for lead in leads) == 5
    assert np.mean(at_0[:3]) < 0.1 and np.mean(at_0[3:]) < 0
    paper = record("paper")["table1"]
    dier = paper.pop("DiER")
    sets = [name for name in dier if not name.endswith("_top5")]
    assert len(sets) == 6 and sum(dier[name] > paper["MAE"][name] for name in sets) == 5
    assert sum(all(dier[name] > row[name] for row in paper.values()) for name in sets) == 4
    for name, better in (("mnist", True), ("cifar10", True), ("tiny-imagenet", False)):
        here = {row["method"]: row["top1"] for row in record(f"table1-{name}")["rows"]}
        assert (here["dier"] > here["mae"]) is better, name
    assert here["dier"] < here["random"]
    longer = [record(f"tiny-imagenet-part{seed}") for seed in ("", "-seed-1", "-seed-2")]
    assert all(run["test_top1"] > max(run["floors"].values()) for run in longer)
    mean = statistics.mean(run["test_top1"] for run in longer)
    said = f"below random weights; {longer[0]['epochs']:.0f} bring {mean:.1f}."
    assert said in " ".join(text.split())


@needs_readme
def test_the_pages_say_nothing_twice_and_name_every_record():
    pages = [README.read_text(), (ROOT / "results/README.md").read_text()]
    parts = [part for page in pages for part in page.split("\n\n")]
    assert len(set(parts)) == len(parts)
    known = [path.name for path in (ROOT / "results").iterdir() if path.name != "README.md"]
    named = set(re.findall(r"[\w*-]+\.(?:json|png)", "".join(pages)))
    assert [file for file in known if not any(fnmatch(file, name) for name in named)] == []
    for link in re.findall(r"\]\(([\w-]+\.png)\)", pages[1]):
        assert link in known, link


@needs_readme
def test_the_recorded_runs_have_the_sizes_and_recipe_of_todays_presets():
    """Nobody changes a row of the table without new figures."""
    for name in ("glyphs", "mnist", "cifar10"):
        found, row = record(name), table_row("cpu", name, 32)
        steps = math.ceil(row["epochs"] * found["n_train"] / row["batch_size"])
        assert found["protocol"]["step"] == steps, name
    for name in ("mnist", "cifar10", "bccd", "oct2017"):
        table = record(f"table1-{name}")
        cell = next(cell for cell in table["cells"] if cell["method"] == "dier")
        settings = train.resolve({"data": name, "preset": "cpu", "device": "cpu"})
        assert all(table[key] == settings[key] for key in ("size", "batch_size")), name
        assert cell["parameters"] == sum(train.parameter_counts(settings).values()), name
        assert cell["flops_per_image"] == baselines.flops_per_image("dier", settings), name
    counts = train.parameter_counts(train.resolve({"preset": "cpu", "device": "cpu"}))
    total, encoder = sum(counts.values()) / 1e6, counts["encoder"] / 1e6
    sizes = []  # fp32 weights, their average and Adam's two moments: 16 bytes a parameter
    for name in ("mnist", "bccd"):
        settings = train.resolve({"data": name, "preset": "paper", "device": "cpu"})
        sizes.append(16 * sum(train.parameter_counts(settings).values()) / 1e9)
    text = " ".join(README.read_text().split())
    assert "checkpoints have {:.1f} to {:.1f} GB".format(*sizes) in text
    said = f"no GPU: preset cpu, {total:.1f}M parameters, of which the encoder has {encoder:.2f}M"
    assert said in README.read_text()


@needs_readme
def test_the_compared_methods_of_the_readme_are_those_of_the_records():
    """Of each set and method: top-1 here, and after a slash the paper's where it has one."""
    pattern = r"^\| here / paper \|(.*)\|\n\|[- |]+\|\n((?:\|.*\n)+)"
    table = re.search(pattern, README.read_text(), re.MULTILINE)
    methods = {shown: method for method, shown in baselines.PAPER_NAMES.items()}
    heads = [cell.strip() for cell in table[1].split("|")]
    assert set(methods) < set(heads)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2].splitlines()]
    names = [name.removesuffix(" (part)") for name, *_ in lines]
    assert names == ["mnist", "cifar10", "tiny-imagenet", "bccd", "oct2017"]
    for name, (_, *cells) in zip(names, lines):
        rows = {row["method"]: row for row in record(f"table1-{name}")["rows"]}
        for head, cell in zip(heads, cells, strict=True):
            row = rows[methods.get(head, head)]
            assert cell == f"{row['top1']:.1f}" + (f" / {row['paper']}" if row["paper"] else "")
    controls, text = record("table1-controls"), " ".join(README.read_text().split())
    before = controls["top1_before_the_first_step"]
    pattern = r"one like DiER's ([\d.]+), MAE's ([\d.]+)\), .* has ([\d.]+) on MNIST and "
    said = re.search(pattern + r"([\d.]+) on CIFAR-10, ahead of it on both;", text)
    rows = [row for row in controls["mae_at_dier_s_flops"] if row["chosen_by"] == "held-out"]
    longer = {row["data"]: row["top1"] for row in rows}
    for row in rows:
        cells = {(c["method"], c["seed"]): c for c in record(f"table1-{row['data']}")["cells"]}
        ahead = [seed["top1"] > cells["dier", seed["seed"]]["top1"] for seed in row["seeds"]]
        assert ahead == [True] * 3
    page = " ".join((ROOT / "results/README.md").read_text().split())
    for row in controls["mae_at_dier_s_flops"]:
        assert f"{row['top1']:.2f} ± {row['top1_std']:.2f}" in page
    floors = {row["method"]: row["top1"] for row in record("table1-mnist")["rows"]}
    found = [floors["random"], before["mae"], longer["mnist"], longer["cifar10"]]
    assert list(said.groups()) == [f"{x:.1f}" for x in found]
    cells = record("table1-cifar10")["cells"]
    top1 = {
        method: [c["top1"] for c in cells if c["method"] == method] for method in methods.values()
    }
    best = [max(top1, key=lambda method: top1[method][seed]) for seed in range(3)]
    assert best.count("dier") == 2 and "in two of three seeds, DiER on CIFAR-10" in text
    cost = {}
    for row in controls["rates"]:
        screened, other = (row[key]["curve"][-1]["top1"] for key in ("screened", "untried_1e-3"))
        cost[row["method"]] = other - screened
    said = re.search(r"screened too briefly cost MAE (\d) points on MNIST, LMIM-ViT (\d)\.", text)
    assert list(said.groups()) == [f"{cost['mae']:.0f}", f"{cost['lmim']:.0f}"]


@needs_readme
def test_longer_runs_on_a_part_of_tiny_imagenet_are_as_recorded():
    text = " ".join((ROOT / "results/README.md").read_text().split())
    pattern = r"it has ([\d.]+) after 10 epochs \(MAE there ([\d.]+), LMIM-Swin ([\d.]+)\), "
    pattern += r"([\d.]+) after 15, ([\d.]+) after 31 and ([\d.]+) after 62, .* MAE has ([\d.]+), "
    dier, mae, swin, dier_62, mae_184, *more = record("table1-controls")["tiny_imagenet_part"]
    later = [point["top1"] for point in dier_62["curve"]]
    found = [dier["top1"], mae["top1"], swin["top1"], *later, mae_184["top1"]]
    assert list(re.search(pattern, text).groups()) == [f"{x:.1f}" for x in found]
    assert abs(dier_62["flops"] / mae_184["flops"] - 1) < 0.01  # "For as many"
    names = [f"tiny-imagenet-part{seed}" for seed in ("", "-seed-1", "-seed-2")]
    ours, theirs = ([record(name)["test_top1"] for name in names], [mae_184["top1"]])
    theirs += [cell["top1"] for cell in more]
    both = (", ".join(f"{x:.1f}" for x in values) for values in (ours, theirs))
    assert "Three seeds: DiER {}, MAE {}, ahead with each,".format(*both) in text
    assert all(a < b for a, b in zip(ours, theirs, strict=True))


@needs_readme
def test_the_search_for_t_and_few_labels_in_the_readme_are_as_recorded():
    text = " ".join(README.read_text().split())
    names = ("glyphs-seed-2", "mnist", "cifar10-seed-1")
    found, few = record("t-auto"), record("few")
    times = ", ".join(str(found[name]["chosen_t"]) for name in names)
    assert f": {times} on the figure's runs, no worse than the best." in text
    assert all(found[name]["test_top1"] >= record(name)["oracle_top1"] for name in names)
    took = [found[name]["seconds"] / record(name)["seconds"] for name in names]
    assert f"({100 * min(took):.0f} to {100 * max(took):.0f}% with its probe)" in text
    times = ", ".join(str(few[name]["chosen_t"]) for name in names)
    assert f"images' fine detail, {times};" in text
    said = re.search(r"by (\d+) points on glyphs, (\d+) on MNIST and (\d+) on CIFAR-10", text)
    for name, points in zip(names, said.groups()):
        best = {row["features"]: row["accuracy"] for row in few[name]["rows"] if row["each"] == 100}
        assert points == f"{best['v'] - max(best['random'], best['pixels']):.0f}"
    rows = [row for row in few["bccd-part"]["rows"] if row["each"] == 100]
    best = {row["features"]: row["accuracy"] for row in rows}
    assert best["v"] < min(best["random"], best["pixels"])  # "on our part of BCCD it is behind"
    cka = record("cka-glyphs")
    pair = cka["cka"][cka["t"].index(100)][cka["t"].index(700)]
    assert f"v_700 is like v_100 (similarity {pair:.2f} of 1, linear CKA)" in text
