"""The order of a tensor's dimensions in memory, and an operator's row in the taxonomy."""

from __future__ import annotations

import pytest
import torch
from helpers import CAPTURES
from torch import nn

from fxpasses.graph.frames import permuted, plain
from fxpasses.graph.layouts import C, L, order_of, to_channels_last
from fxpasses.graph.names import base_name
from fxpasses.passes.layout.labels import Kind, kind_of, row_of


@pytest.mark.parametrize(
    ("given", "order"),
    [
        (torch.empty(2, 3, 4, 5), C),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), L),
        (torch.empty(2, 3, 4, 5, 6), C),
        (torch.empty(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d), L),
        (torch.empty(2, 6, 4, 5)[:, :3], C),
        (torch.empty(2, 6, 4, 5).to(memory_format=torch.channels_last)[:, 2:], L),
        (torch.empty(2, 3, 1, 1), "both"),
        (torch.empty(2, 1, 4, 5), "both"),
        (torch.empty(2, 3), "both"),
        (torch.empty(2, 3, 1, 1).expand(2, 3, 4, 5), "other"),
        (torch.empty(2, 4, 3, 5).transpose(1, 2), "other"),
        (torch.empty(3, 2, 4, 5).transpose(0, 1), "other"),
    ],
)
def test_the_order_is_read_off_the_strides(given, order):
    assert order_of(given) == order


def test_a_permuted_view_is_read_in_its_frame():
    contiguous = torch.empty(2, 3, 4, 5)
    frame = permuted(plain(4), to_channels_last(4))
    assert order_of(contiguous.permute(0, 2, 3, 1), frame) == C
    assert order_of(contiguous.permute(0, 2, 3, 1).contiguous(), frame) == L


@pytest.mark.parametrize("capture", ["pre_dispatch", "export", "aten", "symbolic_trace"])
def test_an_operator_has_one_row_at_every_level(capture):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()).eval()
    program = CAPTURES[capture](model, (torch.randn(1, 3, 8, 8),))
    graph = program.graph_module.graph if hasattr(program, "graph_module") else program.graph
    kinds = [kind_of(node) for node in graph.nodes if node.op.startswith("call")]
    found = [kind for kind in kinds if kind not in (None, Kind.VIEWING)]
    assert found == [Kind.PREFERRING, Kind.AGNOSTIC, Kind.COSTED]
    assert None not in [
        kind_of(n) for n in graph.nodes if n.op.startswith("call") and "getitem" not in n.name
    ]


def test_dropout_is_elementwise_only_where_it_does_not_drop():
    class Dropping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(x, 0.5, self.training)

    for training, kind in ((False, Kind.AGNOSTIC), (True, Kind.FORCING)):
        graph = torch.fx.symbolic_trace(Dropping().train(training)).graph
        (node,) = [node for node in graph.nodes if base_name(node) == "dropout"]
        assert kind_of(node) is kind


def roll(x):
    """A user's function that is called like an operator of torch."""
    return x.transpose(2, 3)


class Conv2d(nn.Module):
    def forward(self, x):
        return x


def test_an_operator_of_the_user_is_unknown_whatever_it_is_called():
    root = nn.Module()
    root.gather = Conv2d()
    graph = torch.fx.Graph(root)
    x = graph.placeholder("x")
    graph.call_module("gather", (x,))
    graph.call_function(roll, (x,))
    graph_module = torch.fx.GraphModule(root, graph)
    nodes = [node for node in graph_module.graph.nodes if node.op.startswith("call")]
    assert [kind_of(node) for node in nodes] == [None, None]


@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        (lambda x: torch.max(x, x), Kind.AGNOSTIC),
        (lambda x: torch.max(x, 1), Kind.REDUCING),
        (lambda x: torch.nn.functional.pad(x, (1, 1), mode="circular"), Kind.ABSORBING),
        (lambda x: torch.nn.functional.pad(x, (1, 1), "circular"), Kind.ABSORBING),
        (lambda x: torch.nn.functional.pad(x, (1, 1)), Kind.COSTED),
        (lambda x: x.to(torch.float64), Kind.AGNOSTIC),
        (lambda x: x.half(), Kind.AGNOSTIC),
        (lambda x: x.to(memory_format=torch.channels_last), Kind.FORCING),
        (lambda x: x.half(torch.channels_last), Kind.FORCING),
        (lambda x: torch.add(x, 1), Kind.AGNOSTIC),
        (lambda x: torch.special.entr(x), Kind.AGNOSTIC),
        (lambda x: torch.special.softmax(x, 1), Kind.ABSORBING),
        (lambda x: torch.nn.functional.native_channel_shuffle(x, 2), Kind.COSTED),
    ],
)
def test_what_an_operator_is_given_may_decide(forward, kind):
    (*_, node) = [node for node in torch.fx.symbolic_trace(forward).graph.nodes if node.op.startswith("call")]
    assert kind_of(node) is kind


def test_random_operators_are_forcing_since_numbers_are_drawn_in_the_order_of_memory():
    assert row_of("native_dropout") is row_of("rand_like") is Kind.FORCING
