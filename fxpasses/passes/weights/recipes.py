"""Recipes of packed weights: from which kept tensors one is made, and how. A cached artifact keeps them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from fxpasses.kernels.convolution import Sizes, pack
from fxpasses.kernels.kernel import Kernel
from fxpasses.report.data import Remark
from fxpasses.torch_internals.onednn import pack_convolution_weight, pack_linear_weight


class Recipe(Protocol):
    """How one packed weight is made."""

    @property
    def indices(self) -> tuple[int, ...]:
        """Which of the kept tensors it is made from, the weight first."""

    @property
    def form(self) -> object:
        """Equal for recipes of which one's packed tensor serves the other's code, if made of the same."""

    def pack(self, *dense: torch.Tensor) -> torch.Tensor:
        """The packed tensor, from the dense ones."""


@dataclass(frozen=True)
class OneDnnRecipe:
    """A weight in oneDNN's format.

    Attributes:
        indices: which of the kept tensors is the weight.
        arguments: those of `aten.convolution` after the bias.
        image: the sizes of what the convolution reads; the format is the best for them.
    """

    indices: tuple[int, ...]
    arguments: tuple[Any, ...]
    image: tuple[int, ...]

    @property
    def form(self) -> object:
        """The arguments, not the image: oneDNN takes any format, and one copy serves all batches."""
        return repr(self.arguments)

    def pack(self, *dense: torch.Tensor) -> torch.Tensor:
        """The packed tensor, from the dense one."""
        (weight,) = dense
        return pack_convolution_weight((None, None, None, *self.arguments), self.image)(weight)


@dataclass(frozen=True)
class OneDnnLinearRecipe:
    """The weight of a linear layer in oneDNN's format.

    Attributes:
        indices: which of the kept tensors is the weight.
        rows: of what is multiplied; the format is the best for them.
    """

    indices: tuple[int, ...]
    rows: int

    @property
    def form(self) -> object:
        """The same for all rows: oneDNN takes any format."""
        return "linear"

    def pack(self, *dense: torch.Tensor) -> torch.Tensor:
        """The packed tensor, from the dense one."""
        (weight,) = dense
        return pack_linear_weight(weight, self.rows)


@dataclass(frozen=True)
class KernelRecipe:
    """A weight, and a bias if there are two indices, for a kernel of ours.

    Attributes:
        indices: which of the kept tensors they are.
        sizes: of the convolution.
        kernel: which reads it.
    """

    indices: tuple[int, ...]
    sizes: Sizes
    kernel: Kernel

    @property
    def form(self) -> object:
        """The sizes, and how the kernel reads: neither says anything of the image."""
        return self.sizes, self.kernel.packing

    def pack(self, *dense: torch.Tensor) -> torch.Tensor:
        """The packed tensor, from the dense ones."""
        weight, bias = (*dense, None)[:2]
        assert weight is not None
        return pack(self.sizes, self.kernel, weight, bias)


@dataclass
class ArtifactNotes:
    """What an artifact's recipes have in common.

    Attributes:
        unread: which of the kept tensors the code reads only packed.
        remarks: what was packed, and what was not and why.
    """

    unread: frozenset[int] = field(default_factory=frozenset)
    remarks: list[Remark] = field(default_factory=list)


def name_of(number: int, recipe: Recipe) -> str:
    """The name of a constant, which differs where the recipe does: keys of inductor's cache have it.

    Args:
        number: of the constant in its graph.
        recipe: of what it is filled with.
    """
    return f"_fxpasses_packed_{number}_{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}"
