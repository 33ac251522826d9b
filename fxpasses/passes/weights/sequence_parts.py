"""What a step reads of an image, or takes the maximum of.

split(image, 16, 1)[1]                     channels 16 to 31 of the image
image[:, 8:24]                             channels 8 to 23
max_pool2d_with_indices(image, 3, 2)[0]    maxima, where nothing reads where they lie
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import Node

from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import tensor
from fxpasses.graph.schema import bind
from fxpasses.passes.weights.read_ahead import is_image
from fxpasses.passes.weights.stride_order import source_of
from fxpasses.torch_internals.operators import OpOverload

aten = torch.ops.aten

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
POOLINGS = ("aten::max_pool2d_with_indices", "prims::_low_memory_max_pool_with_offsets")
"""Operators that give maxima, and where they lie; inductor's own exist once it is loaded."""


def part_of(node: Node) -> tuple[Node, int, int] | None:
    """The image of which a node is some channels, the first of them and how many; None where it is none."""
    found = tensor(node)
    if found is None or not is_image(found):
        return None
    is_slice = node.target is aten.slice.Tensor
    if not is_slice and (node.target is not operator.getitem or _target_of(node.args[0]) not in _SPLITS):
        return None
    named = bind(node if is_slice else node.args[0])  # type: ignore[arg-type]
    if isinstance(named, Decline):
        return None
    first: Any
    if is_slice:
        first = 0 if named["start"] is None else named["start"]
        if named["step"] != 1 or not isinstance(named["end"], int | None):
            return None
    else:
        which, sizes = node.args[1], named.get("split_sizes", named.get("split_size"))
        every = sizes if isinstance(sizes, (list, tuple)) else [sizes] * (cast(int, which) + 1)
        if not all(isinstance(size, int) for size in every):
            return None
        first = sum(every[: cast(int, which)])
    image, axis, width = source_of(named["self"]), named["dim"], found.shape[1]
    given = tensor(image)
    numbers = (axis, first, width, None if given is None else given.shape[1])
    if not is_image(given) or not all(isinstance(number, int) for number in numbers) or axis % 4 != 1:
        return None
    return (image, first, width) if first >= 0 else None


def _target_of(node: object) -> object:
    return node.target if isinstance(node, Node) else None


def maximum_of(node: Node) -> tuple[Node, tuple[int, ...]] | None:
    """The image of which a node is the maxima under a window, and its words; None where it is none.

    The words are the window's kernel, stride, padding and dilation, height and width each.
    """
    if node.target is not operator.getitem or node.args[1] != 0 or not is_image(tensor(node)):
        return None
    pooling = node.args[0]
    assert isinstance(pooling, Node)
    if called_operator(pooling) not in POOLINGS or any(user is not node for user in pooling.users):
        return None
    named = bind(pooling)
    if isinstance(named, Decline) or named["ceil_mode"]:
        return None
    image, kernel = source_of(named["self"]), named["kernel_size"]
    if not is_image(tensor(image)):
        return None
    words = [_both(each) for each in (kernel, named["stride"] or kernel, named["padding"], named["dilation"])]
    if not all(isinstance(word, int) for both in words for word in both):
        return None
    return image, tuple(word for both in words for word in both)


def called_operator(node: Node) -> str:
    """The qualified name of the operator that a node calls; empty where it calls none."""
    return str(node.target._schema.name) if isinstance(node.target, OpOverload) else ""


def _both(given: Any) -> Sequence[Any]:
    """Height and width, of which torch takes one for both."""
    both = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    return both * 2 if len(both) == 1 else both
