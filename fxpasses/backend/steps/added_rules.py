"""Artifacts of a compilation with rules of its own have a key of their own.

Inductor and AOTAutograd key what they keep by the rewritten graph, so that a rule which writes something else
gives another artifact anyway. The tag holds them apart also where the graphs look alike: where a rule writes
calls of a custom operator that is no longer the same, say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fxpasses.backend.compilation import Step
from fxpasses.rewrite.identity import fingerprint
from fxpasses.torch_internals.inductor import caches_tagged


class AddedRules(Step):
    """Where the options bring rules."""

    def applies(self) -> bool:
        return bool(self.compilation.options.rules)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        rules = fingerprint([rule.uuid() for rule in self.compilation.options.rules])
        with caches_tagged(f"fxpasses:{rules}"):
            yield
