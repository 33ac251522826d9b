"""Dynamo's guards: those of the frame that is compiled now, and how one of our own joins them.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Check = Callable[[Any], bool]
"""Whether a value still is as it was compiled for."""


class Guard(Protocol):
    """What is used of `torch._guards.Guard`: one condition on the value that an expression gives.

    Attributes:
        name: the expression, of the frame's locals `L` and globals `G`.
        originating_source: the expression as an object.
        create_fn: the kind of condition, a method of Dynamo's builder, or a partial call of one.
    """

    @property
    def name(self) -> str: ...
    @property
    def originating_source(self) -> Any: ...
    @property
    def create_fn(self) -> Callable[..., Any]: ...

    def create(self, builder: Any) -> Any:
        """Makes Dynamo check it."""


def replace_guards(
    replacements: Callable[[Sequence[Guard]], tuple[Sequence[Guard], Sequence[Guard]]],
) -> None:
    """Takes guards of the frame that Dynamo compiles now out, and puts others in.

    Nothing happens where Dynamo compiles none, or where it will write its guards to a file.

    Args:
        replacements: from all guards that there are to those to take out and those to put in.
    """
    from torch._dynamo import config
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None or getattr(config, "caching_precompile", False):
        return
    guards: Any = context.guards_context.dynamo_guards
    out, put = replacements(list(guards))
    dropped = set(map(id, out))
    kept = type(guards.inner)(guard for guard in guards.inner if id(guard) not in dropped)
    guards.inner = kept
    for guard in put:
        guards.add(guard)


def guard_on(source: Any, create: Callable[[Any, Any], None]) -> Guard:
    """A guard of our own: when Dynamo makes its guards, it calls `create(builder, guard)`."""
    from torch._guards import Guard as DynamoGuard

    made: Guard = DynamoGuard(source, create)
    return made


def kind_of(guard: Guard) -> tuple[str, Any]:
    """The name of a guard's kind, such as ``"TYPE_MATCH"``, and the attribute that it is about, if any."""
    made = guard.create_fn
    if isinstance(made, functools.partial):
        return made.func.__name__, made.keywords.get("attr")
    return made.__name__, None


def source_named(source: Any, name: str) -> Any:
    """The source of an expression that another begins with; None if that one does not."""
    while source is not None and source.name != name:
        source = getattr(source, "base", None)
    return source


def value_of(builder: Any, guard: Guard) -> Any:
    """What a guard's expression gives, while Dynamo makes its guards."""
    return builder.get(guard)


def is_serialised(builder: Any) -> bool:
    """Whether the guards that are made will be written to a file."""
    return bool(getattr(builder, "save_guards", False))


def is_alone(builder: Any, guard: Guard, tensor: torch.Tensor) -> bool | None:
    """Whether a tensor's guard also asks that no other tensor of the frame is the same object.

    None where its sizes or strides are not numbers, or it is compared by identity.
    """
    from torch._dynamo import config
    from torch._dynamo.source import is_from_unspecialized_builtin_nn_module_source

    source = guard.originating_source
    known = builder.check_fn_manager.output_graph.input_source_to_sizes_strides.get(source)
    is_known = known is not None and all(type(size) is int for size in (*known["size"], *known["stride"]))
    if not is_known or source.guard_source.is_specialized_nn_module():
        return None
    is_trusted = type(tensor) is torch.nn.Parameter or is_from_unspecialized_builtin_nn_module_source(source)
    return not (config.skip_no_tensor_aliasing_guards_on_parameters and is_trusted)


def add_check(builder: Any, guard: Guard, check: Check, text: str) -> None:
    """Makes Dynamo ask `check` of the value of a guard's expression, whenever the compiled code is called.

    Args:
        builder: what `create` of `guard_on` is called with.
        guard: the same.
        check: it is called for every call.
        text: what Dynamo's logs call it.
    """
    manager = builder.get_guard_manager(guard)
    try:
        manager.add_lambda_guard(check, [text], guard.user_stack)  # type: ignore[attr-defined]
    except TypeError:  # before 2.12
        manager.add_lambda_guard(check, [text])


def add_last_check(builder: Any, guards: Sequence[Guard], check: Callable[..., bool], text: str) -> None:
    """Makes Dynamo ask `check` of the values of several guards' expressions, once all other guards hold.

    Args:
        builder: what `create` of `guard_on` is called with.
        guards: whose expressions give its arguments.
        check: it is called for every call that is as expected so far.
        text: what Dynamo's logs call it.
    """
    from torch._dynamo.guards import _get_closure_vars

    called = f"___fxpasses_check({', '.join(guard.name for guard in guards)})"
    names = {**_get_closure_vars(), "___fxpasses_check": check}
    builder.add_python_lambda_leaf_guard_to_root([called], [text], closure_vars=names)


def tensors_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Dynamo's own comparison: whether `check(*others)` is of tensors with the same metadata, in this order.

    Types, dtypes, devices, sizes, strides, dispatch keys, and whether they require a gradient.
    """
    from torch._C._dynamo.guards import TensorGuards

    make: Callable[..., Any] = TensorGuards
    sizes, strides = [[*tensor.shape] for tensor in tensors], [[*tensor.stride()] for tensor in tensors]
    check: Callable[..., bool] = make(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check
