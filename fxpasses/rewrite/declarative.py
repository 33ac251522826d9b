"""Rules in ten lines: a pattern and a replacement, written as plain torch functions.

An identity first. The parameters are tensors, and `examples` gives one for each:

>>> import fxpasses, torch
>>> @fxpasses.rewrite(name="double_negation", examples=(torch.randn(2, 3),))
... class DoubleNegation:
...     def pattern(x):
...         return torch.neg(torch.neg(x))
...     def replacement(x):
...         return x
>>> with fxpasses.testing.registered(DoubleNegation):
...     report = fxpasses.explain(lambda x: (-(-x.exp())).sin(), torch.randn(4))
>>> print(report.remarks[0])  # doctest: +ELLIPSIS
double_negation at ...: matched 2 of 2 nodes; applied: replaced ...

`-(-x)`, `x.neg().neg()` and `aten.neg` are the same operator, so one pattern serves every spelling and
every capture level. A parameter whose example is a float takes any number. `check` may decline with a reason
(a `Decline`, or False); it sees what each parameter took:

>>> import torch.nn.functional as F
>>> @fxpasses.rewrite(name="rms_norm", examples=(torch.randn(2, 8), torch.randn(8), 1e-6))
... class RmsNorm:
...     def pattern(x, weight, eps):
...         return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
...     def replacement(x, weight, eps):
...         return F.rms_norm(x, (x.shape[-1],), weight, eps)
...     def check(match):
...         if match.tensor("weight").shape != match.tensor("x").shape[-1:]:
...             return match.decline("weight-shape", "the weight is not one number per channel")
>>> x, weight = torch.randn(4, 16), torch.randn(16)
>>> def norm(x, weight):
...     return weight * (x * torch.rsqrt((x ** 2).mean(1, keepdim=True) + 1e-5))
>>> def cubic(x, weight):
...     return weight * (x * torch.rsqrt((x ** 3).mean(1, keepdim=True) + 1e-5))
>>> with fxpasses.testing.registered(RmsNorm):
...     print(dict(fxpasses.explain(norm, x, weight).applied))
...     print(fxpasses.explain(cubic, x, weight).remarks[0])  # doctest: +ELLIPSIS
{'rms_norm': 1}
rms_norm at ...: matched 5 of 6 nodes; declined [other-constant]: ... has 3 where the pattern has 2

A rule with a `profit` of its own is applied where that pays (`profit="always"` overrides it):

>>> @fxpasses.rewrite(name="addmm", examples=(torch.randn(2, 3), torch.randn(3, 4), torch.randn(4)))
... class AddMM:
...     def pattern(x, weight, bias):
...         return torch.matmul(x, weight) + bias
...     def replacement(x, weight, bias):
...         return torch.addmm(bias, x, weight)
...     def check(match):
...         return match.tensor("x").ndim == match.tensor("weight").ndim == 2
...     def profit(match):
...         if match.tensor("weight").numel() < 16:
...             return match.decline("small", "too small a product to gain anything")
>>> def affine(x, weight, bias):
...     return bias + x @ weight
>>> with fxpasses.testing.registered(AddMM):
...     small = fxpasses.explain(affine, torch.randn(2, 3), torch.randn(3, 2), torch.randn(2))
...     large = fxpasses.explain(affine, torch.randn(2, 8), torch.randn(8, 8), torch.randn(8))
>>> [each.code for each in (*small.remarks, *large.remarks)]
['small', 'applied']

A parameter with the default None is optional: the pattern is tried with and without it. A function may
return several results. Rules that need code of their own derive from `fxpasses.Rule` instead.

The driver refuses for every rule: results of the pattern's inside that are read elsewhere, another grad
mode, autocast or stream somewhere in it, a write to an operand on the way, and a replacement that shares
storage with an operand where the pattern did not (or the other way round) if anybody could tell.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxpasses.errors import PatternError
from fxpasses.graph.canonical import operator_of
from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.levels import Level
from fxpasses.graph.operands import Operand, tensor_of
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.hazards import Aliasing, aliasing_of, first_hazard, place_of
from fxpasses.rewrite.pattern import Found, Pattern, Search, operand_nodes, pattern_of
from fxpasses.rewrite.recording import fake_of, record, write
from fxpasses.rewrite.rule import Match, Rule
from fxpasses.torch_internals.fake_tensors import new_fake_mode

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
        return tuple(self.found.nodes[each] for each in self.pattern.results)

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


@dataclass(frozen=True)
class Variant:
    """A pattern at one level, with some of the optional parameters absent.

    Attributes:
        pattern: what to look for.
        aliasing: how the sharing of storage changes.
    """

    pattern: Pattern
    aliasing: Aliasing


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
        after: tuple[str, ...] = (),
        default: bool = True,
    ) -> None:
        """See `rewrite`, which has the same arguments.

        Raises:
            PatternError: the functions or the examples do not fit together, or cannot be traced.
        """
        self.name, self.after, self.default = name, after, default
        self.pattern, self.replacement, self.check, self.profit = pattern, replacement, check, profit
        self.examples = _examples(name, pattern, replacement, examples)
        self._variants: dict[Level, tuple[Variant, ...]] = {}
        self.pattern_size = max(each.pattern.size for each in self.variants(Level.TORCH))

    def variants(self, level: Level) -> tuple[Variant, ...]:
        """What is looked for in graphs of a level; traced when first asked for.

        Raises:
            PatternError: the pattern cannot be traced.
        """
        if level not in self._variants:
            self._variants[level] = tuple(_variants(self, level))
        return self._variants[level]

    @property
    def is_anchor(self) -> Callable[[Node], bool]:
        """Every call of an operator with which the pattern ends, at any level."""
        anchors = {each.pattern.anchor for level in Level for each in self.variants(level)}
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
            each.aliasing for each in self.variants(match.context.level) if each.pattern is match.pattern
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
            tensor_of(each) for each in match.found.operands.values() if not isinstance(each, (int, float))
        ]
        dtypes = _floating_dtypes(found)
        if len(dtypes) < 2 or any(len(_floating_dtypes(each.values())) > 1 for each in self.examples):
            return None
        names = ", ".join(sorted(str(each).removeprefix("torch.") for each in dtypes))
        return Decline(
            "mixed-dtypes", "the operands are {}, and no example mixes dtypes", match.result, (names,)
        )

    def profitability(self, match: PatternMatch) -> Decline | None:
        """The rule's own opinion."""
        return _answer(self.profit, match, "profit")

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
            (given[name], each) for name, each in match.found.operands.items() if _is_symbol(given[name])
        ]
        operands = {node.name: build.operand(match[node.name]) for node in graph.find_nodes(op="placeholder")}
        return write(build, graph, operands, numbers)


