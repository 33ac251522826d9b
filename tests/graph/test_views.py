"""Operator views: what is read off a node, the same at every capture level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import EVERYWHERE, graph_of, image, pair
from torch import nn
from torch.fx import GraphModule, Node

from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import ensure_metadata, tensor
from fxpasses.graph.operands import tensor_of
from fxpasses.graph.views import (
    BatchNorm,
    Convolution,
    Linear,
    is_batch_norm,
    read_batch_norm,
    read_producer,
)


def described(capture: str, model: nn.Module, x: torch.Tensor) -> GraphModule:
    """The graph of a front end, with metadata."""
    graph_module = graph_of(capture, model, (x,))
    ensure_metadata(graph_module, (x,))
    return graph_module


def read_pair(capture: str, model: nn.Module, x: torch.Tensor) -> tuple[Any, Any]:
    graph = described(capture, model, x).graph
    (anchor,) = [node for node in graph.nodes if is_batch_norm(node)]
    norm = read_batch_norm(anchor)
    assert isinstance(norm, BatchNorm)
    assert isinstance(norm.input, Node)
    return read_producer(norm.input), norm


def numbers(given: Any, dimensions: int) -> list[int]:
    """Geometry as one number per dimension."""
    return [given] * dimensions if isinstance(given, int) else list(given) * (dimensions // len(given))


@pytest.mark.parametrize("capture", EVERYWHERE)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_reads_alike_everywhere(capture: str, transposed: bool, bias: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(4, 8, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, bias=bias)
    found, norm = read_pair(capture, pair(conv, nn.BatchNorm2d(8, eps=0.25)), image(2, 4, 7, 8))
    assert isinstance(found, Convolution)
    assert found.transposed is transposed
    assert (numbers(found.stride, 2), numbers(found.padding, 2)) == ([2, 1], [1, 0])
    assert (numbers(found.dilation, 2), numbers(found.output_padding, 2)) == ([1, 2], [0, 0])
    assert (found.groups, found.channel_axis, found.bias is None) == (2, 1, not bias)
    assert tensor_of(found.weight).shape == conv.weight.shape  # type: ignore[union-attr]
    assert tensor_of(found.input).shape == (2, 4, 7, 8)  # type: ignore[union-attr]
    assert (norm.eps, norm.training, norm.channel_axis) == (0.25, False, 1)
    for part in (norm.gamma, norm.beta, norm.running_mean, norm.running_var):
        assert tensor_of(part).shape == (8,)  # type: ignore[union-attr]


@pytest.mark.parametrize("capture", EVERYWHERE)
def test_a_linear_layer_reads_alike_up_to_the_spelling_of_its_weight(capture: str) -> None:
    found, _ = read_pair(capture, pair(nn.Linear(3, 4), nn.BatchNorm1d(4)), image(5, 3))
    assert isinstance(found, Linear)
    weight = tensor_of(found.weight)
    assert weight is not None
    assert weight.shape[found.weight_axis] == 4
    assert found.channel_axis == 1
    assert tensor_of(found.bias).shape == (4,)  # type: ignore[union-attr]


@pytest.mark.parametrize("capture", ["compile", "pre_dispatch", "export", "symbolic_trace"])
def test_the_channel_axis_of_an_unbatched_convolution_is_the_first(capture: str) -> None:
    found, _ = read_pair(capture, pair(nn.Conv2d(3, 6, 3), nn.BatchNorm1d(6)), image(3, 8, 8))
    assert found.channel_axis == 0


def test_the_channel_axis_of_a_linear_layer_is_the_last() -> None:
    found, _ = read_pair("symbolic_trace", pair(nn.Linear(3, 4), nn.BatchNorm2d(4)), image(2, 4, 5, 3))
    assert found.channel_axis == 3


@pytest.mark.parametrize("capture", EVERYWHERE)
def test_a_batch_norm_in_training_says_so(capture: str) -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    model[1].train()  # type: ignore[index]
    graph = described(capture, model, image(grad=False)).graph
    norms = [read_batch_norm(node) for node in graph.nodes if is_batch_norm(node)]
    if capture == "aten":
        # Decomposed into a functional operator that is no site.
        assert all(isinstance(norm, BatchNorm) and norm.training for norm in norms)
        return
    (norm,) = norms
    assert isinstance(norm, BatchNorm)
    assert norm.training
    assert norm.gamma is None
    assert norm.beta is None


def test_other_operators_are_nothing_to_the_views() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.LayerNorm(4), nn.MaxPool2d(2))).graph
    assert [read_producer(node) for node in graph.nodes] == [None] * len(graph.nodes)
    assert not any(map(is_batch_norm, graph.nodes))


def test_numbers_of_groups_that_are_no_constants_are_refused() -> None:
    graph = torch.fx.Graph()
    x, w, groups = (graph.placeholder(name) for name in ("x", "w", "groups"))
    for given, code in ((groups, "non-constant"), (2, None)):
        found = read_producer(graph.call_function(torch.conv2d, (x, w), {"groups": given}))
        assert (found.code if isinstance(found, Decline) else None) == code


def test_a_mode_that_is_no_constant_is_refused() -> None:
    graph = torch.fx.Graph()
    x, mean, var, training = (graph.placeholder(name) for name in ("x", "mean", "var", "training"))
    for given, code in ((training, "non-constant"), (True, None), (False, None)):
        node = graph.call_function(torch.nn.functional.batch_norm, (x, mean, var), {"training": given})
        node.meta["val"] = torch.empty(1, device="meta")
        found = read_batch_norm(node)
        assert (found.code if isinstance(found, Decline) else None) == code


def test_operands_that_are_no_tensors_are_refused() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    found = read_producer(graph.call_function(torch.conv2d, (x, 3)))
    assert isinstance(found, Decline)
    assert found.code == "unsupported-arguments"


def test_reading_changes_nothing() -> None:
    graph_module = described("symbolic_trace", pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image())
    before = str(graph_module.graph)
    for node in graph_module.graph.nodes:
        read_producer(node)
        if is_batch_norm(node):
            read_batch_norm(node)
    assert str(graph_module.graph) == before


def test_a_refusal_is_false_and_formats_late() -> None:
    class Loud:
        def __str__(self) -> str:
            raise AssertionError("formatted too early")

    declined = Decline("code", "because of {}", None, (Loud(),))
    assert not declined
    with pytest.raises(AssertionError, match="formatted too early"):
        _ = declined.message
    assert Decline("code", "{} and {}", None, (1, "two")).message == "1 and two"


def test_metadata_is_what_views_read_shapes_from() -> None:
    graph_module = described("symbolic_trace", pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image())
    (anchor,) = [node for node in graph_module.graph.nodes if is_batch_norm(node)]
    assert tensor(anchor).shape == (2, 4, 6, 6)  # type: ignore[union-attr]
