"""Guards on modules, in one: what Dynamo checks before each call costs more than many a network's layers.

    Dynamo's guards of a frame                         ours
    L['self']._modules['bn1'].training == True    ┐
    L['self']._modules['bn1'].eps == 1e-05        ├→   L['self'] is as expected (`expected`), told by the
    L['self']._modules['bn1']._parameters ...     ┘    versions of its dictionaries (`watch`)
    L['x'].size() == ...                               stays Dynamo's, as all do that are not on modules

One thing is dropped: whether a parameter's dimension was marked as dynamic (`torch._dynamo.mark_dynamic`)
after the code was compiled. Dynamo would compile again for a marked one.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from fxpasses.backend.guards.expected import expect
from fxpasses.backend.guards.watch import Watch, compiled
from fxpasses.torch_internals.guards import (
    Guard,
    add_check,
    add_last_check,
    guard_on,
    is_alone,
    is_serialised,
    kind_of,
    replace_guards,
    source_named,
    value_of,
)

_log = logging.getLogger(__name__)

_BELOW = "._modules["
_FEW = 32
"""Fewer guards than these are checked as fast one by one."""


def compact_guards(*, compiles: bool = False) -> None:
    """Puts one guard in place of those on a module's submodules, in the frame that Dynamo compiles now.

    Nothing happens where Dynamo compiles none, where several modules are called from it, or where the
    versions of dictionaries cannot be read.

    Args:
        compiles: whether a faster comparison of tensors is worth seconds of compiling, once a machine.
    """
    replace_guards(functools.partial(_replacements, compiles))


def _replacements(compiles: bool, guards: Sequence[Guard]) -> tuple[Sequence[Guard], Sequence[Guard]]:
    below: dict[str, list[Guard]] = defaultdict(list)
    for guard in guards:
        root, found, _ = guard.name.partition(_BELOW)
        if found and kind_of(guard)[0] != "DUPLICATE_INPUT":  # which is about two
            below[root].append(guard)
    roots = {
        root: source
        for root, many in below.items()
        if len(many) >= _FEW and (source := source_named(many[0].originating_source, root)) is not None
    }
    if len(roots) != 1 or compiled() is None:
        return [], []
    ((root, source),) = roots.items()
    many = sorted(below[root])  # type: ignore[type-var]  # as Dynamo sorts them
    taken = set(map(id, many))
    others = [one for one in guards if id(one) not in taken and kind_of(one)[0] == "TENSOR_MATCH"]
    return many, [guard_on(source, functools.partial(_create, many, others, compiles))]


def _create(
    guards: Sequence[Guard], others: Sequence[Guard], compiles: bool, builder: Any, guard: Guard
) -> None:
    """Makes Dynamo check one guard for all that it can stand for, and the rest as they are."""
    left = guards
    root, name = value_of(builder, guard), guard.name
    if isinstance(root, torch.nn.Module) and not is_serialised(builder):
        try:
            expected, left = expect(root, name, guards, functools.partial(is_alone, builder))
            # Whether inference mode has changed, an input's own guard says, where there is one.
            watch = Watch(expected, name, root, compiles=compiles and bool(others))
        except Exception as error:  # tracing changed it, or it is odd: Dynamo's guards are right for any
            _log.info("the guards of %s stay Dynamo's: %s: %s", name, type(error).__name__, error)
            left = guards
        else:
            text = f"{name} and its submodules are as they were ({len(guards) - len(left)} guards in one)"
            add_check(builder, guard, watch, text)
            if others and watch.has_alone:
                add_last_check(builder, [guard, *others], watch.are_others, f"no input is a buffer of {name}")
    for one in left:
        one.create(builder)
