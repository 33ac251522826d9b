"""Drawings of graphs: what happened at each node, layouts, copies; and nothing that a drawing may change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses.report.drawing import DrawnNode, GraphDrawing
from fxpasses.report.report import Report
from tests.report.test_page import small


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


def by_name(drawing: GraphDrawing) -> dict[str, DrawnNode]:
    return {node.name: node for node in drawing.nodes}


def test_a_report_has_the_graph_before_and_after() -> None:
    report = fxpasses.explain(Block().eval(), torch.randn(2, 3, 8, 8), options={"layout": "off"})
    before, after = report.graphs
    assert (before.stage, after.stage) == ("before", "after")
    (norm,) = (node for node in before.nodes if node.operator == "batch_norm")
    (conv,) = (node for node in before.nodes if node.operator == "conv2d")
    assert (norm.status, conv.status, norm.module) == ("applied", "replaced", "norm")
    assert before.nodes[norm.inputs[0]] == conv
    assert conv.value == "float32[2, 4, 6, 6]"
    assert conv.location.startswith(f"{__file__}:")
    assert conv.label == "contiguous"
    # The replacement has its name; what computes its operands is new.
    assert by_name(after)[norm.name].operator == "conv2d"
    assert {"written", "applied", ""} == {node.status for node in after.nodes}
    assert (report.nodes_before, report.nodes_after) == (len(before.nodes), len(after.nodes))


def test_a_graph_that_nothing_changes_has_one_drawing() -> None:
    report = fxpasses.explain(Block().train(), torch.randn(2, 3, 8, 8), options={"layout": "off"})
    (drawing,) = report.graphs
    assert {node.status for node in drawing.nodes} == {"declined", ""}


def test_layouts_are_read_off_strides() -> None:
    image = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    report = fxpasses.explain(Block().eval(), image, options={"layout": "off"})
    (found,) = (node for node in report.graphs[0].nodes if node.value == "float32[2, 3, 8, 8]")
    assert (found.kind, found.label) == ("placeholder", "channels_last")


def test_copies_that_carry_a_plan_out_are_cut_edges() -> None:
    with torch.no_grad():
        program = torch.export.export(Block().eval(), (torch.randn(2, 3, 8, 8),))
        report = fxpasses.optimize(program, options={"layout": "channels_last"}).report
    assert report.layout is not None
    after = report.graphs[-1]
    assert len(after.copies) == report.layout.copies > 0
    for copy in after.copies:
        (reader,) = copy.readers
        assert after.nodes[reader].status == "copy"
        assert after.nodes[reader].inputs == (copy.tensor,)
        labels = {after.nodes[copy.tensor].label, after.nodes[reader].label}
        assert labels == {"contiguous", "channels_last"}


def test_symbolic_sizes_are_drawn_and_add_no_guard() -> None:
    seen: list[Report] = []
    compiled = torch.compile(Block().eval(), backend="fxpasses", options={"inner": "eager"}, dynamic=True)
    for size in (8, 9, 12):
        compiled(torch.randn(2, 3, size, size + 1))
        seen.append(fxpasses.last_report())
    assert seen[0] is seen[2], "compiled again for another size"
    (conv,) = (node for node in seen[0].graphs[0].nodes if node.operator == "conv2d")
    assert "s" in conv.value
    assert conv.label == "contiguous"


def test_drawings_survive_json_and_merging() -> None:
    report = fxpasses.explain(Block().eval(), torch.randn(2, 3, 8, 8), options={"layout": "off"})
    assert Report.from_json(report.to_json()) == report
    merged = Report.merge([report, small(), report])
    assert [drawing.compilation for drawing in merged.graphs] == [0] * 2 + [1] * 2 + [2] * 2
    assert Report.from_json(merged.to_json()) == merged


def test_a_graph_that_is_too_large_is_not_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fxpasses.report.drawer.LARGEST", 3)
    report = fxpasses.explain(Block().eval(), torch.randn(2, 3, 8, 8))
    assert report.graphs == ()
    report = replace(report, nodes_before=5001)
    report.save_html(tmp_path / "report.html")
    assert "5001 nodes are more than 5000" in (tmp_path / "report.html").read_text(encoding="utf-8")
