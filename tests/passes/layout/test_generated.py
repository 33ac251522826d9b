"""Loops that inductor writes read any layout and write the wanted one, so that nothing is copied for them.

Each network is right in float64 (outputs and strides are eager's), compiled, and run operator by operator.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.lowering import fallbacks
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

import fxpasses
from fxpasses.graph.metadata import set_value
from fxpasses.passes.layout.assign import assign
from fxpasses.passes.layout.labels import is_generated
from fxpasses.torch_internals.operators import OpOverload
from fxpasses.torch_internals.tracing import core_decompositions
from tests.helpers import sampled_cases
from tests.passes.layout.test_graphs import context_of
from tests.passes.layout.test_layout_models import compiled, require_equal, traced

aten = torch.ops.aten
LAYOUTS = ("auto", "off", "channels_last", "contiguous")


class Network(nn.Module):
    """A convolution in front and one behind."""

    batch = 2

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self.first(x)))


class Nearest(Network):
    """Nearest upsampling, which is a gather in inductor's graph."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        return F.interpolate(y, scale_factor=2.0, mode="nearest")


class FromOnePixel(Network):
    """A pooled image, which has no layout, is upsampled and added."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        pooled = F.interpolate(y.mean((2, 3), keepdim=True), size=y.shape[2:], mode="bilinear")
        return y + pooled


class Sequence(Network):
    """Pixels in a row go through a linear layer and come back as a contiguous image."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def between(self, y: torch.Tensor) -> torch.Tensor:
        n, c, h, w = y.shape
        row = self.linear(y.flatten(2).transpose(1, 2))
        return row.reshape(n, h, w, c).permute(0, 3, 1, 2).contiguous()


