"""Group norms and instance norms of channels-last images: eager's numbers, by a kernel of ours."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses.kernels import library
from fxpasses.report.report import Report

pytestmark = pytest.mark.needs_kernels

NAME = "group_moments"
CACHED = {"weights": "cached"}
PLANNED = {"layout": "channels_last"}


@pytest.fixture(autouse=True)
def kernels():
    if not library.vector_length():
        pytest.skip(library.missing())


class ByHand(nn.Module):
    """A group norm as people write it."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.reshape(x.shape[0], self.groups, -1)
        variance, mean = torch.var_mean(y, 2, correction=0, keepdim=True)
        return ((y - mean) * torch.rsqrt(variance + 1e-3)).reshape(x.shape)


def network(*between: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), *between, nn.Conv2d(32, 4, 1)).eval()


NORMS = {
    "affine": (nn.GroupNorm(8, 32), nn.SiLU()),
    "plain": (nn.GroupNorm(16, 32, affine=False), nn.ReLU()),
    "one group": (nn.GroupNorm(1, 32),),
    "instance": (nn.InstanceNorm2d(32, affine=True), nn.ReLU()),
    "by hand": (ByHand(4),),
    "residual": (nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(32, 32)),
}

SEEN = ("affine", "by hand")
"""Those that the default run compiles."""


def compiled(model: nn.Module, options: dict[str, object], **how: object) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(model, backend="fxpasses", options=options, **how)


def assert_as_close_as_eager(run: nn.Module, model: nn.Module, x: torch.Tensor) -> Report:
    """Outputs are, and strides are eager's."""
    with torch.no_grad():
        exact, eager, found = copy.deepcopy(model).double()(x.double()), model(x), run(x)
    report = fxpasses.last_report()
    error, yardstick = ((each.double() - exact).abs().max() for each in (found, eager))
    assert error <= 4 * yardstick + 1e-6
    assert found.stride() == eager.stride()
    return report


@pytest.mark.parametrize(
    "options",
    [CACHED, PLANNED, pytest.param(CACHED | PLANNED, marks=pytest.mark.full)],
    ids=["cached", "planned", "both"],
)
@pytest.mark.parametrize(
    "name", [name if name in SEEN else pytest.param(name, marks=pytest.mark.full) for name in NORMS]
)
def test_inference_is_eagers(name, options):
    model = network(*NORMS[name])
    report = assert_as_close_as_eager(compiled(model, options), model, torch.randn(1, 3, 24, 26))
    count = sum("Norm" in type(part).__name__ for part in model)
    # Written by hand it flattens the image, which a plan copies for that.
    assert report.applied.get(NAME, 0) == (options is CACHED if name == "by hand" else count)


@pytest.mark.parametrize(
    "options", [CACHED, pytest.param(PLANNED, marks=pytest.mark.full)], ids=["cached", "planned"]
)
def test_one_program_serves_all_sizes(options):
    model = network(*NORMS["affine"])
    run = compiled(model, options, dynamic=True)
    for count, height, width in ((2, 24, 26), (3, 31, 19), (5, 18, 40)):
        report = assert_as_close_as_eager(run, model, torch.randn(count, 3, height, width))
        assert report.applied[NAME] == 1
    assert len(fxpasses.reports()) == 1


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize(("name", "norms"), [("affine", 1), ("residual", 2)])
def test_training_gives_eagers_gradients(name, norms):
    check_training(name, norms)


@pytest.mark.full
@pytest.mark.parametrize(("name", "norms"), [("affine", 1), ("residual", 2)])
def test_training_by_generated_code_gives_eagers_gradients(name, norms):
    check_training(name, norms)


def check_training(name, norms):
    model, x = network(*NORMS[name]), torch.randn(2, 3, 24, 24)
    exact = copy.deepcopy(model).double()
    exact(x.double()).square().sum().backward()
    model(x).square().sum().backward()
    eager = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    fxpasses.reset()
    compiled(model, PLANNED)(x).square().sum().backward()
    assert fxpasses.last_report().applied[NAME] == norms
    largest = max(float(wanted.grad.abs().max()) for wanted in exact.parameters())
    for parameter, yardstick, wanted in zip(model.parameters(), eager, exact.parameters(), strict=True):
        error = (parameter.grad.double() - wanted.grad).abs().max()
        # A bias ahead of a norm has no gradient but rounding.
        assert error <= 4 * (yardstick.double() - wanted.grad).abs().max() + 1e-6 * largest
        assert parameter.grad.stride() == yardstick.stride()


def test_what_comes_from_the_cache_tells_the_same():
    model, x = network(*NORMS["affine"]), torch.randn(1, 3, 24, 24)
    for options in (PLANNED, {"layout": "contiguous"}, PLANNED):  # each has a record of its own
        report = assert_as_close_as_eager(compiled(model, options), model, x)
        assert report.applied[NAME] == (options is PLANNED)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize(
    ("norm", "options", "size"),
    [
        (nn.GroupNorm(8, 32), {"layout": "contiguous"}, 24),
        (nn.GroupNorm(8, 32), {"layout": "off"}, 24),
        (nn.GroupNorm(8, 32), PLANNED, 9),
        (nn.Softmax(1), PLANNED, 24),
    ],
    ids=["contiguous", "off", "small", "no norm"],
)
def test_it_leaves_others_alone(norm, options, size):
    model = network(norm)
    report = assert_as_close_as_eager(compiled(model, options), model, torch.randn(1, 3, size, size))
    assert NAME not in report.applied


@pytest.mark.usefixtures("no_code")
def test_float64_is_left_to_inductor():
    model, x = network(nn.GroupNorm(8, 32)).double(), torch.randn(1, 3, 24, 24, dtype=torch.float64)
    run = compiled(model, PLANNED)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-12, atol=1e-12)
    assert NAME not in fxpasses.last_report().applied


class Reduced(nn.Module):
    """Moments over other dimensions, or of other kinds, than a norm's."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "unbiased":
            parts = torch.var_mean(x, (2, 3), correction=1, keepdim=True)
        elif self.how == "rows":
            parts = torch.var_mean(x, 3, correction=0, keepdim=True)
        elif self.how == "channels":
            parts = torch.var_mean(x, 1, correction=0, keepdim=True)
        elif self.how == "batch":
            parts = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        else:  # groups across channels that are not neighbours
            y = x.reshape(len(x), 8, 4, -1).transpose(1, 2).reshape(len(x), 4, 8, -1)
            parts = torch.var_mean(y, (2, 3), correction=0, keepdim=True)
        return x + sum(part.mean() for part in parts)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize(
    "how",
    [
        "unbiased",
        "shuffled",
        *(pytest.param(how, marks=pytest.mark.full) for how in ("rows", "channels", "batch")),
    ],
)
def test_other_moments_are_left_alone_or_right(how):
    model = network(Reduced(how))
    report = assert_as_close_as_eager(compiled(model, PLANNED), model, torch.randn(2, 3, 24, 24))
    assert report.applied[NAME] == 0
