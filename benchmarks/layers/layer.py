"""Layers: the convolutions and linear layers of a model, as eager computes them.

    operations   2 · elements of the result · elements of one filter
    bytes        4 · (elements of the image + of the weight + of the result): each read or written once

An operator counts as many operations and bytes in every runtime, whatever it really does.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.models.cases import Inputs
from benchmarks.torch_internals import TorchDispatchMode

aten = torch.ops.aten

KINDS = ("1x1", "3x3", "strided", "depthwise", "first or 7x7", "linear", "grouped", "other convolution")
"""What `Layer.kind` may be."""

_FEW = 4
_WIDE = 7


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer.

    Attributes:
        name: of its weight, with ``#2`` for the second use of one.
        image: sizes of what it reads: batch, channels, height, width; of a linear layer rows and channels.
        weight: sizes of the filters; of a linear layer results and channels.
        result: sizes of what it gives.
        stride, padding, dilation, groups, transposed: those of a convolution.
        source: equal for layers that read the same tensor.
    """

    name: str
    image: tuple[int, ...]
    weight: tuple[int, ...]
    result: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    source: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        over = self.image if self.transposed else self.result
        return 2 * math.prod(over) * math.prod(self.weight[1:])

    @property
    def num_bytes(self) -> int:
        """Bytes of float32 that are read and written at least."""
        return 4 * sum(map(math.prod, (self.image, self.weight, self.result)))

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer."""
        return len(self.weight) == 2

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel has one filter of its own."""
        return 1 < self.groups == self.image[1] == self.weight[0]

    @property
    def kind(self) -> str:
        """One of `KINDS`; a convolution of a single pixel is a linear layer."""
        taps = self.weight[2:]
        if self.is_linear or (set(taps) == set(self.image[2:]) == {1} and self.groups == 1):
            return "linear"
        if self.transposed or len(taps) != 2:
            return "other convolution"
        if self.is_depthwise:
            return "depthwise"
        if self.groups > 1:
            return "grouped"
        if self.image[1] <= _FEW or max(taps) >= _WIDE:
            return "first or 7x7"
        if max(self.stride) > 1:
            return "strided"
        return {(1, 1): "1x1", (3, 3): "3x3"}.get((taps[0], taps[1]), "other convolution")

    @property
    def sizes(self) -> str:
        """What distinguishes it from layers that do other work, in words."""
        shape = _times(self.image[2:])
        channels = f"{self.image[1]}→{self.weight[1 if self.transposed else 0]}"
        if self.is_linear:
            return f"linear {channels}, {self.image[0]} row{'s' * (self.image[0] > 1)}"
        extra = [
            "transposed" * self.transposed,
            f"stride {_once(self.stride)}" if max(self.stride) > 1 else "",
            f"padding {_once(self.padding)}" * (self.padding != tuple(size // 2 for size in self.weight[2:])),
            f"dilation {_once(self.dilation)}" if max(self.dilation) > 1 else "",
            "depthwise" if self.is_depthwise else f"groups {self.groups}" * (self.groups > 1),
            f"batch {self.image[0]}",
        ]
        told = ", ".join(piece for piece in extra if piece)
        return f"{_times(self.weight[2:])} {channels} on {shape}, {told}"


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _once(sizes: tuple[int, ...]) -> str:
    """One number where all are equal."""
    return _times(sizes[:1] if len(set(sizes)) == 1 else sizes)


def layers_of(model: torch.nn.Module, inputs: Inputs) -> tuple[Layer, ...]:
    """The layers of one call of the model, in the order of their execution.

    Args:
        model: in inference, on a CPU.
        inputs: what it is called on.
    """
    names = {
        tensor.untyped_storage().data_ptr(): name
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]
        if tensor.numel()
    }
    recorder = _Recorder(names)
    with torch.no_grad(), recorder:
        model(*inputs)
    return tuple(recorder.layers)


@dataclass
class _Recorder(TorchDispatchMode):
    """Notes what is called."""

    names: dict[int, str]
    layers: list[Layer] = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)
    sources: dict[tuple[object, ...], int] = field(default_factory=dict)
    alive: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        layer = _layer(func, args, result)
        if layer is not None:
            image, weight = args[1:3] if func is aten.addmm.default else args[:2]
            # What is alive keeps its place, so that a place is one tensor.
            self.alive.append(image)
            place = (image.data_ptr(), image.shape)
            name = self.names.get(weight.untyped_storage().data_ptr(), f"computed {len(self.layers)}")
            self.uses[name] += 1
            again = f"#{self.uses[name]}" if self.uses[name] > 1 else ""
            source = self.sources.setdefault(place, len(self.sources))
            self.layers.append(replace(layer, name=name + again, source=source))
        return result


def _layer(function: object, args: tuple[Any, ...], result: Any) -> Layer | None:
    """The layer that a call is, without its name; None for other calls."""
    if function is aten.convolution.default:
        image, weight, _, stride, padding, dilation, transposed, _, groups = args
        spaces = (tuple(stride), tuple(padding), tuple(dilation))
        shapes = (tuple(image.shape), tuple(weight.shape), tuple(result.shape))
        return Layer("", *shapes, *spaces, groups, transposed)
    if function in (aten.addmm.default, aten.mm.default):
        image, weight = args[-2:]
        return Layer("", tuple(image.shape), tuple(weight.shape)[::-1], tuple(result.shape))
    return None
