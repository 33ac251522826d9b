"""Memory of CPU tensors between calls (`fxpasses.backend.memory`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fxpasses.backend.compilation import Step
from fxpasses.backend.memory import arrange_memory, exceeds_reuse


class Allocator(Step):
    """Has the C library keep what the compiled function frees, as `Options.memory` says."""

    def applies(self) -> bool:
        return "cpu" in self.compilation.devices

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        much = self.compilation.trains or exceeds_reuse(self.compilation.graph_module.graph)
        arrange_memory(self.compilation.options.memory, much=much)
        yield
