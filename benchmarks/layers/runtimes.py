"""The runtimes whose profiles are read, each ready to run one model.

=============== ==============================================================================================
`fxpasses`      `weights="cached"`, in torch's profiler; the steps of sequences are noted by kernels that were
                compiled for it
`onednn`        inductor with its weights frozen, in torch's profiler
`onnxruntime`   its own profile, which it writes when a session ends
`openvino`      `get_profiling_info` after each call
=============== ==============================================================================================

A call that is timed as a whole is not profiled. The two runtimes by ONNX hold the model twice for that.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.layers import onnxruntime_profile, openvino_profile, torch_profile
from benchmarks.layers.layer import Layer
from benchmarks.layers.onnx_graph import OnnxLayers
from benchmarks.layers.part import Part, ProfileError
from benchmarks.models.cases import Case, Inputs, tensors_of
from benchmarks.models.variants import build_variant, openvino_settings, parse_variant
from benchmarks.torch_internals import visible_cpu_kernels
from fxpasses.kernels.library import missing
from fxpasses.kernels.step_times import noted_steps

RUNTIMES = ("fxpasses", "onednn", "onnxruntime", "openvino")
OURS, PEERS = "fxpasses", ("onnxruntime", "openvino")

_VARIANTS = {"fxpasses": "fxpasses:weights=cached", "onednn": "inductor-frozen"}


class Runtime(ABC):
    """One model in one runtime."""

    @abstractmethod
    def call(self) -> list[torch.Tensor]:
        """Runs the model without a profile; its results."""

    @abstractmethod
    def profile(self, calls: int) -> None:
        """Runs it so many times with one, as one turn."""

    @abstractmethod
    def turns(self) -> list[tuple[Part, ...]]:
        """The parts of each turn, and the end of the runtime.

        Raises:
            ProfileError: a profile is not as it is known to be.
        """


def runtime_of(
    name: str, case: Case, model: torch.nn.Module, inputs: Inputs, path: Path, layers: Sequence[Layer]
) -> Runtime:
    """The runtime of a name.

    Args:
        name: one of `RUNTIMES`.
        case: of the model.
        model: in inference.
        inputs: what it is called on.
        path: of the model as ONNX.
        layers: of the model.
    """
    if name in _VARIANTS:
        return TorchRuntime(name, case, model, inputs, layers)
    return (OnnxRuntime if name == "onnxruntime" else OpenVino)(case, inputs, path, layers)


def median_parts(calls: Sequence[Sequence[Part]]) -> tuple[Part, ...]:
    """The parts of a turn: each with its median over the calls.

    Raises:
        ProfileError: the calls did not run the same.
    """
    found = []
    if len({len(call) for call in calls}) != 1:
        raise ProfileError(f"calls of a model ran {sorted({len(call) for call in calls})} kernels")
    for same in zip(*calls, strict=True):
        if len({(part.name, part.layers) for part in same}) != 1:
            raise ProfileError(
                f"calls of a model ran {' and '.join({part.name for part in same})} at one place"
            )
        found.append(replace(same[0], seconds=statistics.median(part.seconds for part in same)))
    return tuple(found)


class TorchRuntime(Runtime):
    """What torch.compile makes of the model."""

    def __init__(
        self, name: str, case: Case, model: torch.nn.Module, inputs: Inputs, layers: Sequence[Layer]
    ) -> None:
        """Compiles it."""
        self._inputs, self._layers, self._turns = inputs, layers, list[tuple[Part, ...]]()
        self._has_steps = name == OURS and not missing()
        with visible_cpu_kernels():
            self._model = build_variant(parse_variant(_VARIANTS[name]), case, model, inputs)
            self.call()

    def call(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return tensors_of(self._model(*self._inputs))

    def profile(self, calls: int) -> None:
        self.call()
        noting = noted_steps() if self._has_steps else contextlib.nullcontext([])
        with noting as steps, profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for _ in range(calls):
                with record_function(torch_profile.CALL):
                    self.call()
        found = torch_profile.calls_of(profiler.events(), steps)
        self._turns.append(median_parts([torch_profile.parts_of(each, self._layers) for each in found]))

    def turns(self) -> list[tuple[Part, ...]]:
        return self._turns


class OnnxRuntime(Runtime):
    """ONNX Runtime."""

    def __init__(self, case: Case, inputs: Inputs, path: Path, layers: Sequence[Layer]) -> None:
        """Loads the model twice."""
        import onnx
        import onnxruntime  # type: ignore[import-untyped]  # it ships no types

        self._layers, self._calls = layers, list[int]()
        self._graph = OnnxLayers.of(onnx.load(path, load_external_data=False).graph, layers)
        self._folder = tempfile.TemporaryDirectory()

        def session(options: Any) -> Callable[[], list[Any]]:
            options.intra_op_num_threads = case.threads
            made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            names = [given.name for given in made.get_inputs()]
            feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
            self._session = made
            return lambda: list(made.run(None, feeds))

        self._run = session(onnxruntime.SessionOptions())
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        self._profiled = session(options)

    def call(self) -> list[torch.Tensor]:
        return list(map(torch.from_numpy, self._run()))

    def profile(self, calls: int) -> None:
        self._calls.append(calls + 1)
        for _ in range(calls + 1):
            self._profiled()

    def turns(self) -> list[tuple[Part, ...]]:
        path = Path(self._session.end_profiling())
        runs = onnxruntime_profile.runs_of(json.loads(path.read_text(encoding="utf-8")))
        self._folder.cleanup()
        if len(runs) != sum(self._calls):
            raise ProfileError(
                f"ONNX Runtime's profile has {len(runs)} runs, and {sum(self._calls)} were made"
            )
        parts = [onnxruntime_profile.parts_of(run, self._graph, self._layers) for run in runs]
        return [median_parts(call) for call in _shared(parts, self._calls)]


class OpenVino(Runtime):
    """OpenVINO."""

    def __init__(self, case: Case, inputs: Inputs, path: Path, layers: Sequence[Layer]) -> None:
        """Compiles the model twice."""
        import onnx
        import openvino  # type: ignore[import-untyped]  # it ships no types

        self._graph = OnnxLayers.of(onnx.load(path, load_external_data=False).graph, layers)
        self._given = [tensor.numpy() for tensor in inputs]
        self._turns = list[tuple[Part, ...]]()
        converted = openvino.convert_model(path)
        settings = openvino_settings(case)
        self._request = openvino.compile_model(converted, "CPU", settings).create_infer_request()
        compiled = openvino.compile_model(converted, "CPU", settings | {"PERF_COUNT": True})
        self._profiled = compiled.create_infer_request()
        self._originals = openvino_originals(compiled)

    def call(self) -> list[torch.Tensor]:
        results = self._request.infer(self._given, share_inputs=True, share_outputs=False)
        return [torch.from_numpy(array) for array in results.values()]

    def profile(self, calls: int) -> None:
        found = []
        for _ in range(calls + 1):
            self._profiled.infer(self._given, share_inputs=True, share_outputs=True)
            nodes = openvino_nodes(self._profiled)
            found.append(openvino_profile.parts_of(nodes, self._originals, self._graph))
        self._turns.append(median_parts(found[1:]))

    def turns(self) -> list[tuple[Part, ...]]:
        return self._turns


def openvino_nodes(request: Any) -> list[openvino_profile.Executed]:
    """The nodes that the last call of an inference request ran."""
    return [
        openvino_profile.Executed(
            node.node_name, node.node_type, node.exec_type, node.real_time.total_seconds()
        )
        for node in request.get_profiling_info()
        if node.status.name == "EXECUTED"
    ]


def openvino_originals(compiled: Any) -> dict[str, list[str]]:
    """Of each node of a compiled model the names of the nodes that it was made of."""
    found = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = node.get_rt_info()
        names = told["originalLayersNames"].astype(str) if "originalLayersNames" in told else ""
        found[node.get_friendly_name()] = [name for name in names.split(",") if name]
    return found


def _shared(parts: Sequence[Sequence[Part]], calls: Sequence[int]) -> list[Sequence[Sequence[Part]]]:
    """The calls of each turn but its first, which is slower."""
    found, at = [], 0
    for count in calls:
        found.append(parts[at + 1 : at + count])
        at += count
    return found


def seconds_of(call: Callable[[], object], calls: int) -> float:
    """The median of so many calls, after one that is not counted."""
    call()
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
