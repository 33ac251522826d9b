"""Copies: the operators that are put into a graph so that a tensor lies in memory as the plan wants.

    copy_of          to a label, through the tensor's frame      clone(memory_format=...)
    strided_copy     to any strides, such as those of a slice    copy(empty_strided(...), source)
    view_as_traced   the strides of dimensions of size 1         as_strided, or metadata alone
    through_rows     the same tensor, whose gradient has its strides      permute, view, view, permute
    matrix_product   a 1x1 convolution, [N·H·W, C] @ [C, K]               permute, reshape, mm, ...

All are `Edits`, which can be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from fxpasses.graph.frames import Frame, is_one, plain
from fxpasses.graph.layouts import Label, memory_format, order_in_memory, order_of, to_channels_last
from fxpasses.graph.levels import Level
from fxpasses.graph.metadata import set_value, tensor
from fxpasses.passes.layout.convolutions import product_operands
from fxpasses.passes.layout.edits import Edits, NotMaterialisedError, UnrestorableError
from fxpasses.torch_internals.sizes import size_expression, size_hint

aten = torch.ops.aten

COPIES = (torch.clone, aten.clone.default, aten.copy.default, aten.copy_.default)
"""The operators among them that move data to another layout."""


def copy_of(edits: Edits, source: Node, label: Label, frame: Frame | None, before: Node) -> Node:
    """A copy of a tensor in another layout.

    Args:
        edits: of its graph.
        source: what makes it.
        label: the layout of the copy.
        frame: what its dimensions stand for; None for N, C, *spatial.
        before: the node in front of which the copy is made.
    """
    found = tensor(source)
    assert found is not None
    rank = found.dim()
    if frame is None or (frame == plain(rank) and rank in (4, 5)):
        return _clone(edits, source, memory_format(label, rank), before)
    order = list(order_in_memory(frame, label))
    if order == sorted(order):
        return _clone(edits, source, torch.contiguous_format, before)
    ordered = edits.insert(aten.permute.default, (source, order), {}, before)
    copy = _clone(edits, ordered, torch.contiguous_format, before)
    return edits.insert(aten.permute.default, (copy, [order.index(d) for d in range(rank)]), {}, before)


def _clone(edits: Edits, source: Node, wanted: torch.memory_format, before: Node) -> Node:
    target = torch.clone if edits.context.level is Level.TORCH else aten.clone.default
    return edits.insert(target, (source,), {"memory_format": wanted}, before)


def strided_copy(edits: Edits, source: Node, before: torch.Tensor, reader: Node) -> Node:
    """A copy with any strides, such as those of a slice.

    Raises:
        UnrestorableError: they are symbols, or elements overlap in memory.
    """
    sizes, strides = tuple(before.shape), tuple(before.stride())
    if not is_static(before) or is_overlapping(before):
        raise UnrestorableError({source: f"the strides {strides}"})
    if edits.context.executor == "eager" and edits.context.level is Level.ATEN:
        return _padded_copy(edits, source, before, reader)
    options = {"dtype": before.dtype, "device": before.device}
    empty = edits.insert(aten.empty_strided.default, (list(sizes), list(strides)), options, reader, source)
    # Autograd differentiates only the operator that writes.
    operator = aten.copy.default if edits.context.executor == "fused" else aten.copy_.default
    copy = edits.insert(operator, (empty, source), {}, reader, source)
    made = tensor(copy)
    if made is None or not strides_agree(before, made):
        raise UnrestorableError({source: f"the strides {strides}"})
    return copy


def _padded_copy(edits: Edits, source: Node, before: torch.Tensor, reader: Node) -> Node:
    """The same where no operator may write, and autograd may follow: a part of a padded tensor."""

    def insert(target: Any, *args: Any, **kwargs: Any) -> Node:
        return edits.insert(target, args, kwargs, reader, source)

    given = before.stride()
    order = sorted(range(before.dim()), key=lambda d: (before.shape[d] > 1, -given[d]))
    sizes, strides = [before.shape[d] for d in order], [given[d] for d in order]
    # Behind all others one more dimension, whose stride is 1.
    room = [
        1 if position == 0 or sizes[position - 1] == 1 else outer // max(inner, 1)
        for position, (outer, inner) in enumerate(zip([0, *strides], [*strides, 1], strict=True))
    ]
    room = [max(pair) for pair in zip(room, [*sizes, 1], strict=True)]
    pads = [pad for whole, size in zip(room, [*sizes, 1], strict=True) for pad in (whole - size, 0)]
    node = insert(aten.unsqueeze.default, insert(aten.permute.default, source, order), len(order))
    node = insert(aten.constant_pad_nd.default, node, pads[::-1], 0)
    node = insert(aten.clone.default, node, memory_format=torch.contiguous_format)
    for d, size in enumerate(sizes):
        node = insert(aten.slice.Tensor, node, d, 0, size)
    node = insert(aten.select.int, node, len(order), 0)
    copy = insert(aten.permute.default, node, [order.index(d) for d in range(len(order))])
    made = tensor(copy)
    if made is None or not strides_agree(before, made):
        raise UnrestorableError({source: f"the strides {given}"})
    return copy


def view_as_traced(edits: Edits, source: Node, before: torch.Tensor, reader: Node) -> Node:
    """The traced strides of dimensions of size 1, which mean nothing, for whoever compares them.

    A compiler may lay a tensor out in another order than metadata says and the operators allow, under
    which a view of given strides would be wrong; where no dimensions are left to be ordered it cannot.
    """
    is_ordered = before.dim() not in (4, 5) or order_of(before) != "both"
    if not is_static(before) or (edits.context.executor == "fused" and is_ordered):
        edits.remember(source)
        set_value(source, before, like=source)
        return source
    sizes, strides = list(before.shape), list(before.stride())
    return edits.insert(aten.as_strided.default, (source, sizes, strides), {}, reader)


def through_rows(edits: Edits, source: Node, label: Label, before: Node) -> Node:
    """The same tensor, seen as one row in between: a gradient of other strides cannot, and is copied."""
    found = tensor(source)
    assert found is not None
    there, back = list(to_channels_last(found.dim())), [0, found.dim() - 1, *range(1, found.dim() - 1)]
    if not (found if label == "contiguous" else found.permute(there)).is_contiguous():
        return source
    if label == "channels_last":
        source = edits.insert(aten.permute.default, (source, there), {}, before)
    row = edits.insert(aten.view.default, (source, [-1]), {}, before)
    made = tensor(source)
    assert made is not None
    if all(isinstance(size, int) for size in made.shape):
        whole = edits.insert(aten.view.default, (row, list(made.shape)), {}, before)
    else:
        whole = edits.insert(aten.view_as.default, (row, source), {}, before)
        set_value(whole, made, like=source)  # a view writes a size as a quotient of two numbers of elements
    return whole if label == "contiguous" else edits.insert(aten.permute.default, (whole, back), {}, before)


def matrix_product(edits: Edits, node: Node) -> Node:
    """A 1x1 convolution over channels-last tensors, as the matrix product of [N·H·W, C] and [C, K]."""
    operands, made = product_operands(node), tensor(node)
    if operands is None or made is None:
        raise NotMaterialisedError(f"{node} cannot be written as a matrix product")
    image, weight, bias = operands
    rank, (channels, features) = made.dim(), tensor(weight).shape[1::-1]  # type: ignore[union-attr]
    there, back = list(to_channels_last(rank)), [0, rank - 1, *range(1, rank - 1)]
    before = node.next
    rows = edits.insert(aten.permute.default, (image, there), {}, before, node)
    rows = edits.insert(aten.reshape.default, (rows, [-1, channels]), {}, before, node)
    matrix = edits.insert(aten.reshape.default, (weight, [features, channels]), {}, before, node)
    matrix = edits.insert(aten.permute.default, (matrix, [1, 0]), {}, before, node)
    if bias is None:
        product = edits.insert(aten.mm.default, (rows, matrix), {}, before, node)
    else:
        product = edits.insert(aten.addmm.default, (bias, rows, matrix), {}, before, node)
    sizes = [made.shape[d] for d in there]
    result = edits.insert(aten.reshape.default, (product, sizes), {}, before, node)
    return edits.insert(aten.permute.default, (result, back), {}, before, node)


def is_static(found: torch.Tensor) -> bool:
    """Whether a tensor's sizes and strides are plain numbers."""
    return all(isinstance(number, int) for number in (*found.shape, *found.stride()))


