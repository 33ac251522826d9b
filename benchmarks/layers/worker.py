"""The process of one runtime: `python -m benchmarks.layers.worker DESCRIPTOR`, started by `kernel_time`."""

from __future__ import annotations

import math
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.layers.layer import layers_of
from benchmarks.layers.messages import Describe, Description, Finish, Prepare, TakeTurn
from benchmarks.layers.part import Part
from benchmarks.layers.peak import measured_peaks
from benchmarks.layers.runtimes import Runtime, runtime_of, seconds_of
from benchmarks.models.cases import build_inputs, build_model, tensors_of
from benchmarks.models.variants import export_onnx
from benchmarks.models.worker import serve

_TURN_SECONDS = 0.15
"""How long either half of a turn lasts at least."""
_MOST_CALLS = 100
_CLOSE = 1e-2
"""How far results may be from eager's, in units of the largest."""
_PAUSE = 0.05
"""Seconds in which the threads of one half of a turn stop waiting for work."""


class Server:
    """Answers requests; holds the runtime that it prepared."""

    def __init__(self) -> None:
        self._runtime: Runtime | None = None
        self._calls = 0

    def answer(self, request: object) -> Description | float | list[tuple[Part, ...]] | None:
        """Does what is asked."""
        match request:
            case Describe():
                return _describe(request)
            case Prepare():
                return self._prepare(request)
            case TakeTurn():
                return self._take_turn()
            case Finish():
                return self._prepared.turns()
        raise TypeError(f"no request: {request!r}")

    @property
    def _prepared(self) -> Runtime:
        if self._runtime is None:
            raise RuntimeError("a turn was asked for before a runtime was prepared")
        return self._runtime

    def _prepare(self, request: Prepare) -> None:
        case = request.case
        torch.set_num_threads(case.threads)
        model = build_model(case)
        inputs = build_inputs(case, model)
        with torch.no_grad():
            expected = tensors_of(model(*inputs))
        found = runtime_of(request.runtime, case, model, inputs, Path(request.path), request.layers)
        for given, wanted in zip(found.call(), expected, strict=True):
            error = float((given - wanted).abs().max() / wanted.abs().max())
            if not error <= _CLOSE:
                raise RuntimeError(f"{request.runtime}: its result is {error:.1e} off eager's")
        once = seconds_of(found.call, 3)
        self._runtime, self._calls = found, min(_MOST_CALLS, max(3, math.ceil(_TURN_SECONDS / once)))

    def _take_turn(self) -> float:
        whole = seconds_of(self._prepared.call, self._calls)
        time.sleep(_PAUSE)
        self._prepared.profile(self._calls)
        time.sleep(_PAUSE)
        return whole


def _describe(request: Describe) -> Description:
    case = request.case
    torch.set_num_threads(case.threads)
    model = build_model(case)
    inputs = build_inputs(case, model)
    layers = layers_of(model, inputs)
    export_onnx(case, model, inputs, Path(request.path))
    return Description(layers, measured_peaks())


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), Server().answer)
