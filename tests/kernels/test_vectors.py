"""The kernels are compiled for the vectors that torch uses (`ATEN_CPU_CAPABILITY`), not for longer ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from fxpasses.kernels import library as kernels
from fxpasses.torch_internals.cpp import compile_cpp

pytestmark = pytest.mark.vectors

FLOATS = {"AVX2": 8, "AVX512": 16}
CPU = torch.backends.cpu.get_cpu_capability()
BELOW = [capability for capability, floats in FLOATS.items() if floats <= FLOATS.get(CPU, 0)]
"""What this CPU can be told to do, as far as the environment lets this process see it."""

AVX512 = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b")
"""Registers that there are in AVX-512 alone."""


def library_for(capability: str) -> tuple[int, str]:
    """The floats of a vector in a process of that capability, and the file of its kernels."""
    program = (
        "from fxpasses.kernels import library as c; from fxpasses.torch_internals import cpp as t\n"
        "kept = []; c.compile_cpp = lambda *given: kept.append(t.compile_cpp(*given)) or kept[-1]\n"
        "print(c.vector_length(), kept[0]._name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()},
        check=True,
    )
    floats, path = done.stdout.split()
    return int(floats), path


@pytest.mark.skipif(
    not (kernels.vector_length() and shutil.which("objdump")), reason="needs kernels, objdump"
)
def test_each_capability_has_a_library_without_longer_vectors():
    found = {capability: library_for(capability) for capability in BELOW}
    assert {capability: floats for capability, (floats, _) in found.items()} == {
        capability: FLOATS[capability] for capability in BELOW
    }
    assert len({path for _, path in found.values()}) == len(BELOW)
    for capability, (_, path) in found.items():
        command = ["objdump", "-d", "--no-show-raw-insn", path]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "%ymm" in code
        assert bool(AVX512.search(code)) == (capability == "AVX512")


@pytest.mark.skipif(not kernels.vector_length(), reason="needs AVX2 or AVX-512, and a compiler")
def test_a_setting_of_inductor_changes_no_library():
    """`cpp.simdlen` is for one compilation, and the kernels are the process's."""
    from torch._inductor import config

    source, flags = 'extern "C" int any_vectors() { return 0; }', kernels._VECTOR_FLAGS[CPU]
    before = compile_cpp(source, flags)
    with config.patch({"cpp.simdlen": 1}):
        after = compile_cpp(source, flags)
    assert before is not None
    assert after is not None
    assert before._name == after._name


def test_there_are_kernels_or_a_reason(monkeypatch):
    assert bool(kernels.vector_length()) == (not kernels.missing())
    monkeypatch.setattr(kernels, "vector_length", lambda: 0)
    for capability, reason in (("DEFAULT", "the vectors of DEFAULT"), ("AVX512", "do not compile here")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda given=capability: given)
        assert reason in kernels.missing()
