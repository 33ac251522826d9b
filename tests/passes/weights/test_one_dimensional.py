"""Convolutions over one dimension are packed as images of height 1, with what stands between them."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import randomised
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.nn.utils import parametrizations

import fxpasses
from fxpasses.passes.weights.one_dimensional import join_images

CACHED = {"weights": "cached"}


class Block(nn.Module):
    """A residual block of a vocoder: dilated convolutions behind leaky ReLUs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels, channels, 3, dilation=3, padding=3)
        self.second = nn.Conv1d(channels, channels, 7, padding="same", bias=False)

    def forward(self, x):
        y = self.first(functional.leaky_relu(x, 0.1))
        return self.second(functional.leaky_relu(y, 0.1)) + x


class Net(nn.Module):
    """Convolutions of every kind, and between them what keeps the dimensions."""

    def __init__(self, normalise=lambda module: module) -> None:
        super().__init__()
        self.first = normalise(nn.Conv1d(3, 32, 7, padding=3))
        self.block = Block(32)
        self.up = normalise(nn.ConvTranspose1d(32, 16, 4, stride=2, padding=1))
        self.depthwise = nn.Sequential(nn.Conv1d(32, 32, 5, groups=32), nn.BatchNorm1d(32), nn.SiLU())
        self.grouped = nn.Conv1d(32, 32, 3, stride=2, groups=2)
        self.scale = nn.Parameter(torch.rand(32, 1))
        self.last = nn.Conv1d(32, 4, 1)

    def forward(self, x):
        x = self.block(self.first(x))
        x = self.up(x)
        x = functional.pad(torch.cat([x, torch.relu(x)], dim=1), (2, 0))
        x = self.grouped(self.depthwise(x) * self.scale)
        return torch.tanh(self.last(x))


def compiled(model, **options):
    return torch.compile(model, backend="fxpasses", options={**CACHED, **options}, dynamic=False)


def net(dtype=torch.float32, **given):
    torch.manual_seed(0)
    return randomised(Net(**given), dtype)


def assert_equal(run, model, x):
    with torch.no_grad():
        found, expected = run(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert found.stride() == expected.stride()
    allowed = 2 * (expected - exact).abs().max() + 2e-6 * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


def test_all_are_packed():
    model = net()
    run = compiled(model)
    assert_equal(run, model, torch.randn(2, 3, 40))
    report = fxpasses.last_report()
    assert report.packed_tensors == 7
    assert_equal(run, model, torch.randn(1, 3, 17))


@pytest.mark.vectors
@pytest.mark.needs_kernels
def test_kernels_of_ours_compute_them_with_what_follows():
    model = net()
    run = compiled(model, profit="always")
    assert_equal(run, model, torch.randn(2, 3, 40))
    remarks = [remark.message for remark in fxpasses.last_report().remarks if remark.rule == "own_kernels"]
    assert sum("leaky_relu" in message for message in remarks) == 1
    assert fxpasses.last_report().applied["own_kernels"] >= 5


def test_sizes_may_be_dynamic():
    model = net()
    run = torch.compile(model, backend="fxpasses", options=CACHED, dynamic=True)
    for batch, length in ((2, 40), (3, 21), (5, 64)):
        assert_equal(run, model, torch.randn(batch, 3, length))


def sequence(batch=2, length=40, channels=3):
    """[N, C, T], which lies in memory as [N, T, C] does."""
    return torch.randn(batch, length, channels).transpose(1, 2)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_a_result_is_contiguous_as_eagers_is_whatever_the_input_is(kind, inner):
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 8, 3), nn.SiLU()).eval()
    run = compiled(model, inner=inner)
    for x in (sequence(), torch.randn(3, 2, 40).transpose(0, 1), torch.randn(2, 3, 41)[..., :40]):
        assert_equal(run, model, x)
    assert_equal(compiled(model, inner=inner, profit="always"), model, sequence())


def test_sequences_of_dynamic_sizes():
    model = net()
    run = torch.compile(model, backend="fxpasses", options=CACHED, dynamic=True)
    for batch, length in ((2, 40), (3, 21)):
        assert_equal(run, model, sequence(batch, length))


def test_strides_that_are_read_are_those_of_eagers_copy():
    torch.manual_seed(0)
    layer = nn.Conv1d(3, 8, 1).eval()

    def model(x):
        y = layer(x)
        return y.as_strided((3, 5), (4, 1), 2) * y.stride(1), y.flatten()

    run = compiled(model)
    with torch.no_grad():
        for found, expected in zip(run(sequence()), model(sequence()), strict=True):
            assert found.stride() == expected.stride()


