"""Graphs that a grad mode has of its own become part of the graph around them, and no other graph does."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule

from fxpasses.graph.inlining import inline_grad_modes
from tests.helpers import Spelled, printed, require_wellformed


def exported(model: nn.Module, *inputs: torch.Tensor) -> GraphModule:
    with torch.enable_grad():
        return torch.export.export(model, inputs).graph_module


def nested(module: GraphModule) -> list[str]:
    """The operators of a graph that run others."""
    targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    return [name for name in targets if "wrap_with" in name or name == "cond"]


def switching(self: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        y = x * 2
        with torch.enable_grad():
            z = (y + 1).relu_()
        w = z - y
    return w * x, z


def branching(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,)) * 2


def test_modes_in_modes_are_inlined_in_a_copy():
    x = torch.rand(3)
    module = exported(Spelled(switching), x)
    before = printed(module)
    assert nested(module)
    found = inline_grad_modes(module)
    assert printed(module) == before
    assert nested(found) == []
    assert not found.graph.find_nodes(op="get_attr")
    require_wellformed(found)
    for one, other in zip(found(x), module(x), strict=True):
        assert torch.equal(one, other)


def test_a_graph_inside_an_inlined_one_is_still_found():
    x = torch.rand(3)
    found = inline_grad_modes(exported(Spelled(branching), x))
    assert nested(found) == ["cond"]
    for given in (x, -x):
        assert torch.equal(found(given)[0], branching(nn.Module(), given))


def test_a_graph_without_modes_is_left_as_it_is():
    module = exported(Spelled(lambda self, x: x * 2), torch.rand(3))
    assert inline_grad_modes(module) is module


def test_autocast_is_not_inlined():
    def cast(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x

    module = exported(Spelled(cast), torch.rand(3, 3))
    assert inline_grad_modes(module) is module
