"""What an example of a reason code is: a script of a few lines, and the edit that changes what comes of it.

    source           a model and its input
    options, run     how it is run; a rule declines there with the code
    old -> new       the edit after which the rule fires, of the source or of the options
    number           where rewriting would be wrong: an element of the result, eager's and the rewrite's

The tests run each: the script is declined, the edited script is not, and a number is what comes out when the
refusal is overridden.
"""

from __future__ import annotations

import difflib
import textwrap
from dataclasses import dataclass

PRELUDE = """\
import math
import torch
from torch import nn
import torch.nn.functional as F
import fxpasses
"""
"""What every script may use."""

EXPLAINED = "report = fxpasses.explain(model, x, options=OPTIONS)"
COMPILED = """\
torch.compile(model, backend='fxpasses', options=OPTIONS)(x)
report = fxpasses.last_report()"""
"""Two ways to run a model; `Example.options` takes the place of OPTIONS."""


@dataclass(frozen=True)
class Number:
    """What would come out wrong.

    Attributes:
        expression: of the model and its input, as Python.
        eager: its value in eager mode.
        rewritten: its value if the rule were applied.
    """

    expression: str
    eager: float
    rewritten: float


@dataclass(frozen=True)
class Example:
    """A site that a rule leaves alone, and what changes that.

    Attributes:
        source: defines ``model`` and its input ``x``.
        old, new: what to replace in the source or in `run`, so that the rule fires; empty where options do.
        options: those under which it is declined, as Python.
        options_after: those under which the edited script is run; empty for the same.
        rule: the rule that declines.
        grad: whether gradients are recorded.
        run: what is done with the model, as Python; it defines ``report``.
        fires: of the report after the edit, as Python: true if the rule has fired. By default that it was
            applied.
        where: what has to be so on the machine, in words; empty where it is so on any.
        number: what would come out wrong, where that is known.
    """

    source: str
    old: str = ""
    new: str = ""
    options: str = "{'profit': 'always'}"
    options_after: str = ""
    rule: str = "efficient_conv_bn_eval"
    grad: bool = False
    run: str = EXPLAINED
    fires: str = ""
    where: str = ""
    number: Number | None = None

    def script(self, *, edited: bool = False) -> str:
        """The whole example as Python, for which `PRELUDE` has the imports."""
        options = (edited and self.options_after) or self.options
        run = self.run.replace("OPTIONS", options) + "\n"
        if not self.grad:
            run = f"with torch.no_grad():\n{textwrap.indent(run, '    ')}"
        script = self.source + run
        return script.replace(self.old, self.new) if edited and self.old else script

    def lines(self) -> list[str]:
        """The script with the edit marked as in a patch, then what would be wrong."""
        old, new = (self.script(edited=edited).splitlines() for edited in (False, True))
        _, _, _, *patch = difflib.unified_diff(old, new, lineterm="", n=len(old))
        found = [f"{line[0]} {line[1:]}" for line in patch]
        if self.where:
            found.insert(0, f"  # {self.where}")
        if self.number is not None:
            number = self.number
            found.append(
                f"rewritten as it stands, {number.expression} would be {number.rewritten:g}; eager gives "
                f"{number.eager:g}"
            )
        return found
