"""Convolutions of every kind, and settings to measure quickly, for tests of the layout benchmark."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.layout.setting import Setting
from fxpasses.devices.convolutions import (
    Convolution,
)
from fxpasses.devices.timing import Effort

CPU = torch.device("cpu")
QUICK = Effort(rounds=2, sample_seconds=1e-5, case_seconds=0.01)
SETTING = Setting("float32", CPU, QUICK, hot=True)  # where it does not matter: thousands of sets take time

CASES = {
    "plain": Convolution.of((2, 6, 9, 8), (8, 6, 3, 3), (2,), (1,)),
    "dilated": Convolution.of((2, 6, 9, 8), (8, 6, 3, 3), dilation=(2,)),
    "uneven": Convolution.of((2, 6, 9, 8), (8, 6, 3, 1), (2, 1), (1, 0)),
    "grouped": Convolution.of((2, 6, 9, 8), (8, 3, 3, 3), groups=2),
    "depthwise": Convolution.of((2, 6, 9, 8), (6, 1, 3, 3), groups=6),
    "pointwise": Convolution.of((2, 6, 9, 8), (8, 6, 1, 1)),
    "transposed": Convolution.of((2, 6, 9, 8), (6, 5, 3, 3), (2,), (1,), (1,), True, (1,)),
    "transposed grouped": Convolution.of((2, 6, 9, 8), (6, 5, 3, 3), (2,), transposed=True, groups=3),
    "3-D": Convolution.of((2, 6, 4, 5, 6), (8, 6, 3, 3, 3), (1,), (1,)),
    "3-D depthwise": Convolution.of((2, 6, 4, 5, 6), (6, 1, 3, 3, 3), groups=6),
    "3-D pointwise": Convolution.of((2, 6, 4, 5, 6), (8, 6, 1, 1, 1)),
    "3-D transposed": Convolution.of((2, 6, 4, 5, 6), (6, 5, 2, 2, 2), (2,), transposed=True),
}


def functional(case: Convolution, x: Tensor, w: Tensor) -> Tensor:
    """The same convolution by torch's public functions."""
    stride, padding, dilation, transposed, output_padding, groups = case.arguments
    spatial = x.dim() - 2
    if transposed:
        transpose = F.conv_transpose2d if spatial == 2 else F.conv_transpose3d
        return transpose(x, w, None, stride, padding, output_padding, groups, dilation)
    convolve = F.conv2d if spatial == 2 else F.conv3d
    return convolve(x, w, None, stride, padding, dilation, groups)