@pytest.mark.parametrize("strided", [False, True])
def test_a_result_may_be_written_to(strided):
    torch.manual_seed(0)
    layer = nn.Conv1d(3, 8, 3).eval()

    def model(x):
        y = layer(x)
        if strided:
            y.as_strided((4,), (1,), 1).mul_(3)
        return y.relu_()

    x = sequence()
    with torch.no_grad():
        found, expected = compiled(model)(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.stride() == expected.stride()
    assert fxpasses.last_report().packed_tensors == (not strided)


def copies_before_a_convolution(read):
    """How many there are in inductor's graph when images have been joined."""

    def convolved(x, weight):
        image = torch.ops.aten.clone.default(x, memory_format=torch.contiguous_format).unsqueeze(2)
        return read(torch.conv2d(image, weight), image)

    graph = make_fx(convolved, tracing_mode="fake")(sequence(channels=8), torch.randn(4, 8, 1, 3)).graph
    join_images(graph)
    graph.lint()
    return len(graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default))


def test_a_sequence_is_convolved_as_it_lies():
    assert copies_before_a_convolution(lambda y, image: y) == 0


def test_a_copy_that_others_read_too_stays():
    assert copies_before_a_convolution(lambda y, image: (y, image)) == 1
    assert copies_before_a_convolution(lambda y, image: torch.conv2d(y, image[:, :4, :, :3])) == 1


def test_what_is_no_sequence_in_memory_is_copied():
    def convolved(x, weight):
        copied = torch.ops.aten.clone.default(x, memory_format=torch.contiguous_format)
        return torch.conv2d(copied.unsqueeze(2), weight)

    inputs = torch.randn(8, 2, 40).transpose(0, 1), torch.randn(4, 8, 1, 3)
    graph = make_fx(convolved, tracing_mode="fake")(*inputs).graph
    before = [node.target for node in graph.nodes]
    join_images(graph)
    assert [node.target for node in graph.nodes] == before


@pytest.mark.full
def test_in_float64_the_algebra_is_exact():
    model = net(torch.float64)
    run = compiled(model)
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_a_parametrised_weight_is_worked_out_once_for_each_version(kind):
    model = net(normalise=getattr(parametrizations, kind))
    run = compiled(model)
    x = torch.randn(2, 3, 40)
    assert_equal(run, model, x)
    assert fxpasses.last_report().packed_tensors == 7
    codes = [remark.code for remark in fxpasses.last_report().remarks if remark.rule == "packed_weights"]
    assert not codes
    with torch.no_grad():
        for parameter in model.up.parameters():
            parameter.mul_(1.5)
        for parameter in model.first.parameters():
            parameter.data.add_(0.1)
    assert_equal(run, model, x)


class Standardised(nn.Conv1d):
    """A convolution whose weight has no mean and a variance of one, for each filter."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return functional.conv1d(x, weight, self.bias, padding=self.padding[0])


def test_a_standardised_weight_is_parameter_work():
    torch.manual_seed(0)
    model = nn.Sequential(Standardised(3, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 32, 3)).eval()
    run = compiled(model)
    assert_equal(run, model, torch.randn(2, 3, 40))
    assert fxpasses.last_report().packed_tensors == 2


class Normalised(nn.Conv1d):
    """A convolution whose filters have a length of one."""

    def forward(self, x):
        return functional.conv1d(
            x, functional.normalize(self.weight.double(), dim=(1, 2)).to(self.bias), self.bias
        )


def test_a_weight_that_functions_of_python_make_is_parameter_work():
    torch.manual_seed(0)
    model = nn.Sequential(Normalised(3, 32, 3), nn.ReLU(), nn.Conv1d(32, 32, 3)).eval()
    run = compiled(model)
    assert_equal(run, model, torch.randn(2, 3, 40))
    assert fxpasses.last_report().packed_tensors == 2


def test_sequences_of_vectors_around_convolutions_are_right():
    """As in speech models: [N, T, C] between convolutions, which then needs no transposition."""

    class Conformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)
            self.first, self.second = nn.Conv1d(32, 32, 5, padding=2, groups=32), nn.Conv1d(32, 32, 1)

        def forward(self, x):
            y = self.second(functional.silu(self.first(self.norm(x).transpose(1, 2))))
            return self.linear(y.transpose(1, 2)) + x

    torch.manual_seed(0)
    model = Conformer().eval()
    assert_equal(compiled(model), model, torch.randn(2, 21, 32))


class FromImage(nn.Module):
    """The weight is computed from the input, and belongs to one call."""

    def forward(self, x):
        return functional.conv1d(x, x[:, :, :3])


class Unbatched(nn.Conv1d):
    """A convolution of [C, W]."""

    def forward(self, x):
        return super().forward(x[0])


@pytest.mark.parametrize("model", [FromImage(), Unbatched(8, 8, 3)], ids=["live", "unbatched"])
def test_other_convolutions_are_left_alone(model):
    run = compiled(model.eval())
    x = torch.randn(8, 8, 20)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
    assert not fxpasses.last_report().packed_tensors


def test_results_between_two_convolutions_have_eagers_strides():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(3, 32, 3), nn.Conv1d(32, 32, 3)

        def forward(self, x):
            y = torch.relu(self.first(x))
            return y, self.second(y), y.transpose(1, 2)

    model = Both().eval()
    x = torch.randn(2, 3, 20)
    with torch.no_grad():
        for found, expected in zip(compiled(model)(x), model(x), strict=True):
            torch.testing.assert_close(found, expected)
            assert found.stride() == expected.stride()
