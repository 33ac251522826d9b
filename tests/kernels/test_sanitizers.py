"""The kernels read and write nothing beside their tensors: their own tests with the compiler's sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxpasses.torch_internals.cpp import cpp_compiler

pytestmark = [pytest.mark.full, pytest.mark.needs_kernels]

ROOT = Path(__file__).parents[2]
TESTS = ("test_convolution.py", "test_sequence.py", "test_winograd.py", "test_moments.py")
PLUGIN = "tests.kernels.sanitized"
MOMENTS = f"""
import ctypes
import {PLUGIN}
import torch
from fxpasses.kernels import build, library
vectors = torch.backends.cpu.get_cpu_capability()
kernels = library._kernels(vectors, library.cpp_compiler())
allocate = ctypes.CDLL(None).malloc
allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
sizes = (ctypes.c_int64 * 4)(1, 4, 4, 16)


class Call(ctypes.Structure):
    _fields_ = [("sizes", ctypes.c_void_p), ("groups", ctypes.c_int64)]
    _fields_ += [("image", ctypes.c_void_p), ("out", ctypes.c_void_p)]


image, out = allocate(4 * 256 - {{missing}}), allocate(4 * 4)
ctypes.memset(image, 0, 4 * 256 - {{missing}})
call = Call(ctypes.cast(sizes, ctypes.c_void_p), 2, image, out)
message = ctypes.create_string_buffer(100)
assert kernels.fxpasses_moments(ctypes.byref(call), 1, message, ctypes.c_int64(100)) == 0, message.value
print("done")
"""


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python with the sanitizer's library, whose kernels are compiled in a folder."""
    compiler = cpp_compiler()
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, check=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    variables = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "XDG_CACHE_HOME": str(folder),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | variables, capture_output=True, text=True, cwd=ROOT
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sanitized")


@pytest.mark.parametrize("missing", [0, 4])
def test_a_number_beside_an_image_is_noticed(missing: int, folder: Path) -> None:
    done = run("-c", MOMENTS.replace("{missing}", str(missing)), folder=folder)
    assert ("ERROR: AddressSanitizer" in done.stderr) == (missing > 0), done.stderr[-2000:]
    assert ("done" in done.stdout) == (missing == 0)


def test_the_tests_of_all_kernels_read_and_write_nothing_beside_tensors(folder: Path) -> None:
    files = [f"tests/kernels/{name}" for name in TESTS]
    done = run("-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:cacheprovider", *files, folder=folder)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    assert " passed" in done.stdout
