"""Torch's compiler bisector: it searches systems in turn, then a system's subsystems, for what breaks a call.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

SYSTEM, SUBSYSTEM = "fxpasses", "rewrites"
"""The backend, and the one thing in it that can be switched off: the rewrites after the Nth."""


def bisector_disables(describe: Callable[[], str]) -> bool:
    """Whether a bisection at work says that a rewrite is not to be applied.

    Args:
        describe: what the bisector is to say of the rewrite, should it be the one.
    """
    bisector = sys.modules.get("torch._inductor.compiler_bisector")
    return bisector is not None and bool(
        bisector.CompilerBisector.disable_subsystem(SYSTEM, SUBSYSTEM, describe)
    )


@contextlib.contextmanager
def known_to_bisector() -> Iterator[None]:
    """A block in which the bisector's table of systems has ours, after all others.

    Torch has no function that registers a system: its table is a dictionary, which gets an entry for the time
    of the block.
    """
    from torch._inductor.compiler_bisector import BACKENDS, BisectSubsystem

    if SYSTEM in BACKENDS:
        yield
        return
    BACKENDS[SYSTEM] = [BisectSubsystem(SUBSYSTEM)]
    try:
        yield
    finally:
        del BACKENDS[SYSTEM]
