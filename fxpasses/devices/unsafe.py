"""Kernels that are wrong in channels-last, so that what they compute stays contiguous whatever it costs.

oneDNN's gradient of a weight. For a 1x1 convolution with a stride, the pixels that are read are gathered in a
workspace. In channels-last it has rows of as many values as there are channels, and is walked by whole
vectors. Where there are fewer channels than a vector has values, the walk goes past its end: the gradient is
wrong (measured: 34 % off at 1x3x224x224), or the process ends with a segmentation fault or a corrupt heap.
The forward and the gradient of the input are right, and so is everything in contiguous. Seen with oneDNN 3.12
(torch 2.13), for float32 with AVX2 and AVX-512 and for bfloat16 without AMX; it is oneDNN's issue 6035, open
in 3.14. RepVGG's first block is such a convolution, and stock inductor lays it out channels-last.

CUDA's gradient of an average pooling with padding. The channels-last kernel forgets the padding and takes
each gradient from other windows: PyTorch's issue 188344, mended in July 2026. What inductor generates is
right, but it calls that kernel where many windows overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from fxpasses.devices.sizes import ConvolutionSizes, Sizes
from fxpasses.graph.modules import module_of
from fxpasses.graph.schema import bind

OVERRUN = (
    "oneDNN's channels-last kernel for the gradient of its weight, 1x1 with a stride over fewer than 16 "
    "channels, writes past the end of its memory"
)
FORGETS_PADDING = "CUDA's channels-last kernel for the gradient of its input forgets the padding"
"""What is wrong with the two kernels, in words."""

_VECTOR = 16
"""Values of a vector of AVX-512; AVX2's have 8, and from 8 channels on its kernel is right."""

_DTYPES = (torch.float32, torch.bfloat16)

_GENERATED = 25
"""Where more windows overlap, inductor calls the library; never more overlap than a window has pixels."""


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
        made[d] * step == read[d]
        for d, step in enumerate(stride, start=2)
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
    padded = not isinstance(padding, str) and any(amount != 0 for amount in padding)
    return (
        len(weight) == 4
        and all(isinstance(size, int) and size == 1 for size in weight[2:])
        and any(step != 1 for step in stride)
        and not padded
        and groups == 1
        and few
    )


def forgets_padding(node: Node, device: torch.device | str, *, generated: bool) -> bool:
    """Whether the gradient of an average pooling would be wrong in channels-last.

    Args:
        node: `avg_pool2d` or `avg_pool2d_backward`, as a function, an operator or a module.
        device: where it runs.
        generated: whether a compiler writes the kernel, unless too many windows overlap.
    """
    if torch.device(device).type != "cuda":
        return False
    module, arguments = module_of(node), bind(node)
    if isinstance(module, nn.AvgPool2d):
        kernel, padding = _pair(module.kernel_size), _pair(module.padding)
    elif isinstance(arguments, dict):
        kernel, padding = _pair(arguments["kernel_size"]), _pair(arguments["padding"])
    else:
        return True
    is_generated = generated and math.prod(kernel) <= _GENERATED
    return not is_generated and any(amount != 0 for amount in padding)


def _pair(given: Any) -> list[int]:
    """A value for each of two dimensions, where one may stand for both."""
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    return values if len(values) == 2 else values * 2