class Heads(Network):
    """Attention over pixels, whose result is a product and contiguous, is added to an image.

    In a larger batch the product wants images and heads as one dimension, which channels-last they are not.
    """

    batch = 1

    def between(self, y: torch.Tensor) -> torch.Tensor:
        n, c, h, w = y.shape
        q, k, v = (y.reshape(n, 2, c // 2, h * w) * scale for scale in (0.5, 1.0, 2.0))
        attention = (q.transpose(-2, -1) @ k).softmax(-1)
        return (v @ attention.transpose(-2, -1)).reshape(n, c, h, w) + y


class Rows(Network):
    """The pixels of two images are concatenated, in one row."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        n, c, h, w = y.shape
        rows = torch.cat([y.flatten(2), F.avg_pool2d(y, 2).flatten(2)], 2)
        return rows[..., : h * w].reshape(n, c, h, w)


NETWORKS = (Nearest, FromOnePixel, Sequence, Heads, Rows)
"""Without a copy between the two convolutions."""


def answers_of(call, x, *, trains):
    given = x.detach().clone().requires_grad_(trains)
    with torch.set_grad_enabled(trains):
        output = call(given)
        found = {"output": output.detach()}
        if trains:
            weights = torch.linspace(0, 1, output.numel(), dtype=output.dtype).view(output.shape)
            (found["gradient of x"],) = torch.autograd.grad((output * weights).sum(), given)
    return found


def check(kind, compile_, *, trains=False, dynamic=False, by_stock=False):
    """Compares with eager at one size, or at two under dynamic sizes; gives the plan.

    Where stock inductor decides on layouts, gradients have the strides that it likes.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    fxpasses.reset()
    model = kind().double()
    mine = copy.deepcopy(model)
    run = compile_(mine)
    for step in (0, 1) if dynamic else (0,):
        batch = kind.batch + step * (kind.batch > 1)
        x = torch.randn(batch, 3, 8, 8 + 2 * step, dtype=torch.float64)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 3)
        if dynamic and kind.batch > 1:
            torch._dynamo.mark_dynamic(x, 0)
        eager = answers_of(model, x, trains=trains)
        found = answers_of(run, x, trains=trains)
        if by_stock and trains:
            found["gradient of x"] = found["gradient of x"].contiguous()
        require_equal(found, eager, eager)
    failed = [
        remark for report in fxpasses.reports() for remark in report.remarks if remark.status == "failed"
    ]
    assert not failed
    return fxpasses.last_report().layout


def copies_inside(plan):
    """The copies of what the graph makes, other than for results."""
    edges = [edge for edge in plan.cut_edges if edge.operator not in ("placeholder", "get_attr")]
    return [edge for edge in edges if not all(reader.startswith("output") for reader in edge.readers)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_nothing_is_copied_inside_a_channels_last_plan(kind, dynamic):
    plan = check(kind, traced(layout="channels_last"), dynamic=dynamic)
    assert {convolution.label for convolution in plan.convolutions} == {"channels_last"}
    assert plan.repairs == 0
    assert not copies_inside(plan)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_are_eagers(kind, layout):
    check(kind, traced(layout=layout), trains=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_graphs_that_run_as_they_are_give_eagers_answers(kind, layout):
    check(kind, compiled(layout=layout, inner="aot_eager"))


@pytest.mark.parametrize("kind", sampled_cases(NETWORKS, [FromOnePixel]))
def test_generated_code_gives_eagers_answers(kind):
    check(kind, compiled(layout="channels_last"))


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_generated_code_gives_eagers_answers_in_every_layout(kind, layout, trains, dynamic):
    if trains and dynamic:
        pytest.skip("the lowering of a convolution's backward fixes H and W in stock inductor too")
    if trains and kind is FromOnePixel and layout == "contiguous":
        pytest.skip("stock inductor fails on that backward too, with layout_optimization=False")
    by_stock = layout in ("auto", "off")
    check(kind, compiled(layout=layout), trains=trains, dynamic=dynamic, by_stock=by_stock)


class TransformsAPart(Network):
    """An operator that forces reads a part of an image, which has gaps."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        a, b = y.chunk(2, 1)
        return torch.cat([a.sigmoid(), torch.fft.fft(b, dim=1).real], 1)


class TransformsAPermutedPart(Network):
    """The same of a part that is seen with other dimensions."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        rows = y.flatten(2).transpose(1, 2)[..., 4:]
        return torch.cat([y, torch.fft.fft(rows, dim=1).real.mT.unflatten(2, y.shape[2:])], 1)[:, :16]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", [TransformsAPart, TransformsAPermutedPart])
def test_a_part_with_gaps_has_the_traced_strides_for_whoever_needs_them(kind, dynamic):
    plan = check(kind, traced(layout="channels_last"), dynamic=dynamic)
    assert "aten._fft_r2c" in plan.causes


class Pooled(Network):
    """Max pooling of a product's result: a kernel of ATen's may be called for it."""

    def between(self, y: torch.Tensor) -> torch.Tensor:
        n, c, h, w = y.shape
        mixed = y.flatten(2) @ torch.ones(h * w, h * w, dtype=y.dtype)
        return F.max_pool2d(mixed.reshape(n, c, h, w), 2)


def test_what_is_not_a_loop_has_its_operands_copied():
    copied = copies_inside(check(Pooled, traced(layout="channels_last")))
    assert ("_low_memory_max_pool_with_offsets",) in [edge.wanted_by for edge in copied]


class AddsItsInput(nn.Module):
    batch = 2

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x).relu() + x


def test_an_input_is_copied_once_for_all_who_read_it():
    plan = check(AddsItsInput, traced(layout="channels_last"))
    (edge,) = [edge for edge in plan.cut_edges if edge.cause == "inputs"]
    assert len(edge.wanted_by) == 2


def test_reading_what_lies_otherwise_costs_what_a_copy_costs():
    x = torch.randn(1, 3, 8, 8)
    model = Heads().requires_grad_(False)
    graph = make_fx(model, decomposition_table=core_decompositions())(x)
    network = assign(context_of(graph, (x,), "fused"), "channels_last").network
    (read,) = [(node, operand) for node, operand in network.aside if node.target is aten.add.Tensor]
    add, product = read
    contiguous, channels_last = network.own(network.variables[add])
    assert network.tensors[product].original == "contiguous"
    assert contiguous == 0
    assert channels_last == network.tensors[product].to_channels_last > 0


def node_of(target, *operands, result=None, **kwargs):
    graph = Graph()
    placeholders = []
    for at, operand in enumerate(operands):
        if isinstance(operand, torch.Tensor):
            placeholders.append(graph.placeholder(f"x{at}"))
            set_value(placeholders[-1], operand)
        else:
            placeholders.append(operand)
    node = graph.call_function(target, tuple(placeholders), kwargs)
    if result is not None:
        set_value(node, result)
    return node


def test_loops_and_calls_are_told_apart():
    x = torch.randn(1, 2, 4, 4)
    loops = [
        node_of(aten.add.Tensor, x, x),
        node_of(aten.clone.default, x),
        node_of(aten._unsafe_index.Tensor, x),
        node_of(aten.cat.default, x),
        node_of(aten.copy.default, x, x),
    ]
    calls = [
        node_of(aten.bmm.default, x, x),
        node_of(aten.convolution.default, x),
        node_of(aten.max_pool2d_with_indices.default, x),
        node_of(aten.avg_pool2d.default, x),
        node_of(aten.view.default, x),
        node_of(aten.sort.default, x),
        node_of(aten.special_zeta.default, x, x),
        node_of(torch.add, x, x),
    ]
    assert all(map(is_generated, loops))
    assert not any(map(is_generated, calls))


def test_no_operator_for_which_inductor_calls_a_kernel_is_a_loop():
    called = [each for each in fallbacks if isinstance(each, OpOverload)]
    # Named dimensions come into no graph.
    called = [each for each in called if "names" not in {given.name for given in each._schema.arguments}]
    assert aten.igamma.default in called
    assert not [str(each) for each in called if is_generated(node_of(each))]
