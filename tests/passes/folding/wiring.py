"""What the tests of conv-BN's guards share: a convolution and a batch norm wired up by a function.

Every guard is tested from both sides: a case in which it must refuse, and the nearest one in which it must
not. What is refused must still give eager's answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SAMPLED, Spelled, randomised
from torch import nn

sampled = pytest.mark.parametrize("capture", SAMPLED)


class Wired(Spelled):
    """A convolution, a batch norm and spare parameters."""

    def __init__(self, wire: Callable[[Any, torch.Tensor], Any], *, channels: int = 4) -> None:
        super().__init__(wire)
        self.conv, self.bn = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels)
        self.linear, self.bn1d = nn.Linear(3, channels), nn.BatchNorm1d(channels)
        self.vector = nn.Parameter(torch.randn(channels))


def wired(wire: Callable[[Any, torch.Tensor], Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    return randomised(Wired(wire), dtype)


def statistics(m: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return m.bn.running_mean, m.bn.running_var
