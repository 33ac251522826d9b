"""The driver: the one piece of code that mutates graphs.

For every graph (nested ones included), every pass and every anchor, in program order:

    match -> legality -> profitability -> rewrite -> checks -> replace -> count

Anything but the last step leaves the graph as it was: a rewrite only inserts, and what it has inserted is
taken out again when a check fails. A remark is recorded at every site, whatever happened there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.levels import nested_graphs
from fxpasses.graph.locations import location_of, module_of
from fxpasses.graph.metadata import value
from fxpasses.graph.modes import initial_modes_of_nested
from fxpasses.options import Options
from fxpasses.report import Remark, Report, Status
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.decline import Decline
from fxpasses.rewrite.graph_pass import GraphPass
from fxpasses.rewrite.registry import AnyRule, Pass
from fxpasses.rewrite.rule import Match

log = logging.getLogger("fxpasses")


@dataclass
class Driver:
    """Runs passes over a graph module, which it owns and changes in place.

    Attributes:
        passes: the passes, in order.
        options: what the user chose.
    """

    passes: list[Pass]
    options: Options
    _remarks: list[Remark] = field(default_factory=list)
    _seconds: dict[str, float] = field(default_factory=dict)
    _applied: int = 0
    _layout: Any = None

    def run(self, context: GraphContext) -> Report:
        """Rewrites the graph of `context` and those nested in it, and reports."""
        contexts = list(_with_nested(context))
        before = sum(len(each.graph.nodes) for each in contexts)
        level = context.level.value
        for each in self.passes:
            start = time.perf_counter()
            for graph in contexts:
                self._run_pass(each, graph)
            self._seconds[each.name] = time.perf_counter() - start
        if self._applied:
            for graph in reversed(contexts):
                graph.graph.lint()
                graph.module.recompile()
        return Report(
            remarks=tuple(self._remarks),
            seconds=dict(self._seconds),
            nodes_before=before,
            nodes_after=sum(len(each.graph.nodes) for each in contexts),
            level=level,
            layout=self._layout,
        )

    def _run_pass(self, current: Pass, context: GraphContext) -> None:
        if isinstance(current, GraphPass):
            self._run_graph_pass(current, context)
            return
        tests = [(rule, rule.is_anchor) for rule in current.rules]
        sites = [(node, rule) for node in context.graph.nodes for rule, test in tests if test(node)]
        done: set[Node] = set()
        for node, rule in sites:
            if node not in done and self._attempt(rule, node, context):
                done.add(node)

    def _run_graph_pass(self, current: GraphPass, context: GraphContext) -> None:
        outcome = current.run(context, self.options)
        self._applied += outcome.changed
        # The plan of the outermost graph stands for the compilation.
        self._layout = self._layout or outcome.layout
        for remark in outcome.remarks:
            self._add(remark)

    def _attempt(self, rule: AnyRule, node: Node, context: GraphContext) -> bool:
        """Takes one rule through its steps at one node; whether it was applied."""
        try:
            match = rule.match(node, context)
            if match is None:
                return False
            stage, declined = self._refusal(rule, match)
        except Exception as error:
            self._record_failure(rule, node, context, "check", error)
            return False
        if declined is not None:
            self._record(
                rule, node, context, "declined", declined.code, declined.message, stage, declined.node
            )
            return False
        assert isinstance(match, Match)
        return self._apply(rule, node, match)

    def _refusal(self, rule: AnyRule, match: Match | Decline) -> tuple[str, Decline | None]:
        """The first reason not to rewrite, and the step that gave it."""
        if isinstance(match, Decline):
            return "structure", match
        if (declined := rule.legality(match)) is not None:
            return "hazards" if declined.code in _HAZARDS else "check", declined
        if self.options.profit == "model" and (declined := rule.profitability(match)) is not None:
            return "profit", declined
        if self.options.limit is not None and self._applied >= self.options.limit:
            limit = self.options.limit
            return "profit", Decline("limit", "the limit of {} rewrites is reached", match.result, (limit,))
        return "applied", None

    def _apply(self, rule: AnyRule, node: Node, match: Match) -> bool:
        context = match.context
        result = match.result
        location, module = location_of(node), module_of(node)
        inserted: list[Node] = []
        try:
            build = Builder(context, rule.insertion_point(match), node)
            inserted = build.inserted
            replacement = rule.rewrite(match, build)
            _check_replacement(result, replacement)
            _check_order(result, replacement, inserted)
        except Exception as error:
            for each in reversed(inserted):
                context.graph.erase_node(each)
            self._record_failure(rule, node, context, "rewrite", error)
            return False
        names = ", ".join(each.name for each in match.nodes)
        _replace(match, replacement, takes_name=replacement in inserted)
        self._applied += 1
        self._add(
            Remark(
                rule=rule.name,
                status="applied",
                code="applied",
                message=f"replaced {names}",
                node=node.name,
                location=location,
                stage="applied",
                module=module,
                graph=context.path,
            )
        )
        return True

    def _record_failure(
        self, rule: AnyRule, node: Node, context: GraphContext, stage: str, error: Exception
    ) -> None:
        log.warning("%s failed at %s and left the graph as it was", rule.name, node.name, exc_info=error)
        message = f"{type(error).__name__}: {error}"
        self._record(rule, node, context, "failed", f"{stage}-error", message, stage, node)

    def _record(
        self,
        rule: AnyRule,
        node: Node,
        context: GraphContext,
        status: Status,
        code: str,
        message: str,
        stage: str,
        blamed: Node | None,
    ) -> None:
        self._add(
            Remark(
                rule=rule.name,
                status=status,
                code=code,
                message=message,
                node=node.name,
                location=location_of(node) or (location_of(blamed) if blamed is not None else ""),
                stage=stage,
                module=module_of(node),
                blamed=blamed.name if blamed is not None else "",
                graph=context.path,
            )
        )

    def _add(self, remark: Remark) -> None:
        self._remarks.append(remark)
        log.debug("%s", remark)


_HAZARDS = frozenset({"mutation", "grad-mode", "autocast", "functorch", "stream", "region"})


def _with_nested(context: GraphContext) -> Iterator[GraphContext]:
    """The context of a graph and those of the graphs that its operators run, outermost first."""
    yield context
    for path, child, reference in nested_graphs(context.module):
        modes = {reference: context.modes(reference)}
        modes.update({user: context.modes(user) for user in reference.users})
        nested = GraphContext(
            module=child,
            initial_modes=initial_modes_of_nested(reference, modes),
            executor=context.executor,
            weights_cached=context.weights_cached,
            trainable=_trainable_of_nested(context, child, reference),
            path=f"{context.path}.{path}".lstrip("."),
        )
        yield from _with_nested(nested)


def _trainable_of_nested(context: GraphContext, child: GraphModule, reference: Node) -> frozenset[str]:
    """The nested graph's placeholders that take the place of something that requires grad."""
    placeholders = child.graph.find_nodes(op="placeholder")
    names: set[str] = set()
    for user in reference.users:
        flat = [each for each in torch.utils._pytree.tree_leaves(user.args) if isinstance(each, Node)]
        operands = [each for each in flat if value(each) is not None or each.op == "placeholder"]
        operands = [each for each in operands if not _is_graph(context, each)]
        for outer, inner in zip(operands[-len(placeholders) :], placeholders, strict=False):
            if context.requires_grad(outer):
                names.add(inner.name)
    return frozenset(names)


