"""Weights in the layout that convolutions want, once instead of at every call.

A convolution that runs channels-last reorders a contiguous weight each time it is called. Converting the
parameter once saves that. Values, the parameter objects (so optimisers keep their state), autograd and
loading of state dicts are as before: only the strides change.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from fxpasses.errors import FxpassesError
from fxpasses.passes.layout.labels import C, L, Label, memory_format
from fxpasses.passes.layout.names import canonical
from fxpasses.passes.layout.plan import LayoutPlan
from fxpasses.passes.layout.unsafe import may_overrun

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_LABELS: dict[torch.memory_format, Label] = {
    torch.contiguous_format: C,
    torch.channels_last: L,
    torch.channels_last_3d: L,
}


class MemoryFormatError(FxpassesError, ValueError):
    """Neither a memory format that weights can have nor a layout plan."""


def convert_conv_weights(module: nn.Module, wanted: torch.memory_format | LayoutPlan) -> tuple[str, ...]:
    """Converts the weights of all convolutions in `module`, in place, nested modules included.

    Direct and transposed convolutions over 2 and 3 spatial dimensions are converted, with their gradients
    where there are any; each is channels-last in the way of its rank. What is left alone: weights that are
    computed (parametrised), not yet initialised, or whose memory another parameter or buffer shares; and 1x1
    weights with a stride over fewer than 16 channels, which lie the same in both formats, and of which oneDNN
    computes a wrong gradient once their strides say channels-last (`passes.layout.unsafe`).

    Args:
        module: any module.
        wanted: ``torch.channels_last``, ``torch.channels_last_3d`` (which mean the same here) or
            ``torch.contiguous_format``; or a plan, of which every weight gets the layout it is wanted in.

    Returns:
        The names of the parameters whose strides have changed.

    Raises:
        MemoryFormatError: `wanted` is something else.
    """
    if not isinstance(wanted, LayoutPlan) and wanted not in _LABELS:
        valid = ", ".join(map(str, _LABELS))
        raise MemoryFormatError(
            f"convert_conv_weights takes one of {valid}, or a LayoutPlan (report.layout); got {wanted!r}."
        )
    shared = _shared_storages(module)
    changed: list[str] = []
    for path, child in module.named_modules():
        weight = child._parameters.get("weight")
        if not isinstance(child, CONVOLUTIONS) or not _is_plain(weight):
            continue
        assert weight is not None
        name = f"{path}.weight".lstrip(".")
        label = _planned(wanted, name) if isinstance(wanted, LayoutPlan) else _LABELS[wanted]
        if (
            label is not None
            and not (label == L and _is_unsafe(child))
            and weight.untyped_storage().data_ptr() not in shared
            and _convert(weight, label)
        ):
            changed.append(name)
    return tuple(changed)


def _is_unsafe(module: nn.Module) -> bool:
    assert isinstance(module, CONVOLUTIONS)
    return may_overrun(module.weight.shape, module.stride, module.padding, module.groups)


def _planned(plan: LayoutPlan, name: str) -> Label | None:
    """What the plan wants; torch.export puts a ``p_`` in front of a parameter's name."""
    found = canonical(name)
    return plan.weights.get(found, plan.weights.get(f"p_{found}"))


def _convert(weight: nn.Parameter, label: Label) -> bool:
    """Gives the parameter the strides of the label; whether they were others."""
    wanted = memory_format(label, weight.dim())
    before = weight.stride()
    with torch.no_grad():
        # clone writes the strides of the format to the letter, even where a size of 1 makes them moot.
        weight.data = weight.data.clone(memory_format=wanted)
        if weight.grad is not None:
            weight.grad.data = weight.grad.data.clone(memory_format=wanted)
    return weight.stride() != before


def _is_plain(weight: nn.Parameter | None) -> bool:
    return (
        weight is not None
        and not isinstance(weight, nn.parameter.UninitializedParameter)
        and weight.layout is torch.strided
        and weight.dim() in (4, 5)
    )


def _shared_storages(module: nn.Module) -> set[int]:
    """The storages that several distinct parameters or buffers live in; one that is tied by name is one."""
    held = {id(each): each for each in (*module.parameters(), *module.buffers())}
    counts = Counter(
        each.untyped_storage().data_ptr()
        for each in held.values()
        if not isinstance(each, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer))
        and each.layout is torch.strided
    )
    return {pointer for pointer, count in counts.items() if count > 1}
