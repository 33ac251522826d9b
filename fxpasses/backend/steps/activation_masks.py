"""Masks of activations are read off what is kept anyhow (`fxpasses.passes.training.activation_masks`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxpasses.backend.compilation import Step
from fxpasses.passes.training.activation_masks import NAME, JointMasks, may_matter
from fxpasses.report.report import Report
from fxpasses.rewrite.registry import REGISTRY


class ActivationMasks(Step):
    """In training by inductor, where the graph may clamp or pool."""

    masks: JointMasks

    def applies(self) -> bool:
        compilation = self.compilation
        selected = any(selected.name == NAME for selected in REGISTRY.pipeline(compilation.options))
        if not (compilation.for_inductor and compilation.trains and selected):
            return False
        if not may_matter(compilation.graph_module):
            return False
        self.masks = JointMasks(compilation.graph_key)
        return True

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return self.masks.patches(given)

    def reported(self, report: Report) -> Report:
        return self.masks.completed(report)
