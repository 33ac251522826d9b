"""From a line of a log to arguments: tensors with the recorded shape, dtype and stride, and legal values.

Strides are honoured exactly, broadcast (stride 0) and overlapping ones included: a tensor is a view of a
storage that is filled as a whole. Large storages repeat a block of random values, because drawing them
would take longer than the operator. Which values an argument needs is said by `argument_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.operators.inputs.argument_rules import (
    STATISTICS,
    Ascending,
    Below,
    Computed,
    Distinct,
    IndexList,
    Rule,
    Uniform,
    UnmaterialisableError,
    base_name,
    bind,
    rules_of,
    shape_of,
)
from benchmarks.operators.inputs.notation import Call, TensorSpec, Value
from benchmarks.torch_internals import OpOverload

_BLOCK = 1_000_003  # prime, so that a repeated block lines up with no shape
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = {
    torch.float16: torch.complex32,
    torch.float32: torch.complex64,
    torch.float64: torch.complex128,
}
_INTEGERS = (1, 10)  # of an argument without a rule: small, and fit to divide by


@dataclass(frozen=True)
class Target:
    """Where and how arguments are made.

    Attributes:
        device: the device of every tensor.
        dtype: what floating dtypes become; None keeps the recorded ones.
        channels_last: whether tensors of four (five) dimensions are made channels-last.
        limit: the bytes that the arguments of a call may take.
        seed: of the random values.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    channels_last: bool = False
    limit: int = 4 << 30
    seed: int = 0


