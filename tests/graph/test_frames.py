"""Frames: a view is one in both layouts exactly where torch can take it of tensors that lie in either."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxpasses.graph.frames import CHANNELS, agree, padded, permuted, plain, reshaped, without
from fxpasses.graph.layouts import C, L, order_in_memory, order_of, to_channels_last


def lying(sizes: tuple[int, ...], frame: tuple[tuple[int, int], ...], label: str) -> torch.Tensor:
    """A dense tensor of these sizes, in the order that a label stands for."""
    order = order_in_memory(frame, label)
    dense = torch.empty([sizes[d] for d in order])
    return dense.permute([order.index(d) for d in range(len(sizes))])


def is_viewable(given: torch.Tensor, sizes: tuple[int, ...]) -> bool:
    try:
        given.view(sizes)
    except RuntimeError:
        return False
    return True


def factorisations(number: int, most: int) -> list[tuple[int, ...]]:
    if most == 1:
        return [(number,)]
    found = [(number,)]
    for first in range(2, number):
        if number % first == 0:
            found += [(first, *rest) for rest in factorisations(number // first, most - 1)]
    return found


FRAMES = [plain(4), permuted(plain(4), to_channels_last(4)), permuted(plain(4), (0, 1, 3, 2))]


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("sizes", [(2, 4, 6, 3), (2, 6, 1, 4), (1, 4, 2, 3), (3, 2, 2, 2)])
def test_a_view_is_one_in_both_layouts_where_torch_can_take_it_in_both(frame, sizes):
    sizes = tuple(sizes[("n", "c", "h", "w").index(name)] for name in named(frame))
    tensors = {label: lying(sizes, frame, label) for label in (C, L)}
    count = 0
    for after in factorisations(tensors[C].numel(), 5):
        found = reshaped(frame, sizes, after)
        assert (found is not None) == all(is_viewable(given, after) for given in tensors.values())
        if found is not None:
            count += 1
            for label, given in tensors.items():
                assert order_of(given.view(after), found) == label
    assert count >= 1


def named(frame: tuple[tuple[int, int], ...]) -> list[str]:
    return [{(0, 0): "n", (1, 0): "c", (2, 0): "h", (2, 1): "w"}[axis] for axis in frame]


def test_groups_of_channels_and_merged_pixels_keep_their_order():
    frame = reshaped(plain(4), (2, 32, 5, 7), (2, 8, 4, 35))
    assert frame is not None
    assert order_in_memory(frame, C) == (0, 1, 2, 3)
    assert order_in_memory(frame, L) == (0, 3, 1, 2)
    assert reshaped(frame, (2, 8, 4, 35), (2, 32, 5, 7)) == plain(4)


@pytest.mark.parametrize("after", [(2, 32 * 35), (64, 35), (2, 32 * 5, 7), (2, 2, 560), (2, 32, 35, 0)])
def test_what_glues_channels_to_pixels_or_images_is_no_view_in_both(after):
    assert reshaped(plain(4), (2, 32, 5, 7), after) is None


def test_dimensions_of_size_one_come_and_go():
    frame = reshaped(plain(4), (2, 6, 5, 7), (1, 2, 1, 6, 5, 1, 7))
    assert frame is not None
    assert order_of(torch.empty(1, 2, 1, 6, 5, 1, 7), frame) == C
    there = torch.empty(2, 6, 5, 7).contiguous(memory_format=torch.channels_last)
    assert order_of(there.view(1, 2, 1, 6, 5, 1, 7), frame) == L
    assert reshaped(frame, (1, 2, 1, 6, 5, 1, 7), (2, 6, 5, 7)) == plain(4)


def test_of_a_single_image_the_first_dimension_decides_nothing():
    assert reshaped(plain(4), (1, 6, 5, 7), (6, 35)) is not None
    assert reshaped(plain(4), (2, 6, 5, 7), (12, 35)) is None


def test_channels_that_are_shuffled_are_no_neighbours():
    grouped = reshaped(plain(4), (2, 6, 5, 7), (2, 2, 3, 5, 7))
    shuffled = permuted(grouped, (0, 2, 1, 3, 4))
    assert reshaped(shuffled, (2, 3, 2, 5, 7), (2, 6, 5, 7)) is None


def test_frames_agree_where_each_layout_has_one_order():
    grouped = reshaped(plain(4), (2, 6, 5, 7), (2, 2, 3, 35))
    assert not agree(grouped, plain(4), (2, 2, 3, 35))
    assert not agree(grouped, plain(4), (2, 2, 3, 1))  # there the third dimension would be pixels
    assert agree(grouped, plain(4), (2, 2, 1, 35))
    assert agree(plain(4), plain(4), (2, 2, 3, 35))


def test_dimensions_that_are_left_out_or_added_keep_the_others():
    assert without(plain(5), {2}) == plain(4)
    assert without(plain(4), {1}) == ((0, 0), (2, 0), (2, 1))
    for rank in (4, 5):
        assert order_in_memory(padded(plain(3), rank), L) == (*range(rank - 2), rank - 1, rank - 2)


@pytest.mark.parametrize("sizes", list(itertools.permutations((2, 3, 4))))
def test_a_value_without_pixels_has_one_order(sizes):
    frame = ((0, 0), (CHANNELS, 0), (CHANNELS, 1))
    assert order_of(torch.empty(sizes), frame) == "both"
    assert order_of(torch.empty(sizes).transpose(1, 2), frame) == "other"


def test_symbolic_sizes_are_compared_without_guards():
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    from fxpasses.torch_internals.fake_tensors import FakeTensorMode

    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    dynamic = [DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.DYNAMIC]
    given = mode.from_tensor(torch.empty(3, 8, 5, 7), symbolic_context=StatelessSymbolicContext(dynamic))
    n, c, h, w = given.shape
    guards = len(environment.guards)
    assert reshaped(plain(4), given.shape, (n, 2, 4, h * w)) is not None
    assert reshaped(plain(4), given.shape, (n, 8, w * h)) is not None
    assert reshaped(plain(4), given.shape, (n, 8 * h * w)) is None
    assert reshaped(plain(3), (n, 8, (h + 1) * w), (n, 8, h * w + w)) is not None
    assert reshaped(plain(4), (n, c, h, w), (n, 8, 5, w)) is None  # equal in the example alone
    assert len(environment.guards) == guards
