"""What pyproject.toml says: the version once, and which extra installs what."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import fxpasses

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest requires it there

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fxpasses"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
RUNTIMES = {"onnx", "onnxruntime", "onnxscript", "openvino"}


def installed_by(extra: str) -> Iterator[str]:
    """The distributions of an extra, those of extras that it names included."""
    for requirement in EXTRAS[extra]:
        if requirement.startswith("fxpasses["):
            yield from installed_by(requirement[len("fxpasses[") : -1])
        else:
            yield requirement.partition(">=")[0]


def test_the_version_is_read_from_the_package():
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fxpasses.version.__version__"}
    assert fxpasses.__version__ == fxpasses.version.__version__


def test_what_the_package_reads_beside_python_is_installed_with_it():
    """A file that no pattern of package-data names is in the repository, but in no wheel."""
    read = {
        path
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".md") and "__pycache__" not in path.parts
    }
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["fxpasses"]
    named = {pattern: set(PACKAGE.glob(pattern)) for pattern in patterns}
    assert read == set().union(*named.values())
    assert all(named.values()), "a pattern that names nothing"


def test_only_bench_installs_other_runtimes():
    assert RUNTIMES.isdisjoint(installed_by("test"))
    assert set(installed_by("bench")) >= RUNTIMES


def test_bench_installs_what_the_benchmarks_share_with_the_tests():
    shared = set(installed_by("measure"))
    assert shared
    assert shared <= set(installed_by("test"))
    assert shared <= set(installed_by("bench"))
