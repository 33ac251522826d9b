"""The process of one variant: `python -m benchmarks.models.worker DESCRIPTOR`, started by `workers`.

It reads requests from a connection and answers each, until the other side closes. An exception is an
answer too. What libraries print goes to the file that the parent gave as standard output.
"""

from __future__ import annotations

import importlib
import math
import re
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.models.accuracy import Accuracy, Reference, judge, make_reference, results_of
from benchmarks.models.cases import (
    Case,
    Inputs,
    Model,
    Step,
    build_inputs,
    build_model,
    mark_dynamic_batch,
    run_step,
    tensors_of,
)
from benchmarks.models.memory import MemoryMeter, release_free_pages
from benchmarks.models.messages import (
    CheckModels,
    CountGraphs,
    Failure,
    MakeReference,
    Prepare,
    Prepared,
    Reply,
    Request,
    TimeSteps,
)
from benchmarks.models.saved_tensors import saved_bytes
from benchmarks.models.variants import Variant, build_variant, slowed
from benchmarks.torch_internals import captured_graphs, generated_graphs, preload_compiler, rewrite_counts
from fxpasses.cli.model_specs import load_model

SAMPLE_SECONDS = 0.1
_WARM_UP_STEPS = 2
_MESSAGE_LENGTH = 2000
_CLOSE = 1e-2
"""How far results at other sizes may be from eager's, in units of the largest: what is prepared is judged
more closely."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Server:
    """Answers requests; holds the step of the variant that it prepared."""

    def __init__(self) -> None:
        self._built: Model | None = None
        self._model = torch.nn.Module()
        self._steps: dict[Case | None, tuple[Callable[[], object], int]] = {}

    def answer(self, request: Request) -> Reply:
        """Does what is asked."""
        match request:
            case CheckModels():
                for name in request.names:
                    load_model(name, default_source="timm")
                return None
            case MakeReference():
                torch.set_num_threads(request.case.threads)
                make_reference(request.case).save(Path(request.path))
                release_free_pages()
                return None
            case Prepare():
                return self._prepare(request)
            case TimeSteps():
                return self._time_steps(request.case)
            case CountGraphs():
                return captured_graphs()

    def _prepare(self, request: Prepare) -> Prepared:
        case, variant = request.case, request.variant
        torch.set_num_threads(case.threads)
        model = _build(request)
        inputs = build_inputs(case, model)
        mark_dynamic_batch(case, inputs)
        _preload(variant)
        meter = MemoryMeter(torch.device(case.device))
        if request.extent == "saved bytes":
            built = build_variant(variant, case, model, inputs)
            return Prepared(saved_bytes=_saved_bytes(model, built, inputs), rules=_rules())

        start = time.perf_counter()
        built = build_variant(variant, case, model, inputs)
        parameters = list(model.parameters())
        torch.manual_seed(case.seed)
        first = run_step(case, built, parameters, inputs)
        _synchronize(case)
        seconds = time.perf_counter() - start if variant.kind != "eager" else None
        if request.extent == "compilation":
            return Prepared(seconds, rules=_rules(), generated=generated_graphs())
        accuracy = _judge(request, first, model)
        del first
        if accuracy is not None and accuracy.wrong is not None:
            return Prepared(seconds, accuracy, rules=_rules())

        def step() -> None:
            run_step(case, built, parameters, inputs)
            _synchronize(case)

        self._built, self._model = built, model
        timed = slowed(step, variant.slowdown) if variant.slowdown > 1 else step
        calls = _calibrate(timed)
        self._steps[None] = timed, calls
        meter.start()
        step()
        peak = meter.peak()
        saved = _saved_bytes(model, built, inputs) if case.trains else None
        release_free_pages()  # the turns may be long in coming
        return Prepared(seconds, accuracy, calls, peak, saved, _rules())

    def _time_steps(self, case: Case | None) -> float:
        if self._built is None:
            raise RuntimeError("a turn was asked for before a variant was prepared")
        if case is not None and case not in self._steps:
            self._steps[case] = self._step_of(case, self._built)
        step, calls = self._steps[case]
        step()  # the other workers' turns have emptied the caches
        # The median over a turn: a process that the system preempts for one call is not thereby slow.
        seconds = statistics.median(timeit.Timer(step).repeat(calls, number=1))
        release_free_pages()  # or as many workers as there are variants would hold the memory of a step
        return seconds

    def _step_of(self, case: Case, built: Model) -> tuple[Callable[[], object], int]:
        """A step at other sizes, in inference, whose first results are compared with eager's."""
        inputs = build_inputs(case, self._model)
        found = run_step(case, built, [], inputs).outputs
        for output, expected in zip(found, run_step(case, self._model, [], inputs).outputs, strict=True):
            error = (output - expected).abs().max() / expected.abs().max()
            if not error <= _CLOSE:
                raise RuntimeError(f"batch {case.batch}, size {case.size}: eager's result is {error:.1e} off")

        def step() -> None:
            run_step(case, built, [], inputs)
            _synchronize(case)

        return step, _calibrate(step)


def _build(request: Prepare) -> torch.nn.Module:
    # The reference is read here and once more to judge: in between it would count as memory of the model.
    state = None if request.reference is None else Reference.load(Path(request.reference)).state
    return build_model(request.case, state)


def _judge(request: Prepare, step: Step, model: torch.nn.Module) -> Accuracy | None:
    if request.reference is None:
        return None
    reference = Reference.load(Path(request.reference))
    found = results_of(step, model, reference.state)
    return judge(request.case, *found, reference, request.variant.precision)


def _preload(variant: Variant) -> None:
    if variant.kind in ("onnxruntime", "openvino"):
        importlib.import_module(variant.kind)
        importlib.import_module("onnxscript")
    elif variant.kind != "eager":
        preload_compiler()
    if variant.kind == "fxpasses":
        importlib.import_module("fxpasses.backend.door")


def _calibrate(step: Callable[[], object]) -> int:
    """The number of steps that make a turn last `SAMPLE_SECONDS`."""
    for _ in range(_WARM_UP_STEPS):
        step()
    once = timeit.Timer(step).timeit(1)
    return max(1, math.ceil(SAMPLE_SECONDS / once))


def _saved_bytes(model: torch.nn.Module, built: Callable[..., object], inputs: Inputs) -> int:
    outputs = tensors_of(built(*inputs))
    return saved_bytes(outputs, [*model.parameters(), *model.buffers(), *inputs])


def _rules() -> dict[str, int]:
    """Rewrites of fxpasses, and inductor's own of conv-BN, by name."""
    counts = rewrite_counts()
    rules = dict(counts.get("fxpasses", {}))
    own = counts.get("inductor", {}).get("efficient_conv_bn_eval")
    return rules if own is None else rules | {"inductor:efficient_conv_bn_eval": own}


def _synchronize(case: Case) -> None:
    if case.device.startswith("cuda"):
        torch.cuda.synchronize(case.device)


def serve(connection: Connection, answer: Callable[[Any], object]) -> None:
    """Answers requests until the other side closes."""
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            reply = answer(request)
        except Exception as error:
            # The parent decides what an error means; whatever it is, the other variants go on.
            message = _COLOURS.sub("", str(error)).strip() or repr(error)
            reply = Failure(type(error).__name__, message[:_MESSAGE_LENGTH])
        connection.send(reply)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), Server().answer)
