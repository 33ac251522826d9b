"""One operator on one recorded input: compiled as a graph of its own, checked, and timed against eager.

The graph is handed to each configuration's compiler directly: Dynamo takes no part, and its guards are not
in the times. Results are checked before anything is timed: a configuration whose result is wrong has no
time. Eager and all configurations are timed in turns. Inductor's caches stay on: what compiling took is a
first compilation only where nothing was compiled before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from benchmarks.operators.accuracy import disagreement
from benchmarks.operators.call import Compiler, Prepared, RepeatableCall
from benchmarks.operators.configurations import CONFIGURATIONS as CONFIGURATIONS
from benchmarks.operators.inputs.argument_rules import UnmaterialisableError, base_name
from benchmarks.operators.inputs.log import Sample
from benchmarks.operators.inputs.materialise import Target, materialise
from benchmarks.operators.inputs.recorder import computes
from benchmarks.torch_internals import (
    OpOverload,
    has_inductor_lowering,
    operators_for_inductor,
)
from fxpasses.devices.timing import Effort, measure_interleaved

Status = Literal["ok", "inaccurate", "failed"]
Observe: TypeAlias = Callable[[Sample, Mapping[str, Callable[[], object]]], None]


SLOW_COMPILATION = 10.0
"""Seconds above which a compilation, with the first run, is worth a note."""


@dataclass(frozen=True)
class Outcome:
    """What a configuration made of a sample; `times` (seconds, one a round) are empty unless it is ok."""

    status: Status
    reason: str = ""
    times: tuple[float, ...] = ()
    compile_seconds: float = math.nan


@dataclass(frozen=True)
class Measurement:
    """A sample's times in eager mode (seconds, one a round) and the outcome of every configuration.

    A `reason` says why the sample was not run; then there is nothing else.
    """

    sample: Sample
    reason: str = ""
    eager: tuple[float, ...] = ()
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How samples are run: where, by which configurations, how often, and whether results are checked.

    `observe` is called for each sample with the functions of eager and of each configuration that was timed,
    once the times are taken: for a profiler. `note` is called with what a user wants to know while it runs.
    """

    target: Target
    configurations: Mapping[str, Compiler]
    effort: Effort
    accuracy: bool = True
    observe: Observe | None = None
    note: Callable[[str], None] = lambda text: None


def measure_operator(
    operator: OpOverload, samples: Sequence[Sample], plan: Plan
) -> tuple[str, list[Measurement]]:
    """Runs all samples of an operator.

    Returns:
        Why the operator was skipped as a whole, or an empty text; and what was measured of each sample.
    """
    reason = _reason_to_skip(operator)
    if reason:
        return reason, []
    measurements: list[Measurement] = []
    for sample in samples:
        try:
            call = RepeatableCall(operator, *materialise(operator, sample.call, plan.target))
            result = call.eager().function()
            if not any(measurement.outcomes for measurement in measurements):
                reason = _reason_not_implemented(call, result)
                if reason:
                    return reason, []
        except UnmaterialisableError as error:
            measurements.append(Measurement(sample, str(error)))
        except NotImplementedError as error:
            reason = f"no kernel for the {plan.target.device.type}: {first_line(error)}"
            measurements.append(Measurement(sample, reason))
        except Exception as error:
            measurements.append(Measurement(sample, f"eager: {first_line(error)}"))
        else:
            measurements.append(_measure(operator, call, result, sample, plan))
    return "", measurements


def first_line(error: BaseException) -> str:
    """An exception as one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else '(no message)'}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def _reason_to_skip(operator: OpOverload) -> str:
    """Why an operator is not measured, whatever its inputs."""
    if not computes(operator):
        return "computes nothing: a view, a constructor, or no tensor in or out"
    if torch.Tag.dynamic_output_shape in operator.tags and base_name(operator) != "index":
        return "the shape of its result depends on values"
    return ""


def _reason_not_implemented(call: RepeatableCall, result: object) -> str:
    """Why inductor has nothing of its own for an operator; empty where it has.

    Convolutions count as implemented even where the kernel is ATen's: inductor chooses their layout.
    """
    try:
        remaining = operators_for_inductor(call.graph(result), call.inputs())
    except Exception as error:
        return f"inductor cannot trace it: {first_line(error)}"
    operators = {target for target in remaining if isinstance(target, OpOverload)}
    names = sorted(str(operator) for operator in operators)
    if any("convolution" in name for name in names) or any(map(has_inductor_lowering, operators)):
        return ""
    return f"inductor calls ATen's kernel: {', '.join(names)}" if names else ""


def _measure(
    operator: OpOverload, call: RepeatableCall, result: object, sample: Sample, plan: Plan
) -> Measurement:
    eager = call.eager()
    expected = eager.results() if plan.accuracy else []
    random = torch.Tag.nondeterministic_seeded in operator.tags
    outcomes: dict[str, Outcome] = {}
    functions = {"eager": eager.function}
    for name, compiler in plan.configurations.items():
        try:
            prepared, actual, seconds = _compile(call, compiler, result, plan, f"{operator}: {name}")
            wrong = plan.accuracy and disagreement(actual, expected, call.exact, values=not random)
            if not wrong:
                prepared.function()  # a CUDA graph is recorded by the second call, which may fail as well
        except Exception as error:
            outcomes[name] = Outcome("failed", first_line(error))
            continue
        outcomes[name] = Outcome("inaccurate" if wrong else "ok", wrong or "", (), seconds)
        if not wrong:
            functions[name] = prepared.function
    del expected
    times = measure_interleaved(functions, plan.target.device, plan.effort)
    if plan.observe:
        plan.observe(sample, functions)
    for name in functions:
        if name in outcomes:
            outcomes[name] = Outcome("ok", "", tuple(times[name]), outcomes[name].compile_seconds)
    return Measurement(sample, "", tuple(times["eager"]), outcomes)


def _compile(
    call: RepeatableCall, compiler: Compiler, result: object, plan: Plan, name: str
) -> tuple[Prepared, list[torch.Tensor], float]:
    """The compiled call, the results of its first run, and the seconds that both took."""
    start = time.perf_counter()
    try:
        prepared = call.compiled(compiler, result)
        actual = prepared.results()
    finally:
        seconds = time.perf_counter() - start
        if seconds > SLOW_COMPILATION:
            plan.note(f"{name}: compiling and the first run took {seconds:.1f} s")
    return prepared, actual, seconds
