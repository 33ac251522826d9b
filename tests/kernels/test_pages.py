"""Large pages: what is moved there is the same, lies as kernels read it, and goes with its readers."""

from __future__ import annotations

import gc
import mmap
import weakref

import pytest
import torch

from fxpasses.kernels import pages
from fxpasses.kernels.pages import LargePages

_MUCH = 2**23


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_are_the_same_and_begin_lines(dtype: torch.dtype) -> None:
    memory = LargePages(_MUCH)
    given = [torch.arange(count).to(dtype) for count in (1, 100, 3, 70_000, 1_000_000, 2_000_000)]
    moved = [memory.moved(one) for one in given]
    for before, after in zip(given, moved, strict=True):
        assert torch.equal(after, before)
        assert after.dtype == dtype
        assert after.data_ptr() % 64 == 0
        assert after.data_ptr() != before.data_ptr()


def test_neighbours_do_not_overlap() -> None:
    memory = LargePages(_MUCH)
    first, second = memory.moved(torch.zeros(17)), memory.moved(torch.ones(17))
    first.fill_(5)
    assert torch.equal(second, torch.ones(17))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "given",
    [torch.empty(0), torch.ones(4, 6).t(), torch.ones(3).to_sparse(), torch.ones(3, device="meta")],
    ids=["empty", "transposed", "sparse", "meta"],
)
def test_what_is_no_plain_memory_of_a_cpu_stays(given: torch.Tensor) -> None:
    assert LargePages(_MUCH).moved(given) is given


def test_few_bytes_stay_where_they_are() -> None:
    given = torch.ones(100)
    assert LargePages(2**20).moved(given) is given


def test_where_there_are_no_large_pages_all_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> torch.Tensor:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(pages, "_block", refuse)
    memory, given = LargePages(_MUCH), torch.ones(100)
    assert memory.moved(given) is given
    monkeypatch.undo()
    assert memory.moved(given) is given  # it is not asked for again


def test_the_memory_is_given_back_with_the_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[mmap.mmap]] = []

    class Mapped(mmap.mmap):
        def __init__(self, *arguments: int, **rest: int) -> None:
            made.append(weakref.ref(self))

    monkeypatch.setattr(mmap, "mmap", Mapped)
    memory = LargePages(_MUCH)
    first, second = memory.moved(torch.ones(10)), memory.moved(torch.ones(10))
    del memory, first
    gc.collect()
    assert len(made) == 1
    assert made[0]() is not None
    assert second.sum() == 10
    del second
    gc.collect()
    assert made[0]() is None
