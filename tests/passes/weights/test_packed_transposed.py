"""weights="cached" packs transposed convolutions for oneDNN, of one to three dimensions."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import randomised, sampled_cases
from torch import nn

import fxpasses
from fxpasses.passes.weights.own_kernels import may_be_ours, sizes_of

CACHED = {"weights": "cached"}
SPACE = (7, 6, 5)


def compiled(model, dynamic=False, **options):
    return torch.compile(model, backend="fxpasses", options={**CACHED, **options}, dynamic=dynamic)


def assert_equal(run, model, x):
    with torch.no_grad():
        found, expected = run(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert found.stride() == expected.stride()
    assert found.dtype == expected.dtype
    allowed = 4 * (expected - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (found - exact).abs().max() <= allowed


LAYERS = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
KINDS = {
    "plain": {"kernel_size": 4, "stride": 2, "padding": 1},
    "of groups": {"kernel_size": 4, "stride": 2, "groups": 2, "bias": False},
    "depthwise": {"kernel_size": 3, "stride": 2, "groups": 8},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 1},
    "with padding of the output": {"kernel_size": 3, "stride": 3, "output_padding": 2, "dilation": 2},
}


def net(kind, dimensions, dtype=torch.float32):
    torch.manual_seed(0)
    norms = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    layer, norm = LAYERS[dimensions], norms[dimensions]
    model = nn.Sequential(layer(8, 16, **KINDS[kind]), nn.ReLU(), layer(16, 4, 2, stride=2), norm(4))
    return randomised(model, dtype)


def image(dimensions, batch=2, grown=0):
    return torch.randn(batch, 8, *(size + grown for size in SPACE[:dimensions]))


@pytest.mark.parametrize("dimensions", [2, *(pytest.param(each, marks=pytest.mark.full) for each in (1, 3))])
@pytest.mark.parametrize("kind", sampled_cases(KINDS, ["plain", "of groups", "with padding of the output"]))
def test_they_are_packed_and_the_results_are_eagers(kind, dimensions):
    model = net(kind, dimensions)
    run = compiled(model)
    assert_equal(run, model, image(dimensions))
    assert fxpasses.last_report().packed_tensors == 2


@pytest.mark.parametrize("dimensions", [1, *(pytest.param(each, marks=pytest.mark.full) for each in (2, 3))])
def test_sizes_may_be_dynamic(dimensions):
    model = net("of groups", dimensions)
    run = compiled(model, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for batch, grown in ((2, 0), (3, 4), (5, 1)):
        assert_equal(run, model, image(dimensions, batch, grown))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert fxpasses.last_report().packed_tensors == 2


def test_one_channel_of_dynamic_size_is_no_matter_of_layout():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(1, 1, 2, stride=2), nn.ConvTranspose2d(1, 6, 3), nn.ReLU()
    ).eval()
    run = compiled(model, dynamic=True)
    for height in (5, 9):
        assert_equal(run, model, torch.randn(2, 1, height, 7))


@pytest.mark.parametrize("dynamic", sampled_cases([False, True], [False]))
def test_an_update_is_seen(dynamic):
    model = net("plain", 2)
    run = compiled(model, dynamic=dynamic)
    x = image(2)
    assert_equal(run, model, x)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    assert_equal(run, model, x)
    model[2].weight.data = torch.randn_like(model[2].weight)
    assert_equal(run, model, x)
    model[2].weight.data.add_(0.25)
    assert_equal(run, model, x)
    model.load_state_dict(net("plain", 2).state_dict())
    assert_equal(run, model, x)


def test_a_write_to_one_element_is_seen_after_a_refresh():
    model = net("plain", 2)
    run = compiled(model)
    x = image(2)
    assert_equal(run, model, x)
    model[0].weight.detach().numpy()[3, 5, 1, 2] += 40
    fxpasses.refresh(run)
    assert_equal(run, model, x)


def test_a_cached_artifact_is_filled_with_other_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for seed in range(2):
        torch._dynamo.reset()
        model = net("plain", 2)
        with torch.no_grad():
            model[0].weight.mul_(seed + 1)
        assert_equal(compiled(model), model, image(2))
        assert fxpasses.last_report().packed_tensors == 2


def test_convolutions_that_differ_in_the_padding_of_the_output_alone_are_two():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x):
            short = torch.conv_transpose2d(x, self.weight, stride=2)
            long = torch.conv_transpose2d(x, self.weight, stride=2, output_padding=1)
            return short.sum((2, 3)) + long.sum((2, 3)) + torch.conv2d(x, self.weight).sum((2, 3))

    model = Shared()
    assert_equal(compiled(model), model, image(2))
    assert fxpasses.last_report().packed_tensors == 3


def test_bfloat16_is_packed_where_the_cpu_has_it():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16")
    model = net("plain", 2, torch.bfloat16)
    run = compiled(model)
    x = image(2).bfloat16()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        allowed = 2 * (model(x).double() - exact).norm()
        assert (run(x).double() - exact).norm() <= allowed
    assert fxpasses.last_report().packed_tensors == 2


@pytest.mark.full
def test_autocast_rounds_the_weight_once():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16")
    model = net("plain", 1)
    run, x = compiled(model), image(1)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            found, eager = run(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert found.dtype == eager.dtype
    assert (found.double() - exact).norm() <= 2 * (eager.double() - exact).norm()
    assert fxpasses.last_report().packed_tensors == 2


@pytest.mark.parametrize(
    ("layer", "dtype", "reason"),
    [
        (nn.ConvTranspose2d(8, 4, 3, dilation=2, output_padding=1), torch.float32, "as large as the stride"),
        (nn.ConvTranspose1d(8, 4, 3, dilation=2, output_padding=1), torch.float32, "as large as the stride"),
        (nn.ConvTranspose2d(8, 4, 3), torch.float64, "oneDNN does not pack"),
    ],
    ids=["2d", "1d", "float64"],
)
def test_what_onednn_does_not_take_stays_as_it_was(layer, dtype, reason):
    model = nn.Sequential(layer.eval().to(dtype), nn.ReLU())
    x = image(layer.weight.dim() - 2).to(dtype)
    assert_equal(compiled(model), model, x)
    report = fxpasses.last_report()
    assert not report.packed_tensors
    messages = [remark.message for remark in report.remarks if remark.code == "unpackable"]
    assert len(messages) == 1
    assert reason in messages[0]


def test_kernels_of_ours_are_for_direct_convolutions_alone():
    graph = torch.fx.Graph()
    for name, sizes in (("x", (2, 16, 8, 8)), ("weight", (16, 16, 3, 3))):
        graph.placeholder(name).meta["val"] = torch.empty(sizes)
    x, weight = graph.nodes
    for transposed in (False, True):
        given = (x, weight, None, [1, 1], [0, 0], [1, 1], transposed, [0, 0], 1)
        node = graph.call_function(torch.ops.aten.convolution.default, given)
        node.meta["val"] = torch.empty(2, 16, 8, 8)
        assert may_be_ours(node) is not transposed
        assert (sizes_of(node) is None) is transposed


def test_kernels_of_ours_leave_a_transposed_convolution_to_onednn():
    model = net("plain", 2)
    assert_equal(compiled(model, profit="always"), model, image(2))
    report = fxpasses.last_report()
    assert not [remark for remark in report.remarks if remark.rule == "own_kernels"]
    assert report.packed_tensors == 2


def test_direct_convolutions_of_video_are_packed_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(8, 16, 3), nn.ReLU(), nn.Conv3d(16, 4, 3, padding=1)).eval()
    run = compiled(model)
    assert_equal(run, model, image(3))
    assert fxpasses.last_report().packed_tensors == 2
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[2].bias.add_(1)
    assert_equal(run, model, image(3))


class FromVideo(nn.Module):
    """The weight is computed from the input, and belongs to one call."""

    def forward(self, x):
        return nn.functional.conv3d(x, x[:, :, :3, :3, :3])


def test_a_weight_of_one_call_is_not_packed():
    x = torch.randn(8, 8, 5, 5, 5)
    assert_equal(compiled(FromVideo()), FromVideo(), x)
    assert not fxpasses.last_report().packed_tensors
