"""Models around the pass `layout`: convolutions with operators of every row of the taxonomy between them.

A model is drawn step by step along an example, which tells what the next step may be. Operators are on
images [N, C, *spatial] or on sequences [N, C, T].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from fxpasses.testing.specimens import Specimen
from fxpasses.testing.strategies.chains import Step
from fxpasses.testing.strategies.layers import CONVOLUTIONS, Expectation, randomised, seeded

Tensor = torch.Tensor
Apply = Callable[[Tensor], Tensor]

LAYOUTS: dict[str, Expectation] = {
    "plain": Expectation(None),
    "symbolic": Expectation(None, dynamic=True),
    "video": Expectation(None),
    "sequence": Expectation(None),
    "channels-last": Expectation(None),
    "forked": Expectation(None),
    "written": Expectation(None),
}
"""The kinds of models; any number of plans is right, so that only answers are checked."""

_LARGEST = 6000
"""Of how many elements a result may be."""


def _places(y: Tensor) -> Tensor:
    return (y.detach() > 0).long()


def _grid(y: Tensor) -> Tensor:
    return y.detach()[:, :2].tanh().permute(0, 2, 3, 1)


def _unpooled(y: Tensor) -> Tensor:
    pooled = F.max_pool2d(y, 2, return_indices=True)
    return F.max_unpool2d(pooled[0], pooled[1], (2, 2))


def _attention(y: Tensor) -> Tensor:
    rows = y.flatten(2)
    scores = torch.softmax(torch.bmm(rows.transpose(1, 2), rows) * 0.1, 2)
    return torch.bmm(scores, rows.transpose(1, 2)).transpose(1, 2).view_as(y)


def _windows(y: Tensor) -> Tensor:
    n, c, h, w = y.shape[0], y.shape[1], y.shape[2], y.shape[3]
    cut = y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c).tanh()
    return cut.view(n, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def _unflatten(y: Tensor, dim: int, sizes: Any) -> Tensor:
    parts: Tensor = y.unflatten(dim, sizes)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return parts


def _shuffled(y: Tensor) -> Tensor:
    return _unflatten(y, 1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _over_channels(function: Apply) -> Apply:
    return lambda y: function(y.movedim(1, -1)).movedim(-1, 1)


def _first(y: Tensor) -> Tensor:
    return torch.tensor([0, 0], device=y.device)


OF_ANY_RANK: Mapping[str, Apply] = {
    "relu": torch.relu,
    "gate": lambda y: y * y.mean(2, keepdim=True).sigmoid(),
    "gate of channels": lambda y: y * y.amax(1, keepdim=True).sigmoid(),
    "group_norm": lambda y: F.group_norm(y, 2),
    "instance_norm": lambda y: F.instance_norm(y),
    "layer_norm": lambda y: F.layer_norm(y, y.shape[-1:]),
    "layer_norm of channels": _over_channels(lambda y: F.layer_norm(y, y.shape[-1:])),
    "rms_norm of channels": _over_channels(lambda y: F.rms_norm(y, y.shape[-1:])),
    "linear": _over_channels(lambda y: F.linear(y, torch.ones_like(y[0, 0, 0, :1]).expand(3, -1) / 3)),
    "normalize": lambda y: F.normalize(y, dim=1),
    "softmax": lambda y: y.softmax(1),
    "log_softmax": lambda y: F.log_softmax(y, 2),
    "cumsum": lambda y: y.cumsum(1),
    "cumprod": lambda y: y.sigmoid().cumprod(2),
    "cummax": lambda y: y.cummax(2)[0],
    "sort": lambda y: y.sort(1)[0],
    "topk": lambda y: y.topk(2, 1)[0],
    "median": lambda y: y - y.median(1, keepdim=True)[0],
    "max": lambda y: y + y.max(1, keepdim=True)[0],
    "max of rows": lambda y: y + y.max(2, keepdim=True)[0],
    "max of two": lambda y: torch.max(y, -0.5 * y),
    "argmax": lambda y: y + y.argmax(1, keepdim=True),
    "logsumexp": lambda y: y - y.logsumexp((1, 2), keepdim=True),
    "vector_norm": lambda y: y / (torch.linalg.vector_norm(y, dim=1, keepdim=True) + 1),
    "channel_shuffle": lambda y: torch.channel_shuffle(y, 2),
    "shuffle as views": _shuffled,
    "constant pad": lambda y: F.pad(y, (1, 0, 0, 2)),
    "roll": lambda y: torch.roll(y, (1, -1), (2, 3)),
    "roll of channels": lambda y: y.roll(1, 1),
    "flip": lambda y: y.flip(2),
    "stack of groups": lambda y: torch.stack([y, y * 2], 1).flatten(1, 2),
    "stack of rows": lambda y: torch.stack([y, y * 2], 2).flatten(2, 3),
    "stack of images": lambda y: torch.stack([y, y.sin()], 0).mean(0),
    "stack behind": lambda y: torch.stack([y, y.sin()], -1).sum(-1),
    "unbind": lambda y: torch.stack(y.unbind(1), 1),
    "cat": lambda y: torch.cat([y, y.cos()], 1),
    "cat of rows": lambda y: torch.cat([y, y.cos()], 2),
    "chunk": lambda y: torch.cat([y.chunk(2, 1)[1], y.chunk(2, 1)[0]], 1),
    "repeat_interleave": lambda y: y.repeat_interleave(2, 1),
    "expand": lambda y: y + y[:, :1].expand_as(y),
    "select": lambda y: y + y.select(2, 0).unsqueeze(2),
    "slices": lambda y: y[:, :2, ..., 1:],
    "new dimension": lambda y: y[:, :, None].sigmoid()[:, :, 0],
    "squeeze": lambda y: y.unsqueeze(-1).sin().squeeze(-1),
    "gather": lambda y: y.gather(1, _places(y)),
    "scatter": lambda y: y.scatter(1, _places(y) * 0, y[:, :1].expand_as(y) * 2),
    "scatter_add": lambda y: y.scatter_add(1, _places(y), y * 2),
    "index": lambda y: y[:, _first(y)],
    "index_select": lambda y: y.index_select(2, _first(y)),
    "index_add": lambda y: y.index_add(1, _first(y)[:1], y[:, 1:2]),
    "index_fill": lambda y: y.index_fill(1, _first(y), 0.5),
    "masked_fill": lambda y: y.masked_fill(y > 1, 0.25),
    "select_scatter": lambda y: y.select_scatter(y[:, 0] * 2, 1, 1),
    "slice_scatter": lambda y: torch.slice_scatter(y, y[:, :1] * 2, 1, 1, 2),
    "glu": lambda y: F.glu(y, 1),
    "prelu": lambda y: F.prelu(y, torch.full_like(y[0, 0, 0].flatten()[:1], 0.3)),
    "tril": lambda y: y.tril(),
    "dropout in eval": lambda y: F.dropout(y, 0.5, False),
    "clone": lambda y: y.clone(),
    "contiguous": lambda y: y.contiguous(),
    "spectrum": lambda y: torch.fft.fft2(y).real * 0.1,
    "fftshift": lambda y: torch.fft.fftshift(y, (2, 3)),
}
"""Operators on images and videos, which have no sizes in them."""

OF_IMAGES: Mapping[str, Apply] = {
    "pixel_shuffle": lambda y: F.pixel_shuffle(y, 2),
    "pixel_unshuffle": lambda y: F.pixel_unshuffle(y, 2),
    "nearest": lambda y: F.interpolate(y, scale_factor=2),
    "nearest-exact": lambda y: F.interpolate(y, scale_factor=2, mode="nearest-exact"),
    "bilinear": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
    "bicubic": lambda y: F.interpolate(y, size=(5, 4), mode="bicubic"),
    "antialiased": lambda y: F.interpolate(y, size=(3, 4), mode="bilinear", antialias=True),
    "area": lambda y: F.interpolate(y, size=(3, 3), mode="area"),
    "reflection pad": lambda y: F.pad(y, (1, 1, 0, 1), mode="reflect"),
    "replication pad": lambda y: F.pad(y, (1, 1, 0, 1), mode="replicate"),
    "circular pad": lambda y: F.pad(y, (1, 1, 0, 1), mode="circular"),
    "max_pool": lambda y: F.max_pool2d(y, 2),
    "avg_pool": lambda y: F.avg_pool2d(y, 3, 1, 1),
    "lp_pool": lambda y: F.lp_pool2d(y.square() + 1, 2, 2),
    "adaptive_max_pool": lambda y: F.adaptive_max_pool2d(y, 3),
    "max_unpool": _unpooled,
    "local_response_norm": lambda y: F.local_response_norm(y, 2),
    "repeat": lambda y: y.repeat(1, 1, 2, 1),
    "attention": _attention,
    "windows": _windows,
    "grid_sample": lambda y: F.grid_sample(y, _grid(y), align_corners=False),
    "unfold": lambda y: F.unfold(y, 2, stride=2).unsqueeze(2),
    "product of images": lambda y: y @ y.transpose(2, 3) * 0.1,
}

OF_VIDEOS: Mapping[str, Apply] = {
    "video nearest": lambda y: F.interpolate(y, scale_factor=2),
    "video reflection pad": lambda y: F.pad(y, (1, 1, 0, 1, 1, 1), mode="reflect"),
    "video replication pad": lambda y: F.pad(y, (1, 1, 0, 1, 1, 1), mode="replicate"),
    "video max_pool": lambda y: F.max_pool3d(y, 2),
    "frames": lambda y: _unflatten(y.transpose(1, 2).flatten(0, 1), 0, (-1, 2)).transpose(1, 2),
}

OF_SEQUENCES: Mapping[str, Apply] = {
    "gelu": F.gelu,
    "layer_norm": lambda y: F.layer_norm(y.transpose(1, 2), y.shape[1:2]).transpose(1, 2),
    "group_norm": lambda y: F.group_norm(y, 2),
    "glu": lambda y: F.glu(y, 1),
    "as an image": lambda y: F.avg_pool2d(y.unsqueeze(2), (1, 3), 1, (0, 1)).squeeze(2),
    "heads": lambda y: _unflatten(y, 1, (2, -1)).softmax(2).flatten(1, 2),
    "attention": lambda y: torch.bmm(torch.bmm(y.transpose(1, 2), y).softmax(2), y.transpose(1, 2)).transpose(
        1, 2
    ),
    "reflection pad": lambda y: F.pad(y, (1, 1), mode="reflect"),
    "cumsum": lambda y: y.cumsum(2) * 0.1,
    "stack": lambda y: torch.stack([y, -y], 1).flatten(1, 2),
    "roll": lambda y: y.roll(1, 2),
}

STEPS: Mapping[int, Mapping[str, Apply]] = {
    3: OF_SEQUENCES,
    4: {**OF_ANY_RANK, **OF_IMAGES},
    5: {**OF_ANY_RANK, **OF_VIDEOS},
}
"""Operators by the number of dimensions of what they read."""


class Network(nn.Module):
    """Convolutions with steps between them, bent in one way or not at all."""

    def __init__(self, steps: Sequence[nn.Module], kind: str) -> None:
        super().__init__()
        self.steps, self.kind = nn.ModuleList(steps), kind

    def forward(self, x: Tensor) -> Any:
        y, middle = x, x
        for index, step in enumerate(self.steps):
            y = step(y)
            if index == 1:
                middle = y
            if index == 0 and self.kind == "written":
                y = y * 1.5
                y[:, :1].mul_(2)
                y.add_(0.5)
        return (y, middle.cos()) if self.kind == "forked" else y


@st.composite
def layouts(draw: st.DrawFn) -> Specimen:
    """Networks of convolutions and what stands between them, in one layout or the other."""
    kind = draw(st.sampled_from([*LAYOUTS, "plain", "plain"]))
    rank = {"video": 5, "sequence": 3}.get(kind, 4)
    with seeded(draw):
        spatial = [draw(st.sampled_from((4, 5, 6))) for _ in range(rank - 2)]
        shape = (draw(st.integers(2, 3)), draw(st.sampled_from((2, 3))), *spatial)
        x = torch.randn(shape, dtype=torch.float64)
        y, steps = x, list[nn.Module]()
        for at in range(draw(st.integers(2, 6))):
            step = _step(draw, y, is_convolution=at == 0 or draw(st.integers(0, 3)) == 0)
            if step is not None:
                y = step.double().eval()(y).detach()
                steps.append(step)
        model = randomised(Network([*steps, _convolution(draw, y)], kind))
        if kind == "channels-last":
            x = x.contiguous(memory_format=torch.channels_last)
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        elif rank != 4 and draw(st.booleans()):
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)  # as what follows a layer norm lies in memory
    layout = draw(st.sampled_from(("channels_last", "channels_last", "contiguous")))
    return LAYOUTS[kind].of(f"{kind}, {layout}", model, x.requires_grad_()).with_options(layout=layout)


def _convolution(draw: st.DrawFn, y: Tensor) -> nn.Module:
    layer: nn.Module = CONVOLUTIONS[False][y.dim() - 3](
        y.shape[1], draw(st.sampled_from((4, 4, 8))), draw(st.sampled_from((1, 3))), padding=1
    )
    return layer


def _step(draw: st.DrawFn, y: Tensor, *, is_convolution: bool) -> nn.Module | None:
    """A convolution or an operator that the example can take; None where the drawn one cannot be taken."""
    if is_convolution:
        return _convolution(draw, y)
    steps = STEPS[y.dim()]
    step = Step(steps[draw(st.sampled_from(list(steps)))])
    try:
        result = step(y)
    except (RuntimeError, IndexError, ValueError):
        return None
    is_small = 0 < result.numel() <= _LARGEST and max(result.shape) < 40
    return step if result.dim() == y.dim() and is_small and bool(result.isfinite().all()) else None
