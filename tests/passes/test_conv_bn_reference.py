"""The situations of PyTorch's own test of this rewrite, through our backend with real inductor behind it.

112 cases: {one pair, a net with three eligible pairs} x bias x {linear, convolutions, transposed
convolutions} x SyncBatchNorm x {torch.compile, make_fx before dispatch and then torch.compile}. In each the
outputs, the step of an optimiser and the outputs after it must equal eager's, and the counters rise by
exactly the number of eligible pairs.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import fxpasses
from fxpasses.torch_internals.tracing import enable_python_dispatcher

IN_CHANNELS, OUT_CHANNELS, BATCH = 3, 32, 4

LAYERS = {
    "linear": (nn.Linear, nn.BatchNorm1d, 0),
    "conv1d": (nn.Conv1d, nn.BatchNorm1d, 1),
    "conv2d": (nn.Conv2d, nn.BatchNorm2d, 2),
    "conv3d": (nn.Conv3d, nn.BatchNorm3d, 3),
    "conv_transpose1d": (nn.ConvTranspose1d, nn.BatchNorm1d, 1),
    "conv_transpose2d": (nn.ConvTranspose2d, nn.BatchNorm2d, 2),
    "conv_transpose3d": (nn.ConvTranspose3d, nn.BatchNorm3d, 3),
}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class OnePair(nn.Module):
    """A convolution (or linear layer) and its batch norm."""

    def __init__(self, layer, norm, **kwargs):
        super().__init__()
        self.conv = layer(IN_CHANNELS, OUT_CHANNELS, **kwargs)
        self.bn = norm(OUT_CHANNELS, eps=0.001)

    def forward(self, x):
        return self.bn(self.conv(x))


class ThreePairs(nn.Module):
    """Three eligible pairs, one convolution applied twice and one batch norm applied twice."""

    def __init__(self, layer, norm, **kwargs):
        super().__init__()
        self.conv1 = layer(IN_CHANNELS, OUT_CHANNELS, **kwargs)
        self.bn1 = norm(OUT_CHANNELS, eps=0.001)
        self.conv2 = layer(OUT_CHANNELS, OUT_CHANNELS, **kwargs)
        self.bn2 = norm(OUT_CHANNELS, eps=0.001)
        self.nonlinear = nn.ReLU()

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(self.nonlinear(x)))
        x = self.bn2(self.conv2(self.nonlinear(x)))
        # The result of an activation is nothing to fold into.
        return self.bn2(torch.relu(x))


NETS = {"one": (OnePair, 1), "three": (ThreePairs, 3)}

ALL = list(itertools.product(NETS, (True, False), LAYERS, (False, True), (False, True)))
QUICK = [
    ("one", True, "linear", False, False),
    ("one", False, "conv1d", True, True),
    ("three", True, "conv2d", False, True),
    ("three", False, "conv_transpose2d", False, False),
]


def _input(dimensions: int, transposed: bool, device: str) -> torch.Tensor:
    side = 4 if transposed else 96
    return torch.rand(BATCH, IN_CHANNELS, *[side] * dimensions, device=device)


def _fill_statistics(module: nn.Module) -> None:
    """Fresh batch norms are the identity, and would hide a wrong fold."""
    generator = torch.Generator().manual_seed(1)
    for each in module.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            for tensor in (each.running_mean, each.weight.data, each.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            each.running_var.copy_(torch.rand(each.running_var.shape, generator=generator) + 0.5)


def check(net, bias, layer, sync, captured, device):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    conv, norm, dimensions = LAYERS[layer]
    kwargs = {"bias": bias} if dimensions == 0 else {"bias": bias, "kernel_size": 3, "stride": 2}
    factory, expected = NETS[net]
    model = factory(conv, norm, **kwargs)
    _fill_statistics(model)
    if sync:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    eager = model.eval().to(device)
    other = copy.deepcopy(eager)
    x = _input(dimensions, "transpose" in layer, device)

    source = other
    if captured:
        with enable_python_dispatcher():
            source = make_fx(other, pre_dispatch=True)(x)
    compiled = torch.compile(source, backend="fxpasses")
    optimisers = [torch.optim.SGD(each.parameters(), lr=1e-3) for each in (eager, other)]

    with fxpasses.testing.expect(efficient_conv_bn_eval=expected):
        result = compiled(x)
    assert counters["fxpasses"]["efficient_conv_bn_eval"] == expected
    reference = eager(x)
    torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-4 * reference.abs().max().item())

    for output, optimiser in zip((reference, result), optimisers, strict=True):
        optimiser.zero_grad()
        output.mean().backward()
        optimiser.step()
    for ours, theirs in zip(other.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    fresh = _input(dimensions, "transpose" in layer, device)
    again = eager(fresh)
    torch.testing.assert_close(compiled(fresh), again, rtol=1e-4, atol=1e-4 * again.abs().max().item())


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("net", "bias", "layer", "sync", "captured"), ALL)
def test_reference_situations_equal_eager_and_are_counted(net, bias, layer, sync, captured, device):
    # cuDNN's TensorFloat-32 keeps three digits, and four are compared.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check(net, bias, layer, sync, captured, device)


@pytest.mark.parametrize(("net", "bias", "layer", "sync", "captured"), QUICK)
def test_a_representative_part_of_the_reference_situations(net, bias, layer, sync, captured):
    check(net, bias, layer, sync, captured, "cpu")


def test_there_are_as_many_reference_situations_as_in_pytorch():
    assert len(ALL) == 112
