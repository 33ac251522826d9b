"""What training keeps for the backward pass is read for the report (`fxpasses.passes.training`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxpasses.backend.compilation import Step
from fxpasses.passes.training import saved_tensors
from fxpasses.report.report import Report


class SavedTensors(Step):
    """Tells which tensors a training step keeps; it changes nothing."""

    seen: saved_tensors.SavedTensors

    def applies(self) -> bool:
        self.seen = saved_tensors.SavedTensors(self.compilation.graph_key)
        return self.compilation.for_inductor and bool(self.compilation.trains)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return self.seen.patches(given)

    def reported(self, report: Report) -> Report:
        return self.seen.completed(report)
