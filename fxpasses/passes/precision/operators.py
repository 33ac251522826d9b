"""Which operators compute in a lower precision, and which follow what they read."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph.effects import is_described, parameters_of
from fxpasses.graph.metadata import tensor
from fxpasses.graph.names import base_name
from fxpasses.graph.schema import signature_of_overload
from fxpasses.torch_internals.operators import HigherOrderOperator, OpOverload
from fxpasses.torch_internals.pytree import tree_leaves

_PRODUCTS = frozenset(
    {
        "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "convolution", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention",
    }
)  # fmt: skip
"""Sums of products, which kernels add up in float32 whatever they read."""

_WHOLE_LAYERS = frozenset(
    {"lstm", "gru", "rnn_tanh", "rnn_relu", "_transformer_encoder_layer_fwd", "_native_multi_head_attention"}
)

_ATTENTION_LAYER = "multi_head_attention_forward"
"""Linear layers and an attention, of `nn.MultiheadAttention`; the other whole layers have more in between."""

_ACTIVATIONS = frozenset(
    {
        "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "leaky_relu", "elu", "selu",
        "celu", "gelu", "silu", "mish", "sigmoid", "tanh", "hardsigmoid", "hardswish", "softplus", "glu",
        "abs", "neg",
    }
)  # fmt: skip

_ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div", "truediv", "maximum", "minimum"})

_POOLING = frozenset(
    f"{kind}_pool{spatial}d"
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
    for spatial in (1, 2, 3)
)

_RESAMPLING = frozenset(
    {
        "interpolate", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
        "upsample_bilinear2d", "upsample_trilinear3d", "upsample_linear1d", "upsample_bicubic2d",
    }
)  # fmt: skip

_MOVEMENT = frozenset(
    {
        "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "movedim", "moveaxis",
        "swapaxes", "swapdims", "squeeze", "unsqueeze", "expand", "getitem", "select", "narrow", "slice",
        "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "contiguous", "clone", "detach",
        "roll", "flip", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "pad", "constant_pad_nd",
        "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
        "replication_pad3d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "repeat", "tile",
        "unfold",
    }
)  # fmt: skip

_DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"})

_FOLLOWERS = frozenset().union(_ACTIVATIONS, _ARITHMETIC, _POOLING, _RESAMPLING, _MOVEMENT, _DROPOUTS)

_SIZES = frozenset({"size", "dim", "numel", "sym_size", "sym_numel"})


def is_product(node: Node) -> bool:
    """Whether a node is a convolution, a linear layer, a matrix product or attention made of two of these."""
    return _name(node) in _PRODUCTS or _is_attention_layer(node)


def is_whole_layer(node: Node) -> bool:
    """Whether a node computes products and more in one call, such as a softmax between two of them."""
    name = _name(node)
    return name in _WHOLE_LAYERS or (name == _ATTENTION_LAYER and not _is_attention_layer(node))


def follows(node: Node) -> bool:
    """Whether a node moves numbers, or rounds each of its results once, as an activation does.

    Such an operator may compute in whatever precision all that it reads has. One that draws random numbers,
    that is told a type, or a number that bfloat16 does not hold, does not follow.
    """
    name = _name(node)
    if name not in _FOLLOWERS or not fits(node):
        return False
    if name in _DROPOUTS:
        return draws_nothing(node)
    return not (name == "interpolate" and node.kwargs.get("antialias"))


def fits(node: Node) -> bool:
    """Whether a call names no type, and no number that is infinite in bfloat16 alone."""
    return all(map(_fits, tree_leaves((node.args, node.kwargs))))


def reads_sizes(node: Node) -> bool:
    """Whether a node reads of a tensor what does not depend on its precision."""
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device")
    return _name(node) in _SIZES


def draws_nothing(node: Node) -> bool:
    """Whether a node is a dropout or an attention that drops nothing."""
    given = arguments_of(node) if node.op == "call_function" else {}
    if _name(node) in ("scaled_dot_product_attention", _ATTENTION_LAYER):
        return given.get("dropout_p", 0.0) == 0.0 or given.get("training") is False
    return _name(node) in _DROPOUTS and given.get("training", given.get("train")) is False


def masks_of(node: Node) -> set[Node]:
    """The masks of an attention, which may have numbers that are infinite in bfloat16."""
    if _name(node) not in ("scaled_dot_product_attention", _ATTENTION_LAYER):
        return set()
    given = arguments_of(node)
    masks = (given.get(name) for name in ("attn_mask", "key_padding_mask"))
    return {mask for mask in masks if isinstance(mask, Node)}


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments that a call of a function gives, by name, without those that it leaves to defaults."""
    target: Any = node.target
    overloaded = isinstance(target, OpOverload)
    names = signature_of_overload(target).names if overloaded else parameters_of(target)
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _is_attention_layer(node: Node) -> bool:
    """Whether a node is an attention between linear layers, which takes masks in their own type."""
    if _name(node) != _ATTENTION_LAYER or any(user.target is not operator.getitem for user in node.users):
        return False
    masks = [found for found in map(tensor, masks_of(node)) if found is not None]
    takes_any = arguments_of(node).get("need_weights") is False
    return takes_any or not any(mask.is_floating_point() for mask in masks)


def _name(node: Node) -> str:
    """The operator's name, the same at every capture level; empty for what is not torch's or Python's own."""
    if node.op == "call_method":
        return base_name(node) if hasattr(torch.Tensor, str(node.target)) else ""
    if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
        return ""
    known = isinstance(node.target, OpOverload) or is_described(node.target)
    return base_name(node) if known else ""


def _fits(argument: Any) -> bool:
    if isinstance(argument, torch.dtype):
        return False
    is_large = isinstance(argument, float) and abs(argument) > torch.finfo(torch.bfloat16).max
    return not (is_large and math.isfinite(argument))
