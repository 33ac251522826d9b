"""Tests of a whole model against eager: outputs, gradients, and the state after an optimiser step.

How close is close enough is said in `fxpasses.comparison`. Gradients are compared in float64 only: in lower
precisions those of a ReLU net flip at kinks, for eager and rewrite alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxpasses.backend.door import backend
from fxpasses.comparison import assert_close_to_eager, floating
from fxpasses.options import Options
from fxpasses.report import counters
from fxpasses.testing.expectation import expect
from fxpasses.torch_internals.dynamo import fresh_call
from fxpasses.torch_internals.pytree import tree_map_only


def assert_rewrites(
    model: torch.nn.Module | Callable[..., Any],
    inputs: Sequence[Any],
    expected_counts: Mapping[str, int],
    *,
    grads: bool = True,
    options: Options | Mapping[str, Any] | None = None,
    lr: float = 1e-3,
    **compile_arguments: Any,
) -> None:
    """Compiles the model with fxpasses and compares it with eager.

    Outputs are compared; with `grads` the gradients of the sum of the outputs for parameters and inputs,
    and outputs, parameters and buffers after one SGD step too. The model itself is not changed.

    Args:
        model: a module in the mode that is to be tested, or a function of tensors.
        inputs: the arguments of one call.
        expected_counts: rule name to number of applications.
        grads: whether to test training too.
        options: fields of `fxpasses.Options`, or `Options`.
        lr: learning rate of the SGD step.
        compile_arguments: further arguments of torch.compile, such as ``dynamic=True``.

    Raises:
        AssertionError: a count or a value differs.
    """
    eager, rewritten = copy.deepcopy(model), copy.deepcopy(model)
    chosen: dict[str, Any] = {"options": options} if options is not None else {}
    compiled = _compiled(rewritten, **chosen, **compile_arguments)
    reference = _in_float64(model)
    with expect(**expected_counts):
        found = _ModelCall(compiled, rewritten, inputs, grads)
    expected = _ModelCall(eager, eager, inputs, grads)
    exact = _ModelCall(reference, reference, _in_float64(list(inputs)), grads)
    assert_close_to_eager("output", found.outputs, expected.outputs, exact.outputs)
    if not grads:
        return
    if _is_float64(expected):
        assert_close_to_eager("gradient", found.gradients, expected.gradients, exact.gradients)
    stepped = [_after_step(run, lr) for run in (found, expected, exact)]
    if _is_float64(expected):
        assert_close_to_eager("state after a step", *stepped)
    again = [_outputs(run.call, _arguments(run.inputs)) for run in (found, expected, exact)]
    assert_close_to_eager("output after a step", *again)


def assert_declines(
    model: torch.nn.Module | Callable[..., Any],
    inputs: Sequence[Any],
    rule: str,
    *,
    code: str,
    grads: bool = True,
    options: Options | Mapping[str, Any] | None = None,
    **compile_arguments: Any,
) -> None:
    """Compiles the model and fails unless a rule leaves it alone, for a reason of the given code.

    Answers and gradients are compared with eager's as `assert_rewrites` does.

    Args:
        model: a module in the mode that is to be tested, or a function of tensors.
        inputs: the arguments of one call.
        rule: the name of a registered rule.
        code: the reason code of at least one site.
        grads: whether to test training too.
        options: fields of `fxpasses.Options`, or `Options`.
        compile_arguments: further arguments of torch.compile, such as ``dynamic=True``.

    Raises:
        AssertionError: the rule was applied, no site was declined with the code, or a value differs.
    """
    seen = len(counters.reports())
    assert_rewrites(model, inputs, {rule: 0}, grads=grads, options=options, **compile_arguments)
    remarks = [
        remark for report in counters.reports()[seen:] for remark in report.remarks if remark.rule == rule
    ]
    if code not in {remark.code for remark in remarks}:
        listed = "\n".join(map(str, remarks)) or "(no site was looked at)"
        raise AssertionError(f"no site was declined with {code!r}; remarks:\n{listed}")


def _compiled(model: torch.nn.Module | Callable[..., Any], **compile_arguments: Any) -> Callable[..., Any]:
    """The model as `torch.compile` with our backend runs it, traced anew whatever was compiled before."""
    traced: Callable[..., Any] = torch.compile(fresh_call(), backend=backend, **compile_arguments)

    def compiled(*arguments: Any) -> Any:
        return traced(model, arguments)

    return compiled


class _ModelCall:
    """One call of a model, with the gradients that it gave."""

    def __init__(self, call: Callable[..., Any], owner: object, inputs: Sequence[Any], grads: bool) -> None:
        self.call, self.inputs = call, inputs
        self.module = owner if isinstance(owner, torch.nn.Module) else None
        arguments = _arguments(inputs)
        with torch.random.fork_rng(devices=()), torch.set_grad_enabled(grads):
            torch.manual_seed(0)
            raw = call(*arguments)
        self.outputs = [output.detach() for output in floating(raw)]
        self.gradients: list[torch.Tensor] = []
        if grads:
            leaves = [output for output in floating(raw) if output.requires_grad]
            torch.autograd.backward([leaf.sum() for leaf in leaves])
            self.gradients = [leaf.grad for leaf in self._leaves(arguments) if leaf.grad is not None]

    def _leaves(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        parameters = list(self.module.parameters()) if self.module is not None else []
        return [*parameters, *(tensor for tensor in floating(arguments) if tensor.requires_grad)]


def _after_step(run: _ModelCall, lr: float) -> list[torch.Tensor]:
    """Parameters and buffers after one SGD step."""
    if run.module is None:
        return []
    parameters = [parameter for parameter in run.module.parameters() if parameter.requires_grad]
    if parameters:
        torch.optim.SGD(parameters, lr=lr).step()
    return [tensor.detach() for tensor in run.module.state_dict().values() if tensor.is_floating_point()]


def _outputs(call: Callable[..., Any], arguments: Sequence[Any]) -> list[torch.Tensor]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return [output.detach() for output in floating(call(*arguments))]


def _arguments(inputs: Sequence[Any]) -> list[Any]:
    """Fresh leaves, so that in-place operators and gradients of one run do not reach the next."""

    def fresh(given: torch.Tensor) -> torch.Tensor:
        return given.detach().clone().requires_grad_(given.requires_grad)

    result: list[Any] = tree_map_only(torch.Tensor, fresh, list(inputs))
    return result


def _in_float64(given: Any) -> Any:
    """A copy in float64: of a module, of tensors in any nest; a function is itself."""
    if isinstance(given, torch.nn.Module):
        return copy.deepcopy(given).double()
    if not isinstance(given, list):
        return given

    def widened(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    return tree_map_only(torch.Tensor, widened, given)


def _is_float64(run: _ModelCall) -> bool:
    return all(output.dtype == torch.float64 for output in run.outputs)
