"""The pass `layout` inside inductor: values, gradients, strides, caches, dynamic shapes, others' passes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import sampled_cases
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxpasses
from fxpasses.devices.keys import convolution_key
from fxpasses.devices.profile import (
    CONVOLUTION_FORWARD,
    CONVOLUTION_INPUT_GRAD,
    CONVOLUTION_WEIGHT_GRAD,
    LAYOUTS,
    DeviceProfile,
    Measurement,
    Roofline,
)
from fxpasses.devices.store import DeviceProfileWarning, device_name
from fxpasses.errors import UnknownOptionError
from fxpasses.graph.metadata import ensure_metadata
from fxpasses.options import Options
from fxpasses.passes.layout.assign import assign
from fxpasses.passes.layout.costs import CostModel
from fxpasses.passes.layout.joint import joint_layout
from fxpasses.passes.layout.materialise import materialise
from fxpasses.passes.layout.network import Role
from fxpasses.torch_internals.inductor import REALIZE_TO_STRIDES
from fxpasses.torch_internals.pytree import tree_leaves
from tests.passes.layout.test_graphs import MODELS, NextBlock, Residual, context_of, model_and_input

MODES = ["inference", "frozen_statistics", "training"]


def outputs_and_gradients(model: nn.Module, x: torch.Tensor, mode: str) -> list[torch.Tensor]:
    """The outputs of one call; in training, the gradients of a weighted sum of them too."""
    outputs = tree_leaves(model(x))
    if mode == "inference":
        return outputs
    weights = [
        torch.linspace(0, 1, output.numel(), dtype=output.dtype).view(output.shape) for output in outputs
    ]
    total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    leaves = [x, *model.parameters()]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*outputs, *(gradient for gradient in gradients if gradient is not None)]


def check(model: nn.Module, x: torch.Tensor, mode: str, **options: object) -> fxpasses.Report:
    """Compiles and compares with eager in float64 to 1e-9, strides included; gives the report."""
    torch.compiler.reset()
    fxpasses.reset()
    model = model.double().train(mode == "training")
    x = x.double().detach().requires_grad_(mode != "inference")
    eager = copy.deepcopy(model)
    with torch.set_grad_enabled(mode != "inference"):
        expected = outputs_and_gradients(eager, x, mode)
        compiled = torch.compile(model, backend="fxpasses", options={"layout": "channels_last", **options})
        found = outputs_and_gradients(compiled, x, mode)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        # A bias in front of a batch norm in training has a gradient of zero, up to rounding.
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert ours.stride() == theirs.stride()
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=1e-9, atol=1e-9)
    return fxpasses.Report.merge(fxpasses.reports())


def test_a_training_step_equals_eager_and_the_plan_covers_the_backward():
    report = check(*model_and_input(Residual), "training")
    assert report.applied["layout"] == 1
    assert any("convolution_backward" in convolution.node for convolution in report.layout.convolutions)
    assert torch._dynamo.utils.counters["fxpasses"]["layout"] == 1


def test_inference_equals_eager():
    report = check(*model_and_input(NextBlock), "inference")
    assert report.applied["layout"] == 1


def test_dimensions_of_size_one_have_the_strides_of_eager_too():
    """A folded 1x1 weight's gradient: fake kernels give it channels-last strides, which a product keeps."""
    halves = nn.Conv2d(8, 16, 1, stride=2, bias=False)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), halves, nn.BatchNorm2d(16), nn.ReLU())
    report = check(model, torch.randn(2, 4, 8, 8), "frozen_statistics")
    assert report.applied == {"efficient_conv_bn_eval": 1, "layout": 1}


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", MODELS)
def test_small_models_equal_eager(kind, mode):
    check(*model_and_input(kind), mode)


