"""Correctness first: the error against float64, with eager's own error as the yardstick.

Outputs, the loss and, where BatchNorm updates its statistics, the buffers after the step are asked for what
`fxpasses.comparison` calls RESULTS; gradients, for GRADIENTS, with eager's worst parameter as the yardstick.
Half types accumulate rounding in every layer, and eager's own error decides for the most part. For a
variant that computes a float32 model in bfloat16 (`precision=bfloat16`), it is that of eager under autocast.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.models.cases import (
    DTYPES,
    Case,
    CaseError,
    Step,
    build_inputs,
    build_model,
    randomise_batch_norms,
    run_step,
)
from fxpasses.comparison import GRADIENTS, RESULTS, gradient_errors, relative_error

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """What a step gives in float64, how far eager is from it in the case's dtype, and where both started.

    Attributes:
        state: the model's state before the step, in float32.
        values: outputs, loss and changed buffers in float64, by name.
        gradients: of the parameters in float64, by name; empty in inference.
        value_error: e(eager), the largest over the values.
        gradient_error: eager's largest error over the parameters.
    """

    state: Tensors
    values: Tensors
    gradients: Tensors
    value_error: float
    gradient_error: float

    def save(self, path: Path) -> None:
        """Writes the reference to `path`."""
        torch.save(self.__dict__, path)

    @staticmethod
    def load(path: Path) -> Reference:
        """Reads what `save` wrote."""
        return Reference(**torch.load(path, weights_only=True, map_location="cpu"))


@dataclass(frozen=True)
class Accuracy:
    """The errors of a variant and what they may be; `wrong` says what is not right, None where all is."""

    value_error: float
    value_tolerance: float
    gradient_error: float | None
    gradient_tolerance: float | None
    wrong: str | None

    def to_json(self) -> dict[str, object]:
        """The fields."""
        return asdict(self)


def make_reference(case: Case) -> Reference:
    """Builds the model, gives its BatchNorms work to do and runs it in float64 and in the case's dtype.

    Raises:
        ModelSpecError: the model cannot be built.
        CaseError: it is random in this mode, or its float64 results are not finite.
    """
    state = initial_state(case)
    exact_values, exact_gradients = _run(case, state, "float64", case.seed)
    bad = [name for name, tensor in (exact_values | exact_gradients).items() if not tensor.isfinite().all()]
    if bad:
        raise CaseError(f"{case.model}: {bad[0]} is not finite in float64: there is nothing to compare with.")
    values, gradients = _run(case, state, case.dtype, case.seed)
    again, _ = _run(case, state, case.dtype, case.seed + 1)
    value_error, _ = _worst_value(values, exact_values)
    if _worst_value(again, exact_values)[0] > RESULTS.allowed(DTYPES[case.dtype], value_error):
        raise CaseError(f"{case.model} draws random numbers in mode {case.mode}: it cannot be checked.")
    gradient_error, _ = _worst(gradient_errors(gradients, exact_gradients))
    return Reference(state, exact_values, exact_gradients, value_error, gradient_error)


def initial_state(case: Case) -> Tensors:
    """The parameters and buffers that every variant starts from, in float32 on the CPU."""
    single = Case(**{**case.__dict__, "dtype": "float32"})
    model = build_model(single)
    randomise_batch_norms(single, model)
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def results_of(step: Step, model: torch.nn.Module, before: Tensors) -> tuple[Tensors, Tensors]:
    """The named values and gradients of a step: outputs, loss, and the buffers that it changed."""
    values = {f"output {number}": output.detach() for number, output in enumerate(step.outputs)}
    if step.loss is not None:
        values["loss"] = step.loss.detach()
    for name, buffer in model.named_buffers():
        if name in before and buffer.is_floating_point() and model.training:
            values[f"buffer {name}"] = buffer.detach()
    gradients = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return {name: value.cpu() for name, value in values.items()}, {
        name: gradient.cpu() for name, gradient in gradients.items()
    }


def judge(
    case: Case, values: Tensors, gradients: Tensors, reference: Reference, precision: str = "eager"
) -> Accuracy:
    """Compares a variant's results with the reference.

    Args:
        case: what was run.
        values: the variant's outputs, loss and changed buffers, by name.
        gradients: its gradients, by name.
        reference: of the case.
        precision: `fxpasses.Options.precision` of the variant.
    """
    value_error, value_name = _worst_value(values, reference.values)
    dtype, own_error = case.dtype, reference.value_error
    if precision != "eager":
        dtype, own_error = precision, _autocast_error(case, reference, DTYPES[precision])
    value_tolerance = RESULTS.allowed(DTYPES[dtype], own_error)
    wrong = None
    if not value_error <= value_tolerance:
        wrong = (
            f"{value_name}: error {value_error:.2e} against float64, at most {value_tolerance:.2e} allowed"
        )
    if not case.trains:
        return Accuracy(value_error, value_tolerance, None, None, wrong)
    gradient_error, gradient_name = _worst(gradient_errors(gradients, reference.gradients))
    gradient_tolerance = GRADIENTS.allowed(DTYPES[case.dtype], reference.gradient_error)
    if wrong is None and not gradient_error <= gradient_tolerance:
        found = f"error {gradient_error:.2e} against float64, at most {gradient_tolerance:.2e} allowed"
        wrong = f"gradient of {gradient_name}: {found}"
    return Accuracy(value_error, value_tolerance, gradient_error, gradient_tolerance, wrong)


def _run(case: Case, state: Tensors, dtype: str, seed: int) -> tuple[Tensors, Tensors]:
    model = build_model(case, state).to(DTYPES[dtype])
    inputs = build_inputs(case, model)
    inputs = tuple(tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor for tensor in inputs)
    torch.manual_seed(seed)
    step = run_step(case, model, list(model.parameters()), inputs)
    return results_of(step, model, state)


def _autocast_error(case: Case, reference: Reference, dtype: torch.dtype) -> float:
    """How far eager is from the reference under autocast."""
    with torch.autocast(torch.device(case.device).type, dtype):
        values, _ = _run(case, reference.state, case.dtype, case.seed)
    return _worst_value(values, reference.values)[0]


def _worst_value(values: Tensors, exact: Tensors) -> tuple[float, str]:
    return _worst({name: _value_error(values.get(name), expected) for name, expected in exact.items()})


def _value_error(value: torch.Tensor | None, exact: torch.Tensor) -> float:
    missing = value is None or value.shape != exact.shape
    return float("inf") if missing else relative_error(value, exact)


def _worst(errors: dict[str, float]) -> tuple[float, str]:
    if not errors:
        return 0.0, "nothing"
    name = max(errors, key=lambda name: errors[name])
    return errors[name], name
