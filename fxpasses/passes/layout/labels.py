"""Labels and taxonomy: which operators care about the layout of a 4-D or 5-D tensor, as one table.

A tensor's label says in which order its dimensions lie in memory, whatever its strides are otherwise:

    C  contiguous      N C D H W
    L  channels_last   N D H W C

A tensor whose two orders coincide (one channel, or a single position) has no label: it suits everybody.
What an operator does with labels depends on its `Kind`; an operator that the table does not know is forcing,
and is listed in the plan. The keys are base names, without namespace, overload and trailing underscore, so
that `aten.conv2d.padding`, `torch.conv2d` and an `nn.Conv2d` that is called are one row.
"""

from __future__ import annotations

import enum
import functools
import operator
import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch.fx import Node

from fxpasses.graph.levels import attribute
from fxpasses.torch_internals.operators import OpOverload, OpOverloadPacket, operator_name
from fxpasses.torch_internals.sizes import size_hint

Label = Literal["contiguous", "channels_last"]
C: Label = "contiguous"
L: Label = "channels_last"
Order = Literal["contiguous", "channels_last", "both", "other"]
Frame = tuple[int, ...]
"""Which logical dimension (of N, C, *spatial) each dimension of a value stands for."""


class Kind(enum.Enum):
    """What an operator does with layouts."""

    PREFERRING = "has a cost under each label, and kernels of its own for each"
    AGNOSTIC = "computes elementwise: inputs and outputs share one label, at no cost"
    COSTED = "inputs and outputs share one label, at a cost that may differ"
    REDUCING = "as costed, where what remains has no label"
    SLICING = "a view that keeps the order of the dimensions"
    PERMUTING = "a view that renames the dimensions"
    COPYING = "a copy that the graph already makes, to a given or to the same layout"
    GENERATING = "makes a tensor from nothing"
    MEASURING = "reads the sizes or the type of a tensor, and never what lies where"
    FORCING = "reads and gives the strides of the traced graph"


