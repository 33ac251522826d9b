"""How close to eager is close enough: every limit from both sides, and what is no number."""

from __future__ import annotations

import math

import pytest
import torch

from fxpasses.comparison import (
    GRADIENTS,
    OPERATOR_NORM,
    OPERATOR_PEAK,
    RESULTS,
    assert_close_to_eager,
    gradient_errors,
    kernel_tolerance,
    nudge,
    relative_error,
    relative_norm,
)

FLOORS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# What is allowed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tolerance", "dtype", "eager_error", "allowed"),
    [
        *((RESULTS, dtype, 0.0, floor) for dtype, floor in FLOORS.items()),
        (RESULTS, torch.float32, 4e-6, 1e-5),
        (RESULTS, torch.float32, 6e-6, 1.2e-5),
        (GRADIENTS, torch.float32, 1e-2, 5e-2),
        (GRADIENTS, torch.float32, 3e-2, 6e-2),
        (GRADIENTS, torch.bfloat16, 0.0, 2e-1),
        (OPERATOR_NORM, torch.float32, 0.0, 16 * 2.0**-23),
        (OPERATOR_NORM, torch.float32, 1e-5, 3e-5),
        (OPERATOR_PEAK, torch.float16, 0.0, 64 * 2.0**-10),
        (OPERATOR_PEAK, torch.float16, 1e-1, 1.0),
    ],
)
def test_eager_s_own_error_is_the_yardstick_and_the_dtype_has_a_floor(tolerance, dtype, eager_error, allowed):
    assert tolerance.allowed(dtype, eager_error) == pytest.approx(allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_result_may_be_twice_as_far_as_eager_but_no_further(dtype):
    """All three are exact in the dtype; eager is off by 1/16 of the largest value."""
    exact, eager = doubles(1.0, 16.0), torch.tensor([2.0, 16.0], dtype=dtype)
    within, beyond = torch.tensor([3.0, 16.0], dtype=dtype), torch.tensor([3.25, 16.0], dtype=dtype)
    assert_close_to_eager("result", [within], [eager], [exact])
    with pytest.raises(
        AssertionError, match=r"result 0 is 0\.141 off.*0\.125 is allowed \(eager.*0\.0625 off"
    ):
        assert_close_to_eager("result", [beyond], [eager], [exact])
    assert_close_to_eager("result", [beyond], [eager], [exact], factor=4.0)


@pytest.mark.parametrize("dtype", FLOORS)
def test_where_eager_is_exact_the_floor_decides(dtype):
    exact = doubles(1.0, 0.0)
    for share, right in ((0.9, True), (1.1, False)):
        ours = torch.tensor([1.0, share * FLOORS[dtype]], dtype=dtype)
        if right:
            assert_close_to_eager("result", [ours], [exact.to(dtype)], [exact])
        else:
            with pytest.raises(AssertionError, match="result 0 is"):
                assert_close_to_eager("result", [ours], [exact.to(dtype)], [exact])


@pytest.mark.parametrize(
    ("dtype", "tf32", "expected"),
    [
        (torch.float32, False, 1e-3),
        (torch.float32, True, 4 * 2.0**-10),
        (torch.bfloat16, True, 4 * 2.0**-7),
        (torch.float16, False, 4 * 2.0**-10),
    ],
)
def test_a_kernel_is_judged_by_its_arithmetic(dtype, tf32, expected):
    assert kernel_tolerance(dtype, tf32=tf32) == expected


# How far apart ---------------------------------------------------------------------------------------------


def test_errors_are_relative_to_the_largest_value_and_to_the_norm():
    found, expected = doubles(3.0, 4.5), doubles(3.0, 4.0)
    assert relative_error(found, expected) == 0.5 / 4
    assert relative_norm(found, expected) == 0.5 / 5


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ((math.nan, 1.0), (math.nan, 1.0), 0.0),
        ((math.nan, 1.0), (0.0, 1.0), math.inf),
        ((0.0, 1.0), (math.nan, 1.0), math.inf),
        ((math.inf, 1.0), (math.inf, 1.0), 0.0),
        ((math.inf, 1.0), (1e300, 1.0), math.inf),
        ((math.inf, 1.0), (-math.inf, 1.0), math.inf),
        ((math.inf, 1.5), (math.inf, 2.0), 0.25),
        ((0.0, 0.0), (0.0, 0.0), 0.0),
        ((), (), 0.0),
    ],
)
def test_what_is_not_finite_must_be_the_same(found, expected, error):
    assert relative_error(doubles(*found), doubles(*expected)) == error


def test_infinities_of_opposite_signs_are_far_apart():
    ours, eager = doubles(math.inf, 1.0), doubles(-math.inf, 1.0)
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(AssertionError, match="result 0 is inf off"):
            assert_close_to_eager("result", [ours.to(dtype)], [eager.to(dtype)], [eager])
        assert_close_to_eager("result", [eager.to(dtype)], [eager.to(dtype)], [eager])


