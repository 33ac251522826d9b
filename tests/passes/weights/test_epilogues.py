"""What counts as the epilogue of a convolution in inductor's graph, and what does not."""

from __future__ import annotations

import math

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from fxpasses.passes.weights.epilogues import epilogue_of

pytestmark = pytest.mark.vectors

WEIGHT = torch.randn(4, 3, 1, 1)
X = torch.randn(2, 3, 5, 5)
OTHER = torch.randn(2, 4, 5, 5)
CONVOLUTION = torch.ops.aten.convolution.default


def epilogue(function, *, summand=True, decompose=True):
    def run(x, weight, other):
        return function(torch.conv2d(x, weight), other)

    table = select_decomp_table() if decompose else {}
    graph = make_fx(run, decomposition_table=table)(X, WEIGHT, OTHER).graph
    (convolution,) = [node for node in graph.nodes if node.target is CONVOLUTION]
    return epilogue_of(convolution, summand=summand), graph


def output_of(graph):
    return next(iter(reversed(graph.nodes))).args[0]


@pytest.mark.parametrize("decompose", [True, False])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.relu, "clamp"),
        (functional.relu6, "clamp"),
        (functional.silu, "silu"),
        (lambda x: torch.sigmoid(x) * x, "silu"),
        (functional.hardswish, "hardswish"),
        (torch.sigmoid, "sigmoid"),
        (functional.hardsigmoid, "hardsigmoid"),
        (functional.gelu, "gelu"),
        (lambda x: functional.leaky_relu(x, 0.1), "leaky_relu"),
    ],
    ids=[
        "relu",
        "relu6",
        "silu",
        "sigmoid-times",
        "hardswish",
        "sigmoid",
        "hardsigmoid",
        "gelu",
        "leaky_relu",
    ],
)
def test_activations_are_read_whole(function, name, decompose):
    found, graph = epilogue(lambda y, other: function(y), decompose=decompose)
    assert found.activation == name
    assert found.last is output_of(graph)
    assert found.summand is None


def test_limits_of_a_clamp():
    found, _ = epilogue(lambda y, other: functional.hardtanh(y, -2.0, 3.0))
    assert (found.activation, found.low, found.high) == ("clamp", -2.0, 3.0)
    found, _ = epilogue(lambda y, other: torch.relu(y))
    assert (found.activation, found.low, found.high) == ("clamp", 0.0, math.inf)


@pytest.mark.parametrize("swap", [False, True])
def test_a_summand_and_what_follows(swap):
    found, graph = epilogue(lambda y, other: torch.relu(other + y if swap else y + other))
    assert found.summand is not None
    assert found.summand.op == "placeholder"
    assert found.activation == "clamp"
    assert found.last is output_of(graph)
    found, _ = epilogue(lambda y, other: torch.relu(y + other), summand=False)
    assert (found.summand, found.activation) == (None, "none")


@pytest.mark.parametrize(
    "function",
    [
        lambda y, other: (torch.relu(y), y),
        lambda y, other: y + y,
        lambda y, other: torch.add(y, other, alpha=2),
        lambda y, other: y + other[:, :, :1],
        lambda y, other: y + 1.0,
        lambda y, other: functional.silu(y) + torch.exp(-y).sum(),
        lambda y, other: y * torch.sigmoid(other),
        lambda y, other: functional.gelu(y, approximate="tanh"),
        lambda y, other: functional.softplus(y),
        lambda y, other: (y + 2).clamp(0, 6) * y / 6,
        lambda y, other: (y + other).double(),
    ],
    ids=[
        "read-twice",
        "itself",
        "alpha",
        "broadcast",
        "number",
        "inside-read",
        "gate-of-another",
        "tanh-gelu",
        "softplus",
        "shifted-by-2",
        "cast",
    ],
)
def test_what_is_no_epilogue_stays(function):
    found, _ = epilogue(function)
    if found.summand is not None:  # the cast comes after a sum
        assert found.last.target is torch.ops.aten.add.Tensor
    assert found.activation == "none"
    assert (found.nodes == {found.last}) == (found.summand is None)