def is_overlapping(found: torch.Tensor) -> bool:
    """Whether a tensor is expanded: one element stands for a whole dimension."""
    return any(
        not is_one(size) and type(stride) is int and stride == 0
        for size, stride in zip(found.shape, found.stride(), strict=True)
    )


def same(first: Any, second: Any) -> bool:
    """Whether two sequences of sizes or strides are equal for certain; without a guard."""
    pairs = zip(first, second, strict=True)
    return all(_equal(size_expression(a), size_expression(b)) for a, b in pairs)


def _equal(first: Any, second: Any) -> bool:
    """Whether two numbers or expressions are equal, one of them multiplied out or not."""
    if first == second:
        return True
    is_symbolic = isinstance(first, sympy.Basic) or isinstance(second, sympy.Basic)
    return is_symbolic and bool(sympy.expand(_above_zero(first) - _above_zero(second)) == 0)


def _above_zero(given: Any) -> Any:
    """An expression where sizes are above 0: torch writes contiguous strides with `Max(1, size)`."""

    def is_size(part: Any) -> bool:
        return type(part).__name__ == "Max" and len(part.args) == 2 and 1 in part.args

    return sympy.sympify(given).replace(is_size, lambda part: max(part.args, key=lambda each: each != 1))


def strides_agree(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie in memory the same way."""
    if first.layout is not torch.strided or second.layout is not torch.strided:
        return first.layout == second.layout
    kept = [d for d, size in enumerate(first.shape) if not is_one(size)]
    if same([first.stride(d) for d in kept], [second.stride(d) for d in kept]):
        return True
    # Symbolic sizes of one tensor may be written in two ways; dense strides follow from the sizes.
    order = _dense_order(first, kept)
    return order is not None and order == _dense_order(second, kept)


def _dense_order(given: torch.Tensor, kept: Sequence[int]) -> list[int] | None:
    """The dimensions, outermost first, of a tensor of symbolic sizes that has no gaps for any; else None."""
    if is_static(given):
        return None
    strides = given.stride()
    order = sorted(kept, key=lambda d: -size_hint(strides[d]))
    inner: Any = 1
    for d in reversed(order):
        if not _equal(size_expression(strides[d]), size_expression(inner)):
            return None
        inner = inner * given.shape[d]
    return order
