"""Operators whose cost depends on the layout: recorded from models, then replayed in both and compared.

Batch norm is compiled to arithmetic, so each one recorded stands for that arithmetic at its shape:
y = x * scale[c] + shift[c], and in training the mean, variance and sum over N·H·W.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.layout.measure import Variant, measure
from benchmarks.layout.setting import Setting
from benchmarks.operators.inputs.notation import Call, TensorSpec, Value
from benchmarks.torch_internals import tree_leaves, tree_map_only
from fxpasses.devices.convolutions import Candidates, Kernel, to_layout
from fxpasses.devices.keys import operator_key, shape_key
from fxpasses.devices.operators import OperatorCase, Shaped, depends_on_layout
from fxpasses.devices.profile import CHANNEL_AFFINE, LAYOUTS, Layout


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
    if depends_on_layout(overload, call.args, call.kwargs, len(tensors[0].shape)):
        return [_case(overload, call)]
    return []


def measure_operator(case: OperatorCase, setting: Setting) -> list[Variant]:
    """The operator in both layouts; its one implementation is the ATen overload."""
    with setting.arithmetic():
        generator = torch.Generator(setting.device).manual_seed(0)

        def make(given: Shaped) -> Tensor:
            values = torch.randn(given.shape, generator=generator, device=setting.device)
            return values.to(setting.torch_dtype)

        values = case.call(make)
        exact = _called(case, _mapped(values, _to_double))
        results = exact if isinstance(exact, tuple) else (exact,)

        def build(arguments: Any, layout: Layout) -> Kernel:
            def run() -> Tensor | tuple[Tensor, ...]:
                result = _called(case, arguments)
                if isinstance(result, tuple):
                    return tuple(to_layout(tensor, layout) for tensor in result)
                return to_layout(result, layout)

            return run

        floating = [result for result in results if result.is_floating_point()]
        moved = _num_bytes(values) + sum(map(Tensor.numel, floating)) * setting.torch_dtype.itemsize
        candidates: Candidates = {}
        for layout in LAYOUTS:
            laid_out = _mapped(values, partial(to_layout, layout=layout))
            sets = setting.sets(laid_out, lambda given: _mapped(given, Tensor.clone), moved)
            candidates[layout, case.overload] = [partial(build, operands, layout) for operands in sets]
        return measure(case.operator, case.key, candidates, floating, setting)


def _case(overload: str, call: Call) -> OperatorCase:
    args, kwargs = (
        tuple(map(_shaped, call.args)),
        {name: _shaped(value) for name, value in call.kwargs.items()},
    )
    target = getattr(torch.ops.aten, overload.split(".")[1])
    key = operator_key(getattr(target, overload.split(".")[2]), args, kwargs)
    return OperatorCase(overload, key, overload, args, kwargs)


def _batch_norm(x: TensorSpec, training: bool) -> list[OperatorCase]:
    given = Shaped(x.shape, x.dtype)
    channel = Shaped((1, x.shape[1], *[1] * (len(x.shape) - 2)), x.dtype)
    overload = "aten.addcmul.default"
    cases = [OperatorCase(CHANNEL_AFFINE, shape_key(x.shape), overload, (channel, given, channel), {})]
    if training:
        dims: list[Value] = [dim for dim in range(len(x.shape)) if dim != 1]
        cases.append(_case("aten.var_mean.correction", Call((x, dims), {"correction": 0, "keepdim": True})))
        cases.append(_case("aten.sum.dim_IntList", Call((x, dims), {})))
    return cases


def _shaped(value: Value) -> Any:
    if isinstance(value, TensorSpec):
        return Shaped(value.shape, value.dtype)
    return [_shaped(item) for item in value] if isinstance(value, list) else value


def _called(case: OperatorCase, arguments: Any) -> Tensor | tuple[Tensor, ...]:
    args, kwargs = arguments
    return case.target(*args, **kwargs)


def _mapped(arguments: Any, change: Any) -> Any:
    return tree_map_only(Tensor, change, arguments)


def _num_bytes(arguments: Any) -> int:
    """What all tensors take together."""
    return sum(leaf.nbytes for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
