"""Moments of groups of channels are taken by a kernel of ours (`fxpasses.passes.weights.group_moments`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxpasses.backend.compilation import Step
from fxpasses.backend.steps.planned_layout import PlannedLayout
from fxpasses.backend.steps.weights import packs
from fxpasses.kernels.library import missing
from fxpasses.passes.weights import group_moments
from fxpasses.report.report import Report


class GroupMoments(Step):
    """Where images are channels-last by our doing, and the graph has norms of groups."""

    moments: group_moments.GroupMoments

    def applies(self) -> bool:
        compilation = self.compilation
        packed = packs(compilation)
        if not (compilation.for_inductor_on_cpu and (packed or compilation.takes(PlannedLayout))):
            return False
        if not group_moments.may_matter(compilation.graph_module) or missing():
            return False
        self.moments = group_moments.GroupMoments(compilation.graph_key, packed)
        return True

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return self.moments.patches(given)

    def reported(self, report: Report) -> Report:
        return self.moments.completed(report)
