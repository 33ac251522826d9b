"""What the tests of baked programs share: how one is made, and what must not be left in it.

It is found by a walk of its own: whatever reads weights and no input of the user's reaches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

import fxpasses
from fxpasses.torch_internals.pytree import tree_leaves
from tests.helpers import randomised

BAKED = {"weights": "baked", "layout": "off"}


def baked(program: Any, *inputs: torch.Tensor, **options: Any) -> Any:
    """The program (or the module, exported) with its weights baked, and the report."""
    if not isinstance(program, (ExportedProgram, GraphModule)):
        program = torch.export.export(program, inputs)
    result = fxpasses.optimize(program, inputs, options={**BAKED, **options})
    return result.exported_program or result.graph_module, result.report


def require_same(found: Any, expected: Any, bound: float = 1e-9) -> None:
    """Requires tensors that differ by no more than a part of the largest expected value."""
    found, expected = (
        [leaf for leaf in tree_leaves(each) if isinstance(leaf, torch.Tensor)] for each in (found, expected)
    )
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.stride() == other.stride()
        error = (one - other).abs().max() / other.abs().max().clamp_min(1e-30)
        assert error <= bound, float(error)


def left_over(program: ExportedProgram) -> list[Node]:
    """The nodes that read weights and that nothing of the user's reaches."""
    specs = program.graph_signature.input_specs
    users = {spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT}
    reached: dict[Node, str] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            reached[node] = "input" if node.name in users else "weight"
        elif node.op.startswith("call"):
            kinds = {reached.get(operand, "number") for operand in node.all_input_nodes}
            reached[node] = next((kind for kind in ("input", "weight") if kind in kinds), "number")
    return [node for node, kind in reached.items() if kind == "weight" and node.op != "placeholder"]


def norms(program: ExportedProgram | GraphModule) -> list[Node]:
    return [node for node in program.graph.nodes if "batch_norm" in str(node.target)]


def weights_of(program: ExportedProgram) -> int:
    """The bytes of a program's weights."""
    held = {**program.state_dict, **program.constants}
    return sum(value.nbytes for value in held.values() if isinstance(value, torch.Tensor))


def signed(program: ExportedProgram) -> None:
    """Requires that the signature, the graph and the tensors say the same, and that all of it is read."""
    placeholders = program.graph.find_nodes(op="placeholder")
    specs = program.graph_signature.input_specs
    assert [spec.arg.name for spec in specs] == [node.name for node in placeholders]
    held = {spec.target for spec in specs if spec.kind is not InputKind.USER_INPUT}
    assert held == {*program.state_dict, *program.constants}
    assert all(node.users for node, spec in zip(placeholders, specs, strict=True) if spec.target)
    program.validate()


class Block(nn.Module):
    """A convolution and its norm inside a module, and a linear layer whose weight is transposed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6))
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x).relu().mean((2, 3)) @ self.weight.t()


def block() -> nn.Module:
    return randomised(Block())


def export(model: nn.Module, *inputs: torch.Tensor) -> ExportedProgram:
    return torch.export.export(model, inputs)


def training() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().train()
