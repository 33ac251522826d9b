"""Which nodes write to which tensors, under every name that a tensor has.

Each case is a function of `x` and `y` in which something happens between two marks (`sin`, `cos`); asked is
whether `x`, or what it is a name for, is written to between the marks. Eager is the judge: the memory of `x`
is compared before and after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import dynamo_graph, graph_of
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fxpasses.graph.effects import Effects
from fxpasses.graph.metadata import ensure_metadata

Touch = Callable[[torch.Tensor, torch.Tensor], Any]

WRITES: dict[str, Touch] = {
    "add_": lambda x, y: x.add_(1),
    "copy_": lambda x, y: x.copy_(y),
    "zero_": lambda x, y: x.zero_(),
    "function in place": lambda x, y: torch.relu_(x),
    "flag": lambda x, y: F.hardtanh(x, inplace=True),
    "positional flag": lambda x, y: F.elu(x, 1.0, True),
    "dropout in place": lambda x, y: F.dropout(x, 1.0, True, True),
    "out": lambda x, y: torch.add(y, 1, out=x),
    "view": lambda x, y: x.view(-1).add_(1),
    "view of a view": lambda x, y: x.t().reshape(4, 2).mT[0].add_(1),
    "narrow": lambda x, y: x.narrow(0, 0, 1).add_(1),
    "select": lambda x, y: x.select(0, 1).add_(1),
    "split": lambda x, y: torch.split(x, 1)[1].add_(1),
    "tensor_split": lambda x, y: torch.tensor_split(x, 2)[1].add_(1),
    "unbind": lambda x, y: torch.unbind(x)[0].add_(1),
    "diagonal": lambda x, y: torch.diagonal(x).add_(1),
    "expand": lambda x, y: x.expand(2, 4)[0].add_(1),
    "squeeze": lambda x, y: x[None].squeeze(0).add_(1),
    "index_put_": lambda x, y: x.index_put_((torch.tensor([0]),), torch.tensor(5.0)),
    "foreach": lambda x, y: torch._foreach_add_([y.clone(), x], 1),
    "detach": lambda x, y: x.detach().add_(1),
    "flatten": lambda x, y: torch.flatten(x).add_(1),
    "to": lambda x, y: x.to(x.dtype).add_(1),
    "float": lambda x, y: x.float().add_(1),
    "contiguous": lambda x, y: x.contiguous().add_(1),
    "type_as": lambda x, y: x.type_as(y).add_(1),
    "einsum": lambda x, y: torch.einsum("ij->ji", x).add_(1),
    "broadcast_tensors": lambda x, y: torch.broadcast_tensors(x, y)[0].add_(1),
    "meshgrid": lambda x, y: torch.meshgrid(x[0], x[1], indexing="ij")[0][:, 0].add_(1),
    "unsafe_chunk": lambda x, y: torch.unsafe_chunk(x, 2)[0].add_(1),
    "training batch norm": lambda x, y: F.batch_norm(y, x[0], x[0].abs(), training=True),
    "resize free": lambda x, y: x.fill_(3),
    "square bracket": lambda x, y: x.index_fill_(0, torch.tensor([1]), 2.0),
    "addcmul_": lambda x, y: x.addcmul_(y, y),
    "clamp_": lambda x, y: torch.clamp_(x, 10, 11),
    "random": lambda x, y: x.normal_(),
}

READS: dict[str, Touch] = {
    "add": lambda x, y: x.add(1),
    "write to the other": lambda x, y: y.add_(1),
    "write to a copy": lambda x, y: x.clone().add_(1),
    "write to a sum": lambda x, y: (x + y).add_(1),
    "write to another dtype": lambda x, y: x.double().add_(1),
    "write to a gathered copy": lambda x, y: x[torch.tensor([0, 1])].add_(1),
    "repeat": lambda x, y: x.repeat(1, 1).add_(1),
    "out of the other": lambda x, y: torch.add(x, 1, out=y),
    "eval batch norm": lambda x, y: F.batch_norm(y, x[0], x[0].abs(), training=False),
    "dunder": lambda x, y: x.__add__(y),
    "concatenation": lambda x, y: torch.cat([x, y]).add_(1),
}

# symbolic_trace cannot unpack what it does not run, so no lists of unknown length; make_fx and Dynamo can.
CASES = [
    (front, name, written)
    for front in ("compile", "pre_dispatch", "symbolic_trace")
    for written, cases in ((True, WRITES), (False, READS))
    for name in cases
]
OVER_CAUTIOUS = {
    # A conversion may return its argument, and only a fake tensor that shares storage tells.
    ("symbolic_trace", "write to another dtype"),
    ("pre_dispatch", "write to another dtype"),
    # The result is one of the arguments, and it is not asked which.
    ("pre_dispatch", "out of the other"),
    # `x[i]` is a view for some i.
    ("symbolic_trace", "write to a gathered copy"),
}


class Marked(nn.Module):
    def __init__(self, touch: Touch) -> None:
        super().__init__()
        self.touch = touch

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = x + 0, y + 0
        before = torch.sin(x)
        self.touch(x, y)
        return before + torch.cos(x) + y


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4), torch.randn(2, 4)


def described(front: str, model: nn.Module) -> GraphModule:
    """The graph of a front end, with metadata."""
    graph_module = graph_of(front, model, inputs())
    ensure_metadata(graph_module, inputs())
    return graph_module


def marks(graph_module: GraphModule) -> tuple[Node, Node]:
    """The nodes of the two marks."""
    targets = ({torch.sin, torch.ops.aten.sin.default}, {torch.cos, torch.ops.aten.cos.default})
    (first,), (last,) = (
        [node for node in graph_module.graph.nodes if node.target in spellings] for spellings in targets
    )
    return first, last


@pytest.mark.parametrize(("front", "name", "written"), CASES)
def test_writes_are_seen_under_every_name(front: str, name: str, written: bool) -> None:
    touch = (WRITES if written else READS)[name]
    x, y = inputs()
    before = x.clone()
    touch(x, y)
    assert written == (not torch.equal(x, before)), "the case does not do what it says"
    graph_module = described(front, Marked(touch))
    first, last = marks(graph_module)
    found = Effects(graph_module, graph_module.graph).written_between(first.all_input_nodes, first, last)
    expected = written or (front, name) in OVER_CAUTIOUS
    assert (found is not None) == expected


def test_a_write_before_or_after_is_not_between() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        x = x + 0
        x.add_(1)
        y = torch.sin(x)
        z = torch.cos(x)
        x.add_(1)
        return y + z + x

    graph_module = dynamo_graph(call, torch.rand(3))
    first, last = marks(graph_module)
    effects = Effects(graph_module, graph_module.graph)
    assert effects.written_between(first.all_input_nodes, first, last) is None
    start, end = next(iter(graph_module.graph.nodes)), graph_module.graph.output_node()
    assert effects.written_between(first.all_input_nodes, start, end) is not None


@pytest.mark.parametrize("shared", [True, False])
def test_inputs_that_share_memory_are_one_tensor_to_dynamos_graph(shared: bool) -> None:
    def call(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.sin(x)
        y.add_(1)
        return z + torch.cos(x)

    x = torch.rand(4)
    graph_module = dynamo_graph(call, x, x.view(4) if shared else torch.rand(4))
    first, last = marks(graph_module)
    found = Effects(graph_module, graph_module.graph).written_between(first.all_input_nodes, first, last)
    assert (found is not None) == shared


def test_inputs_of_unknown_origin_may_share_memory() -> None:
    def call(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.sin(x)
        y.add_(1)
        return z + torch.cos(x)

    graph_module = torch.fx.symbolic_trace(call)
    ensure_metadata(graph_module, inputs())
    first, last = marks(graph_module)
    assert Effects(graph_module, graph_module.graph).written_between(first.all_input_nodes, first, last)


@pytest.mark.parametrize(("module", "writes"), [(nn.ReLU(inplace=True), True), (nn.ReLU(), False)])
def test_a_leaf_module_writes_when_it_is_in_place(module: nn.Module, writes: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sin(x)
            self.act(x)
            return y + torch.cos(x)

    graph_module = torch.fx.symbolic_trace(Model())
    first, last = marks(graph_module)
    found = Effects(graph_module, graph_module.graph).written_between(first.all_input_nodes, first, last)
    assert (found is not None) == writes


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_writes_to_its_statistics_in_training(training: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cos(self.bn(torch.sin(x)))

    model = Model().train(training)
    graph_module = torch.fx.symbolic_trace(model)
    first, last = marks(graph_module)
    effects = Effects(graph_module, graph_module.graph)
    assert (effects.written_between([model.bn.running_mean], first, last) is not None) == training
    assert effects.written_between([model.bn.weight], first, last) is None


def test_a_module_of_a_user_may_write_to_anything_it_is_given() -> None:
    class Custom(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.custom = Custom()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.sin(x)
            self.custom(x)
            return y + torch.cos(x)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Custom)

    model = Model()
    graph_module = GraphModule(model, Tracer().trace(model))
    first, last = marks(graph_module)
    assert Effects(graph_module, graph_module.graph).written_between(first.all_input_nodes, first, last)


def unknown(x: torch.Tensor) -> torch.Tensor:
    return x


torch.fx.wrap("unknown")


def test_a_function_that_nobody_described_may_write_and_alias() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(x)
        unknown(x)
        return y + torch.cos(x)

    graph_module = torch.fx.symbolic_trace(call)
    first, last = marks(graph_module)
    assert Effects(graph_module, graph_module.graph).written_between(first.all_input_nodes, first, last)


def test_what_fills_a_tensor_is_not_written_by_later_writes_to_it() -> None:
    def call(x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        filled = x + 1
        filled[0].fill_(number)
        return filled + torch.sin(number)

    graph_module = make_fx(call, pre_dispatch=True)(torch.rand(3), torch.tensor(2.0))
    effects = Effects(graph_module, graph_module.graph)
    x, number = graph_module.graph.find_nodes(op="placeholder")
    (filled,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.fill_.Tensor)
    assert not effects.is_written(number)
    assert effects.writers_of(filled.args[0]) == [filled]
    assert not effects.is_written(x)


def test_a_constant_of_an_export_is_not_written_through_its_copy() -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1.0, 2.0, 3.0]).mul_(2) + x

    program = torch.export.export(Constant(), (torch.rand(3),))
    constant, x = program.graph.find_nodes(op="placeholder")
    held = {constant.name: program.constants["lifted_tensor_0"]}
    for known in ({}, held):
        effects = Effects(program.graph_module, program.graph, known)
        (copied,) = constant.users
        assert effects.is_written(copied)
    assert not effects.is_written(constant)
    assert not effects.is_written(x)


def test_inputs_share_no_storage_with_what_a_program_holds_itself() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2) + self.weight

    program = torch.export.export(Writing(), (torch.rand(3),))
    weight, x = program.graph.find_nodes(op="placeholder")
    cautious = Effects(program.graph_module, program.graph)
    assert cautious.is_written(weight)
    effects = Effects(program.graph_module, program.graph, {weight.name: program.state_dict["weight"]})
    assert effects.is_written(x)
    assert not effects.is_written(weight)
