"""Framing: the frame of what an operator makes, from the frames of what it reads (see `graph.frames`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch.fx import Node

from fxpasses.graph.frames import (
    CHANNELS,
    PIXELS,
    Frame,
    agree,
    inserted,
    is_one,
    padded,
    permuted,
    plain,
    reshaped,
    without,
)
from fxpasses.graph.layouts import C, L, order_of, order_of_strides
from fxpasses.graph.metadata import tensor
from fxpasses.graph.names import base_name
from fxpasses.graph.storage import may_write
from fxpasses.passes.layout.causes import FORCES_STRIDES
from fxpasses.passes.layout.labels import Kind, kind_of
from fxpasses.torch_internals.sizes import size_expression

Framed: TypeAlias = "tuple[Frame, torch.Tensor]"

_WITHOUT_DIM = ("select", "unbind")
"""Slices that leave the dimension out along which they take one place."""


def common_frame(given: Sequence[Framed], rank: int) -> tuple[Frame, list[bool]] | None:
    """The frame in which operands are broadcast to one value, and which of them are read as they are.

    An operand of another frame, such as the statistics of groups, is read as it is where its own order in
    memory is the same in both layouts, seen in the common frame.

    Args:
        given: the frames of the operands, and the operands.
        rank: of the value.
    """
    if any(len(frame) > rank for frame, _ in given):
        return None  # an operator that takes dimensions away from one operand, and not from another
    by_size = sorted(given, key=lambda framed: sum(map(is_one, framed[1].shape)) - framed[1].dim())
    for frame in dict.fromkeys(padded(frame, rank) for frame, _ in by_size):
        is_aside: list[bool] = []
        for other, found in given:
            missing = max(rank - found.dim(), 0)
            sizes = [*[1] * missing, *found.shape]
            if agree(frame, padded(other, rank), sizes):
                is_aside.append(False)
            elif order_of_strides(sizes, [*[0] * missing, *found.stride()], frame) == "both":
                is_aside.append(True)
        if len(is_aside) == len(given):
            return frame, is_aside
    return None


def viewed_frame(node: Node, frame: Frame, given: torch.Tensor) -> Frame | None:
    """The frame of a view of other sizes or of other dimensions; None where it is no view in both layouts."""
    found = tensor(node)
    if found is None or found.dtype != given.dtype:
        return None
    if kind_of(node) is Kind.VIEWING:
        viewed, image = reshaped(frame, given.shape, found.shape), plain(found.dim())
        is_image = viewed is not None and found.dim() in (4, 5) and agree(viewed, image, found.shape)
        return image if is_image else viewed
    dims = permutation(node, len(frame))
    return None if dims is None else permuted(frame, dims)


def glued_frame(node: Node) -> Frame | None:
    """The frame in which a contiguous copy is an image that its readers see in fewer dimensions; else None.

    So dimensions are glued that are no neighbours: a shuffle of channels, pixels out of channels, windows.
    """
    found = tensor(node)
    for user in node.users:
        seen = tensor(user) if kind_of(user) is Kind.VIEWING else None
        if found is not None and seen is not None and seen.dim() in (4, 5) and found.dtype == seen.dtype:
            frame = reshaped(plain(seen.dim()), seen.shape, found.shape)
            if frame is not None and order_of(found, frame) == C:
                return frame
    return None


def is_image(found: torch.Tensor, frame: Frame) -> bool:
    """Whether a value lies in memory as images do, where its frame says that it is none.

    So do views of what was taken for an image and was none, such as [N, H, W, C] from a linear layer.
    """
    rank = found.dim()
    return rank in (4, 5) and not agree(frame, plain(rank), found.shape) and order_of(found) in (C, L)


VIEWS = (Kind.EXPANDING, Kind.PERMUTING, Kind.SLICING, Kind.VIEWING)
"""What operators that give views do."""


def agree_in_sizes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have the same sizes for certain, without a guard."""
    return list(map(size_expression, first.shape)) == list(map(size_expression, second.shape))


def escapes(view: Node) -> bool:
    """Whether a view is seen from outside a graph without aliases: as a result, or by a write."""
    return any(
        user.op == "output"
        or base_name(user) in (*FORCES_STRIDES, "as_strided")
        or (user.args[:1] == (view,) and may_write(user))
        or (kind_of(user) in VIEWS and escapes(user))
        for user in view.users
    )


def permutation(node: Node, rank: int) -> list[int] | None:
    """The dimensions of a permuted view, by the dimensions that they are of the value; None if unclear."""
    name, args = base_name(node), list(node.args[1:])
    if name == "permute":
        given = node.kwargs.get("dims", args[0] if args else ())
        dims = list(given if isinstance(given, (list, tuple)) else args)
        return [d % rank for d in dims if isinstance(d, int)] if len(dims) == rank else None
    if name == "t":
        return list(reversed(range(rank)))
    first, second = (
        [*args, *(node.kwargs[key] for key in _NAMES_OF_DIMS if key in node.kwargs), None, None]
    )[:2]
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    dims = list(range(rank))
    if name in ("movedim", "moveaxis"):
        dims.insert(second % rank, dims.pop(first % rank))
    else:
        dims[first % rank], dims[second % rank] = dims[second % rank], dims[first % rank]
    return dims


_NAMES_OF_DIMS = ("dim0", "axis0", "source", "dim1", "axis1", "destination")
"""What the two dimensions are called that an operator exchanges or moves, first before second."""


def sliced_frame(node: Node, frame: Frame) -> Frame:
    """The frame of a slice."""
    if base_name(node) == "getitem":
        return _indexed_frame(frame, node.args[1])
    if base_name(node) not in _WITHOUT_DIM:
        return frame
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return without(frame, {dim % len(frame)}) if isinstance(dim, int) else frame


def _indexed_frame(frame: Frame, index: object) -> Frame:
    """The frame of a part that slices, numbers and `None`, for a new dimension of size 1, take."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at, taken = parts.index(Ellipsis), sum(part is not None for part in parts) - 1
        parts[at : at + 1] = [slice(None)] * (len(frame) - taken)
    at = 0
    for part in parts:
        if isinstance(part, int):
            frame = without(frame, {at})
            continue
        if part is None:
            frame = inserted(frame, at)
        at += 1
    return frame


def stacked_frame(node: Node, frame: Frame) -> Frame | None:
    """The frame of a stack: the new dimension is an outer piece of the one that it stands before.

    None where it stands behind all others, since kernels then give a contiguous tensor.
    """
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(dim, int) or dim % (len(frame) + 1) == len(frame):
        return None
    dim %= len(frame) + 1
    return inserted(frame, dim) if dim else padded(frame, len(frame) + 1)


def keeps_no_order(frame: Frame, given: torch.Tensor, dims: Iterable[int]) -> bool:
    """Whether what a reduction leaves lies in memory the same way under both labels."""
    kept = {frame[d][0] for d, size in enumerate(given.shape) if d not in dims and not is_one(size)}
    return not {CHANNELS, PIXELS} <= kept


def reduced(node: Node, rank: int) -> set[int]:
    """The dimensions that a reduction sums up; all of them where it names none."""
    given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if isinstance(given, bool):
        given = None  # `std(unbiased)` and `all`
    if isinstance(given, int):
        given = [given]
    if not isinstance(given, (list, tuple)) or not all(isinstance(dim, int) for dim in given):
        return set() if given is not None else set(range(rank))
    return {dim % rank for dim in given} or set(range(rank))
