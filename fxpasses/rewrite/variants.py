"""Variants: one pattern function is several graphs, by level, example and the parameters that are given.

                                          level   bias     graph
    def pattern(x, weight, bias=None):    torch   given    linear(x, weight, bias)
        return linear(x, weight, bias)    torch   absent   linear(x, weight, None)
                                          aten    given    addmm(bias, x, t(weight))
                                          aten    given    addmm(bias, x, permute(weight, (1, 0)))
                                          aten    absent   mm(x, t(weight))   ...

Those of a level are traced once, when they are first asked for, and what is the same as another is left out.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fxpasses.errors import PatternError
from fxpasses.graph.levels import Level
from fxpasses.rewrite.hazards import Aliasing, aliasing_of
from fxpasses.rewrite.pattern import Pattern, pattern_of
from fxpasses.rewrite.recording import fake_of, record
from fxpasses.torch_internals.fake_tensors import new_fake_mode


class Declaration(Protocol):
    """What a declarative rule says of its pattern: two functions of the same parameters, with examples."""

    @property
    def name(self) -> str:
        """The rule's name, for messages."""

    @property
    def pattern(self) -> Callable[..., Any]:
        """What to look for."""

    @property
    def replacement(self) -> Callable[..., Any]:
        """What to write instead."""

    @property
    def examples(self) -> tuple[dict[str, Any], ...]:
        """Example calls, by parameter name."""


@dataclass(frozen=True)
class Variant:
    """A pattern at one level, with some of the optional parameters absent.

    Attributes:
        pattern: what to look for.
        aliasing: how the sharing of storage changes.
    """

    pattern: Pattern
    aliasing: Aliasing


def examples_by_parameter(
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
        required = [
            key for key, parameter in parameters.items() if parameter.default is inspect.Parameter.empty
        ]
        if not len(required) <= len(call) <= len(parameters):
            raise PatternError(f"{name!r} takes {len(parameters)} parameters; an example gives {len(call)}.")
        for argument in call:
            if not isinstance(argument, (torch.Tensor, float)) and argument is not None:
                raise PatternError(
                    f"an example of {name!r} holds a {type(argument).__name__}; give tensors, and floats for "
                    "numbers. Other constants belong into the pattern."
                )
        result.append({**dict.fromkeys(parameters), **dict(zip(parameters, call, strict=False))})
    if not result:
        raise PatternError(f"{name!r} needs an example for each of its {len(parameters)} parameters.")
    return tuple(result)


def variants_of(rule: Declaration, level: Level) -> Iterator[Variant]:
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
    always = {name for name, argument in example.items() if argument is None}
    parameters = inspect.signature(pattern).parameters
    optional = [
        name for name, parameter in parameters.items() if parameter.default is None and name not in always
    ]
    for count in range(len(optional) + 1):
        for chosen in itertools.combinations(optional, count):
            yield frozenset(always | set(chosen))


def _variant(
    rule: Declaration, example: Mapping[str, Any], absent: frozenset[str], level: Level, decomposed: bool
) -> Variant:
    mode = new_fake_mode()
    given: dict[str, Any] = {name: None if name in absent else argument for name, argument in example.items()}
    # A number that no pattern would spell out, so that it is recognised where it arrives.
    numbers = {
        0.7236067977 + index / 128: name for index, name in enumerate(given) if isinstance(given[name], float)
    }
    given.update({name: number for number, name in numbers.items()})
    given = {name: fake_of(argument, mode) for name, argument in given.items()}
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
