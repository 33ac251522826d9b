"""What a graph without a layout plan takes and gives (`fxpasses.passes.weights.given_results`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxpasses.backend.compilation import Handed, Step
from fxpasses.backend.steps.weights import KeptWeights, PackedWeights
from fxpasses.passes.weights.given_results import GivenResults as Given
from fxpasses.report.report import Report


class GivenResults(Step):
    """Where the user leaves the strides of results to us, and nobody plans layouts."""

    given: Given

    def applies(self) -> bool:
        compilation = self.compilation
        if compilation.options.io != "any" or not compilation.for_inductor:
            return False
        kept = any(map(compilation.takes, (PackedWeights, KeptWeights)))
        self.given = Given(kept, compilation.graph_key)
        return True

    def handed(self, given: Handed) -> Handed:
        self.given.see(given.graph_module)
        return given

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return self.given.patches(given)

    def reported(self, report: Report) -> Report:
        return self.given.completed(report)
