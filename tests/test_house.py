"""Run: pytest tests/test_house.py          (imports, long lines and functions, from the files)"""

import ast

import pytest
from conftest import ROOT

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("toy/*.py")])
ROOMS = {"flags", "rows", "data", "verify", "runtime", "page"}
ALLOWED = {  # file: whom of us it may import
    "verify": set(),
    "rows": set(),
    "page": set(),
    "flags": set(),
    "runtime": {"flags", "page"},
    "rollout": {"rows"},
    "data": {"flags", "rows", "runtime"},
    "sft": {"flags", "rows", "rollout", "data", "runtime"},
    "discriminator": {"flags", "rows", "rollout", "data", "runtime"},
    "rl": {"flags", "rows", "rollout", "data", "runtime", "verify", "page"},
    "eval": {"flags", "rows", "rollout", "data", "runtime", "verify", "page"},
    "align": {"flags", "rows", "rollout", "data", "runtime", "verify", "discriminator", "rl"},
}
# as a script: inside functions alone
SCRIPTS = {"rollout": {"flags", "data", "runtime", "discriminator"}}
TOY = {"toy", "rollout", "eval", *ROOMS}  # it starts the stages as a user would


def name_of(path):
    return path.stem if path.parent == ROOT else "toy"


def script_part(tree):
    """The imports of a module that do not run when it is imported: in functions, and under
    `if __name__ == "__main__"`."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    main = [node for node in tree.body if isinstance(node, ast.If)]
    main = [node for node in main if ast.unparse(node.test) == "__name__ == '__main__'"]
    return {inner for node in (*functions, *main) for inner in ast.walk(node)}


def imported(path, script=True):
    """First part of the name of every module that a file imports, wherever the import stands; with
    script=False not those of its `script_part`."""
    found, tree = set(), ast.parse(path.read_text())
    for node in set(ast.walk(tree)) - (set() if script else script_part(tree)):
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
    name, ours = name_of(path), ALLOWED.keys() | {"toy"}
    allowed = ALLOWED.get(name, TOY)
    assert imported(path, script=False) & ours <= allowed
    assert imported(path) & ours <= allowed | SCRIPTS.get(name, set())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_and_functions_are_short(path):
    text = path.read_text()
    assert [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 100] == []
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    assert {node.name for node in nodes if node.end_lineno - node.lineno >= 60} == set()


COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


def folded(node, kinds, inside=False):
    """Lines of expressions of these kinds inside one another, not counting those in a lambda."""
    if isinstance(node, kinds):
        if inside:
            yield node.lineno
        inside = True
    for child in ast.iter_child_nodes(node):
        yield from folded(child, kinds, inside and not isinstance(child, ast.Lambda))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_has_to_be_read_twice(path):
    """No conditional expression inside another, no comprehension inside a comprehension."""
    tree = ast.parse(path.read_text())
    assert [*folded(tree, ast.IfExp), *folded(tree, COMPREHENSIONS)] == []
