"""What is kept for the backward pass: neither the convolution's result nor the folded weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.models.saved_tensors import saved_bytes
from fxpasses.testing import assert_close_to_eager, expect

NO_LAYOUT = {"inductor": {"layout_optimization": False}}
X = torch.randn(2, 16, 8, 8, dtype=torch.float64)
ACTIVATION = X.numel() * X.element_size()


def blocks(count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = []
    for _ in range(count):
        layers += [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers).double().eval()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def kept(output: torch.Tensor, model: nn.Module) -> int:
    return saved_bytes([output], [*model.parameters(), *model.buffers(), X])


@pytest.mark.usefixtures("no_code")
def test_only_one_activation_a_block_is_kept_and_no_folded_weight():
    model = blocks()
    compiled = torch.compile(model, backend="fxpasses", options=NO_LAYOUT)
    with expect(efficient_conv_bn_eval=3):
        output = compiled(X)
    # The ReLU's result is the next convolution's input; the last one's sign is kept as booleans.
    assert 2 * ACTIVATION < kept(output, model) <= 3 * ACTIVATION
    stock = torch.compile(copy.deepcopy(model), options={"layout_optimization": False})
    assert kept(stock(X), model) > 1.5 * kept(output, model)


@pytest.mark.usefixtures("no_code")
def test_a_folded_weight_would_be_seen_if_it_were_kept(monkeypatch):
    from fxpasses.rewrite.builder import Builder

    monkeypatch.setattr(Builder, "recompute_in_backward", lambda self: None)
    model = blocks()
    options = {"inductor": {"layout_optimization": False, "force_disable_caches": True}}
    output = torch.compile(model, backend="fxpasses", options=options)(X)
    weight = model[0].weight.numel() * 8
    assert kept(output, model) > 2 * ACTIVATION + 2 * weight


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_gradients_are_right_when_the_fold_is_recomputed(inner, dynamic):
    check_gradients(inner, dynamic)


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_of_generated_code_are_right_when_the_fold_is_recomputed(dynamic):
    check_gradients("inductor", dynamic)


def check_gradients(inner, dynamic):
    eager = blocks()
    model = copy.deepcopy(eager)
    x, y = (X.clone().requires_grad_() for _ in range(2))
    torch.compile(model, backend="fxpasses", dynamic=dynamic, options={"inner": inner})(
        x
    ).square().sum().backward()
    eager(y).square().sum().backward()
    found = [x.grad, *(each.grad for each in model.parameters())]
    expected = [y.grad, *(each.grad for each in eager.parameters())]
    assert_close_to_eager("gradient", found, expected, expected)


@pytest.mark.usefixtures("no_code")
def test_a_checkpoint_around_some_blocks_keeps_its_own_meaning():
    eager = blocks(4)
    model = copy.deepcopy(eager)

    def run(net, x):
        x = net[:3](x)
        x = checkpoint(net[3:9], x, use_reentrant=False)
        return net[9:](x)

    compiled = torch.compile(run, backend="fxpasses", options=NO_LAYOUT)
    with expect(efficient_conv_bn_eval=4):
        output = compiled(model, X)
    # The checkpoint keeps its input only.
    assert kept(output, model) <= 3 * ACTIVATION
    output.square().sum().backward()
    run(eager, X).square().sum().backward()
    found = [each.grad for each in model.parameters()]
    expected = [each.grad for each in eager.parameters()]
    assert_close_to_eager("gradient", found, expected, expected)


@pytest.mark.usefixtures("no_code")
def test_updating_a_parameter_between_forward_and_backward_is_refused_as_in_eager():
    """The recomputed fold reads the parameters again, so autograd's version check must still guard them."""
    model = blocks(1)
    output = torch.compile(model, backend="fxpasses", options=NO_LAYOUT)(X)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_no_layout_copy_of_a_weight_or_of_the_input_is_kept():
    model = blocks(2).float()
    x = X.float()

    def kept_with(**options: object) -> int:
        compiled = torch.compile(copy.deepcopy(model), backend="fxpasses", options=options)
        return saved_bytes([compiled(x)], [*model.parameters(), *model.buffers(), x])

    plain = kept_with()
    assert plain == kept_with(inductor={"layout_optimization": False})
    assert plain == kept_with(inductor={"layout_optimization": True})


@pytest.mark.usefixtures("no_code")
def test_inputs_are_kept_as_they_are_whatever_reads_them_and_the_users_own_pass_runs_too():
    seen = []
    model = blocks().float()
    x = X.float().requires_grad_()
    twin, own = copy.deepcopy(model), x.detach().clone().requires_grad_()
    setting = {"joint_custom_post_pass": lambda graph: seen.append(len(graph.nodes))}
    compiled = torch.compile(twin, backend="fxpasses", options={"inductor": setting})
    for output in (model(x), compiled(own)):
        output.square().sum().backward()
    assert len(seen) == 1
    assert own.grad.stride() == x.grad.stride()
    torch.testing.assert_close(own.grad, x.grad, rtol=1e-4, atol=1e-4)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("no_code")
def test_a_buffer_that_the_graph_writes_to_is_written_to():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks(1).float()
            self.register_buffer("seen", torch.zeros(1, 16, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(x.detach().mean(0, keepdim=True))
            return self.blocks(x * (1 + self.seen))

    model, x = Counting().eval(), X.float()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="fxpasses")
    for _ in range(2):
        for each in (model, compiled):
            each(x).square().sum().backward()
    torch.testing.assert_close(twin.seen, model.seen)
    assert model.seen.abs().sum() > 0
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-3)