def _rows(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


INDEXING = frozenset(
    (
        *("_unsafe_index", "_unsafe_index_put", "gather", "grid_sampler_2d", "grid_sampler_3d", "index"),
        *("index_add", "index_put", "index_select", "scatter", "scatter_add", "scatter_reduce"),
    )
)
"""Operators that reach into a tensor at computed places. What inductor generates for one on a GPU lies
contiguous, and walks its operands in that order, however they lie; on a CPU it takes channels as a vector."""

OPERATORS: dict[str, Kind] = {
    **_rows(
        Kind.PREFERRING,
        "convolution _convolution conv2d conv3d conv_transpose2d conv_transpose3d convolution_backward",
    ),
    **_rows(
        Kind.AGNOSTIC,
        """abs acos acosh add addcdiv addcmul alias asin asinh atan atan2 atanh bitwise_and bitwise_not
        bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clip constant_pad_nd
        convert_element_type cos cosh detach div divide elu elu_backward eq erf erfc exp exp2 expm1 fill
        floor floor_divide fma fmod frac full_like ge gelu gelu_backward gt hardsigmoid
        hardsigmoid_backward hardswish hardswish_backward hardtanh hardtanh_backward identity isinf isnan
        le leaky_relu leaky_relu_backward lerp lift_fresh_copy log log10 log1p log2 log_sigmoid
        logical_and logical_not logical_or logical_xor lt masked_fill maximum minimum mish mish_backward
        mul multiply ne neg nan_to_num ones_like pow reciprocal relu relu6 remainder round rsqrt rsub selu
        sigmoid sigmoid_backward sign silu silu_backward sin sinh softplus softplus_backward sqrt square
        sub subtract tan tanh tanh_backward threshold threshold_backward truediv trunc where xlogy
        zeros_like iadd imul isub itruediv empty_like""",
    ),
    **_rows(
        Kind.COSTED,
        """_adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d
        _adaptive_avg_pool3d_backward _batch_norm_with_update _batch_norm_with_update_functional
        _low_memory_max_pool_offsets_to_indices _low_memory_max_pool_with_offsets _native_batch_norm_legit
        _native_batch_norm_legit_functional _native_batch_norm_legit_no_training _unsafe_index
        adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d avg_pool2d
        avg_pool2d_backward avg_pool3d avg_pool3d_backward batch_norm cat max_pool2d
        max_pool2d_with_indices max_pool2d_with_indices_backward max_pool3d max_pool3d_with_indices
        max_pool3d_with_indices_backward native_batch_norm native_batch_norm_backward upsample_bilinear2d
        upsample_bilinear2d_backward upsample_nearest2d upsample_nearest2d_backward upsample_nearest3d
        upsample_nearest3d_backward upsample_trilinear3d upsample_trilinear3d_backward""",
    ),
    **_rows(Kind.REDUCING, "all amax amin any mean prod std sum var var_mean"),
    **_rows(Kind.SLICING, "chunk narrow slice split split_with_sizes unsafe_split"),
    **_rows(Kind.PERMUTING, "permute"),
    **_rows(Kind.COPYING, "_to_copy clone contiguous"),
    **_rows(Kind.GENERATING, "full ones zeros"),
    **_rows(Kind.MEASURING, "dim is_floating_point numel size sym_numel sym_size"),
    **_rows(
        Kind.FORCING,
        """_adaptive_avg_pool1d _assert_tensor_metadata _fused_rms_norm _softmax _unsafe_view addmm
        as_strided baddbmm bmm channel_shuffle copy copy_ cumsum dropout embedding expand flatten flip
        force_strides group_norm inductor_force_stride_order instance_norm layer_norm linear log_softmax
        matmul mm movedim native_dropout
        native_group_norm native_group_norm_backward native_layer_norm native_layer_norm_backward
        pixel_shuffle pixel_unshuffle repeat reshape roll scaled_dot_product_attention select
        slice_backward slice_scatter softmax squeeze stack t to transpose unbind unflatten unsqueeze
        upsample_bicubic2d upsample_bicubic2d_backward view view_as""",
    ),
    **dict.fromkeys(INDEXING - {"_unsafe_index"}, Kind.FORCING),
}  # fmt: skip
"""The taxonomy. Random operators are forcing: the numbers they draw follow the order in memory."""

_MEASURES = ("device", "dtype", "ndim", "shape")
"""Attributes of a tensor that are the same in every layout."""

_MODULES = {
    "AdaptiveAvgPool2d": "adaptive_avg_pool2d",
    "AdaptiveAvgPool3d": "adaptive_avg_pool3d",
    "AvgPool2d": "avg_pool2d",
    "AvgPool3d": "avg_pool3d",
    "BatchNorm2d": "batch_norm",
    "BatchNorm3d": "batch_norm",
    "Conv2d": "conv2d",
    "Conv3d": "conv3d",
    "ConvTranspose2d": "conv_transpose2d",
    "ConvTranspose3d": "conv_transpose3d",
    "Flatten": "flatten",
    "GELU": "gelu",
    "Hardsigmoid": "hardsigmoid",
    "Hardswish": "hardswish",
    "Identity": "identity",
    "LeakyReLU": "leaky_relu",
    "Linear": "linear",
    "MaxPool2d": "max_pool2d",
    "MaxPool3d": "max_pool3d",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
}
"""Modules of torch.nn that are called whole in a graph from `torch.fx.symbolic_trace`."""


def operator_of(node: Node) -> str:
    """The operator's base name, the same at every capture level; for the rest its FX kind."""
    target = node.target
    if node.op == "call_module":
        owner = node.graph.owning_module
        module = attribute(owner, str(target)) if owner is not None else None
        known = type(module).__module__.startswith("torch.nn.modules")
        return _MODULES.get(type(module).__name__, type(module).__name__) if known else str(target)
    if node.op == "call_method":
        return _base(str(target))
    if node.op != "call_function":
        return node.op
    if isinstance(target, OpOverload):
        return _overload_base(target)
    if isinstance(target, OpOverloadPacket):
        return _base(target.__name__)
    return _base(getattr(target, "__name__", str(target)))


def kind_of(node: Node) -> Kind | None:
    """The operator's row in the table; None where it has none."""
    name = operator_of(node)
    if name == "getattr" and node.args[1:2] and node.args[1] in _MEASURES:
        return Kind.MEASURING
    return Kind.AGNOSTIC if name == "dropout" and not _draws(node) else OPERATORS.get(name)


def order_of(tensor: torch.Tensor, frame: Frame | None = None) -> Order:
    """In which order the dimensions lie in memory; dimensions of size 1 do not count.

    Symbolic sizes are read at their hints, without a guard.

    Args:
        tensor: of 4 or 5 dimensions; of any other number it has no order that counts (``"both"``).
        frame: which logical dimension each of its dimensions stands for; None for N, C, *spatial.
    """
    if tensor.layout is not torch.strided:
        return "both" if tensor.dim() not in (4, 5) else "other"
    return order_of_strides(tensor.shape, tensor.stride(), frame)


def order_of_strides(
    sizes: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt], frame: Frame | None = None
) -> Order:
    """`order_of` for a tensor of these sizes and strides."""
    if len(sizes) not in (4, 5):
        return "both"
    try:
        return _order(sizes, strides, frame)
    except TypeError:  # symbolic sizes have no hash
        return _order.__wrapped__(sizes, strides, frame)


