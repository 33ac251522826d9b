"""The pages are true: examples run, commands, links and names exist, tables are those of the code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import fxpasses
from fxpasses import cli, options, pytest_plugin, testing
from fxpasses.cli.demonstration import Check, DemoResult, Timing
from fxpasses.passes.layout import coverage
from fxpasses.pipeline import register_all
from fxpasses.report.codes import CODES
from fxpasses.rewrite.hazards import MODE_CODES
from fxpasses.rewrite.registry import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path: (ROOT / path).read_text(encoding="utf-8")
    for path in (
        "README.md",
        "fxpasses/passes/README.md",
        "fxpasses/testing/README.md",
        "benchmarks/README.md",
        "fxpasses/passes/layout/OPERATORS.md",
    )
}
README, PASSES, KIT, BENCHMARKS, OPERATORS = PAGES.values()
GENERATED = r"<!-- (means|performance|ablation): begin -->.*?<!-- \1: end -->"

UNSPELLED_CODES = {"check", "profit", "check-error", "rewrite-error", "verify-structure", "verify-numerics"}
"""Codes that the code puts together or hands on, so that no call holds them."""


@pytest.fixture
def registry() -> Iterator[None]:
    """Takes out again what a page registers."""
    register_all()
    before = REGISTRY.names()
    yield
    for name in set(REGISTRY.names()) - set(before):
        fxpasses.unregister(name)


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """The line that each block of a language begins at, and its text."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [(page.count("\n", 0, each.start(1)), each[1]) for each in found]


# Examples --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(("path", "count"), [("README.md", 8), ("fxpasses/passes/README.md", 8)])
def test_every_python_block_runs_in_order(path, count, monkeypatch):
    assert len(blocks(PAGES[path], "python")) >= count
    run_page(path, monkeypatch)


@pytest.mark.usefixtures("registry")
def test_the_blocks_and_the_test_on_the_page_of_the_kit_run(monkeypatch, request):
    names = run_page("fxpasses/testing/README.md", monkeypatch)
    (function,) = (each for name, each in names.items() if name.startswith("test_"))
    function(**{each: request.getfixturevalue(each) for each in inspect.signature(function).parameters})


