"""Winograd's kernels: right to rounding, also where a transform overflows or an image is not finite."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxpasses.kernels import library
from fxpasses.kernels.convolution import ACTIVATIONS, Sizes, kernels_for, pack, takes_winograd
from fxpasses.kernels.kernel import Kernel, Kind

pytestmark = [pytest.mark.vectors, pytest.mark.needs_kernels]

WIDTHS = (1, 2, 3, 4)


def sizes_of(channels, filters, padding=(1, 1)):
    return Sizes(channels, filters, 1, (3, 3), (1, 1), padding, (1, 1))


def run(x, sizes, width, filters, bias=None, summand=None, activation="none"):
    kernel = Kernel(Kind.WINOGRAD, width)
    packed = pack(sizes, kernel, filters, bias)
    number = ACTIVATIONS.index(activation)
    return torch.ops.fxpasses.convolution(
        x.contiguous(memory_format=torch.channels_last),
        *(packed, summand, sizes.argument(kernel), kernel.code, number, -0.5, 1.5),
    )


def eager(x, sizes, filters, bias=None):
    bias = None if bias is None else bias.double()
    return torch.conv2d(x.double(), filters.double(), bias, padding=sizes.padding)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("filters", [1, 16, 40, 70])
def test_every_size_of_an_image_equals_float64(filters, width):
    """Tiles that reach over each border, and sums that are made of several."""
    torch.manual_seed(filters)
    spaces = [(1, 1), (2, 3), (3, 2), (7, 7), (5, 12), (14, 9)]
    for (height, across), padding, channels in itertools.product(spaces, ((1, 1), (0, 2), (2, 0)), (16, 160)):
        if height + 2 * padding[0] < 3 or across + 2 * padding[1] < 3:
            continue
        sizes = sizes_of(channels, filters, padding)
        x, weight = torch.randn(2, channels, height, across), torch.randn(filters, channels, 3, 3)
        bias = torch.randn(filters)
        plain = eager(x, sizes, weight, bias)
        summand = torch.randn(plain.shape)
        total = plain + summand
        found = run(x, sizes, width, weight, bias, summand, "clamp")
        assert (found - total.clamp(-0.5, 1.5)).abs().max() <= 3e-6 * total.abs().max()
        assert (
            run(x, sizes, width, weight) - eager(x, sizes, weight)
        ).abs().max() <= 3e-6 * total.abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_seen_under_its_taps_alone(value):
    torch.manual_seed(0)
    sizes = sizes_of(16, 20)
    weight = torch.randn(20, 16, 3, 3)
    for row, column in itertools.product(range(5), range(6)):
        x = torch.randn(1, 16, 5, 6)
        x[0, 3, row, column] = value
        found = run(x, sizes, 2, weight)
        torch.testing.assert_close(
            found.double(), eager(x, sizes, weight), equal_nan=True, rtol=1e-4, atol=1e-4
        )


def test_an_activation_after_what_is_not_finite_gives_what_eager_gives():
    torch.manual_seed(0)
    sizes = sizes_of(16, 20)
    x, weight, bias = torch.randn(1, 16, 6, 6), torch.randn(20, 16, 3, 3), torch.randn(20)
    x[0, 0, 2, 2] = float("inf")
    summand = torch.randn(1, 20, 6, 6)
    wanted = (eager(x, sizes, weight, bias) + summand).clamp(-0.5, 1.5)
    found = run(x, sizes, 2, weight, bias, summand, "clamp")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_numbers_whose_sums_overflow_in_a_transform_alone_give_finite_results():
    torch.manual_seed(0)
    sizes = sizes_of(16, 20)
    x, weight = torch.rand(1, 16, 6, 6), 1e-3 * torch.randn(20, 16, 3, 3)
    x[0, 5] = 3e38
    wanted = eager(x, sizes, weight)
    found = run(x, sizes, 3, weight)
    assert found.isfinite().all()
    assert (found - wanted).abs().max() <= 3e-6 * wanted.abs().max()


@pytest.mark.parametrize("channels", [16, 64, 128, 256, 512])
@pytest.mark.parametrize("after_relu", [False, True])
def test_the_error_is_at_most_twice_that_of_eager(channels, after_relu):
    torch.manual_seed(channels)
    sizes = sizes_of(channels, 64)
    x, weight = torch.randn(1, channels, 14, 14), torch.randn(64, channels, 3, 3) / (9 * channels) ** 0.5
    x = x.relu() if after_relu else x
    wanted = eager(x, sizes, weight)
    theirs = (torch.conv2d(x, weight, padding=1) - wanted).square().mean().sqrt()
    for width in WIDTHS:
        ours = (run(x, sizes, width, weight) - wanted).square().mean().sqrt()
        assert ours <= 2 * theirs, width


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("space", [(6, 6), (28, 30)])
def test_the_number_of_threads_changes_no_bit(space, threads):
    before = torch.get_num_threads()
    torch.manual_seed(0)
    x, weight = torch.randn(1, 32, *space), torch.randn(40, 32, 3, 3)
    for width in WIDTHS:
        try:
            torch.set_num_threads(1)
            wanted = run(x, sizes_of(32, 40), width, weight)
            torch.set_num_threads(threads)
            assert torch.equal(run(x, sizes_of(32, 40), width, weight), wanted)
        finally:
            torch.set_num_threads(before)


def test_filters_are_transformed_in_float64_and_rounded_once():
    torch.manual_seed(0)
    vector = library.vector_length()
    weight, bias = torch.randn(vector, vector, 3, 3), torch.randn(vector)
    packed = pack(sizes_of(vector, vector), Kernel(Kind.WINOGRAD, 1), weight, bias)
    rows = packed.view(16, 1 + vector, vector)
    assert torch.equal(rows[:, 0], torch.zeros(16, vector).index_fill_(0, torch.tensor(5), 1) * bias)
    left = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    wanted = torch.einsum("ia,kcab,jb->ijck", left, weight.double(), left).float()
    assert (rows[:, 1:].view(4, 4, vector, vector) - wanted).abs().max() <= 1e-7 * wanted.abs().max()


@pytest.mark.parametrize(
    "changed",
    [
        {"kernel": (3, 1)},
        {"kernel": (1, 9)},
        {"stride": (2, 1)},
        {"dilation": (1, 2)},
        {"groups": 2},
        {"channels": 20},
    ],
    ids=str,
)
def test_other_convolutions_are_refused(changed):
    fields = {"channels": 32, "filters": 32, "groups": 1, "kernel": (3, 3), "stride": (1, 1)}
    sizes = Sizes(**{**fields, "padding": (4, 4), "dilation": (1, 1), **changed})
    kernel = Kernel(Kind.WINOGRAD, 2)
    assert takes_winograd(Sizes(**fields, padding=(4, 4), dilation=(1, 1)))
    assert not takes_winograd(sizes)
    assert not any(one.kind is Kind.WINOGRAD for one in kernels_for(sizes, 100))
    x = torch.randn(1, sizes.channels, 12, 12).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="3 x 3 taps end to end"):
        torch.ops.fxpasses.convolution(
            x, torch.randn(9), None, sizes.argument(kernel), kernel.code, 0, 0.0, 0.0
        )


def test_two_widths_are_worth_measuring():
    found = [one for one in kernels_for(sizes_of(64, 64), 56 * 56) if one.kind is Kind.WINOGRAD]
    assert {one.width for one in found} == {2, 4}
    assert not any(one.kind is Kind.WINOGRAD for one in kernels_for(sizes_of(64, 64), 9))
    assert not any(one.kind is Kind.WINOGRAD for one in kernels_for(sizes_of(64, 64), 3136, planar=True))
