"""Operands from one block: none comes again before enough of the others did, whatever their layout."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxpasses.devices import arena as arenas
from fxpasses.devices.arena import Arena

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def a_small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "far", lambda device: 2**20)


def spans(tensors: tuple[torch.Tensor, ...]) -> list[tuple[int, int]]:
    """Where each tensor begins and ends in memory."""
    return [(each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sets_lie_apart_and_fill_what_a_cache_holds(layout):
    sets = Arena(CPU, torch.float32).sets([(1, 8, 16, 16), (8, 8, 3, 3), (5, 7)], layout)
    taken = sorted(span for each in sets for span in spans(each))
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(taken))
    of_one = sum(each.nbytes for each in sets[0])
    assert 0.9 * 2**20 < len(sets) * of_one < 1.2 * 2**20


def test_a_set_has_the_layout_and_the_dtype_that_were_asked_for():
    ((image, matrix), *_) = Arena(CPU, torch.bfloat16).sets([(2, 3, 4, 5), (6, 7)], "channels_last")
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert not image.is_contiguous()
    assert matrix.is_contiguous()
    assert {image.dtype, matrix.dtype} == {torch.bfloat16}
    ((volume,), *_) = Arena(CPU, torch.float32).sets([(2, 3, 4, 5, 6)], "channels_last")
    assert volume.is_contiguous(memory_format=torch.channels_last_3d)


def test_what_is_larger_than_the_cache_has_one_set():
    (only,) = Arena(CPU, torch.float32).sets([(1, 64, 128, 128)], "contiguous")
    assert only[0].shape == (1, 64, 128, 128)


def test_what_is_written_counts_too():
    arena = Arena(CPU, torch.float32)
    few = arena.sets([(1, 64, 16, 16)], "contiguous", written=3 * 64 * 256)
    assert len(few) < len(arena.sets([(1, 64, 16, 16)], "contiguous"))


def test_hot_operands_are_one_set():
    assert len(Arena(CPU, torch.float32, hot=True).sets([(1, 8, 4, 4)], "contiguous")) == 1


def test_values_are_random_and_finite():
    ((given,), *_) = Arena(CPU, torch.float32).sets([(4096,)], "contiguous")
    assert bool(given.isfinite().all())
    assert float(given.std()) == pytest.approx(1, abs=0.1)
