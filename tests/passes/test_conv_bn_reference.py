"""The situations of PyTorch's own test of this rewrite, through our backend with real inductor behind it.

112 cases: {one pair, three pairs among others} x bias x {linear, convolutions, transposed convolutions} x
SyncBatchNorm x {torch.compile, make_fx before dispatch and then torch.compile}. In each the outputs, the
gradients, the step of an optimiser and the outputs after it must equal eager's, and each pair is rewritten
once: also where the user has switched on inductor's own pass, whose counter is looked at as well.
"""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.fx.experimental.proxy_tensor import make_fx

import fxpasses
from fxpasses.torch_internals.tracing import enable_python_dispatcher

RULE = "efficient_conv_bn_eval"
SETTING = {"efficient_conv_bn_eval_fx_passes": True}
COUNTED = {"force_disable_caches": True}
"""What comes from a cache is not counted by inductor."""
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


class OnePair(nn.Module):
    """A convolution (or linear layer) and its batch norm."""

    def __init__(self, layer, norm, **kwargs):
        super().__init__()
        self.conv = layer(IN_CHANNELS, OUT_CHANNELS, **kwargs)
        self.bn = norm(OUT_CHANNELS)

    def forward(self, x):
        return self.bn(self.conv(x))


class ThreePairs(nn.Module):
    """Three pairs, called by position and by keyword; one use of conv2 and one of bn3 have no partner."""

    def __init__(self, layer, norm, **kwargs):
        super().__init__()
        self.conv1 = layer(IN_CHANNELS, OUT_CHANNELS, **kwargs)
        self.bn1 = norm(OUT_CHANNELS)
        self.conv2 = layer(OUT_CHANNELS, OUT_CHANNELS, **kwargs)
        self.bn2 = norm(OUT_CHANNELS)
        self.conv3 = layer(OUT_CHANNELS, OUT_CHANNELS, **kwargs)
        self.bn3 = norm(OUT_CHANNELS)

    def forward(self, x):
        first = self.bn1(self.conv1(input=x))
        second = self.bn2(input=self.conv2(self.conv2(first)))
        third = self.bn3(input=self.conv3(input=second))
        return self.bn3(third) + third


NETS = {"one": (OnePair, 1), "three": (ThreePairs, 3)}

ALL = list(itertools.product(NETS, (True, False), LAYERS, (False, True), (False, True)))
SOME = [
    ("one", True, "conv2d", False, True),
    ("one", False, "conv1d", True, True),
    ("one", True, "conv_transpose1d", False, False),
    ("one", False, "conv_transpose2d", True, False),
    ("three", False, "linear", True, True),
]
situations = pytest.mark.parametrize(("net", "bias", "layer", "sync", "captured"), ALL)
devices = pytest.mark.parametrize(
    ("device", "tf32"),
    [("cpu", False), *(pytest.param("cuda", each, marks=pytest.mark.gpu) for each in (False, True))],
)


@contextlib.contextmanager
def tensor_float_32(allowed: bool):
    """Lets cuDNN and cuBLAS round operands to TensorFloat-32, which keeps three digits, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


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


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """To that part of the largest value."""
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * largest)


def check(net, bias, layer, sync, captured, *, device="cpu", tolerance=1e-4, options=None):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    conv, norm, dimensions = LAYERS[layer]
    kwargs = {"bias": bias} if dimensions == 0 else {"bias": bias, "kernel_size": 3, "stride": 2}
    factory, pairs = NETS[net]
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
    compiled = torch.compile(source, backend="fxpasses", options=options)
    optimisers = [torch.optim.SGD(each.parameters(), lr=1e-3) for each in (eager, other)]

    with fxpasses.testing.expect(efficient_conv_bn_eval=pairs):
        result = compiled(x)
    assert (counters["fxpasses"][RULE], counters["inductor"][RULE]) == (pairs, 0)
    reference = eager(x)
    assert_near(result, reference, tolerance)

    for output, optimiser in zip((reference, result), optimisers, strict=True):
        optimiser.zero_grad()
        output.mean().backward()
    # A bias's gradient is a float32 sum over up to two million values: oneDNN keeps two digits of it.
    of_gradients = max(5e-2 if dimensions == 3 else 2e-3, 10 * tolerance)
    for ours, theirs in zip(other.parameters(), eager.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad, of_gradients)
    for optimiser in optimisers:
        optimiser.step()
    for ours, theirs in zip(other.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    fresh = _input(dimensions, "transpose" in layer, device)
    assert_near(compiled(fresh), eager(fresh), tolerance)


@pytest.mark.full
@devices
@situations
def test_reference_situations_equal_eager_and_are_counted(net, bias, layer, sync, captured, device, tf32):
    with tensor_float_32(tf32):
        check(net, bias, layer, sync, captured, device=device, tolerance=3e-3 if tf32 else 1e-4)


@pytest.mark.full
@devices
@situations
def test_inductors_own_pass_switched_on_changes_nothing(net, bias, layer, sync, captured, device, tf32):
    with tensor_float_32(tf32), inductor_config.patch({**SETTING, **COUNTED}):
        check(net, bias, layer, sync, captured, device=device, tolerance=3e-3 if tf32 else 1e-4)


@pytest.mark.parametrize(("net", "bias", "layer", "sync", "captured"), SOME)
def test_some_of_the_reference_situations(net, bias, layer, sync, captured):
    check(net, bias, layer, sync, captured)


def test_inductors_own_pass_switched_on_globally_changes_nothing():
    with inductor_config.patch({**SETTING, **COUNTED}):
        check("one", True, "conv1d", False, False)


def test_inductors_own_pass_switched_on_by_options_changes_nothing():
    with inductor_config.patch(COUNTED):
        check("one", False, "linear", True, True, options={"inductor": SETTING})


def test_there_are_as_many_reference_situations_as_in_pytorch():
    assert len(ALL) == 112
    assert set(SOME) <= set(ALL)
