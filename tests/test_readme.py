"""The README is true: its Python runs, its command is what `.ci/run` runs, its tables are the code's."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxpasses
from fxpasses.passes import register_all
from fxpasses.rewrite.hazards import MODE_CODES
from fxpasses.rewrite.registry import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

DRIVER_CODES = {"limit", "check-error", "rewrite-error"}


@pytest.fixture
def registry() -> Iterator[None]:
    """Takes out again what the README registers."""
    register_all()
    before = REGISTRY.names()
    yield
    for name in set(REGISTRY.names()) - set(before):
        fxpasses.unregister(name)


def python_blocks() -> Iterator[tuple[int, str]]:
    """The line that each block of Python begins at, and its text."""
    for found in re.finditer(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        yield README.count("\n", 0, found.start(1)), found[1]


def test_every_python_block_runs_in_order(registry):
    namespace: dict[str, object] = {"__name__": "readme"}
    blocks = list(python_blocks())
    assert len(blocks) >= 7
    for line, block in blocks:
        exec(compile("\n" * line + block, "README.md", "exec"), namespace)


def test_the_codes_in_the_table_are_those_of_the_code():
    documented = set(re.findall(r"^\| `([a-z-]+)` \|", README, re.MULTILINE))
    sources = [
        *(ROOT / "fxpasses" / "graph").glob("*.py"),
        *(ROOT / "fxpasses" / "passes").glob("*.py"),
    ]
    raised = {code for each in sources for code in _decline_codes(each)}
    assert documented == raised | set(MODE_CODES.values()) | DRIVER_CODES


def _decline_codes(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Decline":
            code = node.args[0]
            if isinstance(code, ast.Constant):
                assert isinstance(code.value, str)
                yield code.value


def test_files_and_commands_that_it_names_exist():
    for path in re.findall(r"`((?:fxpasses|benchmarks|\.ci)/[\w/.]+)`", README):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"python -m (benchmarks\.\w+)", README):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for module in re.findall(r"`(fxpasses(?:\.\w+)+)`", README):
        home = ROOT / module.rpartition(".")[0].replace(".", "/")
        assert home.is_dir() or home.with_suffix(".py").is_file(), module


def test_lines_of_prose_and_code_are_of_readable_width():
    before, _, rest = README.partition("<!-- performance: begin -->")
    # What stands between is generated from the result files.
    _, _, after = rest.partition("<!-- performance: end -->")
    assert max(map(len, (before + after).splitlines())) <= 120


def test_ci_runs_the_test_command_of_the_readme(tmp_path):
    """`.ci/run` with stand-ins for every program that it calls writes down what it would run."""
    calls = tmp_path / "calls"
    stand_ins = tmp_path / "stand-ins"
    stand_ins.mkdir()
    for name in ("pip", "pytest", "ruff", "mypy"):
        _script(stand_ins / name, f'echo "{name} $*" >> {calls}')
    # `python -m venv DIRECTORY` gives an environment whose activation changes nothing
    _script(stand_ins / "python3", 'mkdir -p "$3/bin"; touch "$3/bin/activate"')
    subprocess.run(
        [ROOT / ".ci" / "run"],
        env={"PATH": f"{stand_ins}:/usr/bin:/bin", "TMPDIR": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    command = re.search(r"^pip install .* && (pytest.*)$", README, re.MULTILINE)
    assert command is not None
    installed, *checks, tested = calls.read_text().splitlines()
    assert f"{installed} && {tested}" == command[0].replace("'", "")
    assert checks == ["ruff check .", "ruff format --check .", "mypy "]


@pytest.mark.parametrize("failing", ["pip", "ruff", "mypy", "pytest"])
def test_ci_fails_where_one_of_its_steps_fails(tmp_path, failing):
    calls = tmp_path / "calls"
    for name in ("pip", "pytest", "ruff", "mypy"):
        _script(tmp_path / name, f"echo {name} >> {calls}; exit {int(name == failing)}")
    _script(tmp_path / "python3", 'mkdir -p "$3/bin"; touch "$3/bin/activate"')
    result = subprocess.run(
        [ROOT / ".ci" / "run"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "TMPDIR": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 1
    assert calls.read_text().split()[-1] == ("pip" if failing == "pip" else "pytest")


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
