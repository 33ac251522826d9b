"""The layout benchmark: right results in both layouts, no time for a wrong one, a profile that answers."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import tensor_layout
from benchmarks.layout import cases as layout_cases
from benchmarks.layout import measure as layout_measure
from benchmarks.layout import operators as layout_operators
from benchmarks.layout import sweep as layout_sweep
from benchmarks.layout.cases import (
    DIRECTIONS,
    Convolution,
    ConvolutionCaseError,
    Direction,
    Kernel,
    Operands,
    implementations,
    in_layout,
    memory_format,
    operands,
    reference,
)
from benchmarks.layout.measure import Candidates, Setting, Variant, compare, measure_convolution
from benchmarks.layout.operators import layout_sensitive, measure_operator
from benchmarks.layout.sweep import SweepError, Workload, _measure_copy, collect, sweep, tasks, to_profile
from benchmarks.operators.inputs.notation import Call, TensorSpec, parse_call
from benchmarks.shared.interleaving import Effort, measure_interleaved
from benchmarks.torch_internals import TorchDispatchMode
from fxpasses.devices.profile import (
    CHANNEL_AFFINE,
    LAYOUTS,
    Layout,
    Roofline,
    device_name,
    file_name,
    load,
)

CPU = torch.device("cpu")
QUICK = Effort(rounds=2, sample_seconds=1e-5, case_seconds=0.01)
SETTING = Setting("float32", CPU, QUICK, hot=True)  # where it does not matter: thousands of sets take time

CASES = {
    "plain": Convolution.of((2, 6, 9, 8), (8, 6, 3, 3), (2,), (1,)),
    "dilated": Convolution.of((2, 6, 9, 8), (8, 6, 3, 3), dilation=(2,)),
    "uneven": Convolution.of((2, 6, 9, 8), (8, 6, 3, 1), (2, 1), (1, 0)),
    "grouped": Convolution.of((2, 6, 9, 8), (8, 3, 3, 3), groups=2),
    "depthwise": Convolution.of((2, 6, 9, 8), (6, 1, 3, 3), groups=6),
    "pointwise": Convolution.of((2, 6, 9, 8), (8, 6, 1, 1)),
    "transposed": Convolution.of((2, 6, 9, 8), (6, 5, 3, 3), (2,), (1,), (1,), True, (1,)),
    "transposed grouped": Convolution.of((2, 6, 9, 8), (6, 5, 3, 3), (2,), transposed=True, groups=3),
    "3-D": Convolution.of((2, 6, 4, 5, 6), (8, 6, 3, 3, 3), (1,), (1,)),
    "3-D depthwise": Convolution.of((2, 6, 4, 5, 6), (6, 1, 3, 3, 3), groups=6),
    "3-D pointwise": Convolution.of((2, 6, 4, 5, 6), (8, 6, 1, 1, 1)),
    "3-D transposed": Convolution.of((2, 6, 4, 5, 6), (6, 5, 2, 2, 2), (2,), transposed=True),
}


def functional(case: Convolution, x: Tensor, w: Tensor) -> Tensor:
    """The same convolution by torch's public functions."""
    stride, padding, dilation, transposed, output_padding, groups = case.arguments
    spatial = x.dim() - 2
    if transposed:
        transpose = F.conv_transpose2d if spatial == 2 else F.conv_transpose3d
        return transpose(x, w, None, stride, padding, output_padding, groups, dilation)
    convolve = F.conv2d if spatial == 2 else F.conv3d
    return convolve(x, w, None, stride, padding, dilation, groups)


