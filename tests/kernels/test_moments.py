"""The operator `fxpasses::moments` against variance and mean in float64."""

from __future__ import annotations

import pytest
import torch

from fxpasses.kernels import library

pytestmark = [pytest.mark.vectors, pytest.mark.needs_kernels]


@pytest.fixture(autouse=True)
def kernels():
    if not library.vector_length():
        pytest.skip(library.missing())


def moments(image: torch.Tensor, groups: int) -> torch.Tensor:
    return torch.ops.fxpasses.moments(image, groups)


def expected(image: torch.Tensor, groups: int) -> torch.Tensor:
    rows = image.double().reshape(len(image), groups, -1)
    return torch.stack(torch.var_mean(rows, 2, correction=0))[..., None, None]


SIZES = [
    (1, 64, 30, 31, 32),
    (3, 37, 5, 7, 1),
    (2, 130, 9, 11, 13),
    (2, 96, 6, 6, 96),
    (1, 5, 1, 1, 5),
    (2, 40, 1, 3, 8),
    (1, 7, 128, 129, 7),
    (1, 17, 64, 64, 1),
    (2, 49, 20, 20, 7),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_variance_and_mean_of_every_group(size, threads):
    *shape, groups = size
    torch.manual_seed(0)
    image = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = moments(image, groups)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), expected(image, groups), rtol=1e-6, atol=1e-6)


def test_a_large_mean_does_not_drown_a_small_variance():
    torch.manual_seed(0)
    image = (1000 * torch.randn(1, 32, 1, 1) + 0.01 * torch.randn(1, 32, 64, 64)).contiguous(
        memory_format=torch.channels_last
    )
    exact = expected(image, 32)
    error = ((moments(image, 32).double() - exact) / exact).abs().max()
    eager = torch.stack(torch.var_mean(image.reshape(1, 32, -1), 2, correction=0))[..., None, None]
    assert error <= max(1e-6, 2 * ((eager.double() - exact) / exact).abs().max())


def test_an_image_in_other_memory_is_read_right():
    image = torch.randn(2, 24, 10, 12)
    torch.testing.assert_close(moments(image, 8).double(), expected(image, 8), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_shows(value):
    image = torch.randn(1, 16, 20, 20).contiguous(memory_format=torch.channels_last)
    image[0, 3, 4, 5] = value
    found = moments(image, 4)
    assert not found[:, 0, 0].isfinite().all()
    assert found[:, 0, 1:].isfinite().all()


@pytest.mark.parametrize(
    ("image", "groups"),
    [
        (torch.randn(1, 6, 4, 4), 4),
        (torch.randn(1, 6, 4, 4), 0),
        (torch.randn(1, 6, 4), 3),
        (torch.randn(1, 6, 4, 4).double(), 3),
        (torch.randn(1, 6, 0, 4), 3),
    ],
    ids=["indivisible", "no group", "3-D", "float64", "empty"],
)
def test_what_it_cannot_take_is_refused(image, groups):
    with pytest.raises(RuntimeError):
        moments(image, groups)


def test_the_fake_result_is_like_the_real_one():
    image = torch.randn(2, 24, 10, 12).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fxpasses.moments.default, (image, 8), test_utils="test_faketensor")
