"""The operator `fxpasses::convolution` against torch's convolution in float64."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from fxpasses.kernels import library
from fxpasses.kernels.convolution import ACTIVATIONS, Sizes, kernels_for, pack, takes_winograd
from fxpasses.kernels.kernel import DEPTHWISE, SLIDING, Kernel, Kind

pytestmark = [pytest.mark.vectors, pytest.mark.needs_kernels]

REFERENCES = {
    "none": lambda x: x,
    "clamp": lambda x: x.clamp(-0.5, 1.5),
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": functional.hardsigmoid,
    "gelu": functional.gelu,
    "leaky_relu": lambda x: functional.leaky_relu(x, -0.5),
}
ONE_VECTOR = Kernel(Kind.PRODUCT, 1)
WINOGRAD = tuple(Kernel(Kind.WINOGRAD, width) for width in (1, 2, 3, 4))
EVERY_PRODUCT = tuple(map(Kernel.from_code, (1, 2, 3, 4, 11, 14)))


def few_channels(width, *, planar=False):
    return Kernel(Kind.FEW_CHANNELS, width, planar=planar)


def code(kernel):
    """The name of a case of a test."""
    return str(kernel.code)


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def run(x, sizes, kernel, filters, bias=None, summand=None, activation="none"):
    packed = pack(sizes, kernel, filters, bias)
    return torch.ops.fxpasses.convolution(
        x, packed, summand, sizes.argument(kernel), kernel.code, ACTIVATIONS.index(activation), -0.5, 1.5
    )


def expected(x, sizes, filters, bias=None):
    bias = None if bias is None else bias.double()
    space = (sizes.stride, sizes.padding, sizes.dilation)
    return torch.conv2d(x.double(), filters.double(), bias, *space, sizes.groups)


def assert_equal(found, wanted, scale=None):
    assert found.shape == wanted.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    largest = (wanted if scale is None else scale).abs().max()
    assert (found - wanted).abs().max() <= 3e-6 * largest + 1e-12


def random_case(chosen: random.Random):
    groups = chosen.choice((1, 1, 1, 2, 4, 6))
    channels = groups * chosen.choice((1, 3, 4, 16, 17))
    filters = groups * chosen.choice((1, 2, 5, 16, 24, 33, 70))
    if chosen.random() < 0.3:
        groups = channels = filters = chosen.choice((16, 17, 24, 40))
    sizes = Sizes(
        channels,
        filters,
        groups,
        kernel=(chosen.choice((1, 2, 3, 5, 7)), chosen.choice((1, 3, 5, 7))),
        stride=(chosen.choice((1, 2, 3)), chosen.choice((1, 2))),
        padding=(chosen.choice((0, 1, 3)), chosen.choice((0, 1, 2))),
        dilation=(chosen.choice((1, 2)), chosen.choice((1, 1, 2))),
    )
    space = [
        max(chosen.choice((1, 5, 9, 14)), dilation * (size - 1) + 1 - 2 * padding)
        for size, padding, dilation in zip(sizes.kernel, sizes.padding, sizes.dilation, strict=True)
    ]
    return sizes, (chosen.choice((1, 2)), channels, *space)


def every_kernel(sizes: Sizes) -> list[Kernel]:
    found = list(EVERY_PRODUCT)
    if sizes.is_depthwise and sizes.channels >= library.vector_length():
        found.append(DEPTHWISE)
    if SLIDING in kernels_for(sizes, 100):
        found.append(SLIDING)
    if takes_winograd(sizes):
        found += WINOGRAD
    if sizes.groups == 1 and sizes.dilation[1] == 1:
        found += [few_channels(width, planar=planar) for planar in (False, True) for width in (1, 2, 3, 4)]
    return found


@pytest.mark.parametrize("seed", range(60))
def test_every_kernel_equals_float64(seed):
    chosen = random.Random(seed)
    torch.manual_seed(seed)
    sizes, shape = random_case(chosen)
    x = channels_last(*shape)
    filters = torch.randn(sizes.filters, sizes.channels // sizes.groups, *sizes.kernel)
    bias = torch.randn(sizes.filters) if chosen.random() < 0.8 else None
    plain = expected(x, sizes, filters, bias)
    summand = torch.randn(plain.shape) if chosen.random() < 0.4 else None
    activation = chosen.choice(ACTIVATIONS)
    total = plain if summand is None else plain + summand
    for kernel in every_kernel(sizes):
        if kernel.kind is Kind.DEPTHWISE and summand is not None:
            continue
        found = run(x, sizes, kernel, filters, bias, summand, activation)
        assert_equal(found, REFERENCES[activation](total), scale=total)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_have_the_values_and_the_specials_of_eager(activation):
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    special = torch.tensor([math.nan, math.inf, -math.inf, 100.0, -100.0])
    sizes = Sizes.of_linear(1, 1)
    one = torch.ones(1, 1)
    found = run(x[:, None], sizes, ONE_VECTOR, one, activation=activation)[:, 0]
    wanted = REFERENCES[activation](x.double())
    assert ((found - wanted).abs() <= 3e-7 * (1 + x.abs())).all()
    found = run(special[:, None], sizes, ONE_VECTOR, one, activation=activation)[:, 0]
    wanted = REFERENCES[activation](special.double())  # eager's float32 gelu of infinity is NaN
    torch.testing.assert_close(found.double(), wanted, equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 49])
@pytest.mark.parametrize("kernel", EVERY_PRODUCT, ids=code)
def test_a_matrix_is_an_image_of_one_column(rows, kernel):
    torch.manual_seed(rows)
    x, weight, bias, summand = (
        torch.randn(rows, 37),
        torch.randn(50, 37),
        torch.randn(50),
        torch.randn(rows, 50),
    )
    found = run(x, Sizes.of_linear(37, 50), kernel, weight, bias, summand)
    wanted = functional.linear(x.double(), weight.double(), bias.double()) + summand
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-6 * wanted.abs().max().item())


def test_operands_in_other_memory_are_copied_not_misread():
    torch.manual_seed(0)
    sizes = Sizes(5, 6, 1, (3, 3), (1, 1), (1, 1), (1, 1))
    filters = torch.randn(6, 5, 3, 3)
    for x in (
        torch.randn(2, 5, 6, 7),
        channels_last(2, 5, 6, 7),
        torch.randn(2, 5, 12, 14)[:, :, ::2, ::2],
        torch.randn(5, 6, 7).expand(2, -1, -1, -1),
    ):
        for kernel in (Kernel(Kind.PRODUCT, 2), few_channels(2), few_channels(2, planar=True)):
            summand = torch.randn(7, 6, 6, 2).permute(3, 2, 1, 0)
            wanted = expected(x, sizes, filters) + summand
            assert_equal(run(x, sizes, kernel, filters, summand=summand), wanted)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [1, 13, 14, 15, 60])
def test_few_channels_equal_float64_at_every_border(width, stride, planar):
    """Every number of pixels beside a block's, and sums of more and of less than 128 products."""
    torch.manual_seed(width)
    for side, channels in ((3, 3), (4, 1), (7, 3), (7, 15)):
        sizes = Sizes(channels, 37, 1, (side, side), (stride, stride), (side // 2, side // 2), (1, 1))
        filters, bias = torch.randn(37, channels, side, side), torch.randn(37)
        x = torch.randn(2, channels, 9, width)
        for vectors in (1, 2, 3, 4):
            found = run(x, sizes, few_channels(vectors, planar=planar), filters, bias, None, "clamp")
            plain = expected(x, sizes, filters, bias)
            assert_equal(found, plain.clamp(-0.5, 1.5), scale=plain)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "groups", [(2, 2, 16), (4, 4, 8), (8, 8, 4), (16, 16, 3), (32, 32, 2), (5, 16, 3), (8, 48, 2)]
)
def test_groups_of_three_taps_equal_float64_at_every_border(groups, stride):
    """Several groups in a vector and one group in several, every number of pixels beside a block's."""
    torch.manual_seed(0)
    reads, gives, many = groups
    for (height, width), padding, rows, apart in itertools.product(
        ((7, 7), (9, 14), (5, 15), (3, 30), (5, 2)), (0, 1, 2), (1, 3), (1, 2)
    ):
        sizes = Sizes(
            reads * many, gives * many, many, (rows, 3), (stride, stride), (padding, padding), (apart, 1)
        )
        if height + 2 * padding < apart * (rows - 1) + 1 or width + 2 * padding < 3:
            continue
        assert SLIDING in kernels_for(sizes, 100)
        x = channels_last(2, sizes.channels, height, width)
        filters, bias = torch.randn(sizes.filters, reads, rows, 3), torch.randn(sizes.filters)
        plain = expected(x, sizes, filters, bias)
        summand = torch.randn(plain.shape)
        found = run(x, sizes, SLIDING, filters, bias, summand, "clamp")
        assert_equal(found, (plain + summand).clamp(-0.5, 1.5), scale=plain + summand)


@pytest.mark.parametrize("kernel", EVERY_PRODUCT, ids=code)
@pytest.mark.parametrize("filters", [7, 40, 90, 130])
def test_many_channels_of_single_pixels_equal_float64(filters, kernel):
    """Parts of the channels after one another, over panels of which the last is not full."""
    torch.manual_seed(filters)
    for channels, rows in itertools.product((128, 129, 300), (1, 14, 120, 121)):
        x, weight, bias = torch.randn(rows, channels), torch.randn(filters, channels), torch.randn(filters)
        summand = torch.randn(rows, filters)
        found = run(x, Sizes.of_linear(channels, filters), kernel, weight, bias, summand, "clamp")
        plain = functional.linear(x.double(), weight.double(), bias.double()) + summand
        wanted = plain.clamp(-0.5, 1.5)
        assert (found - wanted).abs().max() <= 3e-6 * plain.abs().max()


def test_nothing_beside_an_image_is_read():
    """A NaN left and right of the rows, above and below the image."""
    sizes = Sizes(3, 20, 1, (3, 3), (1, 1), (1, 1), (1, 1))
    filters = torch.randn(20, 3, 3, 3)
    wide = torch.full((3, 3, 30, 30), torch.nan)
    wide[1] = 1.0
    for planar, order in ((True, torch.contiguous_format), (False, torch.channels_last)):
        x = wide.contiguous(memory_format=order)[1:2]
        assert_equal(run(x, sizes, few_channels(1, planar=planar), filters), expected(x, sizes, filters))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_number_of_threads_changes_no_bit(threads):
    """Whoever is done early helps the others, so who computes what differs from call to call."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    for side, size in itertools.product(
        (9, 40), ((24, 40, 1), (160, 40, 1), (3, 40, 1), (32, 32, 32), (32, 32, 4))
    ):
        for kernel_size in (1, 3):
            sizes = Sizes(*size, (kernel_size, kernel_size), (1, 1), (kernel_size // 2,) * 2, (1, 1))
            x = channels_last(1, sizes.channels, side, side)
            filters = torch.randn(sizes.filters, sizes.channels // sizes.groups, kernel_size, kernel_size)
            for kernel in kernels_for(sizes, 100):
                try:
                    torch.set_num_threads(1)
                    wanted = run(x, sizes, kernel, filters)
                    torch.set_num_threads(threads)
                    assert torch.equal(run(x, sizes, kernel, filters), wanted)
                finally:
                    torch.set_num_threads(before)


def test_what_does_not_fit_is_refused():
    x, sizes = channels_last(1, 16, 5, 5), Sizes(16, 16, 1, (1, 1), (1, 1), (0, 0), (1, 1))
    filters = torch.randn(16, 16, 1, 1)
    packed, argument = pack(sizes, ONE_VECTOR, filters, None), sizes.argument(ONE_VECTOR)
    planar = pack(sizes, few_channels(1, planar=True), filters, None)
    operator = torch.ops.fxpasses.convolution
    for given, message in (
        ((x.double(), packed, None, argument, 1), "float32"),
        ((x, packed[1:], None, argument, 1), "packed for this"),
        ((x, packed, x[..., 1:], argument, 1), "summand"),
        ((x, packed, None, argument, 0), "depthwise"),
        ((x, packed, None, argument, 21), "no kernel"),
        ((x, packed, None, argument, SLIDING.code), "three taps a row"),
        ((x, planar, None, argument, 211), "several pixels at a time"),
        ((x, packed, None, argument[1:], 1), "sizes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*given, 0, 0.0, 0.0)


def test_an_empty_batch_gives_an_empty_result():
    sizes = Sizes(3, 4, 1, (3, 3), (1, 1), (1, 1), (1, 1))
    assert run(channels_last(0, 3, 5, 5), sizes, ONE_VECTOR, torch.randn(4, 3, 3, 3)).shape == (0, 4, 5, 5)


@pytest.mark.parametrize(("n", "c", "h", "w"), list(itertools.product((1, 2), (16, 24), (1, 5), (1, 6))))
def test_fake_results_have_the_sizes_and_strides_of_real_ones(n, c, h, w):
    from fxpasses.torch_internals.fake_tensors import FakeTensorMode

    sizes = Sizes(c, 8, 1, (3, 3), (2, 1), (1, 1), (1, 1))
    packed = pack(sizes, ONE_VECTOR, torch.randn(8, c, 3, 3), None)
    x = channels_last(n, c, h, w)
    real = torch.ops.fxpasses.convolution(x, packed, None, sizes.argument(ONE_VECTOR), 1, 0, 0.0, 0.0)
    with FakeTensorMode() as mode:
        fake = torch.ops.fxpasses.convolution(
            mode.from_tensor(x), mode.from_tensor(packed), None, sizes.argument(ONE_VECTOR), 1, 0, 0.0, 0.0
        )
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_candidates():
    """Groups are merged up to a vector; few channels are read by rows; one pixel has kernels of its own."""
    vector = library.vector_length()
    depthwise = Sizes(vector, vector, vector, (3, 3), (1, 1), (1, 1), (1, 1))
    assert kernels_for(depthwise, 100) == (DEPTHWISE,)
    narrow = Sizes(vector // 2, vector // 2, vector // 2, (3, 3), (1, 1), (1, 1), (1, 1))
    assert kernels_for(narrow, 100) == ()
    assert Sizes(64, 64, 16, (3, 3), (1, 1), (1, 1), (1, 1)).merged == vector // 4
    grouped = Sizes(64, 64, 16, (3, 3), (1, 1), (1, 1), (1, 1))
    assert SLIDING in kernels_for(grouped, 100)
    for changed in (
        {"kernel": (3, 5)},
        {"stride": (1, 3)},
        {"dilation": (1, 2)},
        {"groups": 1},
        {"filters": 48},
    ):
        assert SLIDING not in kernels_for(replace(grouped, **changed), 100)
    stem = Sizes(3, 64, 1, (7, 7), (2, 2), (3, 3), (1, 1))
    for planar in (False, True):
        found = kernels_for(stem, 100, planar=planar)
        assert {(kernel.kind, kernel.planar) for kernel in found} == {(Kind.FEW_CHANNELS, planar)}
    assert kernels_for(Sizes.of_linear(8, 64), 100, planar=True) == kernels_for(Sizes.of_linear(8, 64), 100)
    assert {kernel.code for kernel in kernels_for(Sizes.of_linear(8, 1000), 1)} <= {11, 14}


def test_without_vectors_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    library.vector_length.cache_clear()
    try:
        assert kernels_for(Sizes.of_linear(8, 8), 4) == ()
    finally:
        library.vector_length.cache_clear()


@pytest.mark.parametrize("kernel", EVERY_PRODUCT, ids=code)
def test_long_sums_are_rounded_no_worse_than_eagers(kernel):
    torch.manual_seed(0)
    x, weight = torch.rand(64, 4096), torch.rand(64, 4096)
    wanted = functional.linear(x.double(), weight.double())
    found = run(x, Sizes.of_linear(4096, 64), kernel, weight)
    eager = (functional.linear(x, weight) - wanted).abs().mean()
    assert (found - wanted).abs().mean() <= 2 * eager
