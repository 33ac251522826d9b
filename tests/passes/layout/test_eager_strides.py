"""Batch norms and gradients of weights that eager lays out otherwise than torch's metadata say."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import CAPTURES, randomised, sampled_cases
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxpasses
from fxpasses.graph.context import GraphContext
from fxpasses.graph.modes import Modes
from fxpasses.passes.layout.eager_strides import correct_weight_gradients
from fxpasses.torch_internals.tensors import suggest_memory_format
from tests.passes.layout.test_layout_models import compiled, traced

aten = torch.ops.aten


class Norm(nn.Module):
    """A convolution whose weight may lie channels-last, and a batch norm."""

    def __init__(self, *, laid_out: bool, tail=None):
        super().__init__()
        self.conv, self.norm, self.tail = nn.Conv1d(16, 33, 1), nn.BatchNorm1d(33), tail or nn.Identity()
        if laid_out:
            strided = torch.empty_strided((33, 16, 1), (16, 1, 16)).copy_(self.conv.weight.detach())
            self.conv.weight = nn.Parameter(strided)

    def forward(self, x):
        return self.tail(self.norm(self.conv(x)))


MODES = {
    "fused": ({}, False),
    "gradients": ({}, True),
    "cached": ({"weights": "cached"}, False),
    "channels-last": ({"layout": "channels_last"}, False),
    "off": ({"layout": "off"}, True),
    "eager": ({"inner": "eager", "profit": "always"}, True),
}


@pytest.mark.parametrize("mode", sampled_cases(MODES, ["gradients", "cached", "eager"]))
def test_a_norm_behind_a_weight_that_lies_otherwise_gives_eagers_strides(mode):
    """As a result, before an activation and before a convolution."""
    options, grad = MODES[mode]
    tails = (None, nn.ReLU(), nn.Conv1d(33, 4, 1))
    model = randomised(nn.ModuleList(Norm(laid_out=True, tail=tail) for tail in tails))
    x = torch.randn(2, 16, 50, dtype=torch.float64)

    def run(x):
        return [norm(x) for norm in model]

    with torch.set_grad_enabled(grad):
        pairs = zip(torch.compile(run, backend="fxpasses", options=options)(x), run(x), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("sizes", [(2, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 6)], ids=str)
def test_eager_gives_a_norms_result_in_the_format_that_its_input_suggests(sizes):
    """What this pass takes for granted, for every order of the axes."""
    for order in itertools.permutations(range(len(sizes))):
        back = [order.index(axis) for axis in range(len(sizes))]
        x = torch.randn([sizes[axis] for axis in order]).permute(back)
        wanted = torch.empty_like(x, memory_format=suggest_memory_format(x)).stride()
        assert F.batch_norm(x, torch.zeros(3), torch.ones(3)).stride() == wanted


def nodes_of(program):
    return [str(node.target) for node in program.graph.nodes]


@pytest.mark.parametrize("level", ["symbolic_trace", "pre_dispatch", "export"])
@pytest.mark.parametrize("laid_out", [False, True])
def test_a_norm_that_metadata_tell_right_gets_nothing_written(level, laid_out):
    program = CAPTURES[level](randomised(Norm(laid_out=laid_out)), (torch.randn(2, 16, 50).double(),))
    result = fxpasses.optimize(program, (torch.randn(2, 16, 50).double(),), {"passes": ()})
    copies = [
        target for target in nodes_of(result.graph_module) if "contiguous" in target or "clone" in target
    ]
    assert len(copies) == int(laid_out)


def test_no_rule_finds_the_copy_between_what_it_folds():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.layer(x).transpose(1, 2)) * 2

    model, x = randomised(Scaled()), torch.randn(2, 5, 3, dtype=torch.float64)
    result = fxpasses.optimize(torch.fx.symbolic_trace(model), (x,), {"profit": "always"})
    assert result.report.applied == {"affine_across_views": 1}
    found, expected = result.graph_module(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize("laid_out", sampled_cases([False, True], [True]))
def test_symbolic_sizes_are_not_specialised(laid_out):
    model = randomised(Norm(laid_out=laid_out))
    run = torch.compile(model, backend="fxpasses", dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 50), (3, 40), (5, 33)):
            x = torch.randn(batch, 16, length, dtype=torch.float64)
            torch.testing.assert_close(run(x), model(x), rtol=1e-9, atol=1e-9)
            assert run(x).stride() == model(x).stride()
    assert len(fxpasses.reports()) == 1


class Weights(nn.Module):
    """Convolutions whose weights have dimensions of size 1, over an image that comes channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.pointwise = nn.Conv2d(6, 4, 1)
        self.transposed = nn.ConvTranspose2d(4, 1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pointwise(self.depthwise(x.permute(0, 3, 1, 2)).sigmoid())
        return self.transposed(y.sigmoid())


def gradients_of(call, model, x):
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(call(x).sum(), parameters.values()), strict=True))


TRACED = {f"traced-{layout}": traced(layout=layout) for layout in ("channels_last", "contiguous")}
GENERATED = {f"inductor-{layout}": compiled(layout=layout) for layout in ("channels_last", "contiguous")}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@pytest.mark.parametrize(
    ("compile_", "dtype"),
    [
        pytest.param(
            compile_,
            dtype,
            id=f"{how}-{name}",
            marks=pytest.mark.full if how in GENERATED else (),
        )
        for name, dtype in DTYPES.items()
        for how, compile_ in {**TRACED, **GENERATED}.items()
    ],
)
def test_gradients_of_weights_have_eagers_strides_in_dimensions_of_size_1_too(compile_, dtype):
    model, x = Weights().to(dtype), torch.randn(2, 8, 8, 6, dtype=dtype)
    eager = gradients_of(model, model, x)
    torch.compiler.reset()
    ours = gradients_of(compile_(model), model, x)
    assert {name: each.stride() for name, each in ours.items()} == {
        name: each.stride() for name, each in eager.items()
    }
    if dtype is torch.float64:
        torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("laid_out", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("kernel", [1, 3])
def test_metadata_of_a_weights_gradient_tell_the_strides_that_its_kernel_gives(
    kernel, groups, laid_out, dtype
):
    image = torch.randn(2, 6, 8, 8, dtype=dtype)
    image = image.to(memory_format=torch.channels_last) if laid_out else image
    weight = torch.randn(6, 6 // groups, kernel, kernel, dtype=dtype)

    def backward(gradient, image, weight):
        gradients = aten.convolution_backward(
            gradient, image, weight, None, [1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], groups,
            [True, True, False],
        )  # fmt: skip
        return gradients[1], gradients[1].neg()

    graph = make_fx(backward, tracing_mode="fake")(image, image, weight)
    correct_weight_gradients(GraphContext(graph, Modes(grad=False), executor="fused"))
    results = graph.graph.output_node().args[0]
    expected = [given.stride() for given in backward(image, image, weight)]
    # Of what follows a gradient in float32, which the correction leaves alone, metadata tell other strides.
    count = 2 if dtype is torch.float64 else 1
    assert [result.meta["val"].stride() for result in results][:count] == expected[:count]
