"""Copies are counted by cause, and the operators that force are named, in the report and on the page."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpasses
from fxpasses.passes.layout.assign import assign
from fxpasses.passes.layout.materialise import materialise
from fxpasses.report.report import Report
from fxpasses.report.text import copies_by_cause
from tests.passes.layout.test_graphs import MODELS, Inplace, context_of, model_and_input, randomly
from tests.passes.layout.test_joint import joint_graph

pytestmark = pytest.mark.usefixtures("no_code")

LAST = {"layout": "channels_last"}


class Forcing(nn.Module):
    """A view that wants the traced strides between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.first(x))
        return self.second(y) + y.view(2, -1).sum()


def picture() -> torch.Tensor:
    return torch.randn(2, 3, 9, 9)


def compiled_report(model: nn.Module, x: torch.Tensor, *, grad: bool = False, **options: object) -> Report:
    torch.compiler.reset()
    fxpasses.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend="fxpasses", options={**LAST, **options})(x)
    return fxpasses.last_report()


def test_copies_of_a_graph_are_counted_by_cause():
    report = compiled_report(Forcing(), picture())
    plan = report.layout
    assert plan.causes == {"inputs": 1, "weights": 2, "aten.view": 1, "results": 1}
    assert sum(plan.causes.values()) == plan.copies
    (forcing,) = plan.forcing
    assert forcing.startswith("view")
    text = "copies: 2 for weights, 1 for inputs, 1 for aten.view, 1 for results"
    assert copies_by_cause(plan) == text
    assert text in str(report)
    assert Report.from_json(report.to_json()).layout.causes == plan.causes
    assert Report.from_json(report.to_json()).layout.forcing == plan.forcing


def test_each_cut_edge_says_why():
    causes = {edge.operator: edge.cause for edge in compiled_report(Forcing(), picture()).layout.cut_edges}
    assert causes == {"placeholder": "weights", "relu": "aten.view", "add": "results"} or causes == {
        "placeholder": "inputs",
        "relu": "aten.view",
        "add": "results",
    }


def test_what_an_operator_makes_in_the_traced_layout_is_copied_for_its_sake():
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.view(2, 4, 5, 5))

    assert compiled_report(Grouped(), torch.randn(2, 100)).layout.causes["aten.view"] == 1


def test_free_results_are_not_among_the_causes():
    assert "results" not in compiled_report(Forcing(), picture(), io="any").layout.causes


def test_gradients_are_told_from_results():
    report = compiled_report(Forcing(), picture().requires_grad_(), grad=True)
    causes = report.layout.causes
    assert causes["results"] == 1
    assert causes["gradients"] >= 3  # of the result, of the input, of two weights
    assert sum(causes.values()) == report.layout.copies


def test_a_plan_without_copies_says_nothing_of_them():
    report = compiled_report(Forcing(), picture(), layout="contiguous")
    assert report.layout.causes == {}
    assert "copies:" not in str(report)


def test_a_dry_run_foresees_the_causes():
    with torch.no_grad():
        plan = fxpasses.explain(Forcing(), picture(), options=LAST).layout
    assert plan.causes == {"inputs": 1, "weights": 2, "view": 1, "results": 1}
    assert list(plan.forcing) == ["view"]


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind is not Inplace])
def test_every_copy_has_a_cause_under_any_labelling(kind):
    model, x = model_and_input(kind)
    graph_module, inputs = joint_graph(model.train(), x)
    for seed in range(4):
        context = context_of(graph_module, inputs, "fused")
        carried = materialise(context, randomly(assign(context), seed))
        assert sum(carried.causes.values()) == carried.copies
        assert carried.causes.get("repairs", 0) == carried.repairs
        names = {node.name for node in context.graph.nodes}
        assert set(carried.forcing) <= names


def test_the_page_marks_operators_that_force(tmp_path):
    report = compiled_report(Forcing(), picture())
    drawing = report.graphs[-1]
    assert drawing.stage == "joint-after"
    assert [node.operator for node in drawing.nodes if node.status == "forcing"] == ["view"]
    report.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Copies: 2 for weights, 1 for inputs, 1 for aten.view, 1 for results." in page
    assert "forces copies" in page
    with torch.no_grad():
        planned = fxpasses.explain(Forcing(), picture(), options=LAST).graphs[-1]
    assert planned.stage == "planned"
    assert [node.name for node in planned.nodes if node.status == "forcing"] == ["view"]
