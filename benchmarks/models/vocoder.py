"""A HiFi-GAN generator: spectrograms [N, mels, T] to waveforms [N, 1, T·256], one-dimensional throughout.

    mels ─ conv 7 ─┬─ leaky ReLU ─ transposed conv, r times as long, half as wide ─ mean of residual blocks ─┐
                   └────────────── once for each rate r: 8, 8, 2, 2 ─────────────────────────────────────────┘
         ─ leaky ReLU ─ conv 7 ─ tanh

Every weight is normalised (`weight_norm`), as in training; the architecture is V1 of Kong et al., "HiFi-GAN",
arXiv 2010.05646, of a quarter of its width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

MELS = 80
_RATES = (8, 8, 2, 2)
_KERNELS = (3, 7, 11)
_DILATIONS = (1, 3, 5)
_SLOPE = 0.1


class HifiGan(nn.Module):
    """The generator; see the module's docstring.

    Args:
        width: channels before the first transposed convolution; each halves them.
        rates: how many times as long each makes the signal.
    """

    def __init__(self, width: int = 128, rates: Sequence[int] = _RATES) -> None:
        super().__init__()
        self.first = _convolution(MELS, width, 7)
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for rate in rates:
            up = nn.ConvTranspose1d(width, width // 2, 2 * rate, stride=rate, padding=rate // 2)
            width //= 2
            self.ups.append(weight_norm(up))
            self.blocks.append(nn.ModuleList(ResidualBlock(width, kernel) for kernel in _KERNELS))
        self.last = _convolution(width, 1, 7)

    def example_inputs(self, batch: int, size: int) -> tuple[torch.Tensor, ...]:
        """A spectrogram of a frame for every seventh of `size`."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(batch, MELS, max(8, size // 7), generator=generator),)

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        """From [N, mels, T] to [N, 1, T times the product of the rates]."""
        x = self.first(mels)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(F.leaky_relu(x, _SLOPE))
            assert isinstance(blocks, nn.ModuleList)
            x = functools.reduce(torch.add, [block(x) for block in blocks]) / len(blocks)
        return torch.tanh(self.last(F.leaky_relu(x)))


class ResidualBlock(nn.Module):
    """Three times x + plain(leaky(dilated(leaky(x)))), with dilations that grow."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        dilated = (_convolution(channels, channels, kernel, dilation) for dilation in _DILATIONS)
        self.dilated = nn.ModuleList(dilated)
        self.plain = nn.ModuleList(_convolution(channels, channels, kernel) for _ in _DILATIONS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape."""
        for dilated, plain in zip(self.dilated, self.plain, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, _SLOPE)), _SLOPE))
        return x


def _convolution(channels: int, features: int, kernel: int, dilation: int = 1) -> nn.Module:
    padding = dilation * (kernel - 1) // 2
    convolution = nn.Conv1d(channels, features, kernel, padding=padding, dilation=dilation)
    normalised: nn.Module = weight_norm(convolution)
    return normalised
