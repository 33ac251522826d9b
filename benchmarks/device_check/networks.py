"""The architectures of the check: timm's where it is installed, else definitions that need torch alone.

    resnet50, resnext50_32x4d     bottlenecks, of which the second's 3x3 convolutions are grouped
    regnety_032                   grouped bottlenecks with squeeze and excitation
    convnext_tiny                 depthwise 7x7, layer norm over channels, inverted bottlenecks
    unet                          an encoder and a decoder that concatenates
    diffusion_unet                group norm, SiLU, attention over pixels, and a time step

The own ones have the sizes of the papers (He et al. 2015, Xie et al. 2016, Radosavovic et al. 2020, Liu et
al. 2022, Ronneberger et al. 2015, Ho et al. 2020), and are not the same to the last layer.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from fxpasses.cli.model_specs import load_model


def _normed(*convolution: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution from one number of channels to another, and its batch norm."""
    inner = nn.Conv2d(*convolution, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(inner, nn.BatchNorm2d(convolution[1]))


class SqueezeExcite(nn.Module):
    """Channels weighted by what their means say."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The image [N, C, H, W], weighted."""
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    def __init__(
        self, channels: int, inner: int, out: int, *, stride: int, groups: int, squeezed: int = 0
    ) -> None:
        super().__init__()
        self.reduce = _normed(channels, inner)
        self.middle = _normed(inner, inner, kernel=3, stride=stride, groups=groups)
        self.excite = SqueezeExcite(inner, squeezed) if squeezed else nn.Identity()
        self.expand = _normed(inner, out)
        is_same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if is_same else _normed(channels, out, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [N, channels, H, W] to [N, out, H / stride, W / stride]."""
        y = F.relu(self.reduce(x))
        y = self.expand(self.excite(F.relu(self.middle(y))))
        return F.relu(y + self.shortcut(x))


class Residual(nn.Module):
    """A stem, stages of bottlenecks that halve the image, and a classifier."""

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        group_width: int = 0,
        ratio: int = 1,
        squeeze: bool = False,
        stem: int = 32,
    ) -> None:
        """Args:
        depths: blocks of each stage.
        widths: channels of each stage's results.
        group_width: channels of a group of the 3x3 convolutions; 0 for one group.
        ratio: widths over the channels inside a block.
        squeeze: whether blocks have squeeze and excitation.
        stem: channels of the stem.
        """
        super().__init__()
        self.stem = _normed(3, stem, kernel=3, stride=2)
        blocks, channels = [], stem
        for depth, width in zip(depths, widths, strict=True):
            inner = width // ratio
            for number in range(depth):
                squeezed = max(1, channels // 4) if squeeze else 0
                groups = inner // group_width if group_width else 1
                stride = 1 if number else 2
                blocks.append(
                    Bottleneck(channels, inner, width, stride=stride, groups=groups, squeezed=squeezed)
                )
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [N, 3, H, W] to [N, 1000]."""
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The image [N, C, H, W], normalised."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """A depthwise 7x7, a norm, and two linear layers over channels, beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand, self.reduce = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The image [N, C, H, W]."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.reduce(F.gelu(self.expand(y))).permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """Stages of such blocks, with a norm and a strided convolution between them."""

    def __init__(self, depths: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=4), ChannelNorm(widths[0])]
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if number:
                before = widths[number - 1]
                layers += [ChannelNorm(before), nn.Conv2d(before, width, 2, stride=2)]
            layers += [ConvNextBlock(width) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], 1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [N, 3, H, W] to [N, 1000]."""
        return self.head(self.layers(x).mean((2, 3)))


class UNet(nn.Module):
    """Pairs of 3x3 convolutions on the way down; on the way up, what was there before is concatenated."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = 3
        for width in widths:
            self.down.append(self._pair(channels, width))
            channels = width
        for width in widths[-2::-1]:
            self.up.append(nn.ConvTranspose2d(channels, width, 2, stride=2))
            self.merge.append(self._pair(2 * width, width))
            channels = width
        self.head = nn.Conv2d(channels, 5, 1)

    @staticmethod
    def _pair(channels: int, width: int) -> nn.Sequential:
        first, second = _normed(channels, width, kernel=3), _normed(width, width, kernel=3)
        return nn.Sequential(*first, nn.ReLU(), *second, nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [N, 3, H, W] to [N, 5, H, W]; H and W are multiples of 2 to the number of levels less one."""
        before: list[torch.Tensor] = []
        for number, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if number else x)
            before.append(x)
        before.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), before.pop()], 1))
        return self.head(x)


