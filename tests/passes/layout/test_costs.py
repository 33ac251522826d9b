"""What an operator costs under each label: measurements first, the roofline where there are none."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import CAPTURES
from torch import nn
from torch.export import Dim

import fxpasses
from fxpasses.devices.keys import bytes_key, convolution_key
from fxpasses.devices.profile import (
    CONVOLUTION_FORWARD,
    LAYOUT_COPY,
    WEIGHT_COPY,
    DeviceProfile,
    Estimate,
    Layout,
    Measurement,
    Roofline,
)
from fxpasses.devices.sizes import ConvolutionSizes
from fxpasses.graph.context import GraphContext
from fxpasses.graph.layouts import C, L
from fxpasses.graph.modes import Modes
from fxpasses.passes.layout.assign import assign
from fxpasses.passes.layout.costs import CostModel, seconds_at

SIZES = ConvolutionSizes((1, 8, 6, 6), (8, 8, 3, 3), (1, 8, 6, 6), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1))
PEAKS = Roofline("float32", 1e9, 1e9, 1e8, 1e-6)


def row(layout: Layout, seconds: float, implementation: str = "aten.convolution") -> Measurement:
    key = convolution_key(SIZES.input, SIZES.weight, [1, 1], [1, 1], [1, 1])
    return Measurement(CONVOLUTION_FORWARD, key, layout, implementation, "float32", seconds, 0.0, 20)


def copy_row(layout: Layout, num_bytes: int, seconds: float) -> Measurement:
    return Measurement(LAYOUT_COPY, bytes_key(num_bytes), layout, "clone", "float32", seconds, 0.0, 20)


def profile(*rows: Measurement) -> DeviceProfile:
    return DeviceProfile("here", "2", rooflines=(PEAKS,), measurements=rows)


def forward(costs: CostModel) -> dict[str, float]:
    found = costs.convolution(SIZES, torch.float32, (CONVOLUTION_FORWARD,))
    return {label: seconds_at(choice.seconds, {}) for label, choice in found.items()}


def test_a_measurement_beats_the_roofline():
    measured = profile(row("contiguous", 3e-3), row("channels_last", 1e-3))
    assert forward(CostModel("cpu", measured)) == {C: 3e-3, L: 1e-3}


def test_a_measurement_of_one_label_alone_compares_to_nothing():
    assert forward(CostModel("cpu", profile(row("channels_last", 1.0)))) == forward(
        CostModel("cpu", profile())
    )


def test_an_implementation_that_cannot_be_brought_about_is_not_counted():
    rows = (
        row("contiguous", 3e-3),
        row("channels_last", 2e-3),
        row("channels_last", 1e-9, "mkldnn.prepacked"),
    )
    assert forward(CostModel("cpu", profile(*rows)))[L] == 2e-3


def test_the_roofline_is_arithmetic():
    flops = 2 * 8 * 6 * 6 * 8 * 9
    moved = 4 * (2 * 8 * 36 + 8 * 8 * 9)
    native = 1e-6 + max(flops / 1e9, moved / 1e8)
    reorder = 2 * 4 * (2 * 8 * 36) / 1e8
    found = forward(CostModel("cpu", profile()))
    assert found[L] == pytest.approx(native)
    assert found[C] == pytest.approx(native + reorder)


@pytest.mark.parametrize(
    ("device", "dtype", "groups", "native"),
    [
        ("cpu", torch.float32, 1, L),
        ("cpu", torch.float64, 1, C),
        ("cuda", torch.float16, 1, L),
        ("cuda", torch.float16, 2, C),
        ("cuda", torch.float32, 1, C),
    ],
)
def test_kernels_work_in_the_layout_that_the_library_is_known_for(device, dtype, groups, native):
    sizes = ConvolutionSizes(
        SIZES.input, (8, 8 // groups, 3, 3), SIZES.output, (*SIZES.arguments[:5], groups)
    )
    found = CostModel(device).convolution(sizes, dtype, (CONVOLUTION_FORWARD,))
    assert found[native].seconds < found[L if native == C else C].seconds


def test_a_copy_costs_what_was_measured_for_its_bytes():
    measured = profile(copy_row("channels_last", 1024, 5e-6))
    given = torch.empty(1, 4, 8, 8)
    assert CostModel("cpu", measured).copy(given, L) == 5e-6
    assert CostModel("cpu", measured).copy(given, C) == pytest.approx(1e-6 + 2 * 1024 / 1e8)


@pytest.mark.parametrize(
    ("device", "dtype", "is_known"),
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.float16, False),
    ],
)
def test_a_gpu_takes_one_half_type_as_long_as_the_other(device, dtype, is_known):
    rows = (row("contiguous", 3e-3), row("channels_last", 2e-3), copy_row("channels_last", 1024, 5e-6))
    measured = profile(*(dataclasses.replace(row, dtype="bfloat16") for row in rows))
    costs = CostModel(device, measured)
    assert costs.knows(SIZES, dtype, (CONVOLUTION_FORWARD,)) is is_known
    found = costs.convolution(SIZES, dtype, (CONVOLUTION_FORWARD,))[L]
    assert (found.seconds == 2e-3) is is_known
    assert (costs.copy(torch.empty(1, 4, 8, 16, dtype=dtype), L) == 5e-6) is is_known


def test_what_is_generated_costs_the_same_in_both_layouts_whatever_eager_took():
    key = "input=2x8x6x6 dim=[2,3] keepdim=True dtype=None"
    rows = [
        Measurement("aten.mean.dim", key, label, "aten.mean.dim", "float32", 1.0, 0.0, 9) for label in (C, L)
    ]
    rows[1] = dataclasses.replace(rows[1], seconds=2.0)
    measured = profile(row("contiguous", 3e-3), row("channels_last", 2e-3), *rows, copy_row(L, 1024, 5.0))
    node = torch.fx.Graph().placeholder("x")
    node.meta["val"] = torch.empty(2, 8, 6, 6)
    mean = node.graph.call_function(torch.ops.aten.mean.dim, (node, [2, 3], True))
    mean.meta["val"] = torch.empty(2, 8, 1, 1)
    eager, generated = (CostModel("cuda", measured, generates=generates) for generates in (False, True))
    assert [model.operator(mean, torch.float32)[L].seconds for model in (eager, generated)] == [
        2.0,
        pytest.approx(1e-6 + 4 * (2 * 8 * 36 + 2 * 8) / 1e8),
    ]
    found = generated.operator(mean, torch.float32)
    assert found[C].seconds == found[L].seconds
    given = torch.empty(1, 4, 8, 8)
    assert [model.copy(given, L) for model in (eager, generated)] == [
        5.0,
        pytest.approx(1e-6 + 2 * 1024 / 1e8),
    ]
    assert generated.convolution(SIZES, torch.float32, (CONVOLUTION_FORWARD,))[L].seconds == 2e-3


# With a profile, the plan is carried out.

NETWORK = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU()).eval()


def optimized(monkeypatch: pytest.MonkeyPatch, found: DeviceProfile) -> fxpasses.Optimized:
    monkeypatch.setattr("fxpasses.devices.store.find", lambda device: found)
    x = torch.randn(SIZES.input)
    with torch.no_grad():
        program = CAPTURES["pre_dispatch"](NETWORK, (x,))
        result = fxpasses.optimize(program, (x,))
        torch.testing.assert_close(result.graph_module(x), NETWORK(x))
    return result


COPIES = (copy_row("channels_last", 1152, 1e-5), copy_row("contiguous", 1152, 1e-5))


def test_auto_converts_where_the_measured_gain_exceeds_the_measured_copies(monkeypatch):
    rows = (row("contiguous", 1e-3), row("channels_last", 1e-4), *COPIES)
    plan = optimized(monkeypatch, profile(*rows)).report.layout
    assert plan.convolutions[0].label == L
    # Input and weight there, the result back: 1152 bytes, 2304 and 1152.
    assert plan.seconds == pytest.approx(1e-4 + 1e-5 + 2e-5 + 1e-5)
    assert plan.source == "profile of here"


@pytest.mark.parametrize(("seconds", "label"), [(1e-5, L), (1e-3, C)])
def test_a_weights_copy_costs_what_was_measured_of_weights(monkeypatch, seconds, label):
    of_weights = [
        dataclasses.replace(copy, operator=WEIGHT_COPY, seconds=seconds)
        for copy in (copy_row("channels_last", 1152, 1.0), copy_row("contiguous", 1152, 1.0))
    ]
    rows = (row("contiguous", 1e-3), row("channels_last", 1e-4), *COPIES, *of_weights)
    assert optimized(monkeypatch, profile(*rows)).report.layout.convolutions[0].label == label


def test_auto_leaves_alone_what_does_not_pay_for_its_copies(monkeypatch):
    rows = (row("contiguous", 1.2e-4), row("channels_last", 1e-4), *COPIES)
    result = optimized(monkeypatch, profile(*rows))
    assert result.report.layout.convolutions[0].label == C
    assert result.report.layout.decision == "no-gain"


# A 1x1 convolution is a matrix product too.

POINTWISE = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1, bias=False)).eval()
PRODUCTS = ("aten.mm.default", "aten.addmm.default")


def pointwise_profile(product: float) -> DeviceProfile:
    """Contiguous 3 ms, channels-last 2 ms, and so many seconds as a matrix product."""
    rows = []
    for sizes in (((2, 8, 6, 6), (4, 8, 1, 1)), ((2, 4, 6, 6), (8, 4, 1, 1))):
        key = convolution_key(*sizes, [1, 1], [0, 0], [1, 1])
        rows += [
            dataclasses.replace(row("contiguous", 3e-3), key=key),
            dataclasses.replace(row("channels_last", 2e-3), key=key),
            dataclasses.replace(row("channels_last", product, "mm"), key=key),
        ]
    return profile(*rows)


def multiplied(monkeypatch: pytest.MonkeyPatch, product: float, grad: bool = False) -> list[str]:
    """The matrix products in the graph; outputs and strides are eager's, and the plan says what was taken."""
    monkeypatch.setattr("fxpasses.devices.store.find", lambda device: pointwise_profile(product))
    x = torch.randn(2, 8, 6, 6)
    with torch.set_grad_enabled(grad):
        result = fxpasses.optimize(CAPTURES["pre_dispatch"](POINTWISE, (x,)), (x,))
        ours, theirs = result.graph_module(x), POINTWISE(x)
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == theirs.stride()
    result.graph_module.graph.lint()
    assert all("val" in node.meta for node in result.graph_module.graph.nodes if node.op != "output")
    found = [str(node.target) for node in result.graph_module.graph.nodes if str(node.target) in PRODUCTS]
    plan = result.report.layout
    assert [convolution.label for convolution in plan.convolutions] == [L, L]
    assert [convolution.implementation for convolution in plan.convolutions] == [
        "mm" if found else "aten.convolution"
    ] * 2
    assert [convolution.channels_last for convolution in plan.convolutions] == [
        product if found else 2e-3
    ] * 2
    return found


