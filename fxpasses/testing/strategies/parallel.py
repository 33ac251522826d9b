"""Models around parallel_conv_merge: branches of one input that are joined.

Which places a convolution reads is worked out along each dimension by counting: its element i reads the input
at o·stride - padding + i·dilation for the result at o. A second convolution that gives a result of the same
size is part of the first where its elements are among those of the first; where they are not, it is a near
miss.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from fxpasses.testing.specimens import Specimen
from fxpasses.testing.strategies.layers import (
    CONVOLUTIONS,
    FIRES,
    NAMES_SURVIVE,
    RIGHT_AS_THEY_ARE,
    Expectation,
    except_at,
    in_kind,
    kinds_of,
    norm_after,
    randomised,
    seeded,
)
from fxpasses.testing.strategies.readers import Reader, second_reader
from fxpasses.torch_internals.modules import BatchNormBase

Tensor = torch.Tensor

# Windows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """What a convolution reads along one dimension."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    def results(self, size: int) -> int:
        """How many results it gives for an input of `size` entries; none where it does not fit."""
        reach = self.dilation * (self.kernel - 1) + 1
        room = size + 2 * self.padding - reach
        return room // self.stride + 1 if room >= 0 else 0

    def holds(self, other: _Window) -> bool:
        """Whether another one with the same spacing reads some of the same places."""
        mine, others = ({i * w.dilation - w.padding for i in range(w.kernel)} for w in (self, other))
        spaced = other.kernel == 1 or other.dilation == self.dilation
        return spaced and self.stride == other.stride and others <= mine


_WINDOWS = [_Window(*numbers) for numbers in itertools.product((1, 2, 3), (1, 2), (0, 1, 2), (1, 2))]
_SIZE = 5
"""Entries of the input along every spatial dimension."""

_HOSTS = [window for window in _WINDOWS if window.results(_SIZE) > 0]


def _inside(host: _Window, *, at_every_size: bool = False) -> list[_Window]:
    """The windows inside the host that have as many results, here or for whatever size of the input."""
    found = [
        window for window in _WINDOWS if window.results(_SIZE) == host.results(_SIZE) and host.holds(window)
    ]
    sizes = range(_SIZE, _SIZE + 4)
    return [
        window
        for window in found
        if not at_every_size or all(window.results(size) == host.results(size) for size in sizes)
    ]


def _misplaced(host: _Window) -> list[_Window]:
    """The windows with as many results of which neither holds the other."""
    alike = [window for window in _WINDOWS if window.results(_SIZE) == host.results(_SIZE)]
    return [window for window in alike if not host.holds(window) and not window.holds(host)]


_WITH_A_NEAR_MISS = [window for window in _HOSTS if _misplaced(window)]
_KEEPING_PLACES = [
    window for window in _HOSTS if window.holds(_Window(1, 1, 0, 1)) and window.results(_SIZE) == _SIZE
]


def _convolution(
    draw: st.DrawFn, windows: Sequence[_Window], inputs: int, outputs: int, groups: int = 1
) -> nn.Module:
    numbers = {
        name: tuple(getattr(window, name) for window in windows) for name in ("stride", "padding", "dilation")
    }
    kernel = tuple(window.kernel for window in windows)
    layer = CONVOLUTIONS[False][len(windows) - 1]
    made: nn.Module = layer(inputs, outputs, kernel, groups=groups, bias=draw(st.booleans()), **numbers)
    return made


# parallel_conv_merge ---------------------------------------------------------------------------------------

_SEEN_AS_A_WRITE = dict.fromkeys(NAMES_SURVIVE, "mutation")
"""Who traces operators gives the input another name after a write, so no two branches read the same."""

PARALLEL_CONV_MERGE: dict[str, Expectation] = {
    **RIGHT_AS_THEY_ARE,
    "norm": FIRES,
    "identity": FIRES,
    "three": Expectation(2),
    "in-place": FIRES,
    # Without a batch, core ATen has a squeeze behind each convolution.
    "unbatched": Expectation(except_at("aten", 1, 0)),
    "extra-user": Expectation(code="multiple-users"),
    "misplaced": Expectation(code="geometry"),
    "other-groups": Expectation(code="geometry"),
    "broadcast": Expectation(code="geometry"),
    "broadcast-identity": Expectation(code="geometry"),
    "other-input": Expectation(),
    "training-mode": Expectation(grads=False),
    "transposed": Expectation(),
    "activation": Expectation(),
    "scaled": Expectation(),
    "difference": Expectation(),
    "twice": Expectation(),
    "written": Expectation(code=_SEEN_AS_A_WRITE, grads=False),
    # Below, a write is a new tensor.
    "into-input": Expectation(except_at("aten", 0, 1), except_at("aten", "mutation"), grads=False),
}
"""The kinds of models, and what parallel_conv_merge must do with them at each level."""

