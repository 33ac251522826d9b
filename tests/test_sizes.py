"""Files and functions of the package can be read in one go; no two modules of tests share a name."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import fxpasses

PACKAGE = Path(fxpasses.__file__).parent
SOURCES = [path for kind in ("py", "cpp", "h", "jinja") for path in sorted(PACKAGE.rglob(f"*.{kind}"))]

FILE, FUNCTION = 450, 50
"""The most lines of each."""


def lengths(source: str) -> dict[str, int]:
    """The lines of every function, with its signature and its docstring."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, functions)]
    return {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in found}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_short_and_so_are_its_functions(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= FILE
    if path.suffix == ".py":
        assert {name: lines for name, lines in lengths(source).items() if lines > FUNCTION} == {}


def test_lines_of_a_function_are_counted():
    source = "def outer():\n    '''Text.'''\n\n    def inner():\n        pass\n    return inner\n"
    assert lengths(source) == {"outer": 6, "inner": 2}


def test_no_two_modules_of_tests_have_one_name():
    """Pytest cannot collect two."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
