"""Reason codes by example: an `Example` for each.

example        what one is
folding        of the rules that fold into convolutions and linear layers
functions      of rules that are made of functions, and of inductor's patterns
compilations   of what layouts, kept weights, inductor and races leave alone
"""

from __future__ import annotations

from collections.abc import Mapping

from fxpasses.report.examples.compilations import COMPILATIONS
from fxpasses.report.examples.example import Example
from fxpasses.report.examples.folding import FOLDING
from fxpasses.report.examples.functions import FUNCTIONS

EXAMPLES: Mapping[str, Example] = {**FOLDING, **FUNCTIONS, **COMPILATIONS}
"""An example of each reason code of `fxpasses.report.codes`."""
