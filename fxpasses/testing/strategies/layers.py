"""What every family's models are made of: random small layers, and what is expected of each kind of model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from fxpasses.testing.captures import LEVELS
from fxpasses.testing.specimens import Specimen

WRITES_SURVIVE = ("torch", "symbolic_trace", "pre_dispatch", "export")
"""Levels whose graphs keep in-place operators; below, a write is a new tensor, and a rewrite is right."""

NAMES_SURVIVE = ("torch", "symbolic_trace")
"""Levels at which a tensor keeps its name when it is written to; who traces operators gives it another."""

CONVOLUTIONS: dict[bool, tuple[Any, ...]] = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
"""By whether they are transposed, and by spatial dimensions less one."""

NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Kinds of models that differ in their dtype alone."""


@dataclass(frozen=True)
class Expectation:
    """What a rule must do with one kind of model; see `Specimen` for the attributes."""

    count: int | Mapping[str, int] | None = 0
    code: str | Mapping[str, str] | None = None
    grads: bool = True
    dynamic: bool = False

    def of(self, kind: str, model: nn.Module, *inputs: torch.Tensor) -> Specimen:
        """The specimen of a model that this is expected of."""
        return Specimen(kind, model, inputs, self.count, self.code, grads=self.grads, dynamic=self.dynamic)


FIRES = Expectation(1)
RIGHT_AS_THEY_ARE: dict[str, Expectation] = {
    "plain": FIRES,
    "symbolic": Expectation(1, dynamic=True),
    **dict.fromkeys(DTYPES, FIRES),
}
"""The kinds that no rule may leave alone."""


def except_at(level: str, value: Any, there: Any = None) -> dict[str, Any]:
    """A value for every level, and another for one; None expects nothing."""
    return {**dict.fromkeys(LEVELS, value), level: there}


def kinds_of(expectations: Mapping[str, Expectation]) -> st.SearchStrategy[str]:
    """One of the kinds; every third model is nothing but plain."""
    return st.sampled_from([*expectations, *["plain"] * (len(expectations) // 2)])


@contextlib.contextmanager
def seeded(draw: st.DrawFn) -> Iterator[None]:
    """Has torch's random numbers come from one drawn seed."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(draw(st.integers(0, 2**16)))
        yield


def convolution(
    draw: st.DrawFn, dimensions: int, *, transposed: bool = False, padded: bool = True, **more: Any
) -> nn.Module:
    """A convolution of a few channels; `more` sets what is not to be drawn."""
    groups = more.pop("groups", None) or draw(st.sampled_from((1, 1, 2, 3)))
    stride, dilation = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    arguments: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": draw(st.integers(1, 3)),
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if padded:
        arguments["padding"] = draw(st.integers(0, 1))
    if padded and stride == 1 and not transposed and draw(st.booleans()):
        arguments["padding"] = "same"
    if transposed and stride > 1:
        arguments["output_padding"] = draw(st.integers(0, 1))
    layer: nn.Module = CONVOLUTIONS[transposed][dimensions - 1](**{**arguments, **more})
    return layer


def image_for(draw: st.DrawFn, layer: Any, dimensions: int, *, smallest: int = 5) -> torch.Tensor:
    """An input of a convolution, [N, C_in, *spatial], or of a linear layer, [N, C_in]."""
    channels = layer.in_channels if dimensions else layer.in_features
    spatial = [draw(st.integers(smallest, smallest + 1)) for _ in range(dimensions)]
    return torch.randn(draw(st.integers(2, 3)), channels, *spatial, dtype=torch.float64)


def norm_after(draw: st.DrawFn, rank: int, channels: int) -> Any:
    """A batch norm for tensors of [N, C, ...] with `rank` axes."""
    eps, affine = draw(st.sampled_from((1e-5, 0.1))), draw(st.booleans())
    return NORMS[max(rank - 3, 0)](channels, eps=eps, affine=affine)


def in_kind(kind: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Gives a model the dtype of its kind; its input, in that dtype, as a leaf that takes a gradient."""
    dtype = DTYPES.get(kind, torch.float64)
    model.to(dtype)
    return x.to(dtype).requires_grad_()


def randomised(model: nn.Module) -> nn.Module:
    """The model in float64 and eval mode, with statistics and affine parameters that are no identity."""
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif tensor.is_floating_point():
                tensor.normal_()
    return model