class Mixed(nn.Module):
    """A mutated input, a view of an input, and autocast over convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.register_buffer("seen", torch.zeros(2, 4, 8, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.relu(self.a(x))
        self.seen.add_(y.detach())
        return self.b(torch.cat([y, self.seen], 1)), x[:, 1:3]


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
def test_mutated_buffers_and_views_of_inputs_are_as_in_eager(mode):
    check(Mixed(), torch.randn(2, 4, 8, 8), mode)


@pytest.mark.full
def test_autocast_gives_eager_dtypes_and_close_values():
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(2, 4, 8, 8)
    compiled = torch.compile(copy.deepcopy(model), backend="fxpasses", options={"layout": "channels_last"})
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = compiled(x), model(x)
    assert ours.dtype == theirs.dtype
    assert ours.stride() == theirs.stride()
    exact = model.double()(x.double())
    eager_error = (theirs.double() - exact).abs().max()
    assert (ours.double() - exact).abs().max() <= 2 * eager_error + 1e-3


@pytest.mark.full
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("dims", [(0,), (0, 2, 3)], ids=["batch", "batch_and_space"])
def test_dynamic_sizes_compile_once_for_all_sizes(dims, mode):
    if mode == "training" and 3 in dims:
        pytest.skip("stock inductor specialises H and W in the backward of a convolution")
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3))
    model = model.double()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fxpasses", options={"layout": "channels_last"}, fullgraph=True)
    fxpasses.reset()
    with torch.set_grad_enabled(mode == "training"):
        for size in (8, 12, 10):
            shape = [size // 2 if d == 0 else (4 if d == 1 else (size if d in dims else 8)) for d in range(4)]
            x = torch.randn(shape, dtype=torch.float64, requires_grad=mode == "training")
            for d in dims:
                torch._dynamo.mark_dynamic(x, d)
            ours = outputs_and_gradients(compiled, x, mode)
            theirs = outputs_and_gradients(eager, x, mode)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
                assert a.stride() == b.stride()
    assert len(fxpasses.reports()) == 1
    assert fxpasses.last_report().applied["layout"] == 1


@pytest.mark.usefixtures("no_code")
def test_a_pass_of_the_users_in_the_same_slot_runs_too():
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen: list[int] = []

    class Counting(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(len(graph.nodes))

        def uuid(self) -> None:
            return None

    model = nn.Conv2d(4, 4, 3)
    options = {"layout": "channels_last", "inductor": {"joint_custom_post_pass": Counting()}}
    with torch.no_grad():
        torch.compile(model, backend="fxpasses", options=options)(torch.randn(1, 4, 8, 8))
    assert len(seen) == 1
    assert fxpasses.last_report().applied["layout"] == 1


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_inductor_multiplies_where_that_was_measured_to_be_faster(monkeypatch, mode):
    key = convolution_key((2, 8, 6, 6), (8, 8, 1, 1), [1, 1], [0, 0], [1, 1])
    times = {("contiguous", "aten.convolution"): 3e-3, ("channels_last", "aten.convolution"): 2e-3}
    forward = {**times, ("channels_last", "mm"): 1e-3}
    rows = [
        Measurement(operator, key, layout, name, "float32", seconds, 0.0, 20)
        for operator in (CONVOLUTION_FORWARD, CONVOLUTION_INPUT_GRAD, CONVOLUTION_WEIGHT_GRAD)
        for (layout, name), seconds in forward.items()
    ]
    with_profile(monkeypatch, dataclasses.replace(PROFILE, measurements=tuple(rows)))
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False))
    x = torch.randn(2, 8, 6, 6, requires_grad=mode == "training")
    with torch.set_grad_enabled(mode == "training"):
        ours = outputs_and_gradients(torch.compile(model, backend="fxpasses"), x, mode)
        theirs = outputs_and_gradients(model, x, mode)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert found.stride() == expected.stride()
    plan = fxpasses.last_report().layout
    # Gradients are no products: what autograd would make of one is not what was measured.
    backward = ["aten.convolution"] * (2 if mode == "training" else 0)
    assert [convolution.implementation for convolution in plan.convolutions] == ["mm", "mm", *backward]


# Who decides --------------------------------------------------------------------------------------------


def slot(layout: str, graph_module: object = None, **options: object) -> object:
    given = graph_module or torch.fx.symbolic_trace(CONV)
    ensure_metadata(given, [torch.randn(1, 4, 8, 8)])
    with torch.no_grad():
        return joint_layout(given, [torch.randn(1, 4, 8, 8)], Options(layout=layout, **options))


CONV = nn.Conv2d(4, 4, 3)


def with_profile(monkeypatch: pytest.MonkeyPatch, found: DeviceProfile | None) -> None:
    monkeypatch.setattr("fxpasses.devices.store.find", lambda device: found)


def measured(*operators: str) -> DeviceProfile:
    """A profile that has measured `CONV` in both layouts."""
    key = convolution_key((1, 4, 8, 8), (4, 4, 3, 3), [1, 1], [0, 0], [1, 1])
    rows = [
        Measurement(operator, key, layout, "aten.convolution", "float32", 1e-4, 0.0, 20)
        for operator in operators
        for layout in LAYOUTS
    ]
    peaks = Roofline("float32", 1e11, 1e11, 1e10, 1e-6)
    return DeviceProfile(device_name("cpu"), "2", rooflines=(peaks,), measurements=tuple(rows))


PROFILE = measured(CONVOLUTION_FORWARD)


def test_auto_leaves_a_device_that_nobody_measured_to_inductor(monkeypatch):
    with_profile(monkeypatch, None)
    assert slot("auto") is None


def test_auto_decides_where_the_convolutions_were_measured(monkeypatch):
    with_profile(monkeypatch, PROFILE)
    assert slot("auto") is not None


def test_auto_leaves_a_graph_to_inductor_whose_convolutions_were_not_measured(monkeypatch):
    with_profile(monkeypatch, PROFILE)
    more = nn.Sequential(CONV, nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 2))
    assert slot("auto", torch.fx.symbolic_trace(more)) is None
    assert slot("auto", torch.fx.symbolic_trace(more[:2])) is not None


def test_auto_leaves_training_to_inductor_where_no_gradients_were_measured(monkeypatch):
    graph_module = torch.fx.symbolic_trace(CONV)
    ensure_metadata(graph_module, [torch.randn(1, 4, 8, 8)])
    for profile in (PROFILE, measured(CONVOLUTION_FORWARD, CONVOLUTION_INPUT_GRAD, CONVOLUTION_WEIGHT_GRAD)):
        with_profile(monkeypatch, profile)
        found = joint_layout(graph_module, [torch.randn(1, 4, 8, 8)], Options())
        assert (found is None) == (profile is PROFILE)


def test_a_graph_without_convolutions_is_left_to_inductor(monkeypatch):
    with_profile(monkeypatch, PROFILE)
    assert slot("auto", torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))) is None


def test_a_profile_named_by_option_comes_before_all_others(monkeypatch, tmp_path):
    with_profile(monkeypatch, None)
    own = measured(CONVOLUTION_FORWARD)  # of the threads of today: other tests may have set their number
    own.save(tmp_path / "mine.json")
    assert slot("auto", layout_profile=tmp_path / "mine.json").source.profile == own
    assert slot("auto", layout_profile=str(tmp_path / "mine.json")).source.profile == own


def test_a_profile_named_by_option_that_cannot_be_used_is_named_and_the_rest_is_stock(monkeypatch, tmp_path):
    with_profile(monkeypatch, PROFILE)
    other = tmp_path / "other.json"
    dataclasses.replace(PROFILE, device="Other").save(other)
    with pytest.warns(DeviceProfileWarning, match="other.json is not used: it was measured on 'Other'"):
        assert slot("auto", layout_profile=other) is None
    with pytest.warns(DeviceProfileWarning, match="missing.json is not used: it cannot be read"):
        assert slot("auto", layout_profile=tmp_path / "missing.json") is None


def test_a_profile_that_is_no_path_is_refused():
    with pytest.raises(UnknownOptionError, match="'layout_profile' takes the path of a file; got 3"):
        Options(layout_profile=3)


@pytest.mark.parametrize("setting", ["layout_optimization", "freezing"])
def test_auto_leaves_the_decision_to_whoever_told_inductor_how_to_make_it(monkeypatch, setting):
    with_profile(monkeypatch, PROFILE)
    assert slot("auto", inductor={setting: True}) is None


@pytest.mark.parametrize("given", [{"layout": "off"}, {"layout": "channels_last", "disable": "layout"}])
def test_who_switches_the_pass_off_gets_stock_inductor(monkeypatch, given):
    with_profile(monkeypatch, PROFILE)
    assert slot(**given) is None


def test_an_asked_for_layout_needs_no_profile(monkeypatch):
    with_profile(monkeypatch, None)
    assert slot("channels_last") is not None


def test_another_profile_another_key(monkeypatch):
    with_profile(monkeypatch, PROFILE)
    first = slot("auto")
    assert first._key == slot("auto")._key
    with_profile(monkeypatch, dataclasses.replace(PROFILE, torch_version="3"))
    assert first._key != slot("auto")._key
    assert slot("contiguous")._key != slot("channels_last")._key


def test_a_dry_run_names_each_cut_edge_by_the_name_that_the_user_knows():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    report = fxpasses.explain(model, torch.randn(1, 4, 8, 8), options={"layout": "channels_last"})
    assert report.applied["layout"] == 1
    edges = {edge.tensor: edge for edge in report.layout.cut_edges}
    assert {"0_weight", "2_weight"} <= set(edges)
    assert edges["2_weight"].wanted_by == ("conv2d",) or "conv2d" in edges["2_weight"].wanted_by[0]
    assert "copied to channels_last" in str(report.layout)


def test_a_dry_run_says_why_nothing_would_be_done(monkeypatch):
    with_profile(monkeypatch, None)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    report = fxpasses.explain(model, torch.randn(1, 64, 32, 32))
    assert report.layout.decision == "no-profile"
    assert report.layout.source == "roofline"


@pytest.mark.parametrize(("layout", "packed"), [("auto", 1), ("contiguous", 0)])
def test_kept_weights_are_packed_unless_a_layout_was_asked_for(monkeypatch, layout, packed):
    """A packed convolution is no slower than what a plan would choose from: nothing is left to plan."""
    with_profile(monkeypatch, PROFILE)
    image = torch.randn(1, 4, 8, 8)
    options = {"weights": "cached", "layout": layout}
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(CONV, backend="fxpasses", options=options)(image), CONV(image)
        )
    report = fxpasses.last_report()
    assert (report.packed_tensors, report.layout is None) == (packed, bool(packed))


def test_where_no_weight_can_be_kept_the_plan_is_used(monkeypatch):
    """A weight that is computed from an input depends on more than parameters."""
    with_profile(monkeypatch, PROFILE)
    images, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
    with torch.no_grad():
        run = torch.compile(
            lambda images, weight: torch.conv2d(images, weight),
            backend="fxpasses",
            options={"weights": "cached"},
        )
        torch.testing.assert_close(run(images, weight), torch.conv2d(images, weight))
    report = fxpasses.last_report()
    assert report.layout is not None
    assert "no-parameter-work" in {remark.code for remark in report.remarks}


@pytest.fixture
def generated(monkeypatch):
    """Fused graphs are treated as a GPU's are, where inductor generates all but the convolutions."""

    def cost_model(device, profile, hints, generates):
        return CostModel(device, profile, hints, True)

    monkeypatch.setattr("fxpasses.passes.layout.assign.CostModel", cost_model)


