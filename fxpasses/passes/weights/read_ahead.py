"""What a convolution over single pixels may read in place of an image, computed while it reads:

    clamp(concatenation of images along the channels * scale or gate + shift)

None of that is ever written to memory then. A gate has one number for each channel of each image, scale and
shift one for each channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch.fx import Node

from fxpasses.graph.metadata import tensor
from fxpasses.passes.weights.stride_order import source_of
from fxpasses.torch_internals.sizes import same_sizes, size_hint, sizes_of

aten = torch.ops.aten

RESHAPING = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
"""Operators that only give a tensor another shape."""


@dataclass(frozen=True)
class Read:
    """What a convolution reads, through the nodes that are computed while it does.

    Attributes:
        images: the tensors whose channels lie one after another.
        gate: a factor of each image's channels, or None.
        scale, shift: vectors of a factor and a term of each channel, or None.
        limits: of a clamp afterwards, or None.
        nodes: what need not be computed any more.
        firsts, widths: of each image the first channel that is read, and how many are; None for all of all.
    """

    images: tuple[Node, ...]
    gate: Node | None = None
    scale: Node | None = None
    shift: Node | None = None
    limits: tuple[float, float] | None = None
    nodes: tuple[Node, ...] = ()
    firsts: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None


def read_ahead(image: Node, *, only_reader: bool = True) -> Read:
    """What a convolution over single pixels may read in place of an image.

    Args:
        image: the node that it reads now.
        only_reader: whether nothing else reads that.
    """
    plain = Read((image,))
    found = tensor(image)
    if not only_reader or found is None or found.dim() != 4:
        return plain
    nodes: list[Node] = []
    limits, at = _clamp_of(image)
    if limits is not None:
        nodes.append(image)
    shift = scale = gate = None
    if _is_free(at, nodes) and (terms := _by_channel(at, aten.add.Tensor)) is not None:
        nodes.append(at)
        at, shift = terms
    if _is_free(at, nodes) and (terms := _by_channel(at, aten.mul.Tensor)) is not None:
        nodes.append(at)
        at, scale = terms
    elif _is_free(at, nodes) and shift is None and (gated := gate_of(at)) is not None:
        nodes.append(at)
        at, gate = gated
    images: tuple[Node, ...] = (at,)
    if _is_free(at, nodes) and (parts := _concatenated(at)) is not None:
        nodes.append(at)
        images = parts
    return Read(images, gate, scale, shift, limits, tuple(nodes)) if nodes else plain


def _is_free(node: Node, nodes: Sequence[Node]) -> bool:
    """Whether only what was passed already reads a node (the first is read by the convolution alone)."""
    return not nodes or all(user is nodes[-1] for user in node.users)


def _clamp_of(node: Node) -> tuple[tuple[float, float] | None, Node]:
    """The limits of a clamp and what it is of; None and the node itself where it is none."""
    if node.kwargs or not node.args or not isinstance(node.args[0], Node):
        return None, node
    if node.target is aten.relu.default:
        return (0.0, inf), node.args[0]
    if node.target is aten.hardtanh.default and len(node.args) == 3:
        low, high = node.args[1:]
        if isinstance(low, (int, float)) and isinstance(high, (int, float)):
            return (float(low), float(high)), node.args[0]
    return None, node


def _by_channel(node: Node, target: object) -> tuple[Node, Node] | None:
    """The image and the vector that an operator takes channel by channel."""
    if node.target is not target or node.kwargs or len(node.args) != 2:
        return None
    result = tensor(node)
    for image, other in (node.args, node.args[::-1]):
        if not isinstance(image, Node) or not isinstance(other, Node):
            continue
        vector, value = _vector_of(other), tensor(image)
        if vector is not None and alike(value, result):
            return image, vector
    return None


def _vector_of(node: Node) -> Node | None:
    """The kept vector that a node lays along the channels."""
    found = tensor(node)
    if (
        found is None
        or found.dim() not in (3, 4)
        or math.prod(map(size_hint, found.shape)) != found.shape[-3]
    ):
        return None
    while node.target in RESHAPING:
        node = source_of(node.args[0])
    base = tensor(node)
    usable = base is not None and base.dim() == 1 and base.dtype == torch.float32
    return node if usable and node.op == "placeholder" else None


def gate_of(node: Node) -> tuple[Node, Node] | None:
    """The image and its gate, where one is multiplied by one number for each channel of each image."""
    if node.target is not aten.mul.Tensor or node.kwargs:
        return None
    result = tensor(node)
    for image, gate in (node.args, node.args[::-1]):
        if not isinstance(image, Node) or not isinstance(gate, Node):
            continue
        value, factor = tensor(image), tensor(gate)
        if not alike(value, result) or not is_image(factor):
            continue
        assert result is not None
        assert factor is not None
        if sizes_of(factor) == (*sizes_of(result)[:2], 1, 1):
            return image, gate
    return None


def _concatenated(node: Node) -> tuple[Node, ...] | None:
    """The images whose channels a node puts one after another."""
    if node.target is not aten.cat.default or node.kwargs or len(node.args) != 2:
        return None
    parts, axis = node.args
    assert isinstance(parts, (list, tuple))
    images = tuple(part for part in parts if isinstance(part, Node) and is_image(tensor(part)))
    return images if axis in (1, -3) and len(images) == len(parts) else None


def alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether they are images of the same sizes."""
    if not is_image(one) or not is_image(other):
        return False
    assert one is not None
    assert other is not None
    return same_sizes(one, other)


def is_image(found: torch.Tensor | None) -> bool:
    """Whether it is a 4-D float32 tensor on a CPU, and not empty."""
    if found is None or found.dim() != 4 or found.dtype != torch.float32 or found.device.type != "cpu":
        return False
    return 0 not in map(size_hint, found.shape)
