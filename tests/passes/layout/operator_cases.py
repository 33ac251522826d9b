"""Operators between two convolutions, and how many copies each of them costs where all is channels-last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor
IMAGE, VIDEO = (2, 4, 6, 8), (2, 4, 4, 6, 4)


@dataclass(frozen=True)
class Case:
    """An operator.

    Attributes:
        apply: takes the result of a convolution over 8 channels and gives a tensor or a tuple of them.
        eager: copies inside of a graph that is run as it is.
        compiled: copies inside of inductor's graph.
        shape: of the input.
        grads: whether eager differentiates it.
        dynamic: whether sizes may be symbols.
    """

    apply: Callable[[Tensor], Any]
    eager: int = 0
    compiled: int = 0
    shape: tuple[int, ...] = IMAGE
    grads: bool = True
    dynamic: bool = True


def _indices(y: Tensor) -> Tensor:
    """Places along the channels, one for each element."""
    return (y.detach() > 0).long() * 3


def _grid(y: Tensor) -> Tensor:
    return y.detach()[:, :2].tanh().permute(0, 2, 3, 1)


def _channels(y: Tensor) -> Tensor:
    return torch.tensor([0, 5, 2], device=y.device)


CASES: Mapping[str, Case] = {
    "pixel_shuffle": Case(lambda y: F.pixel_shuffle(y, 2), eager=1),
    "pixel_unshuffle": Case(lambda y: F.pixel_unshuffle(y, 2)),
    "channel_shuffle": Case(lambda y: F.channel_shuffle(y, 4)),
    "native_channel_shuffle": Case(lambda y: F.native_channel_shuffle(y, 4), grads=False),
    "shuffle as views": Case(lambda y: y.unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2), eager=2),
    "nearest": Case(lambda y: F.interpolate(y, scale_factor=2)),
    "nearest-exact": Case(lambda y: F.interpolate(y, scale_factor=2, mode="nearest-exact")),
    "bilinear": Case(lambda y: F.interpolate(y, scale_factor=2, mode="bilinear")),
    "bicubic": Case(lambda y: F.interpolate(y, size=(7, 9), mode="bicubic")),
    "antialiased bilinear": Case(lambda y: F.interpolate(y, size=(3, 4), mode="bilinear", antialias=True)),
    "antialiased bicubic": Case(lambda y: F.interpolate(y, size=(3, 4), mode="bicubic", antialias=True)),
    # Stock inductor cannot compile it for symbolic sizes.
    "area": Case(lambda y: F.interpolate(y, scale_factor=0.5, mode="area"), dynamic=False),
    "constant pad": Case(lambda y: F.pad(y, (1, 1, 2, 0))),
    "reflection pad": Case(lambda y: F.pad(y, (1, 1, 2, 0), mode="reflect")),
    "replication pad": Case(lambda y: F.pad(y, (1, 1, 2, 0), mode="replicate")),
    "circular pad": Case(lambda y: F.pad(y, (1, 1, 2, 1), mode="circular"), eager=1),
    "roll": Case(lambda y: torch.roll(y, (1, -2), (2, 3))),
    "roll of channels": Case(lambda y: y.roll(1, 1)),
    "flip": Case(lambda y: y.flip(2, 3)),
    "select": Case(lambda y: y.select(0, 1)[None] * 2),
    "unbind": Case(lambda y: torch.stack(y.unbind(0)[::-1], 0), eager=1, compiled=1),
    "stack of groups": Case(lambda y: torch.stack([y, y * 2], 1).flatten(1, 2)),
    "stack of images": Case(lambda y: torch.stack([y, y * 2], 0).sum(0), eager=1),
    "stack of rows": Case(lambda y: torch.stack([y, y * 2], 2).flatten(2, 3)),
    "repeat": Case(lambda y: y.repeat(1, 2, 1, 1), eager=1),
    "tile": Case(lambda y: y.tile(1, 1, 2, 1), eager=1),
    "repeat_interleave": Case(lambda y: y.repeat_interleave(2, 3), eager=1),
    "expand": Case(lambda y: y.mean((2, 3), keepdim=True).expand(-1, -1, 3, 3) + 1, eager=1),
    "expand of pixels": Case(
        lambda y: y[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).flatten(4).flatten(2, 3), eager=2
    ),
    "squeeze": Case(lambda y: y.unsqueeze(2).sigmoid().squeeze(2)),
    "unsqueeze behind": Case(lambda y: y.unsqueeze(-1).sigmoid().squeeze(-1)),
    "slices": Case(lambda y: y[:, 1:, ..., ::2]),
    "tensor_split": Case(lambda y: torch.cat(y.tensor_split(2, 1)[::-1], 1)),
    "cumsum": Case(lambda y: y.cumsum(2), eager=1, compiled=1),
    "cumprod": Case(lambda y: y.sigmoid().cumprod(1), eager=1, compiled=1),
    "logcumsumexp": Case(lambda y: y.logcumsumexp(3), eager=1, compiled=1),
    "cummax": Case(lambda y: y.cummax(1).values, eager=1, compiled=1),
    "softmax": Case(lambda y: y.softmax(1), eager=1),
    "log_softmax": Case(lambda y: F.log_softmax(y, 2), eager=1),
    "max over channels": Case(lambda y: y * y.max(1, keepdim=True).values),
    "max over rows": Case(lambda y: y * y.max(2, keepdim=True).values, eager=1),
    "mean over rows": Case(lambda y: y * y.mean(2, keepdim=True).sigmoid(), eager=1),
    "max of two": Case(lambda y: torch.max(y, -y)),
    "argmax": Case(lambda y: y * y.argmax(1, keepdim=True)),
    "aminmax": Case(lambda y: y - y.aminmax(dim=1, keepdim=True).min),
    "sort": Case(lambda y: y.sort(1).values),
    "topk": Case(lambda y: y.topk(4, 1).values, eager=1, compiled=1),
    "median": Case(lambda y: y - y.median(1, keepdim=True).values),
    "norm": Case(lambda y: y / (torch.linalg.vector_norm(y, dim=1, keepdim=True) + 1)),
    "normalize": Case(lambda y: F.normalize(y, dim=1)),
    "gather": Case(lambda y: y.gather(1, _indices(y)), eager=1),
    "scatter": Case(lambda y: y.scatter(1, _indices(y), y * 2), eager=1, grads=False),
    "scatter_add": Case(lambda y: y.scatter_add(1, _indices(y), y * 2), eager=1),
    "scatter_reduce": Case(lambda y: y.scatter_reduce(1, _indices(y), y * 2, "sum"), eager=1),
    "index_put": Case(lambda y: y.index_put((torch.tensor([1]),), y[:1] * 2)),
    "index of channels": Case(lambda y: y[:, _channels(y)], eager=1),
    "index_select": Case(lambda y: y.index_select(1, _channels(y)), eager=1),
    "index_add": Case(lambda y: y.index_add(1, _channels(y), y[:, :3]), eager=1),
    "index_copy": Case(lambda y: y.index_copy(1, _channels(y), y[:, :3] * 2), eager=1),
    "index_fill": Case(lambda y: y.index_fill(1, _channels(y), 1.0)),
    "masked_scatter": Case(lambda y: y.masked_scatter(y > 0, y * 2), eager=1),
    "take_along_dim": Case(lambda y: y.take_along_dim(_indices(y), 1), eager=1),
    "select_scatter": Case(lambda y: y.select_scatter(y[:, 0] * 2, 1, 3)),
    "slice_scatter": Case(lambda y: torch.slice_scatter(y, y[:, :2] * 2, 1, 3, 5)),
    "grid_sample": Case(lambda y: F.grid_sample(y, _grid(y), align_corners=False), eager=1),
    "nearest grid_sample": Case(
        lambda y: F.grid_sample(y, _grid(y), mode="nearest", align_corners=True), eager=1, compiled=1
    ),
    "unfold": Case(lambda y: F.unfold(y, 2).relu(), eager=0, compiled=0),
    "fold": Case(lambda y: F.fold(F.unfold(y, 2), y.shape[2:], 2), eager=1),
    "fractional_max_pool": Case(
        lambda y: F.fractional_max_pool2d(
            y, 2, output_size=(3, 3), _random_samples=torch.full_like(y.detach()[:, :, 0, :2], 0.3)
        ),
        eager=1,
        compiled=1,
    ),
    "lp_pool": Case(lambda y: F.lp_pool2d(y.abs() + 1, 2, 2)),
    "max_unpool": Case(lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2), compiled=3),
    "adaptive_max_pool": Case(lambda y: F.adaptive_max_pool2d(y, 3)),
    "local_response_norm": Case(lambda y: F.local_response_norm(y, 3), eager=2, compiled=2),
    "spectrum": Case(lambda y: torch.fft.irfft2(torch.fft.rfft2(y)), eager=2, compiled=2),
    "fftshift": Case(lambda y: torch.fft.fftshift(y, (2, 3))),
    "dropout of channels": Case(lambda y: F.dropout2d(y, 0.0)),
    "dropout in eval": Case(lambda y: F.dropout(y, 0.5, False)),
    "instance_norm": Case(F.instance_norm, eager=1, compiled=2),
    "layer_norm of rows": Case(lambda y: F.layer_norm(y, y.shape[-1:]), eager=1),
    "layer_norm of channels": Case(lambda y: F.layer_norm(y.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)),
    "rms_norm": Case(lambda y: F.rms_norm(y.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)),
    "linear": Case(lambda y: F.linear(y.permute(0, 2, 3, 1), y.new_ones(4, 8)).permute(0, 3, 1, 2)),
    "matmul": Case(lambda y: (y.permute(0, 2, 3, 1) @ y.new_ones(8, 4)).permute(0, 3, 1, 2)),
    "product of images": Case(lambda y: y @ y.transpose(2, 3), eager=1, compiled=3),
    "glu": Case(lambda y: F.glu(y, 1)),
    "prelu": Case(lambda y: F.prelu(y, y.new_ones(8) / 4)),
    "half": Case(lambda y: y.to(torch.float32).double()),
    "tril": Case(lambda y: y.tril(), eager=1),
    "new_zeros": Case(lambda y: y + y.new_zeros(y.shape), eager=1),
    "logaddexp": Case(lambda y: torch.logaddexp(y, -y)),
    "special": Case(lambda y: torch.special.entr(y.sigmoid())),
    "video reflection pad": Case(lambda y: F.pad(y, (1, 1, 1, 1, 1, 0), mode="reflect"), shape=VIDEO),
    "video replication pad": Case(lambda y: F.pad(y, (1, 1, 1, 1, 1, 0), mode="replicate"), shape=VIDEO),
    "video nearest-exact": Case(
        lambda y: F.interpolate(y, scale_factor=2, mode="nearest-exact"), shape=VIDEO
    ),
    "video roll": Case(lambda y: y.roll(1, 2), shape=VIDEO),
    "video softmax": Case(lambda y: y.softmax(1), shape=VIDEO, eager=1),
    "video max_unpool": Case(
        lambda y: F.max_unpool3d(*F.max_pool3d(y, 2, return_indices=True), 2),
        shape=VIDEO,
        eager=1,
        compiled=3,
    ),
    "video select": Case(lambda y: y.select(2, 1).relu().unsqueeze(2), shape=VIDEO),
}


class Between(nn.Module):
    """A convolution, an operator, and a convolution over each image that it gives."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, kind = case, nn.Conv2d if len(case.shape) == 4 else nn.Conv3d
        self.first = kind(4, 8, 3, padding=1)
        with torch.no_grad():
            given = case.apply(self.first(torch.randn(case.shape)))
        self.last = kind(given.shape[1], 4, 1) if given.dim() == len(case.shape) else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.last(self.case.apply(self.first(x)))
