"""Docstrings: what a class or function documents by name is there."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREES = [
    (path, ast.parse(path.read_text(encoding="utf-8")))
    for folder in ("fxpasses", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def classes(trees: list[tuple[Path, ast.Module]]) -> dict[str, list[tuple[Path, ast.ClassDef]]]:
    """All classes, by name; a name may be that of several."""
    found = defaultdict(list)
    for path, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append((path, node))
    return found


def documented(node: ast.ClassDef | Function, section: str) -> list[str]:
    """The names that a section of a docstring describes: `name:` or `first, second:`, indented once."""
    _, _, rest = (ast.get_docstring(node) or "").partition(f"{section}:\n")
    described = re.split(r"^\S", rest, maxsplit=1, flags=re.MULTILINE)[0]
    heads = re.findall(r"^ {4}(\*{0,2}\w+(?:, \w+)*):", described, re.MULTILINE)
    return [name.lstrip("*") for head in heads for name in head.split(", ")]


def attributes(node: ast.ClassDef, known: dict[str, list[tuple[Path, ast.ClassDef]]]) -> set[str]:
    """Fields, methods, properties and what methods set on `self`, those of base classes included."""
    found = set()
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found.add(statement.target.id)
        elif isinstance(statement, ast.Assign):
            found |= {each.id for each in statement.targets if isinstance(each, ast.Name)}
        elif isinstance(statement, Function):
            found.add(statement.name)
            found |= {
                each.attr
                for each in ast.walk(statement)
                if isinstance(each, ast.Attribute)
                and isinstance(each.ctx, ast.Store)
                and ast.unparse(each.value) == "self"
            }
    for base in node.bases:
        name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
        for _, parent in known.get(name, []):
            found |= attributes(parent, known)
    return found


def parameters(node: Function) -> set[str]:
    given = node.args
    both = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {each.arg for each in both if each is not None}


def unknown_attributes(trees: list[tuple[Path, ast.Module]]) -> Iterator[str]:
    known = classes(trees)
    for path, node in (each for of_name in known.values() for each in of_name):
        for name in sorted({*documented(node, "Attributes")} - attributes(node, known)):
            yield f"{path}:{node.lineno}: {node.name} documents {name}, which it does not have"


def unknown_parameters(trees: list[tuple[Path, ast.Module]]) -> Iterator[str]:
    for path, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, Function):
                for name in sorted({*documented(node, "Args")} - parameters(node)):
                    yield f"{path}:{node.lineno}: {node.name} documents {name}, which it does not take"


def test_documented_attributes_exist():
    assert documented(classes(TREES)["RulePass"][0][1], "Attributes")[:2] == ["name", "rules"]
    assert list(unknown_attributes(TREES)) == []


def test_documented_parameters_exist():
    assert list(unknown_parameters(TREES)) == []


def test_what_is_not_there_is_found():
    tree = ast.parse('''
class Base:
    """A base.

    Attributes:
        mine: a field.
    """
    mine: int

class Child(Base):
    """A child.

    Attributes:
        mine: that of the base.
        first, second: two, of which
            a third: stands in a continuation.
        made: on self.
        other: nothing.
    """
    first: int
    second = 3

    def __init__(self):
        self.made = 1

def function(x, *rest, **more):
    """A function.

    Args:
        x: is there.
        *rest: too.
        y: is not.

    Returns:
        nothing: at all.
    """
''')
    trees = [(Path("file.py"), tree)]
    assert list(unknown_attributes(trees)) == ["file.py:10: Child documents other, which it does not have"]
    assert list(unknown_parameters(trees)) == ["file.py:26: function documents y, which it does not take"]
