"""The pass `layout` on graphs that are run as they are: right values, eager's strides, needed copies."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import CAPTURES, GRAPHS, callable_of, fresh, outputs_and_gradients, printed, require_equal
from torch import nn
from torch.fx import GraphModule

import fxpasses
from fxpasses.devices.profile import DeviceProfile, Roofline
from fxpasses.graph.context import GraphContext
from fxpasses.graph.copying import copy_graph_module
from fxpasses.graph.layouts import C, L
from fxpasses.graph.metadata import ensure_metadata
from fxpasses.graph.modes import Modes
from fxpasses.passes.layout.assign import Assignment, assign
from fxpasses.passes.layout.edits import NotMaterialisedError
from fxpasses.passes.layout.materialise import materialise
from fxpasses.passes.layout.network import Role
from fxpasses.testing.strategies import readers  # noqa: F401  # which defines operators
from fxpasses.torch_internals.pytree import tree_leaves

X = (2, 4, 8, 8)


class Residual(nn.Module):
    """Convolutions around a sum, with pooling, and a linear layer in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.first(x)))
        y = F.max_pool2d(F.relu(self.second(y)) + y, 2)
        return self.last(y.mean((2, 3)))


class Decoder(nn.Module):
    """Convolutions that go up again, with cat and interpolate."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(12, 5, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = torch.sigmoid(self.down(x))
        joined = torch.cat([self.up(low), x, F.interpolate(low, scale_factor=2)[:, :4]], 1)
        return self.out(joined), low


class NextBlock(nn.Module):
    """Layer norm and linear layers over channels between two permutes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm(4)
        self.wide, self.narrow = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        return x + self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)


class Shuffle(nn.Module):
    """A channel shuffle through a five-dimensional view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.conv(x).chunk(2, 1)
        y = torch.cat([left, F.relu(right)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Gate(nn.Module):
    """Squeeze and excitation: a tensor without a label scales one that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x)
        gate = self.squeeze(F.adaptive_avg_pool2d(y, 1))
        return y * torch.sigmoid(gate), gate


