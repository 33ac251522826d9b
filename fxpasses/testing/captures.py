"""Captures: one model through every front end that the passes serve, and what they made of it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fxpasses.api import optimize
from fxpasses.errors import FxpassesError, unknown_name
from fxpasses.graph.levels import nested_graphs
from fxpasses.graph.names import base_name
from fxpasses.options import Options
from fxpasses.pipeline import run_passes
from fxpasses.report.report import Report
from fxpasses.torch_internals.dynamo import fresh_call
from fxpasses.torch_internals.tracing import (
    enable_python_dispatcher,
    run_default_decompositions,
    trace_symbolically,
)

LEVELS = ("torch", "symbolic_trace", "pre_dispatch", "export", "aten")
"""The front ends: torch.compile, `torch.fx.symbolic_trace`, `make_fx(pre_dispatch=True)`, `torch.export`, and
that decomposed."""


@dataclass(frozen=True)
class Rewritten:
    """A captured and rewritten model.

    Attributes:
        call: takes the model's inputs.
        report: what the passes did.
        graph_module: the rewritten graph; None behind torch.compile.
        before, after: how often the graphs called each operator, by its base name, nested graphs included.
    """

    call: Callable[..., Any]
    report: Report
    graph_module: GraphModule | None = None
    before: Counter[str] = field(default_factory=Counter)
    after: Counter[str] = field(default_factory=Counter)


def capture(
    level: str, model: nn.Module, inputs: Sequence[Any], *, dynamic: bool | None = None
) -> GraphModule | ExportedProgram:
    """The model as a graph of a level whose graphs a caller can hold.

    Args:
        level: one of `LEVELS`, but ``"torch"``.
        model: a module.
        inputs: the arguments of one call.
        dynamic: whether sizes are symbols, where the graph has sizes at all.

    Raises:
        FxpassesError: there is no such level.
    """
    if level == "symbolic_trace":
        return torch.fx.symbolic_trace(model)
    if level == "pre_dispatch":
        with enable_python_dispatcher():
            return (
                trace_symbolically(model, inputs) if dynamic else make_fx(model, pre_dispatch=True)(*inputs)
            )
    if level in ("export", "aten"):
        program = torch.export.export(model, tuple(inputs), dynamic_shapes=_all_dynamic(inputs, dynamic))
        return program if level == "export" else run_default_decompositions(program)
    raise FxpassesError(unknown_name("capture level", level, LEVELS))


def _all_dynamic(inputs: Sequence[Any], dynamic: bool | None) -> tuple[Any, ...] | None:
    """Every size a symbol, unless the model says otherwise."""
    if not dynamic:
        return None
    return tuple(
        dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) if isinstance(value, torch.Tensor) else None
        for value in inputs
    )


def rewrite_at(
    level: str,
    model: nn.Module,
    inputs: Sequence[Any],
    options: Options | Mapping[str, Any] | None = None,
    *,
    dynamic: bool | None = None,
) -> Rewritten:
    """Captures a model at a level and runs the passes over it.

    Args:
        level: one of `LEVELS`.
        model: a module in the mode that is to be tested.
        inputs: the arguments of one call.
        options: fields of `fxpasses.Options`, or `Options`.
        dynamic: whether sizes are symbols; None leaves it to torch.compile.

    Raises:
        FxpassesError: there is no such level, or the options are wrong.
    """
    if level != "torch":
        captured = capture(level, model, inputs, dynamic=dynamic)
        graph_module = captured if isinstance(captured, GraphModule) else captured.graph_module
        before = operators_of(graph_module)
        result = optimize(captured, inputs, options)
        program = result.exported_program
        call = program.module() if program else result.graph_module
        after = operators_of(result.graph_module)
        return Rewritten(call, result.report, result.graph_module, before, after)
    return _compiled(model, inputs, Options.of(options), dynamic)


def _compiled(model: nn.Module, inputs: Sequence[Any], options: Options, dynamic: bool | None) -> Rewritten:
    reports: list[Report] = []
    calls, calls_after = Counter[str](), Counter[str]()

    def backend(gm: GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        calls.update(operators_of(gm))
        rewritten, report = run_passes(gm, examples, options, executor="eager")
        reports.append(report)
        calls_after.update(operators_of(rewritten))
        return rewritten.forward

    traced = torch.compile(fresh_call(), backend=backend, dynamic=dynamic)
    # Without a call nothing is traced; the model's own state must not change by it. Another model, such as
    # a copy, would be compiled for another time.
    state = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in state]
    traced(model, tuple(copy.deepcopy(list(inputs))))
    with torch.no_grad():
        for tensor, kept in zip(state, before, strict=True):
            tensor.copy_(kept)
    return Rewritten(
        lambda *given: traced(model, given), Report.merge(reports), before=calls, after=calls_after
    )


def operators_of(graph_module: GraphModule) -> Counter[str]:
    """How often a graph and those nested in it call each operator, by its base name."""
    calls = ("call_function", "call_method", "call_module")
    counts = Counter(base_name(node) for node in graph_module.graph.nodes if node.op in calls)
    for _, child, _ in nested_graphs(graph_module):
        counts.update(operators_of(child))
    return counts
