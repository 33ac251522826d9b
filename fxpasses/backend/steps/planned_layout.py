"""Layouts are planned on inductor's joint graph (`fxpasses.passes.layout.joint`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxpasses.backend.compilation import Handed, Step
from fxpasses.passes.layout.joint import JointLayout, joint_layout
from fxpasses.report.report import Report


class PlannedLayout(Step):
    """Where the user asks for a layout, or enough was measured, or inductor's own choice would be wrong."""

    layout: JointLayout

    def applies(self) -> bool:
        compilation = self.compilation
        found = joint_layout(
            compilation.graph_module,
            compilation.inputs,
            compilation.options,
            graph_key=compilation.graph_key,
            shared=compilation.shares_results,
        )
        if found is None:
            return False
        self.layout = found
        return True

    def handed(self, given: Handed) -> Handed:
        self.layout.see(given.graph_module, given.inputs)
        return given

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return self.layout.patches(given)

    def reported(self, report: Report) -> Report:
        return self.layout.completed(report)
