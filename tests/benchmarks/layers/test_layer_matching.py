"""Matching by sizes and order, and what is refused because it is not certain."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.layers.layer import Layer
from benchmarks.layers.matching import Work, matched


def layer(channels=8, filters=8, taps=3, source=0, groups=1, size=4):
    padding = (taps // 2,) * 2
    weight = (filters, channels // groups, taps, taps)
    image, result = (1, channels, size, size), (1, filters, size, size)
    return Layer("", image, weight, result, (1, 1), padding, (1, 1), groups, source=source)


def works(*layers):
    return [Work.of_layer(each) for each in layers]


def test_equal_layers_are_matched_in_order():
    a, b = layer(), layer(filters=16)
    assert matched([a, b, a], works(a, a, b)) == [(0,), (2,), (1,)]


def test_a_class_of_which_a_kernel_is_missing_is_not_matched():
    a, b = layer(), layer(filters=16)
    assert matched([a, b, a], works(a, b)) == [None, (1,)]


def test_a_class_with_a_kernel_too_many_is_not_matched():
    a, b = layer(), layer(filters=16)
    assert matched([a, b], works(a, a, b)) == [None, None, (1,)]


def test_a_kernel_of_other_sizes_is_not_matched():
    assert matched([layer()], works(layer(size=5))) == [None]


def test_groups_that_a_kernel_merged_are_matched():
    grouped = layer(groups=4)
    assert matched([grouped], works(replace(grouped, groups=2))) == [(0,)]


def test_layers_that_only_their_groups_distinguish_are_not_matched():
    assert matched([layer(groups=4), layer(groups=1)], works(layer(), layer())) == [None, None]


def test_a_depthwise_convolution_is_not_taken_for_a_dense_one():
    depthwise, dense = layer(groups=8), layer()
    assert matched([depthwise, dense], works(dense, depthwise)) == [(1,), (0,)]


def test_a_kernel_with_the_filters_of_all_readers_of_a_tensor_computes_them_all():
    left, right, other = layer(filters=4), layer(filters=12), layer(filters=4, source=1)
    both = layer(filters=16)
    assert matched([left, right, other], works(both, other)) == [(0, 1), (2,)]


def test_readers_of_different_tensors_are_not_one_kernel():
    left, right = layer(filters=4), layer(filters=12, source=1)
    assert matched([left, right], works(layer(filters=16))) == [None]


def test_a_kernel_that_could_be_either_of_two_pairs_is_not_matched():
    three = [layer(filters=4), layer(filters=4), layer(filters=4)]
    assert matched(three, works(layer(filters=8))) == [None]


def test_a_linear_layer_is_a_convolution_of_single_pixels():
    linear = Layer("", (2, 8), (5, 8), (2, 5))
    assert matched([linear], [Work((2, 8, 1, 1), 5, (1, 1), (2, 2), (0, 0), (1, 1)).plain]) == [(0,)]
