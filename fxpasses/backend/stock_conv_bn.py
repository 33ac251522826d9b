"""Inductor's own conv-BN pass, which a user may have switched on: our rule takes its place.

It would run over the graph that we hand over, and rewrite what our rule has declined because eager's answers
would be lost (a linear layer on three dimensions, a write in between, ...). So it stays off, and its setting
counts as the wish to rewrite every legal pair, whether or not that pays, as it does by itself.
"""

from __future__ import annotations

from fxpasses.graph.decline import Decline
from fxpasses.options import Options
from fxpasses.pipeline import register_all
from fxpasses.report.data import Remark
from fxpasses.report.report import Report
from fxpasses.rewrite.registry import REGISTRY
from fxpasses.torch_internals.inductor import inductor_folds_batch_norms

SETTING = "efficient_conv_bn_eval_fx_passes"
RULE = "efficient_conv_bn_eval"


def taken_over(options: Options) -> frozenset[str]:
    """The name of our rule where it takes the place of inductor's pass; nothing where that is off.

    Nor where our rule is not among those that the options select: then inductor's does as it always did.
    """
    if options.inner != "inductor" or not inductor_folds_batch_norms(options.inductor):
        return frozenset()
    register_all()
    selected = {rule.name for group in REGISTRY.pipeline(options) for rule in group.rules}
    return frozenset({RULE}) & selected


def remarks_on(report: Report) -> tuple[Remark, ...]:
    """Says that inductor's pass stays off, where our rule had anything to look at."""
    if all(remark.rule != RULE for remark in report.remarks):
        return ()
    message = "inductor's own pass stays off: {} rewrites each pair, but for those that it would get wrong"
    why = Decline("taken-over", message, None, (RULE,))
    return (Remark(SETTING, "declined", why.code, why.message, node="", stage="check"),)
