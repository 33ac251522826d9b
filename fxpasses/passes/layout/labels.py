"""Labels and taxonomy: which operators care about the layout of a 4-D or 5-D tensor, as one table.

What an operator does with labels depends on its `Kind`; an operator that the table does not know is forcing,
and is listed in the plan. The keys are base names, without namespace, overload and trailing underscore, so
that `aten.conv2d.padding`, `torch.conv2d` and an `nn.Conv2d` that is called are one row.
"""

from __future__ import annotations

import enum

from torch.fx import Node

from fxpasses.graph.metadata import tensor
from fxpasses.graph.names import base_name
from fxpasses.torch_internals.operators import OpOverload
from fxpasses.torch_internals.sizes import size_expression


class Kind(enum.Enum):
    """What an operator does with layouts."""

    PREFERRING = "has a cost under each label, and kernels of its own for each"
    AGNOSTIC = "computes elementwise: inputs and outputs share one label, at no cost"
    COSTED = "inputs and outputs share one label, at a cost that may differ"
    REDUCING = "as costed, where what remains has no label"
    SLICING = "a view of a part, which keeps the order of the dimensions"
    PERMUTING = "a view that renames the dimensions"
    VIEWING = "a view of other sizes: free if it glues only what are neighbours in both layouts, else forcing"
    ABSORBING = "reads any strides at no cost, and gives those of the traced graph"
    COPYING = "a copy that the graph already makes, to a given or to the same layout"
    GENERATING = "makes a tensor from nothing"
    MEASURING = "reads the sizes or the type of a tensor, and never what lies where"
    FORCING = "reads and gives the strides of the traced graph"


VIEWS = (Kind.PERMUTING, Kind.SLICING, Kind.VIEWING)
"""Those of views."""


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

GROUP_NORMS = frozenset(("group_norm", "native_group_norm", "native_group_norm_backward"))

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
        flip floor floor_divide fma fmod frac full_like ge gelu gelu_backward gt hardsigmoid
        hardsigmoid_backward hardswish hardswish_backward hardtanh hardtanh_backward identity isinf isnan
        le leaky_relu leaky_relu_backward lerp lift_fresh_copy log log10 log1p log2 log_sigmoid
        logical_and logical_not logical_or logical_xor lt masked_fill maximum minimum mish mish_backward
        mul multiply ne neg nan_to_num ones_like pow prelu reciprocal relu relu6 remainder rev round rsqrt
        rsub selu sigmoid sigmoid_backward sign silu silu_backward sin sinh slice_scatter softplus
        softplus_backward sqrt square sub subtract tan tanh tanh_backward threshold threshold_backward
        truediv trunc where xlogy zeros_like iadd imul isub itruediv empty_like""",
    ),
    **_rows(
        Kind.COSTED,
        """_adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d
        _adaptive_avg_pool3d_backward _batch_norm_with_update _batch_norm_with_update_functional
        _low_memory_max_pool_offsets_to_indices _low_memory_max_pool_with_offsets _native_batch_norm_legit
        _native_batch_norm_legit_functional _native_batch_norm_legit_no_training _unsafe_index
        adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d avg_pool2d
        avg_pool2d_backward avg_pool3d avg_pool3d_backward batch_norm cat group_norm max_pool2d
        max_pool2d_with_indices max_pool2d_with_indices_backward max_pool3d max_pool3d_with_indices
        max_pool3d_with_indices_backward native_batch_norm native_batch_norm_backward upsample_bilinear2d
        upsample_bilinear2d_backward upsample_nearest2d upsample_nearest2d_backward upsample_nearest3d
        upsample_nearest3d_backward upsample_trilinear3d upsample_trilinear3d_backward""",
    ),
    **_rows(
        Kind.REDUCING,
        "all amax amin any argmax argmin count_nonzero logsumexp mean prod std sum var var_mean",
    ),
    **_rows(Kind.SLICING, "chunk narrow select slice split split_with_sizes unbind unsafe_split"),
    **_rows(Kind.PERMUTING, "movedim permute swapaxes swapdims t transpose"),
    **_rows(Kind.VIEWING, "_unsafe_view flatten reshape squeeze unflatten unsqueeze view view_as"),
    **_rows(Kind.ABSORBING, "_log_softmax _softmax addmm baddbmm bmm cumprod cumsum log_softmax mm softmax"),
    **_rows(Kind.COPYING, "_to_copy clone contiguous"),
    **_rows(Kind.GENERATING, "full ones zeros"),
    **_rows(Kind.MEASURING, "dim is_floating_point numel size sym_numel sym_size"),
    **_rows(
        Kind.FORCING,
        """_adaptive_avg_pool1d _assert_tensor_metadata _fused_rms_norm
        as_strided channel_shuffle copy copy_ dropout embedding expand
        force_strides inductor_force_stride_order instance_norm layer_norm linear
        matmul native_dropout native_layer_norm native_layer_norm_backward
        pixel_shuffle pixel_unshuffle repeat roll scaled_dot_product_attention
        slice_backward stack to
        upsample_bicubic2d upsample_bicubic2d_backward""",
    ),
    **dict.fromkeys(INDEXING - {"_unsafe_index"}, Kind.FORCING),
}  # fmt: skip
"""The taxonomy. Random operators are forcing: the numbers they draw follow the order in memory."""

_MEASURES = ("device", "dtype", "ndim", "shape")
"""Attributes of a tensor that are the same in every layout."""


def kind_of(node: Node) -> Kind | None:
    """The operator's row in the table; None where it has none."""
    name = base_name(node)
    if name == "getattr" and node.args[1:2] and node.args[1] in _MEASURES:
        return Kind.MEASURING
    if name == "expand" and _keeps_sizes(node):
        return Kind.VIEWING
    return Kind.AGNOSTIC if name == "dropout" and not _draws(node) else OPERATORS.get(name)


def is_generated(node: Node) -> bool:
    """Whether inductor writes a loop for an operator of ATen, which reads and writes memory in any layout.

    Where the result lies is inductor's choice: as a kernel that it calls needs it, else as what is read lies.
    A pooling may be such a loop or a call of ATen's kernel, and is not counted.
    """
    is_loop = kind_of(node) in (Kind.AGNOSTIC, Kind.GENERATING, Kind.COPYING) or base_name(node) in _LOOPS
    return is_loop and isinstance(node.target, OpOverload)


_LOOPS = ("_unsafe_index", "cat")


def _keeps_sizes(node: Node) -> bool:
    """Whether a view has the sizes of what it views, as that to a batch of one in front of a product."""
    given, found = tensor(node.args[0] if node.args else node.kwargs.get("self")), tensor(node)
    if given is None or found is None or given.dim() != found.dim():
        return False
    pairs = zip(given.shape, found.shape, strict=True)
    return all(size_expression(before) == size_expression(after) for before, after in pairs)


def _draws(node: Node) -> bool:
    """Whether a dropout drops: its third argument, `train` or `training`, decides."""
    given = node.kwargs.get(
        "training", node.kwargs.get("train", node.args[2] if len(node.args) > 2 else True)
    )
    return given is not False
