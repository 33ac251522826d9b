"""Fuzzing: random small models around a rule's pattern, against eager, at every level.

    fxpasses.testing.fuzz(rule)

Declarative rules get their specimens from the pattern itself; other rules bring a hypothesis strategy of
specimens (`Rule.specimens`), or are given one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fxpasses.rewrite.registry import AnyRule
from fxpasses.testing.captures import LEVELS
from fxpasses.testing.specimens import Specimen, check_specimen

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def fuzz(
    rule: AnyRule | str,
    specimens: SearchStrategy[Specimen] | None = None,
    *,
    examples: int = 50,
    levels: Sequence[str] = LEVELS,
    seed: int = 0,
) -> int:
    """Checks a rule on random models; returns how many were checked.

    Args:
        rule: a rule, or the name of a registered one.
        specimens: where models come from; to be left out for rules that have `specimens` themselves, for
            declarative ones, and for those of the package, since `fxpasses.testing.strategies` has theirs.
        examples: number of models at each level.
        levels: the levels, of `LEVELS`.
        seed: another seed gives other models; the same gives the same.

    Raises:
        AssertionError: a model is rewritten wrongly; hypothesis has made it as simple as it could.
        FxpassesError: a rule that needs `specimens`.
    """
    from fxpasses.testing import strategies  # they need hypothesis, which the rest of the kit does not

    strategy = specimens if specimens is not None else strategies.of(rule)
    checked = 0

    def check(specimen: Specimen, level: str) -> None:
        nonlocal checked
        checked += 1
        check_specimen(rule, specimen, level)

    for level in levels:
        _for_all(strategy, functools.partial(check, level=level), examples, seed)
    return checked


def _for_all(
    specimens: SearchStrategy[Specimen], check: Callable[[Specimen], None], examples: int, seed: int
) -> None:
    """Runs a check on `examples` random specimens, and on ever simpler ones once one fails it."""
    import hypothesis

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(specimens)
    def check_any(specimen: Specimen) -> None:
        check(specimen)

    check_any()