@functools.lru_cache(maxsize=4096)
def _order(
    sizes: Sequence[int | torch.SymInt], strides: Sequence[int | torch.SymInt], frame: Frame | None
) -> Order:
    rank = len(sizes)
    logical = sorted(range(rank), key=frame.__getitem__) if frame else list(range(rank))
    kept = [d for d in logical if not is_one(sizes[d])]
    channels = logical[1]
    last = [d for d in kept if d != channels] + ([channels] if channels in kept else [])
    if _descends([size_hint(strides[d]) for d in kept]):
        return "both" if kept == last else C
    return L if kept != last and _descends([size_hint(strides[d]) for d in last]) else "other"


def is_one(size: int | torch.SymInt) -> bool:
    """Whether a size is 1 for certain; a symbolic one never is."""
    return isinstance(size, int) and size == 1


def memory_format(label: Label, rank: int) -> torch.memory_format:
    """What torch calls the label, for a tensor of `rank` dimensions (4 or 5)."""
    if label == C:
        return torch.contiguous_format
    return torch.channels_last if rank == 4 else torch.channels_last_3d


def to_channels_last(rank: int) -> Frame:
    """The permutation from N, C, *spatial to N, *spatial, C."""
    return (0, *range(2, rank), 1)


def composed(frame: Frame, dims: Sequence[int]) -> Frame:
    """The frame of a permuted view."""
    return tuple(frame[d % len(frame)] for d in dims)


def _descends(strides: Sequence[int]) -> bool:
    return 0 not in strides and all(map(operator.ge, strides, strides[1:]))


@functools.lru_cache(maxsize=4096)
def _overload_base(target: OpOverload) -> str:
    namespace, _, name = operator_name(target).partition("::")
    base = _base(name.partition(".")[0])
    return base if namespace in ("aten", "prims", "inductor") else f"{namespace}.{base}"


@functools.lru_cache(maxsize=4096)
def _base(name: str) -> str:
    # `__add__`, `add_` and `add` are one operator; `_softmax` and `softmax` are two.
    return re.sub(r"(?<=[a-z0-9])_+$", "", re.sub(r"^__(\w+)__$", r"\1", name))


def _draws(node: Node) -> bool:
    """Whether a dropout drops: its third argument, `train` or `training`, decides."""
    given = node.kwargs.get(
        "training", node.kwargs.get("train", node.args[2] if len(node.args) > 2 else True)
    )
    return given is not False