def materialise(
    operator: OpOverload, call: Call, target: Target
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The positional and the keyword arguments of one call.

    Raises:
        UnmaterialisableError: an argument is sparse, does not fit the schema, or the call needs more memory
            than the target's limit; the message is the reason.
    """
    if call.sparse:
        raise UnmaterialisableError("a sparse argument")
    bound = bind(operator, call.args, call.kwargs)
    converted = {name: _convert(value, name, target) for name, value in bound.items()}
    needed = sum(spec.storage_bytes for spec in Call((), _values(converted)).tensors())
    if needed > target.limit:
        raise UnmaterialisableError(f"needs {needed:,} bytes, the limit is {target.limit:,}")
    made = _make(operator, converted, target)
    positional = [argument.name for argument in operator._schema.arguments][: len(call.args)]
    return tuple(made[name] for name in positional), {name: made[name] for name in call.kwargs}


def _values(arguments: dict[str, object]) -> dict[str, Value]:
    # A schema's defaults are values of the notation as well: numbers, strings, lists, dtypes, None.
    return arguments  # type: ignore[return-value]


def _make(operator: OpOverload, bound: dict[str, object], target: Target) -> dict[str, object]:
    """Makes the free arguments first, then those whose values rest on others."""
    maker = _Maker(operator, bound, target)
    rules = rules_of(operator)
    for name in sorted(bound, key=lambda name: isinstance(rules.get(name), Computed)):
        bound[name] = maker.argument(bound[name], rules.get(name))
    return bound


class _Maker:
    """Makes the arguments of one call, from one random generator."""

    def __init__(self, operator: OpOverload, bound: dict[str, object], target: Target) -> None:
        self._name = base_name(operator)
        self._bound = bound
        self._target = target
        self._generator = torch.Generator().manual_seed(target.seed)

    def argument(self, value: object, rule: Rule | None) -> object:
        if isinstance(rule, IndexList) and isinstance(value, (list, tuple)):
            return self._index_list(value)
        if isinstance(value, TensorSpec):
            return self._tensor(value, rule)
        if isinstance(value, (list, tuple)):
            return type(value)(self.argument(item, None) for item in value)
        return value

    def _tensor(self, spec: TensorSpec, rule: Rule | None) -> torch.Tensor:
        if isinstance(rule, Computed):
            return self._placed(rule.value(self._bound), spec)
        if isinstance(rule, Below):
            return self._integers(spec, 0, rule.bound(self._bound))
        if isinstance(rule, Distinct):
            return self._distinct(spec, rule.bound(self._bound), rule.dimension(self._bound))
        if isinstance(rule, Ascending):
            steps = torch.randint(
                0, rule.bound(self._bound) + 1, (math.prod(spec.shape),), generator=self._generator
            )
            steps[:1] = 0
            return self._placed(steps.sort().values.view(spec.shape), spec)
        if isinstance(rule, Uniform):
            low, width = rule.low, rule.high - rule.low
            return self._filled(spec, lambda n: low + width * torch.rand(n, generator=self._generator))
        if spec.dtype is torch.bool:
            return self._integers(spec, 0, 2)
        if spec.dtype.is_floating_point or spec.dtype.is_complex:
            return self._filled(spec, lambda n: torch.randn(n, generator=self._generator))
        return self._integers(spec, *_INTEGERS)

    def _integers(self, spec: TensorSpec, low: int, high: int) -> torch.Tensor:
        if spec.storage_elements and high <= low:
            raise UnmaterialisableError(f"no index is valid: the indexed dimension has {high} elements")
        return self._filled(
            spec, lambda n: torch.randint(low, max(high, low + 1), (n,), generator=self._generator)
        )

    def _distinct(self, spec: TensorSpec, bound: int, dimension: int) -> torch.Tensor:
        shape = list(spec.shape) or [1]
        if shape[dimension] > bound:
            return self._integers(spec, 0, bound)
        length, shape[dimension] = shape[dimension], bound
        order = torch.rand(shape, generator=self._generator).argsort(dimension)
        return self._placed(order.narrow(dimension, 0, length).reshape(spec.shape), spec)

    def _index_list(self, specs: list[object] | tuple[object, ...]) -> list[object]:
        """Index tensors for the leading dimensions of `self`; without accumulation, no place twice."""
        given = [spec for spec in specs if isinstance(spec, TensorSpec)]
        if any(index.dtype in (torch.bool, torch.uint8) for index in given):
            raise UnmaterialisableError("a mask as index: the shape of the result depends on its values")
        sizes = shape_of(self._bound, "self")
        if len(specs) > len(sizes):
            raise UnmaterialisableError(f"{len(specs)} indices for {len(sizes)} dimensions")
        indexed = [size for size, spec in zip(sizes, specs, strict=False) if spec is not None]
        places, wanted = math.prod(indexed), math.prod(given[0].shape) if given else 0
        writes = "put" in self._name and not self._bound.get("accumulate")
        if not writes or len({index.shape for index in given}) != 1 or not 0 < wanted <= places:
            return [
                self._integers(spec, 0, size) if isinstance(spec, TensorSpec) else None
                for size, spec in zip(sizes, specs, strict=False)
            ]
        order = torch.randperm(places, generator=self._generator)[:wanted]
        unravelled = iter(torch.unravel_index(order, tuple(indexed)))
        return [
            self._placed(next(unravelled).view(spec.shape), spec) if isinstance(spec, TensorSpec) else None
            for spec in specs
        ]

    def _filled(self, spec: TensorSpec, draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """A tensor whose whole storage is filled with random values."""
        elements = spec.storage_elements
        block = draw(min(elements, _BLOCK)).to(spec.dtype)
        storage = torch.empty(elements, dtype=spec.dtype)
        for start in range(0, elements, _BLOCK):
            storage[start : start + _BLOCK] = block[: elements - start]
        storage = storage.to(self._target.device)
        return self._formatted(
            storage.view(spec.shape) if spec.stride is None else storage.as_strided(spec.shape, spec.stride)
        )

    def _placed(self, values: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        """A tensor with given values, in the recorded strides where these let each element have its own."""
        values = values.to(self._target.device, spec.dtype)
        if tuple(values.shape) != spec.shape:
            raise UnmaterialisableError(
                f"an argument should have the shape {list(values.shape)}, the log has {list(spec.shape)}"
            )
        if spec.stride is None or 0 in spec.stride:
            return self._formatted(values.contiguous())
        strided = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=values.device)
        return self._formatted(strided.copy_(values))

    def _formatted(self, tensor: torch.Tensor) -> torch.Tensor:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if not self._target.channels_last or tensor.dim() not in formats or 0 in tensor.stride():
            return tensor
        return tensor.to(memory_format=formats[tensor.dim()])


def _convert(value: object, name: str, target: Target) -> object:
    """A value with its floating dtypes and its devices replaced by the target's."""
    if isinstance(value, (list, tuple)):
        return type(value)(_convert(item, name, target) for item in value)
    if name == "device" or value in ("cpu", "cuda"):
        return None if value is None else target.device
    if target.dtype is None:
        return value
    if isinstance(value, TensorSpec):
        keep = target.device.type == "cuda" and name in STATISTICS
        return value if keep else replace(value, dtype=_converted(value.dtype, target.dtype))
    if isinstance(value, torch.dtype):
        return _converted(value, target.dtype)
    if isinstance(value, float) and math.isfinite(value):
        # Masks are filled with the least value of the recorded dtype, which a narrower one cannot hold.
        largest = torch.finfo(target.dtype).max
        return max(-largest, min(largest, value))
    return value


def _converted(dtype: torch.dtype, target: torch.dtype) -> torch.dtype:
    if dtype in _COMPLEX.values():
        return _COMPLEX.get(target, dtype)
    return target if dtype in _FLOATING else dtype
