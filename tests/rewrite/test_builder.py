"""The builder writes in the dialect of the graph, with metadata, and under the modes of its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CAPTURES, callable_of, check, image, pair, randomised
from rules import SineToCosine, registered
from torch import nn
from torch.fx import Node

import fxpasses
from fxpasses.graph.levels import Level, level_of
from fxpasses.graph.metadata import tensor
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.rule import Match
from fxpasses.torch_internals.operators import OpOverload, is_composite


class Recorder(SineToCosine):
    """Builds with every method, and records what was inserted."""

    def __init__(self) -> None:
        super().__init__("recorder")
        self.inserted: list[Node] = []

    def rewrite(self, match: Match, build: Builder) -> Node:
        (given,) = match.result.all_input_nodes
        half = build.cast(given, torch.float16)
        value = build.rsqrt(build.add(build.mul(given, given), 1.5))
        value = build.sub(build.add(value, given), build.neg(build.cast(half, torch.float64)))
        value = build.reshape(build.repeat(build.reshape(value, [1, 2, 2]), [1, 1, 1]), [2, 2])
        value = build.addmm(
            build.reshape(build.linear(value, given, _row(given, build)), [4]), *_wide(value, build)
        )
        value = build.reshape(build.reshape(value, [1, 2, 4]), [2, 4])
        value = build.mul(build.linear(value, _four(given, build), _row(given, build)), given)
        self.inserted = build.inserted
        return value


def _row(given: Node, build: Builder) -> Node:
    """[2], from [2, 2]."""
    target = torch.ops.aten.select.int if _functional(build) else torch.select
    return build.call(target, (given, 0, 0))


def _wide(given: Node, build: Builder) -> tuple[Node, Node]:
    """[2, 2] and [2, 4], from [2, 2]."""
    return given, build.reshape(build.repeat(given, [1, 2]), [2, 4])


def _four(given: Node, build: Builder) -> Node:
    return build.repeat(given, [1, 2])


def _functional(build: Builder) -> bool:
    return build.context.level is not Level.TORCH


class Model(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) + 1


@pytest.mark.parametrize(
    ("capture", "level"),
    [("symbolic_trace", Level.TORCH), ("pre_dispatch", Level.PRE_DISPATCH), ("aten", Level.ATEN)],
)
def test_replacements_are_written_in_the_level_of_the_graph(capture: str, level: Level) -> None:
    x = image(2, 2)
    rule = Recorder()
    with registered(rule):
        result = fxpasses.optimize(CAPTURES[capture](Model(), (x,)), (x,))
    assert result.report.applied == {"recorder": 1}, result.report.remarks
    assert len(rule.inserted) > 15
    for node in rule.inserted:
        assert tensor(node) is not None
        if level is Level.TORCH:
            assert not isinstance(node.target, OpOverload), node.target
        else:
            assert isinstance(node.target, OpOverload), node.target
    if level is Level.ATEN:
        # `linear` and the like are composite, and have no place below dispatch.
        conv = fxpasses.optimize(
            CAPTURES["aten"](pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (image(),))
        ).graph_module.graph
        composite = [
            n.target for n in conv.nodes if isinstance(n.target, OpOverload) and is_composite(n.target)
        ]
        assert composite == []
        assert level_of(conv) is Level.ATEN


@pytest.mark.parametrize("capture", ["pre_dispatch", "symbolic_trace", "aten"])
def test_what_is_built_computes_what_it_says(capture: str) -> None:
    x = image(2, 2, grad=False)
    with registered(Recorder()):
        found = fxpasses.optimize(CAPTURES[capture](Model(), (x,)), (x,))
    call = callable_of(found)
    value = (x * x + 1.5).rsqrt() + x + x.half().double()
    value = torch.addmm((value @ x.t() + x[0]).reshape(4), value, value.repeat(1, 2))
    value = (value @ x.repeat(1, 2).t() + x[0]) * x
    torch.testing.assert_close(call(x), value + 1, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grad", [True, False])
def test_metadata_is_computed_under_the_grad_mode_of_its_place(grad: bool) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(grad):
            y = torch.sin(x)
        return y * x

    found: list[Any] = []

    class Watch(SineToCosine):
        def rewrite(self, match: Match, build: Builder) -> Node:
            result = super().rewrite(match, build)
            found.append(tensor(result))
            return result

    with registered(Watch("watch")):
        torch.compile(call, backend="fxpasses", options={"inner": "eager"})(image(3))
    assert [recorded.requires_grad for recorded in found] == [grad]


def test_metadata_is_computed_under_the_autocast_state_of_its_place() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.sin(x)

    found: list[Any] = []

    class Watch(SineToCosine):
        def rewrite(self, match: Match, build: Builder) -> Node:
            (given,) = match.result.all_input_nodes
            found.append(tensor(build.call(torch.mm, (given, given))))
            return super().rewrite(match, build)

    with registered(Watch("watch")):
        torch.compile(call, backend="fxpasses", options={"inner": "eager"})(torch.randn(3, 3))
    assert [recorded.dtype for recorded in found] == [torch.bfloat16]


def test_a_parameter_that_is_read_later_is_read_again() -> None:
    """make_fx reads parameters where they are first used; a fused convolution may stand before that."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            y = self.conv(x)
            x.mul_(2)
            return self.bn(y) + x.mean()

    check("pre_dispatch", randomised(Between()), (image(),), 1, grads=False, profit="always")
