"""Variants: the names that `--variants` takes, and the callable that each one makes of a model.

    [NAME=][slowed(FACTOR):]KIND[:FIELD=VALUE[;FIELD=VALUE]...]

=================== ==========================================================================================
`eager`             the module itself
`inductor`          `torch.compile(model)`
`inductor-convbn`   with `torch._inductor.config.efficient_conv_bn_eval_fx_passes`
`inductor-nolayout` with `torch._inductor.config.layout_optimization` off
`inductor-frozen`   with `torch._inductor.config.freezing`; inference only. The setting is made globally, in
                    the variant's own process, because Dynamo reads the global one: as an option of
                    torch.compile it leaves parameters as graph inputs and freezes nothing
`onnxruntime`       exported with `torch.onnx.export`; inference on a CPU only
`openvino`          the same ONNX model, converted; inference on a CPU only
`fxpasses`          `torch.compile(model, backend="fxpasses")`; fields are those of `fxpasses.Options`
=================== ==========================================================================================

`slowed(1.1):inductor` waits after every call until it has taken 1.1 times as long: a self-test of the method,
not something to compare with. A NAME lets one variant stand twice: `a=inductor,b=inductor`.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from benchmarks.models.cases import Case, CaseError, Inputs, Model
from benchmarks.shared.assignments import assignments
from benchmarks.torch_internals import set_inductor_config
from fxpasses.errors import FxpassesError, unknown_name

OptionValue = str | int | tuple[str, ...]

_SLOWED = re.compile(r"slowed\((?P<factor>[0-9.]+)\):(?P<rest>.+)")
_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<rest>.+)")
_TUPLES = ("passes", "disable")
_INDUCTOR_CONFIG: dict[str, dict[str, bool]] = {
    "inductor": {},
    "inductor-convbn": {"efficient_conv_bn_eval_fx_passes": True},
    "inductor-nolayout": {"layout_optimization": False},
    "inductor-frozen": {"freezing": True},
}
_RUNTIMES = ("onnxruntime", "openvino")
KINDS = ("eager", *_INDUCTOR_CONFIG, *_RUNTIMES, "fxpasses")


class VariantError(FxpassesError, ValueError):
    """A variant that does not parse, does not exist, or cannot run in the mode that was asked for."""


@dataclass(frozen=True)
class Variant:
    """One column of a comparison.

    Attributes:
        name: what gates and tables call it; its specification, unless another was given.
        kind: one of `KINDS`.
        options: fields of `fxpasses.Options`.
        slowdown: how many times as long a call shall take; 1 for an honest variant.
    """

    name: str
    kind: str
    options: Mapping[str, OptionValue] = dataclasses.field(default_factory=dict)
    slowdown: float = 1.0

    @property
    def compiles(self) -> bool:
        """Whether inductor's caches make a second process start faster."""
        return self.kind in _INDUCTOR_CONFIG or self.kind == "fxpasses"

    @property
    def precision(self) -> str:
        """In what it computes the products of a float32 model."""
        return str(self.options.get("precision", "eager"))

    def check(self, case: Case) -> None:
        """Raises VariantError where this variant cannot run the case at all."""
        if self.kind in (*_RUNTIMES, "inductor-frozen") and case.trains:
            raise VariantError(f"variant {self.name!r} cannot train; use --mode inference or leave it out.")
        if self.precision != "eager" and (case.trains or case.dtype != "float32"):
            raise VariantError(
                f"variant {self.name!r} is for float32 inference; use --mode inference --dtype float32."
            )
        if self.kind in _RUNTIMES and not case.device.startswith("cpu"):
            raise VariantError(
                f"variant {self.name!r} runs on the CPU only; use --device cpu or leave it out."
            )
        if self.kind in _RUNTIMES and case.dtype not in ("float32", "float16"):
            raise VariantError(
                f"variant {self.name!r} takes float32 or float16, not {case.dtype}; leave it out."
            )


def parse_variants(text: str) -> tuple[Variant, ...]:
    """The variants of a comma-separated list, in its order.

    A comma inside a field that takes several names belongs to the field:
    ``fxpasses:passes=efficient_conv_bn_eval,layout`` is one variant.

    Raises:
        VariantError: an unknown kind, field or value, a malformed piece, or a name that stands twice.
    """
    pieces: list[str] = []
    for piece in text.split(","):
        continues = pieces and _open_tuple(pieces[-1]) and not _starts_variant(piece)
        if continues:
            pieces[-1] += f",{piece.strip()}"
        else:
            pieces.append(piece.strip())
    variants = tuple(parse_variant(piece) for piece in pieces)
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            advice = f"write a={name},b={name} to measure one variant under two names"
            raise VariantError(f"variant {name!r} is given {names.count(name)} times; {advice}.")
    return variants


def parse_variant(text: str) -> Variant:
    """The variant of one specification.

    Raises:
        VariantError: an unknown kind, field or value, or a malformed piece.
    """
    name, rest, slowdown = text, text, 1.0
    if named := _NAMED.fullmatch(rest):
        name, rest = named["name"], named["rest"]
    if slowed := _SLOWED.fullmatch(rest):
        slowdown, rest = _factor(slowed["factor"], text), slowed["rest"]
    kind, _, fields = rest.partition(":")
    if kind not in KINDS:
        raise VariantError(unknown_name("variant", kind, KINDS, "Write [NAME=]KIND[:FIELD=VALUE;...]."))
    if fields and kind != "fxpasses":
        raise VariantError(f"variant {text!r}: only fxpasses takes fields, {kind} takes none.")
    options = _parse_options(fields, text) if fields else {}
    return Variant(name, kind, options, slowdown)


