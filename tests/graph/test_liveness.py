"""How many bytes of intermediate tensors are alive at once."""

from __future__ import annotations

import torch
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from fxpasses.graph.liveness import LiveBytes


def test_a_tensor_dies_with_its_last_reader():
    """The first result is read by the second, which the sum reads: two are alive at once, never three."""

    def work(image: torch.Tensor) -> torch.Tensor:
        first = image + 1
        second = first * 2
        return second.sum()

    graph = make_fx(work, tracing_mode="fake")(torch.ones(1000)).graph
    assert LiveBytes.of(graph) == LiveBytes(largest=4000, peak=8000)


def test_what_is_read_later_stays():
    def work(image: torch.Tensor) -> torch.Tensor:
        first = image + 1
        second = first * 2
        third = second * 3
        return third + first

    graph = make_fx(work, tracing_mode="fake")(torch.ones(1000)).graph
    assert LiveBytes.of(graph) == LiveBytes(largest=4000, peak=12000)


def test_symbolic_sizes_count_as_they_were_traced():
    graph = make_fx(lambda image: image + 1, tracing_mode="symbolic")(torch.ones(8, 5)).graph
    assert LiveBytes.of(graph) == LiveBytes(largest=160, peak=160)


def test_a_graph_without_results_or_metadata_counts_nothing():
    graph = Graph()
    given = graph.placeholder("given")
    graph.output(graph.call_function(torch.relu, (given,)))
    assert LiveBytes.of(graph) == LiveBytes(largest=0, peak=0)
