"""Recording what a model calls: a dispatch mode that counts every operator with its inputs.

Under a `FakeTensorMode` nothing is computed, so that recording a model takes about a second whatever its
size. The mode stands below autograd: it sees the backward pass as well, and composite operators as the
parts that kernels exist for.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from benchmarks.operators.inputs.notation import Call, SparseSpec, TensorSpec, Value, format_call
from benchmarks.torch_internals import OpOverload, TorchDispatchMode

Result = TypeVar("Result")

_NON_COMPUTE = ("_unsafe_view", "detach", "lift_fresh", "alias")


class OperatorInputsMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the distinct inputs of every operator that is called while it is active.

    `counts` maps the operator's name to the inputs, in the notation of the logs, with their occurrences.
    Calls that read or write no tensor, views, and constructors are let through uncounted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def __torch_dispatch__(
        self,
        func: Callable[..., Result],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Result:
        # The text is made before the call: an operator that works in place changes what it describes.
        counted = isinstance(func, OpOverload) and computes(func)
        text = format_call(describe_call(args, kwargs or {})) if counted else ""
        result = func(*args, **(kwargs or {}))
        if "T(" in text:
            self.counts[str(func)][text] += 1
        return result


def computes(operator: OpOverload) -> bool:
    """Whether an operator computes something from a tensor: neither a view nor a constructor."""
    schema, name = operator._schema, operator._schema.name.partition("::")[2]
    if "Tensor" not in " ".join(str(argument.type) for argument in schema.arguments):
        return False
    if "Tensor" not in " ".join(str(result.type) for result in schema.returns):
        return False
    if operator.is_view or torch.Tag.inplace_view in operator.tags:
        return False
    return not (name.endswith("_like") or name.startswith("new_") or name in _NON_COMPUTE)


def describe_call(args: Sequence[object], kwargs: Mapping[str, object]) -> Call:
    """The call's arguments, each tensor replaced by its shape, dtype and stride."""
    return Call(
        tuple(describe(argument) for argument in args),
        {name: describe(argument) for name, argument in kwargs.items()},
    )


def describe(value: object) -> Value:
    """One argument as the notation has it.

    Raises:
        TypeError: the notation has no such value.
    """
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    if isinstance(value, (list, torch.Size)):
        return [describe(item) for item in value]
    if isinstance(value, tuple):
        return tuple(describe(item) for item in value)
    if isinstance(value, torch.device):
        return value.type
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return value
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return value
    raise TypeError(f"an operator argument of type {type(value).__name__} cannot be written to a log")


def _describe_tensor(tensor: torch.Tensor) -> Value:
    shape = tuple(int(size) for size in tensor.shape)
    if tensor.layout is not torch.strided:
        return SparseSpec(shape, tensor.dtype, tensor.layout, bool(tensor.is_coalesced()))
    if tensor.is_contiguous():
        return TensorSpec(shape, tensor.dtype)
    return TensorSpec(shape, tensor.dtype, tuple(int(step) for step in tensor.stride()))
