"""The contract of imports in pyproject.toml: it holds, and it catches what it is there for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import networkx
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package and its settings, to be spoilt."""
    shutil.copytree(ROOT / "fxpasses", tmp_path / "fxpasses", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(checkout: Path) -> subprocess.CompletedProcess[str]:
    script = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


def test_the_contract_holds(checkout):
    done = lint(checkout)
    assert done.returncode == 0, done.stdout


PLANTED = {
    "at the top": "import fxpasses.backend.door\n",
    "inside a function": "def later():\n    import fxpasses.backend.door\n",
    "for types alone": (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import fxpasses.backend.door\n"
    ),
}


@pytest.mark.parametrize("text", PLANTED.values(), ids=PLANTED)
def test_an_upward_import_breaks_it(checkout, text):
    (checkout / "fxpasses" / "graph" / "planted.py").write_text(text)
    done = lint(checkout)
    assert done.returncode != 0
    assert "fxpasses.graph.planted -> fxpasses.backend.door" in done.stdout


def test_a_new_folder_must_be_given_its_place(checkout):
    (checkout / "fxpasses" / "attic.py").write_text("")
    done = lint(checkout)
    assert done.returncode != 0
    assert "fxpasses.attic" in done.stdout


def test_no_modules_import_each_other_in_a_circle():
    """By modules, where the contract goes by folders; imports inside functions and for types count."""
    found = grimp.build_graph("fxpasses", cache_dir=None)
    graph = networkx.DiGraph()
    for module in found.modules:
        graph.add_edges_from((module, each) for each in found.find_modules_directly_imported_by(module))
    assert graph.number_of_edges() > 100
    circles = [sorted(each) for each in networkx.strongly_connected_components(graph) if len(each) > 1]
    assert circles == []
