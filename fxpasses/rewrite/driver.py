"""The driver: the one piece of code that mutates graphs.

For every pass, every graph (nested ones included) and every anchor, in program order, once or in several
sweeps (`RulePass.max_sweeps`):

    match -> legality -> profitability -> rewrite -> checks -> replace -> count

Anything but the last step leaves the graph as it was: a rewrite only inserts, and what it has inserted is
taken out again when a check fails (`fxpasses.rewrite.verify` has the checks). A remark is recorded at every
site, whatever happened there. An application keeps the two subgraphs only where somebody asked for them
(`verify="numerics"`, `keep_repro`): taking them out costs about as much as the rewrite itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule, Node

from fxpasses.errors import FixpointError
from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.levels import nested_graphs
from fxpasses.graph.locations import location_of, module_of
from fxpasses.graph.metadata import value
from fxpasses.graph.modes import initial_modes_of_nested
from fxpasses.graph.views import BATCH_NORMS, is_batch_norm
from fxpasses.options import Options
from fxpasses.report.application import Application
from fxpasses.report.data import Remark, SizeBound, Status, optimised_for
from fxpasses.report.drawer import draw_graphs, draw_result
from fxpasses.report.report import Report
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.extraction import extract
from fxpasses.rewrite.graph_pass import GraphPass
from fxpasses.rewrite.limits import PROCESS
from fxpasses.rewrite.numerics import difference_of
from fxpasses.rewrite.registry import AnyRule, Pass, RulePass, names_of
from fxpasses.rewrite.rule import Match, ranges_of
from fxpasses.rewrite.sweeps import Sweeps
from fxpasses.rewrite.verify import GuardCount, check_replacement, structural_fault
from fxpasses.torch_internals.bisector import bisector_disables
from fxpasses.torch_internals.pytree import tree_leaves

if TYPE_CHECKING:
    from fxpasses.report.layout_plan import LayoutPlan
    from fxpasses.report.precision import Precision

log = logging.getLogger("fxpasses")


@dataclass
class Driver:
    """Runs passes over a graph module, which it owns and changes in place.

    Attributes:
        passes: the passes, in order.
        options: what the user chose.
        wanted: names of rules that are applied whether or not it pays.
    """

    passes: list[Pass]
    options: Options
    wanted: frozenset[str] = frozenset()
    _remarks: list[Remark] = field(default_factory=list)
    _seconds: dict[str, float] = field(default_factory=dict)
    _applications: list[Application] = field(default_factory=list)
    _misses: list[tuple[Node, Remark]] = field(default_factory=list)
    _erased: set[Node] = field(default_factory=set)
    _applied: int = 0
    _guards_asked: int = 0
    _layout: LayoutPlan | None = None
    _precision: Precision | None = None

    def run(self, context: GraphContext) -> Report:
        """Rewrites the graph of `context` and those nested in it, and reports.

        Raises:
            UnknownOptionError: the environment sets a limit that is no number.
            FixpointError: a pass was to run until nothing changes, and changes the graph for ever.
        """
        PROCESS.check()
        contexts = list(_with_nested(context))
        before = sum(len(graph.graph.nodes) for graph in contexts)
        norms = _count_norms(contexts)
        level = context.level.value
        drawings = draw_graphs(contexts, "before")
        for pass_ in self.passes:
            start = time.perf_counter()
            for graph in contexts:
                self._run_pass(pass_, graph)
            self._seconds[pass_.name] = time.perf_counter() - start
        if self._applied:
            for graph in reversed(contexts):
                graph.graph.lint()
                graph.module.recompile()
        return Report(
            remarks=tuple(self._remarks),
            seconds=dict(self._seconds),
            nodes_before=before,
            nodes_after=sum(len(graph.graph.nodes) for graph in contexts),
            norms=norms,
            norms_left=_count_norms(contexts),
            level=level,
            applications=tuple(self._applications),
            layout=self._layout,
            precision=self._precision,
            io=self._layout.boundary if self._layout is not None and self.options.io == "any" else (),
            graphs=draw_result(drawings, contexts, self._remarks, self._layout),
            sizes=optimised_for(self._remarks),
            rules=tuple(dict.fromkeys(name for pass_ in self.passes for name in names_of(pass_))),
        )

    def _run_pass(self, current: Pass, context: GraphContext) -> None:
        if isinstance(current, GraphPass):
            self._run_graph_pass(current, context)
        elif current.max_sweeps == 1:
            self._sweep(current, context)
        else:
            self._sweep_to_fixpoint(current, context)

    def _sweep_to_fixpoint(self, current: RulePass, context: GraphContext) -> None:
        """Sweeps until nothing changes. Sites that were declined are told of as the last sweep sees them."""
        earlier, sweeps = self._remarks, Sweeps(current.name)
        while True:
            self._remarks = []
            applied = self._applied
            self._sweep(current, context)
            if self._applied == applied:
                break
            sweeps.add(self._remarks)
            if len(sweeps) == current.max_sweeps:
                raise FixpointError(sweeps.message())
        self._remarks = [*earlier, *sweeps.with_last(self._remarks)]

    def _sweep(self, current: RulePass, context: GraphContext) -> None:
        """Looks once at each node that there is."""
        tests = [(rule, rule.is_anchor) for rule in current.rules]
        sites = [(node, rule) for node in context.graph.nodes for rule, test in tests if test(node)]
        done: set[Node] = set()
        for node, rule in sites:
            if node not in done and node not in self._erased and self._attempt(rule, node, context):
                done.add(node)
        # A node that looked like the end of a pattern may have been found inside one.
        inside = {id(remark) for node, remark in self._misses if node in self._erased}
        self._remarks = [remark for remark in self._remarks if id(remark) not in inside]
        self._misses.clear()

    def _run_graph_pass(self, current: GraphPass, context: GraphContext) -> None:
        context.forget_effects()  # which rewrites may have changed
        outcome = current.run(context, self.options)
        self._applied += outcome.changed
        # What is told of the outermost graph stands for the compilation.
        self._layout = self._layout or outcome.layout
        self._precision = self._precision or outcome.precision
        for remark in outcome.remarks:
            self._add(remark)

    def _attempt(self, rule: AnyRule, node: Node, context: GraphContext) -> bool:
        """Takes one rule through its steps at one node; whether it was applied."""
        guards = GuardCount.of(context) if self.options.verify != "off" else None
        self._guards_asked = 0
        try:
            match = rule.match(node, context)
            if match is None:
                return False
            stage, declined = self._refusal(rule, match)
        except Exception as error:
            self._record_failure(rule, node, context, "check", error)
            return False
        if declined is not None:
            figures = _figures(rule, match) if isinstance(match, Match) else {}
            site = _Site.of(rule, node, context, match, figures)
            remark = site.remark("declined", declined.code, declined.message, stage, declined)
            if declined.sizes:
                remark = replace(remark, sizes=tuple(map(SizeBound.of, declined.sizes)))
            if stage == "structure":
                self._misses.append((node, remark))
            self._add(remark)
            return False
        assert isinstance(match, Match)
        if guards is not None:
            guards = replace(guards, before=guards.before + self._guards_asked)
        return self._apply(rule, node, match, guards)

    def _refusal(self, rule: AnyRule, match: Match | Decline) -> tuple[str, Decline | None]:
        """The first reason not to rewrite, and the step that gave it."""
        if isinstance(match, Decline):
            return "structure", match
        if (declined := rule.legality(match)) is not None:
            return "hazards" if declined.code in _HAZARDS else "check", declined
        if not self._whatever_it_costs(rule) and (declined := rule.profitability(match)) is not None:
            return "profit", declined
        if not self._whatever_it_costs(rule) and (declined := self._outside_sizes(rule, match)) is not None:
            return "profit", declined
        if self.options.limit is not None and self._applied >= self.options.limit:
            limit = self.options.limit
            return "profit", Decline("limit", "the limit of {} rewrites is reached", match.result, (limit,))
        if not PROCESS.allows():
            message = "the process's limit of {} rewrites is reached"
            return "profit", Decline("limit", message, match.result, (PROCESS.limit,))
        if bisector_disables(lambda: f"{rule.name} at {match.result.name} ({location_of(match.result)})"):
            return "profit", Decline("limit", "torch's compiler bisector has switched it off", match.result)
        return "applied", None

    def _outside_sizes(self, rule: AnyRule, match: Match) -> Decline | None:
        """Whether a size is outside the range for which the rule says that it pays."""
        sizes = ranges_of(rule, match)
        # What a rule asks to be guarded is no guard that slipped in.
        guards = GuardCount.of(match.context) if sizes and self.options.verify != "off" else None
        outside = next((each for each in sizes if not each.holds()), None)
        self._guards_asked = guards.added if guards is not None else 0
        if outside is None:
            return None
        found = "not known here" if outside.seen is None else f"{outside.seen} here"
        message = "it pays for {}, and that is {}"
        return Decline("sizes", message, match.result, (outside, found), sizes=(outside,))

    def _apply(self, rule: AnyRule, node: Node, match: Match, guards: GuardCount | None) -> bool:
        context = match.context
        site = _Site.of(rule, node, context, match, _figures(rule, match))
        inserted: list[Node] = []
        try:
            reason = self._reason(rule, match)
            sizes = () if self._whatever_it_costs(rule) else ranges_of(rule, match)
            build = Builder(context, rule.insertion_point(match), node, rule=rule.name, replaced=match.nodes)
            inserted = build.inserted
            written = rule.rewrite(match, build)
            replacements = (written,) if isinstance(written, Node) else tuple(written)
            check_replacement(match, replacements, inserted)
            application = self._kept(rule, match, replacements, inserted)
            fault = self._fault(match, replacements, inserted, guards, application)
        except Exception as error:
            _roll_back(context, inserted)
            self._record_failure(rule, node, context, "rewrite", error)
            return False
        if fault is not None:
            _roll_back(context, inserted)
            log.warning("%s was rolled back at %s: %s", rule.name, node.name, fault[1])
            self._add(site.remark("failed", *fault, "verify"))
            return False
        names = ", ".join(node.name for node in match.nodes)
        self._erased.update(_replace(match, replacements, inserted))
        self._applied += 1
        remark = site.remark("applied", "applied", f"replaced {names}{reason}", "applied")
        if sizes:
            remark = replace(remark, sizes=tuple(map(SizeBound.of, sizes)))
        self._add(remark)
        PROCESS.note(remark, application)
        return True

    def _whatever_it_costs(self, rule: AnyRule) -> str:
        """Who wants the rule applied wherever it is legal; empty where it has to pay."""
        if self.options.profit == "always":
            return "profit='always'"
        return "inductor's own setting" if rule.name in self.wanted else ""

    def _reason(self, rule: AnyRule, match: Match) -> str:
        """Why the rewrite is done: what it saves, or that somebody wants it whatever it costs."""
        if (wish := self._whatever_it_costs(rule)) and (declined := rule.profitability(match)) is not None:
            return f": {wish}, against the cost model ({declined.code}: {declined.message})"
        benefit = rule.benefit(match)
        return f": {benefit}" if benefit else ""

    def _kept(
        self, rule: AnyRule, match: Match, replacements: tuple[Node, ...], inserted: list[Node]
    ) -> Application | None:
        """The application's subgraphs, where somebody wants them; the report keeps them."""
        if not (self.options.keep_repro or self.options.verify == "numerics" or PROCESS.wants_repros):
            return None
        try:
            application = extract(rule.name, match, replacements, inserted)
        except Exception:
            if self.options.verify == "numerics":
                raise
            log.warning("what %s replaced at %s cannot be kept", rule.name, match.result.name, exc_info=True)
            return None
        self._applications.append(application)
        return application

    def _fault(
        self,
        match: Match,
        replacements: tuple[Node, ...],
        inserted: list[Node],
        guards: GuardCount | None,
        application: Application | None,
    ) -> tuple[str, str] | None:
        """The code and the words of the first check that the replacement fails."""
        if guards is None:
            return None
        fault = structural_fault(match, replacements, inserted, guards)
        if fault is not None:
            return "verify-structure", fault
        if self.options.verify == "numerics" and application is not None:
            fault = difference_of(application)
        return None if fault is None else ("verify-numerics", fault)

    def _record_failure(
        self, rule: AnyRule, node: Node, context: GraphContext, stage: str, error: Exception
    ) -> None:
        log.warning("%s failed at %s and left the graph as it was", rule.name, node.name, exc_info=error)
        message = f"{type(error).__name__}: {error}"
        self._add(_Site.of(rule, node, context).remark("failed", f"{stage}-error", message, stage))

    def _add(self, remark: Remark) -> None:
        self._remarks.append(remark)
        log.debug("%s", remark)


