"""Masks of clamped activations are read off the clamped result, where that is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxpasses
from benchmarks.models.saved_tensors import saved_bytes

aten = torch.ops.aten
SPECIAL = [
    -3.0,
    -0.0,
    0.0,
    1e-45,
    3.0,
    5.999999,
    6.0,
    6.000001,
    9.0,
    float("inf"),
    -float("inf"),
    float("nan"),
]


def joint(low, high, dtype=torch.float32, *, order=(aten.le.Scalar, aten.ge.Scalar)):
    """Forward and backward of a clamp, as AOTAutograd writes them."""

    def function(x, gradient):
        y = aten.clamp_max.default(aten.clamp_min.default(x, low), high)
        mask = aten.bitwise_or.Tensor(order[0](x, low), order[1](x, high))
        return y, aten.where.self(mask, torch.zeros_like(gradient), gradient)

    x = torch.tensor(SPECIAL).to(dtype)
    return make_fx(function)(x, torch.ones_like(x)), (x, torch.ones_like(x))


def masks_in(graph_module):
    (mask,) = graph_module.graph.find_nodes(op="call_function", target=aten.bitwise_or.Tensor)
    return mask.args[0].args[0].target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 1.0), (-0.5, 0.25)])
def test_the_mask_is_read_off_the_result_and_is_the_same(low, high, dtype):
    traced, inputs = joint(low, high, dtype)
    result = fxpasses.optimize(traced, inputs)
    assert result.report.applied == {"activation_masks": 1}
    assert masks_in(result.graph_module) is aten.clamp_max.default
    for found, expected in zip(result.graph_module(*inputs), traced(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "order"),
    [
        (0.1, 6.0, torch.bfloat16, (aten.le.Scalar, aten.ge.Scalar)),
        (6.0, 0.0, torch.float32, (aten.le.Scalar, aten.ge.Scalar)),
        (2.0, 2.0, torch.float32, (aten.le.Scalar, aten.ge.Scalar)),
        (0.0, 6.0, torch.float32, (aten.lt.Scalar, aten.gt.Scalar)),
        (0.0, 6.0, torch.float32, (aten.ge.Scalar, aten.le.Scalar)),
    ],
    ids=["rounded-limit", "reversed", "empty", "strict", "inside"],
)
def test_what_would_not_be_the_same_is_left_alone(low, high, dtype, order):
    traced, inputs = joint(low, high, dtype, order=order)
    assert "activation_masks" not in fxpasses.optimize(traced, inputs).report.applied


def test_other_limits_than_the_clamps_are_left_alone():
    def function(x):
        y = aten.clamp_max.default(aten.clamp_min.default(x, 0.0), 6.0)
        return y, aten.bitwise_or.Tensor(aten.le.Scalar(x, 0.0), aten.ge.Scalar(x, 5.0))

    x = torch.tensor(SPECIAL)
    assert not fxpasses.optimize(make_fx(function)(x), (x,)).report.applied


def test_a_clamp_that_comes_after_the_mask_is_no_help():
    def function(x):
        mask = aten.bitwise_or.Tensor(aten.le.Scalar(x, 0.0), aten.ge.Scalar(x, 6.0))
        return mask, aten.clamp_max.default(aten.clamp_min.default(x, 0.0), 6.0)

    x = torch.tensor(SPECIAL)
    assert not fxpasses.optimize(make_fx(function)(x), (x,)).report.applied


def blocks(count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = []
    for _ in range(count):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    model = nn.Sequential(*layers).eval()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 3)
    return model


X = torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(0))


def kept(model, x, **options):
    compiled = torch.compile(copy.deepcopy(model), backend="fxpasses", options=options)
    return saved_bytes([compiled(x)], [*model.parameters(), *model.buffers(), x])


@pytest.mark.usefixtures("no_code")
def test_inside_inductor_no_mask_is_kept_but_the_last_ones():
    model = blocks()
    with_masks = kept(model, X, disable=("activation_masks",))
    without = kept(model, X)
    assert with_masks - without >= 2 * X.numel()  # one byte an element
    applied = fxpasses.last_report().applied
    assert applied["activation_masks"] == 3


def test_outputs_and_gradients_are_eagers_in_float64():
    model, x = blocks(2).double(), X.double().requires_grad_()
    twin, own = copy.deepcopy(model), x.detach().clone().requires_grad_()
    expected, found = model(x), torch.compile(twin, backend="fxpasses")(own)
    for result in (expected, found):
        result.square().sum().backward()
    assert fxpasses.last_report().applied["activation_masks"] == 2
    pairs = [(expected, found), (x.grad, own.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True)]
    for one, other in pairs:
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("no_code")
def test_graphs_without_a_clamp_and_without_gradients_are_not_touched():
    assert not {"activation_masks"} & {
        remark.rule for remark in _report_of(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), grad=True).remarks
    }
    assert not {"activation_masks"} & {remark.rule for remark in _report_of(blocks(), grad=False).remarks}


def _report_of(model, grad):
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend="fxpasses")(X)
    return fxpasses.last_report()