_SUMS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    operator.add,
    torch.add,
    lambda a, b: b + a,
    lambda a, b: a.add(b),
    lambda a, b: torch.add(b, other=a),
)
_OTHER_SUMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], ...]] = {
    "in-place": (operator.iadd, lambda a, b: a.add_(b)),
    "into-input": (lambda a, b: b.add_(a),),
    "scaled": (lambda a, b: torch.add(a, b, alpha=2), lambda a, b: a.add(b, alpha=0.5)),
    "difference": (operator.sub, torch.sub),
    "twice": (lambda a, b: a + a,),
}
"""Ways to join a convolution with another branch."""


class _Branches(nn.Module):
    """Branches of one input, joined two by two, and bent in one way or not at all."""

    def __init__(
        self, branches: Sequence[nn.Module], join: Callable[..., Tensor], kind: str, read: Reader
    ) -> None:
        super().__init__()
        self.branches, self.join, self.kind, self.read = nn.ModuleList(branches), join, kind, read

    def forward(self, x: Tensor) -> Any:
        # A new tensor, so that writing to it is nobody else's business.
        x = torch.tanh(x)
        results = []
        for index, branch in enumerate(self.branches):
            if index and self.kind == "written":
                x.add_(0.5)
            given = x.sin() if index and self.kind == "other-input" else x
            results.append(branch(given))
        if self.kind == "activation":
            results[1] = F.softplus(results[1])
        joined = results[0]
        for result in results[1:]:
            joined = self.join(joined, result)
        return (
            (F.softplus(joined), self.read(results[1])) if self.kind == "extra-user" else F.softplus(joined)
        )


class _Identity(nn.Module):
    """The input itself; `nn.Identity` would be a module of the graph where modules are kept."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@st.composite
def parallel_conv_merge(draw: st.DrawFn) -> Specimen:
    """Sums of convolutions of one input, of its batch norm and of itself, and near misses."""
    kind = draw(kinds_of(PARALLEL_CONV_MERGE))
    rank = draw(st.integers(1, 3))
    with seeded(draw):
        channels = 1 if kind == "broadcast-identity" else 2 * draw(st.integers(1, 2))
        branches = _branches(draw, kind, rank, channels)
        if kind not in ("in-place", "into-input", "twice", "extra-user") and draw(st.booleans()):
            branches[:2] = branches[1::-1]
        join = draw(st.sampled_from(_OTHER_SUMS.get(kind, _SUMS)))
        read = second_reader(draw, rank + 2) if kind == "extra-user" else torch.sin
        model = randomised(_Branches(branches, join, kind, read))
        for module in model.modules():
            module.train(kind == "training-mode" and isinstance(module, BatchNormBase))
        x = torch.randn(draw(st.integers(2, 3)), channels, *[_SIZE] * rank, dtype=torch.float64)
        x = in_kind(kind, model, x[0] if kind == "unbatched" else x)
    return PARALLEL_CONV_MERGE[kind].of(kind, model, x)


_OF_PLACES = ("norm", "identity", "into-input", "training-mode", "three", "broadcast-identity", "transposed")
"""Kinds with a branch that keeps the places of its input, so that the convolution must as well."""


def _branches(draw: st.DrawFn, kind: str, rank: int, channels: int) -> list[nn.Module]:
    """A convolution, and what is added to it."""
    same = kind in _OF_PLACES
    groups = 1 if kind == "broadcast-identity" else draw(st.sampled_from((1, 1, 2)))
    outputs = channels if same else 2 * draw(st.integers(1, 2))
    if kind == "broadcast-identity":
        outputs = draw(st.integers(2, 3))
    hosts = _KEEPING_PLACES if same else _HOSTS
    windows = [draw(st.sampled_from(hosts)) for _ in range(rank)]
    if kind == "misplaced":
        windows[0] = draw(st.sampled_from(_WITH_A_NEAR_MISS))
    host = _convolution(draw, windows, channels, outputs, groups)
    others: list[nn.Module] = []
    if kind in ("norm", "training-mode", "three"):
        others.append(norm_after(draw, rank + 2, channels))
    elif kind in ("identity", "into-input", "broadcast-identity"):
        others.append(_Identity())
    elif kind == "transposed":
        others.append(CONVOLUTIONS[True][rank - 1](channels, outputs, 1, groups=groups))
    if kind == "three" or not others:
        inner = [
            draw(st.sampled_from(_inside(window, at_every_size=kind == "symbolic"))) for window in windows
        ]
        if kind == "misplaced":
            inner[0] = draw(st.sampled_from(_misplaced(windows[0])))
        others.insert(0, _second(draw, kind, inner, channels, outputs, groups))
    return [host, *others]


def _second(
    draw: st.DrawFn, kind: str, windows: Sequence[_Window], inputs: int, outputs: int, groups: int
) -> nn.Module:
    if kind == "broadcast":
        return _convolution(draw, windows, inputs, 1)
    return _convolution(draw, windows, inputs, outputs, 3 - groups if kind == "other-groups" else groups)
