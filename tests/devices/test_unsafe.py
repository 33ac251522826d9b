"""What a library computes wrongly in channels-last stays contiguous."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import fxpasses
from fxpasses.devices.sizes import ConvolutionSizes
from fxpasses.devices.unsafe import forgets_padding, may_overrun, overruns
from fxpasses.graph.context import GraphContext
from fxpasses.graph.modes import Modes
from fxpasses.graph.names import base_name
from fxpasses.passes.layout.assign import assign
from fxpasses.passes.layout.costs import CostModel
from fxpasses.passes.layout.problem import FIXED_C
from fxpasses.passes.layout.reading import read_network
from fxpasses.passes.weights.convert import conversions
from tests.passes.layout.test_graphs import context_of
from tests.passes.layout.test_joint import joint_graph


def sizes_of(convolution: nn.Module, *image: int) -> ConvolutionSizes:
    x = torch.randn(image)
    arguments = (
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.transposed,
        convolution.output_padding,
        convolution.groups,
    )
    return ConvolutionSizes(x.shape, convolution.weight.shape, convolution(x).shape, arguments)


WRONG = {
    "RepVGG's first block": (nn.Conv2d(3, 48, 1, stride=2), (2, 3, 32, 32)),
    "15 channels": (nn.Conv2d(15, 8, 1, stride=2), (2, 15, 32, 32)),
    "a stride along one dimension": (nn.Conv2d(3, 8, 1, stride=(1, 2)), (2, 3, 7, 8)),
    "transposed": (nn.ConvTranspose2d(32, 3, 1, stride=2, output_padding=1), (2, 32, 8, 8)),
}
RIGHT = {
    "16 channels": (nn.Conv2d(16, 48, 1, stride=2), (2, 16, 32, 32)),
    "no stride": (nn.Conv2d(3, 48, 1), (2, 3, 32, 32)),
    "3x3": (nn.Conv2d(3, 48, 3, stride=2, padding=1), (2, 3, 32, 32)),
    "an odd image": (nn.Conv2d(3, 48, 1, stride=2), (2, 3, 31, 32)),
    "padding": (nn.Conv2d(3, 48, 1, stride=2, padding=1), (2, 3, 32, 32)),
    "groups": (nn.Conv2d(4, 8, 1, stride=2, groups=2), (2, 4, 32, 32)),
    "three dimensions": (nn.Conv3d(3, 8, 1, stride=2), (2, 3, 8, 8, 8)),
    "transposed, with a remainder": (nn.ConvTranspose2d(32, 3, 1, stride=2), (2, 32, 8, 8)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_onednn_writes_past_the_end_of_is_known(name):
    convolution, image = WRONG[name]
    assert overruns(sizes_of(convolution, *image), torch.float32, "cpu")
    assert overruns(sizes_of(convolution, *image), torch.bfloat16, "cpu")


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_left_alone(name):
    convolution, image = RIGHT[name]
    assert not overruns(sizes_of(convolution, *image), torch.float32, "cpu")


def test_other_devices_and_types_have_other_kernels():
    convolution, image = WRONG["RepVGG's first block"]
    sizes = sizes_of(convolution, *image)
    assert not overruns(sizes, torch.float32, "cuda")
    assert not overruns(sizes, torch.float64, "cpu")


def test_a_padding_may_be_given_by_its_name():
    assert may_overrun((48, 3, 1, 1), (2, 2), "valid", 1)
    assert not may_overrun((48, 3, 3, 3), (2, 2), "valid", 1)


class Stem(nn.Module):
    """Like the first block of RepVGG: two convolutions of the image, and what comes after them."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, 24, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(channels, 24, 1, stride=2, bias=False)
        self.after = nn.Conv2d(24, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(torch.relu(self.wide(x)) + torch.relu(self.point(x)))


@pytest.mark.parametrize(("channels", "label"), [(3, "contiguous"), (16, "channels_last")])
def test_in_a_joint_graph_the_gradients_of_such_a_weight_are_contiguous(channels, label):
    graph_module, inputs = joint_graph(Stem(channels), torch.randn(2, channels, 32, 32))
    context = context_of(graph_module, inputs, "fused")
    assignment = assign(context, "channels_last")
    found = {}
    for node in assignment.network.convolutions:
        if node.name.startswith("convolution_backward"):
            found[node.args[2].meta["val"].shape] = assignment.label(node)
        else:
            assert assignment.label(node) == "channels_last"
    assert found == {
        (32, 24, 3, 3): "channels_last",
        (24, channels, 3, 3): "channels_last",
        (24, channels, 1, 1): label,
    }
    assert len(assignment.network.unsafe) == (label == "contiguous")


@pytest.mark.parametrize("grad", [True, False])
def test_a_graph_that_autograd_runs_over_has_the_convolution_contiguous(grad):
    with torch.set_grad_enabled(grad):
        traced, x = torch.fx.symbolic_trace(Stem()), torch.randn(2, 3, 32, 32)
        report = fxpasses.optimize(traced, (x,), options={"layout": "channels_last"}).report
    labels = {convolution.node: convolution.label for convolution in report.layout.convolutions}
    other = "contiguous" if grad else "channels_last"
    assert labels == {"wide": "channels_last", "point": other, "after": "channels_last"}
    declined = [
        remark for remark in report.remarks if remark.rule == "layout" and remark.status == "declined"
    ]
    assert [(remark.code, remark.node) for remark in declined] == [("unsafe-kernel", "point")] * grad
    wanted = [str(edge) for edge in report.layout.cut_edges if "point is right in it alone" in str(edge)]
    assert bool(wanted) == grad


def test_a_frozen_weight_has_no_gradient_to_go_wrong():
    model, x = Stem(), torch.randn(2, 3, 32, 32)
    model.point.requires_grad_(False)
    report = fxpasses.optimize(
        torch.fx.symbolic_trace(model), (x,), options={"layout": "channels_last"}
    ).report
    assert {convolution.label for convolution in report.layout.convolutions} == {"channels_last"}


def test_weights_are_converted_where_they_may_be():
    model = Stem()
    changed = [
        conversion.name for conversion in conversions(model, torch.channels_last) if conversion.changes
    ]
    assert changed == ["wide.weight", "after.weight"]
    assert fxpasses.convert_conv_weights(model, torch.channels_last) is model
    assert model.point.weight.stride() == (3, 1, 1, 1)
    wide = Stem(16)
    assert fxpasses.convert_conv_weights(wide, torch.channels_last).point.weight.stride() == (16, 1, 16, 16)


def codes_of_compiling(model: nn.Module, **options: object) -> set[str]:
    """The codes of the remarks of `layout`; no backward is run."""
    torch.compiler.reset()
    torch.compile(model, backend="fxpasses", options=options)(torch.randn(2, 3, 20, 20))
    return {remark.code for remark in fxpasses.last_report().remarks if remark.rule == "layout"}


class Checkpointed(nn.Module):
    """The stem in a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(self.stem, x, use_reentrant=False) * 2


def test_a_convolution_in_a_checkpoint_is_seen():
    assert codes_of_compiling(Checkpointed(), layout="off") == {"unsafe-kernel"}


def test_who_asks_for_inductors_optimisation_by_name_gets_it():
    settings = {"layout_optimization": True}
    assert codes_of_compiling(Stem(), layout="off", inductor=settings) == set()


def test_stock_inductor_decides_without_gradients():
    with torch.no_grad():
        assert codes_of_compiling(Stem(), layout="off") == set()


class Pooled(nn.Module):
    """An average pooling between two convolutions."""

    def __init__(self, kernel: int = 3, padding: int = 1) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)
        self.pool = nn.AvgPool2d(kernel, 1, padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.pool(self.before(x)))


def labels_of_poolings(model: nn.Module, executor: str, device: str) -> set[str]:
    """The labels of `avg_pool2d`, or in a joint graph of its gradient, where what may is channels-last."""
    x = torch.randn(2, 4, 20, 20)
    if executor == "fused":
        context = context_of(*joint_graph(model, x), executor)
        name = "avg_pool2d_backward"
    else:
        context = context_of(torch.fx.symbolic_trace(model), (x,), executor)
        name = "avg_pool2d"
    # The graph is read as one of that device: there need not be one.
    network = read_network(context, CostModel(device))
    labels = network.problem({}).uniform("channels_last")
    poolings = [node for node in network.variables if base_name(node) == name]
    assert poolings
    variables = {node: network.find(network.variables[node]) for node in poolings}
    assert all((node in network.unsafe) == (variable == FIXED_C) for node, variable in variables.items())
    return {labels[variable] for variable in variables.values()}


@pytest.mark.parametrize(
    ("model", "executor", "device", "label"),
    [
        (Pooled(), "eager", "cuda", "contiguous"),
        (Pooled(7, 3), "fused", "cuda", "contiguous"),
        (Pooled(3, 1), "fused", "cuda", "channels_last"),  # inductor generates it
        (Pooled(7, 0), "fused", "cuda", "channels_last"),
        (Pooled(3, 0), "eager", "cuda", "channels_last"),
        (Pooled(), "eager", "cpu", "channels_last"),
        (Pooled(7, 3), "fused", "cpu", "channels_last"),
    ],
)
def test_the_gradient_of_a_padded_average_pooling_is_contiguous_on_cuda(model, executor, device, label):
    assert labels_of_poolings(model, executor, device) == {label}


def test_a_pooling_without_gradients_is_left_alone():
    with torch.no_grad():
        context = GraphContext(
            context_of(torch.fx.symbolic_trace(Pooled()), (torch.randn(2, 4, 20, 20),), "eager").module,
            Modes(grad=False),
            executor="eager",
        )
        assert not read_network(context, CostModel("cuda")).unsafe


def test_the_padding_is_read_in_every_spelling():
    def spelled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            F.avg_pool2d(x, 3, 1, 1),
            F.avg_pool2d(x, kernel_size=3, padding=(0, 1)),
            torch.ops.aten.avg_pool2d.default(x, [3, 3], [1, 1], [1, 1]),
            F.avg_pool2d(x, 3, 1),
            torch.ops.aten.avg_pool2d.default(x, [3, 3]),
        )

    graph = torch.fx.symbolic_trace(spelled).graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    found = [forgets_padding(node, "cuda", generated=False) for node in calls]
    assert found == [True, True, True, False, False]


STEPS = """
import copy, sys, torch, fxpasses
from tests.devices.test_unsafe import Stem

torch.manual_seed(0)
model, x = Stem(), torch.randn(2, 3, 224, 224)
exact = copy.deepcopy(model).double()
exact(x.double()).square().mean().backward()
for layout in sys.argv[1:]:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="fxpasses", options={"layout": layout})
    for _ in range(25):
        model.zero_grad()
        compiled(x).square().mean().backward()
        for ours, theirs in zip(model.parameters(), exact.parameters()):
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)
    print(*sorted({each.code for each in fxpasses.last_report().remarks if each.rule == "layout"}))
"""


@pytest.mark.parametrize(
    "codes",
    [
        {"auto": "applied unsafe-kernel"},
        pytest.param(
            {"off": "unsafe-kernel", "channels_last": "applied unsafe-kernel", "contiguous": ""},
            marks=pytest.mark.full,
        ),
    ],
    ids=" ".join,
)
def test_training_steps_through_inductor_are_right(codes):
    """With stock inductor the process ends: a segmentation fault, or a heap that is corrupt."""
    command = [sys.executable, "-c", STEPS, *codes]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert done.stdout.splitlines() == list(codes.values())
