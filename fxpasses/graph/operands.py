"""Operands: what an operator reads, whether a node or a tensor that belongs to a leaf module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from fxpasses.graph import metadata


@dataclass(frozen=True)
class ModuleTensor:
    """A parameter or buffer of a module that the graph calls, such as the weight of an `nn.Conv2d`.

    Attributes:
        path: where it is, seen from the graph's module: ``"features.0.weight"``.
        tensor: the tensor itself.
    """

    path: str
    tensor: torch.Tensor


Operand = Node | ModuleTensor


def tensor_of(operand: Operand | None) -> torch.Tensor | None:
    """The operand's tensor (fake for a node), or None where it has none or is none."""
    return operand.tensor if isinstance(operand, ModuleTensor) else metadata.tensor(operand)


def identity(operand: Operand) -> Node | torch.Tensor:
    """What names the operand to an alias analysis."""
    return operand.tensor if isinstance(operand, ModuleTensor) else operand
