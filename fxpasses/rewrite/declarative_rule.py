"""The rule that two functions make: pattern(x, ...) == replacement(x, ...), wherever `check` allows it.

    match          a node is the pattern's last operation; `Search` finds which node is each of the others,
                   and which operand each parameter: a `PatternMatch`, or how far the nearest variant came
    legality       hazards of any pattern, no promotion that the examples do not have, then `check`
    profitability  `profit`
    rewrite        the replacement, traced on what the parameters took here, and written node by node

The graphs that are looked for are `fxpasses.rewrite.variants`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph.canonical import operator_of
from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.levels import Level
from fxpasses.graph.operands import Operand, tensor_of
from fxpasses.graph.sizes import SizeRange
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.hazards import first_hazard, place_of
from fxpasses.rewrite.pattern import Found, Pattern, Search, operand_nodes
from fxpasses.rewrite.recording import record, write
from fxpasses.rewrite.rule import Match, Rule
from fxpasses.rewrite.variants import Variant, examples_by_parameter, variants_of

Answer = Decline | bool | None
"""What a check says: a `Decline` or False to decline, anything else to go on."""


@dataclass(frozen=True)
class PatternMatch(Match):
    """A site where a declarative rule's pattern was found.

    Attributes:
        pattern: the variant that was found.
        found: which node each operation is, and what each parameter took.
    """

    pattern: Pattern
    found: Found

    @property
    def results(self) -> tuple[Node, ...]:
        """The nodes that the replacement takes over."""
        return tuple(self.found.nodes[operation] for operation in self.pattern.results)

    @property
    def pattern_size(self) -> int:
        """How many operators the pattern has at this level."""
        return self.pattern.size

    def __getitem__(self, name: str) -> Any:
        """What a parameter took: a node, a module's tensor, a number, or None where it is absent."""
        if name in self.pattern.absent:
            return None
        return self.found.operands[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The fake tensor that a parameter took."""
        found = tensor_of(self[name])
        assert found is not None, f"{name} is not a tensor here"
        return found

    @functools.cached_property
    def place(self) -> Node | Decline:
        """The node before which the replacement may stand, or why there is none."""
        return place_of(self.nodes, self.results, self.operands)

    @property
    def operands(self) -> list[Operand]:
        """The tensors that the parameters took."""
        return operand_nodes(self.found.operands.values())

    def decline(self, code: str, message: str, parameter: str | None = None) -> Decline:
        """A reason not to rewrite.

        Args:
            code: a stable reason code, such as ``"weight-shape"``.
            message: the reason in words.
            parameter: the parameter to blame; otherwise the result is.
        """
        blamed = self.found.operands.get(parameter) if parameter else None
        return Decline(code, "{}", blamed if isinstance(blamed, Node) else self.result, (message,))


class DeclarativeRule(Rule[PatternMatch]):
    """A rule made of functions; `rewrite` makes one from a class."""

    def __init__(
        self,
        name: str,
        pattern: Callable[..., Any],
        replacement: Callable[..., Any],
        examples: Sequence[Any],
        *,
        check: Callable[[PatternMatch], Answer] | None = None,
        profit: Callable[[PatternMatch], Answer] | None = None,
        pays_for: Callable[[PatternMatch], SizeRange | Sequence[SizeRange]] | None = None,
        after: tuple[str, ...] = (),
        default: bool = True,
        max_sweeps: int = 1,
    ) -> None:
        """See `rewrite`, which has the same arguments.

        Raises:
            PatternError: the functions or the examples do not fit together, or cannot be traced.
        """
        self.name, self.after, self.default, self.max_sweeps = name, after, default, max_sweeps
        self.pattern, self.replacement, self.check, self.profit = pattern, replacement, check, profit
        self.ranges = pays_for
        self.examples = examples_by_parameter(name, pattern, replacement, examples)
        self._variants: dict[Level, tuple[Variant, ...]] = {}
        self.pattern_size = max(variant.pattern.size for variant in self.variants(Level.TORCH))

    def variants(self, level: Level) -> tuple[Variant, ...]:
        """What is looked for in graphs of a level; traced when first asked for.

        Raises:
            PatternError: the pattern cannot be traced.
        """
        if level not in self._variants:
            self._variants[level] = tuple(variants_of(self, level))
        return self._variants[level]

    @property
    def is_anchor(self) -> Callable[[Node], bool]:
        """Every call of an operator with which the pattern ends, at any level."""
        anchors = {variant.pattern.anchor for level in Level for variant in self.variants(level)}
        # 1 - x is a subtraction by its target, and a reversed one by its arguments.
        anchors |= {"aten::sub"} if "aten::rsub" in anchors else set()
        known: dict[object, bool] = {}

        def is_anchor(node: Node) -> bool:
            if node.op != "call_function":
                return operator_of(node) in anchors
            found = known.get(node.target)
            if found is None:
                found = known[node.target] = operator_of(node) in anchors
            return found

        return is_anchor

    def match(self, node: Node, context: GraphContext) -> PatternMatch | Decline | None:
        """The first variant that is found, or the nearest miss where at least half of it was."""
        nearest: Decline | None = None
        operator = operator_of(node)
        for variant in self.variants(context.level):
            pattern = variant.pattern
            if pattern.anchor != operator and operator != "aten::sub":
                continue
            found = Search(pattern).at(node)
            if isinstance(found, Found):
                return PatternMatch(context, tuple(sorted(found.nodes.values())), pattern, found)
            if nearest is None or found.matched > nearest.matched:
                nearest = Decline(
                    found.code, found.template, found.node, found.details, found.matched, pattern.size
                )
        is_near = nearest is not None and (
            nearest.matched * 2 >= nearest.pattern_size or self.pattern_size == 1
        )
        return nearest if is_near else None

    def legality(self, match: PatternMatch) -> Decline | None:
        """What holds for every pattern, then the rule's own check."""
        aliasing = next(
            variant.aliasing
            for variant in self.variants(match.context.level)
            if variant.pattern is match.pattern
        )
        hazard = first_hazard(match, match.place, match.operands, match.found.operands, aliasing)
        if hazard is None:
            hazard = self._promotion(match)
        return hazard if hazard is not None else _answer(self.check, match, "check")

    def _promotion(self, match: PatternMatch) -> Decline | None:
        """Operands of several floating dtypes, if no example has such: operators differ in promoting them.

        `matmul(x, w) + b` takes a bias of another dtype, and `addmm(b, x, w)` does not.
        """
        found = [
            tensor_of(operand)
            for operand in match.found.operands.values()
            if not isinstance(operand, (int, float))
        ]
        dtypes = _floating_dtypes(found)
        if len(dtypes) < 2 or any(len(_floating_dtypes(example.values())) > 1 for example in self.examples):
            return None
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return Decline(
            "mixed-dtypes", "the operands are {}, and no example mixes dtypes", match.result, (names,)
        )

    def profitability(self, match: PatternMatch) -> Decline | None:
        """The rule's own opinion."""
        return _answer(self.profit, match, "profit")

    def pays_for(self, match: PatternMatch) -> SizeRange | Sequence[SizeRange]:
        """The rule's own ranges."""
        return self.ranges(match) if self.ranges is not None else ()

    def insertion_point(self, match: PatternMatch) -> Node:
        """Where all operands exist, and nobody has read a result."""
        assert isinstance(match.place, Node)
        return match.place

    def rewrite(self, match: PatternMatch, build: Builder) -> tuple[Node, ...]:
        """Traces the replacement on what the parameters took, and writes it."""
        context, mode = match.context, match.context.evaluator.mode
        given: dict[str, Any] = dict.fromkeys(match.pattern.absent)
        for name, operand in match.found.operands.items():
            found = tensor_of(operand) if not isinstance(operand, (int, float)) else None
            held = operand.meta["val"] if isinstance(operand, Node) else operand
            given[name] = held if found is None else context.evaluator.fake(found)
        graph = record(self.replacement, given, context.level, mode)
        numbers = [
            (given[name], operand)
            for name, operand in match.found.operands.items()
            if _is_symbol(given[name])
        ]
        operands = {node.name: build.operand(match[node.name]) for node in graph.find_nodes(op="placeholder")}
        return write(build, graph, operands, numbers)


def _floating_dtypes(given: Iterable[object]) -> set[torch.dtype]:
    return {
        tensor.dtype for tensor in given if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }


def _answer(
    question: Callable[[PatternMatch], Answer] | None, match: PatternMatch, code: str
) -> Decline | None:
    found = question(match) if question is not None else None
    if isinstance(found, Decline):
        return found
    return Decline(code, "the rule's {} says no", match.result, (code,)) if found is False else None


def _is_symbol(given: object) -> bool:
    return isinstance(given, (torch.SymFloat, torch.SymInt))
