"""Constants of generated code that a cached artifact declares by shape, and that are filled once it is there.

    declare(shape, dtype, recipe)   a tensor for inductor's graph; an artifact keeps the recipe, not the
    values with loading() as loaded: ...   what the artifacts that are loaded in the block declare
    slots_of(constants)             where the code that was loaded reads them, to be filled

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from fxpasses.torch_internals.fake_tensors import without_fake_tensors


@dataclass(frozen=True)
class Declared:
    """A constant and what it is to be filled with.

    Attributes:
        constant: which the code reads until it is filled: all NaN.
        recipe: what whoever declared it said of it.
    """

    constant: torch.Tensor
    recipe: Any

    def release(self) -> None:
        """Gives its memory back, once it is known where code reads it: inductor keeps the constant."""
        self.constant.untyped_storage().resize_(0)


_loaded: ContextVar[list[Declared] | None] = ContextVar("_loaded", default=None)


def declare(shape: Sequence[int], dtype: torch.dtype, recipe: object) -> Declared:
    """A new constant of floating-point numbers.

    Args:
        shape: of the constant, which is contiguous.
        dtype: of its elements.
        recipe: what to fill it with; part of a cached artifact, so it can be pickled. The cache's key does
        not
            have it: the name of the constant must differ where the recipe does.
    """
    from torch._inductor.freezing_utils import enter_freezing, maybe_set_is_frozen_param

    with without_fake_tensors():
        constant = torch.full(tuple(shape), math.nan, dtype=dtype)
    with enter_freezing():  # the cache's key has the shape of such a constant, not its values
        maybe_set_is_frozen_param(constant)
    spelled = (tuple(shape), dtype, recipe)
    # Pickle asks the object before its class; the module, and with it the artifact, has plain tensors.
    setattr(constant, "__reduce_ex__", lambda protocol: (_load, spelled))  # noqa: B010  # a method, to mypy
    return Declared(constant, recipe)


def _load(shape: Sequence[int], dtype: torch.dtype, recipe: object) -> torch.Tensor:
    declared = declare(shape, dtype, recipe)
    loaded = _loaded.get()
    if loaded is not None:
        loaded.append(declared)
    return declared.constant


@contextlib.contextmanager
def loading() -> Iterator[list[Declared]]:
    """A block that gathers what the artifacts loaded in it declare."""
    loaded: list[Declared] = []
    token = _loaded.set(loaded)
    try:
        yield loaded
    finally:
        _loaded.reset(token)


@dataclass(frozen=True)
class Slot:
    """Where code reads a constant: a name among the globals of the module that holds the code.

    Attributes:
        names: the globals.
        name: of the constant.
    """

    names: dict[str, Any]
    name: str

    def fill(self, value: torch.Tensor | None) -> None:
        """Has the code read another tensor from its next call on."""
        self.names[self.name] = value


def slots_of(constants: Sequence[torch.Tensor]) -> list[list[Slot]]:
    """Where the code that was just loaded reads each of some constants; nowhere if inductor dropped it."""
    from torch._inductor.codecache import PyCodeCache

    found: dict[int, list[Slot]] = {id(constant): [] for constant in constants}

    def search(names: dict[str, Any]) -> None:
        for name, value in list(names.items()):
            if id(value) in found:
                found[id(value)].append(Slot(names, name))

    for module in PyCodeCache.modules:
        search(vars(module))
    lost = [constant for constant in constants if not found[id(constant)]]
    if lost:  # without caches inductor forgets its modules; whoever holds the constants is asked for all then
        for holder in gc.get_referrers(*lost):
            if isinstance(holder, dict) and "__builtins__" in holder:
                search(holder)
    return [found[id(constant)] for constant in constants]