def test_a_product_that_was_measured_faster_takes_the_place_of_the_convolution(monkeypatch):
    assert multiplied(monkeypatch, 1e-3) == ["aten.addmm.default", "aten.mm.default"]


@pytest.mark.parametrize(("product", "taken"), [(1.9e-3, 0), (1.7e-3, 2)])
def test_a_product_has_to_be_faster_by_more_than_measurements_vary(monkeypatch, product, taken):
    assert len(multiplied(monkeypatch, product)) == taken


@pytest.mark.parametrize(
    ("device_type", "bandwidth", "operands", "taken"),
    [
        ("cpu", 6e6, "hot", False),
        ("cpu", 6e6, None, False),
        ("cpu", 6e6, "cold", True),
        ("cpu", 8e6, "hot", True),
        ("cuda", 6e6, "hot", True),
    ],
)
def test_on_a_cpu_a_product_that_was_measured_hot_has_to_gain_what_two_passes_through_memory_take(
    device_type, bandwidth, operands, taken
):
    """Such a measurement has its operands in the cache, a model has not; nor has one that was made cold."""
    found = dataclasses.replace(
        pointwise_profile(1e-3),
        rooflines=(dataclasses.replace(PEAKS, bandwidth=bandwidth),),
        settings={"operands": operands} if operands else {},
    )
    # 2·36·(8 + 4) values of four bytes, twice: the gain of 1 ms at 6.912 MB a second.
    sizes = ConvolutionSizes(
        (2, 8, 6, 6), (4, 8, 1, 1), (2, 4, 6, 6), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    )
    costs = CostModel(device_type, found)
    choices = costs.convolution(sizes, torch.float32, (CONVOLUTION_FORWARD,), as_product=True)
    expected = ("mm", 1e-3) if taken else ("aten.convolution", 2e-3)
    assert (choices[L].implementation, choices[L].seconds) == expected
    assert (choices[C].implementation, choices[C].seconds) == ("aten.convolution", 3e-3)


