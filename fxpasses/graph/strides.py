"""In which order the axes of a tensor lie in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import sympy
import torch

from fxpasses.torch_internals.sizes import same_expression, size_expression, size_hint


def memory_order(found: torch.Tensor) -> list[int] | None:
    """The axes from the outermost to the innermost; None where elements overlap, or may.

    A tensor with gaps, such as a slice, has an order too. Symbolic sizes are compared as expressions, without
    guards, in the order of the axes or in that of the strides at the hints.
    """
    return _order(found.shape, found.stride()) if found.layout is torch.strided else None


def same_layout(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have the same sizes and strides; symbols are compared without guards."""
    if first.ndim != second.ndim:
        return False
    pairs = zip((*first.shape, *first.stride()), (*second.shape, *second.stride()), strict=True)
    return all(same_expression(one, other) for one, other in pairs)


def has_gaps(found: torch.Tensor) -> bool:
    """Whether memory between the elements of a tensor is not its own; False where sizes are symbolic."""
    sizes, strides = found.shape, found.stride()
    return all(type(number) is int for number in (*sizes, *strides)) and _have_gaps(sizes, strides)


@functools.lru_cache(maxsize=4096)
def are_dense(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor of these sizes and strides has neither elements that overlap nor gaps between them."""
    return _order(sizes, strides) is not None and not _have_gaps(sizes, strides)


def _order(sizes: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt]) -> list[int] | None:
    axes = list(range(len(sizes)))
    by_stride = sorted(axes, key=[size_hint(stride) for stride in strides].__getitem__, reverse=True)
    if all(type(number) is int for number in (*sizes, *strides)):
        return by_stride if _is_order(by_stride, sizes, strides) else None
    return next((order for order in (axes, by_stride) if _is_order(order, sizes, strides)), None)


def _is_order(
    order: Sequence[int], sizes: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt]
) -> bool:
    """Whether each axis has a stride that reaches over all further inside."""
    needed: int | torch.SymInt = 1
    for axis in reversed(order):
        size, stride = sizes[axis], strides[axis]
        if type(size) is int and size == 1:
            continue
        if not _is_at_least(stride, needed):
            return False
        needed = stride * size
    return True


def _have_gaps(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    count = math.prod(sizes)
    reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return count > 0 and reach + 1 > count


def _is_at_least(stride: int | torch.SymInt, needed: int | torch.SymInt) -> bool:
    """Whether the one reaches the other for all sizes but zero; False where that cannot be told."""
    if type(stride) is int and type(needed) is int:
        return stride >= needed
    first, second = (
        sympy.sympify(size_expression(number)).replace(_is_at_least_one, _other_argument)
        for number in (stride, needed)
    )
    if sympy.expand(first - second).is_nonnegative:
        return True
    ratio = sympy.cancel(first / second)
    return bool(ratio.is_integer and ratio.is_positive)


def _is_at_least_one(expression: sympy.Expr) -> bool:
    """Whether it is Max(1, size), as torch writes strides; its Max is not sympy's."""
    return type(expression).__name__ == "Max" and len(expression.args) == 2 and 1 in expression.args


def _other_argument(expression: sympy.Expr) -> sympy.Expr:
    return next(argument for argument in expression.args if argument != 1)
