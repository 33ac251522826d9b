"""oneDNN: convolutions and linear layers over weights in its own format.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import functools
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
        arguments: those of `aten.convolution`.
        input_size: the sizes of its input; the format is the best for them.
    """
    _, _, _, stride, padding, dilation, transposed, output_padding, groups = arguments
    rest = (list(stride), list(dilation), groups, list(input_size))
    mkldnn = torch.ops.mkldnn

    def pack(weight: torch.Tensor) -> torch.Tensor:
        if transposed:
            given = (list(padding), list(output_padding), *rest)
            return cast(torch.Tensor, mkldnn._reorder_convolution_transpose_weight(weight, *given))
        return cast(torch.Tensor, mkldnn._reorder_convolution_weight(weight, list(padding), *rest))

    return pack


def packed_sizes(arguments: Sequence[Any], dense: Sequence[int]) -> tuple[int, ...]:
    """The sizes that a packed weight has: filters come first, of a transposed convolution too.

    Args:
        arguments: those of `aten.convolution`.
        dense: the sizes of its weight.
    """
    *_, transposed, _, groups = arguments
    channels, filters, *kernel = dense
    return (filters * groups, channels // groups, *kernel) if transposed else tuple(dense)


@functools.cache
def inductor_tells_packed_weights() -> bool:
    """Whether inductor takes the sizes of a transposed convolution's constant as those of a dense weight.

    It does, since 2.15, of any constant that is not in oneDNN's format while it compiles; before, of none.
    """
    from torch._inductor import mkldnn_ir

    inner = mkldnn_ir._prepare_convolution_fusion_create.__code__.co_consts
    return any(getattr(code, "co_name", "") == "_is_reordered_deconv_weight" for code in inner)


def packed_convolution(arguments: Sequence[Any], packed: Any) -> tuple[OpOverload, tuple[Any, ...]]:
    """The operator of `aten.convolution` over a packed weight, and its arguments, without an epilogue.

    Inductor takes that of a transposed convolution with sizes that are numbers; for symbols there is
    `transposed_convolution`.
    """
    image, _, bias, stride, padding, dilation, transposed, output_padding, groups = arguments
    if transposed:
        operator = torch.ops.mkldnn._convolution_transpose_pointwise.default
        given = (padding, output_padding, stride, dilation, groups)
        return operator, (image, packed, bias, *given, "none", [], "")
    operator = torch.ops.mkldnn._convolution_pointwise.default
    return operator, (image, packed, bias, padding, stride, dilation, groups, "none", [], "")


@functools.cache
def transposed_convolution() -> OpOverload:
    """The operator of ours for a transposed convolution over a packed weight, of any sizes.

    Its result is channels-last, whatever it reads. Inductor's lowering of oneDNN's makes numbers of sizes.
    """
    schema = (
        "(Tensor image, Tensor packed, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
        " int[] output_padding, int groups) -> Tensor"
    )
    name = "fxpasses::transposed_convolution"
    torch.library.define(name, schema, tags=(torch.Tag.flexible_layout,))
    torch.library.impl(name, "CompositeExplicitAutograd", _transposed_convolution)
    torch.library.register_fake(name, _fake_transposed_convolution)
    operator: OpOverload = torch.ops.fxpasses.transposed_convolution.default
    return operator


def _transposed_convolution(
    image: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    *given: Any,
) -> torch.Tensor:
    *spatial, groups = given
    stride, padding, dilation, output_padding = map(list, spatial)
    arguments = (image, None, bias, stride, padding, dilation, True, output_padding, groups)
    operator, operands = packed_convolution(arguments, packed)
    result = cast(torch.Tensor, operator(*operands))
    return result.contiguous(
        memory_format=_channels_last(image)
    )  # oneDNN may take one channel for contiguous


def _fake_transposed_convolution(
    image: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, *given: Any
) -> torch.Tensor:
    del bias
    count, _, *space = image.shape
    filters, _, *kernel = packed.shape
    stride, padding, dilation, output_padding = (_expanded(numbers, len(space)) for numbers in given[:-1])
    extents = [
        (size - 1) * stride[at] - 2 * padding[at] + dilation[at] * (kernel[at] - 1) + output_padding[at] + 1
        for at, size in enumerate(space)
    ]
    sizes, layout = (count, filters, *extents), _channels_last(image)
    return torch.empty(sizes, dtype=image.dtype, device=image.device, memory_format=layout)


def _expanded(numbers: Sequence[int], dimensions: int) -> Sequence[int]:
    return numbers if len(numbers) == dimensions else [*numbers] * dimensions


def _channels_last(image: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if image.dim() == 4 else torch.channels_last_3d


def packed_convolution_onto(
    arguments: Sequence[Any], packed: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that adds `aten.convolution` over a packed weight to a tensor, in place."""
    image, _, bias, stride, padding, dilation, _, _, groups = arguments
    operator = torch.ops.mkldnn._convolution_pointwise_.binary
    scalars: list[float] = []
    given = (image, packed, bias, padding, stride, dilation, groups, "add", 1.0, None, scalars, None)
    return lambda other: cast(torch.Tensor, operator(other, *given))


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, and oneDNN, which uses them, is on."""
    has_them = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has_them and onednn_takes(torch.bfloat16)
