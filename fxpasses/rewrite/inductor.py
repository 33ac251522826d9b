"""Inductor's pattern matcher as a pass: its `PatternMatcherPass`es run here, counted and remarked upon.

    fxpasses.register(fxpasses.from_inductor("my_patterns", my_pass))

What can be known from outside is recorded: a pattern that was found and whose `extra_check` refused
(`extra-check`), a handler that was called and left the graph as it was (`handler`), and what was replaced.
A pattern that was not found, or that crosses a mutation or a stream, is not: inductor says nothing there.
Nor are such rewrites verified or rolled back, since the matcher changes the graph itself. Patterns are
matched at the level that they were written for, which is ATen for nearly all of inductor's.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fxpasses.errors import UnknownRuleError
from fxpasses.graph.context import GraphContext
from fxpasses.graph.locations import location_of, module_of
from fxpasses.graph.metadata import has_value
from fxpasses.options import Options
from fxpasses.report.data import Remark, Status
from fxpasses.rewrite.graph_pass import GraphPass, Outcome
from fxpasses.torch_internals.graphs import is_erased
from fxpasses.torch_internals.inductor import is_pattern_matcher_pass


def from_inductor(
    name: str, matcher: Any, *, after: tuple[str, ...] = (), default: bool = False
) -> GraphPass:
    """A pass that runs an inductor `PatternMatcherPass`.

    Args:
        name: the pass's name, in counters, remarks and options.
        matcher: the `torch._inductor.pattern_matcher.PatternMatcherPass`; it is not changed.
        after: names of passes that must have run before, where they run at all.
        default: whether it is part of the default pipeline once it is registered.

    Raises:
        UnknownRuleError: something else was given.
    """
    if not is_pattern_matcher_pass(matcher):
        raise UnknownRuleError(
            f"from_inductor takes a torch._inductor.pattern_matcher.PatternMatcherPass; got {matcher!r}."
        )

    def run(context: GraphContext, _: Options) -> Outcome:
        return _MatcherRun(name, context).of(matcher)

    return GraphPass(name, run, after, default)


@dataclass
class _MatcherRun:
    """One run of a PatternMatcherPass over one graph, of which it keeps the remarks."""

    name: str
    context: GraphContext
    remarks: list[Remark] = field(default_factory=list)

    def of(self, matcher: Any) -> Outcome:
        known = set(self.context.graph.nodes)
        watched = copy.copy(matcher)
        watched.patterns = type(matcher.patterns)(
            list,
            {key: [self._watched(entry) for entry in entries] for key, entries in matcher.patterns.items()},
        )
        watched.apply(self.context.module)
        self._adopt([node for node in self.context.graph.nodes if node not in known])
        changed = any(remark.status == "applied" for remark in self.remarks)
        return Outcome(tuple(self.remarks), changed)

    def _watched(self, entry: Any) -> Any:
        """A copy of a pattern's entry that tells what becomes of its matches."""
        twin = copy.copy(entry)
        object.__setattr__(twin, "extra_check", self._check(entry.extra_check))
        object.__setattr__(twin, "apply", self._apply(entry.apply))
        return twin

    def _check(self, check: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def checked(match: Any) -> Any:
            answer = check(match)
            if not answer:
                self._remark("declined", "extra-check", "the pattern's extra_check says no", match)
            return answer

        return checked

    def _apply(self, apply: Callable[..., None]) -> Callable[..., None]:
        def applied(match: Any, graph: torch.fx.Graph, node: Node) -> None:
            remark = _remark_of(self, "applied", "applied", f"replaced {_names(match)}", match)
            apply(match, graph, node)
            if any(is_erased(matched) for matched in match.nodes) or not match.output_node().users:
                self.remarks.append(remark)
                return
            message = "the handler left the graph as it was"
            self.remarks.append(
                dataclasses.replace(remark, status="declined", code="handler", message=message, stage="check")
            )

        return applied

    def _remark(self, status: Status, code: str, message: str, match: Any) -> None:
        self.remarks.append(_remark_of(self, status, code, message, match))

    def _adopt(self, nodes: list[Node]) -> None:
        """Gives new nodes what every node has: metadata, and the modes of what they read."""
        for node in nodes:
            read = node.all_input_nodes
            self.context.adopt(node, self.context.modes(read[-1]) if read else self.context.initial_modes)
            if not has_value(node) and node.op in ("call_function", "call_method"):
                function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
                node.meta["val"] = self.context.evaluator.call(function, node.args, dict(node.kwargs))


def _remark_of(run: _MatcherRun, status: Status, code: str, message: str, match: Any) -> Remark:
    node = match.output_node()
    size = len(match.nodes)
    return Remark(
        rule=run.name,
        status=status,
        code=code,
        message=message,
        node=node.name,
        location=location_of(node),
        stage="applied" if status == "applied" else "check",
        module=module_of(node),
        graph=run.context.path,
        matched=size,
        pattern_size=size,
    )


def _names(match: Any) -> str:
    return ", ".join(node.name for node in match.nodes)
