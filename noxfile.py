"""The tests under each Python that is found here, and linters: `nox`, `nox -s tests-3.12 -- -k folding`."""

from __future__ import annotations

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
LINTERS = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports"]]

nox.options.error_on_missing_interpreters = False  # an interpreter that is not there is skipped
nox.options.reuse_venv = "yes"


def install(session: nox.Session) -> None:
    """Installs the checkout and what its tests need, in the versions that they are known to pass with."""
    session.install("-c", ".ci/constraints.txt", "-e", ".[test]")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """pytest, with the arguments after `--`."""
    install(session)
    session.run("pytest", *(session.posargs or ["-n", "2"]))


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """What `.ci/run` checks besides the tests."""
    install(session)
    for command in LINTERS:
        session.run(*command)
