"""Symbolic sizes and numbers: their expressions, example values and ranges. Nothing here adds a guard.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    import sympy


def size_hint(size: int | torch.SymInt, fallback: int = 64) -> int:
    """The size that a symbolic dimension had when it was traced, without adding a guard.

    Args:
        size: a static or symbolic size.
        fallback: what to assume of a size that no example backs.
    """
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if isinstance(hint, int) else fallback


def known_size(size: int | torch.SymInt) -> int | None:
    """The size, or what a symbolic one was when it was traced; None where no example backs it."""
    hint = size if isinstance(size, int) else size.node.hint
    return int(hint) if isinstance(hint, int) else None


def scalar_hint(symbol: torch.SymInt | torch.SymFloat | torch.SymBool) -> int | float | bool:
    """The value that a symbolic number had when it was traced, without adding a guard.

    Raises:
        ValueError: no example backs the symbol.
    """
    hint = symbol.node.hint
    if hint is None:
        raise ValueError(f"{symbol} has no example value")
    return cast("int | float | bool", hint)


def same_expression(
    first: int | torch.SymInt | torch.SymFloat, second: int | torch.SymInt | torch.SymFloat
) -> bool:
    """Whether two symbolic numbers are the same expression, without adding a guard."""
    expressions = [size if isinstance(size, int) else size.node.expr for size in (first, second)]
    return bool(expressions[0] == expressions[1])


def size_expression(size: int | torch.SymInt) -> int | sympy.Expr:
    """The size as an expression of the graph's size symbols, without adding a guard."""
    return size if isinstance(size, int) else cast("sympy.Expr", size.node.expr)


def as_arguments(graph: torch.fx.Graph, sizes: Sequence[int | torch.SymInt]) -> list[Any]:
    """Sizes as a node may take them, at a graph's insertion point: numbers, and nodes that work out symbols.

    Torch before 2.13 takes symbols themselves.
    """
    if all(type(size) is int for size in sizes) or not hasattr(graph, "materialize_symints"):
        return list(sizes)
    return list(graph.materialize_symints(sizes))


def sizes_of(tensor: torch.Tensor) -> tuple[int | sympy.Expr, ...]:
    """A tensor's sizes as expressions of the graph's size symbols."""
    return tuple(map(size_expression, tensor.shape))


def same_sizes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have sizes of the same expressions, without adding a guard."""
    return sizes_of(first) == sizes_of(second)


def symbol_values(size: torch.SymInt) -> dict[sympy.Symbol, tuple[int, float, float]]:
    """Of every size symbol in `size`'s shape environment: its value when traced, and its range."""
    environment = size.node.shape_env
    values = environment.backed_var_to_val
    return {
        symbol: (int(value), _bound(ranges.lower, 0.0), _bound(ranges.upper, inf))
        for symbol, value in values.items()
        if (ranges := environment.var_to_range.get(symbol)) is not None and value.is_Integer
    }


def _bound(given: sympy.Expr, unbounded: float) -> float:
    return float(given) if given.is_Integer else unbounded
