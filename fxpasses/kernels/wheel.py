"""Has setuptools put compiled kernels into the wheel, where a C++ compiler is at hand and the CPU is an x86.

Where there is none, the wheel is one for every platform, and the kernels are compiled when they are first
needed. An editable installation compiles them then, too. setuptools loads this file by its path: neither
torch nor the package can be imported.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1
    from wheel.bdist_wheel import bdist_wheel


def _compiler() -> str | None:
    """The command of the compiler; None where the wheel is built without kernels."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return None
    return shutil.which(os.environ.get("CXX", "g++"))


class BuildKernels(build_py):
    """Copies the package's files, and compiles its kernels among the copies."""

    def run(self) -> None:
        super().run()
        compiler = _compiler()
        if compiler is None or self.editable_mode:
            return
        build = _build_module()
        for vectors in build.VECTOR_FLAGS:
            library = Path(self.build_lib, "fxpasses", "kernels", "prebuilt", build.prebuilt(vectors).name)
            try:
                build.compile_kernels(vectors, library, compiler)
            except (OSError, subprocess.SubprocessError) as error:
                details = getattr(error, "stderr", "") or error
                self.warn(f"the kernels for {vectors} will be compiled when they are first needed: {details}")


class PlatformWheel(bdist_wheel):
    """A wheel for any Python, for this platform alone where it holds compiled kernels."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = _compiler() is None

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform_name = super().get_tag()
        return (python, abi, platform_name) if self.root_is_pure else ("py3", "none", platform_name)


def _build_module() -> Any:
    spec = importlib.util.spec_from_file_location("_build", Path(__file__).with_name("build.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
