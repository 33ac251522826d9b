"""Fuzzing: random small models around a rule's pattern, against eager, at every level.

    fxpasses.testing.fuzz(rule)

Declarative rules get their specimens from the pattern itself; other rules bring a hypothesis strategy of
specimens (`Rule.specimens`), or are given one.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
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
    examples: int | None = None,
    seconds: float | None = None,
    corpus: str | Path | None = None,
    levels: Sequence[str] = LEVELS,
    seed: int = 0,
) -> int:
    """Checks a rule on random models; returns how many were checked.

    Args:
        rule: a rule, or the name of a registered one.
        specimens: where models come from; to be left out for rules that have `specimens` themselves, for
            declarative ones, and for those of the package, since `fxpasses.testing.strategies` has theirs.
        examples: number of models at each level, at most; None for 50, or as many as `seconds` allows.
        seconds: wall time of the whole call, over all levels in turns. The model that is being checked when
            it ends is finished, and one that fails is still made simpler.
        corpus: a folder that is kept between runs. A model that failed is checked first in later runs, until
            it passes; besides those, each run draws other models than the runs before.
        levels: the levels, of `LEVELS`.
        seed: another seed gives other models; the same gives the same, where there is no corpus.

    Raises:
        AssertionError: a model is rewritten wrongly; hypothesis has made it as simple as it could.
        FxpassesError: a rule that needs `specimens`.
    """
    from fxpasses.testing import strategies  # they need hypothesis, which the rest of the kit does not

    strategy = specimens if specimens is not None else strategies.of(rule)
    name = rule if isinstance(rule, str) else rule.name
    run = _Run(
        strategy,
        lambda specimen, level: check_specimen(rule, specimen, level),
        deadline=None if seconds is None else time.monotonic() + seconds,
        corpus=None if corpus is None else Path(corpus, re.sub(r"\W+", "_", name)),
    )
    most = examples if examples is not None else (50 if seconds is None else sys.maxsize)
    if seconds is None:
        for level in levels:
            run.draw(level, most, run.seed(seed))
        return run.checked
    drawn, turn = 0, _FIRST_TURN
    while drawn < most and not run.over:
        turn = min(turn, most - drawn)
        for level in levels:
            run.draw(level, turn, run.seed(seed) + drawn)
        drawn, turn = drawn + turn, 2 * turn
    return run.checked


_FIRST_TURN = 3
"""How many models are drawn at one level before the next one has its turn; turns double."""


class _Run:
    """One call of `fuzz`: what it checks, until when, and what it keeps."""

    def __init__(
        self,
        specimens: SearchStrategy[Specimen],
        check: Callable[[Specimen, str], object],
        deadline: float | None,
        corpus: Path | None,
    ) -> None:
        self.checked = 0
        self._specimens, self._check, self._deadline, self._corpus = specimens, check, deadline, corpus
        self._earlier = 0 if corpus is None else _count_run(corpus / "runs")
        self._failed = False

    def seed(self, given: int) -> int:
        """The seed of this run: of the first with a corpus the given one, of each later one another."""
        return given + _APART * self._earlier

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def draw(self, level: str, examples: int, seed: int) -> None:
        """Checks random specimens at a level, after those of the corpus; simpler ones once one fails."""
        import hypothesis
        from hypothesis.database import DirectoryBasedExampleDatabase

        if self.over:
            return
        phases = [hypothesis.Phase.generate, hypothesis.Phase.shrink]
        database = None
        if self._corpus is not None:
            database = DirectoryBasedExampleDatabase(self._corpus / level)
            phases.append(hypothesis.Phase.reuse)

        # In this order: a seed takes the database out of the settings that it finds.
        @hypothesis.settings(
            max_examples=examples,
            database=database,
            deadline=None,
            report_multiple_bugs=False,
            phases=phases,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.seed(seed)
        @hypothesis.given(self._specimens)
        def check_any(specimen: Specimen) -> None:
            if self.over and not self._failed:
                return
            self.checked += 1
            try:
                self._check(specimen, level)
            except BaseException:
                self._failed = True
                raise

        check_any()


_APART = 1_000_003
"""How far apart the seeds of two runs with one corpus are: further than a run draws models."""


def _count_run(path: Path) -> int:
    """How many runs there were before this one."""
    earlier = int(path.read_text()) if path.exists() else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{earlier + 1}\n")
    return earlier
