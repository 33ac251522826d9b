"""Keys: the shapes and arguments of a call, spelled so that equal work has one spelling.

    convolution_key   input=8x64x56x56 weight=64x64x1x1 stride=1x1 padding=0x0 dilation=1x1 groups=1
    operator_key      input=2x8x6x6 dim=[2,3] keepdim=False dtype=None
    shape_key         input=2x8x6x6
    bytes_key         bytes=4096

A profile answers for exactly the keys that were measured. Hence defaults are filled in, dimensions are
counted from 0 up, a value that stands for all spatial dimensions is written out, and what hardly costs is
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch.fx.operator_schemas import normalize_function


def convolution_key(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
) -> str:
    """The key of a convolution and of its gradients, from the arguments of `aten.convolution`.

    A list of one value stands for all spatial dimensions, as in ATen; `output_padding` counts only where
    the convolution is transposed. A bias is no part of the key: it hardly costs.
    """
    spatial = len(input_size) - 2
    lists = {"stride": stride, "padding": padding, "dilation": dilation}
    if transposed:
        lists["output_padding"] = output_padding
    fields = {
        name: _times(values if len(values) > 1 else [*values] * spatial) for name, values in lists.items()
    }
    parts = (
        {"input": _times(input_size), "weight": _times(weight_size)} | fields | {"groups": str(int(groups))}
    )
    return " ".join(["transposed"] * bool(transposed) + [f"{name}={value}" for name, value in parts.items()])


def operator_key(target: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """The key of a call of an ATen overload: tensors as shapes, defaults filled in, dimensions from 0 up.

    Args:
        target: the overload.
        args: positional arguments; a tensor may be anything with a `shape` (for an FX node, pass its
            ``meta["val"]``). Symbolic sizes must have been replaced by their hints.
        kwargs: keyword arguments.

    Raises:
        ValueError: the arguments do not fit the overload's schema.
    """
    normalized = normalize_function(
        cast(Any, target), cast(Any, tuple(args)), dict(kwargs), normalize_to_only_use_kwargs=True
    )
    if normalized is None:
        raise ValueError(f"{target} does not take {len(args)} positional arguments and {sorted(kwargs)}")
    rank = max((len(shape) for value in normalized.kwargs.values() for shape in _shapes(value)), default=0)
    fields = dict(normalized.kwargs)
    if rank and isinstance(fields.get("dim"), int | list | tuple):
        fields["dim"] = _canonical_dims(fields["dim"], rank)
    return " ".join(f"{name}={_spelled(value)}" for name, value in fields.items())


def shape_key(shape: Sequence[int]) -> str:
    """The key of an operator that a tensor's shape describes, such as `CHANNEL_AFFINE`."""
    return f"input={_times(shape)}"


def bytes_key(num_bytes: int) -> str:
    """The key of a `LAYOUT_COPY` or `WEIGHT_COPY` of a tensor that takes `num_bytes` bytes."""
    return f"bytes={int(num_bytes)}"


def _times(sizes: Sequence[int]) -> str:
    return "x".join(str(int(size)) for size in sizes)


def _shapes(value: object) -> list[Sequence[int]]:
    """The shapes of a tensor or of a list of tensors."""
    values = value if isinstance(value, list | tuple) else [value]
    return [item.shape for item in values if hasattr(item, "shape")]


def _canonical_dims(dims: int | Sequence[int], rank: int) -> int | list[int]:
    return dims % rank if isinstance(dims, int) else sorted(dim % rank for dim in dims)


def _spelled(value: object) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return _times(shape) or "scalar"
    if isinstance(value, list | tuple):
        return f"[{','.join(_spelled(item) for item in value)}]"
    return str(value)
