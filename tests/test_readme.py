"""The README's names exist: each equation has its function and its test."""

import ast
import re

from conftest import ROOT

import probe
import train
from appendix import baselines, bench, figures, recover

README = (ROOT / "README.md").read_text()


def names(path):
    """Functions and classes at the top of a file."""
    tree = ast.parse((ROOT / path).read_text())
    return {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def test_each_equation_has_a_function_and_a_test():
    rows = re.findall(r"\| `((?:appendix/)?\w+\.py):(\w+)` \| `(tests/\w+\.py)::(\w+)` \|", README)
    table = README.split("| equation | function | test |")[1].split("\n\n")[0]
    assert len(rows) == table.count("\n") - 1 >= 15  # every row of the table was understood
    for source, function, test_file, test in rows:
        assert function in names(source), f"{source}:{function}"
        assert test in names(test_file), f"{test_file}::{test}"


def test_other_tests_that_the_text_names_exist():
    for path, test in re.findall(r"(tests/\w+\.py)::(\w+)", README):
        assert test in names(path), f"{path}::{test}"


def test_flags_of_the_readme_exist():
    modules = [train, probe, bench, recover, figures, baselines]
    known = {o for m in modules for a in m.build_parser()._actions for o in a.option_strings}
    ours = re.sub(r"torchrun .*?(?=train\.py|probe\.py)", "", README, flags=re.DOTALL)
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours):
        assert flag in known or flag == "--max-restarts", flag


def test_every_command_line_of_the_readme_is_understood():
    """Commands inside code blocks, with their flags, are accepted by the script's own parser."""
    scripts = {"train.py": train, "probe.py": probe, "appendix.bench": bench}
    scripts |= {"appendix.recover": recover, "appendix.figures": figures}
    scripts["appendix.baselines"] = baselines
    blocks = "\n".join(re.findall(r"```\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    seen = set()
    for name, flags in re.findall(r"(?:python (?:-m )?|torchrun .*?)(train\.py|probe\.py|"
                                  r"appendix\.\w+)([^#&;\n]*)", blocks):  # fmt: skip
        scripts[name].build_parser().parse_args(flags.replace("$set", "mnist").split())
        seen.add(name)
    assert seen >= {"train.py", "probe.py"}
