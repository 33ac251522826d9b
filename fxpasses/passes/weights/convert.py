"""Weights in the layout that convolutions want, once instead of at every call.

A convolution that runs channels-last reorders a contiguous weight each time it is called. Converting the
parameter once saves that. Values, the parameter objects (so optimisers keep their state), autograd and
loading of state dicts are as before: only the strides change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar, get_args

import torch
from torch import nn

from fxpasses.devices.unsafe import OVERRUN, may_overrun
from fxpasses.errors import FxpassesError
from fxpasses.graph.layouts import C, L, Label
from fxpasses.graph.layouts import memory_format as format_of
from fxpasses.graph.names import canonical
from fxpasses.report.layout_plan import LayoutPlan

Module = TypeVar("Module", bound=nn.Module)

Convolution = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONVOLUTIONS = get_args(Convolution)

_LABELS: dict[torch.memory_format, Label] = {
    torch.contiguous_format: C,
    torch.channels_last: L,
    torch.channels_last_3d: L,
}
_RANKS = (2, 3)


class MemoryFormatError(FxpassesError, ValueError):
    """Neither a memory format that weights can have nor a layout plan."""


class SpatialRankError(FxpassesError, ValueError):
    """A number of spatial dimensions in which a convolution's weight has no choice of layouts."""


@dataclass(frozen=True)
class Conversion:
    """What becomes of the weight of one convolution.

    Attributes:
        name: the parameter's, as in `named_parameters`.
        before, after: its strides; the same where it is left alone or lies as it is wanted.
        left: why it is left alone; empty where it is not.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    left: str = ""

    @property
    def changes(self) -> bool:
        """Whether the strides change."""
        return self.before != self.after


def convert_conv_weights(
    module: Module, memory_format: torch.memory_format | LayoutPlan, dims: Iterable[int] = _RANKS
) -> Module:
    """Converts the weights of all convolutions in `module`, in place, nested modules included.

    Direct and transposed convolutions over 2 and 3 spatial dimensions are converted, with their gradients
    where there are any; each is channels-last in the way of its rank. What is left alone: weights that are
    computed (parametrised), not yet initialised, or whose memory another parameter or buffer shares; and 1x1
    weights with a stride over fewer than 16 channels, which lie the same in both formats, and of which oneDNN
    computes a wrong gradient once their strides say channels-last (`passes.layout.unsafe`). `conversions`
    says beforehand which weights will change.

    Args:
        module: any module.
        memory_format: ``torch.channels_last``, ``torch.channels_last_3d`` (which mean the same here) or
            ``torch.contiguous_format``; or a plan, of which every weight gets the layout it is wanted in.
        dims: the spatial dimensions that a convolution to convert has: 2, 3 or both.

    Returns:
        The module itself.

    Raises:
        MemoryFormatError: `memory_format` is something else; nothing is converted.
        SpatialRankError: `dims` is something else; nothing is converted.
    """
    for weight, label, found in list(_conversions(module, memory_format, dims)):
        if not found.left:
            assert weight is not None
            assert label is not None
            _convert(weight, label)
    return module


def conversions(
    module: nn.Module, memory_format: torch.memory_format | LayoutPlan, dims: Iterable[int] = _RANKS
) -> tuple[Conversion, ...]:
    """What `convert_conv_weights` makes of each weight, when it is called with the same arguments.

    Nothing is converted. A weight that several modules share is listed once.

    Raises:
        MemoryFormatError, SpatialRankError: as there.
    """
    return tuple(found for _, _, found in _conversions(module, memory_format, dims))


def _conversions(
    module: nn.Module, wanted: torch.memory_format | LayoutPlan, dims: Iterable[int]
) -> Iterator[tuple[nn.Parameter | None, Label | None, Conversion]]:
    """Each weight, what it is wanted in, and what becomes of it."""
    if not isinstance(wanted, LayoutPlan) and wanted not in _LABELS:
        valid = ", ".join(map(str, _LABELS))
        raise MemoryFormatError(
            f"convert_conv_weights takes one of {valid}, or a LayoutPlan (report.layout); got {wanted!r}."
        )
    ranks, shared = _checked(dims), _shared_storages(module)
    for weight, readers in _weights(module, ranks):
        label = _planned(wanted, readers) if isinstance(wanted, LayoutPlan) else _LABELS[wanted]
        left = _why_left(weight, label, readers.values(), shared)
        before = tuple(weight.stride()) if weight is not None and _is_plain(weight) else ()
        after = before if left or weight is None or label is None else _strides(weight, label)
        yield weight, label, Conversion(next(iter(readers)), before, after, left)


def _checked(dims: Iterable[int]) -> frozenset[int]:
    given = tuple(dims) if isinstance(dims, Iterable) else ()
    if not given or not set(given) <= set(_RANKS):
        raise SpatialRankError(
            "dims takes numbers of spatial dimensions, 2 (Conv2d) and 3 (Conv3d), such as (2, 3) or (2,); "
            f"got {dims!r}. A weight of any other number has one layout only."
        )
    return frozenset(given)


def _weights(
    module: nn.Module, ranks: Collection[int]
) -> list[tuple[nn.Parameter | None, dict[str, Convolution]]]:
    """The weights of all convolutions, each with those that read it, by the weight's name there."""
    found: dict[object, tuple[nn.Parameter | None, dict[str, Convolution]]] = {}
    for path, child in module.named_modules():
        if isinstance(child, CONVOLUTIONS) and len(child.kernel_size) in ranks:
            weight, name = child._parameters.get("weight"), f"{path}.weight".lstrip(".")
            key: object = name if weight is None else id(weight)
            found.setdefault(key, (weight, {}))[1][name] = child
    return list(found.values())