class Skip(nn.Module):
    """Concatenates what no convolution reads; `reads` has one read it first."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.scale, self.reads = (
            nn.Conv2d(16, 4, 3, padding=1),
            nn.Parameter(torch.rand(8, 1, 1)),
            reads,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = (self.stem(x) * self.scale).relu()
        inner = self.inner(kept)[:, :, ::2, ::2] if self.reads else self.inner(F.max_pool2d(kept, 2))
        return self.last(torch.cat([F.interpolate(inner, scale_factor=2).relu(), kept], 1))


@pytest.mark.usefixtures("generated")
@pytest.mark.parametrize("reads", sampled_cases([False, True], [True]))
def test_inductor_concatenates_channels_last_where_the_plan_does(reads):
    model, x = Skip(reads).eval().double(), torch.randn(2, 3, 16, 16).double()
    compiled = torch.compile(model, backend="fxpasses", options={"layout": "channels_last"})
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        found, code = torch._inductor.utils.run_and_get_code(compiled, x)
        expected = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found.stride() == expected.stride()
    written = "\n".join(code)
    assert "(2, 16, 16, 16), (4096, 1, 256, 16)" in written
    assert "(2, 16, 16, 16), (4096, 256, 16, 1)" not in written


@pytest.mark.full
@pytest.mark.usefixtures("generated")
@pytest.mark.parametrize("reads", [False, True])
def test_training_through_a_concatenation_equals_eager(reads):
    check(Skip(reads).eval(), torch.randn(2, 3, 16, 16), "training")


@pytest.mark.usefixtures("generated")
@pytest.mark.parametrize(("reads", "settled"), [(False, 1), (True, 0)])
def test_only_a_concatenation_that_nothing_settles_is_settled(reads, settled):
    model, x = Skip(reads).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        context = context_of(make_fx(model)(x), [x], "fused")
        materialise(context, assign(context, "channels_last"))
    marked = [node for node in context.graph.nodes if REALIZE_TO_STRIDES in node.meta]
    assert len(marked) == settled
    assert all("relu" in node.name for node in marked)


class Upsampled(nn.Module):
    """Between convolutions an interpolation, which inductor writes out as indexing and arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = F.interpolate(self.first(x).sigmoid(), scale_factor=2, mode="bilinear", align_corners=False)
        return self.last(up)


