"""What a step reads of an image, or takes the maximum of.

split(image, 16, 1)[1]                     channels 16 to 31 of the image
image[:, 8:24]                             channels 8 to 23
max_pool2d_with_indices(image, 3, 2)[0]    maxima, where nothing reads where they lie
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph.metadata import tensor
from fxpasses.passes.weights.read_ahead import is_image
from fxpasses.passes.weights.stride_order import source_of

aten = torch.ops.aten

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_POOLINGS = ("aten::max_pool2d_with_indices", "prims::_low_memory_max_pool_with_offsets")
_LAST = 2**62


def part_of(node: Node) -> tuple[Node, int, int] | None:
    """The image of which a node is some channels, the first of them and how many; None where it is none."""
    found = tensor(node)
    if found is None or not is_image(found) or node.kwargs:
        return None
    arguments: tuple[Any, ...] = node.args
    width = found.shape[1]
    if node.target is aten.slice.Tensor:
        defaults: tuple[Any, ...] = (0, 0, _LAST, 1)
        image, axis, first, last, step = (*arguments, *defaults[len(arguments) - 1 :])
        if step != 1 or not isinstance(last, int):
            return None
    elif node.target is operator.getitem and getattr(arguments[0], "target", None) in _SPLITS:
        split, which = arguments
        if split.kwargs or not isinstance(which, int):
            return None
        image, sizes, axis = (*split.args, 0)[:3]
        if isinstance(sizes, (list, tuple)) and not all(isinstance(size, int) for size in sizes):
            return None
        first = sum(sizes[:which]) if isinstance(sizes, (list, tuple)) else sizes * which
    else:
        return None
    image = source_of(image)
    given = tensor(image)
    numbers = (axis, first, width, None if given is None else given.shape[1])
    if not is_image(given) or not all(isinstance(number, int) for number in numbers) or axis % 4 != 1:
        return None
    return (image, first, width) if first >= 0 else None


def maximum_of(node: Node) -> tuple[Node, tuple[int, ...]] | None:
    """The image of which a node is the maxima under a window, and its words; None where it is none.

    The words are the window's kernel, stride, padding and dilation, height and width each.
    """
    if node.target is not operator.getitem or node.args[1] != 0 or not is_image(tensor(node)):
        return None
    pooling = node.args[0]
    assert isinstance(pooling, Node)
    if _name(pooling) not in _POOLINGS or pooling.kwargs or any(user is not node for user in pooling.users):
        return None
    arguments: tuple[Any, ...] = pooling.args
    image, kernel, *rest = arguments
    defaults: tuple[Any, ...] = ([], 0, 1, False)
    stride, padding, dilation, rounds_up = (*rest, *defaults[len(rest) :])
    image = source_of(image)
    if rounds_up or not is_image(tensor(image)):
        return None
    words = [_both(each) for each in (kernel, stride or kernel, padding, dilation)]
    if not all(isinstance(word, int) for both in words for word in both):
        return None
    return image, tuple(word for both in words for word in both)


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name)


def _both(given: Any) -> Sequence[Any]:
    """Height and width, of which torch takes one for both."""
    both = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    return both * 2 if len(both) == 1 else both
