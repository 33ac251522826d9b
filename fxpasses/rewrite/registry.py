"""The registry: passes and rules by name, and the order in which a pipeline runs them.

A rule registers alone and is then a pass of one rule. The order follows from what each pass declares in
`after`; where nothing is declared it is the order of registration. A cycle is refused at registration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxpasses.errors import UnknownRuleError, unknown_name
from fxpasses.options import Options
from fxpasses.rewrite.graph_pass import GraphPass
from fxpasses.rewrite.identity import fingerprint
from fxpasses.rewrite.rule import Rule
from fxpasses.version import __version__

AnyRule = Rule[Any]


@dataclass(frozen=True)
class RulePass:
    """A pass: a named group of rules that run together over each graph.

    Attributes:
        name: the pass's name, in options and timings.
        rules: the rules, tried in this order at each node.
        after: names of passes that must have run before, where they run at all.
        default: whether the pass is part of the default pipeline.
    """

    name: str
    rules: tuple[AnyRule, ...]
    after: tuple[str, ...] = ()
    default: bool = True

    def uuid(self) -> str:
        """A key that changes with the pass's rules and their order."""
        return fingerprint(self.name, [rule.uuid() for rule in self.rules])


Pass = RulePass | GraphPass


class Registry:
    """Passes by name."""

    def __init__(self) -> None:
        self._passes: dict[str, Pass] = {}

    def register(self, given: AnyRule | Pass) -> None:
        """Adds a rule or a pass.

        Raises:
            UnknownRuleError: the name is taken, or `after` would make a cycle; nothing is registered.
        """
        added = given if isinstance(given, (RulePass, GraphPass)) else _as_pass(given)
        taken = {added.name, *(rule.name for rule in added.rules)} & set(self.names())
        if taken:
            raise UnknownRuleError(f"{', '.join(sorted(taken))}: registered already; unregister it first.")
        _ordered({**self._passes, added.name: added})
        self._passes[added.name] = added

    def unregister(self, name: str) -> None:
        """Removes a pass.

        Raises:
            UnknownRuleError: there is none of that name.
        """
        if name not in self._passes:
            raise UnknownRuleError(unknown_name("pass", name, self._passes))
        del self._passes[name]

    def names(self) -> list[str]:
        """The names of all passes and rules."""
        return list(dict.fromkeys(name for pass_ in self._passes.values() for name in _names(pass_)))

    def pipeline(self, options: Options) -> list[Pass]:
        """The passes that the options select, in order, without the rules that they disable.

        Raises:
            UnknownRuleError: the options name a pass or rule that does not exist.
        """
        for name in (*(options.passes or ()), *options.disable):
            if name not in self.names():
                raise UnknownRuleError(unknown_name("pass or rule", name, self.names()))
        return list(_selected(_ordered(self._passes), options))


def pipeline_key(options: Options, registry: Registry | None = None) -> str:
    """A key of everything that decides how a graph is rewritten: versions, options, passes and their rules.

    Raises:
        UnknownRuleError: the options name a pass or rule that does not exist.
    """
    passes = (registry or REGISTRY).pipeline(options)
    return fingerprint(__version__, torch.__version__, options, [pass_.uuid() for pass_ in passes])


def _as_pass(rule: AnyRule) -> RulePass:
    return RulePass(rule.name, (rule,), rule.after, rule.default)


def _names(given: Pass) -> list[str]:
    return [given.name, *(rule.name for rule in given.rules)]


def _selected(passes: list[Pass], options: Options) -> Iterator[Pass]:
    for pass_ in passes:
        if pass_.name in options.disable:
            continue
        wanted = pass_.default if options.passes is None else pass_.name in options.passes
        if isinstance(pass_, GraphPass):
            if wanted:
                yield pass_
            continue
        rules = tuple(
            rule
            for rule in pass_.rules
            if rule.name not in options.disable and (wanted or rule.name in (options.passes or ()))
        )
        if rules:
            yield replace(pass_, rules=rules)


def _ordered(passes: dict[str, Pass]) -> list[Pass]:
    import networkx

    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_nodes_from(passes)
    for pass_ in passes.values():
        graph.add_edges_from((before, pass_.name) for before in pass_.after if before in passes)
    position = {name: index for index, name in enumerate(passes)}
    try:
        names = list(networkx.lexicographical_topological_sort(graph, key=position.__getitem__))
    except networkx.NetworkXUnfeasible as error:
        cycle = " -> ".join(edge[0] for edge in networkx.find_cycle(graph))
        raise UnknownRuleError(f"the passes cannot be ordered; `after` makes a cycle: {cycle}.") from error
    return [passes[name] for name in names]


REGISTRY = Registry()
"""The passes of this process."""


def register(given: AnyRule | Pass) -> None:
    """Adds a rule or a pass to those of this process."""
    REGISTRY.register(given)


def unregister(name: str) -> None:
    """Removes a pass from those of this process."""
    REGISTRY.unregister(name)