@pytest.mark.usefixtures("generated")
@pytest.mark.parametrize("mode", sampled_cases(MODES, ["inference"]))
def test_an_interpolation_between_channels_last_convolutions_equals_eager(mode):
    report = check(Upsampled(), torch.randn(2, 3, 6, 10), mode)
    assert report.applied["layout"] == 1


class Repeated(Upsampled):
    """The nearest of the interpolations, as inductor sees it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).sigmoid()
        rows, columns = (torch.arange(2 * size) // 2 for size in y.shape[2:])
        return self.last(torch.ops.aten._unsafe_index(y, [None, None, rows[:, None], columns]))


@pytest.mark.parametrize("expected", [True, False])
def test_what_indexes_reads_a_contiguous_copy_that_lies_in_memory_on_a_gpu_alone(expected, request):
    if expected:
        request.getfixturevalue("generated")
    model, x = Repeated().eval(), torch.randn(2, 3, 6, 10)
    with torch.no_grad():
        context = context_of(make_fx(model)(x), [x], "fused")
        materialise(context, assign(context, "channels_last"))
        context.module.recompile()
        torch.testing.assert_close(context.module(x), model(x))
    (indexing,) = context.graph.find_nodes(op="call_function", target=torch.ops.aten._unsafe_index.Tensor)
    source = indexing.args[0]
    assert (REALIZE_TO_STRIDES in source.meta) is expected
    assert source.meta["val"].is_contiguous() is expected


class Beside(nn.Module):
    """A convolution, and beside it indexing of what no channels-last tensor leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(x.shape[2]).flip(0)
        return self.conv(x), torch.ops.aten.index(x.view(-1).sin().view(x.shape), [None, None, rows])


