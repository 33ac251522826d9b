"""Inductor's layout optimisation is off where it would be wrong (`fxpasses.devices.unsafe`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fxpasses.backend.compilation import Step
from fxpasses.passes.layout.joint import without_unsafe_kernels
from fxpasses.report.data import Remark
from fxpasses.report.report import Report


class SafeKernels(Step):
    """Where layouts were left to inductor, and a kernel of its choice gives wrong results."""

    remarks: tuple[Remark, ...]

    def applies(self) -> bool:
        compilation = self.compilation
        self.remarks = without_unsafe_kernels(
            compilation.graph_module, compilation.options, shared=compilation.shares_results
        )
        return bool(self.remarks)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {**given, "layout_optimization": False}

    def reported(self, report: Report) -> Report:
        return replace(report, remarks=(*report.remarks, *self.remarks))