def _why_left(
    weight: nn.Parameter | None, label: Label | None, readers: Iterable[Convolution], shared: set[int]
) -> str:
    """Why a weight is left alone; empty where it is not."""
    if weight is None:
        return "it is computed at every call"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "it is not initialised yet"
    if not _is_plain(weight):
        return "it is no dense tensor of 4 or 5 dimensions"
    if label is None:
        return "the plan does not know it"
    if label == L and any(may_overrun(weight.shape, r.stride, r.padding, r.groups) for r in readers):
        return OVERRUN
    if weight.untyped_storage().data_ptr() in shared:
        return "another parameter or buffer lies in its memory"
    return ""


def _planned(plan: LayoutPlan, names: Iterable[str]) -> Label | None:
    """What the plan wants; torch.export puts a ``p_`` in front of a parameter's name."""
    known = [canonical(name) for name in names]
    spelled = [prefix + name for name in known for prefix in ("", "p_")]
    return next((plan.weights[name] for name in spelled if name in plan.weights), None)


def _strides(weight: nn.Parameter, label: Label) -> tuple[int, ...]:
    """Those of the label, to the letter: also along a size of 1, where they are moot."""
    wanted = format_of(label, weight.dim())
    return tuple(torch.empty(weight.shape, device="meta", memory_format=wanted).stride())


def _convert(weight: nn.Parameter, label: Label) -> None:
    """Gives the parameter, and its gradient if it has one, the strides of the label."""
    wanted = format_of(label, weight.dim())
    with torch.no_grad():
        # clone writes the strides of the format to the letter, even where a size of 1 makes them moot.
        weight.data = weight.data.clone(memory_format=wanted)
        if weight.grad is not None:
            weight.grad.data = weight.grad.data.clone(memory_format=wanted)


def _is_plain(weight: nn.Parameter) -> bool:
    return (
        not isinstance(weight, nn.parameter.UninitializedParameter)
        and weight.layout is torch.strided
        and weight.dim() in (4, 5)
    )


def _shared_storages(module: nn.Module) -> set[int]:
    """The storages that several distinct parameters or buffers live in; one that is tied by name is one."""
    held = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    counts = Counter(
        tensor.untyped_storage().data_ptr()
        for tensor in held.values()
        if not isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer))
        and tensor.layout is torch.strided
    )
    return {pointer for pointer, count in counts.items() if count > 1}
