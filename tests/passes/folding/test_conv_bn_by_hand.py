"""Guards of conv-BN that no front end leads to today, on graphs written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fxpasses


def _by_hand(dtype: torch.dtype = torch.float32, stream: int | None = None) -> torch.fx.GraphModule:
    """conv2d and batch_norm with metadata; the batch norm may be annotated with a stream."""
    graph = torch.fx.Graph()
    shapes = {"x": (2, 3, 8, 8), "w": (4, 3, 3, 3), "mean": (4,), "var": (4,)}
    x, w, mean, var = (graph.placeholder(name) for name in shapes)
    conv = graph.call_function(torch.conv2d, (x, w))
    norm = graph.call_function(F.batch_norm, (conv, mean, var))
    graph.output(norm)
    sizes = [*shapes.values(), (2, 4, 6, 6), (2, 4, 6, 6)]
    for node, size in zip((x, w, mean, var, conv, norm), sizes, strict=True):
        node.meta["val"] = torch.empty(size, dtype=dtype, device="meta")
    if stream is not None:
        norm.meta["custom"] = {"stream": stream}
    return torch.fx.GraphModule({}, graph)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({}, "applied"),
        ({"dtype": torch.complex64}, "dtype"),
        ({"dtype": torch.int32}, "dtype"),
        ({"dtype": torch.float64}, "applied"),
        ({"stream": 1}, "stream"),
    ],
    ids=str,
)
def test_dtypes_and_streams(arguments: dict[str, Any], code: str) -> None:
    report = fxpasses.optimize(_by_hand(**arguments), options={"profit": "always"}).report
    assert [remark.code for remark in report.remarks] == [code]


@pytest.mark.parametrize("missing", ["w", "mean", None])
def test_an_operand_without_metadata_is_refused(missing: str | None) -> None:
    """The doors ask for example inputs then; the rule does not rely on it."""
    from fxpasses.graph.context import GraphContext
    from fxpasses.graph.modes import Modes
    from fxpasses.passes.folding.conv_bn import EfficientConvBnEval

    graph_module = _by_hand()
    for node in graph_module.graph.nodes:
        if node.name == missing:
            del node.meta["val"]
    rule, context = EfficientConvBnEval(), GraphContext(graph_module, Modes())
    (anchor,) = [node for node in graph_module.graph.nodes if rule.is_anchor(node)]
    match = rule.match(anchor, context)
    assert match
    declined = rule.legality(match)  # type: ignore[arg-type]
    assert (declined.code if declined is not None else None) == ("no-metadata" if missing else None)