@pytest.mark.parametrize("measure", [relative_error, relative_norm])
def test_an_error_beside_zero_or_beside_small_values_counts(measure):
    assert measure(doubles(1e-9), doubles(0.0)) > 1
    assert measure(doubles(0.0), doubles(0.0)) == 0.0
    assert measure(doubles(1.5e-38), doubles(1e-38)) == pytest.approx(0.5)


def test_not_a_number_is_right_only_where_eager_has_it_too():
    exact = doubles(math.nan, 1.0)
    assert_close_to_eager("result", [exact.float()], [exact.float()], [exact])
    with pytest.raises(AssertionError, match="has NaNs where eager has none"):
        assert_close_to_eager("result", [exact.float()], [doubles(1.0, 1.0).float()], [doubles(1.0, 1.0)])


def test_a_result_has_eager_s_shape_and_dtype():
    x = doubles(1.0, 2.0)
    for other, words in ((x[:1], r"\(1,\) torch.float64"), (x.float(), r"\(2,\) torch.float32")):
        with pytest.raises(AssertionError, match=words):
            assert_close_to_eager("result", [other], [x], [x])
    with pytest.raises(AssertionError, match="1 results, where eager gives 2"):
        assert_close_to_eager("result", [x], [x, x], [x, x])


def test_gradients_are_relative_to_their_norm_and_a_thousandth_of_all():
    """Norms 5 and 0: of the second nothing is left but the thousandth of the root mean square, 5 / √2."""
    expected = {"weight": doubles(3.0, 4.0), "bias": doubles(0.0)}
    found = {"weight": doubles(3.0, 4.5), "bias": doubles(1e-4)}
    typical = 1e-3 * 5 / math.sqrt(2)
    errors = gradient_errors(found, expected)
    assert errors == pytest.approx({"weight": 0.5 / (5 + typical), "bias": 1e-4 / typical})


@pytest.mark.parametrize("found", [{}, {"w": doubles(1.0)}, {"w": doubles(1.0, math.nan)}])
def test_a_gradient_that_is_missing_misshapen_or_not_finite_is_infinitely_wrong(found):
    assert gradient_errors(found, {"w": doubles(1.0, 2.0)}) == {"w": math.inf}
    assert gradient_errors({}, {}) == {}


# Gradients in float64 --------------------------------------------------------------------------------------


def test_a_gradient_that_is_nothing_but_rounding_is_compared_at_the_scale_of_the_others():
    """That of a bias ahead of a batch norm over the batch: zero, as the difference of equal numbers."""
    eager = [torch.tensor([2.0, -1.0]).double(), torch.tensor([-1.4e-16]).double()]
    ours = [eager[0].clone(), torch.tensor([1.1e-16]).double()]
    assert_close_to_eager("gradient", ours, eager, eager)
    with pytest.raises(AssertionError, match=r"gradient 0 is 1\.79 off"):
        assert_close_to_eager("gradient", ours[1:], eager[1:], eager[1:])


@pytest.mark.parametrize("size", [1e-3, 1e-5])
def test_a_wrong_gradient_that_is_small_is_found(size):
    eager = [torch.tensor([2.0]).double(), torch.tensor([size]).double()]
    ours = [eager[0].clone(), eager[1] * (1 + 1e-6)]
    with pytest.raises(AssertionError, match="gradient 1 is 1e-06 off"):
        assert_close_to_eager("gradient", ours, eager, eager)


def test_a_float64_result_need_not_be_closer_than_eager_is_when_the_last_bit_differs():
    eager = [torch.tensor([30.0]).double(), torch.tensor([0.0]).double()]
    ours = [eager[0].clone(), torch.tensor([4e-14]).double()]
    with pytest.raises(AssertionError, match=r"gradient 1 is 1\.33e-09 off"):
        assert_close_to_eager("gradient", ours, eager, eager)
    assert_close_to_eager("gradient", ours, eager, eager, nudged=lambda: [eager[0], ours[1] / 2])
    with pytest.raises(AssertionError, match=r"gradient 1 is 1\.33e-09 off.*eager itself is 1\.33e-10 off"):
        assert_close_to_eager("gradient", ours, eager, eager, nudged=lambda: [eager[0], ours[1] / 10])


def test_a_nudge_changes_the_last_bit_and_nothing_else():
    given = torch.randn(100).double().requires_grad_()
    moved = nudge(given)
    assert moved.requires_grad
    assert torch.all(moved != given)
    torch.testing.assert_close(moved, given, rtol=2.3e-16, atol=0)
    whole = torch.arange(3)
    assert nudge(whole) is whole
