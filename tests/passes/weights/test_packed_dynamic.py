"""weights="cached" with dynamic sizes: one artifact for a range of them, packed at the first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxpasses


class Net(nn.Module):
    """A stem, a residual block, a depthwise and a grouped convolution, a gate and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.same = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32))
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.BatchNorm2d(32), nn.SiLU())
        self.grouped = nn.Conv2d(32, 64, 3, 2, 1, groups=2)
        self.gate = nn.Conv2d(64, 64, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.same(x) + x)
        x = torch.relu(self.grouped(self.depthwise(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(x.mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model


def assert_equal(run, model, x):
    with torch.no_grad():
        found, wanted = run(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
    error = (wanted - exact).abs().max()
    assert (found - exact).abs().max() <= 4 * error + 1e-6 * exact.abs().max()
    assert found.stride() == wanted.stride()


def marked(x, dimensions):
    for dimension in dimensions:
        torch._dynamo.mark_dynamic(x, dimension)
    return x


@pytest.mark.parametrize(
    ("way", "profit"),
    [
        ("dynamic", "always"),
        pytest.param("dynamic", "model", marks=pytest.mark.full),
        ("marked", "model"),
        pytest.param("automatic", "model", marks=pytest.mark.full),
    ],
)
def test_one_artifact_serves_a_range_of_batches_and_resolutions(way, profit):
    model = net()
    options = {"weights": "cached", "profit": profit}
    run = torch.compile(
        model, backend="fxpasses", options=options, dynamic=True if way == "dynamic" else None
    )
    sizes = [(4, 32, 40), (2, 32, 40), (15, 48, 64), (7, 33, 41), (3, 96, 96)]
    torch._dynamo.utils.counters.clear()
    for batch, height, width in sizes:
        x = torch.randn(batch, 3, height, width)
        assert_equal(run, model, marked(x, (0, 2, 3)) if way == "marked" else x)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (
        graphs == {"dynamic": 1, "marked": 1, "automatic": 3}[way]
    )  # first static, then a dynamic batch, then all
    report = fxpasses.last_report()
    assert report.packed_tensors >= 5
    assert not [remark for remark in report.remarks if remark.code == "unpackable"]


@pytest.mark.needs_kernels
def test_kernels_of_ours_take_dynamic_sizes():
    model = net()
    run = torch.compile(
        model, backend="fxpasses", options={"weights": "cached", "profit": "always"}, dynamic=True
    )
    assert_equal(run, model, torch.randn(4, 3, 32, 40))
    report = fxpasses.last_report()
    assert report.applied["own_kernels"] == 6
    assert report.applied["kernel_sequences"] >= 1
    assert report.kept_tensors > 0


def test_an_update_is_seen_at_every_size():
    model = net()
    run = torch.compile(model, backend="fxpasses", options={"weights": "cached"}, dynamic=True)
    for step, batch in enumerate((4, 9, 2)):
        assert_equal(run, model, torch.randn(batch, 3, 32, 32))
        with torch.no_grad():
            model.same[0].weight.add_(0.1)
            model.head.weight.data.mul_(1.5)
        assert_equal(run, model, torch.randn(batch + step, 3, 40, 32))


class Branching(nn.Module):
    """One graph whatever the batch, with a guard on it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 32, 3, padding=1), nn.Conv2d(32, 32, 1)

    def forward(self, x):
        assert x.shape[0] > 8 or x.shape[0] < 20
        return self.second(self.first(x).relu())


IN_CPP = {"cpp_wrapper": True, "cpp_cache_precompile_headers": False}


@pytest.mark.parametrize(
    "inductor", [{}, pytest.param(IN_CPP, marks=pytest.mark.full)], ids=["Python", "C++"]
)
def test_an_artifact_whose_guards_do_not_hold_is_not_the_one_that_is_filled(inductor):
    """Inductor's cache finds the code of the first graph for the second, and discards it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Branching().eval()
    options = {"weights": "cached", "profit": "always", "inductor": inductor}
    run = torch.compile(model, backend="fxpasses", options=options, dynamic=True)
    with torch.no_grad():
        for batch in (4, 16, 5, 17):
            x = torch.randn(batch, 8, 12, 12)
            torch.testing.assert_close(run(x), model(x))
        assert fxpasses.last_report().packed_tensors == 2
        model.load_state_dict(Branching().state_dict())
        for batch in (4, 16):
            x = torch.randn(batch, 8, 12, 12)
            torch.testing.assert_close(run(x), model(x))
