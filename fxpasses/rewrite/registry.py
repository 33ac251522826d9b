"""The registry: passes and rules by name, and the order in which a pipeline runs them.

A rule registers alone and is then a pass of one rule. The order follows from what each pass declares in
`after`; where nothing is declared it is

    those that come with fxpasses, those of other packages, those that were registered, each in the order of
    registration; then those of the compilation (`Options.rules`) in the order given; then those with `last`

A cycle is refused at registration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxpasses.errors import UnknownOptionError, UnknownRuleError, unknown_name
from fxpasses.options import AddedRule, Options
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
        max_sweeps: how often the pass may go over a graph. 1: each site is looked at once. More: it goes on
            until a sweep changes nothing, and where the last of them still does, `FixpointError` names the
            rules that alternate. A sweep goes over the nodes that there are when it begins, in program order;
            at each, the rules are tried in their order until one is applied. What is written in one sweep
            is looked at in the next.
    """

    name: str
    rules: tuple[AnyRule, ...]
    after: tuple[str, ...] = ()
    default: bool = True
    max_sweeps: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.max_sweeps, int) or self.max_sweeps < 1:
            raise UnknownRuleError(
                f"{self.name}: max_sweeps takes a number from 1 up; got {self.max_sweeps!r}."
            )

    @property
    def last(self) -> bool:
        """Whether it runs after all passes that do not say so: no group of rules does."""
        return False

    def uuid(self) -> str:
        """A key that changes with the pass's rules and their order."""
        return fingerprint(self.name, [rule.uuid() for rule in self.rules], self.max_sweeps)


Pass = RulePass | GraphPass


OURS, REGISTERED = "fxpasses", "registered"
"""Where a pass may come from, besides another package."""


class Registry:
    """Passes by name."""

    def __init__(self) -> None:
        self._passes: dict[str, Pass] = {}
        self._sources: dict[str, str] = {}

    def register(self, given: AnyRule | Pass, source: str = REGISTERED) -> None:
        """Adds a rule or a pass.

        Args:
            given: the rule or pass.
            source: where it comes from: `OURS`, `REGISTERED`, or the name and version of a distribution.

        Raises:
            UnknownRuleError: the name is taken, or `after` would make a cycle; nothing is registered.
        """
        added = as_pass(given)
        taken = _taken(self._passes, added)
        if taken:
            raise UnknownRuleError(f"{taken}: registered already; unregister it first.")
        _ordered({**self._passes, added.name: added})
        self._passes[added.name], self._sources[added.name] = added, source
        self._passes = {name: self._passes[name] for name in sorted(self._passes, key=self._rank)}

    def _rank(self, name: str) -> int:
        return {OURS: 0, REGISTERED: 2}.get(self._sources[name], 1)

    def unregister(self, name: str) -> None:
        """Removes a pass.

        Raises:
            UnknownRuleError: there is none of that name.
        """
        if name not in self._passes:
            raise UnknownRuleError(unknown_name("pass", name, self._passes))
        del self._passes[name], self._sources[name]

    def names(self) -> list[str]:
        """The names of all passes and rules."""
        return _all_names(self._passes)

    def rule(self, name: str) -> AnyRule | None:
        """The rule of a name, or None where there is none."""
        rules = (rule for pass_ in self._passes.values() for rule in pass_.rules)
        return next((rule for rule in rules if rule.name == name), None)

    def source(self, name: str) -> str:
        """Where a pass comes from.

        Raises:
            KeyError: there is none of that name.
        """
        return self._sources[name]

    def pipeline(self, options: Options) -> list[Pass]:
        """The passes that the options select, in order, without the rules that they disable.

        Raises:
            UnknownRuleError: the options name a pass or rule that does not exist, or add one whose name is
                taken, or whose `after` makes a cycle.
            UnknownOptionError: what they add is neither a rule nor a pass.
        """
        passes = _with_added(self._passes, options.rules)
        names = _all_names(passes)
        for name in (*(options.passes or ()), *options.disable):
            if name not in names:
                raise UnknownRuleError(unknown_name("pass or rule", name, names))
        return list(_selected(_ordered(passes), options))


def pipeline_key(options: Options, registry: Registry | None = None) -> str:
    """A key of everything that decides how a graph is rewritten: versions, options, passes and their rules.

    Those of other packages are known once `fxpasses.pipeline.register_all` has run.

    Raises:
        UnknownRuleError: the options name a pass or rule that does not exist.
    """
    passes = (registry or REGISTRY).pipeline(options)
    return fingerprint(__version__, torch.__version__, options, [pass_.uuid() for pass_ in passes])


def as_pass(given: AnyRule | Pass) -> Pass:
    """A pass, or the pass that a rule is by itself."""
    if isinstance(given, (RulePass, GraphPass)):
        return given
    return RulePass(given.name, (given,), given.after, given.default, given.max_sweeps)


def _with_added(passes: dict[str, Pass], rules: tuple[AddedRule, ...]) -> dict[str, Pass]:
    """The passes, and those of one compilation, which run whatever their `default` says."""
    found = dict(passes)
    for rule in rules:
        if not isinstance(rule, (Rule, RulePass, GraphPass)):
            raise UnknownOptionError(
                f"option 'rules' takes rules and passes (fxpasses.Rule, RulePass, GraphPass); got {rule!r}."
            )
        added = as_pass(rule)
        if taken := _taken(found, added):
            where = "registered already" if _taken(passes, added) else "given twice"
            raise UnknownRuleError(
                f"{taken}: {where}; a rule in options={{'rules': [...]}} needs a name of its own."
            )
        found[added.name] = replace(added, default=True)
    return found


def _taken(passes: dict[str, Pass], added: Pass) -> str:
    """Those names of a pass and its rules that others have, in words."""
    return ", ".join(sorted(set(names_of(added)) & set(_all_names(passes))))


def _all_names(passes: dict[str, Pass]) -> list[str]:
    return list(dict.fromkeys(name for pass_ in passes.values() for name in names_of(pass_)))


def names_of(given: Pass) -> list[str]:
    """The names of a pass and its rules."""
    return [given.name, *(rule.name for rule in given.rules)]


def _selected(passes: list[Pass], options: Options) -> Iterator[Pass]:
    for pass_ in passes:
        if pass_.name in options.disable:
            continue
        wanted = pass_.default if options.passes is None else pass_.name in options.passes
        if isinstance(pass_, GraphPass):
            if wanted and (pass_.asked is None or pass_.asked(options)):
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
    position = {name: (pass_.last, index) for index, (name, pass_) in enumerate(passes.items())}
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