@pytest.fixture
def exact() -> Callable[[Convolution, Direction, Operands], Tensor]:
    """The three results by autograd, in float64."""

    def run(case: Convolution, direction: Direction, values: Operands) -> Tensor:
        x = values.input.double().requires_grad_()
        w = values.weight.double().requires_grad_()
        y = functional(case, x, w)
        if direction == "forward":
            return y.detach()
        wanted = x if direction == "input_grad" else w
        return torch.autograd.grad(y, wanted, values.grad_output.double())[0]

    return run


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_implementation_computes_the_convolution_in_its_layout(
    case: Convolution, direction: Direction, exact: Callable[[Convolution, Direction, Operands], Tensor]
) -> None:
    values = operands(case, direction, torch.float32, CPU)
    expected = exact(case, direction, values)
    torch.testing.assert_close(reference(case, direction, values), expected, rtol=1e-9, atol=1e-9)
    names = set()
    for layout in LAYOUTS:
        laid_out = in_layout(values, layout)
        for name, build in implementations(case, direction, layout, laid_out).items():
            result = build()()
            assert isinstance(result, Tensor)
            torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3, check_stride=False)
            if direction != "weight_grad":
                assert result.is_contiguous(memory_format=memory_format(layout, result.dim())), name
            names.add(name)
    assert ("mm" in names) == case.is_matrix_product


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_size_and_flops_are_those_of_the_convolution(case: Convolution) -> None:
    x, w = torch.ones(case.input_size), torch.ones(case.weight_size)
    y = functional(case, x, w)
    assert tuple(y.shape) == case.output_size
    # Unpadded, a convolution of ones counts its products; cropping or padding leaves some out.
    if set(case.padding) == {0}:
        assert case.flops == 2 * int(y.sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((1, 3, 8), (4, 3, 3)), "4 dimensions"),
        (((1, 3, 8, 8), (4, 3, 3)), "4 dimensions"),
        (((1, 3, 8, 8), (4, 2, 3, 3)), "takes 2 input channels, the input has 3"),
        (((1, 3, 8, 8), (4, 3, 9, 9)), "output would have the size"),
        (((1, 3, 8, 8), (4, 3, 3, 3), (1, 1, 1)), "stride"),
        (((1, 3, 8, 8), (4, 3, 3, 3), (0,)), "must be positive"),
        (((1, 3, 8, 8), (4, 3, 3, 3), (1,), (-1,)), "must not be negative"),
        (((1, 4, 8, 8), (3, 2, 3, 3), (1,), (0,), (1,), False, (0,), 2), "do not divide into 2 groups"),
    ],
)
def test_sizes_that_are_no_convolution_are_refused(
    arguments: tuple[tuple[int, ...], ...], message: str
) -> None:
    with pytest.raises(ConvolutionCaseError, match=message):
        Convolution.of(*arguments)  # type: ignore[arg-type]  # a table of all kinds of arguments


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_passes_the_comparison(dtype: str) -> None:
    setting = Setting(dtype, CPU, QUICK, hot=True)
    for direction in DIRECTIONS:
        variants = measure_convolution(CASES["pointwise"], direction, setting)
        # A CPU may lack the prepacked kernel of a dtype; none may be wrong.
        assert {variant.status for variant in variants} <= {"measured", "unsupported"}
        assert all(len(variant.times) == 2 for variant in variants if variant.status == "measured")
        assert compare(variants) is not None


def test_tolerance_is_that_of_the_shorter_arithmetic() -> None:
    assert Setting("float32", CPU, QUICK).tolerance == 1e-3
    assert Setting("float32", CPU, QUICK, tf32=True).tolerance == 1e-3  # a CPU has none
    assert Setting("float32", torch.device("cuda"), QUICK, tf32=True).tolerance == 4 * 2**-10
    assert Setting("bfloat16", CPU, QUICK).tolerance == 4 * 2**-7


