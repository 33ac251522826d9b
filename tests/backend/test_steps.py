"""The steps of a compilation: which are taken, which exclude one another, and what they hand on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxpasses.backend.compilation import Compilation
from fxpasses.backend.rewriting import rewrite
from fxpasses.backend.steps import STEPS, take_steps
from fxpasses.backend.steps.weights import KeptWeights, PackedWeights
from fxpasses.options import Options

NAMES = {step.__name__: step for step, _ in STEPS}


def taken(
    model: nn.Module, x: torch.Tensor, *, grad: bool = False, **options
) -> tuple[set[str], Compilation]:
    """The names of the steps that a model's graph takes, without the inner backend."""
    found: list[Compilation] = []

    def stop_before_the_inner_backend(gm, inputs):
        compilation = Compilation(gm, inputs, Options.of(options))
        rewrite(compilation)
        take_steps(compilation)
        found.append(compilation)
        return gm.forward

    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=stop_before_the_inner_backend)(x)
    (compilation,) = found
    return {name for name, step in NAMES.items() if compilation.takes(step)}, compilation


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6()).eval()


X = torch.randn(2, 3, 8, 8)
ALWAYS = {"Allocator", "EagersMemory"}


TAKEN = (
    (False, {}, ALWAYS),
    (False, {"weights": "cached"}, {*ALWAYS, "PackedWeights"}),
    (False, {"weights": "cached", "layout": "channels_last"}, {*ALWAYS, "KeptWeights", "PlannedLayout"}),
    (False, {"weights": "cached", "inner": "aot_eager"}, {"Allocator", "KeptWeights"}),
    (False, {"layout": "contiguous"}, {*ALWAYS, "PlannedLayout"}),
    (True, {}, {*ALWAYS, "ActivationMasks", "SavedTensors", "InputStrides"}),
    (True, {"weights": "cached"}, {*ALWAYS, "ActivationMasks", "SavedTensors", "InputStrides"}),
    (True, {"layout": "channels_last"}, {*ALWAYS, "ActivationMasks", "SavedTensors", "PlannedLayout"}),
    (True, {"layout": "off"}, {*ALWAYS, "ActivationMasks", "SavedTensors"}),
    (True, {"disable": ("activation_masks",), "layout": "off"}, {*ALWAYS, "SavedTensors"}),
    (True, {"inner": "aot_eager"}, {"Allocator"}),
)
"""Whether gradients are on, options, and the steps."""


@pytest.mark.parametrize(("grad", "options", "expected"), TAKEN, ids=range(len(TAKEN)))
def test_the_steps_that_a_network_takes(grad, options, expected):
    assert taken(network(), X, grad=grad, **options)[0] == expected


def test_results_that_share_memory_take_the_layouts_from_inductor():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return y[:, 1:], y.flatten(2)

    assert "SafeKernels" in taken(Views(), X, grad=True, layout="off")[0]
    assert "SafeKernels" not in taken(Views(), X, grad=False, layout="off")[0]


def test_elements_that_overlap_change_the_format_of_the_gradient():
    def windows(x):
        return x.unfold(-1, 3, 1)

    assert "TangentFormats" in taken(windows, X.clone().requires_grad_(), grad=True)[0]
    assert "TangentFormats" not in taken(windows, X)[0]


def test_a_step_is_excluded_by_steps_before_it_alone():
    order = [step for step, _ in STEPS]
    assert len(set(order)) == len(order)
    for position, (_, unless) in enumerate(STEPS):
        assert set(unless) <= set(order[:position])


def test_a_refused_step_is_in_the_report_and_leaves_the_graph_as_it_was():
    names, compilation = taken(nn.Conv2d(3, 4, 1, bias=False), X, grad=True, weights="cached")
    assert not {"KeptWeights", "PackedWeights"} & names
    (refusal,) = (remark for remark in compilation.report.remarks if remark.rule == "kept_weights")
    assert (refusal.status, refusal.code) == ("declined", "grad-mode")


@pytest.mark.parametrize("step", [PackedWeights, KeptWeights])
def test_the_graph_that_is_split_is_a_copy(step):
    options = {"weights": "cached", **({} if step is PackedWeights else {"inner": "aot_eager"})}
    _, compilation = taken(network(), X, **options)
    assert compilation.takes(step)
    names = [node.name for node in compilation.graph_module.graph.find_nodes(op="placeholder")]
    assert not any(name.startswith("kept_") for name in names)


def test_rules_that_fold_weights_say_so():
    from fxpasses.pipeline import register_all
    from fxpasses.rewrite.registry import REGISTRY

    register_all()
    passes = REGISTRY.pipeline(Options(passes=tuple(REGISTRY.names())))
    folding = {rule.name for selected in passes for rule in selected.rules if rule.folds_weights}
    assert {"efficient_conv_bn_eval", "conv_affine", "affine_across_views", "bn_before_conv"} <= folding
