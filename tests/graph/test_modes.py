"""The state that surrounds each node: grad mode, autocast, functorch levels, unknown regions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import dynamo_graph, graph_of, image
from torch.fx import GraphModule

from fxpasses.graph.levels import nested_graphs
from fxpasses.graph.modes import Modes, difference, initial_modes_of_nested, modes_of

ATEN = torch.ops.aten


def modes_by_name(graph_module: GraphModule, initial: Modes | None = None) -> dict[str, Modes]:
    """The state of the node of each trigonometric function in the graph."""
    names = ("sin", "cos", "tan", "exp")
    return {
        name: modes
        for node, modes in modes_of(graph_module.graph, initial or Modes()).items()
        for name in names
        if node.target in (getattr(torch, name), getattr(ATEN, name).default, name)
    }


def grad_modes(x: torch.Tensor) -> torch.Tensor:
    a = torch.sin(x)
    with torch.no_grad():
        b = torch.cos(x)
        with torch.enable_grad():
            c = torch.tan(x)
    return a + b + c + torch.exp(x)


@pytest.mark.parametrize("front", ["compile", "pre_dispatch"])
def test_grad_mode_is_that_of_eager(front: str) -> None:
    x = image(3)
    graph = graph_of(front, grad_modes, (x,))
    found = {name: modes.grad for name, modes in modes_by_name(graph).items()}
    assert found == {"sin": True, "cos": False, "tan": True, "exp": True}


def test_the_state_at_the_start_is_the_callers() -> None:
    graph = torch.fx.symbolic_trace(lambda x: torch.sin(x))
    assert not modes_by_name(graph, Modes(grad=False))["sin"].grad
    assert modes_by_name(graph, Modes(grad=True))["sin"].grad


@pytest.mark.parametrize("front", ["compile", "pre_dispatch"])
def test_autocast_regions_nest_and_end(front: str) -> None:
    def call(x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            a = torch.sin(x)
            with torch.autocast("cpu", enabled=False):
                b = torch.cos(x)
            c = torch.tan(x)
        return a, b, c, torch.exp(x)

    x = image(3)
    graph = graph_of(front, call, (x,))
    found = modes_by_name(graph)
    assert [len(found[name].autocast) for name in ("sin", "cos", "tan", "exp")] == [1, 2, 1, 0]
    assert found["sin"] == found["tan"]
    assert difference(found["sin"], found["cos"]) == "autocast"
    assert found["cos"].autocast[-1][2] is False


def test_equal_regions_entered_twice_are_the_same_state() -> None:
    def call(x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            a = torch.sin(x)
        with torch.autocast("cpu", torch.bfloat16):
            b = torch.cos(x)
        with torch.autocast("cpu", torch.float16):
            c = torch.tan(x)
        return a, b, c

    found = modes_by_name(dynamo_graph(call, image(3)))
    assert difference(found["sin"], found["cos"]) is None
    assert difference(found["sin"], found["tan"]) == "autocast"


def test_functorch_levels_open_and_close() -> None:
    def call(x: torch.Tensor) -> Any:
        inner = torch.func.grad(lambda x: torch.sin(x).sum())(x)
        return inner + torch.cos(x) + torch.func.vmap(torch.tan)(x)

    found = modes_by_name(dynamo_graph(call, image(3, grad=False)))
    assert [len(found[name].functorch) for name in ("sin", "cos", "tan")] == [1, 0, 1]
    assert difference(found["sin"], found["tan"]) == "functorch"


def test_inference_mode_is_a_region() -> None:
    def call(x: torch.Tensor) -> Any:
        a = torch.sin(x)
        with torch.inference_mode():
            b = torch.cos(x)
        return a, b, torch.tan(x)

    found = modes_by_name(dynamo_graph(call, image(3, grad=False)))
    assert difference(found["sin"], found["cos"]) == "other"
    assert difference(found["sin"], found["tan"]) is None


def test_stream_annotations_are_told_apart() -> None:
    graph_module = torch.fx.symbolic_trace(lambda x: torch.cos(torch.sin(x)))
    for node in graph_module.graph.nodes:
        if node.target is torch.cos:
            node.meta["custom"] = {"stream": 1}
    found = modes_by_name(graph_module)
    assert difference(found["sin"], found["cos"]) == "stream"


def test_entering_computes_under_the_state() -> None:
    weight, x = image(3, 3), image(3, 3)
    with Modes(grad=False).entered():
        assert not (x @ weight).requires_grad
    arguments = ("cpu", torch.bfloat16, True, None)
    with Modes(autocast=(arguments,)).entered():
        assert (x.float() @ weight.float()).dtype == torch.bfloat16
    assert (x @ weight).requires_grad


def test_graphs_of_regions_start_in_their_state() -> None:
    """Export turns a region into an operator that runs a graph."""

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = torch.sin(x)
            with torch.autocast("cpu", torch.bfloat16):
                z = torch.cos(x)
            return y + z

    program = torch.export.export(Model(), (image(3),))
    graph_module = program.graph_module
    outer = modes_of(graph_module.graph, Modes())
    starts = [initial_modes_of_nested(reference, outer) for _, _, reference in nested_graphs(graph_module)]
    assert sorted((start.grad, len(start.autocast)) for start in starts) == [(False, 0), (True, 1)]
