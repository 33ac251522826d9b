"""In which order the axes of a tensor lie in memory."""

from __future__ import annotations

import sympy
import torch

from fxpasses.torch_internals import size_expression


def memory_order(found: torch.Tensor) -> list[int] | None:
    """The axes from the outermost to the innermost; None where elements overlap, or may.

    A tensor with gaps, such as a slice, has an order too. Symbolic sizes are compared as expressions, without
    guards, and are only found to be in the order of the axes.
    """
    if found.layout is not torch.strided:
        return None
    order = list(range(found.ndim))
    if all(type(size) is int for size in (*found.shape, *found.stride())):
        order.sort(key=found.stride, reverse=True)
    needed: int | torch.SymInt = 1
    for axis in reversed(order):
        size, stride = found.shape[axis], found.stride(axis)
        if type(size) is int and size == 1:
            continue
        if not _is_at_least(stride, needed):
            return None
        needed = stride * size
    return order


def has_gaps(found: torch.Tensor) -> bool:
    """Whether memory between the elements of a tensor is not its own; False where sizes are symbolic."""
    if not all(type(size) is int for size in (*found.shape, *found.stride())) or not found.numel():
        return False
    reach = sum((size - 1) * stride for size, stride in zip(found.shape, found.stride(), strict=True))
    return reach + 1 > found.numel()


def _is_at_least(stride: int | torch.SymInt, needed: int | torch.SymInt) -> bool:
    """Whether the one reaches the other for all sizes but zero; False where that cannot be told."""
    if type(stride) is int and type(needed) is int:
        return stride >= needed
    first, second = (
        sympy.sympify(size_expression(each)).replace(_is_at_least_one, _other_argument)
        for each in (stride, needed)
    )
    if sympy.expand(first - second).is_nonnegative:
        return True
    ratio = sympy.cancel(first / second)
    return bool(ratio.is_integer and ratio.is_positive)


def _is_at_least_one(expression: sympy.Expr) -> bool:
    """Whether it is Max(1, size), as torch writes strides; its Max is not sympy's."""
    return type(expression).__name__ == "Max" and len(expression.args) == 2 and 1 in expression.args


def _other_argument(expression: sympy.Expr) -> sympy.Expr:
    return next(each for each in expression.args if each != 1)
