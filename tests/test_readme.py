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


def run_ci(
    folder: Path, *, failing: str = "", best: str = "avx2", **environment: str
) -> tuple[int, list[str]]:
    """`.ci/run`'s exit status and what it calls, with stand-ins for every program.

    Args:
        folder: for the stand-ins.
        failing: the program that fails; "vectors" for pytest with a capability of the CPU.
        best: the capability of the CPU, which torch tells.
        environment: further variables.
    """
    calls = folder / "calls"
    for name in ("pip", "pytest", "ruff", "mypy"):
        _script(
            folder / name, f'echo "$ATEN_CPU_CAPABILITY {name} $*" >> {calls}; exit {int(name == failing)}'
        )
    if failing == "vectors":
        _script(folder / "pytest", f'echo "pytest" >> {calls}; test -z "$ATEN_CPU_CAPABILITY"')
    # `python -m venv DIRECTORY` gives an environment whose activation changes nothing
    _script(folder / "python3", 'mkdir -p "$3/bin"; touch "$3/bin/activate"')
    _script(folder / "python", f"echo ${{ATEN_CPU_CAPABILITY:-{best}}}")
    done = subprocess.run(
        [ROOT / ".ci" / "run"],
        env={"PATH": f"{folder}:/usr/bin:/bin", "TMPDIR": str(folder), **environment},
        capture_output=True,
        check=False,
    )
    return done.returncode, calls.read_text().splitlines()


def test_ci_runs_the_test_command_of_the_readme(tmp_path):
    status, calls = run_ci(tmp_path, best="default")
    command = re.search(r"^pip install .* && (pytest.*)$", README, re.MULTILINE)
    assert status == 0
    assert command is not None
    installed, *checks, tested = [each.strip() for each in calls]
    assert f"{installed} && {tested}" == command[0].replace("'", "")
    assert checks == ["ruff check .", "ruff format --check .", "mypy"]


@pytest.mark.parametrize(
    ("best", "plain", "others"),
    [
        ("avx512", "", ["avx2", "default"]),
        ("avx512", "avx2", ["avx512", "default"]),
        ("avx2", "", ["default"]),
        ("avx2", "default", ["avx2"]),
        ("sve256", "", []),
    ],
)
def test_ci_runs_the_tests_of_vectors_with_the_other_capabilities(tmp_path, best, plain, others):
    given = {"ATEN_CPU_CAPABILITY": plain} if plain else {}
    status, calls = run_ci(tmp_path, best=best, **given)
    assert status == 0
    tests = [each for each in calls if " pytest " in each]
    suite = tests.pop().removeprefix(f"{plain} ")
    assert tests == [f"{each} {suite} -m vectors and not full" for each in others]


@pytest.mark.parametrize("failing", ["pip", "ruff", "mypy", "pytest", "vectors"])
def test_ci_fails_where_one_of_its_steps_fails(tmp_path, failing):
    status, calls = run_ci(tmp_path, failing=failing)
    assert status == 1
    assert ("pip" if failing == "pip" else "pytest") in calls[-1]


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
