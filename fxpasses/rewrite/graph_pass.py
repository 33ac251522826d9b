"""A pass that is no group of rules: it reads a whole graph, decides, and carries its decision out itself.

The driver runs it like any other, times it, lints and recompiles after it, and takes its remarks over. What
it must do itself is leave the graph as it was when it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fxpasses.graph.context import GraphContext
from fxpasses.options import Options
from fxpasses.report.data import Remark
from fxpasses.report.layout_plan import LayoutPlan
from fxpasses.report.precision import Precision
from fxpasses.rewrite.identity import fingerprint


@dataclass(frozen=True)
class Outcome:
    """What a pass did to one graph.

    Attributes:
        remarks: what it says; an ``"applied"`` one for each application that counts.
        changed: whether the graph was changed.
        layout: the plan of the layout pass.
        precision: what the precision pass did.
    """

    remarks: tuple[Remark, ...] = ()
    changed: bool = False
    layout: LayoutPlan | None = None
    precision: Precision | None = None


@dataclass(frozen=True)
class GraphPass:
    """A named analysis with a materialisation of its own.

    Attributes:
        name: the pass's name, in options, counters and timings.
        run: takes the graph, which it may change in place, and the options.
        after: names of passes that must have run before, where they run at all.
        default: whether the pass is part of the default pipeline.
        last: whether it runs after all passes that do not say so, since it must see what they made.
        asked: whether options ask for the pass, where it is selected; None for always.
    """

    name: str
    run: Callable[[GraphContext, Options], Outcome]
    after: tuple[str, ...] = ()
    default: bool = True
    last: bool = False
    asked: Callable[[Options], bool] | None = None

    @property
    def rules(self) -> tuple[()]:
        """It has none."""
        return ()

    def uuid(self) -> str:
        """A key that changes with the code that the pass runs."""
        return fingerprint(self.name, self.run)