class TimedBlock(nn.Module):
    """Two group-normed 3x3 convolutions, to which the time step is added, beside a shortcut."""

    def __init__(self, channels: int, width: int, time: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, width, 3, padding=1)
        )
        self.time = nn.Linear(time, width)
        self.second = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.shortcut = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """From [N, channels, H, W] and [N, time] to [N, width, H, W]."""
        y = self.first(x) + self.time(F.silu(time))[:, :, None, None]
        return self.second(y) + self.shortcut(x)


class PixelAttention(nn.Module):
    """Attention over the pixels of a group-normed image, beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.projections, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The image [N, C, H, W]."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = self.projections(tokens)[:, None].chunk(3, -1)
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return x + self.out(attended).transpose(1, 2).reshape(x.shape)


class DiffusionUNet(nn.Module):
    """What predicts noise from a noisy image [N, 3, H, W] and a time step [N]."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.time = 4 * widths[0]
        self.embed = nn.Sequential(
            nn.Linear(widths[0], self.time), nn.SiLU(), nn.Linear(self.time, self.time)
        )
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down, self.up, self.halve = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = widths[0]
        for width in widths:
            self.down.append(TimedBlock(channels, width, self.time))
            self.halve.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            channels = width
        self.middle, self.attention = TimedBlock(channels, channels, self.time), PixelAttention(channels)
        for width in reversed(widths):
            self.up.append(TimedBlock(channels + width, width, self.time))
            channels = width
        self.last = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))

    def example_inputs(self, batch: int, size: int) -> tuple[torch.Tensor, ...]:
        """Images of a quarter of the size, as in latent space, and a time step for each."""
        generator = torch.Generator().manual_seed(0)
        side = max(16, size // 4 // 16 * 16)  # which is halved four times
        return torch.randn(batch, 3, side, side, generator=generator), torch.rand(batch, generator=generator)

    def forward(self, x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The noise, [N, 3, H, W]."""
        half = self.embed[0].in_features // 2
        scales = torch.arange(half, device=x.device, dtype=x.dtype) * (-math.log(10000) / half)
        angles = 1000 * step[:, None] * torch.exp(scales)[None]
        time = self.embed(torch.cat([angles.cos(), angles.sin()], 1))
        x = self.first(x)
        before = []
        for block, halve in zip(self.down, self.halve, strict=True):
            x = block(x, time)
            before.append(x)
            x = halve(x)
        x = self.attention(self.middle(x, time))
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, before.pop()], 1), time)
        return self.last(x)


def _timm(name: str, otherwise: Callable[[], nn.Module]) -> nn.Module:
    return load_model(f"timm:{name}") if importlib.util.find_spec("timm") else otherwise()


def resnet50() -> nn.Module:
    """Bottlenecks without groups."""
    return _timm("resnet50", lambda: Residual((3, 4, 6, 3), (256, 512, 1024, 2048), ratio=4, stem=64))


def resnext50_32x4d() -> nn.Module:
    """Bottlenecks with 32 groups of 4, 8, 16 and 32 channels."""
    return _timm("resnext50_32x4d", _resnext50)


def _resnext50() -> nn.Module:
    return Residual((3, 4, 6, 3), (256, 512, 1024, 2048), ratio=2, group_width=4, stem=64)


def regnety_032() -> nn.Module:
    """Grouped bottlenecks with squeeze and excitation."""
    return _timm(
        "regnety_032", lambda: Residual((2, 5, 13, 1), (72, 216, 576, 1512), group_width=24, squeeze=True)
    )


def convnext_tiny() -> nn.Module:
    """Depthwise 7x7 convolutions."""
    return _timm("convnext_tiny", lambda: ConvNext((3, 3, 9, 3), (96, 192, 384, 768)))


def unet() -> nn.Module:
    """A UNet of five levels."""
    return UNet((32, 64, 128, 256, 512))


def diffusion_unet() -> nn.Module:
    """A diffusion UNet of four levels."""
    return DiffusionUNet((64, 128, 256, 256))


def tiny_residual() -> nn.Module:
    """A grouped residual network, for the rehearsal."""
    return Residual((1, 1), (16, 32), group_width=8, squeeze=True, stem=8)


def tiny_unet() -> nn.Module:
    """A UNet of two levels, for the rehearsal."""
    return UNet((8, 16))


NAMES = ("resnext50_32x4d", "unet", "resnet50", "regnety_032", "diffusion_unet", "convnext_tiny")
"""The networks of the check."""

REFUSED = ("resnext50_32x4d", "unet", "regnety_032")
"""Those that stock lays out as contiguous: they have groups, or 3x3 convolutions with few outputs."""

TINY = ("tiny_residual", "tiny_unet")
"""The networks of the rehearsal."""


def specification(name: str) -> str:
    """What `benchmarks.models` takes for a network of this module."""
    return f"{__name__}:{name}"