@dataclass(frozen=True)
class _Site:
    """Where a rule looks: what is known of the anchor before the graph changes."""

    rule: AnyRule
    node: str
    location: str
    module: str
    graph: str
    size: int
    figures: Mapping[str, float]

    @staticmethod
    def of(
        rule: AnyRule,
        node: Node,
        context: GraphContext,
        found: Match | Decline | None = None,
        figures: Mapping[str, float] | None = None,
    ) -> _Site:
        size = (found.pattern_size if found is not None else 0) or rule.pattern_size
        return _Site(rule, node.name, location_of(node), module_of(node), context.path, size, figures or {})

    def remark(
        self, status: Status, code: str, message: str, stage: str, declined: Decline | None = None
    ) -> Remark:
        """A remark on the site; where a rule declined, with the node to blame and how far it matched."""
        blamed = declined.node if declined is not None else None
        partly = declined is not None and stage == "structure"
        return Remark(
            rule=self.rule.name,
            status=status,
            code=code,
            message=message,
            node=self.node,
            location=self.location or (location_of(blamed) if blamed is not None else ""),
            stage=stage,
            module=self.module,
            blamed=blamed.name if blamed is not None else (self.node if status == "failed" else ""),
            graph=self.graph,
            matched=declined.matched if partly and declined is not None else self.size,
            pattern_size=self.size,
            figures=self.figures,
        )