def test_a_product_that_was_measured_slower_does_not(monkeypatch):
    assert multiplied(monkeypatch, 2.5e-3) == []


def test_a_product_is_not_taken_where_autograd_would_run_over_it(monkeypatch):
    assert multiplied(monkeypatch, 1e-3, grad=True) == []


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Conv2d(8, 4, 1, stride=2), (2, 8, 6, 6)),
        (nn.Conv2d(8, 4, 1, padding=1), (2, 8, 6, 6)),
        (nn.Conv2d(8, 4, 1, groups=2), (2, 8, 6, 6)),
        (nn.Conv2d(8, 4, (1, 3)), (2, 8, 6, 6)),
        (nn.ConvTranspose2d(8, 4, 1), (2, 8, 6, 6)),
    ],
    ids=["stride", "padding", "groups", "3 wide", "transposed"],
)
def test_a_convolution_that_is_no_product_is_never_written_as_one(monkeypatch, module, x):
    """Even where a profile claims to have measured it."""

    class Claims(DeviceProfile):
        def seconds(self, operator, key, layout, dtype="float32", *, implementations=None):
            fast = layout == "channels_last"
            name = "mm" if fast and "mm" in (implementations or ()) else "aten.convolution"
            return Estimate(1e-3 if name == "mm" else 2e-3 if fast else 3e-3, name)

    monkeypatch.setattr("fxpasses.devices.store.find", lambda device: Claims("here", "2", rooflines=(PEAKS,)))
    given = torch.randn(x)
    with torch.no_grad():
        result = fxpasses.optimize(CAPTURES["pre_dispatch"](module, (given,)), (given,))
        torch.testing.assert_close(result.graph_module(given), module(given))
    assert result.report.layout.convolutions[0].implementation == "aten.convolution"


# Dynamic sizes.


def test_a_plan_for_dynamic_sizes_says_where_it_stops_being_the_best():
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))).eval()
    x = torch.randn(4, 16, 32, 32)
    shapes = ({0: Dim("batch", min=2, max=4096)},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    context = GraphContext(program.graph_module, Modes(grad=False), executor="eager")
    # A weight's copy does not grow with the batch, what it saves does: one way or the other it must flip.
    slow_start = DeviceProfile("here", "2", rooflines=(Roofline("float32", 1e12, 1e12, 1e10, 1e-4),))
    plan = assign(context, "auto", slow_start).plan
    assert {flip.sizes[next(iter(flip.sizes))] for flip in plan.sizes} == {2, 64}
    for flip in plan.sizes:
        assert flip.least <= flip.seconds
        assert flip.optimal == (flip.seconds <= flip.least * (1 + 1e-9) + 1e-12)
    assert not all(flip.optimal for flip in plan.sizes)


def test_a_static_plan_has_no_other_sizes():
    program = CAPTURES["pre_dispatch"](NETWORK, (torch.randn(SIZES.input),))
    context = GraphContext(program, Modes(grad=False), executor="eager")
    assert assign(context).plan.sizes == ()
