"""What the values of an argument must be for an operator to accept it, as a table.

Most floating tensors may hold anything. Indices must lie within another argument, variances must be
positive, a pooling's indices must come from that pooling. `RULES` names, for each operator (without its
overload; an operator that works in place is looked up without its underscore) and each argument that is not
free, how to fill it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from benchmarks.operators.inputs.notation import TensorSpec, Value
from benchmarks.torch_internals import OpOverload
from fxpasses.errors import FxpassesError

Arguments: TypeAlias = Mapping[str, object]
"""The arguments of a call by the names of the schema: values of the notation, tensors where made already."""


class UnmaterialisableError(FxpassesError, ValueError):
    """Arguments that cannot be made from a log; the message is the reason."""


@dataclass(frozen=True)
class Below:
    """Integers of at least 0 and below a bound that the other arguments give."""

    bound: Callable[[Arguments], int]


@dataclass(frozen=True)
class Distinct:
    """As `Below`, no index twice along a dimension: writing twice to a place has no defined result."""

    bound: Callable[[Arguments], int]
    dimension: Callable[[Arguments], int]


@dataclass(frozen=True)
class Uniform:
    """Floating values, uniform between two bounds."""

    low: float
    high: float


@dataclass(frozen=True)
class Ascending:
    """Integers that begin with 0, ascend, and stay below a bound: the beginnings of bags."""

    bound: Callable[[Arguments], int]


@dataclass(frozen=True)
class Computed:
    """What another operator computes from the other arguments."""

    value: Callable[[Arguments], torch.Tensor]


@dataclass(frozen=True)
class IndexList:
    """A list with an index tensor, or None, for each dimension of the argument `self`."""


Rule: TypeAlias = Below | Distinct | Uniform | Ascending | Computed | IndexList


def shape_of(arguments: Arguments, name: str) -> tuple[int, ...]:
    """The shape of a tensor argument, made or not.

    Raises:
        UnmaterialisableError: the argument is no tensor.
    """
    value = arguments.get(name)
    if isinstance(value, (TensorSpec, torch.Tensor)):
        return tuple(value.shape)
    raise UnmaterialisableError(f"argument {name!r} should be a tensor, the log has {value!r}")


def integer(arguments: Arguments, name: str) -> int:
    """An integer argument.

    Raises:
        UnmaterialisableError: the argument is no integer.
    """
    value = arguments.get(name)
    if isinstance(value, int):
        return value
    raise UnmaterialisableError(f"argument {name!r} should be an integer, the log has {value!r}")


def _size(name: str, dimension: int) -> Callable[[Arguments], int]:
    """The size of an argument in a dimension, counted from the end where it is missing."""

    def size(arguments: Arguments) -> int:
        shape = shape_of(arguments, name)
        return shape[dimension] if dimension < len(shape) else shape[-1]

    return size


def _along(name: str) -> Callable[[Arguments], int]:
    """The size of an argument in the dimension that the argument `dim` names."""

    def size(arguments: Arguments) -> int:
        shape = shape_of(arguments, name)
        return shape[integer(arguments, "dim")] if shape else 1

    return size


def _value(name: str) -> Callable[[Arguments], int]:
    return lambda arguments: integer(arguments, name)


def _elements(name: str) -> Callable[[Arguments], int]:
    return lambda arguments: math.prod(shape_of(arguments, name))


def _pooling(operator: Callable[..., tuple[torch.Tensor, ...]], *names: str) -> Computed:
    return Computed(lambda arguments: operator(*(arguments[name] for name in names))[1])


def _adaptive_pooling(arguments: Arguments) -> torch.Tensor:
    indices: torch.Tensor = torch.ops.aten.adaptive_max_pool2d(
        arguments["self"], list(shape_of(arguments, "grad_output")[-2:])
    )[1]
    return indices


_POOLING = ("self", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
_POSITIVE = Uniform(0.5, 1.5)
_PROBABILITY = Uniform(0.01, 0.99)
_CLASSES = Below(_size("self", 1))
_ALONG = Below(_along("self"))
_DISTINCT = Distinct(_along("self"), _value("dim"))
_BAGS: dict[str, Rule] = {"indices": Below(_size("weight", 0)), "offsets": Ascending(_elements("indices"))}
_INDICES: dict[str, Rule] = {"indices": IndexList()}

RULES: dict[str, dict[str, Rule]] = {
    # Indices.
    "embedding": {"indices": Below(_size("weight", 0))},
    "embedding_dense_backward": {"indices": Below(_value("num_weights"))},
    "_embedding_bag": _BAGS,
    "_embedding_bag_forward_only": _BAGS,
    "_embedding_bag_per_sample_weights_backward": {**_BAGS, "offset2bag": Below(_size("grad", 0))},
    "gather": {"index": _ALONG},
    "index": _INDICES,
    "_unsafe_index": _INDICES,
    "index_put": _INDICES,
    "_index_put_impl": _INDICES,
    "_unsafe_index_put": _INDICES,
    "index_add": {"index": _ALONG},
    "index_copy": {"index": _DISTINCT},
    "index_fill": {"index": _ALONG},
    "index_reduce": {"index": _ALONG},
    "index_select": {"index": _ALONG},
    "scatter": {"index": _DISTINCT},
    "scatter_add": {"index": _ALONG},
    "scatter_reduce": {"index": _ALONG},
    "take": {"index": Below(_elements("self"))},
    "nll_loss_forward": {"target": _CLASSES},
    "nll_loss_backward": {"target": _CLASSES, "total_weight": _POSITIVE},
    "nll_loss2d_forward": {"target": _CLASSES},
    "nll_loss2d_backward": {"target": _CLASSES, "total_weight": _POSITIVE},
    "max_pool2d_with_indices_backward": {
        "indices": _pooling(torch.ops.aten.max_pool2d_with_indices, *_POOLING)
    },
    "max_pool3d_with_indices_backward": {
        "indices": _pooling(torch.ops.aten.max_pool3d_with_indices, *_POOLING)
    },
    "adaptive_max_pool2d_backward": {"indices": Computed(_adaptive_pooling)},
    # Statistics and domains.
    "native_batch_norm": {"running_var": _POSITIVE},
    "_native_batch_norm_legit": {"running_var": _POSITIVE},
    "_native_batch_norm_legit_functional": {"running_var": _POSITIVE},
    "_native_batch_norm_legit_no_training": {"running_var": _POSITIVE},
    "native_batch_norm_backward": {"running_var": _POSITIVE, "save_invstd": _POSITIVE},
    "cudnn_batch_norm": {"running_var": _POSITIVE},
    "cudnn_batch_norm_backward": {"running_var": _POSITIVE, "save_var": _POSITIVE},
    "native_layer_norm_backward": {"rstd": _POSITIVE},
    "native_group_norm_backward": {"rstd": _POSITIVE},
    "acos": {"self": _PROBABILITY},
    "asin": {"self": _PROBABILITY},
    "atanh": {"self": _PROBABILITY},
    "bernoulli": {"self": _PROBABILITY, "p": _PROBABILITY},
    "binary_cross_entropy": {"self": _PROBABILITY, "target": _PROBABILITY},
    "binary_cross_entropy_backward": {"self": _PROBABILITY, "target": _PROBABILITY},
    "erfinv": {"self": _PROBABILITY},
    "log": {"self": _POSITIVE},
    "log10": {"self": _POSITIVE},
    "log1p": {"self": _POSITIVE},
    "log2": {"self": _POSITIVE},
    "multinomial": {"self": _POSITIVE},
    "pow": {"self": _POSITIVE},
    "rsqrt": {"self": _POSITIVE},
    "sqrt": {"self": _POSITIVE},
}

STATISTICS = frozenset(
    {"mean", "rstd", "running_mean", "running_var", "save_mean", "save_invstd", "save_var"}
)
"""Arguments that CUDA's normalisations keep in float32 when everything else is in half precision."""