def _floating_dtypes(given: Iterable[object]) -> set[torch.dtype]:
    return {each.dtype for each in given if isinstance(each, torch.Tensor) and each.is_floating_point()}


def rewrite(
    *,
    name: str,
    examples: Sequence[Any],
    after: tuple[str, ...] = (),
    default: bool = True,
) -> Callable[[type], DeclarativeRule]:
    """Makes a rule from a class that holds `pattern`, `replacement` and, if wanted, `check` and `profit`.

    The functions take no `self` (and may be marked static). `pattern` and `replacement` have the same
    parameters, tensors or numbers; those with the default None are optional. `check(match)` and
    `profit(match)` take a `PatternMatch` and return a `Decline` or False to decline. Register the rule with
    `fxpasses.register`.

    Args:
        name: the rule's name, in counters, remarks and options.
        examples: one tensor or float per parameter; or several such tuples, where the pattern is traced to
            other operators for other dtypes or ranks.
        after: names of rules or passes that must have run before, where they run at all.
        default: whether the rule is part of the default pipeline once it is registered.

    Raises:
        PatternError: the functions or the examples do not fit together, or cannot be traced.
    """

    def made(cls: type) -> DeclarativeRule:
        plain = {key: getattr(each, "__func__", each) for key, each in vars(cls).items()}
        functions = {key: each for key, each in plain.items() if inspect.isfunction(each)}
        unknown = functions.keys() - {"pattern", "replacement", "check", "profit"}
        if unknown or not {"pattern", "replacement"} <= functions.keys():
            raise PatternError(
                f"the class of rule {name!r} needs functions `pattern` and `replacement`, and may have "
                f"`check` and `profit`; it has {', '.join(sorted(functions)) or 'none'}."
            )
        rule = DeclarativeRule(name, examples=examples, after=after, default=default, **functions)
        rule.__doc__ = cls.__doc__
        return rule

    return made


