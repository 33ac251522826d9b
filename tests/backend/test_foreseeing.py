"""A dry run foretells what compiling does: the same rewrites, and a layout plan where there will be one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import fxpasses

INSIDE = ("activation_masks", "packed_weights", "own_kernels", "kernel_sequences")
"""What is known only inside inductor, or once kernels were timed."""


class Residual(nn.Module):
    """Two pairs of convolution and norm, the first of them read twice, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.conv1(x)
        second = self.bn2(self.conv2(self.bn1(first).relu())) + first
        return self.linear(second.relu().mean((2, 3)))


class Attention(nn.Module):
    """A convolution, and a view that glues channels to pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 36, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.bn(self.conv(x)).relu().flatten(1))


MODELS = {"residual": Residual, "attention": Attention, "convolution": lambda: nn.Conv2d(4, 8, 3)}

CASES: dict[str, Mapping[str, Any]] = {
    "as it comes": {},
    "cached": {"weights": "cached"},
    "cached, channels_last": {"weights": "cached", "layout": "channels_last"},
    "cached, by operator": {"weights": "cached", "inner": "aot_eager", "layout": "off"},
    "channels_last": {"layout": "channels_last"},
    "channels_last, free results": {"layout": "channels_last", "io": "any"},
    "contiguous": {"layout": "contiguous"},
    "off": {"layout": "off"},
    "always": {"profit": "always"},
    "inductor decides": {"inductor": {"layout_optimization": False}},
    "by operator": {"inner": "aot_eager"},
    "limited": {"profit": "always", "limit": 1},
    "disabled": {"profit": "always", "disable": ("efficient_conv_bn_eval", "layout")},
}
DEFAULT = {("residual", "cached"), ("attention", "channels_last")}


def reports(model: nn.Module, options: Mapping[str, Any]) -> tuple[fxpasses.Report, fxpasses.Report]:
    """What a dry run foretells of a call, and what compiling it reports."""
    x = torch.randn(2, 4, 8, 8)
    foretold = fxpasses.explain(model, x, options=options)
    torch.compiler.reset()
    fxpasses.reset()
    torch.compile(model, backend="fxpasses", options=options)(x)
    (found,) = fxpasses.reports()
    return foretold, found


def seen_from_outside(report: fxpasses.Report) -> dict[str, int]:
    return {rule: count for rule, count in report.applied.items() if rule not in INSIDE}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, marks=() if (name, case) in DEFAULT else pytest.mark.full)
        for name in MODELS
        for case in CASES
    ],
)
def test_a_dry_run_foretells_rewrites_and_plan(name, case, training, request):
    if CASES[case].get("weights") != "cached":
        request.getfixturevalue("no_code")  # kept weights are constants of generated code
    with torch.set_grad_enabled(training):
        foretold, found = reports(MODELS[name]().eval(), CASES[case])
    assert seen_from_outside(foretold) == seen_from_outside(found)
    carried_out = [
        report.layout if report.layout is not None and report.layout.decision == "applied" else None
        for report in (foretold, found)
    ]
    assert (carried_out[0] is None) == (carried_out[1] is None)
    if foretold.layout is not None and not training:
        assert carried_out[0] is None or len(carried_out[0].cut_edges) == carried_out[1].copies


def test_a_cached_compilation_is_not_foretold_a_plan_that_it_never_makes():
    with torch.no_grad():
        report = fxpasses.explain(Residual().eval(), torch.randn(2, 4, 8, 8), options={"weights": "cached"})
    assert report.layout is None
    assert report.kept_tensors > 0
    assert "no layout plan" in str(report)


def test_what_keeps_weights_from_being_kept_is_foretold():
    report = fxpasses.explain(Residual().eval(), torch.randn(2, 4, 8, 8), options={"weights": "cached"})
    assert [remark.code for remark in report.remarks if remark.rule == "kept_weights"] == ["grad-mode"]


def test_a_dry_run_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(tmp_path))
    with torch.no_grad():
        for options in ({"tune_seconds": 5.0}, {"tune_seconds": 5.0, "weights": "cached"}):
            fxpasses.explain(Residual().eval(), torch.randn(2, 4, 8, 8), options=options)
    assert not list(tmp_path.iterdir())
