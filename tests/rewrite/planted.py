"""Rules with a planted fault, each wrong in one way that one check must catch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.fx import Node

import fxpasses
from fxpasses.graph.context import GraphContext
from fxpasses.rewrite.builder import Builder

Write = Callable[["SoftmaxRule", Node, Builder], Node]


class SoftmaxRule(fxpasses.Rule[fxpasses.Match]):
    """Matches `torch.softmax(x, dim)` at the torch level and writes what it is told."""

    name = "softmax_rule"

    def __init__(self, write: Write) -> None:
        self.write = write

    @property
    def is_anchor(self) -> Callable[[Node], bool]:
        return lambda node: node.target is torch.softmax

    def match(self, node: Node, context: GraphContext) -> fxpasses.Match:
        return fxpasses.Match(context, (node,))

    def insertion_point(self, match: fxpasses.Match) -> Node:
        return match.result

    def rewrite(self, match: fxpasses.Match, build: Builder) -> Node:
        return self.write(self, match.result, build)


def by_hand(rule: SoftmaxRule, node: Node, build: Builder, axis: int | None = None) -> Node:
    """exp(x) / sum(exp(x)), which is right."""
    given, dim = node.args
    assert isinstance(given, Node)
    exponential = build.call(torch.exp, (given,))
    total = build.call(torch.sum, (exponential, dim if axis is None else axis, True))
    return build.call(torch.div, (exponential, total))


def along_wrong_axis(rule: SoftmaxRule, node: Node, build: Builder) -> Node:
    """The same along axis 0, which has every metadata right and the values wrong."""
    return by_hand(rule, node, build, axis=0)


@contextlib.contextmanager
def registered(rule: fxpasses.Rule) -> Iterator[None]:
    """The rule in the registry for the time of a block."""
    fxpasses.register(rule)
    try:
        yield
    finally:
        fxpasses.unregister(rule.name)
