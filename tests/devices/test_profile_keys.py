"""Keys of device profiles: equal work has one spelling, and other work another."""

from __future__ import annotations

import torch

from fxpasses.devices.keys import convolution_key, operator_key

aten = torch.ops.aten


def test_one_value_stands_for_every_spatial_dimension_in_a_convolutions_key() -> None:
    def key(stride: list[int], padding: list[int], dilation: list[int]) -> str:
        return convolution_key((1, 3, 8, 8), (4, 3, 3, 3), stride, padding, dilation)

    assert key([2], [1], [1]) == key([2, 2], [1, 1], [1, 1])
    assert key([2], [1], [1]) != key([2, 1], [1, 1], [1, 1])


def test_output_padding_is_part_of_a_key_only_where_it_means_something() -> None:
    def key(transposed: bool, output_padding: tuple[int, int]) -> str:
        return convolution_key((1, 4, 8, 8), (4, 4, 3, 3), (2, 2), (1, 1), (1, 1), transposed, output_padding)

    assert key(False, (0, 0)) == key(False, (1, 1))
    assert key(True, (0, 0)) != key(True, (1, 1))
    assert key(True, (0, 0)) != key(False, (0, 0))


def test_defaults_and_keywords_do_not_change_an_operators_key() -> None:
    x = torch.empty(2, 8, 6, 6)
    target = aten.max_pool2d_with_indices.default
    short = operator_key(target, (x, [2, 2]), {})
    assert short == operator_key(target, (x, [2, 2], [], [0, 0], [1, 1], False), {})
    assert short == operator_key(target, (x,), {"kernel_size": [2, 2]})
    assert short != operator_key(target, (x, [2, 2], [1, 1]), {})
    assert "2x8x6x6" in short


def test_a_dimension_has_one_spelling_in_an_operators_key() -> None:
    x = torch.empty(2, 8, 6, 6)
    keys = {operator_key(aten.mean.dim, (x, dims), {}) for dims in ([2, 3], [-1, -2], [3, 2])}
    assert keys == {"input=2x8x6x6 dim=[2,3] keepdim=False dtype=None"}
    assert operator_key(aten.cat.default, ([x, x], -3), {}) == operator_key(aten.cat.default, ([x, x], 1), {})


def test_the_tensors_of_a_list_are_part_of_an_operators_key() -> None:
    x, y = torch.empty(2, 8, 6, 6), torch.empty(2, 4, 6, 6)
    key = operator_key(aten.cat.default, ([x, y], 1), {})
    assert key == "tensors=[2x8x6x6,2x4x6x6] dim=1"
