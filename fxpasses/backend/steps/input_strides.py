"""Inputs are kept for the backward pass as they are (`fxpasses.passes.training.input_strides`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxpasses.backend.compilation import Step
from fxpasses.passes.training import input_strides
from fxpasses.rewrite.registry import REGISTRY


class InputStrides(Step):
    """Where each training step on a CPU folds weights, of whose sources inductor would keep copies."""

    def applies(self) -> bool:
        compilation = self.compilation
        if not (compilation.trains and compilation.for_inductor_on_cpu):
            return False
        rules = (rule for selected in REGISTRY.pipeline(compilation.options) for rule in selected.rules)
        folded = any(rule.folds_weights and rule.name in compilation.report.applied for rule in rules)
        return folded and compilation.options.layout == "auto"

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return input_strides.patches(given)
