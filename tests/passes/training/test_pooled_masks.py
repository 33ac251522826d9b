"""The mask of an activation ahead of max pooling is read off the pooled result, where that is the same."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxpasses
from benchmarks.models.saved_tensors import saved_bytes

aten = torch.ops.aten
NAN, INF = float("nan"), float("inf")


def joint(function, x):
    """Forward and backward of `function` in one graph, as far as autograd itself decomposes them."""

    def step(x, seed):
        y = function(x)
        return y, torch.autograd.grad(y, x, seed)[0]

    seed = torch.arange(1.0, 1.0 + function(x).numel(), dtype=x.dtype).reshape(function(x).shape)
    return make_fx(step)(x, seed), (x, seed)


def awkward(dtype=torch.float32):
    """Windows that are negative, tied, zero of both signs, infinite and not a number."""
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (2, 3, 9, 9)).to(dtype)
    x[0, 0, :3, :3] = -0.0
    x[0, 1, 4, 4], x[0, 1, 0, 0], x[1, 0, 2, 2], x[1, 1, 5, 5] = INF, -INF, NAN, 1e-30
    return x.requires_grad_()


POOLINGS = {
    "overlapping": lambda x: F.max_pool2d(F.relu(x), 3, 2, 1),
    "apart": lambda x: F.max_pool2d(F.relu(x), 2),
    "dilated": lambda x: F.max_pool2d(F.relu(x), 2, 1, 0, 2),
    "ceil": lambda x: F.max_pool2d(F.relu(x), 2, 2, ceil_mode=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", POOLINGS)
def test_the_gradient_is_the_same_to_the_bit(name, dtype):
    traced, inputs = joint(POOLINGS[name], awkward(dtype))
    result = fxpasses.optimize(traced, inputs)
    assert result.report.applied == {"activation_masks": 1}
    (gate,) = result.graph_module.graph.find_nodes(op="call_function", target=aten.threshold_backward.default)
    assert gate.args[1].target is operator.getitem  # the pooled result, not the activation
    with torch.no_grad():
        for found, expected in zip(result.graph_module(*inputs), traced(*inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def with_another_reader(x):
    y = F.relu(x)
    return F.max_pool2d(y, 2) + y[:, :, :4, :4]


DECLINED = {
    "another-reader-of-the-activation": with_another_reader,
    "mask-of-the-input": lambda x: F.max_pool2d(F.threshold(x, 1.0, 0.0), 3, 1),
    "average-pooling": lambda x: F.avg_pool2d(F.relu(x), 2),
    "pooling-first": lambda x: F.relu(F.max_pool2d(x, 2)),
    "something-between": lambda x: F.max_pool2d(F.relu(x) * 2, 2),
    "no-mask": lambda x: F.max_pool2d(x, 2),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_would_not_be_the_same_is_left_alone(name):
    traced, inputs = joint(DECLINED[name], awkward())
    result = fxpasses.optimize(traced, inputs)
    assert "activation_masks" not in result.report.applied


def test_a_gradient_that_somebody_else_reads_unmasked_is_left_alone():
    def step(x, seed):
        y = F.relu(x)
        pooled, indices = aten.max_pool2d_with_indices.default(y, [2, 2], [2, 2])
        back = aten.max_pool2d_with_indices_backward.default(
            seed, y, [2, 2], [2, 2], [0, 0], [1, 1], False, indices
        )
        return pooled, back, aten.threshold_backward.default(back, y, 0)

    x = awkward().detach()
    traced = make_fx(step)(x, torch.ones(2, 3, 4, 4))
    assert "activation_masks" not in fxpasses.optimize(traced, (x, torch.ones(2, 3, 4, 4))).report.applied


def test_the_mask_of_another_activation_than_the_pooled_one_is_left_alone():
    def step(x, other, seed):
        y = F.relu(x)
        pooled, indices = aten.max_pool2d_with_indices.default(y, [2, 2], [2, 2])
        back = aten.max_pool2d_with_indices_backward.default(
            seed, y, [2, 2], [2, 2], [0, 0], [1, 1], False, indices
        )
        return pooled, aten.threshold_backward.default(back, other, 0)

    x = awkward().detach()
    inputs = (x, x.flip(0), torch.ones(2, 3, 4, 4))
    assert "activation_masks" not in fxpasses.optimize(make_fx(step)(*inputs), inputs).report.applied


class Stem(nn.Module):
    """The beginning of a residual network."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3)
        self.norm, self.activation, self.pool = nn.BatchNorm2d(8), activation(), nn.MaxPool2d(3, 2, 1)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.pool(self.activation(self.norm(self.first(x)))))


INSIDE = pytest.mark.parametrize(
    ("activation", "dynamic"), [(nn.ReLU, False), (nn.ReLU, True), (nn.ReLU6, False)]
)


@pytest.mark.usefixtures("no_code")
@INSIDE
def test_inside_inductor_outputs_and_gradients_are_eagers_in_float64(activation, dynamic):
    check_inside_inductor(activation, dynamic)


@pytest.mark.full
@INSIDE
def test_outputs_and_gradients_of_generated_code_are_eagers_in_float64(activation, dynamic):
    check_inside_inductor(activation, dynamic)


def check_inside_inductor(activation, dynamic):
    model = Stem(activation).eval().double()
    twin = copy.deepcopy(model)
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    own = x.detach().clone().requires_grad_()
    expected, found = model(x), torch.compile(twin, backend="fxpasses", dynamic=dynamic)(own)
    for result in (expected, found):
        result.square().sum().backward()
    # ReLU6's mask is read off the clamped result first, and off the pooled one then.
    assert fxpasses.last_report().applied["activation_masks"] == (2 if activation is nn.ReLU6 else 1)
    pairs = [(expected, found), (x.grad, own.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True)]
    for one, other in pairs:
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("no_code")
def test_inside_inductor_the_mask_is_not_kept():
    model, x = Stem().eval(), torch.randn(2, 3, 16, 16)
    own = [*model.parameters(), *model.buffers(), x]
    compiled = torch.compile(
        copy.deepcopy(model), backend="fxpasses", options={"disable": ("activation_masks",)}
    )
    with_mask = saved_bytes([compiled(x)], own)
    torch._dynamo.reset()
    without = saved_bytes([torch.compile(copy.deepcopy(model), backend="fxpasses")(x)], own)
    assert with_mask - without == 2 * 8 * 16 * 16  # one byte an element
