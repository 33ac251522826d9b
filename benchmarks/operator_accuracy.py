"""Whether a compiled operator computes what eager computes.

Most results are equal within the tolerances of `torch.testing.assert_close`. Where they are not, both are
compared with the result x* in float64, and eager's own error is the yardstick. The result x is accurate if

    ||x - x*|| / ||x*||      <=  max( 3 ||e - x*|| / ||x*||,      16 u)
    max|x - x*| / max|x*|    <=  max(10 max|e - x*| / max|x*|,    64 u)

for eager's result e and the machine epsilon u of the dtype. The first sees an error that is spread out, the
second one in a single place. Integers and booleans must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

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
    reference = exact[finite]
    if not reference.numel():
        return ""
    mine, eagers = actual[finite].double() - reference, expected[finite].double() - reference
    unit = torch.finfo(expected.dtype).eps
    norms = (
        ("relative error", _norm, 3.0, 16.0),
        ("largest relative error", _largest, 10.0, 64.0),
    )
    for name, norm, factor, units in norms:
        scale = max(norm(reference), torch.finfo(torch.float64).tiny)
        error, eager = norm(mine) / scale, norm(eagers) / scale
        if error > max(factor * eager, units * unit):
            return f"{name} {error:.1e} against float64, eager's is {eager:.1e}"
    return ""


def _norm(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())
