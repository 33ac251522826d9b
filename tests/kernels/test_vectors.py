"""The kernels are compiled for the vectors that torch uses (`ATEN_CPU_CAPABILITY`), not for longer ones."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from fxpasses.kernels import library as kernels
from fxpasses.torch_internals.cpp import compile_cpp, cpp_compiler

pytestmark = pytest.mark.vectors

FLOATS = {"AVX2": 8, "AVX512": 16}
CPU = torch.backends.cpu.get_cpu_capability()
"""What torch makes of this CPU here; `.ci/run` runs this file for each that there is."""

AVX512 = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b")
"""Registers that there are in AVX-512 alone."""


def needed(library, field):
    """What a library says of itself under a field that objdump names."""
    command = ["objdump", "-p", library]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(rf"^ +{field} +(\S+)$", told, re.MULTILINE))


@pytest.mark.needs_kernels
@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
def test_the_library_has_no_longer_vectors_than_torch_uses():
    assert kernels.vector_length() == FLOATS[CPU]
    library = kernels._kernels(CPU, cpp_compiler())
    command = ["objdump", "-d", "--no-show-raw-insn", library._name]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "%ymm" in code
    assert bool(AVX512.search(code)) == (CPU == "AVX512")


@pytest.mark.needs_kernels
@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
def test_the_library_brings_no_openmp_that_inductors_code_would_not():
    loop = "#pragma omp parallel for\nfor (int at = 0; at < 9; at++) to[at] = at;"
    theirs = compile_cpp(f'extern "C" void count(int* to) {{\n{loop}\n}}')
    ours = kernels._kernels(CPU, cpp_compiler())
    runtimes = [{name for name in needed(one._name, "NEEDED") if "omp" in name} for one in (ours, theirs)]
    assert runtimes[0] == runtimes[1] != set()
    assert not any(name.startswith(("libtorch", "libc10")) for name in needed(ours._name, "NEEDED"))


def test_there_are_kernels_or_a_reason(monkeypatch):
    assert bool(kernels.vector_length()) == (not kernels.missing())
    monkeypatch.setattr(kernels, "vector_length", lambda: 0)
    for capability, reason in (("DEFAULT", "the vectors of DEFAULT"), ("AVX512", "do not compile here")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda given=capability: given)
        assert reason in kernels.missing()
