"""A kernel and its number: what generated graphs, remarks and the C++ know it by."""

from __future__ import annotations

import pytest

from fxpasses.kernels.kernel import DEPTHWISE, SLIDING, Kernel, Kind

CODES = {
    0: DEPTHWISE,
    1: Kernel(Kind.PRODUCT, 1),
    4: Kernel(Kind.PRODUCT, 4),
    11: Kernel(Kind.PRODUCT, 1, single_pixel=True),
    14: Kernel(Kind.PRODUCT, 4, single_pixel=True),
    20: SLIDING,
    102: Kernel(Kind.FEW_CHANNELS, 2),
    203: Kernel(Kind.FEW_CHANNELS, 3, planar=True),
}


@pytest.mark.parametrize("code", CODES)
def test_a_kernel_has_one_number_and_a_number_one_kernel(code):
    assert CODES[code].code == code
    assert Kernel.from_code(code) == CODES[code]


def test_every_number_that_names_a_kernel():
    known = []
    for code in range(-10, 1000):
        try:
            kernel = Kernel.from_code(code)
        except ValueError:
            continue
        assert kernel.code == code
        known.append(code)
    assert known == [0, 1, 2, 3, 4, 11, 14, 20, 31, 32, 33, 34, 101, 102, 103, 104, 201, 202, 203, 204]


@pytest.mark.parametrize("code", [-1, 5, 12, 21, 100, 111, 211, 301])
def test_a_number_that_names_none_is_refused(code):
    with pytest.raises(ValueError, match=f"no kernel {code}; there are 0, 1, "):
        Kernel.from_code(code)


def test_products_of_several_pixels_alone_can_gather():
    gathering = {code for code, kernel in CODES.items() if kernel.is_blocked_product}
    assert gathering == {1, 4}
