"""Operators that work in either layout, at a cost that depends on it: recorded from models, then replayed.

Pooling, upsampling, concatenation on channels and reductions over the spatial dimensions are replayed as
they were recorded. Batch norm is compiled to arithmetic, so each one recorded stands for that arithmetic at
its shape: y = x * scale[c] + shift[c], and in training the mean, variance and sum over N·H·W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor

from benchmarks.layout.cases import Kernel, to_layout
from benchmarks.layout.measure import Candidates, Setting, Variant, measure
from benchmarks.operators.inputs.notation import Call, TensorSpec, Value
from benchmarks.torch_internals import tree_leaves
from fxpasses.devices.keys import operator_key, shape_key
from fxpasses.devices.profile import CHANNEL_AFFINE, LAYOUTS, Layout

aten = torch.ops.aten
Target = Callable[..., "Tensor | tuple[Tensor, ...]"]

_REPLAYED = frozenset(
    f"aten.{name}"
    for name in (
        "max_pool2d_with_indices.default",
        "max_pool2d_with_indices_backward.default",
        "max_pool3d_with_indices.default",
        "max_pool3d_with_indices_backward.default",
        "avg_pool2d.default",
        "avg_pool2d_backward.default",
        "avg_pool3d.default",
        "avg_pool3d_backward.default",
        "_adaptive_avg_pool2d.default",
        "_adaptive_avg_pool2d_backward.default",
        "_adaptive_avg_pool3d.default",
        "_adaptive_avg_pool3d_backward.default",
        "upsample_nearest2d.default",
        "upsample_nearest2d.vec",
        "upsample_nearest2d_backward.default",
        "upsample_bilinear2d.default",
        "upsample_bilinear2d.vec",
        "upsample_bilinear2d_backward.default",
        "upsample_nearest3d.default",
        "upsample_nearest3d.vec",
        "upsample_nearest3d_backward.default",
        "upsample_trilinear3d.default",
        "upsample_trilinear3d.vec",
        "upsample_trilinear3d_backward.default",
    )
)
_REDUCTIONS = frozenset(
    {"aten.mean.dim", "aten.sum.dim_IntList", "aten.var.correction", "aten.var_mean.correction"}
)
_MAX_POOL_BACKWARD = {
    "aten.max_pool2d_with_indices_backward.default": aten.max_pool2d_with_indices.default,
    "aten.max_pool3d_with_indices_backward.default": aten.max_pool3d_with_indices.default,
}


@dataclass(frozen=True)
class OperatorCase:
    """One call of an operator, its tensors given by shape and dtype.

    Attributes:
        operator: its name in a device profile.
        key: its key there.
        overload: the ATen overload to call, as in ``aten.mean.dim``.
        call: its arguments.
    """

    operator: str
    key: str
    overload: str
    call: Call

    @property
    def target(self) -> Target:
        """The overload itself."""
        found: Target = attrgetter(self.overload)(torch.ops)
        return found

    @property
    def elements(self) -> int:
        """The number of elements of its arguments, as a measure of its work."""
        return sum(math.prod(spec.shape) for spec in self.call.tensors())


def layout_sensitive(overload: str, call: Call, *, training: bool) -> list[OperatorCase]:
    """The cases that a recorded call stands for; none where its cost does not depend on the layout.

    Args:
        overload: its name, such as ``aten.mean.dim``.
        call: the arguments.
        training: whether a batch norm computes its statistics and gradients.
    """
    tensors = call.tensors()
    if not tensors or len(tensors[0].shape) not in (4, 5):
        return []
    if "batch_norm" in overload:
        return [] if "backward" in overload else _batch_norm(tensors[0], training)
    dim = len(tensors[0].shape)
    if overload == "aten.cat.default":
        # On any other dimension than channels, what is copied is contiguous in both layouts.
        return [_case(overload, call)] if _dims(call, dim) == {1} else []
    if overload in _REDUCTIONS:
        return [_case(overload, call)] if set(range(2, dim)) <= _dims(call, dim) else []
    return [_case(overload, call)] if overload in _REPLAYED else []


def measure_operator(case: OperatorCase, setting: Setting) -> list[Variant]:
    """The operator in both layouts; its one implementation is the ATen overload."""
    with setting.arithmetic():
        values = _materialised(case, setting)
        target = case.target
        exact = values.changed(_to_double).passed_to(target)
        results = exact if isinstance(exact, tuple) else (exact,)

        def build(laid_out: _Arguments, layout: Layout) -> Kernel:
            def run() -> Tensor | tuple[Tensor, ...]:
                result = laid_out.passed_to(target)
                if isinstance(result, tuple):
                    return tuple(to_layout(tensor, layout) for tensor in result)
                return to_layout(result, layout)

            return run

        floating = [result for result in results if result.is_floating_point()]
        written = sum(tensor.numel() for tensor in floating) * setting.torch_dtype.itemsize
        candidates: Candidates = {}
        for layout in LAYOUTS:
            laid_out = values.changed(partial(to_layout, layout=layout))
            sets = setting.sets(laid_out, _Arguments.copied, values.num_bytes + written)
            candidates[layout, case.overload] = [partial(build, operands, layout) for operands in sets]
        return measure(case.operator, case.key, candidates, floating, setting)


def _case(overload: str, call: Call) -> OperatorCase:
    plain = Call(tuple(_strideless(argument) for argument in call.args), dict(call.kwargs))
    target = attrgetter(overload)(torch.ops)
    return OperatorCase(overload, operator_key(target, plain.args, plain.kwargs), overload, plain)


def _batch_norm(x: TensorSpec, training: bool) -> list[OperatorCase]:
    x = TensorSpec(x.shape, x.dtype)
    channel = TensorSpec((1, x.shape[1], *[1] * (len(x.shape) - 2)), x.dtype)
    affine = Call((channel, x, channel), {})
    cases = [OperatorCase(CHANNEL_AFFINE, shape_key(x.shape), "aten.addcmul.default", affine)]
    if training:
        dims: list[Value] = [dim for dim in range(len(x.shape)) if dim != 1]
        cases.append(_case("aten.var_mean.correction", Call((x, dims), {"correction": 0, "keepdim": True})))
        cases.append(_case("aten.sum.dim_IntList", Call((x, dims), {})))
    return cases


def _dims(call: Call, dim: int) -> set[int]:
    """The dimensions that a concatenation or reduction works on; all where none are given."""
    given = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
    if isinstance(given, int):
        return {given % dim}
    if isinstance(given, (list, tuple)):
        return {index % dim for index in given if isinstance(index, int)}
    return set(range(dim))


def _strideless(value: Value) -> Value:
    if isinstance(value, TensorSpec):
        return replace(value, stride=None)
    if isinstance(value, list):
        return [_strideless(item) for item in value]
    return value


@dataclass(frozen=True)
class _Arguments:
    args: tuple[object, ...]
    kwargs: dict[str, object]

    def changed(self, change: Callable[[Tensor], Tensor]) -> _Arguments:
        """The same arguments with every tensor changed."""
        args = tuple(_mapped(argument, change) for argument in self.args)
        return _Arguments(args, {name: _mapped(argument, change) for name, argument in self.kwargs.items()})

    def copied(self) -> _Arguments:
        """The same arguments with tensors elsewhere in memory."""
        return self.changed(Tensor.clone)

    @property
    def num_bytes(self) -> int:
        """What all tensors take together."""
        leaves = tree_leaves((self.args, self.kwargs))
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))

    def passed_to(self, target: Target) -> Tensor | tuple[Tensor, ...]:
        """What `target` makes of them."""
        return target(*self.args, **self.kwargs)


def _materialised(case: OperatorCase, setting: Setting) -> _Arguments:
    generator = torch.Generator(setting.device).manual_seed(0)

    def made(value: Value) -> object:
        if isinstance(value, TensorSpec):
            values = torch.randn(value.shape, generator=generator, device=setting.device)
            return values.to(setting.torch_dtype)
        return [made(item) for item in value] if isinstance(value, list) else value

    args = [made(argument) for argument in case.call.args]
    if case.overload in _MAX_POOL_BACKWARD:
        # Indices must be those of maxima: others would be written to in another order than in life.
        x, *window = args[1:7]
        args[7] = _MAX_POOL_BACKWARD[case.overload](x, *window)[1]
    return _Arguments(tuple(args), {name: made(value) for name, value in case.call.kwargs.items()})


def _mapped(value: object, change: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return change(value)
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
