"""Comparison with eager: outputs, gradients, and the state after an optimiser step.

In float64 the two must agree to 1e-9, relative: that tests the algebra. In lower precisions both are
compared with a float64 reference, and eager's own error is the yardstick: a rewrite may be twice as far
from the truth as eager is, or within a floor that the dtype cannot do better than. Gradients are compared
in float64 only, unless the caller's own tolerance says otherwise: those of a ReLU net flip at kinks, for
eager and rewrite alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxpasses import counters
from fxpasses.options import Options
from fxpasses.testing.expectation import expect
from fxpasses.torch_internals.pytree import tree_leaves, tree_map_only
from fxpasses.tracing import fresh_call

FLOAT64_TOLERANCE = 1e-9
"""How far two float64 results may be apart, relative to the largest value."""

ERROR_FACTOR = 2.0
"""How many times eager's own error a result in lower precision may have."""

FLOORS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative errors that are accepted whatever eager's error is."""


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
    from fxpasses.backend import backend

    eager, rewritten = copy.deepcopy(model), copy.deepcopy(model)
    chosen: dict[str, Any] = {"options": options} if options is not None else {}
    traced: Callable[..., Any] = torch.compile(fresh_call(), backend=backend, **chosen, **compile_arguments)

    def compiled(*arguments: Any) -> Any:
        return traced(rewritten, arguments)

    reference = _in_float64(model)
    with expect(**expected_counts):
        found = _Run(compiled, rewritten, inputs, grads)
    expected = _Run(eager, eager, inputs, grads)
    exact = _Run(reference, reference, _in_float64(list(inputs)), grads)
    _compare("output", found.outputs, expected.outputs, exact.outputs)
    if not grads:
        return
    if _is_float64(expected):
        _compare("gradient", found.gradients, expected.gradients, exact.gradients)
    stepped = [_after_step(each, lr) for each in (found, expected, exact)]
    if _is_float64(expected):
        _compare("state after a step", *stepped)
    again = [_outputs(run.call, _arguments(run.inputs)) for run in (found, expected, exact)]
    _compare("output after a step", *again)


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
    remarks = [each for report in counters.reports()[seen:] for each in report.remarks if each.rule == rule]
    if code not in {each.code for each in remarks}:
        listed = "\n".join(map(str, remarks)) or "(no site was looked at)"
        raise AssertionError(f"no site was declined with {code!r}; remarks:\n{listed}")


def assert_close_to_eager(
    name: str,
    found: Any,
    expected: Any,
    exact: Any,
    *,
    factor: float = ERROR_FACTOR,
    nudged: Callable[[], Any] | None = None,
) -> None:
    """Fails unless a result is as close to the truth as eager's.

    Args:
        name: what is compared, for the message.
        found: tensors of the rewritten model, in any nest.
        expected: the same of the eager model.
        exact: the same of the eager model in float64.
        factor: how many times eager's own error is allowed in lower precisions.
        nudged: gives what eager answers when parameters and inputs differ in their last bit (`nudge`). Asked
            where a float64 result is too far off: no closer than `factor` times that can be demanded.

    Raises:
        AssertionError: too far off, or of another shape or dtype.
    """
    own = None if nudged is None else lambda: _floating(nudged())
    _compare(name, _floating(found), _floating(expected), _floating(exact), factor=factor, nudged=own)


def nudge(given: torch.Tensor) -> torch.Tensor:
    """The next larger or smaller number for each element, at random; what is not float64 stays."""
    if given.dtype != torch.float64:
        return given
    plain = given.detach()
    ends = torch.where(torch.rand(plain.shape) < 0.5, -torch.inf, torch.inf).to(plain.dtype)
    return torch.nextafter(plain, ends).requires_grad_(given.requires_grad)


