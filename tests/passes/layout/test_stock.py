"""The comparison with stock inductor: its own answer for the graph, and the copies that follow from it."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses.report.layout_plan import LayoutPlan, StockPlan, against_stock
from tests.passes.layout.test_layout_models import traced


def chain(width: int, groups: int = 1) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(width, width, 3, groups=groups) for _ in range(3)))


class DecidedError(Exception):
    """Ends a compilation of which no more is to be seen."""


def answer_of_stock(model: nn.Module, x: torch.Tensor) -> bool:
    """What inductor answers for the forward graph when it compiles the model by itself."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    found: list[bool] = []
    real = GraphLowering.decide_layout_opt

    def recorded(graph_module, *, is_inference):
        answer = real(graph_module, is_inference=is_inference)
        if any(node.target is torch.ops.aten.convolution.default for node in graph_module.graph.nodes):
            found.append(answer)
            raise DecidedError("decided")
        return answer

    torch.compiler.reset()
    uncached = config.patch(force_disable_caches=True)
    with (
        mock.patch.object(GraphLowering, "decide_layout_opt", staticmethod(recorded)),
        uncached,
        pytest.raises(Exception, match="decided"),
    ):
        torch.compile(model)(x)
    (answer,) = found
    return answer


def plan_of(model: nn.Module, x: torch.Tensor, layout: str = "channels_last") -> LayoutPlan:
    torch.compiler.reset()
    traced(layout=layout)(model)(x)
    return fxpasses.last_report().layout


@pytest.mark.parametrize(
    ("training", "width", "groups", "mkldnn"),
    [
        (False, 4, 1, True),
        (False, 4, 1, False),
        (False, 72, 1, False),
        (True, 4, 1, True),
        (True, 72, 1, False),
        (True, 72, 2, False),
        pytest.param(False, 72, 2, False, marks=pytest.mark.full),
        pytest.param(True, 4, 1, False, marks=pytest.mark.full),
    ],
)
def test_the_decision_is_the_one_that_inductor_makes_by_itself(training, width, groups, mkldnn):
    model, x = chain(width, groups), torch.randn(1, width, 10, 10)
    with torch.set_grad_enabled(training), torch.backends.mkldnn.flags(enabled=mkldnn):
        expected = answer_of_stock(model, x)
        assert plan_of(model, x).stock.channels_last == expected


def test_stock_copies_the_input_every_weight_and_the_output():
    with torch.no_grad():
        x = torch.randn(1, 4, 10, 10)
        assert plan_of(chain(4), x).stock == StockPlan(channels_last=True, copies=5)
        assert plan_of(chain(4), x).copies_avoided == 0
        assert plan_of(chain(4), x.to(memory_format=torch.channels_last)).stock.copies == 3


def test_gradients_are_no_copies_of_stock_and_some_of_ours():
    plan = plan_of(chain(4), torch.randn(1, 4, 10, 10))
    # Ours copies the gradient of the output there, and those of three weights back.
    assert plan.stock.copies == 5 + 1
    assert plan.copies_avoided == -3
    assert "3 more here" in str(plan)


def test_stock_leaves_volumes_alone():
    model = nn.Sequential(nn.Conv3d(4, 4, 3), nn.Conv3d(4, 4, 3))
    with torch.no_grad():
        plan = plan_of(model, torch.randn(1, 4, 8, 8, 8))
    assert plan.stock.copies == 0
    assert plan.copies_avoided == -plan.copies
    assert plan.copies >= 4


def test_a_dry_run_is_compared_too_and_the_report_says_so():
    model, x = chain(4), torch.randn(1, 4, 10, 10)
    report = fxpasses.explain(model, x, options={"layout": "channels_last"})
    assert report.layout.stock == StockPlan(channels_last=True, copies=5)
    text = " ".join(str(report).split())  # where a line ends depends on the device's name
    assert "stock inductor: channels_last throughout, 5 copies; 0 fewer here" in text
    again = fxpasses.Report.from_json(report.to_json())
    assert again.layout == report.layout
    assert json.loads(report.to_json())["layout"]["stock"] == {"channels_last": True, "copies": 5}


def test_a_graph_for_another_compiler_is_not_compared():
    report = fxpasses.explain(
        chain(4), torch.randn(1, 4, 10, 10), options={"layout": "channels_last", "inner": "eager"}
    )
    assert report.layout.stock is None
    assert report.layout.copies_avoided is None
    assert against_stock(report.layout) == "not compared with stock inductor"
