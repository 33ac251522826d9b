"""Hypothesis strategies of models around a rule: what it must rewrite, and near misses.

`of(rule)` is what `fxpasses.testing.fuzz` draws from: what a rule brings itself (`Rule.specimens`),
`around(rule)` for a declarative rule, whose pattern tells all that is needed, and a family's own strategy for
each of the rules that come with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fxpasses.errors import FxpassesError
from fxpasses.pipeline import register_all
from fxpasses.rewrite.declarative_rule import DeclarativeRule
from fxpasses.rewrite.registry import REGISTRY, AnyRule
from fxpasses.testing.specimens import Specimen
from fxpasses.testing.strategies.affine import AFFINE_ACROSS_VIEWS, CONV_AFFINE
from fxpasses.testing.strategies.affine import affine_across_views as affine_across_views
from fxpasses.testing.strategies.affine import conv_affine as conv_affine
from fxpasses.testing.strategies.bn_before_conv import BN_BEFORE_CONV
from fxpasses.testing.strategies.bn_before_conv import bn_before_conv as bn_before_conv
from fxpasses.testing.strategies.conv_bn import CONV_BN
from fxpasses.testing.strategies.conv_bn import conv_bn as conv_bn
from fxpasses.testing.strategies.declarative import around as around
from fxpasses.testing.strategies.layers import Expectation
from fxpasses.testing.strategies.layouts import layouts as layouts
from fxpasses.testing.strategies.parallel import PARALLEL_CONV_MERGE
from fxpasses.testing.strategies.parallel import parallel_conv_merge as parallel_conv_merge

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

FAMILIES: Mapping[str, Callable[[], SearchStrategy[Specimen]]] = {
    "efficient_conv_bn_eval": conv_bn,
    "conv_affine": conv_affine,
    "affine_across_views": affine_across_views,
    "parallel_conv_merge": parallel_conv_merge,
    "bn_before_conv": bn_before_conv,
}
"""Strategies by the name of the rule that they are for."""

OF_PASSES: Mapping[str, Callable[[], SearchStrategy[Specimen]]] = {"layout": layouts}
"""Strategies by the name of the pass that is no group of rules."""

KINDS: Mapping[str, Mapping[str, Expectation]] = {
    "efficient_conv_bn_eval": CONV_BN,
    "conv_affine": CONV_AFFINE,
    "affine_across_views": AFFINE_ACROSS_VIEWS,
    "parallel_conv_merge": PARALLEL_CONV_MERGE,
    "bn_before_conv": BN_BEFORE_CONV,
}
"""The kinds of models that each of them draws, and what the rule must do with them."""


def of(rule: AnyRule | str) -> SearchStrategy[Specimen]:
    """The strategy of a rule, or of the registered rule with a name: its own `specimens`, where it has any.

    Raises:
        FxpassesError: there is none.
    """
    register_all()
    found = REGISTRY.rule(rule) if isinstance(rule, str) else rule
    own: SearchStrategy[Specimen] | None = found.specimens() if found is not None else None
    if own is not None:
        return own
    if isinstance(found, DeclarativeRule):
        return around(found)
    name = rule if isinstance(rule, str) else rule.name
    family = FAMILIES.get(name) or OF_PASSES.get(name)
    if family is not None:
        return family()
    raise FxpassesError(
        f"fuzz does not know how to build models for {name!r}: give `specimens`, a hypothesis strategy of "
        "fxpasses.testing.Specimen, or have the rule give one (`Rule.specimens`)."
    )
