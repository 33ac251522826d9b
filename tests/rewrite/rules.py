"""Small rules for the driver's tests: sin(x) becomes cos(x), with one thing or another gone wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

import fxpasses
from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.rule import Match, Rule

SINES = (torch.sin, torch.ops.aten.sin.default, "sin")


class SineToCosine(Rule[Match]):
    """Replaces every sine; derive from it and break one step."""

    def __init__(
        self, name: str = "sine_to_cosine", after: tuple[str, ...] = (), default: bool = True
    ) -> None:
        self.name, self.after, self.default = name, after, default

    @property
    def is_anchor(self) -> Callable[[Node], bool]:
        return lambda node: node.target in SINES

    def match(self, node: Node, context: GraphContext) -> Match | Decline | None:
        return Match(context, (node,))

    def insertion_point(self, match: Match) -> Node:
        return match.result

    def rewrite(self, match: Match, build: Builder) -> Node:
        (given,) = match.result.all_input_nodes
        return build.call(torch.cos, (given,))


@contextlib.contextmanager
def registered(*rules: Any) -> Iterator[None]:
    """The rules are registered in the block."""
    for rule in rules:
        fxpasses.register(rule)
    try:
        yield
    finally:
        for rule in rules:
            fxpasses.unregister(rule.name)
