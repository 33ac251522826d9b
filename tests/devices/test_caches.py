"""Sets of operands in turn: none comes again before enough of the others did."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fxpasses.devices import caches
from fxpasses.devices.caches import far, in_turn, sets_needed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the system says how large its caches are; empty at first."""
    monkeypatch.setattr(caches, "_CACHES", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (["48K", "1024K", "107520K"], 2 * 105 * 2**20),
        (["32M"], 2**26),
        (["512K"], 2**25),
        ([], 2**25),
        (["unknown"], 2**25),
    ],
    ids=["levels", "megabytes", "small", "none", "no number"],
)
def test_far_is_twice_the_largest_cache_of_a_cpu(system: Path, sizes: list[str], expected: int) -> None:
    for level, size in enumerate(sizes):
        folder = system / f"index{level}"
        folder.mkdir()
        (folder / "size").write_text(f"{size}\n", "ascii")
    assert far(CPU) == expected


def test_far_is_twice_the_second_level_cache_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert far(CUDA) == 100 * 2**20
    assert sets_needed(2**20, CUDA) == 101


@pytest.mark.gpu
def test_a_gpu_says_how_large_its_cache_is() -> None:
    assert far(CUDA) > 2**20


def test_there_are_as_many_sets_as_fill_the_caches_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "far", lambda device: 1000)
    assert [sets_needed(num_bytes, CPU) for num_bytes in (2000, 1001, 1000, 300, 10)] == [1, 1, 2, 4, 101]
    assert sets_needed(0, CPU) == 1001
    monkeypatch.setattr(caches, "far", lambda device: 10**9)
    assert sets_needed(1, CPU) == 2048


def test_all_other_sets_come_between_two_calls_on_one_whoever_is_called() -> None:
    called: list[int] = []
    kernels = {name: [lambda at=at: called.append(at) for at in range(5)] for name in "ab"}
    callables = in_turn(kernels)
    for name in "aaabababbbbaaaaabab":
        callables[name]()
    assert len(called) == 19
    assert all(len({*called[at : at + 5]}) == 5 for at in range(len(called) - 4))


def test_results_stay_alive_until_their_set_comes_again() -> None:
    results: list[weakref.ref[torch.Tensor]] = []

    def kernel() -> torch.Tensor:
        result = torch.empty(8)
        results.append(weakref.ref(result))
        return result

    callables = in_turn({name: [kernel] * 4 for name in "ab"})
    alive = []
    for name in "aabaabaab":
        callables[name]()
        alive.append([result() is not None for result in results])
    assert [sum(states) for states in alive] == [1, 2, 3, 4, 4, 4, 4, 4, 4]
    assert alive[-1] == [False] * 5 + [True] * 4


def test_one_set_is_called_as_it_is() -> None:
    kernels = {"a": [lambda: 1], "b": [lambda: 2]}
    assert in_turn(kernels) == {"a": kernels["a"][0], "b": kernels["b"][0]}
    assert in_turn({}) == {}
