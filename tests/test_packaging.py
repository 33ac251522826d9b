"""What pyproject.toml says: the version once, and which extra installs what."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxpasses
from fxpasses.kernels import build

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


@pytest.mark.full
@pytest.mark.parametrize("compiler", ["g++", "no-such-compiler"])
def test_a_wheel_has_the_kernels_where_there_is_a_compiler(compiler, tmp_path):
    """And is for every platform where there is none. pip fetches setuptools for it."""
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "fxpasses", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "CXX": compiler})
    (wheel,) = tmp_path.glob("*.whl")
    built = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if "prebuilt" in name}
    if compiler == "g++" and shutil.which("g++") and platform.machine() == "x86_64":
        assert built == {build.prebuilt(vectors).name for vectors in build.VECTOR_FLAGS}
        assert "-py3-none-linux_x86_64" in wheel.name
    else:
        assert not built
        assert wheel.name.endswith("-py3-none-any.whl")
