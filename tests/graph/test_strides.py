"""In which order the axes of a tensor lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxpasses.graph.strides import are_dense, has_gaps, memory_order

IMAGE = torch.empty(2, 3, 4, 5)
LAST = IMAGE.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("given", "order", "gaps"),
    [
        (IMAGE, [0, 1, 2, 3], False),
        (LAST, [0, 2, 3, 1], False),
        (IMAGE.permute(3, 0, 1, 2), [1, 2, 3, 0], False),
        (IMAGE.flatten(2).transpose(1, 2), [0, 2, 1], False),
        (IMAGE[:, 1:3], [0, 1, 2, 3], True),
        (IMAGE[:, :, 0], [0, 1, 2], True),
        (LAST[:, :, 0], [0, 2, 1], True),
        (torch.empty(0, 3), [0, 1], False),
        (torch.empty(()), [], False),
        (torch.empty(1, 3, 1, 2)[:, :, 0], [0, 1, 2], False),
    ],
    ids=lambda given: "x".join(map(str, given.stride())) if isinstance(given, torch.Tensor) else None,
)
def test_axes_are_told_from_the_outermost_to_the_innermost(given, order, gaps):
    assert memory_order(given) == order
    assert has_gaps(given) is gaps
    assert are_dense(tuple(given.shape), given.stride()) is not gaps


@pytest.mark.parametrize(
    "given",
    [torch.empty(3, 1).expand(3, 4), torch.empty(6).unfold(0, 3, 1), torch.empty(2, 2).to_sparse()],
    ids=["expanded", "unfolded", "sparse"],
)
def test_elements_that_overlap_have_no_order(given):
    assert memory_order(given) is None
    assert given.is_sparse or not are_dense(tuple(given.shape), given.stride())


@pytest.mark.parametrize(
    ("function", "ordered"),
    [
        (lambda x: x + 1, True),
        (lambda x: (x + 1)[:, :, 1:], True),
        (lambda x: (x + 1)[:, 1:3], False),  # of how many channels?
        (lambda x: (x + 1)[:, :, 0], True),
        (lambda x: (x + 1).flatten(2), True),
        (lambda x: (x + 1).permute(0, 2, 3, 1), [0, 3, 1, 2]),
        (lambda x: (x + 1).mean(1, keepdim=True).expand(-1, 3, -1, -1), False),
    ],
)
def test_symbolic_sizes_are_compared_as_expressions_without_guards(function, ordered):
    graph = make_fx(function, tracing_mode="symbolic")(torch.empty(6, 5, 7, 8)).graph
    (output,) = graph.find_nodes(op="output")
    found = output.args[0].meta["val"]
    before = len(found.shape[0].node.shape_env.guards)
    in_place = list(range(found.ndim)) if ordered else None
    assert memory_order(found) == (in_place if isinstance(ordered, bool) else ordered)
    assert len(found.shape[0].node.shape_env.guards) == before
