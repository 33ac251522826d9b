"""Dynamo: its counters, its backends, its reset, and the trace that it writes.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from fxpasses.errors import UnknownOptionError, unknown_name


def dynamo_counters() -> Mapping[str, Any]:
    """`torch._dynamo.utils.counters`, the counters that inductor's users know."""
    from torch._dynamo.utils import counters

    return cast(Mapping[str, Any], counters)


def lookup_backend(name: str) -> Callable[..., Any]:
    """The Dynamo backend registered under `name`.

    Raises:
        ValueError: there is none; the message lists those that exist and the closest.
    """
    from torch._dynamo.backends.registry import list_backends, lookup_backend

    names = list_backends(exclude_tags=())
    if name not in names:
        raise UnknownOptionError(unknown_name("inner backend", name, names))
    return cast(Callable[..., Any], lookup_backend(name))


def reset_dynamo() -> None:
    """Drops everything Dynamo has compiled in this process."""
    import torch._dynamo

    torch._dynamo.reset()


def trace_artifact(name: str, make: Callable[[], str]) -> None:
    """Adds a text to torch's structured trace (`TORCH_TRACE`, read by tlparse); free when that is off."""
    from torch._logging._internal import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "json"},
        payload_fn=make,
        expect_trace_id=False,
    )


def fresh_call() -> Callable[..., Any]:
    """A function `call(model, inputs)` with a code object of its own.

    Dynamo keeps what it compiled with the code of the outermost function. Compiling through a fresh one
    neither finds what was compiled before nor leaves anything behind.
    """

    def call(model: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        return model(*inputs)

    made: Callable[..., Any] = types.FunctionType(call.__code__.replace(), call.__globals__, "call")
    return made


def real_tensor_of(placeholder: torch.fx.Node) -> torch.Tensor | None:
    """The tensor that Dynamo traced a graph with, while that graph is compiled; None if it is gone."""
    argument = placeholder.meta.get("grapharg")
    try:
        example = None if argument is None else argument.example
    except AssertionError:  # it is gone
        return None
    return example if isinstance(example, torch.Tensor) else None