_HAZARDS = frozenset({"mutation", "grad-mode", "autocast", "functorch", "stream", "region"})


def _count_norms(contexts: Sequence[GraphContext]) -> int:
    """How many batch norms graphs have."""
    count = 0
    for context in contexts:
        modules = context.graph.find_nodes(op="call_module", sort=False)
        count += sum(map(is_batch_norm, modules))
        for target in BATCH_NORMS:
            count += len(context.graph.find_nodes(op="call_function", target=target, sort=False))
    return count


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
        flat = [leaf for leaf in tree_leaves(user.args) if isinstance(leaf, Node)]
        operands = [operand for operand in flat if value(operand) is not None or operand.op == "placeholder"]
        operands = [operand for operand in operands if not _is_graph(context, operand)]
        for outer, inner in zip(operands[-len(placeholders) :], placeholders, strict=False):
            if context.requires_grad(outer):
                names.add(inner.name)
    return frozenset(names)


def _is_graph(context: GraphContext, node: Node) -> bool:
    return node.op == "get_attr" and isinstance(
        getattr(context.module, str(node.target), None), torch.nn.Module
    )


def _figures(rule: AnyRule, match: Match) -> Mapping[str, float]:
    """What the rewrite saves and costs; empty where the site is such that it cannot be told."""
    try:
        return dict(rule.figures(match))
    except Exception:
        log.debug("%s has no figures for %s", rule.name, match.result.name, exc_info=True)
        return {}


def _roll_back(context: GraphContext, inserted: list[Node]) -> None:
    for node in reversed(inserted):
        context.graph.erase_node(node)


def _replace(match: Match, replacements: tuple[Node, ...], inserted: list[Node]) -> list[Node]:
    """Puts the replacements in the results' places, under their names, and erases what nobody reads any more.

    Returns:
        The nodes that were erased.
    """
    graph = match.context.graph
    for result, replacement in zip(match.results, replacements, strict=True):
        if replacement in inserted:
            match.context.stand_in(replacement, result)
        result.replace_all_uses_with(replacement)
    erased: list[Node] = []
    for node in reversed(match.nodes):
        if not node.users:
            graph.erase_node(node)
            erased.append(node)
    new = set(inserted)
    for result, replacement in zip(match.results, replacements, strict=True):
        # The name stays, so that a stack trace, an exported signature or a user's own lookup still finds it.
        # A node that was there before has a name of its own, which others may know.
        if replacement in new and result in erased:
            replacement.name = result.name
            new.discard(replacement)
    return erased
