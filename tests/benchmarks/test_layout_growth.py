"""The benchmark of planning's time plans what it says it does."""

from __future__ import annotations

import re

import torch

from benchmarks.layout_growth import Residual, joint_graph, main, measure


def test_every_convolution_of_forward_and_backward_is_planned_and_the_graph_left_alone():
    graph_module = joint_graph(Residual(2), torch.randn(2, 16, 16, 16))
    before = graph_module.code
    runs, convolutions = measure(graph_module, 2)
    assert convolutions == 8
    assert len(runs) == 2
    assert all(seconds > 0 for run in runs for seconds in run)
    graph_module.recompile()
    assert graph_module.code == before


def test_each_model_and_each_depth_has_a_row(capsys):
    model = "tests.benchmarks.tiny_models:TinyNet"
    assert main(["--models", model, "--depths", "1", "3", "--repeat", "1"]) == 0
    rows = re.findall(r" (\d+) +(\d+)(?: +\d+\.\d{3}){4} +\d+\.\d\d-\d+\.\d\d", capsys.readouterr().out)
    assert [int(convolutions) for _, convolutions in rows] == [4, 4, 12]
    assert 0 < int(rows[1][0]) < int(rows[2][0])
