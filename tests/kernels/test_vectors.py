"""The kernels are compiled for the vectors that torch uses (`ATEN_CPU_CAPABILITY`), not for longer ones."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from fxpasses.kernels import library as kernels
from fxpasses.torch_internals.cpp import compile_cpp

pytestmark = pytest.mark.vectors

FLOATS = {"AVX2": 8, "AVX512": 16}
CPU = torch.backends.cpu.get_cpu_capability()
"""What torch makes of this CPU here; `.ci/run` runs this file for each that there is."""

AVX512 = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b")
"""Registers that there are in AVX-512 alone."""


@pytest.mark.needs_kernels
@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
def test_the_library_has_no_longer_vectors_than_torch_uses():
    assert kernels.vector_length() == FLOATS[CPU]
    library = compile_cpp(kernels.source(), kernels._VECTOR_FLAGS[CPU])
    assert library is not None
    command = ["objdump", "-d", "--no-show-raw-insn", library._name]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "%ymm" in code
    assert bool(AVX512.search(code)) == (CPU == "AVX512")


@pytest.mark.needs_kernels
def test_each_capability_has_a_library_of_its_own():
    source = 'extern "C" int any_vectors() { return 0; }'
    compiled = [compile_cpp(source, flags) for flags in kernels._VECTOR_FLAGS.values()]
    assert None not in compiled
    assert len({library._name for library in compiled}) == len(FLOATS)


@pytest.mark.needs_kernels
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
