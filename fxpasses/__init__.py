"""Graph passes for torch.compile, make_fx and torch.export that can be seen, counted and trusted.

    torch.compile(model, backend="fxpasses")            # a wrapper around inductor
    fxpasses.optimize(graph_module, example_inputs)     # make_fx, symbolic_trace, torch.export
    fxpasses.explain(model, *example_inputs)            # what would fire, what would not, and why

Importing this package imports neither Dynamo nor inductor.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fxpasses.version import __version__ as __version__

if TYPE_CHECKING:
    from fxpasses import backend as backend
    from fxpasses import testing as testing
    from fxpasses.api import Optimized as Optimized
    from fxpasses.api import explain as explain
    from fxpasses.api import optimize as optimize
    from fxpasses.errors import FxpassesError as FxpassesError
    from fxpasses.graph.decline import Decline as Decline
    from fxpasses.graph.sizes import SizeRange as SizeRange
    from fxpasses.options import Options as Options
    from fxpasses.passes.weights.convert import convert_conv_weights as convert_conv_weights
    from fxpasses.passes.weights.kept import refresh as refresh
    from fxpasses.passes.weights.kept import updating as updating
    from fxpasses.report.counters import last_report as last_report
    from fxpasses.report.counters import reports as reports
    from fxpasses.report.counters import reset as reset
    from fxpasses.report.data import Remark as Remark
    from fxpasses.report.layout_plan import LayoutPlan as LayoutPlan
    from fxpasses.report.report import Report as Report
    from fxpasses.rewrite.declarative import rewrite as rewrite
    from fxpasses.rewrite.graph_pass import GraphPass as GraphPass
    from fxpasses.rewrite.graph_pass import Outcome as Outcome
    from fxpasses.rewrite.inductor import from_inductor as from_inductor
    from fxpasses.rewrite.registry import RulePass as RulePass
    from fxpasses.rewrite.registry import register as register
    from fxpasses.rewrite.registry import unregister as unregister
    from fxpasses.rewrite.rule import Match as Match
    from fxpasses.rewrite.rule import Rule as Rule

_HOMES = {
    "Decline": "fxpasses.graph.decline",
    "FxpassesError": "fxpasses.errors",
    "GraphPass": "fxpasses.rewrite.graph_pass",
    "LayoutPlan": "fxpasses.report.layout_plan",
    "Match": "fxpasses.rewrite.rule",
    "Optimized": "fxpasses.api",
    "Options": "fxpasses.options",
    "Outcome": "fxpasses.rewrite.graph_pass",
    "Remark": "fxpasses.report.data",
    "Report": "fxpasses.report.report",
    "Rule": "fxpasses.rewrite.rule",
    "RulePass": "fxpasses.rewrite.registry",
    "SizeRange": "fxpasses.graph.sizes",
    "refresh": "fxpasses.passes.weights.kept",
    "convert_conv_weights": "fxpasses.passes.weights.convert",
    "explain": "fxpasses.api",
    "from_inductor": "fxpasses.rewrite.inductor",
    "last_report": "fxpasses.report.counters",
    "optimize": "fxpasses.api",
    "register": "fxpasses.rewrite.registry",
    "reports": "fxpasses.report.counters",
    "reset": "fxpasses.report.counters",
    "unregister": "fxpasses.rewrite.registry",
    "updating": "fxpasses.passes.weights.kept",
}
"""Where each public name lives; it is imported when it is first asked for."""

_MODULES = ("backend", "rewrite", "testing")

__all__ = [
    "Decline",
    "FxpassesError",
    "GraphPass",
    "LayoutPlan",
    "Match",
    "Optimized",
    "Options",
    "Outcome",
    "Remark",
    "Report",
    "Rule",
    "RulePass",
    "SizeRange",
    "backend",
    "convert_conv_weights",
    "explain",
    "from_inductor",
    "last_report",
    "optimize",
    "refresh",
    "register",
    "reports",
    "reset",
    "rewrite",
    "testing",
    "unregister",
    "updating",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = found
        return found
    if name in _MODULES:
        return importlib.import_module(f"fxpasses.{name}")
    raise AttributeError(f"module 'fxpasses' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