def rules_of(operator: OpOverload) -> Mapping[str, Rule]:
    """The rules of an operator's arguments."""
    return RULES.get(base_name(operator), {})


def base_name(operator: OpOverload) -> str:
    """The operator's name without namespace, overload and the underscore of working in place."""
    name = operator._schema.name.partition("::")[2]
    return name if name.startswith("__") else name.rstrip("_")


def bind(operator: OpOverload, args: tuple[Value, ...], kwargs: Mapping[str, Value]) -> dict[str, object]:
    """The arguments by the names of the schema, its defaults filled in.

    Raises:
        UnmaterialisableError: the schema has no such argument, or lacks one that it requires.
    """
    schema = operator._schema.arguments
    if len(args) > len(schema):
        raise UnmaterialisableError(f"{len(args)} positional arguments, the schema has {len(schema)}")
    bound: dict[str, object] = {argument.name: value for argument, value in zip(schema, args, strict=False)}
    bound.update(kwargs)
    unknown = set(bound) - {argument.name for argument in schema}
    if unknown:
        raise UnmaterialisableError(f"no argument is called {sorted(unknown)[0]!r}")
    for argument in schema:
        if argument.name not in bound:
            if not argument.has_default_value():
                raise UnmaterialisableError(f"argument {argument.name!r} is missing")
            bound[argument.name] = argument.default_value
    return bound
