"""Rules: what to match, when it is legal, when it pays, what to write instead.

A rule declares; the driver does. A rule never counts, lints, erases, propagates metadata or rolls back, so
it cannot forget to. Its questions may be answered with a `Decline` that says why:

    match(node, context)  -> Match | Decline | None    None: this node is nothing to the rule
    legality(match)       -> Decline | None            never traded
    profitability(match)  -> Decline | None            a cost model's answer; `profit="always"` skips it
    pays_for(match)       -> ranges of sizes           outside of which it does not pay
    rewrite(match, build) -> Node                      inserts nodes, returns the one that takes over
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.sizes import SizeRange
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.identity import fingerprint


@dataclass(frozen=True)
class Match:
    """A site where a rule's structure was found. Rules derive from it and add what they found.

    Attributes:
        context: the graph that holds the site.
        nodes: the nodes that the rewrite replaces, in program order; the last one is the result.
    """

    context: GraphContext
    nodes: tuple[Node, ...]

    @property
    def result(self) -> Node:
        """The node whose value the replacement takes over; the last one where there are several."""
        return self.nodes[-1]

    @property
    def pattern_size(self) -> int:
        """How many operators the pattern has here; 0 where the rule's own `pattern_size` says it."""
        return 0

    @property
    def results(self) -> tuple[Node, ...]:
        """All nodes whose values the replacement takes over, in the order in which it returns them."""
        return (self.result,)


M = TypeVar("M", bound=Match)


class Rule(abc.ABC, Generic[M]):
    """A declaration of one rewrite. Derive, fill in the four questions, and register it.

    Attributes:
        name: the rule's name, in counters, remarks and options.
        after: names of rules or passes that must have run before, where they run at all.
        default: whether the rule is part of the default pipeline.
        max_sweeps: how often it may go over a graph, until it changes nothing; see `RulePass`.
        pattern_size: how many operators the whole pattern has, for messages.
        folds_weights: whether the rewrite computes a weight from parameters, in every call that trains.
    """

    name: str
    after: tuple[str, ...] = ()
    default: bool = True
    max_sweeps: int = 1
    pattern_size: int = 1
    folds_weights: bool = False

    @property
    @abc.abstractmethod
    def is_anchor(self) -> Callable[[Node], bool]:
        """A cheap test for nodes at which the pattern may end."""

    @abc.abstractmethod
    def match(self, node: Node, context: GraphContext) -> M | Decline | None:
        """Looks for the pattern that ends in `node`."""

    def legality(self, match: M) -> Decline | None:
        """Whether the rewrite gives eager's answers here."""
        return None

    def profitability(self, match: M) -> Decline | None:
        """Whether the rewrite pays here."""
        return None

    def pays_for(self, match: M) -> SizeRange | Sequence[SizeRange]:
        """The sizes for which the rewrite pays, where it does not pay for all: each must be in its range.

        Unlike `profitability` it leaves the answer to the driver, which declines with ``"sizes"`` outside the
        ranges, and has the report say for which sizes the graph was optimised.
        """
        return ()

    def benefit(self, match: M) -> str:
        """What the rewrite saves here, in words with figures, for the remark; empty where nobody counted.

        It is asked before the graph changes.
        """
        return ""

    def figures(self, match: M) -> Mapping[str, float]:
        """What the rewrite saves and costs here, as `fxpasses.Remark` has it; empty where nobody counted.

        It is asked before the graph changes, also where the rewrite is refused.
        """
        return {}

    @abc.abstractmethod
    def insertion_point(self, match: M) -> Node:
        """The node before which the replacement is written; legality has passed."""

    @abc.abstractmethod
    def rewrite(self, match: M, build: Builder) -> Node | tuple[Node, ...]:
        """Writes the replacement and returns its result, or one for each of `match.results`."""

    def specimens(self) -> Any:
        """What `fxpasses.testing.fuzz` tests the rule with: a hypothesis strategy of its `Specimen`s.

        Where it is None, `fuzz` must be given one.
        """
        return None

    def uuid(self) -> str:
        """A key that changes with the rule's code, what its closures hold, and its fields, and only then.

        Fields whose names begin with an underscore are caches, and no part of it.
        """
        return fingerprint(self)


def ranges_of(rule: Rule[M], match: M) -> tuple[SizeRange, ...]:
    """The sizes for which a rewrite pays, where a rule gives one range or several."""
    given = rule.pays_for(match)
    return (given,) if isinstance(given, SizeRange) else tuple(given)


def first_decline(match: M, checks: Sequence[Callable[[M], Decline | None]]) -> Decline | None:
    """The first reason against a match among those of several checks, in their order."""
    return next((found for check in checks if (found := check(match)) is not None), None)
