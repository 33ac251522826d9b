"""Operators: their classes, names, overloads and kinds, and the functions that stand for some in a graph.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket

FUNCTIONS_IN_C: ModuleType = torch._C._nn
"""Where those functions of `torch.nn.functional` are that are not written in Python."""

LINEAR_FUNCTION: Callable[..., Any] = FUNCTIONS_IN_C.linear
"""What `torch.nn.functional.linear` is in a graph."""

# What switches a mode, as a call in a graph.
SET_GRAD_ENABLED: Callable[..., Any] = torch._C._set_grad_enabled
ENTER_AUTOCAST: Callable[..., Any] = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST: Callable[..., Any] = torch.amp.autocast_mode._exit_autocast

METADATA_ASSERTION: OpOverload = torch.ops.aten._assert_tensor_metadata.default
"""What export writes where a dtype or a device is known, to be checked at every call."""


def operator_name(op: OpOverload | HigherOrderOperator) -> str:
    """The qualified name of an operator, such as ``"aten::conv2d.padding"``."""
    return str(op.name())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def overload_name(op: OpOverload) -> str:
    """Where an overload is found under `torch.ops`, such as ``"aten.mean.dim"``."""
    name = operator_name(op).replace("::", ".")
    return name if name.count(".") == 2 else f"{name}.default"


@functools.cache
def is_composite(op: OpOverload) -> bool:
    """Whether `op` decomposes by itself, so that it appears before dispatch only."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator_name(op), "CompositeImplicitAutograd")


@functools.cache
def is_elementwise(function: object) -> bool:
    """Whether an operator makes each element of a new tensor of those at its place."""
    if not isinstance(function, OpOverload) or torch.Tag.pointwise not in function.tags:
        return False
    schema = function._schema
    return not schema.is_mutable and all(returned.alias_info is None for returned in schema.returns)


def convolution_kernel(
    given: torch.Tensor, weight: torch.Tensor, arguments: Mapping[str, Any], bias_sizes: Sequence[int] | None
) -> str:
    """Which of eager's kernels a convolution or its gradient gets: ``"Slow2d"``, ``"Mkldnn"``, ...

    Args:
        given: the input, a fake tensor in whose mode it is asked.
        weight: the weight, of the same mode.
        arguments: `stride`, `padding`, `dilation`, `transposed`, `output_padding` and `groups`.
        bias_sizes: of the bias; None where there is none.
    """
    found = torch._C._select_conv_backend(given, weight, bias=None, bias_sizes=bias_sizes, **arguments)
    return str(found).rpartition(".")[2]


def has_kernel(name: str) -> bool:
    """Whether an operator of that qualified name is registered with a kernel for any device."""
    return torch._C._dispatch_has_kernel(name)


def operators_of(namespace: str) -> set[str]:
    """The names of operators, without overloads, that take or give tensors.

    Args:
        namespace: ``"aten"``, ``"prims"`` or ``"inductor"``.
    """
    importlib.import_module("torch._inductor.compile_fx")
    schemas = torch._C._jit_get_all_schemas()
    names = {str(schema.name).partition("::") for schema in schemas if "Tensor" in str(schema)}
    return {name for found, _, name in names if found == namespace}


def aten_packet(name: str) -> OpOverloadPacket | None:
    """The packet `torch.ops.aten.<name>`, or None when there is no such operator."""
    if not name.isidentifier():
        return None
    return cast("OpOverloadPacket | None", getattr(torch.ops.aten, name, None))


def packet_overloads(packet: OpOverloadPacket) -> list[OpOverload]:
    """Every overload of an operator packet."""
    return [getattr(packet, overload) for overload in packet.overloads()]  # type: ignore[no-untyped-call]  # torch leaves it untyped


def writes_in_place(target: object) -> bool:
    """Whether a function is an operator of torch that writes to its first operand, of the same sizes."""
    if not isinstance(target, OpOverload) or torch.Tag.inplace_view in target.tags:
        return False
    name = operator_name(target).partition(".")[0]
    return name.startswith("aten::") and name.endswith("_") and target._schema.is_mutable


_VIEWS = ("T", "mT", "H", "mH", "real", "imag")
"""Attributes of a tensor that are views of it."""


_IN_PYTHON: tuple[object, ...] = (
    *("bfloat16", "bool", "byte", "char", "double", "float", "half", "int", "long", "short"),
    *(torch.nn.functional.interpolate, torch.nn.functional.normalize),
)
"""Methods and functions that are no operators, and draw no random numbers."""


def is_deterministic(node: torch.fx.Node) -> bool:
    """Whether a call is of an operator of torch that draws no random numbers."""
    target = node.target
    if isinstance(target, OpOverload):
        return torch.Tag.nondeterministic_seeded not in target.tags
    if target is getattr:
        return node.args[1] in _VIEWS
    if getattr(target, "__module__", None) == "_operator":
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if target in _IN_PYTHON:
        return True
    packet = aten_packet(str(name))
    if packet is None:
        return False
    overloads = packet_overloads(packet)
    return (
        all(torch.Tag.nondeterministic_seeded not in overload.tags for overload in overloads)
        and "dropout" not in name
    )


def layout_tag(overload: OpOverload) -> str | None:
    """What an operator asks of its operands' strides, such as ``"flexible_layout"``; None if nothing."""
    from torch._library.utils import get_layout_constraint_tag

    tag = get_layout_constraint_tag(overload, with_default=False)
    return None if tag is None else str(tag.name)