def run_page(path: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Runs a page's blocks as one module, which Dynamo can import; returns its names."""
    page = types.ModuleType("a_page")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    for line, block in blocks(PAGES[path], "python"):
        exec(compile("\n" * line + block, path, "exec"), vars(page))
    return vars(page)


def test_no_page_with_examples_is_forgotten():
    assert not blocks(BENCHMARKS + OPERATORS, "python")
    folders = [ROOT, *(ROOT / name for name in ("fxpasses", "benchmarks", "tests"))]
    pages = {page for folder in folders for page in folder.glob("README.md" if folder == ROOT else "**/*.md")}
    assert {str(page.relative_to(ROOT)) for page in pages} == set(PAGES)


def test_explain_prints_what_the_readme_shows(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FXPASSES_SHIPPED_PROFILES", "0")  # as on a machine that none is for
    (shown,) = (text for _, text in blocks(README, "text") if text.startswith("$ "))
    command, _, output = shown.partition("\n")
    assert cli.main(shlex.split(command)[2:]) == 0
    first, rest = output.split("...\n")  # what follows depends on what was measured on the machine
    assert rest == ""
    seconds = re.compile(r"\d+\.\d+")
    assert seconds.sub("#", capsys.readouterr().out).startswith(seconds.sub("#", first))


def test_the_demo_s_last_lines_are_as_the_readme_shows_them(capsys, monkeypatch):
    """The words and the columns; the figures are those of one machine on one day."""
    (shown,) = (text for _, text in blocks(README, "text") if text.startswith("variant"))
    timings = {name: Timing((0.05, 0.05), 1) for name in ("eager", "inductor")} | {
        "fxpasses": Timing((0.04, 0.04), 1)
    }
    result = DemoResult(fxpasses.Report(), (Check("c", 0.0, 1.0),), timings, 2)
    monkeypatch.setattr("fxpasses.cli.demonstration.run_demo", lambda *_: result)
    cli.main(["demo"])
    assert words(capsys.readouterr().out)[-len(words(shown)) :] == words(shown)


def words(text: str) -> list[str]:
    """Without figures, rules and spaces."""
    return re.sub(r"[\d.]+", "#", text.replace("─", "")).split()


# Commands, links and names ---------------------------------------------------------------------------------


def commands() -> list[tuple[str, list[str]]]:
    """Each command of a shell block that is ours, as a module or `fxpasses`, and its arguments."""
    found = []
    for page in PAGES.values():
        for _, block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                first, *rest = shlex.split(line, comments=True)
                if (first, *rest[:1]) == ("python", "-m") and rest[1].startswith("benchmarks."):
                    found.append((rest[1], rest[2:]))
    return found


@pytest.mark.parametrize("module", sorted({module for module, _ in commands()}))
def test_every_option_of_the_commands_that_are_shown_exists(module, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    known = capsys.readouterr().out
    used = {each for name, given in commands() if name == module for each in given if each.startswith("--")}
    for option in used:
        assert re.search(rf"{option}\b", known), option


def test_models_of_tests_that_commands_name_exist():
    for module, name in re.findall(r"\b(tests(?:\.\w+)+):(\w+)", "".join(PAGES.values())):
        assert hasattr(importlib.import_module(module), name)


def test_every_command_of_the_benchmarks_is_on_their_page():
    modules = {
        path.stem if path.stem != "__main__" else path.parent.name
        for path in (ROOT / "benchmarks").rglob("*.py")
        if "argparse.ArgumentParser(" in path.read_text(encoding="utf-8")
    }
    assert set(re.findall(r"^\| `python -m benchmarks\.(\w+)", BENCHMARKS, re.MULTILINE)) == modules


def test_files_and_commands_that_the_pages_name_exist():
    for page in PAGES.values():
        for path in re.findall(r"`((?:fxpasses|benchmarks|tests|\.ci)/[\w/.-]+)`", page):
            assert (ROOT / path).exists(), path
        for module in re.findall(r"python -m (benchmarks\.\w+)", page):
            assert importlib.util.find_spec(module), module
        for name in re.findall(r"`(fxpasses(?:\.\w+)+)(?:\(.*?\))?`", page):
            assert exists(name), name


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, _, last = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), last) or bool(importlib.util.find_spec(name))
    except ModuleNotFoundError:
        return exists(module) and hasattr(importlib.import_module(module.rpartition(".")[0]), last)


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path):
    prose = re.sub(r"^```.*?^```$", "", PAGES[path], flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("https://"):
            continue
        place, _, anchor = target.partition("#")
        linked = (ROOT / path).parent / place if place else ROOT / path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, (
                target
            )


def test_every_public_name_is_on_a_page():
    pages = "".join(PAGES.values())
    names = {*fxpasses.__all__, *testing.__all__, "save_repro", "keep_repro"}
    names |= {name for name, each in vars(pytest_plugin).items() if "fixture" in type(each).__name__.lower()}
    assert "fxpasses_fresh" in names
    assert {each for each in names if not re.search(rf"\b{each}\b", pages)} == set()


def test_every_command_of_the_package_is_on_a_page(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE)
    assert {"demo", "explain"} <= set(listed)
    for command in listed:
        assert re.search(rf"\bfxpasses {command}\b", "".join(PAGES.values())), command


# Tables ----------------------------------------------------------------------------------------------------


def test_the_codes_in_the_table_are_those_of_the_code():
    documented = set(re.findall(r"^\| `([a-z-]+)` \|", section(PASSES, "Reason codes"), re.MULTILINE))
    kit = ROOT / "fxpasses" / "testing"
    sources = [each for each in (ROOT / "fxpasses").rglob("*.py") if kit not in each.parents]
    raised = {code for each in sources for code in codes_in(each)}
    assert documented == raised | set(MODE_CODES.values()) | UNSPELLED_CODES


def test_the_table_of_codes_says_what_the_page_says():
    rows = re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", section(PASSES, "Reason codes"), re.MULTILINE)
    assert dict(rows) == {name: code.meaning for name, code in CODES.items()}


def test_every_code_has_advice_and_its_options_exist():
    for name, code in CODES.items():
        assert code.advice, name
        for change in code.tries:
            assert options.Options.of(change) != options.Options(limit=0), name


def codes_in(path: Path) -> Iterator[str]:
    """The codes that calls in a file hold: of a `Decline`, of a miss, of a remark that is no application."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        texts = [each.value if isinstance(each, ast.Constant) else None for each in node.args]
        code: object = None
        if name in ("Decline", "_note"):
            code = texts[0 if name == "Decline" else 1]
        elif name in ("Remark", "remark", "_remark"):
            code = next((b for a, b in itertools.pairwise(texts) if a in ("declined", "failed")), None)
        elif name == "replace":
            code = next((each.value.value for each in node.keywords if each.arg == "code"), None)
        # A message is no code: `_remark(node, "declined", message, code)` has the code last.
        if isinstance(code, str) and re.fullmatch(r"[a-z-]+", code):
            yield code


def section(page: str, heading: str) -> str:
    """What stands under a heading, up to the next of its kind."""
    return page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_rules_in_the_table_are_those_of_the_registry():
    register_all()
    rules = [rule.name for each in REGISTRY.pipeline(options.Options()) for rule in each.rules]
    assert re.findall(r"^\| `(\w+)` \|", section(PASSES, "Rules"), re.MULTILINE) == rules


def test_the_options_in_the_table_are_the_fields_with_their_values():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", section(PASSES, "Options"), re.MULTILINE)
    fields = {each.name: each for each in dataclasses.fields(options.Options)}
    assert [name for name, _ in rows] == list(fields)
    for name, values in rows:
        choices = get_args(get_type_hints(options.Options)[name])
        if choices and all(isinstance(each, str) for each in choices):
            assert re.findall(r'"(\w+)"', values) == list(choices)
            assert fields[name].default == choices[0]


def test_the_page_of_operators_is_that_of_the_code():
    assert coverage.page() == OPERATORS


# Form ------------------------------------------------------------------------------------------------------


def test_the_readme_has_at_most_250_lines():
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("path", PAGES)
def test_lines_of_prose_and_code_are_of_readable_width(path):
    written = re.sub(GENERATED, "", PAGES[path], flags=re.DOTALL)
    assert max(map(len, written.splitlines())) <= 120


# The test command ------------------------------------------------------------------------------------------


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
    for name in ("pip", "pytest", "ruff", "mypy", "lint-imports"):
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
    installed, runtimes, *checks, tested = [each.strip() for each in calls]
    assert f"{installed} && {tested}" == command[0].replace("'", "")
    assert runtimes == "pip install --no-compile -c .ci/constraints.txt -e .[bench]"
    assert checks == ["ruff check .", "ruff format --check .", "mypy", "lint-imports"]


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
    marked = {
        path for path in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.vectors", path.read_text())
    }
    for run, each in zip(tests, others, strict=True):
        command, modules = run.split(" tests/", 1)
        assert command == f"{each} {suite} -m vectors and not full"
        assert {ROOT / "tests" / name for name in modules.split(" tests/")} == marked


@pytest.mark.parametrize("failing", ["pip", "ruff", "mypy", "lint-imports", "pytest", "vectors"])
def test_ci_fails_where_one_of_its_steps_fails(tmp_path, failing):
    status, calls = run_ci(tmp_path, failing=failing)
    assert status == 1
    assert ("pip" if failing == "pip" else "pytest") in calls[-1]


def _script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
