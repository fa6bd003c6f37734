"""Run: pytest tests/test_house.py          (imports, long lines and functions, from the files)"""

import ast

import pytest
from conftest import ROOT

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("toy/*.py")])
ROOMS = {"rows", "data", "verify", "runtime"}
ALLOWED = {  # file: whom of us it may import
    "verify": set(),
    "rows": set(),
    "runtime": set(),
    "rollout": {"rows"},
    "data": {"rows", "runtime"},
    "sft": {"rows", "rollout", "data", "runtime"},
    "discriminator": {"rows", "rollout", "data", "runtime"},
    "rl": {"rows", "rollout", "data", "runtime", "verify"},
    "eval": {"rows", "rollout", "data", "runtime", "verify"},
    "align": {"rows", "rollout", "data", "runtime", "verify", "discriminator", "rl"},
}
TOY = {"toy", "rollout", "eval", *ROOMS}  # it starts the stages as a user would


def name_of(path):
    return path.stem if path.parent == ROOT else "toy"


def imported(path):
    """First part of the name of every module that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("toy" if node.level else node.module.partition(".")[0])
    return found


def test_every_file_has_its_place():
    assert {name_of(path) for path in FILES} == ALLOWED.keys() | {"toy"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_who_imports_whom(path):
    """No stage imports another, except align, whose policy move is rl's; the rooms stand alone."""
    ours = imported(path) & (ALLOWED.keys() | {"toy"})
    assert ours <= ALLOWED.get(name_of(path), TOY)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_functions_are_short(path):
    text = path.read_text()
    assert [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100] == []
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    assert {node.name for node in nodes if node.end_lineno - node.lineno >= 60} == set()
