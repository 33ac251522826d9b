"""Convolutions of one dimension are planned as those of images of height 1, gradients included."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxpasses
from fxpasses.graph.context import GraphContext
from fxpasses.graph.modes import Modes
from fxpasses.passes.layout.assign import assign
from fxpasses.passes.layout.lines import Lines, is_line, read_line
from fxpasses.passes.layout.stock import stock_plan
from tests.passes.layout.test_layout_models import traced as planned

CONVOLUTION = torch.ops.aten.convolution.default


class Speech(nn.Module):
    """The stem of a speech encoder: spectrograms [N, C, T] to a sequence [N, T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(20, 32, 3, padding=1)
        self.second = nn.Conv1d(32, 32, 3, stride=2, padding=1)
        self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

    def forward(self, x):
        y = F.gelu(self.second(F.gelu(self.first(x)))).permute(0, 2, 1)
        return self.linear(self.norm(y))


class Vocoder(nn.Module):
    """A transposed convolution and residual ones, dilated, grouped and of one filter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(20, 32, 7, padding="same")
        self.up = nn.ConvTranspose1d(32, 16, 4, 2, 1)
        self.dilated = nn.Conv1d(16, 16, 3, padding=3, dilation=3, groups=4)
        self.last = nn.Conv1d(16, 1, 7, padding=3, bias=False)

    def forward(self, x):
        x = self.up(F.leaky_relu(self.first(x), 0.1))
        x = x + self.dilated(F.leaky_relu(x, 0.1))
        return torch.tanh(self.last(x)), x


class Sequences(nn.Module):
    """Between sequences [N, T, C], as in conformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(32, 64, 1), nn.Conv1d(32, 32, 5, padding=2, groups=32)
        self.norm, self.last = nn.BatchNorm1d(32), nn.Conv1d(32, 32, 1)

    def forward(self, x):
        y = F.glu(self.first(torch.tanh(x).transpose(1, 2)), 1)
        return self.last(F.silu(self.norm(self.second(y)))).transpose(1, 2) + x


MODELS = {Speech: (2, 20, 40), Vocoder: (2, 20, 40), Sequences: (2, 40, 32)}


def compiled(model, **options):
    given = {"layout": "channels_last", **options}
    return torch.compile(model, backend="fxpasses", options=given, dynamic=False)


def seeded(kind):
    torch.manual_seed(0)
    return kind().double().eval()


def leaves(made):
    return made if isinstance(made, tuple) else (made,)


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert one.stride() == other.stride()


def results_and_gradients(run, model, x):
    x = x.clone().requires_grad_()
    made = leaves(run(x))
    loss = sum(one.sin().sum() for one in made)
    return [*made, *torch.autograd.grad(loss, [x, *model.parameters()])]


AS_PLANNED = planned(layout="channels_last")
"""Runs the graphs that inductor would generate code for."""


@pytest.mark.parametrize(
    "compile_",
    [pytest.param(AS_PLANNED, id="traced"), pytest.param(compiled, id="inductor", marks=pytest.mark.full)],
)
@pytest.mark.parametrize("kind", MODELS)
def test_results_and_gradients_are_eagers(kind, compile_):
    model, x = seeded(kind), torch.randn(MODELS[kind], dtype=torch.float64)
    run = compile_(model)
    found = results_and_gradients(run, model, x)
    plan = fxpasses.last_report().layout
    convolutions = sum(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
    assert len(plan.convolutions) == 2 * convolutions
    expected = results_and_gradients(model, model, x)
    if kind is Sequences and torch.__version__.startswith("2.11"):
        # With layout="off", too, the input's gradient has other strides than eager's there.
        torch.testing.assert_close(found.pop(1), expected.pop(1), rtol=1e-9, atol=1e-9)
    assert_equal(found, expected)


@pytest.mark.usefixtures("no_code")
def test_sizes_may_be_dynamic():
    model = seeded(Vocoder)
    run = torch.compile(model, backend="fxpasses", options={"layout": "channels_last"}, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 40), (3, 24)):
            x = torch.randn(batch, 20, length, dtype=torch.float64)
            assert_equal(leaves(run(x)), leaves(model(x)))
    assert len(fxpasses.last_report().layout.convolutions) == 4


def test_nothing_is_copied_on_the_way_to_a_sequence():
    model, x = seeded(Speech), torch.randn(2, 20, 40, dtype=torch.float64)
    with torch.no_grad():
        assert_equal([AS_PLANNED(model)(x)], [model(x)])
    plan = fxpasses.last_report().layout
    assert {convolution.label for convolution in plan.convolutions} == {"channels_last"}
    assert plan.causes == {"aten.unsqueeze": 3}  # the input and two weights
    assert plan.copies == 3


def test_sequences_are_not_copied_on_their_way_to_convolutions():
    model, x = seeded(Sequences), torch.randn(2, 40, 32, dtype=torch.float64)
    with torch.no_grad():
        assert_equal([AS_PLANNED(model)(x)], [model(x)])
    plan = fxpasses.last_report().layout
    assert plan.causes == {"results": 1}  # which eager does not give as [N, T, C]


@pytest.mark.parametrize("options", [{"layout": "contiguous"}, {"layout": "auto", "tune_seconds": 0}])
def test_without_a_plan_that_pays_the_graph_stays_as_it_was(options):
    model, x = seeded(Speech), torch.randn(2, 20, 40, dtype=torch.float64)
    with torch.no_grad():
        assert_equal([compiled(model, **options)(x)], [model(x)])
    plan = fxpasses.last_report().layout
    assert plan is None or not plan.converted


def traced(function, *given):
    return make_fx(function, tracing_mode="fake")(*given)


def context_of(graph_module):
    return GraphContext(graph_module, Modes(grad=False), executor="fused")


def described(graph_module):
    return [
        (node.name, str(node.target), str(node.args), str(node.meta.get("val")))
        for node in graph_module.graph.nodes
    ]


def _with_gradients(x, weight, bias):
    y = torch.relu(torch.conv1d(x.transpose(1, 2), weight, bias, padding=1))
    z = torch.conv1d(y, weight, bias)
    return torch.autograd.grad(z.sin().sum(), [x, weight, bias])


def gradients():
    given = (torch.randn(2, 9, 4), torch.randn(4, 4, 3), torch.randn(4))
    return traced(_with_gradients, *(one.requires_grad_() for one in given))


def test_undone_a_graph_is_what_it_was():
    graph_module = gradients()
    before = described(graph_module)
    lines = Lines(context_of(graph_module))
    assert lines
    assert described(graph_module) != before
    lines.undo()
    graph_module.graph.lint()
    assert described(graph_module) == before


def test_written_as_images_a_graph_computes_the_same():
    graph_module, given = gradients(), [torch.randn(2, 9, 4), torch.randn(4, 4, 3), torch.randn(4)]
    expected = graph_module(*given)
    Lines(context_of(graph_module))
    graph_module.graph.lint()
    graph_module.recompile()
    for found, wanted in zip(graph_module(*given), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert not [node for node in graph_module.graph.nodes if node.target is CONVOLUTION and not is_line(node)]


@pytest.mark.parametrize(
    ("kernel", "x", "weight"),
    [
        (torch.conv2d, torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)),
        (torch.conv3d, torch.randn(2, 3, 5, 5, 5), torch.randn(4, 3, 3, 3, 3)),
        (torch.add, torch.randn(2, 3, 8), torch.randn(2, 3, 8)),
    ],
    ids=["images", "video", "no convolution"],
)
def test_other_operators_are_left_alone(kernel, x, weight):
    graph_module = traced(lambda x, weight: kernel(x, weight), x, weight)
    before = described(graph_module)
    assert not Lines(context_of(graph_module))
    assert described(graph_module) == before


def test_gradients_that_are_handed_on_as_one_are_left_alone():
    graph_module = gradients()
    node = next(node for node in graph_module.graph.nodes if "convolution_backward" in str(node.target))
    output = graph_module.graph.output_node()
    output.args = ((*output.args[0], node),)
    Lines(context_of(graph_module))
    assert node in graph_module.graph.nodes


@pytest.mark.parametrize("padding", [1, "same", "valid"])
def test_the_sizes_are_those_of_an_image(padding):
    x, weight = torch.randn(2, 8, 20), torch.randn(6, 4, 3)
    graph_module = traced(lambda x, w: torch.conv1d(x, w, padding=padding, groups=2), x, weight)
    (node,) = (node for node in graph_module.graph.nodes if read_line(node) is not None)
    width = 0 if padding == "valid" else 1
    assert read_line(node).sizes.key() == (
        f"input=2x8x1x20 weight=6x4x1x3 stride=1x1 padding=0x{width} dilation=1x1 groups=2"
    )


@pytest.mark.parametrize("x", [torch.randn(3, 8), torch.randn(2, 3, 8, 8)], ids=["unbatched", "an image"])
def test_only_batched_lines_are_read(x):
    graph = torch.fx.Graph()
    given, weight = graph.placeholder("x"), graph.placeholder("weight")
    function = torch.conv1d if x.dim() == 2 else torch.conv2d
    node = graph.call_function(function, (given, weight))
    sizes = (4, 3, *[3] * (x.dim() - (1 if x.dim() == 2 else 2)))
    filters = torch.randn(sizes)
    for one, found in ((given, x), (weight, filters), (node, function(x, filters))):
        one.meta["val"] = found
    assert read_line(node) is None


def test_stock_inductor_is_not_said_to_lay_them_out():
    def both(x, image, weight, filters):
        return torch.conv1d(x, weight), torch.conv2d(image, filters)

    sizes = ((2, 4, 9), (2, 4, 9, 9), (4, 4, 3), (4, 4, 3, 3))
    graph_module = traced(both, *(torch.randn(size) for size in sizes))
    Lines(context_of(graph_module))
    context = context_of(graph_module)
    assignment = assign(context)
    _, labels = stock_plan(context, assignment)
    network = assignment.network
    found = {is_line(node): labels[network.find(network.variables[node])] for node in network.convolutions}
    assert found == {True: "contiguous", False: "channels_last"}


@pytest.mark.full
def test_a_copy_of_the_model_in_float32_is_close():
    model, x = seeded(Vocoder), torch.randn(2, 20, 40)
    single = copy.deepcopy(model).float()
    with torch.no_grad():
        for found, exact in zip(compiled(single)(x), model(x.double()), strict=True):
            assert (found - exact).abs().max() <= 1e-5
