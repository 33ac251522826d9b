"""Tracing without a trace: a call that Dynamo caches apart from everything else."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


def fresh_call() -> Callable[..., Any]:
    """A function `call(model, inputs)` with a code object of its own.

    Dynamo keeps what it compiled with the code of the outermost function. Compiling through a fresh one
    neither finds what was compiled before nor leaves anything behind.
    """

    def call(model: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        return model(*inputs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, "call")
