"""The capture level of a graph, and the graphs nested in it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import CAPTURES, dynamo_graph, graph_of, image, pair
from torch import nn

from fxpasses.graph.levels import Level, attribute, level_of, nested_graphs


@pytest.mark.parametrize(
    ("capture", "level"),
    [
        ("symbolic_trace", Level.TORCH),
        ("pre_dispatch", Level.PRE_DISPATCH),
        ("export", Level.PRE_DISPATCH),
        ("aten", Level.ATEN),
    ],
)
def test_level_of_each_front_end(capture: str, level: Level) -> None:
    graph_module = graph_of(capture, pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (image(),))
    assert level_of(graph_module.graph) is level


def test_dynamos_graph_is_of_the_torch_level() -> None:
    assert level_of(dynamo_graph(pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image()).graph) is Level.TORCH


def test_mode_switches_and_getitem_do_not_make_an_aten_graph_a_torch_one() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = torch.native_batch_norm(x, None, None, x[0, :, 0], x[0, :, 1], False, 0.1, 1e-3)[0]
        return y + 1

    program = CAPTURES["pre_dispatch"](call, (image(2, 4, 5, grad=False),))
    assert any("set_grad_enabled" in str(node.target) for node in program.graph.nodes)
    assert level_of(program.graph) is not Level.TORCH


def test_an_empty_graph_has_a_level() -> None:
    assert level_of(torch.fx.Graph()) is Level.ATEN


def test_nested_graphs_are_listed_once_each() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        first = torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (first,))

    graph = dynamo_graph(call, image())
    found = nested_graphs(graph)
    assert len(found) == 3
    assert len({path for path, _, _ in found}) == 3
    for path, child, reference in found:
        assert attribute(graph, path) is child
        assert reference.target == path


def test_an_attribute_that_is_not_there_is_none() -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert attribute(torch.fx.symbolic_trace(model), "0.weight") is model[0].weight  # type: ignore[index]
    assert attribute(torch.fx.symbolic_trace(model), "0.wait") is None


@pytest.mark.parametrize(
    ("function", "gives"),
    [(torch.sym_sum, lambda size: ([size, 2],)), (math.trunc, lambda size: (size,))],
    ids=["sym_sum", "trunc"],
)
def test_computing_sizes_does_not_make_an_aten_graph_a_torch_one(function, gives) -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    total = graph.call_function(function, gives(size))
    graph.output(graph.call_function(torch.ops.aten.slice.Tensor, (x, 0, 0, total)))
    assert level_of(graph) is not Level.TORCH
