"""Labels and taxonomy: which operators care about the layout of a 4-D or 5-D tensor, as one table.

What an operator does with labels depends on its `Kind`. Those that force are in `forced`, with the reason; an
operator that neither table knows forces too, and is listed in the plan. The keys are base names, without
namespace, overload and trailing underscore, so that `aten.conv2d.padding`, `torch.conv2d` and an `nn.Conv2d`
that is called are one row. `coverage` writes both as a page.
"""

from __future__ import annotations

import enum
import functools
import re

import torch
from torch.fx import Node

from fxpasses.graph.levels import attribute
from fxpasses.graph.metadata import tensor
from fxpasses.graph.names import base_name
from fxpasses.passes.layout.forced import reason_of
from fxpasses.torch_internals.operators import OpOverload


class Kind(enum.Enum):
    """What an operator does with layouts."""

    PREFERRING = "has a cost under each label, and kernels of its own for each"
    AGNOSTIC = "computes elementwise or along dimensions: inputs and outputs share one label, at no cost"
    COSTED = "inputs and outputs share one label, at a cost that may differ"
    REDUCING = "as costed; a kernel that leaves an order gives the traced one, generated code either"
    SLICING = "a view of a part, which keeps the order of the dimensions"
    STACKING = "lays tensors of one label side by side in a new dimension before one of theirs"
    PERMUTING = "a view that renames the dimensions"
    VIEWING = "a view of other sizes: free if it glues only what are neighbours in both layouts, else forcing"
    EXPANDING = "a view that repeats without memory: generated code reads any strides, else forcing"
    GATHERING = "reaches elements by their places: generated code works in either label, a kernel absorbs"
    ABSORBING = "reads any strides at no cost, and gives those of the traced graph"
    COPYING = "a copy that the graph already makes, to a given or to the same layout"
    GENERATING = "makes a tensor from nothing"
    MEASURING = "reads the sizes or the type of a tensor, and never what lies where"
    FORCING = "reads and gives the strides of the traced graph"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _rows(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


INDEXING = frozenset(
    (
        *("_unsafe_index", "_unsafe_index_put", "gather", "grid_sampler_2d", "grid_sampler_3d", "index"),
        *("index_add", "index_copy", "index_put", "index_reduce", "index_select", "scatter", "scatter_add"),
        *("masked_scatter", "scatter_reduce", "take_along_dim"),
    )
)
"""Operators that reach into a tensor at computed places. What inductor generates for one on a GPU lies
contiguous, and walks its operands in that order, however they lie; on a CPU it takes channels as a vector."""

GROUP_NORMS = frozenset(("group_norm", "native_group_norm", "native_group_norm_backward"))

FOLLOWING = _names(
    """channel_shuffle fft_fftshift fft_ifftshift max_unpool2d native_channel_shuffle pad reflection_pad2d
    reflection_pad2d_backward reflection_pad3d reflection_pad3d_backward replication_pad2d
    replication_pad2d_backward replication_pad3d replication_pad3d_backward roll"""
)
"""Operators whose kernels for CPUs give a channels-last result for a channels-last operand, where torch's
metadata (some of 2.11 to 2.15) say contiguous. Compiled code that asserts what metadata say would fail."""

OPERATORS: dict[str, Kind] = {
    **_rows(
        Kind.PREFERRING,
        "convolution _convolution conv2d conv3d conv_transpose2d conv_transpose3d convolution_backward",
    ),
    **_rows(
        Kind.AGNOSTIC,
        """_prelu_kernel _prelu_kernel_backward abs absolute acos acosh add addcdiv addcmul alias and arccos
        arccosh arcsin arcsinh arctan arctan2 arctanh argsort asin asinh atan atan2 atanh bessel_i0
        bessel_i0e bessel_i1 bessel_i1e bessel_j0 bessel_j1 binary_cross_entropy
        binary_cross_entropy_backward binary_cross_entropy_with_logits bitwise_and bitwise_left_shift
        bitwise_not bitwise_or bitwise_right_shift bitwise_xor cbrt ceil celu clamp clamp_max clamp_min clip
        constant_pad_nd convert_element_type copysign cos cosh deg2rad detach device_put diff digamma div
        divide dropout2d dropout3d elu elu_backward empty_like eq erf erf_inv erfc erfcx erfinv exp exp2
        expm1 feature_alpha_dropout feature_dropout fft_fftshift fft_ifftshift fill fix flip fliplr flipud
        float_power floor floor_divide fma fmax fmin fmod frac frexp full_like gaussian_nll_loss gcd ge gelu
        gelu_backward glu greater greater_equal gt hardshrink hardshrink_backward hardsigmoid
        hardsigmoid_backward hardswish hardswish_backward hardtanh hardtanh_backward heaviside huber_loss
        huber_loss_backward hypot i0 iadd iand identity igamma igammac ilshift imul index_fill index_put
        infinitely_differentiable_gelu_backward ior irshift isclose isfinite isinf isnan isneginf isposinf
        isreal isub itruediv ixor kl_div l1_loss lcm ldexp le leaky_relu leaky_relu_backward lerp less
        less_equal lgamma lift lift_fresh lift_fresh_copy log log10 log1p log2 log_sigmoid
        log_sigmoid_backward log_sigmoid_forward logaddexp logaddexp2 logical_and logical_not logical_or
        logical_xor logit logit_backward logsigmoid lshift lt masked_fill maximum minimum mish mish_backward
        mse_loss mse_loss_backward msort mul multiply nan_to_num ndtri ne neg negative nextafter normalize
        not_equal ones_like or poisson_nll_loss polygamma positive pow prelu rad2deg reciprocal relu relu6
        remainder rev rms_norm roll round rshift rsqrt rsub select_scatter selu sgn shift_left
        shift_right_arithmetic sigmoid sigmoid_backward sign signbit silu silu_backward sin sinc sinh
        slice_scatter smooth_l1_loss smooth_l1_loss_backward soft_margin_loss soft_margin_loss_backward
        softplus softplus_backward softshrink softshrink_backward softsign sort spherical_bessel_j0 sqrt
        square sub subtract tan tanh tanh_backward tanhshrink threshold threshold_backward true_divide
        truediv trunc type_as view_of where xlogy xor zero zeros_like zeta""",
    ),
    **_rows(
        Kind.COSTED,
        """_adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d
        _adaptive_avg_pool3d_backward _batch_norm_with_update _batch_norm_with_update_functional
        _low_memory_max_pool_offsets_to_indices _low_memory_max_pool_with_offsets _native_batch_norm_legit
        _native_batch_norm_legit_functional _native_batch_norm_legit_no_training _unsafe_index
        _upsample_bicubic2d_aa _upsample_bicubic2d_aa_backward _upsample_bilinear2d_aa
        _upsample_bilinear2d_aa_backward _upsample_lanczos2d_aa _upsample_lanczos2d_aa_backward
        _upsample_nearest_exact2d _upsample_nearest_exact2d_backward _upsample_nearest_exact3d
        _upsample_nearest_exact3d_backward adaptive_avg_pool2d adaptive_avg_pool3d
        adaptive_avg_pool3d_backward adaptive_max_pool2d adaptive_max_pool2d_backward
        adaptive_max_pool2d_with_indices adaptive_max_pool3d adaptive_max_pool3d_backward
        adaptive_max_pool3d_with_indices avg_pool2d avg_pool2d_backward avg_pool3d avg_pool3d_backward
        batch_norm cat channel_shuffle concat concatenate dstack group_norm hstack index interpolate
        local_response_norm lp_pool2d lp_pool3d max_pool2d max_pool2d_with_indices
        max_pool2d_with_indices_backward max_pool3d max_pool3d_with_indices max_pool3d_with_indices_backward
        max_unpool2d native_batch_norm native_batch_norm_backward native_channel_shuffle native_group_norm
        native_group_norm_backward pad pixel_unshuffle reflection_pad2d reflection_pad2d_backward
        reflection_pad3d reflection_pad3d_backward replication_pad2d replication_pad2d_backward
        replication_pad3d replication_pad3d_backward upsample upsample_bicubic2d upsample_bicubic2d_backward
        upsample_bilinear upsample_bilinear2d upsample_bilinear2d_backward upsample_nearest
        upsample_nearest2d upsample_nearest2d_backward upsample_nearest3d upsample_nearest3d_backward
        upsample_trilinear3d upsample_trilinear3d_backward vstack""",
    ),
    **_rows(
        Kind.REDUCING,
        """all amax amin any argmax argmin count_nonzero logsumexp max mean min nanmean nansum prod std
        std_mean sum var var_mean""",
    ),
    **_rows(
        Kind.SLICING,
        """chunk narrow select slice split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split
        unsafe_split_with_sizes""",
    ),
    **_rows(Kind.STACKING, "stack"),
    **_rows(Kind.PERMUTING, "moveaxis movedim permute swapaxes swapdims t transpose"),
    **_rows(
        Kind.VIEWING,
        "_unsafe_view flatten ravel reshape reshape_as squeeze unflatten unsqueeze view view_as",
    ),
    **_rows(Kind.EXPANDING, "broadcast_to expand expand_as"),
    **_rows(
        Kind.GATHERING,
        """gather index_add index_copy index_reduce index_select masked_scatter repeat repeat_interleave
        scatter scatter_add scatter_reduce select_backward slice_backward take_along_dim tile tril triu""",
    ),
    **_rows(
        Kind.ABSORBING,
        """_aminmax _cummax_helper _cummin_helper _log_softmax _log_softmax_backward_data _logcumsumexp
        _pad_circular _safe_softmax _softmax _softmax_backward_data addmm aminmax baddbmm bmm bucketize
        col2im cosine_similarity cross_entropy cross_entropy_loss cummax cummin cumprod cumsum fold
        fractional_max_pool2d fractional_max_pool2d_backward fractional_max_pool2d_with_indices
        fractional_max_pool3d fractional_max_pool3d_backward fractional_max_pool3d_with_indices
        frobenius_norm glu_backward grid_sample grid_sampler grid_sampler_2d grid_sampler_2d_backward
        grid_sampler_3d grid_sampler_3d_backward im2col instance_norm kthvalue layer_norm linalg_vector_norm
        linear log_softmax logcumsumexp matmul max_unpool3d median mm mode nanmedian native_layer_norm
        new_empty new_full new_ones new_zeros nll_loss nll_loss2d nll_loss2d_forward nll_loss_nd norm
        pairwise_distance pixel_shuffle renorm searchsorted softmax softmin special_log_softmax
        special_softmax topk""",
    ),
    **_rows(Kind.COPYING, "_to_copy clone contiguous"),
    **_rows(Kind.GENERATING, "empty full ones zeros"),
    **_rows(
        Kind.MEASURING,
        """dim element_size get_device is_complex is_floating_point is_same_size is_signed len ndimension
        nelement numel size sym_numel sym_size""",
    ),
}  # fmt: skip
"""The taxonomy of what does not force. What does is in `forced`, with the reason."""

ELEMENTWISE = r"special_(?!log_softmax|logsumexp|multigammaln|softmax)\w+"
"""The names of a family of functions of single elements, which has some sixty members."""

_MEASURES = ("device", "dtype", "ndim", "shape")
"""Attributes of a tensor that are the same in every layout."""

_CONVERSIONS = _names("bfloat16 bool byte char cpu cuda double float half int long short to")
"""Methods that give a tensor of another type or on another device, and maybe in a memory format."""


def kind_of(node: Node) -> Kind | None:
    """The operator's row in the table; None where it has none."""
    if not _is_torch_s(node):
        return None
    name = base_name(node)
    decide = _BY_ARGUMENTS.get(name)
    return row_of(name) if decide is None else decide(node)


def _is_torch_s(node: Node) -> bool:
    """Whether an operator is one of torch or Python, and not a user's that is called like one."""
    owner = node.graph.owning_module
    if node.op == "call_module" and owner is not None:
        return type(attribute(owner, str(node.target))).__module__.startswith("torch.nn.modules")
    module = getattr(node.target, "__module__", None) if node.op == "call_function" else None
    return module is None or module.partition(".")[0] in _MODULES


_MODULES = ("torch", "_operator", "math", "builtins")


@functools.lru_cache(maxsize=4096)
def row_of(name: str) -> Kind | None:
    """The row of an operator, by its base name; None where it has none."""
    if name in OPERATORS:
        return OPERATORS[name]
    if name in _CONVERSIONS or re.fullmatch(ELEMENTWISE, name):
        return Kind.AGNOSTIC
    return Kind.FORCING if reason_of(name) is not None else None


def is_generated(node: Node) -> bool:
    """Whether inductor writes a loop on a CPU for an operator of ATen, which reads and writes any layout.

    Where the result lies is inductor's choice: as a kernel that it calls needs it, else as what is read lies.
    A pooling may be such a loop or a call of ATen's kernel, and is not counted.
    """
    name = base_name(node)
    if not isinstance(node.target, OpOverload) or name in _CALLED or re.fullmatch(ELEMENTWISE, name):
        return False
    return name in _LOOPS or kind_of(node) in (Kind.AGNOSTIC, Kind.GENERATING, Kind.COPYING)


_LOOPS = ("_unsafe_index", "cat")

_CALLED = _names("argsort digamma gcd igamma igammac msort polygamma soft_margin_loss_backward sort")
"""Agnostic operators for which inductor calls ATen's kernel, as it does for most special functions."""


def _argument(node: Node, position: int, *names: str) -> object:
    """An argument by its names, or by its position; None where it is not given."""
    given = next((node.kwargs[name] for name in names if name in node.kwargs), None)
    return given if given is not None or len(node.args) <= position else node.args[position]


def _attribute(node: Node) -> Kind | None:
    return Kind.MEASURING if node.args[1:2] and node.args[1] in _MEASURES else None


def _dropout(node: Node) -> Kind:
    """Whether a dropout drops: as its third argument or the mode of its module says."""
    drops = _argument(node, 2, "training", "train")
    owner = node.graph.owning_module
    if node.op == "call_module" and owner is not None:
        drops = getattr(attribute(owner, str(node.target)), "training", True)
    return Kind.AGNOSTIC if drops is False else Kind.FORCING


def _conversion(node: Node) -> Kind:
    kept = node.kwargs.get("memory_format") in (None, torch.preserve_format)
    return Kind.AGNOSTIC if kept and not any(_is_format(given) for given in node.args) else Kind.FORCING


def _is_format(given: object) -> bool:
    return isinstance(given, torch.memory_format) and given is not torch.preserve_format


def _padding(node: Node) -> Kind:
    """Pixels that come around again are copied into a contiguous tensor; the rest follows the operand."""
    return Kind.ABSORBING if _argument(node, 2, "mode") == "circular" else Kind.COSTED


def _extremum(node: Node) -> Kind:
    """Of two tensors element by element, or of one along its dimensions."""
    return Kind.AGNOSTIC if isinstance(_argument(node, 1, "other"), Node) else Kind.REDUCING


def _product(node: Node) -> Kind:
    """Where the second operand has more dimensions, the strides of the result depend on those of both."""
    ranks = [found.dim() if found is not None else 0 for found in map(tensor, node.all_input_nodes)]
    return Kind.ABSORBING if len(ranks) == 2 and ranks[0] >= ranks[1] else Kind.FORCING


_POINTS = (type(None), type(Ellipsis))


def _copy(node: Node) -> Kind:
    """What one tensor has, as a new tensor like another; or written into that."""
    return Kind.AGNOSTIC if node.target is torch.ops.aten.copy.default else Kind.FORCING


def _item(node: Node) -> Kind | None:
    """A part of a tensor, by slices, numbers and new dimensions."""
    if tensor(node.args[0]) is None:
        return None
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    is_part = all(
        type(given) is int or given in (None, Ellipsis) or isinstance(given, slice) for given in index
    )
    return Kind.SLICING if is_part else None


_BY_ARGUMENTS = {
    "getattr": _attribute,
    "getitem": _item,
    "copy": _copy,
    "dropout": _dropout,
    "matmul": _product,
    "max": _extremum,
    "min": _extremum,
    "pad": _padding,
    **dict.fromkeys(_CONVERSIONS, _conversion),
}
"""Operators whose row depends on what they are given."""
