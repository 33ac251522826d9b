"""What of a graph can be measured on its device: directions of convolutions, and operators that move data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from fxpasses.devices.convolutions import DIRECTION_OF, Convolution
from fxpasses.devices.keys import operator_key
from fxpasses.devices.measuring import Measurer, Timing
from fxpasses.devices.operators import OperatorCase, Shaped, depends_on_layout
from fxpasses.devices.sizes import ConvolutionSizes
from fxpasses.graph.metadata import value
from fxpasses.torch_internals.operators import OpOverload, overload_name
from fxpasses.torch_internals.sizes import size_hint


@dataclass(frozen=True)
class Measurable:
    """Something whose cost a device profile can say.

    Attributes:
        operator: its name there.
        key: its key there.
        dtype: of its operands.
        measure: measures it.
    """

    operator: str
    key: str
    dtype: torch.dtype
    measure: Callable[[Measurer], list[Timing]]


def directions_of(
    sizes: ConvolutionSizes, dtype: torch.dtype, directions: Sequence[str]
) -> tuple[Measurable, ...]:
    """The directions of a convolution, its sizes as they were when it was traced."""
    case = Convolution.at_hints(sizes)

    def measured(measurer: Measurer, name: str) -> list[Timing]:
        return measurer.convolution(case, DIRECTION_OF[name])

    return tuple(Measurable(name, case.key, dtype, partial(measured, name=name)) for name in directions)


def operator_of(node: Node, dtype: torch.dtype) -> tuple[Measurable, ...]:
    """An operator that works in either layout; nothing where it cannot be measured."""
    case = case_of(node)
    if case is None:
        return ()
    return (Measurable(case.operator, case.key, dtype, lambda measurer: measurer.operator(case)),)


def named(node: Node) -> tuple[str, str] | None:
    """The name and the key of an operator in a device profile; None where it can have none."""
    if not isinstance(node.target, OpOverload):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), _shaped)
    try:
        return overload_name(node.target), operator_key(node.target, args, kwargs)
    except ValueError:
        return None


def case_of(node: Node) -> OperatorCase | None:
    """An operator as one that can be measured; None where it cannot, or does not depend on the layout."""
    found = named(node)
    if found is None:
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), _shaped)
    case = OperatorCase(*found, found[0], args, kwargs)
    ranks = [len(given.shape) for given in case.tensors]
    if not ranks or not depends_on_layout(found[0], args, kwargs, max(ranks)):
        return None
    return case


def _shaped(node: Node) -> Any:
    """A stand-in for a tensor, which has nothing but its dtype and its sizes at the hints."""
    found = value(node)
    if isinstance(found, torch.Tensor):
        return Shaped(tuple(map(size_hint, found.shape)), found.dtype)
    return size_hint(found) if isinstance(found, (int, torch.SymInt)) else found
