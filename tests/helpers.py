"""What the adversarial tests share: batch norms that are no identity, capture by every front end, comparison.

A test states a model, its inputs and an outcome: how many sites are rewritten, or the reason code with which
the site is declined. `check` captures the model, runs the passes, and compares outputs and gradients with
eager to 1e-9 in float64, whatever the outcome was: a declined site must give eager's answers too.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import fxpasses
from fxpasses.report.report import Report
from fxpasses.testing import assert_close_to_eager, assert_rewrites
from fxpasses.torch_internals.pytree import tree_leaves
from fxpasses.torch_internals.tracing import enable_python_dispatcher

RULE = "efficient_conv_bn_eval"

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)

CaseT = TypeVar("CaseT")

Outcome = int | str
"""A number of rewritten sites, or the reason code of a site where none is."""


def randomised(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """`model` in eval mode, with statistics and affine parameters under which no batch norm is an identity.

    Gamma has negative entries, and one that is zero.
    """
    model = model.to(dtype).eval()
    for module in model.modules():
        if not isinstance(module, NORMS):
            continue
        with torch.no_grad():
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
            if module.weight is not None:
                module.weight.normal_()
                module.weight[0] = 0.0
                module.bias.normal_()
    return model


class Spelled(nn.Module):
    """Layers that a subclass holds, and a function of them and of the input as the forward."""

    def __init__(self, spell: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.spell = spell

    def forward(self, x: torch.Tensor) -> Any:
        return self.spell(self, x)


def pair(conv: nn.Module, norm: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A convolution (or another layer) and the batch norm after it, randomised and in eval mode."""
    return randomised(nn.Sequential(conv, norm), dtype)