class Inplace(nn.Module):
    """Writes to the result of a convolution, after one reader of it and before another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        # Autograd keeps nothing of what is written to here.
        before = torch.cat([x, y], 1)[:, 2:6] + 1
        y[:, :2].mul_(2)
        y.add_(0.1)
        F.relu(y, inplace=True)
        return self.b(y) + before


class Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(4, 6, 3, padding=1), nn.Conv3d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool3d(F.relu(self.b(F.relu(self.a(x)))), 2)


MODELS = [Residual, Decoder, NextBlock, Shuffle, Gate, Inplace, Video]


def model_and_input(kind: type[nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    shape = (2, 4, 4, 8, 8) if kind is Video else X
    return kind().double().eval(), torch.randn(shape, dtype=torch.float64, requires_grad=True)


def randomly(assignment: Assignment, seed: int) -> Assignment:
    """The same problem with labels drawn at random: every mixture must be right, not the best one alone."""
    draw, network = random.Random(seed), assignment.network
    drawn = [C, L, *(draw.choice((C, L)) for _ in assignment.labels[2:])]
    return dataclasses.replace(
        assignment, labels=tuple(drawn[network.find(variable)] for variable in range(len(drawn)))
    )


def context_of(graph_module: GraphModule, inputs: tuple[torch.Tensor, ...], executor: str) -> GraphContext:
    copied = copy_graph_module(graph_module)
    ensure_metadata(copied, inputs)
    return GraphContext(copied, Modes(grad=True), executor=executor)


def labelled_at_random(
    graph_module: GraphModule, inputs: tuple[torch.Tensor, ...], executor: str, seeds: int
) -> Iterator[GraphModule]:
    """The graph with random labels, as many times, each carried out."""
    for seed in range(seeds):
        context = context_of(graph_module, inputs, executor)
        materialise(context, randomly(assign(context), seed))
        context.graph.lint()
        context.module.recompile()
        yield context.module


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("capture", GRAPHS)
@pytest.mark.parametrize("kind", MODELS)
def test_values_gradients_and_strides_are_those_of_eager(kind, capture, layout):
    model, x = model_and_input(kind)
    program = (
        CAPTURES[capture](model, (x,)) if not (kind is Shuffle and capture == "symbolic_trace") else None
    )
    if program is None:
        pytest.skip("symbolic_trace cannot unpack a shape")
    before = printed(program)
    result = fxpasses.optimize(program, (x,), {"layout": layout})
    assert printed(program) == before
    call = callable_of(result)
    expected = outputs_and_gradients(model, list(model.parameters()), (x,), True)
    require_equal(outputs_and_gradients(call, list(model.parameters()), (x,), True), expected)
    ours = tree_leaves(call(*fresh((x,))))
    theirs = tree_leaves(model(x))
    assert [result.stride() for result in ours] == [result.stride() for result in theirs]


@pytest.mark.parametrize("given", ["contiguous", "channels_last"])
@pytest.mark.parametrize("capture", ["pre_dispatch", "export", "aten"])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind is not Video])
def test_gradients_have_the_strides_of_what_they_belong_to(kind, capture, given):
    """From autograd itself: what accumulates in `.grad` takes these strides anyway."""
    model, x = model_and_input(kind)
    format_ = torch.contiguous_format if given == "contiguous" else torch.channels_last
    model, x = model.to(memory_format=format_), x.detach().to(memory_format=format_).requires_grad_()
    other = "channels_last" if given == "contiguous" else "contiguous"
    result = fxpasses.optimize(CAPTURES[capture](model, (x,)), (x,), {"layout": other})
    assert result.report.applied["layout"] == 1
    call = callable_of(result)
    leaves = [x, *model.parameters()]

    def strides(run):
        total = sum(result.square().sum() for result in tree_leaves(run(x)))
        return [gradient.stride() for gradient in torch.autograd.grad(total, leaves)]

    for stride, leaf in zip(strides(call), leaves, strict=True):
        kept = [d for d, size in enumerate(leaf.shape) if size != 1]
        assert [stride[d] for d in kept] == [leaf.stride(d) for d in kept]
    if given == "contiguous":
        assert strides(call) == strides(model)


@pytest.mark.parametrize("executor", ["eager", "fused"])
@pytest.mark.parametrize("capture", ["pre_dispatch", "symbolic_trace"])
@pytest.mark.parametrize("kind", MODELS)
def test_any_labelling_gives_the_same_values_and_strides(kind, capture, executor):
    model, x = model_and_input(kind)
    if kind is Shuffle and capture == "symbolic_trace":
        pytest.skip("symbolic_trace cannot unpack a shape")
    program = CAPTURES[capture](model, (x,))
    expected = tree_leaves(model(x))
    for module in labelled_at_random(program, (x,), executor, 8):
        found = tree_leaves(module(x))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            if executor == "eager":
                assert ours.stride() == theirs.stride()


def copies(graph_module: GraphModule) -> int:
    return sum("clone" in str(node.target) for node in graph_module.graph.nodes)


def optimized(model: nn.Module, x: torch.Tensor, layout: str = "channels_last") -> fxpasses.Optimized:
    with torch.no_grad():
        return fxpasses.optimize(CAPTURES["pre_dispatch"](model, (x,)), (x,), {"layout": layout})


def test_a_chain_of_convolutions_is_converted_at_its_ends_only():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3))).eval()
    result = optimized(model, torch.randn(X))
    # The input, the three weights, and the output back.
    assert copies(result.graph_module) == result.report.layout.copies == 5
    assert result.report.applied == {"layout": 1}


def test_what_is_channels_last_already_is_not_copied():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).to(memory_format=torch.channels_last).eval()
    x = torch.randn(X).contiguous(memory_format=torch.channels_last)
    result = optimized(model, x)
    assert copies(result.graph_module) == 0
    assert result.graph_module(x).is_contiguous(memory_format=torch.channels_last)


def test_a_tensor_with_three_readers_in_the_other_layout_is_copied_once():
    class Fan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 2, 3) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([conv(x) for conv in self.convs], 1)

    result = optimized(Fan().eval(), torch.randn(X))
    inputs = [edge for edge in result.report.layout.cut_edges if edge.size == X]
    assert [len(edge.wanted_by) for edge in inputs] == [3]
    assert copies(result.graph_module) == 3 + 1 + 1


def test_a_copy_is_made_again_after_a_write_to_its_source():
    model, x = model_and_input(Inplace)
    result = optimized(model, x)
    assert result.report.applied == {"layout": 1}
    torch.testing.assert_close(result.graph_module(x), model(x), rtol=1e-9, atol=1e-9)


def test_an_operator_of_unknown_semantics_is_forced_and_listed():
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.fxpasses_testing_untagged.doubled(self.conv(x))

    plan = optimized(Unknown().eval(), torch.randn(X)).report.layout
    assert plan.forced_by_unknown == ("fxpasses_testing_untagged.doubled",)
    assert "unknown semantics" in str(plan)


def test_known_operators_are_not_listed_as_unknown():
    model, x = model_and_input(Residual)
    assert optimized(model, x).report.layout.forced_by_unknown == ()


def test_each_cut_edge_names_its_tensor_its_cost_and_who_wants_what():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).eval()
    report = optimized(model, torch.randn(X)).report
    edge = next(edge for edge in report.layout.cut_edges if edge.size == X)
    assert (edge.operator, edge.made) == ("placeholder", "contiguous")
    assert edge.wanted_by == ("conv2d",)
    assert edge.seconds > 0
    assert "is made contiguous and copied to channels_last" in str(edge)


def test_each_side_of_a_cut_edge_names_who_wants_what_past_those_that_take_any():
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Tanh(), nn.Flatten()).eval()
    plan = optimized(model, torch.randn(2, 64, 16, 16)).report.layout
    (conv,) = plan.convolutions
    gains = f"{conv.node} gains {(conv.contiguous - conv.channels_last) * 1e6:.1f} us"
    image, weight, result = plan.cut_edges
    assert image.made_for == (f"{image.node} comes so",)
    assert (image.wanted_by, image.wanted_for) == (("relu",), (gains,))
    assert (weight.made_for, weight.wanted_for) == ((f"{weight.node} comes so",), (gains,))
    assert (result.operator, result.made_for) == ("tanh", (gains,))
    assert result.wanted_for == (f"{result.wanted_by[0]} needs the traced strides",)
    assert f"; channels_last: {gains}" in str(plan)


def test_a_graph_without_convolutions_has_no_plan_and_no_remark():
    report = optimized(nn.Sequential(nn.ReLU()).eval(), torch.randn(X)).report
    assert report.layout is None
    assert not [remark for remark in report.remarks if remark.rule == "layout"]


def test_a_device_that_nobody_measured_is_planned_and_left_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr("fxpasses.devices.store.find", lambda device: None)
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))).eval()
    result = optimized(model, torch.randn(2, 64, 32, 32), "auto")
    assert result.report.layout.source == "roofline"
    assert result.report.layout.seconds < result.report.layout.contiguous_seconds
    assert result.report.layout.decision == "no-profile"
    assert copies(result.graph_module) == 0


def test_a_graph_of_which_too_little_was_measured_is_planned_and_left_as_it_is(monkeypatch):
    peaks = Roofline("float32", 6e10, 5e10, 1e10, 5e-6)
    monkeypatch.setattr(
        "fxpasses.devices.store.find", lambda device: DeviceProfile("here", "2", rooflines=(peaks,))
    )
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))).eval()
    result = optimized(model, torch.randn(2, 64, 32, 32), "auto")
    assert result.report.layout.seconds < result.report.layout.contiguous_seconds
    assert result.report.layout.decision == "not-measured"
    assert copies(result.graph_module) == 0
    assert "fewer than half of the convolutions" in str(result.report.layout)


def test_the_layout_pass_can_be_disabled():
    x = torch.randn(X)
    program = CAPTURES["pre_dispatch"](nn.Conv2d(4, 4, 3), (x,))
    report = fxpasses.optimize(program, (x,), {"layout": "channels_last", "disable": "layout"}).report
    assert report.layout is None


def test_what_cannot_be_carried_out_leaves_the_graph_as_it_was(monkeypatch):
    model, x = model_and_input(Residual)
    context = context_of(CAPTURES["pre_dispatch"](model, (x,)), (x,), "eager")
    assignment = assign(context, "channels_last")
    before = printed(context.module)
    metadata = [str(node.meta["val"]) for node in context.graph.nodes if "val" in node.meta]
    calls = iter(range(100))
    real = context.evaluator.call

    def fails_in_the_middle(*given):
        if next(calls) == 6:
            raise RuntimeError("no kernel")
        return real(*given)

    monkeypatch.setattr(context.evaluator, "call", fails_in_the_middle)
    with pytest.raises(NotMaterialisedError, match="no kernel"):
        materialise(context, assignment)
    context.module.recompile()
    assert printed(context.module) == before
    assert [str(node.meta["val"]) for node in context.graph.nodes if "val" in node.meta] == metadata


def test_a_layer_norm_between_permutes_is_read_without_a_copy():
    model, x = model_and_input(NextBlock)
    context = context_of(CAPTURES["pre_dispatch"](model, (x,)), (x,), "eager")
    network = assign(context).network
    permutes = [node for node in context.graph.nodes if "permute" in node.name]
    assert network.roles[permutes[0]] is Role.LABELLED


def test_a_plan_survives_the_report_as_json():
    model, x = model_and_input(Residual)
    report = optimized(model, x).report
    import json

    plan = json.loads(report.to_json())["layout"]
    assert fxpasses.LayoutPlan.from_dict(plan) == report.layout


def test_blocks_that_repeat_and_write_in_place_are_planned():
    """A result's metadata may be made from that of an equal call, and be written to all the same."""
    block = (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    blocks = [copy.deepcopy(layer) for _ in range(4) for layer in block]
    model = nn.Sequential(nn.Conv2d(4, 4, 3), *blocks).eval()
    report = fxpasses.explain(
        model, torch.randn(2, 4, 8, 8), options={"layout": "channels_last", "inner": "eager"}
    )
    assert report.layout is not None
    assert report.layout.decision == "applied"
    assert [remark for remark in report.remarks if remark.status == "failed"] == []