def build_variant(variant: Variant, case: Case, model: torch.nn.Module, inputs: Inputs) -> Model:
    """The callable that a variant makes of `model`; what it compiles lazily is compiled by its first call.

    It may change inductor's global configuration: call it once, in a process of its own.

    Raises:
        CaseError: the model cannot be exported, for the runtimes that need it.
    """
    if variant.kind == "eager":
        built: Model = model
    elif variant.kind == "onnxruntime":
        built = _onnxruntime(case, model, inputs)
    elif variant.kind == "openvino":
        built = _openvino(case, model, inputs)
    elif variant.kind == "fxpasses":
        built = _fxpasses(variant, case, model)
    else:
        set_inductor_config(**_INDUCTOR_CONFIG[variant.kind])
        built = torch.compile(model, dynamic=_dynamic(case))
    return built


def slowed(call: Callable[[], object], factor: float) -> Callable[[], object]:
    """`call`, followed by a wait until `factor` times its own duration has passed; for self-tests."""

    def slow_call() -> object:
        start = time.perf_counter()
        result = call()
        end = start + factor * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return result

    return slow_call


def _fxpasses(variant: Variant, case: Case, model: torch.nn.Module) -> Model:
    options = {
        name: cast(str, value) for name, value in variant.options.items()
    }  # torch knows of scalars only
    return torch.compile(model, backend="fxpasses", options={**options}, dynamic=_dynamic(case))


def _dynamic(case: Case) -> bool | None:
    # With None, marked dimensions are dynamic and the others static.
    return {"none": False, "batch": None, "all": True}[case.dynamic]


def _factor(text: str, spec: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if factor < 1.0:
        raise VariantError(f"variant {spec!r}: a factor of {text} does not slow down; write 1 or more.")
    return factor


def _starts_variant(piece: str) -> bool:
    head = piece.strip()
    if named := _NAMED.fullmatch(head):
        head = named["rest"]
    if slowed_ := _SLOWED.fullmatch(head):
        head = slowed_["rest"]
    return head.partition(":")[0] in KINDS


def _open_tuple(piece: str) -> bool:
    """Whether the last field of a piece takes several names, so that a comma may continue it."""
    _, colon, fields = piece.partition("fxpasses:")
    return bool(colon) and fields.rpartition(";")[2].partition("=")[0].strip() in _TUPLES


def _parse_options(text: str, spec: str) -> dict[str, OptionValue]:
    from fxpasses.options import Options

    options: dict[str, OptionValue] = {}
    try:
        fields = assignments(text, "FIELD")
    except ValueError as error:
        raise VariantError(f"variant {spec!r}: field {error}") from error
    for key, value in fields.items():
        if key == "inductor":
            raise VariantError(f"variant {spec!r}: a mapping such as {key!r} cannot be given here.")
        options[key] = _value(key, value)
    try:
        Options.of(options)
    except FxpassesError as error:
        raise VariantError(f"variant {spec!r}: {error}") from error
    return options


def _value(key: str, text: str) -> OptionValue:
    if key in _TUPLES:
        return tuple(piece.strip() for piece in text.split(","))
    if text in ("True", "False"):
        return text == "True"
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else text


def export_onnx(case: Case, model: torch.nn.Module, inputs: Inputs, path: Path) -> None:
    """Writes a model as ONNX, with the sizes dynamic that the case says.

    Raises:
        CaseError: the exporter gives nothing.
    """
    shapes = None
    if case.dynamic == "batch":
        shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    elif case.dynamic == "all":
        # Automatic: a size that the model fixes, such as the channels of an image, is left static.
        automatic = torch.export.Dim.AUTO
        shapes = tuple(dict.fromkeys(range(tensor.dim()), automatic) for tensor in inputs)
    program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    if program is None:
        raise CaseError(f"torch.onnx.export gave nothing for {case.model}")
    program.save(path)


def _onnxruntime(case: Case, model: torch.nn.Module, inputs: Inputs) -> Model:
    import onnxruntime  # type: ignore[import-untyped]  # it ships no types

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(case, model, inputs, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return run


def _openvino(case: Case, model: torch.nn.Module, inputs: Inputs) -> Model:
    import openvino  # type: ignore[import-untyped]  # it ships no types

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(case, model, inputs, path)
        converted = openvino.convert_model(path)
        compiled = openvino.compile_model(converted, "CPU", openvino_settings(case))
    request = compiled.create_infer_request()

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        results = request.infer(
            [tensor.numpy() for tensor in tensors], share_inputs=True, share_outputs=False
        )
        return [torch.from_numpy(array) for array in results.values()]

    return run


def openvino_settings(case: Case) -> dict[str, object]:
    """What OpenVINO is told of a case."""
    return {
        "INFERENCE_NUM_THREADS": case.threads,
        "PERFORMANCE_HINT": "LATENCY",
        # Left alone, it computes float32 models in bfloat16 where the processor can.
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "float16": "f16"}[case.dtype],
    }