@pytest.mark.usefixtures("generated")
def test_what_is_computed_from_contiguous_tensors_alone_is_left_to_inductor():
    model, x = Beside().eval(), torch.randn(2, 3, 6, 10)
    with torch.no_grad():
        context = context_of(make_fx(model)(x), [x], "fused")
        assert materialise(context, assign(context, "channels_last")).copies > 0
        context.module.recompile()
        for ours, theirs in zip(context.module(x), model(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert not any(REALIZE_TO_STRIDES in node.meta for node in context.graph.nodes)


class Sized(Upsampled):
    """Divides by how much there is, and multiplies by a size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(y.sigmoid() / y.numel()) * y.shape[2] * y.size(3)


def test_reading_sizes_ties_a_tensor_to_no_layout():
    model, x = Sized().eval(), torch.randn(2, 3, 6, 10)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        context = context_of(traced, [x], "eager")
        assignment = assign(context, "channels_last")
        materialise(context, assignment)
        context.module.recompile()
        torch.testing.assert_close(context.module(x), model(x))
    readers = [node for node in context.graph.nodes if node.name in ("numel", "getattr_1", "size")]
    assert len(readers) == 3
    first = next(node for node in context.graph.nodes if node.name == "first")
    for node in readers:
        assert node.args[0] is first
        assert assignment.network.roles[node] is Role.FREE
    assert assignment.network.unknown == []