def image(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> torch.Tensor:
    """A random tensor; an image of [2, 3, 8, 8] unless told otherwise."""
    return torch.randn(shape or (2, 3, 8, 8), dtype=dtype, requires_grad=grad)


# Capture --------------------------------------------------------------------------------------------

Capture = Callable[[Callable[..., Any], tuple[Any, ...]], GraphModule | ExportedProgram]


def _pre_dispatch(model: Callable[..., Any], inputs: tuple[Any, ...]) -> GraphModule:
    with enable_python_dispatcher():
        return make_fx(model, pre_dispatch=True)(*inputs)


def _aten(model: Any, inputs: tuple[Any, ...]) -> ExportedProgram:
    return torch.export.export(model, inputs).run_decompositions()


CAPTURES: dict[str, Capture] = {
    "pre_dispatch": _pre_dispatch,
    "export": lambda model, inputs: torch.export.export(model, inputs),
    "aten": _aten,
    "symbolic_trace": lambda model, inputs: torch.fx.symbolic_trace(model),
}
"""Front ends whose graph the caller holds, by name."""


def dynamo_graph(model: Callable[..., Any], *inputs: Any) -> GraphModule:
    """The graph that Dynamo hands to a backend; there must be just one."""
    graphs: list[GraphModule] = []

    def keep(graph_module: GraphModule, example_inputs: Any) -> GraphModule:
        graphs.append(graph_module)
        return graph_module

    torch.compile(model, backend=keep)(*inputs)
    (graph_module,) = graphs
    return graph_module


def graph_of(capture: str, model: Callable[..., Any], inputs: tuple[Any, ...]) -> GraphModule:
    """The graph of any front end, Dynamo's by the name ``"compile"``."""
    if capture == "compile":
        return dynamo_graph(model, *inputs)
    program = CAPTURES[capture](model, inputs)
    return program.graph_module if isinstance(program, ExportedProgram) else program


def callable_of(result: fxpasses.Optimized) -> Callable[..., Any]:
    """What runs an optimised program, as the caller would run it."""
    return result.exported_program.module() if result.exported_program else result.graph_module


GRAPHS = tuple(CAPTURES)
EVERYWHERE = ("compile", *GRAPHS)
SAMPLED = [
    pytest.param(capture, marks=pytest.mark.full) if capture in ("pre_dispatch", "aten") else capture
    for capture in EVERYWHERE
]
"""For large products: export covers most of what the two others find, so they run in the exhaustive run."""

ATEN_LEVELS = ("pre_dispatch", "export", "aten")


# Comparison -----------------------------------------------------------------------------------------


def check(
    capture: str,
    model: nn.Module,
    inputs: Sequence[Any],
    outcome: Outcome,
    *,
    rule: str = RULE,
    grads: bool = True,
    profit: str = "model",
    **arguments: Any,
) -> Report:
    """Captures, rewrites and compares with eager; fails unless the outcome is the expected one.

    Args:
        capture: ``"compile"``, or a key of `CAPTURES`.
        model: a module in the mode that is to be tested; it is not changed.
        inputs: the arguments of one call.
        outcome: the number of sites that the rule rewrote, or the code with which it declined at least one
            site while it rewrote none.
        rule: the rule that is meant.
        grads: whether to compare gradients too, with autograd recording.
        profit: the option of that name; ``"always"`` where legality alone is the subject.
        arguments: further arguments of `check_compiled` or of `check_captured`.
    """
    checked = check_compiled if capture == "compile" else partial(check_captured, capture)
    return checked(model, inputs, outcome, rule=rule, grads=grads, profit=profit, **arguments)


def check_compiled(
    model: nn.Module | Callable[..., Any],
    inputs: Sequence[Any],
    outcome: Outcome,
    *,
    rule: str = RULE,
    grads: bool = True,
    profit: str = "model",
    inner: str = "eager",
    options: Mapping[str, Any] | None = None,
    **compile_arguments: Any,
) -> Report:
    """`check` for torch.compile: one SGD step, and the outputs after it, are compared as well."""
    torch.compiler.reset()
    fxpasses.reset()
    chosen = {"inner": inner, "profit": profit, **(options or {})}
    count = outcome if isinstance(outcome, int) else 0
    assert_rewrites(model, inputs, {rule: count}, grads=grads, options=chosen, **compile_arguments)
    report = Report.merge(fxpasses.reports())
    require_outcome(report, outcome, rule)
    return report


def check_captured(
    capture: str,
    model: nn.Module,
    inputs: Sequence[Any],
    outcome: Outcome,
    *,
    rule: str = RULE,
    grads: bool = True,
    profit: str = "model",
    options: Mapping[str, Any] | None = None,
) -> Report:
    """`check` for `fxpasses.optimize`, with the invariants that every optimised graph keeps."""
    eager, ours = copy.deepcopy(model), copy.deepcopy(model)
    with torch.set_grad_enabled(grads):
        program = CAPTURES[capture](ours, tuple(fresh(inputs)))
        before = printed(program)
        result = fxpasses.optimize(program, tuple(inputs), {"profit": profit, **(options or {})})
        assert printed(program) == before, "the caller's graph was changed"
        require_outcome(result.report, outcome, rule)
        require_wellformed(result.graph_module)
        found = outputs_and_gradients(callable_of(result), list(ours.parameters()), inputs, grads)
        expected = outputs_and_gradients(eager, list(eager.parameters()), inputs, grads)
    require_equal(found, expected)
    return result.report


def require_outcome(report: Report, outcome: Outcome, rule: str = RULE) -> None:
    """Fails unless the rule rewrote as many sites, or declined one with that code and rewrote none."""
    remarks = "\n".join(map(str, report.remarks)) or "(no site was looked at)"
    assert not [remark for remark in report.remarks if remark.status == "failed"], remarks
    if isinstance(outcome, int):
        assert report.applied.get(rule, 0) == outcome, remarks
    else:
        assert not report.applied.get(rule, 0), remarks
        assert outcome in {remark.code for remark in report.declined if remark.rule == rule}, remarks


def require_wellformed(graph_module: GraphModule) -> None:
    """Fails unless the graph lints, recompiles and carries metadata on every node that has a value."""
    graph_module.graph.lint()
    graph_module.recompile()
    for node in graph_module.graph.nodes:
        if node.op == "output" or not node.users:
            continue
        if node.op == "get_attr" and isinstance(_attribute(graph_module, str(node.target)), nn.Module):
            continue
        assert "val" in node.meta, f"{node.format_node()} carries no metadata"


def _attribute(module: nn.Module, path: str) -> object:
    value: object = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def printed(program: GraphModule | ExportedProgram) -> str:
    """Everything that a rewrite could change about a program, in text."""
    graph_module = program.graph_module if isinstance(program, ExportedProgram) else program
    lines = [node.format_node() or "" for node in graph_module.graph.nodes]
    users = [sorted(user.name for user in node.users) for node in graph_module.graph.nodes]
    children = [printed(child) for child in graph_module.children() if isinstance(child, GraphModule)]
    return "\n".join([*map(str, lines), str(users), graph_module.code, *children])


def fresh(inputs: Sequence[Any]) -> list[Any]:
    """The inputs as new leaves; strides are kept."""
    return [
        given.detach().clone().requires_grad_(given.requires_grad)
        if isinstance(given, torch.Tensor)
        else given
        for given in inputs
    ]


def outputs_and_gradients(
    call: Callable[..., Any], parameters: list[torch.Tensor], inputs: Sequence[Any], grads: bool
) -> list[torch.Tensor | None]:
    """The outputs of one call, then the gradients of their sum for parameters and inputs; None for none."""
    arguments = fresh(inputs)
    leaves = [*parameters, *(given for given in arguments if isinstance(given, torch.Tensor))]
    for leaf in leaves:
        leaf.grad = None
    outputs = [result for result in tree_leaves(call(*arguments)) if torch.is_tensor(result)]
    if grads:
        torch.stack([output.double().sum() for output in outputs if output.requires_grad]).sum().backward()
    return [
        *(output.detach() for output in outputs),
        *(leaf.grad if leaf.is_leaf else None for leaf in leaves if leaf.requires_grad),
    ]


def strides_that_matter(given: torch.Tensor) -> list[int]:
    """A tensor's strides along the axes that have more than one element."""
    return [stride for size, stride in zip(given.shape, given.stride(), strict=True) if size > 1]


def require_equal(found: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    """Fails unless two lists of float64 tensors agree to 1e-9 and are None in the same places."""
    assert [result is None for result in found] == [result is None for result in expected]
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    exact = [b.double() for _, b in pairs]
    assert_close_to_eager("result", [a for a, _ in pairs], [b for _, b in pairs], exact)


def check_rule(
    capture: str,
    model: nn.Module,
    inputs: tuple[Any, ...],
    outcome: Outcome,
    *,
    rule: str,
    grads: bool = True,
    **options: Any,
) -> Report:
    """`check` of any rule's legality: with `profit="always"` and further options."""
    chosen = {"profit": "always", **options}
    return check(
        capture, model, inputs, outcome, rule=rule, grads=grads, profit=chosen.pop("profit"), options=chosen
    )


# Which cases of many -------------------------------------------------------------------------------


def covering(cases: Sequence[CaseT], traits: Callable[[CaseT], set[Any]]) -> list[CaseT]:
    """A few cases that have all traits of all cases, each the one that adds most to those before it."""
    left = {case: traits(case) for case in cases}
    missing = set().union(*left.values())
    chosen = []
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        chosen.append(best)
        missing -= left.pop(best)
    return chosen


def sampled_cases(cases: Iterable[Any], kept: Iterable[Any]) -> list[Any]:
    """The cases for `parametrize` of one argument; all but those kept are for the full run."""
    kept = list(kept)
    return [case if case in kept else pytest.param(case, marks=pytest.mark.full) for case in cases]


def at_some_levels(names: Iterable[str]) -> list[Any]:
    """Captures and names for `parametrize`; all but two captures of each name are for the full run.

    The default run has each name under Dynamo, and the next one in turn under another of `SAMPLED`.
    """
    others = ("export", "symbolic_trace")
    return [
        pytest.param(
            capture,
            name,
            id=f"{name}-{capture}",
            marks=() if capture in ("compile", others[at % 2]) else pytest.mark.full,
        )
        for at, name in enumerate(names)
        for capture in EVERYWHERE
    ]


def pairwise(*axes: Mapping[str, Any]) -> list[Any]:
    """The product of axes, each from names to values, for `parametrize`; most of it is for the full run.

    The default run has each two values of different axes together in one case at least.
    """
    return _covered(axes, 2)


def each_once(*axes: Mapping[str, Any]) -> list[Any]:
    """`pairwise`, of which the default run has each value in one case at least."""
    return _covered(axes, 1)


def _covered(axes: Sequence[Mapping[str, Any]], together: int) -> list[Any]:
    products = list(itertools.product(*axes))
    kept = covering(products, lambda names: set(itertools.combinations(enumerate(names), together)))
    return [
        pytest.param(
            *(axis[name] for axis, name in zip(axes, names, strict=True)),
            id="-".join(names),
            marks=() if names in kept else pytest.mark.full,
        )
        for names in products
    ]
