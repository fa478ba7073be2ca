"""The README's names exist: each equation has its function and its test."""

import ast
import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def names(path):
    """Functions and classes at the top of a file."""
    tree = ast.parse((ROOT / path).read_text())
    return {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def test_each_equation_has_a_function_and_a_test():
    rows = re.findall(r"\| `(\w+\.py):(\w+)` \| `(tests/\w+\.py)::(\w+)` \|", README)
    table = README.split("| equation | function | test |")[1].split("\n\n")[0]
    assert len(rows) == table.count("\n") - 1 >= 15  # every row of the table was understood
    for source, function, test_file, test in rows:
        assert function in names(source), f"{source}:{function}"
        assert test in names(test_file), f"{test_file}::{test}"


def test_other_tests_that_the_text_names_exist():
    for path, test in re.findall(r"(tests/\w+\.py)::(\w+)", README):
        assert test in names(path), f"{path}::{test}"


def test_flags_of_the_readme_exist():
    import probe
    import train

    known = {o for m in (train, probe) for a in m.build_parser()._actions for o in a.option_strings}
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", README):
        assert flag in known, flag
