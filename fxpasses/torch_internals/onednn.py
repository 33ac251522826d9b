"""oneDNN: convolutions and linear layers over weights in its own format.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch._ops import OpOverload


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs convolution weights of this type on this CPU."""
    if not (torch._C._has_mkldnn and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def linears_are_onednns(dtype: torch.dtype) -> bool:
    """Whether linear layers of this type have their weights packed for oneDNN: half types, as in inductor."""
    return dtype in (torch.bfloat16, torch.float16) and onednn_takes(dtype)


def pack_linear_weight(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """The weight of a linear layer, [C_out, C_in], in oneDNN's format for a matrix of so many rows."""
    return cast(torch.Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, rows))


def packed_linear(image: Any, packed: Any, bias: Any) -> tuple[OpOverload, tuple[Any, ...]]:
    """The operator of a linear layer over a packed weight, and its arguments."""
    return torch.ops.mkldnn._linear_pointwise.default, (image, packed, bias, "none", [], "")


def pack_convolution_weight(
    arguments: Sequence[Any], input_size: tuple[int, ...]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from a convolution's dense weight to the same in oneDNN's format.

    Args:
        arguments: those of `aten.convolution`, not transposed.
        input_size: the sizes of its input; the format is the best for them.
    """
    _, _, _, stride, padding, dilation, _, _, groups = arguments
    given = (list(padding), list(stride), list(dilation), groups, list(input_size))

    def pack(weight: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, torch.ops.mkldnn._reorder_convolution_weight(weight, *given))

    return pack


def packed_convolution(arguments: Sequence[Any], packed: Any) -> tuple[OpOverload, tuple[Any, ...]]:
    """The operator of `aten.convolution` over a packed weight, and its arguments, without an epilogue."""
    image, _, bias, stride, padding, dilation, _, _, groups = arguments
    operator = torch.ops.mkldnn._convolution_pointwise.default
    return operator, (image, packed, bias, padding, stride, dilation, groups, "none", [], "")


def packed_convolution_onto(
    arguments: Sequence[Any], packed: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that adds `aten.convolution` over a packed weight to a tensor, in place."""
    image, _, bias, stride, padding, dilation, _, _, groups = arguments
    operator = torch.ops.mkldnn._convolution_pointwise_.binary
    scalars: list[float] = []
    given = (image, packed, bias, padding, stride, dilation, groups, "add", 1.0, None, scalars, None)
    return lambda other: cast(torch.Tensor, operator(other, *given))