def _is_graph(context: GraphContext, node: Node) -> bool:
    return node.op == "get_attr" and isinstance(
        getattr(context.module, str(node.target), None), torch.nn.Module
    )


def _check_replacement(old: Node, new: Node) -> None:
    """Raises unless the replacement has the shape, dtype and device of what it replaces."""
    if new is old:
        raise ValueError("the replacement is the node that it replaces")
    expected, found = value(old), value(new)
    if not isinstance(expected, torch.Tensor):
        return
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"the replacement gives {type(found).__name__}, not a tensor")
    for name in ("dtype", "device"):
        if getattr(expected, name) != getattr(found, name):
            raise TypeError(
                f"the replacement has {name} {getattr(found, name)}, not {getattr(expected, name)}"
            )
    if len(expected.shape) != len(found.shape) or any(
        isinstance(a, int) and isinstance(b, int) and a != b
        for a, b in zip(expected.shape, found.shape, strict=True)
    ):
        raise TypeError(f"the replacement has shape {tuple(found.shape)}, not {tuple(expected.shape)}")


def _check_order(old: Node, new: Node, inserted: list[Node]) -> None:
    """Raises unless everything stands behind what it reads, and the replacement before its readers."""
    for node in inserted:
        for given in node.all_input_nodes:
            if not given < node:
                raise ValueError(f"{node.name} was inserted before {given.name}, which it reads")
    for user in old.users:
        if not new < user:
            raise ValueError(f"{new.name} does not stand before {user.name}, which is to read it")


def _replace(match: Match, replacement: Node, takes_name: bool) -> None:
    """Puts the replacement in the result's place, under its name, and erases what nobody reads any more."""
    result, graph = match.result, match.context.graph
    result.replace_all_uses_with(replacement)
    replaced: list[Any] = [each for each in match.nodes if each is not result]
    name = result.name
    graph.erase_node(result)
    for node in reversed(replaced):
        if not node.users:
            graph.erase_node(node)
    # The name stays, so that a stack trace, an exported signature or a user's own lookup still finds it.
    # A node that was there before has a name of its own, which others may know.
    if takes_name:
        replacement.name = name
