"""Two functions on the same made-up values: do they compute the same?

In float64 the answers, and the gradients where there are any, must agree to 1e-9: that tests the algebra.
Casts to narrower floating types inside a function become casts to float64, or they would hide a wrong
formula behind rounding. Then both run in the dtypes that the graph has, and the second may be twice as far
from the float64 answer as the first (`fxpasses.comparison` has the rule).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fxpasses.comparison import assert_close_to_eager
from fxpasses.graph.modes import Modes
from fxpasses.report.application import Application, TensorSpec
from fxpasses.torch_internals.pytree import tree_leaves, tree_map_only

SEEDS = (0, 1)
"""Two draws: a rewrite that is wrong for one sign only may survive a single one."""


def difference_of(application: Application) -> str | None:
    """What differs between the replaced and the replacing operators, or None where nothing does."""
    specs = [spec for _, spec in application.inputs]
    return first_difference(application.before, application.after, specs, application.modes)


def first_difference(
    before: Callable[..., Any], after: Callable[..., Any], specs: Sequence[Any], modes: Modes | None = None
) -> str | None:
    """What differs between two functions, in words, or None where nothing does.

    Args:
        before: the function that is right.
        after: the function that should give the same.
        specs: one `TensorSpec`, nest of them, or number for each argument of both.
        modes: the grad mode and autocast regions to run them in.
    """
    try:
        for seed in SEEDS:
            _compare_once(before, after, _values(specs, seed), modes or Modes())
    except _WrongError as wrong:
        return str(wrong)
    except Exception as error:
        return f"could not be run: {type(error).__name__}: {error}"
    return None


def surrounding_modes() -> Modes:
    """The grad mode that the caller stands in; autocast regions surround the call as they are."""
    return Modes(grad=torch.is_grad_enabled())


class _WrongError(Exception):
    """Two answers differ."""


def _compare_once(
    before: Callable[..., Any], after: Callable[..., Any], values: list[Any], modes: Modes
) -> None:
    with torch.random.fork_rng(devices=()):
        exact = _run(before, values, modes, widened=True)
        if any(tensor.isnan().any() for tensor in exact if tensor.is_floating_point()):
            # The square root or the logarithm of a negative number says nothing: stay above zero.
            values = tree_map_only(torch.Tensor, _above_zero, values)
            exact = _run(before, values, modes, widened=True)
        _require_close("in float64", _run(after, values, modes, widened=True), exact, exact)
        if all(tensor.dtype == torch.float64 for tensor in _tensors(values) if tensor.is_floating_point()):
            return
        eager = _run(before, values, modes, widened=False)
        ours = _run(after, values, modes, widened=False)
        # The float64 answers are followed by their gradients, which have no counterpart here.
        _require_close("in its own dtype", ours, eager, exact[: len(eager)])


def _require_close(
    when: str, found: list[torch.Tensor], expected: list[torch.Tensor], exact: list[torch.Tensor]
) -> None:
    if len(found) != len(expected):
        raise _WrongError(f"gives {len(found)} results and gradients {when}, not {len(expected)}")
    for index, (ours, eager, truth) in enumerate(zip(found, expected, exact, strict=True)):
        if ours.shape != eager.shape or ours.dtype != eager.dtype:
            kinds = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (ours, eager)]
            raise _WrongError(f"result {index} is {kinds[0]} {when}, not {kinds[1]}")
        if not eager.is_floating_point():
            if not torch.equal(ours, eager):
                raise _WrongError(f"result {index} differs {when}")
            continue
        try:
            assert_close_to_eager(f"result {index} {when},", [ours], [eager], [truth])
        except AssertionError as error:
            raise _WrongError(str(error)) from error


def _run(
    function: Callable[..., Any], values: list[Any], modes: Modes, *, widened: bool
) -> list[torch.Tensor]:
    """The outputs and, in float64, the gradients of their weighted sum for every input that wants one."""
    arguments = tree_map_only(torch.Tensor, lambda tensor: _fresh(tensor, widened), values)
    torch.manual_seed(0)
    with modes.entered(), _Widening() if widened else torch.overrides.BaseTorchFunctionMode():
        outputs = _tensors(function(*arguments))
    results = [output.detach() for output in outputs]
    return [*results, *_gradients(outputs, _tensors(arguments))] if widened else results


def _gradients(outputs: list[torch.Tensor], arguments: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    torch.manual_seed(1)
    weights = [torch.randn_like(output) for output in outputs if output.requires_grad]
    leaves = [argument for argument in arguments if argument.requires_grad]
    targets = [output for output in outputs if output.requires_grad]
    if targets and leaves:
        found = torch.autograd.grad(targets, leaves, weights, allow_unused=True)
        for leaf, gradient in zip(leaves, found, strict=True):
            yield torch.zeros_like(leaf) if gradient is None else gradient


def _fresh(given: torch.Tensor, widened: bool) -> torch.Tensor:
    """A new leaf of the same strides and values."""
    wider = widened and given.is_floating_point()
    return _mapped(given, lambda flat: flat.double() if wider else flat.clone())


def _above_zero(given: torch.Tensor) -> torch.Tensor:
    return _mapped(given, lambda flat: flat.abs() + 0.5) if given.is_floating_point() else given


def _mapped(given: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A function of every element, under the strides of the original (which may be 0)."""
    flat = given.detach().as_strided((_span(given.shape, given.stride()),), (1,))
    changed = change(flat).as_strided(given.shape, given.stride())
    return changed.requires_grad_(given.requires_grad)


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How many elements of storage a tensor of these sizes and strides reaches over."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


class _Widening(TorchFunctionMode):
    """Turns every cast to a narrower floating type into a cast to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("half", "bfloat16", "float") and len(args) == 1:
            func = torch.Tensor.double
        args, kwargs = tree_map_only(torch.dtype, _widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _values(specs: Sequence[Any], seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)

    def made(spec: TensorSpec) -> torch.Tensor:
        return _made_up(spec, generator)

    return [tree_map_only(TensorSpec, made, spec) for spec in specs]


def _made_up(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    span = _span(spec.shape, spec.stride)
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        drawn = torch.randn(span, generator=generator, dtype=torch.float64)
        flat = (drawn.abs() + 0.5 if spec.positive else drawn).to(spec.dtype)
    else:
        flat = torch.randint(0, 2, (span,), generator=generator).to(spec.dtype)
    made = flat.to(spec.device).as_strided(spec.shape, spec.stride)
    return made.requires_grad_(spec.requires_grad)


def _tensors(nest: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, torch.Tensor)]
