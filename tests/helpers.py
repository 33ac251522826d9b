"""What the adversarial tests share: batch norms that are no identity, capture by every front end, comparison.

A test states a model, its inputs and an outcome: how many sites are rewritten, or the reason code with which
the site is declined. `check` captures the model, runs the passes, and compares outputs and gradients with
eager to 1e-9 in float64, whatever the outcome was: a declined site must give eager's answers too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

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


def pair(conv: nn.Module, norm: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A convolution (or another layer) and the batch norm after it, randomised and in eval mode."""
    return randomised(nn.Sequential(conv, norm), dtype)


def image(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> torch.Tensor:
    """A random tensor; an image of [2, 3, 8, 8] unless told otherwise."""
    return torch.randn(shape or (2, 3, 8, 8), dtype=dtype, requires_grad=grad)


# Capture --------------------------------------------------------------------------------------------

Capture = Callable[[nn.Module, tuple[Any, ...]], GraphModule | ExportedProgram]


def _pre_dispatch(model: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    with enable_python_dispatcher():
        return make_fx(model, pre_dispatch=True)(*inputs)


def _aten(model: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    return torch.export.export(model, inputs).run_decompositions()


CAPTURES: dict[str, Capture] = {
    "pre_dispatch": _pre_dispatch,
    "export": lambda model, inputs: torch.export.export(model, inputs),
    "aten": _aten,
    "symbolic_trace": lambda model, inputs: torch.fx.symbolic_trace(model),
}
"""Front ends whose graph the caller holds, by name."""

GRAPHS = tuple(CAPTURES)
EVERYWHERE = ("compile", *GRAPHS)
SAMPLED = [
    pytest.param(each, marks=pytest.mark.full) if each in ("pre_dispatch", "aten") else each
    for each in EVERYWHERE
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
    grads: bool = True,
    profit: str = "model",
    **compile_arguments: Any,
) -> Report:
    """Captures, rewrites and compares with eager; fails unless the outcome is the expected one.

    Args:
        capture: ``"compile"``, or a key of `CAPTURES`.
        model: a module in the mode that is to be tested; it is not changed.
        inputs: the arguments of one call.
        outcome: the number of rewritten sites, or the code with which at least one site was declined while
            none was rewritten.
        grads: whether to compare gradients too, with autograd recording.
        profit: the option of that name; ``"always"`` where legality alone is the subject.
        compile_arguments: further arguments of torch.compile.
    """
    if capture == "compile":
        return check_compiled(model, inputs, outcome, grads=grads, profit=profit, **compile_arguments)
    return check_captured(capture, model, inputs, outcome, grads=grads, profit=profit)


def check_compiled(
    model: nn.Module | Callable[..., Any],
    inputs: Sequence[Any],
    outcome: Outcome,
    *,
    grads: bool = True,
    profit: str = "model",
    inner: str = "eager",
    **compile_arguments: Any,
) -> Report:
    """`check` for torch.compile: one SGD step, and the outputs after it, are compared as well."""
    torch.compiler.reset()
    fxpasses.reset()
    options = {"inner": inner, "profit": profit}
    count = outcome if isinstance(outcome, int) else 0
    assert_rewrites(model, inputs, {RULE: count}, grads=grads, options=options, **compile_arguments)
    report = Report.merge(fxpasses.reports())
    require_outcome(report, outcome)
    return report


def check_captured(
    capture: str,
    model: nn.Module,
    inputs: Sequence[Any],
    outcome: Outcome,
    *,
    grads: bool = True,
    profit: str = "model",
) -> Report:
    """`check` for `fxpasses.optimize`, with the invariants that every optimised graph keeps."""
    eager, ours = copy.deepcopy(model), copy.deepcopy(model)
    with torch.set_grad_enabled(grads):
        program = CAPTURES[capture](ours, tuple(fresh(inputs)))
        before = printed(program)
        result = fxpasses.optimize(program, tuple(inputs), {"profit": profit})
        assert printed(program) == before, "the caller's graph was changed"
        require_outcome(result.report, outcome)
        require_wellformed(result.graph_module)
        program_call = result.exported_program.module() if result.exported_program else result.graph_module
        found = outputs_and_gradients(program_call, list(ours.parameters()), inputs, grads)
        expected = outputs_and_gradients(eager, list(eager.parameters()), inputs, grads)
    require_equal(found, expected)
    return result.report


def require_outcome(report: Report, outcome: Outcome) -> None:
    """Fails unless as many sites were rewritten, or one was declined with that code and none rewritten."""
    remarks = "\n".join(map(str, report.remarks)) or "(no site was looked at)"
    failed = [each for each in report.remarks if each.status == "failed"]
    assert not failed, remarks
    if isinstance(outcome, int):
        assert report.applied.get(RULE, 0) == outcome, remarks
    else:
        assert not report.applied.get(RULE, 0), remarks
        assert outcome in {each.code for each in report.declined}, remarks


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
    children = [printed(each) for each in graph_module.children() if isinstance(each, GraphModule)]
    return "\n".join([*map(str, lines), str(users), graph_module.code, *children])


def fresh(inputs: Sequence[Any]) -> list[Any]:
    """The inputs as new leaves; strides are kept."""
    return [
        each.detach().clone().requires_grad_(each.requires_grad) if isinstance(each, torch.Tensor) else each
        for each in inputs
    ]


def outputs_and_gradients(
    call: Callable[..., Any], parameters: list[torch.Tensor], inputs: Sequence[Any], grads: bool
) -> list[torch.Tensor | None]:
    """The outputs of one call, then the gradients of their sum for parameters and inputs; None for none."""
    arguments = fresh(inputs)
    leaves = [*parameters, *(each for each in arguments if isinstance(each, torch.Tensor))]
    for leaf in leaves:
        leaf.grad = None
    outputs = [each for each in tree_leaves(call(*arguments)) if torch.is_tensor(each)]
    if grads:
        torch.stack([each.double().sum() for each in outputs if each.requires_grad]).sum().backward()
    result = [each.detach() for each in outputs]
    return [*result, *(leaf.grad if leaf.is_leaf else None for leaf in leaves if leaf.requires_grad)]


def strides_that_matter(given: torch.Tensor) -> list[int]:
    """A tensor's strides along the axes that have more than one element."""
    return [stride for size, stride in zip(given.shape, given.stride(), strict=True) if size > 1]


def require_equal(found: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    """Fails unless two lists of float64 tensors agree to 1e-9 and are None in the same places."""
    assert [each is None for each in found] == [each is None for each in expected]
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    exact = [b.double() for _, b in pairs]
    assert_close_to_eager("result", [a for a, _ in pairs], [b for _, b in pairs], exact)


# Rules in general ----------------------------------------------------------------------------------


def check_rule(
    capture: str,
    model: nn.Module,
    inputs: tuple[Any, ...],
    outcome: int | str,
    *,
    rule: str,
    grads: bool = True,
    **options: Any,
) -> Report:
    """Captures, rewrites with `profit="always"`, and compares outputs and gradients with eager.

    The outcome is a number of applications of the rule, or the code of a declined site where there is none.
    """
    chosen = {"profit": "always", **options}
    ours = copy.deepcopy(model)
    with torch.set_grad_enabled(grads):
        if capture == "compile":
            torch.compiler.reset()
            fxpasses.reset()
            call = torch.compile(ours, backend="fxpasses", options={"inner": "eager", **chosen})
            call(*fresh(inputs))
            report = Report.merge(fxpasses.reports())
        else:
            program = CAPTURES[capture](ours, tuple(fresh(inputs)))
            result = fxpasses.optimize(program, tuple(inputs), chosen)
            call = result.exported_program.module() if result.exported_program else result.graph_module
            report = result.report
            result.graph_module.graph.lint()
        found = outputs_and_gradients(call, list(ours.parameters()), inputs, grads)
        expected = outputs_and_gradients(model, list(model.parameters()), inputs, grads)
    remarks = "\n".join(map(str, report.remarks)) or "(no site)"
    assert not [each for each in report.remarks if each.status == "failed"], remarks
    if isinstance(outcome, int):
        assert report.applied.get(rule, 0) == outcome, remarks
    else:
        assert not report.applied.get(rule, 0), remarks
        assert outcome in {each.code for each in report.declined if each.rule == rule}, remarks
    require_equal(found, expected)
    return report
