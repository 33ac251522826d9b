"""The inner backend: inductor, or another that Dynamo knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fxpasses.errors import UnknownOptionError
from fxpasses.options import Options
from fxpasses.torch_internals.dynamo import lookup_backend
from fxpasses.torch_internals.inductor import compile_with_inductor, inductor_mode_options


def inner_backend(
    options: Options, mode: str | None, add: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
) -> Callable[..., Any]:
    """The inner backend, with its mode and settings bound.

    Args:
        options: what the user chose.
        mode: a mode of torch.compile.
        add: adds settings of ours to inductor's.

    Raises:
        UnknownOptionError: a mode that does not exist, or one or settings that the inner backend cannot take.
    """
    if options.inner == "inductor":
        settings = add({**(inductor_mode_options(mode) if mode else {}), **options.inductor})
        return lambda gm, inputs: compile_with_inductor(gm, inputs, settings)
    if mode is not None or options.inductor:
        given = f"mode={mode!r}" if mode is not None else "options={'inductor': ...}"
        raise UnknownOptionError(f"{given} is for inductor, and inner={options.inner!r}. Drop one of them.")
    return lookup_backend(options.inner) if isinstance(options.inner, str) else options.inner