@pytest.fixture
def wrong_in_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution that is off by one per cent in channels_last."""
    right = layout_cases._convolution

    def wrong(case: Convolution, direction: Direction, layout: Layout, values: Operands) -> Kernel:
        kernel = right(case, direction, layout, values)
        if layout == "contiguous":
            return kernel

        def off() -> Tensor:
            result = kernel()
            assert isinstance(result, Tensor)
            return result * 1.01

        return off

    monkeypatch.setattr(layout_cases, "_convolution", wrong)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Operands]:
    """The operands of every call of a convolution, in the order of the calls."""
    found: list[Operands] = []
    right = layout_measure.implementations

    def recorded(
        case: Convolution, direction: Direction, layout: Layout, values: Operands
    ) -> dict[str, Callable[[], Kernel]]:
        def built(build: Callable[[], Kernel]) -> Kernel:
            kernel = build()
            return lambda: (found.append(values), kernel())[1]

        builds = right(case, direction, layout, values)
        return {name: partial(built, build) for name, build in builds.items()}

    monkeypatch.setattr(layout_measure, "implementations", recorded)
    return found


def test_operands_come_again_only_after_all_others_were_read(
    monkeypatch: pytest.MonkeyPatch, reads: list[Operands]
) -> None:
    case = CASES["grouped"]
    monkeypatch.setattr("benchmarks.layout.caches.far", lambda device: 6 * operands_of(case).num_bytes)
    variants = measure_convolution(case, "forward", Setting("float32", CPU, QUICK))
    assert {variant.status for variant in variants} == {"measured"}
    timed = reads[len(variants) :]  # the first call of each is compared with float64
    assert len(timed) > 14
    for tensor in ("input", "weight"):
        places = [getattr(variant, tensor).data_ptr() for variant in timed]
        assert all(len({*places[at : at + 7]}) == 7 for at in range(len(places) - 6))


def operands_of(case: Convolution) -> Operands:
    return operands(case, "forward", torch.float32, CPU)


def test_hot_operands_are_the_same_in_every_call(
    monkeypatch: pytest.MonkeyPatch, reads: list[Operands]
) -> None:
    monkeypatch.setattr("benchmarks.layout.caches.far", lambda device: 2**30)
    measure_convolution(CASES["plain"], "weight_grad", SETTING)
    assert len({id(read) for read in reads}) == len(LAYOUTS)


@pytest.mark.parametrize(("hot", "sets"), [(False, 3), (True, 1)])
@pytest.mark.parametrize("kind", ["operator", "copy"])
def test_operators_and_copies_have_cold_operands_too(
    monkeypatch: pytest.MonkeyPatch, kind: str, hot: bool, sets: int
) -> None:
    def keep(operator: str, key: str, candidates: Candidates, *rest: object) -> list[Variant]:
        kept.update(candidates)
        return []

    kept: Candidates = {}
    setting = Setting("float32", CPU, QUICK, hot=hot)
    # Twice as much as an operator's 64 KiB and its result's 64 bytes, or a copy's source and target, take.
    monkeypatch.setattr("benchmarks.layout.caches.far", lambda device: 2 * (2**16 + 64))
    if kind == "operator":
        monkeypatch.setattr(layout_operators, "measure", keep)
        call = Call((TensorSpec((2, 8, 32, 32), torch.float32), [2, 3]), {})
        measure_operator(*layout_sensitive("aten.mean.dim", call, training=False), setting)
    else:
        monkeypatch.setattr(layout_sweep, "measure", keep)
        _measure_copy(2**15, setting)
    assert {layout for layout, _ in kept} == {*LAYOUTS}
    for builds in kept.values():
        kernels = [build() for build in builds]
        assert len({place_read_by(kernel) for kernel in kernels}) == len(kernels) == sets


def place_read_by(kernel: Kernel) -> int:
    """Where the first operand of a call lies."""
    with FirstRead() as found:
        kernel()
    assert found.place is not None
    return found.place


class FirstRead(TorchDispatchMode):
    """Keeps where the first tensor lies that the first operator reads."""

    place: int | None = None

    def __torch_dispatch__(self, func: Callable[..., object], types: object, args=(), kwargs=None) -> object:
        if self.place is None:
            self.place = args[0].data_ptr()
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("wrong_in_channels_last")
def test_a_wrong_result_has_no_time_and_takes_those_of_its_case_with_it() -> None:
    variants = measure_convolution(CASES["plain"], "forward", SETTING)
    status = {(variant.layout, variant.implementation): variant.status for variant in variants}
    assert status["channels_last", "aten.convolution"] == "mismatch"
    assert status["contiguous", "aten.convolution"] == "untimed"
    assert all(variant.times == () and variant.reason for variant in variants)
    assert compare(variants) is None


@pytest.mark.usefixtures("wrong_in_channels_last")
def test_a_wrong_result_makes_the_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plain() == 1
    captured = capsys.readouterr()
    assert "channels_last aten.convolution is wrong, no time is reported" in captured.err
    assert "mismatch" in captured.out


def test_right_results_make_the_exit_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plain() == 0
    assert "is wrong" not in capsys.readouterr().err


def run_plain() -> int:
    sizes = ["--input", "2,6,9,8", "--weight", "8,6,3,3", "--padding", "1"]
    return tensor_layout.main([*sizes, "--device", "cpu", "--repeats", "2", "--passes", "forward"])


def test_an_unsupported_implementation_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Kernel:
        raise RuntimeError("no such kernel\nand a long stack")

    monkeypatch.setattr(layout_cases, "_prepacked", missing)
    variants = measure_convolution(CASES["plain"], "forward", SETTING)
    assert {variant.implementation: variant.status for variant in variants} == {
        "aten.convolution": "measured",
        "mkldnn.prepacked": "unsupported",
    }
    reasons = {variant.reason for variant in variants if variant.status == "unsupported"}
    assert reasons == {"RuntimeError: no such kernel"}


@pytest.mark.parametrize(("channels", "status"), [(3, "unsupported"), (16, "measured")])
def test_a_kernel_that_writes_past_its_end_is_not_run(channels: int, status: str) -> None:
    case = Convolution.of((2, channels, 8, 8), (8, channels, 1, 1), (2,))
    variants = measure_convolution(case, "weight_grad", SETTING)
    assert {variant.layout: variant.status for variant in variants} == {
        "contiguous": "measured",
        "channels_last": status,
    }


def test_measuring_leaves_the_precision_settings_as_they_were() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with Setting("float32", CPU, QUICK, tf32=not before[1]).arithmetic():
        assert torch.backends.cuda.matmul.allow_tf32 is not before[1]
        assert not torch.is_grad_enabled()
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
    assert torch.is_grad_enabled()


def test_callables_take_turns_and_have_one_sample_a_round() -> None:
    calls: list[str] = []
    callables = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = measure_interleaved(callables, CPU, Effort(rounds=7, sample_seconds=0, case_seconds=10))
    assert {name: len(samples) for name, samples in times.items()} == {"a": 7, "b": 7}
    rounds = calls[4:]  # two calls of each came first, to warm up and to estimate
    assert [sorted(pair) for pair in zip(rounds[::2], rounds[1::2], strict=True)] == [["a", "b"]] * 7


def test_a_case_that_would_take_too_long_has_fewer_rounds() -> None:
    slow = {"slow": lambda: time.sleep(0.002)}
    assert len(measure_interleaved(slow, CPU, Effort(rounds=50, case_seconds=0.001))["slow"]) == 6


def test_the_sweep_finds_a_models_distinct_convolutions_with_their_occurrences() -> None:
    workload = collect(["resnet18"], batch=2, size=(64, 64), modes=("inference",), dtype="float32")
    # 20 convolutions: the stem, 2 a block in 8 blocks, 3 projections; each stage repeats its 3x3 shape.
    assert sum(workload.convolutions.values()) == 20
    assert {direction for _, direction in workload.convolutions} == {"forward"}
    stem = Convolution.of((2, 3, 64, 64), (64, 3, 7, 7), (2,), (3,))
    assert workload.convolutions[stem, "forward"] == 1
    assert workload.convolutions[Convolution.of((2, 64, 16, 16), (64, 64, 3, 3), (1,), (1,)), "forward"] == 4


def test_training_adds_the_gradients_that_are_needed_and_no_other() -> None:
    workload = collect(["resnet18"], batch=2, size=(64, 64), modes=("training",), dtype="float32")
    stem = Convolution.of((2, 3, 64, 64), (64, 3, 7, 7), (2,), (3,))
    total = dict.fromkeys(DIRECTIONS, 0)
    for (_, direction), count in workload.convolutions.items():
        total[direction] += count
    # Nobody asks for the gradient of the images.
    assert total == {"forward": 20, "input_grad": 19, "weight_grad": 20}
    assert workload.convolutions[stem, "input_grad"] == 0


def test_a_depthwise_model_keeps_its_groups() -> None:
    workload = collect(["mobilenetv2_100"], batch=1, size=(64, 64), modes=("inference",), dtype="float32")
    assert any(case.groups == case.input_size[1] > 1 for case, _ in workload.convolutions)


def test_one_dimensional_convolutions_are_counted_and_left_out() -> None:
    workload = Workload()
    x, w = TensorSpec((1, 4, 9), torch.float32), TensorSpec((4, 4, 3), torch.float32)
    call = Call((x, w, None, [1], [0], [1], False, [0], 1), {})
    workload.add("aten.convolution.default", call, 3, training=False)
    assert workload.one_dimensional == 3
    assert not workload.convolutions


def test_a_model_that_cannot_run_at_a_size_is_named() -> None:
    with pytest.raises(SweepError, match=r"timm:vit_tiny_patch16_224 does not run .*\[1, 3, 40, 40\]"):
        collect(["vit_tiny_patch16_224"], batch=1, size=(40, 40), modes=("inference",), dtype="float32")


X = TensorSpec((2, 6, 8, 8), torch.float32)


@pytest.mark.parametrize(
    ("overload", "call"),
    [
        ("aten.max_pool2d_with_indices.default", Call((X, [3, 3], [2, 2], [1, 1]), {})),
        ("aten.avg_pool2d.default", Call((X, [2, 2], [2, 2]), {})),
        ("aten._adaptive_avg_pool2d.default", Call((X, [3, 3]), {})),
        ("aten.cat.default", Call(([X, X], 1), {})),
        ("aten.upsample_nearest2d.vec", Call((X, None, [2.0, 2.0]), {})),
        ("aten.upsample_bilinear2d.vec", Call((X, [11, 13], False, None), {})),
        ("aten.mean.dim", Call((X, [-1, -2], True), {})),
        ("aten.sum.dim_IntList", Call((X, [0, 2, 3]), {})),
        ("aten.var_mean.correction", Call((X, [0, 2, 3]), {"correction": 0})),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_operators_whose_cost_depends_on_the_layout_are_measured_in_both(overload: str, call: Call) -> None:
    (case,) = layout_sensitive(overload, call, training=False)
    variants = measure_operator(case, SETTING)
    assert [(variant.layout, variant.status) for variant in variants] == [
        (layout, "measured") for layout in LAYOUTS
    ]


def test_the_backward_of_a_maximum_is_replayed_at_the_maxima() -> None:
    indices = TensorSpec((2, 6, 4, 4), torch.int64)
    grad = TensorSpec((2, 6, 4, 4), torch.float32)
    call = Call((grad, X, [2, 2], [2, 2], [0, 0], [1, 1], False, indices), {})
    (case,) = layout_sensitive("aten.max_pool2d_with_indices_backward.default", call, training=True)
    assert {variant.status for variant in measure_operator(case, SETTING)} == {"measured"}


@pytest.mark.parametrize(
    ("overload", "call"),
    [
        ("aten.relu.default", Call((X,), {})),
        ("aten.cat.default", Call(([X, X],), {})),
        ("aten.mean.dim", Call((X, [1]), {})),
        ("aten.mean.dim", Call((TensorSpec((6, 8), torch.float32), [0]), {})),
    ],
    ids=["pointwise", "cat on the batch", "mean over channels", "2-D"],
)
def test_operators_whose_cost_does_not_depend_on_the_layout_are_left_out(overload: str, call: Call) -> None:
    assert layout_sensitive(overload, call, training=True) == []


def test_a_batch_norm_stands_for_its_arithmetic() -> None:
    def operators(training: bool) -> list[str]:
        call = Call((X, *[TensorSpec((6,), torch.float32)] * 4, training, 0.1, 1e-5), {})
        cases = layout_sensitive("aten.native_batch_norm.default", call, training=training)
        assert {variant.status for case in cases for variant in measure_operator(case, SETTING)} == {
            "measured"
        }
        return [case.operator for case in cases]

    assert operators(False) == [CHANNEL_AFFINE]
    assert operators(True) == [CHANNEL_AFFINE, "aten.var_mean.correction", "aten.sum.dim_IntList"]


def test_an_ended_budget_stops_gracefully_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.layout.sweep.measure_roofline", lambda _: Roofline("float32", 1, 1, 1, 1))
    workload = Workload()
    for case in (CASES["pointwise"], CASES["plain"]):
        workload.convolutions[case, "forward"] = 1
    todo = tasks(workload, CPU, "float32")
    result = sweep(todo, SETTING, deadline=time.monotonic())
    assert result.variants == ()
    assert result.not_measured == tuple(task.label for task in todo)
    # The heavier convolution stands first among the convolutions.
    convolutions = [label for label in result.not_measured if label.startswith("convolution")]
    heavy, light = sorted((CASES["pointwise"], CASES["plain"]), key=lambda case: -case.flops)
    assert [heavy.key in convolutions[0], light.key in convolutions[1]] == [True, True]


@pytest.mark.timed
def test_the_command_writes_everything_it_offers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = {name: tmp_path / f"out.{name}" for name in ("json", "csv", "png", "trace")}
    files = ["--json", out["json"], "--csv", out["csv"], "--plot", out["png"], "--trace", out["trace"]]
    sizes = ["--input", "2,16,8,8", "--weight", "32,16,1,1", "--device", "cpu", "--repeats", "6"]
    assert tensor_layout.main([*sizes, "--dtype", "float32,bfloat16", *map(str, files)]) == 0
    assert "fastest of each" in capsys.readouterr().out

    data = json.loads(out["json"].read_text("utf-8"))
    assert data["environment"]["libraries"]["torch"] == torch.__version__
    measured = [variant for variant in data["variants"] if variant["status"] == "measured"]
    assert len(measured) >= 2 * 3 * 3  # dtypes x directions x (two layouts, and mm)
    assert all(seconds > 0 for variant in measured for seconds in variant["times"])
    assert len(data["speedups"]) == 2 * 3

    with out["csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(data["variants"])
    assert all(float(row["seconds"]) > 0 for row in rows if row["status"] == "measured")
    assert out["png"].read_bytes().startswith(b"\x89PNG")
    labels = {event["name"] for event in json.loads(out["trace"].read_text("utf-8"))["traceEvents"]}
    assert any(str(label).startswith("weight_grad channels_last input=2x16x8x8") for label in labels)


@pytest.mark.parametrize("hot", [True, False], ids=["hot", "cold"])
def test_a_trace_has_the_python_stacks_of_labelled_calls(tmp_path: Path, hot: bool) -> None:
    path = tmp_path / "trace.json"
    setting = Setting("float32", CPU, QUICK, hot=hot)
    tensor_layout._write_trace(path, [CASES["plain"]], ["weight_grad"], setting)
    events = [event for event in json.loads(path.read_text("utf-8"))["traceEvents"] if "dur" in event]
    frames = [event for event in events if event["cat"] == "python_function"]
    for layout in LAYOUTS:
        label = f"weight_grad {layout} {CASES['plain'].key}"
        (span,) = (event for event in events if event["name"] == label and event["cat"] == "user_annotation")
        (operator,) = (
            event
            for event in events
            if event["name"] == "aten::convolution_backward" and encloses(span, event)
        )
        around = [frame["name"] for frame in frames if encloses(frame, operator)]
        assert any("benchmarks/tensor_layout.py" in frame for frame in around)
        assert any("benchmarks/layout/cases.py" in frame for frame in around)
    # What clears the caches before each of the two.
    assert sum(event["name"] == "aten::zero_" for event in events) == (0 if hot else 2)


def encloses(outer: dict[str, float], inner: dict[str, float]) -> bool:
    """Whether an event of a trace lies within another one."""
    end = inner["ts"] + inner["dur"]
    return outer["ts"] <= inner["ts"] and end <= outer["ts"] + outer["dur"]


def test_a_convolution_with_a_bias_is_recorded_as_what_it_is() -> None:
    workload = Workload()
    tensors = "T([2, 8, 6, 6], f32), T([4, 8, 1, 1], f32), T([4], f32)"
    text = f"(({tensors}, [1, 1], [0, 0], [1, 1], False, [0, 0], 1), {{}})"
    workload.add("aten.convolution.default", parse_call(text), 3, training=False)
    assert workload.convolutions == {(Convolution.of((2, 8, 6, 6), (4, 8, 1, 1)), "forward"): 3}


def test_workloads_of_several_batch_sizes_add_up() -> None:
    workload = Workload()
    for batch in (1, 8, 8):
        workload += collect(["resnet18"], batch=batch, size=(64, 64), modes=("inference",), dtype="float32")
    stem = {
        case.input_size[0]: count
        for (case, _), count in workload.convolutions.items()
        if case.weight_size[2] == 7
    }
    assert stem == {1: 1, 8: 2}


def test_a_profile_for_a_folder_is_named_after_its_device(tmp_path: Path) -> None:
    def path(given: str) -> Path | None:
        return tensor_layout._profile_path(tensor_layout._parser().parse_args(["--profile", given]), CPU)

    assert path(str(tmp_path)) == path(f"{tmp_path}/") == tmp_path / file_name(device_name(CPU))
    assert path(f"{tmp_path}/new/") == tmp_path / "new" / file_name(device_name(CPU))
    assert path(f"{tmp_path}/mine.json") == tmp_path / "mine.json"


@pytest.mark.timed
def test_a_sweep_writes_a_profile_that_answers_and_grows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.layout.sweep._copy_sizes", lambda _: [2**14, 2**16])
    monkeypatch.setattr(
        "benchmarks.layout.sweep.measure_roofline",
        lambda setting: Roofline(setting.dtype, 1e11, 2e11, 1e10, 1e-6),
    )
    path = tmp_path / "profile.json"
    common = ["--sweep", "resnet18", "--size", "32", "--device", "cpu", "--repeats", "1", "--hot"]
    assert tensor_layout.main([*common, "--profile", str(path)]) == 0
    assert "convolution.forward" in capsys.readouterr().out

    profile = load(path)
    assert profile is not None
    case = Convolution.of((1, 64, 8, 8), (64, 64, 3, 3), (1,), (1,))
    for layout in LAYOUTS:
        estimate = profile.seconds("convolution.forward", case.key, layout)
        assert estimate is not None
        assert estimate.seconds > 0
        copy = profile.copy_seconds(3 * 2**14, layout)
        assert copy is not None
        assert math.isfinite(copy)
    assert profile.roofline("bfloat16") is None
    assert profile.operands == "hot"

    assert tensor_layout.main([*common, "--profile", str(path), "--dtype", "bfloat16"]) == 0
    grown = load(path)
    assert grown is not None
    assert grown.roofline("bfloat16") is not None
    assert grown.seconds("convolution.forward", case.key, "channels_last", "bfloat16") is not None
    assert grown.seconds("convolution.forward", case.key, "channels_last", "float32") is not None


def test_a_profile_says_whether_its_operands_were_in_a_cache() -> None:
    profiles = {hot: to_profile([], CPU, tf32=False, hot=hot) for hot in (True, False)}
    assert {hot: profile.settings["operands"] for hot, profile in profiles.items()} == {
        True: "hot",
        False: "cold",
    }


def test_cold_measurements_do_not_go_into_a_profile_of_hot_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    to_profile([], CPU, tf32=False, hot=True).save(path)
    monkeypatch.setattr(tensor_layout, "collect", lambda *_, **__: pytest.fail("it was measured"))
    assert tensor_layout.main(["--sweep", "resnet18", "--device", "cpu", "--profile", str(path)]) == 2
    error = capsys.readouterr().err
    assert "'operands': 'hot'" in error
    assert "'operands': 'cold'" in error


def test_a_profile_of_another_device_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    text = '{"schema": 1, "device": "Other", "torch_version": "1", "libraries": {}, "settings": {}, '
    path.write_text(text + '"rooflines": [], "measurements": []}', "utf-8")
    monkeypatch.setattr(tensor_layout, "collect", lambda *_, **__: pytest.fail("it was measured"))
    assert tensor_layout.main(["--sweep", "resnet18", "--device", "cpu", "--profile", str(path)]) == 2
    assert "different device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--passes", "fwd"], "unknown pass 'fwd'. Did you mean 'forward'?"),
        (["--dtype", "float31"], "Did you mean 'float32'?"),
        (["--kinds", "plane"], "Did you mean 'plain'?"),
        (["--input", "1,3,8,8"], "--input and --weight go together"),
        (["--device", "tpu"], "tpu"),
        (["--sweep", "resnet1812"], "no model 'resnet1812'"),
        (["--sweep", "resnet18", "--modes", "testing"], "unknown mode 'testing'"),
    ],
)
def test_bad_arguments_are_one_clear_error(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert tensor_layout.main([*arguments, *device]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1


def test_every_kind_of_convolution_can_be_built() -> None:
    for case, gpu_batch, cpu_batch in tensor_layout.KINDS.values():
        assert min(case.output_size) >= 1
        assert gpu_batch >= cpu_batch >= 1
    default, gpu_batch, _ = tensor_layout.KINDS["plain"]
    assert (gpu_batch, *default.input_size[1:]) == (256, 3, 224, 224)
    assert default.weight_size == (64, 3, 7, 7)
    assert (default.stride, default.padding) == ((2, 2), (3, 3))


def test_a_result_of_another_number_of_tensors_is_a_mismatch() -> None:
    assert "2 floating-point results instead of 1" in layout_measure._difference(
        (torch.ones(1), torch.ones(1)), [torch.ones(1, dtype=torch.float64)], 1e-3
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_is_measured_in_both_layouts(dtype: str) -> None:
    setting = Setting(dtype, torch.device("cuda"), QUICK)
    for direction in DIRECTIONS:
        variants = measure_convolution(CASES["pointwise"], direction, setting)
        assert {variant.status for variant in variants} == {"measured"}
        assert all(seconds > 0 for variant in variants for seconds in variant.times)