def _examples(
    name: str, pattern: Callable[..., Any], replacement: Callable[..., Any], examples: Sequence[Any]
) -> tuple[dict[str, Any], ...]:
    """Each example call by parameter name; one that is left out is None."""
    try:
        parameters = inspect.signature(pattern).parameters
        others = inspect.signature(replacement).parameters
    except ValueError as error:
        raise PatternError(f"{name!r}: {error}; write a Python function with named parameters.") from error
    if list(parameters) != list(others):
        raise PatternError(
            f"the pattern of {name!r} takes ({', '.join(parameters)}) and its replacement "
            f"({', '.join(others)}); both must take the same."
        )
    calls = list(examples) if examples and isinstance(examples[0], (tuple, list)) else [examples]
    result = []
    for call in calls:
        required = [key for key, each in parameters.items() if each.default is inspect.Parameter.empty]
        if not len(required) <= len(call) <= len(parameters):
            raise PatternError(f"{name!r} takes {len(parameters)} parameters; an example gives {len(call)}.")
        for each in call:
            if not isinstance(each, (torch.Tensor, float)) and each is not None:
                raise PatternError(
                    f"an example of {name!r} holds a {type(each).__name__}; give tensors, and floats for "
                    "numbers. Other constants belong into the pattern."
                )
        result.append({**dict.fromkeys(parameters), **dict(zip(parameters, call, strict=False))})
    if not result:
        raise PatternError(f"{name!r} needs an example for each of its {len(parameters)} parameters.")
    return tuple(result)


def _variants(rule: DeclarativeRule, level: Level) -> Iterator[Variant]:
    """The rule's pattern as graphs of a level may hold it, without repetitions.

    What stands in a graph of a lower level may stand in one of a higher level too, but not in Dynamo's.
    """
    known: set[str] = set()
    depths = {
        Level.TORCH: [(Level.TORCH, True)],
        Level.PRE_DISPATCH: [(Level.PRE_DISPATCH, True), (Level.ATEN, False), (Level.ATEN, True)],
        Level.ATEN: [(Level.PRE_DISPATCH, True), (Level.ATEN, False), (Level.ATEN, True)],
    }
    for example in rule.examples:
        for absent in _absences(rule.pattern, example):
            for depth, decomposed in depths[level]:
                variant = _variant(rule, example, absent, depth, decomposed)
                if variant.pattern.key not in known:
                    known.add(variant.pattern.key)
                    yield variant


def _absences(pattern: Callable[..., Any], example: Mapping[str, Any]) -> Iterator[frozenset[str]]:
    """Every choice of optional parameters to leave out; those without an example always are."""
    always = {name for name, each in example.items() if each is None}
    parameters = inspect.signature(pattern).parameters
    optional = [name for name, each in parameters.items() if each.default is None and name not in always]
    for count in range(len(optional) + 1):
        for chosen in itertools.combinations(optional, count):
            yield frozenset(always | set(chosen))


def _variant(
    rule: DeclarativeRule, example: Mapping[str, Any], absent: frozenset[str], level: Level, decomposed: bool
) -> Variant:
    mode = new_fake_mode()
    given: dict[str, Any] = {name: None if name in absent else each for name, each in example.items()}
    # A number that no pattern would spell out, so that it is recognised where it arrives.
    numbers = {
        0.7236067977 + index / 128: name for index, name in enumerate(given) if isinstance(given[name], float)
    }
    given.update({name: each for each, name in numbers.items()})
    given = {name: fake_of(each, mode) for name, each in given.items()}
    try:
        graph = record(rule.pattern, given, level, mode, decomposed)
        aliasing = aliasing_of(rule.pattern, rule.replacement, given, mode)
    except PatternError:
        raise
    except Exception as error:
        raise PatternError(
            f"the pattern or replacement of {rule.name!r} cannot be traced: {type(error).__name__}: {error}"
        ) from error
    return Variant(pattern_of(graph, numbers, absent, rule.name), aliasing)


def _answer(
    question: Callable[[PatternMatch], Answer] | None, match: PatternMatch, code: str
) -> Decline | None:
    found = question(match) if question is not None else None
    if isinstance(found, Decline):
        return found
    return Decline(code, "the rule's {} says no", match.result, (code,)) if found is False else None


def _is_symbol(given: object) -> bool:
    return isinstance(given, (torch.SymFloat, torch.SymInt))
