"""Memory between calls: what is freed is used again, unless the user wants it given back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fxpasses
from fxpasses.errors import UnknownOptionError
from fxpasses.memory import arrange_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's thresholds")

PROGRAM = """
import resource, sys, torch
from fxpasses.memory import arrange_memory
arrange_memory(sys.argv[1])
count, megabytes = int(sys.argv[2]), int(sys.argv[3])
def work():
    blocks = [torch.ones(megabytes * 2**18) for _ in range(count)]
    while blocks:
        blocks.pop()
work(); work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): work()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


def faults(choice: str, count: int, megabytes: int) -> int:
    """Page faults of a call that allocates and frees so many blocks of this size, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, choice, str(count), str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_reuse_faults_hardly_any_pages_in():
    """How many there would be otherwise depends on what the process has freed before: none to 10,000."""
    assert faults("reuse", 40, 1) < 1000


def test_keep_does_so_beyond_what_glibc_keeps_by_itself():
    assert faults("reuse", 6, 60) > 4 * faults("keep", 6, 60) + 1000


def test_system_changes_nothing_and_says_so():
    assert arrange_memory("system") is False


def test_a_choice_that_does_not_exist_is_an_error():
    with pytest.raises(UnknownOptionError, match="memory"):
        fxpasses.Options(memory="more")  # type: ignore[arg-type]


def test_the_backend_takes_the_option():
    run = torch.compile(torch.relu, backend="fxpasses", options={"memory": "system", "inner": "eager"})
    assert torch.equal(run(torch.ones(2)), torch.ones(2))
