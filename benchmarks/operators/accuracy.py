"""Whether a compiled operator computes what eager computes.

Most results are equal within the tolerances of `torch.testing.assert_close`. Where they are not, both are
compared with the result in float64, as `fxpasses.comparison` says for OPERATOR_NORM and OPERATOR_PEAK.
Integers and booleans must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fxpasses.comparison import OPERATOR_NORM, OPERATOR_PEAK, relative_error, relative_norm

Results = Sequence[torch.Tensor]


def disagreement(
    actual: Results, expected: Results, exact: Callable[[], Results], *, values: bool = True
) -> str:
    """In what `actual` differs from what eager computed; empty if it does not.

    Args:
        actual: the results of a compiled operator.
        expected: eager's results.
        exact: computes the results in float64; called only where that has to decide.
        values: whether values are compared, and not only number, shapes and dtypes.
    """
    if len(actual) != len(expected):
        return f"{len(actual)} results, eager has {len(expected)}"
    for index, (mine, eagers) in enumerate(zip(actual, expected, strict=True)):
        if mine.shape != eagers.shape or mine.dtype != eagers.dtype:
            return f"result {index} is {_described(mine)}, eager's is {_described(eagers)}"
    if not values:
        return ""
    differing = {
        index: text for index in range(len(actual)) if (text := _not_close(actual[index], expected[index]))
    }
    if not differing:
        return ""
    try:
        references = exact()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        index = min(differing)
        return f"result {index}: {differing[index]} (no float64 reference: {type(error).__name__})"
    for index, text in differing.items():
        if not expected[index].is_floating_point():
            return f"result {index}: {text}"
        excess = _excess(actual[index], expected[index], references[index])
        if excess:
            return f"result {index}: {text}; {excess}"
    return ""


def _described(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _not_close(actual: torch.Tensor, expected: torch.Tensor) -> str:
    """What `assert_close` says of the number of differing elements; empty if it is content."""
    try:
        torch.testing.assert_close(actual, expected, equal_nan=True, check_stride=False)
    except AssertionError as error:
        lines = str(error).splitlines()
        return next((line for line in lines if line.startswith("Mismatched")), lines[0]).strip()
    return ""


def _excess(actual: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor) -> str:
    """By how much the error exceeds what eager's allows; empty if it does not."""
    finite = expected.isfinite() & exact.isfinite()
    if not bool(actual[finite].isfinite().all()):
        return "not finite where eager's result is"
    if not bool(finite.any()):
        return ""
    reference, dtype = exact[finite], expected.dtype
    measures = (
        ("relative error", relative_norm, OPERATOR_NORM),
        ("largest relative error", relative_error, OPERATOR_PEAK),
    )
    for name, measure, tolerance in measures:
        error, eager = measure(actual[finite], reference), measure(expected[finite], reference)
        if error > tolerance.allowed(dtype, eager):
            return f"{name} {error:.1e} against float64, eager's is {eager:.1e}"
    return ""
