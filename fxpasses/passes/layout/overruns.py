"""Convolutions of whose weight oneDNN must not be asked the gradient in channels-last.

For a 1x1 convolution with a stride, oneDNN gathers the pixels that are read into a workspace. In
channels-last the workspace has rows of as many values as there are channels, and is walked by whole vectors.
Where there are fewer channels than a vector has values, the walk goes past its end: the gradient is wrong
(measured: 34 % off at 1x3x224x224), or the process ends with a segmentation fault or a corrupt heap. The
forward and the gradient of the input are right, and so is everything in contiguous. Seen with oneDNN 3.12
(torch 2.13), for float32 with AVX2 and AVX-512 and for bfloat16 without AMX; it is oneDNN's issue 6035, open
in 3.14.

RepVGG's first block is such a convolution, and stock inductor lays it out channels-last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxpasses.passes.layout.costs import ConvolutionSizes, Sizes

_VECTOR = 16
"""Values of a vector of AVX-512; AVX2's have 8, and from 8 channels on its kernel is right."""

_DTYPES = (torch.float32, torch.bfloat16)


def overruns(sizes: ConvolutionSizes, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether the gradient of the weight would be written past the end in channels-last.

    Args:
        sizes: the convolution; where an image's size is symbolic, the answer is for the worst one.
        dtype: of its operands.
        device: where they are; only on a CPU is it oneDNN that computes them.
    """
    stride, padding, _, transposed, _, groups = sizes.arguments
    if torch.device(device).type != "cpu" or dtype not in _DTYPES:
        return False
    if not may_overrun(sizes.weight, stride, padding, groups):
        return False
    # The gathering wants an image that the strides divide; oneDNN has another kernel for the rest.
    read, made = (sizes.output, sizes.input) if transposed else (sizes.input, sizes.output)
    return all(
        made[d] * each == read[d]
        for d, each in enumerate(stride, start=2)
        if isinstance(read[d], int) and isinstance(made[d], int)
    )


def may_overrun(
    weight: Sizes, stride: Sequence[object], padding: Sequence[object] | str, groups: object
) -> bool:
    """Whether there are images for which the gradient of such a weight would be written past the end.

    Args:
        weight: its size: [K, C / groups, *kernel], or [C, K / groups, *kernel] where transposed.
        stride: one value for each dimension of the kernel.
        padding: the same, or its name.
        groups: into how many groups the channels fall.
    """
    few = not isinstance(weight[1], int) or weight[1] < _VECTOR
    padded = any(each != 0 for each in padding) if not isinstance(padding, str) else False
    return (
        len(weight) == 4
        and all(isinstance(each, int) and each == 1 for each in weight[2:])
        and any(each != 1 for each in stride)
        and not padded
        and groups == 1
        and few
    )
