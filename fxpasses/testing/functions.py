"""Comparison of two functions on made-up inputs: what saved applications are tested with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fxpasses.report.application import TensorSpec as TensorSpec
from fxpasses.rewrite.numerics import first_difference, surrounding_modes


def assert_same_function(
    before: Callable[..., Any], after: Callable[..., Any], inputs: Sequence[Any]
) -> None:
    """Fails unless two functions give the same outputs and gradients on seeded random inputs.

    In float64 to 1e-9; in the inputs' own dtypes the second may be twice as far from the truth as the
    first. Grad mode and autocast are the caller's.

    Args:
        before: the function that is right.
        after: the function that should give the same.
        inputs: a `TensorSpec` (or a nest of them, or a number) for each argument of both.

    Raises:
        AssertionError: something differs, or one of the two cannot be run.
    """
    problem = first_difference(before, after, inputs, surrounding_modes())
    if problem is not None:
        raise AssertionError(problem)
