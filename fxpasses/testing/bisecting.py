"""fxpasses as a system of torch's own compiler bisector, beside eager, AOTAutograd and inductor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fxpasses.torch_internals.bisector import known_to_bisector


@contextlib.contextmanager
def bisectable() -> Iterator[None]:
    """A block in which torch's compiler bisector knows the backend ``"fxpasses"`` and counts its rewrites.

        with fxpasses.testing.bisectable():
            result = CompilerBisector.do_bisect(check)  # torch._inductor.compiler_bisector

    `check` calls `torch.compile`, whose backend the bisector replaces by each that it knows, ours last, and
    returns whether the result is right. Where ours breaks it, the result has the number of the rewrite,
    counted from 0, and its rule and place. Options of ours would reach the other backends too: register
    rules rather than giving them.

    It is a block, since torch has no function that registers a system. A command that runs in processes of
    its own is for `fxpasses bisect`.
    """
    with known_to_bisector():
        yield