class _Run:
    """One call of a model, with the gradients that it gave."""

    def __init__(self, call: Callable[..., Any], owner: object, inputs: Sequence[Any], grads: bool) -> None:
        self.call, self.inputs = call, inputs
        self.module = owner if isinstance(owner, torch.nn.Module) else None
        arguments = _arguments(inputs)
        with torch.random.fork_rng(devices=()), torch.set_grad_enabled(grads):
            torch.manual_seed(0)
            raw = call(*arguments)
        self.outputs = [each.detach() for each in _floating(raw)]
        self.gradients: list[torch.Tensor] = []
        if grads:
            leaves = [each for each in _floating(raw) if each.requires_grad]
            torch.autograd.backward([each.sum() for each in leaves])
            self.gradients = [each.grad for each in self._leaves(arguments) if each.grad is not None]

    def _leaves(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        parameters = list(self.module.parameters()) if self.module is not None else []
        return [*parameters, *(each for each in _floating(arguments) if each.requires_grad)]


def _after_step(run: _Run, lr: float) -> list[torch.Tensor]:
    """Parameters and buffers after one SGD step."""
    if run.module is None:
        return []
    parameters = [each for each in run.module.parameters() if each.requires_grad]
    if parameters:
        torch.optim.SGD(parameters, lr=lr).step()
    return [each.detach() for each in run.module.state_dict().values() if each.is_floating_point()]


def _outputs(call: Callable[..., Any], arguments: Sequence[Any]) -> list[torch.Tensor]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        return [each.detach() for each in _floating(call(*arguments))]


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

    def widened(each: torch.Tensor) -> torch.Tensor:
        if not each.is_floating_point():
            return each
        return each.detach().double().requires_grad_(each.requires_grad)

    return tree_map_only(torch.Tensor, widened, given)


def _floating(nest: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(nest)
    return [each for each in leaves if isinstance(each, torch.Tensor) and each.is_floating_point()]


def _is_float64(run: _Run) -> bool:
    return all(each.dtype == torch.float64 for each in run.outputs)


def _compare(
    name: str,
    found: list[torch.Tensor],
    expected: list[torch.Tensor],
    exact: list[torch.Tensor],
    *,
    factor: float = ERROR_FACTOR,
    nudged: Callable[[], list[torch.Tensor]] | None = None,
) -> None:
    if len(found) != len(expected):
        raise AssertionError(f"{len(found)} {name}s, where eager gives {len(expected)}")
    floor = _VANISHING * max(map(_largest, expected), default=0.0)
    for index, (ours, eager, truth) in enumerate(zip(found, expected, exact, strict=True)):
        label = f"{name} {index}"
        if (ours.shape, ours.dtype, ours.device) != (eager.shape, eager.dtype, eager.device):
            raise AssertionError(f"{label} is {_kind(ours)}, where eager gives {_kind(eager)}")
        if not torch.equal(ours.isnan(), eager.isnan()):
            raise AssertionError(f"{label} has NaNs where eager has none, or none where eager has some")
        if eager.dtype == torch.float64:
            error, own = _distance(ours, eager, floor), 0.0
            if error > FLOAT64_TOLERANCE and nudged is not None:
                own = _distance(nudged()[index], eager, floor)
            _require(label, error, max(FLOAT64_TOLERANCE, factor * own), own)
        else:
            own = _distance(eager, truth)
            _require(label, _distance(ours, truth), max(factor * own, FLOORS[eager.dtype]), own)


_VANISHING = 1e-6
"""Beside the largest value of its kind; below, a float64 result may be nothing but rounding: the gradient of
a bias ahead of a batch norm over the batch is zero, computed as the difference of equal numbers."""


def _require(label: str, error: float, allowed: float, own: float) -> None:
    if error > allowed:
        raise AssertionError(
            f"{label} is {error:.3g} off, relative to its largest value; {allowed:.3g} is allowed"
            + (f" (eager itself is {own:.3g} off)" if own else "")
        )


def _distance(first: torch.Tensor, second: torch.Tensor, floor: float = 0.0) -> float:
    """The largest difference, relative to the largest finite value of the second tensor, or to `floor`."""
    first, second = first.double(), second.double()
    if not first.numel():
        return 0.0
    gap = (first - second).abs().nan_to_num(nan=0.0, posinf=0.0)
    if not torch.equal(first.isinf(), second.isinf()):
        return float("inf")
    return gap.max().item() / max(_largest(second), floor, 1e-30)


def _largest(given: torch.Tensor) -> float:
    """The largest finite magnitude; 0 where there is none."""
    finite = given.detach().double().abs().nan_to_num(nan=0.0, posinf=0.0)
    return finite.max().item() if finite.numel() else 0.0


def _kind(given: torch.Tensor) -> str:
    return f"{tuple(given.shape)} {given.dtype} on {given.device}"
