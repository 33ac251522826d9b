"""Specimens: a model that a rule must rewrite, or a near miss that it must leave alone for a known reason.

Either way outputs and gradients must be eager's, to 1e-9 in float64.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from fxpasses.comparison import SPECIMEN_FACTOR, assert_close_to_eager, nudge
from fxpasses.report.report import Report
from fxpasses.rewrite.registry import AnyRule
from fxpasses.testing.captures import LEVELS, Rewritten, rewrite_at
from fxpasses.testing.expectation import alone
from fxpasses.torch_internals.pytree import tree_leaves


@dataclass(frozen=True)
class Specimen:
    """A model and what a rule must do with it.

    Attributes:
        label: what kind of model it is: ``"plain"``, ``"extra-user"``, ...
        model: in the mode that is to be tested, in float64 unless the dtype is the subject.
        inputs: the arguments of one call.
        count: how often the rule must be applied, or how often at each level; None where both are right.
        code: the reason code of at least one site that must be declined, or that of each level that gives
            one; None where none need be.
        levels: where the expectation holds; elsewhere only the values are compared.
        grads: whether gradients are compared too; False where autograd refuses the model.
        dynamic: whether the graph is captured with symbolic sizes.
        options: further fields of `fxpasses.Options`.
    """

    label: str
    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    count: int | Mapping[str, int] | None = None
    code: str | Mapping[str, str] | None = None
    levels: tuple[str, ...] = LEVELS
    grads: bool = True
    dynamic: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Specimen:
        """The same under other options."""
        return replace(self, options=options)

    def count_at(self, level: str) -> int | None:
        """The number of applications that is expected at a level."""
        return self.count.get(level) if isinstance(self.count, Mapping) else self.count

    def code_at(self, level: str) -> str | None:
        """The reason code that is expected at a level."""
        return self.code.get(level) if isinstance(self.code, Mapping) else self.code


def check_specimen(
    rule: AnyRule | str, specimen: Specimen, level: str, *, dynamic: bool | None = None
) -> Report:
    """Fails unless a rule does what it must with a specimen at a level, and the answers are eager's.

    In float64 to 1e-9, or to a few times what eager's own answers move by when the last bit of its parameters
    and inputs does. Where capturing changes the answers, those of the captured graph will do (seen with torch
    2.13 in core ATen: NaN in gradients, and gradients through what the model detached): to the bit where
    nothing is rewritten, else where they are finite.

    Args:
        rule: a rule, or the name of a registered one.
        specimen: the model.
        level: one of `LEVELS`.
        dynamic: whether sizes are symbolic; None for what the specimen says.

    Raises:
        AssertionError: something differs.
    """
    # Never left to Dynamo, which would make a size symbolic because of the specimen before.
    symbolic = specimen.dynamic if dynamic is None else dynamic
    chosen = {**alone(rule), "profit": "always", **specimen.options}
    try:
        found, answers = _rewritten_answers(specimen, level, chosen, symbolic)
    except RuntimeError:
        if not specimen.grads or _takes_gradients(specimen, level, symbolic):
            raise
        # Some operators of core ATen have no derivative.
        return check_specimen(rule, replace(specimen, grads=False), level, dynamic=dynamic)
    eager, grads = copy.deepcopy(specimen.model), specimen.grads
    with torch.set_grad_enabled(grads):
        expected = _answers(eager, eager, specimen.inputs, grads)
    compare = _comparison(specimen, f"{specimen.label} at {level}: result")
    try:
        compare(answers, expected)
    except AssertionError:
        captured = _rewritten_answers(specimen, level, {"passes": ()}, symbolic)[1]
        if not found.report.applied:
            if not _same(answers, captured):
                raise
        elif _are_close(compare, captured, expected) or not all(each.isfinite().all() for each in captured):
            raise
        else:
            compare(answers, captured)
    name = rule if isinstance(rule, str) else rule.name
    _assert_expected_remarks(found.report, name, specimen, level)
    return found.report


Answers: TypeAlias = Sequence[torch.Tensor]


def _comparison(specimen: Specimen, where: str) -> Callable[[Answers, Answers], None]:
    """Fails where answers are not as close to others as eager's are to the truth."""
    reference = copy.deepcopy(specimen.model).double()
    inputs = tuple(map(_widened, specimen.inputs))
    exact = _answers(reference, reference, inputs, specimen.grads)
    seeds = itertools.count()

    def compare(answers: Answers, expected: Answers) -> None:
        assert_close_to_eager(
            where,
            answers,
            expected,
            exact[: len(expected)],
            factor=SPECIMEN_FACTOR,
            nudged=lambda: _nudged_answers(specimen, next(seeds)),
        )

    return compare


