"""Readers of raw memory see eager's (`fxpasses.passes.layout.raw_memory`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxpasses.backend.compilation import Step
from fxpasses.backend.steps.weights import KeptWeights, PackedWeights
from fxpasses.passes.layout import raw_memory


class EagersMemory(Step):
    """Puts the pass first on inductor's joint graph, before any other changes a layout."""

    def applies(self) -> bool:
        return self.compilation.for_inductor

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        kept = any(map(self.compilation.takes, (PackedWeights, KeptWeights)))
        free = self.compilation.options.io == "any"
        return raw_memory.patches(given, kept_weights=kept, free_results=free)
