"""Operators that work in either layout, at a cost that depends on it: which they are, and a call of one.

Pooling, upsampling, concatenation on channels, and reductions over all spatial dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fxpasses.torch_internals.pytree import tree_leaves, tree_map

aten = torch.ops.aten
Target = Callable[..., "Tensor | tuple[Tensor, ...]"]

_POOLS = ("max_pool{}d_with_indices", "avg_pool{}d", "_adaptive_avg_pool{}d")
_UPSAMPLINGS = ("upsample_nearest2d", "upsample_bilinear2d", "upsample_nearest3d", "upsample_trilinear3d")

_REPLAYED = frozenset(
    [f"aten.{name.format(d)}{end}.default" for name in _POOLS for d in (2, 3) for end in ("", "_backward")]
    + [f"aten.{name}{end}" for name in _UPSAMPLINGS for end in (".default", ".vec", "_backward.default")]
)
_REDUCTIONS = frozenset(
    {"aten.mean.dim", "aten.sum.dim_IntList", "aten.var.correction", "aten.var_mean.correction"}
)
_MAX_POOL_BACKWARD = {
    f"aten.max_pool{d}d_with_indices_backward.default": f"aten.max_pool{d}d_with_indices.default"
    for d in (2, 3)
}


@dataclass(frozen=True)
class Shaped:
    """A tensor's sizes and dtype, in place of the tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class OperatorCase:
    """One call of an operator, its tensors given by shape and dtype.

    Attributes:
        operator: its name in a device profile.
        key: its key there.
        overload: the ATen overload to call, as in ``aten.mean.dim``.
        args, kwargs: its arguments, with `Shaped` in place of tensors.
    """

    operator: str
    key: str
    overload: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def target(self) -> Target:
        """The overload itself."""
        return _overload(self.overload)

    @property
    def tensors(self) -> list[Shaped]:
        """The tensors among its arguments."""
        leaves = tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Shaped)]

    @property
    def elements(self) -> int:
        """The number of elements of its arguments, as a measure of its work."""
        return sum(math.prod(given.shape) for given in self.tensors)

    def call(self, make: Callable[[Shaped], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments to call it with.

        Args:
            make: a tensor of given sizes and dtype.
        """

        def made(value: Any) -> Any:
            return make(value) if isinstance(value, Shaped) else value

        args, kwargs = tree_map(made, (self.args, dict(self.kwargs)))
        forward = _MAX_POOL_BACKWARD.get(self.overload)
        if forward is not None:
            # Indices must be those of maxima: others would be written to in another order than in life.
            x, *window = args[1:7]
            args = (*args[:7], _overload(forward)(x, *window)[1])
        return args, kwargs


def depends_on_layout(overload: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], rank: int) -> bool:
    """Whether a call's cost depends on the layout, and the call can be repeated with other values.

    Args:
        overload: its name, such as ``aten.mean.dim``.
        args: its positional arguments, as ATen takes them.
        kwargs: those by name.
        rank: the number of dimensions of its first tensor.
    """
    if rank not in (4, 5):
        return False
    if overload == "aten.cat.default":
        # On any other dimension than channels, what is copied is contiguous in both layouts.
        return _dims(args, kwargs, rank) == {1}
    if overload in _REDUCTIONS:
        return set(range(2, rank)) <= _dims(args, kwargs, rank)
    return overload in _REPLAYED


def _dims(args: tuple[Any, ...], kwargs: Mapping[str, Any], rank: int) -> set[int]:
    """The dimensions that a concatenation or reduction works on; all where none are given."""
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(given, int):
        return {given % rank}
    if isinstance(given, (list, tuple)):
        return {index % rank for index in given if isinstance(index, int)}
    return set(range(rank))


def _overload(name: str) -> Target:
    found: Target = attrgetter(name)(torch.ops)
    return found