def _are_close(compare: Callable[[Answers, Answers], None], answers: Answers, expected: Answers) -> bool:
    try:
        compare(answers, expected)
    except AssertionError:
        return False
    return True


def _takes_gradients(specimen: Specimen, level: str, dynamic: bool) -> bool:
    """Whether autograd takes the captured graph as it is."""
    try:
        _rewritten_answers(specimen, level, {"passes": ()}, dynamic)
    except RuntimeError:
        return False
    return True


def _assert_expected_remarks(report: Report, rule: str, specimen: Specimen, level: str) -> None:
    """That nothing failed, and that the rule was applied and declined as the specimen says."""
    where = f"{specimen.label} at {level}"
    remarks = "\n".join(map(str, report.remarks)) or "(no site was looked at)"
    failed = [remark for remark in report.remarks if remark.status == "failed"]
    assert not failed, f"{where}: {remarks}"
    if level not in specimen.levels:
        return
    applied, count = report.applied.get(rule, 0), specimen.count_at(level)
    assert count is None or applied == count, f"{where}: {applied} applications, {count} expected\n{remarks}"
    codes, code = {remark.code for remark in report.remarks}, specimen.code_at(level)
    assert code is None or code in codes, f"{where}: no site declined with {code!r}\n{remarks}"


def _rewritten_answers(
    specimen: Specimen, level: str, options: Mapping[str, Any], dynamic: bool
) -> tuple[Rewritten, list[torch.Tensor]]:
    """The model captured at a level and rewritten, and what it answers then."""
    model = copy.deepcopy(specimen.model)
    with torch.set_grad_enabled(specimen.grads):
        found = rewrite_at(level, model, _fresh(specimen.inputs), options, dynamic=dynamic)
        # make_fx runs the model while it traces, which may have updated statistics.
        model.load_state_dict(copy.deepcopy(specimen.model.state_dict()))
        return found, _answers(found.call, model, specimen.inputs, specimen.grads)


def _same(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    """Whether two lists of tensors hold the same numbers to the bit, NaN included."""
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs
    )


def _nudged_answers(specimen: Specimen, seed: int = 0) -> list[torch.Tensor]:
    """What eager answers where parameters, buffers and inputs differ in their last bit."""
    model = copy.deepcopy(specimen.model)
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(seed)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(nudge(tensor))
        inputs = tuple(map(nudge, specimen.inputs))
    with torch.set_grad_enabled(specimen.grads):
        return _answers(model, model, inputs, specimen.grads)


def _fresh(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]


def _widened(given: torch.Tensor) -> torch.Tensor:
    if not given.is_floating_point():
        return given
    return given.detach().double().requires_grad_(given.requires_grad)


def _answers(
    call: Callable[..., Any], model: nn.Module, inputs: Sequence[torch.Tensor], grads: bool
) -> list[torch.Tensor]:
    """Outputs, buffers afterwards and, in float64, the gradients of the outputs' weighted sum."""
    arguments = _fresh(inputs)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        outputs = [output for output in tree_leaves(call(*arguments)) if isinstance(output, torch.Tensor)]
        buffers = [buffer.detach().clone() for buffer in model.buffers() if buffer.is_floating_point()]
        results = [*(output.detach() for output in outputs), *buffers]
        if not grads or any(output.dtype != torch.float64 for output in outputs):
            return results
        targets = [output for output in outputs if output.requires_grad]
        # Not `randn_like`, which draws in the order of the memory: strides may differ from eager's.
        weights = [torch.randn(target.shape, dtype=target.dtype) for target in targets]
    leaves = [tensor for tensor in (*model.parameters(), *arguments) if tensor.requires_grad]
    found = torch.autograd.grad(targets, leaves, weights, allow_unused=True) if targets and leaves else ()
    pairs = zip(leaves, found, strict=False)
    return [*results, *(torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in pairs)]
