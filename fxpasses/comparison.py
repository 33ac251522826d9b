"""How close to eager is close enough: the one place.

Let x* be what eager computes in float64, and e(x) how far a result x is from it, relative to it. The result
of a rewritten or compiled program is close enough if

    e(x) <= max(factor · e(eager), floor of the dtype).

Eager's own error is the yardstick: a sum in another order is as good as eager's, and neither is exact. The
floor is what the dtype cannot do better than. In float64 eager's result is x*, so that the floor alone
decides: 1e-9, which tests the algebra.

                    e(x)                                    factor  floor: float64 float32 bfloat16 float16
    RESULTS         max|x - x*| / max|x*|                        2            1e-9    1e-5     1e-2    2e-3
    GRADIENTS       ‖x - x*‖ / (‖x*‖ + 1e-3 rms of all ‖x*‖)     2            1e-7    5e-2     2e-1    1e-1
    OPERATOR_NORM   ‖x - x*‖ / ‖x*‖                              3            16 eps of the dtype
    OPERATOR_PEAK   max|x - x*| / max|x*|                       10            64 eps of the dtype

RESULTS judges outputs, losses and buffers, and gradients where all is float64. GRADIENTS judges those of a
whole network in its own dtype: a ReLU whose input is near zero may flip, which moves float32 gradients by up
to 8e-3 for eager and for a rewrite alike; the second term of the divisor is there because some vanish (that
of a bias ahead of a batch norm over the batch). The last two judge a single operator: an error that is
spread out, and one in a single place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxpasses.torch_internals.pytree import tree_leaves


@dataclass(frozen=True)
class Tolerance:
    """How large a relative error may be.

    Attributes:
        factor: how many times eager's own error is allowed.
        floor: of a dtype, the error that is allowed whatever eager's is.
    """

    factor: float
    floor: Callable[[torch.dtype], float]

    def allowed(self, dtype: torch.dtype, eager_error: float = 0.0) -> float:
        """The largest error that is close enough, where eager's own is `eager_error`."""
        return max(self.factor * eager_error, self.floor(dtype))


def _eps(number: int) -> Callable[[torch.dtype], float]:
    return lambda dtype: number * torch.finfo(dtype).eps


RESULTS = Tolerance(
    2.0,
    {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}.__getitem__,
)
GRADIENTS = Tolerance(
    2.0,
    {torch.float64: 1e-7, torch.float32: 5e-2, torch.bfloat16: 2e-1, torch.float16: 1e-1}.__getitem__,
)
OPERATOR_NORM = Tolerance(3.0, _eps(16))
OPERATOR_PEAK = Tolerance(10.0, _eps(64))

SPECIMEN_FACTOR = 4.0
"""Instead of 2 for the results of small random models: the largest of a handful of rounding errors is further
than that from another such handful, once in some hundred models."""

_NUDGES = 4
"""How often the last bit is changed to see how far eager's results move."""

_SMALLEST = 1e-200
"""What is compared with zero is compared with this: far below every number of the shorter types."""

_VANISHING_RESULT = 1e-6
"""Beside the largest value of its kind; below, a float64 result may be nothing but rounding: the gradient of
a bias ahead of a batch norm over the batch is zero, computed as the difference of equal numbers."""

_VANISHING_GRADIENT = 1e-3
"""Beside the root mean square of the gradients' norms."""


def kernel_tolerance(dtype: torch.dtype, *, tf32: bool = False) -> float:
    """How far one kernel's result may be from float64, where eager's kernel is on trial itself.

    Relative to each element, and absolute for results of unit variance: 1e-3 in float32, four units in the
    last place where the arithmetic is that of a shorter type (bfloat16, float16, TF32).
    """
    if dtype != torch.float32:
        return 4 * torch.finfo(dtype).eps
    return 4 * 2.0**-10 if tf32 else 1e-3


# How far apart ---------------------------------------------------------------------------------------------


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest finite value expected.

    It is infinite where one of the two has a NaN or an infinity and the other has not.
    """
    if not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    return _distance(found, expected)


def relative_norm(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm of what is expected; both finite."""
    return _norm(found.double() - expected.double()) / max(_norm(expected), _SMALLEST)


