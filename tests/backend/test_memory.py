"""Memory between calls: what is freed is used again, unless the user wants it given back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fxpasses
from fxpasses.backend.memory import arrange_memory, exceeds_reuse
from fxpasses.errors import UnknownOptionError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's thresholds")

PROGRAM = """
import resource, sys, torch
from fxpasses.backend.memory import arrange_memory
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


@pytest.mark.full
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


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((4, 2**20), False), ((1, 9 * 2**20), True), ((20, 2**20), True)],
    ids=["small", "one large", "many at once"],
)
def test_auto_keeps_what_is_more_than_glibc_reuses(sizes: tuple[int, int], expected: bool):
    """So many tensors of so many floats are alive at once: glibc keeps one of 32 MiB, and 64 MiB in all."""
    count, elements = sizes

    def work(image: torch.Tensor) -> torch.Tensor:
        kept = [image + each for each in range(count)]
        return torch.stack([each[0] for each in kept])

    graph = make_fx(work, tracing_mode="fake")(torch.ones(elements)).graph
    assert exceeds_reuse(graph) is expected


@pytest.mark.parametrize(("elements", "choice"), [(2**10, "reuse"), (9 * 2**20, "keep")])
def test_the_backend_decides_by_the_graph(monkeypatch: pytest.MonkeyPatch, elements: int, choice: str):
    """What glibc was told cannot be taken back, so the two steps are recorded instead of taken."""
    steps: list[str] = []
    monkeypatch.setattr("fxpasses.backend.memory._reuse", lambda: steps.append("reuse"))
    monkeypatch.setattr("fxpasses.backend.memory._keep", lambda: steps.append("keep") or True)
    with torch.no_grad():
        run = torch.compile(torch.relu, backend="fxpasses", options={"inner": "eager"})
        run(torch.ones(elements))
    assert steps[-1] == choice