def gradient_errors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """The error of each parameter's gradient, by name.

    It is infinite where a gradient is missing, misshapen or not finite.

    Args:
        found: gradients of the parameters.
        expected: the same in float64, finite.
    """
    norms = {name: _norm(gradient) for name, gradient in expected.items()}
    mean_square = sum(norm**2 for norm in norms.values()) / max(len(norms), 1)
    errors = {}
    for name, exact in expected.items():
        gradient = found.get(name)
        if gradient is None or gradient.shape != exact.shape or not gradient.isfinite().all():
            errors[name] = float("inf")
        else:
            scale = norms[name] + _VANISHING_GRADIENT * mean_square**0.5
            errors[name] = _norm(gradient.double() - exact) / max(scale, _SMALLEST)
    return errors


def _distance(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """The largest difference, relative to the largest finite value expected, or to `floor`; NaNs are none."""
    found, expected = found.double(), expected.double()
    if not found.numel():
        return 0.0
    if not torch.equal(found.isinf(), expected.isinf()):
        return float("inf")
    gap = (found - expected).abs().nan_to_num(nan=0.0, posinf=torch.inf)
    return gap.max().item() / max(_largest(expected), floor, _SMALLEST)


def _largest(given: torch.Tensor) -> float:
    """The largest finite magnitude; 0 where there is none."""
    finite = given.detach().double().abs().nan_to_num(nan=0.0, posinf=0.0)
    return finite.max().item() if finite.numel() else 0.0


def _norm(given: torch.Tensor) -> float:
    return float(given.double().norm())


# Close enough ----------------------------------------------------------------------------------------------


def assert_close_to_eager(
    name: str,
    found: Any,
    expected: Any,
    exact: Any,
    *,
    factor: float = RESULTS.factor,
    nudged: Callable[[], Any] | None = None,
) -> None:
    """Fails unless results are as close to the truth as eager's.

    Args:
        name: what is compared, for the message.
        found: tensors of the rewritten model, in any nest.
        expected: the same of the eager model.
        exact: the same of the eager model in float64.
        factor: how many times eager's own error is allowed in lower precisions.
        nudged: gives what eager answers when parameters and inputs differ in their last bit (`nudge`). Asked
            a few times where a float64 result is too far off: no closer than `factor` times the furthest of
            these can be demanded.

    Raises:
        AssertionError: too far off, or of another shape or dtype.
    """
    results, eagers, truths = floating(found), floating(expected), floating(exact)
    if len(results) != len(eagers):
        raise AssertionError(f"{len(results)} {name}s, where eager gives {len(eagers)}")
    tolerance = dataclasses.replace(RESULTS, factor=factor)
    floor = _VANISHING_RESULT * max(map(_largest, eagers), default=0.0)
    for index, (ours, eager, truth) in enumerate(zip(results, eagers, truths, strict=True)):
        label = f"{name} {index}"
        _require_same_kind(label, ours, eager)
        if eager.dtype != torch.float64:
            own = _distance(eager, truth)
            _require(label, _distance(ours, truth), tolerance.allowed(eager.dtype, own), own)
            continue
        error, own = _distance(ours, eager, floor), 0.0
        if error > tolerance.allowed(eager.dtype) and nudged is not None:
            own = max(_distance(floating(nudged())[index], eager, floor) for _ in range(_NUDGES))
        _require(label, error, tolerance.allowed(eager.dtype, own), own)


def nudge(given: torch.Tensor) -> torch.Tensor:
    """The next larger or smaller number for each element, at random; what is not float64 stays."""
    if given.dtype != torch.float64:
        return given
    plain = given.detach()
    ends = torch.where(torch.rand(plain.shape) < 0.5, -torch.inf, torch.inf).to(plain.dtype)
    return torch.nextafter(plain, ends).requires_grad_(given.requires_grad)


def floating(nest: Any) -> list[torch.Tensor]:
    """The floating-point tensors in a nest."""
    leaves = tree_leaves(nest)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _require_same_kind(label: str, ours: torch.Tensor, eager: torch.Tensor) -> None:
    if (ours.shape, ours.dtype, ours.device) != (eager.shape, eager.dtype, eager.device):
        raise AssertionError(f"{label} is {_kind(ours)}, where eager gives {_kind(eager)}")
    if not torch.equal(ours.isnan(), eager.isnan()):
        raise AssertionError(f"{label} has NaNs where eager has none, or none where eager has some")


def _require(label: str, error: float, allowed: float, own: float) -> None:
    if error > allowed:
        raise AssertionError(
            f"{label} is {error:.3g} off, relative to its largest value; {allowed:.3g} is allowed"
            + (f" (eager itself is {own:.3g} off)" if own else "")
        )


def _kind(given: torch.Tensor) -> str:
    return f"{tuple(given.shape)} {given.dtype} on {given.device}"
