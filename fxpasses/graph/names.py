"""Names of operators, the same at every capture level, and of parameters, in graphs as in modules."""

from __future__ import annotations

import functools
import re

from torch.fx import Node

from fxpasses.graph.levels import attribute
from fxpasses.torch_internals.operators import OpOverload, OpOverloadPacket, operator_name


def canonical(name: str) -> str:
    """A parameter's name with underscores for dots: ``layer1.0.weight`` -> ``layer1_0_weight``.

    Dynamo writes ``L_self_modules_layer1_modules_0_parameters_weight_``.
    """
    text = re.sub(r"\W+", "_", name).strip("_")
    if re.match(r"[lL]_.*?_(modules|parameters|buffers)_", text):
        text = re.sub(r"^.*?(?=(modules|parameters|buffers)_)", "", text, count=1)
        text = re.sub(r"(?:^|(?<=_))(modules|parameters|buffers)_+", "", text)
    return re.sub(r"_+", "_", text).strip("_")


def base_name(node: Node) -> str:
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


@functools.lru_cache(maxsize=4096)
def _overload_base(target: OpOverload) -> str:
    namespace, _, name = operator_name(target).partition("::")
    base = _base(name.partition(".")[0])
    return base if namespace in ("aten", "prims", "inductor") else f"{namespace}.{base}"


@functools.lru_cache(maxsize=4096)
def _base(name: str) -> str:
    # `__add__`, `add_` and `add` are one operator; `_softmax` and `softmax` are two.
    return re.sub(r"(?<=[a-z0-9])_+$", "", re.sub(r"^__(\w+)__$", r"\1", name))


_MODULES = {
    "AdaptiveAvgPool2d": "adaptive_avg_pool2d",
    "AdaptiveAvgPool3d": "adaptive_avg_pool3d",
    "AvgPool2d": "avg_pool2d",
    "AvgPool3d": "avg_pool3d",
    "BatchNorm2d": "batch_norm",
    "BatchNorm3d": "batch_norm",
    "ChannelShuffle": "channel_shuffle",
    "CircularPad2d": "_pad_circular",
    "CircularPad3d": "_pad_circular",
    "ConstantPad2d": "constant_pad_nd",
    "ConstantPad3d": "constant_pad_nd",
    "Conv2d": "conv2d",
    "Conv3d": "conv3d",
    "ConvTranspose2d": "conv_transpose2d",
    "ConvTranspose3d": "conv_transpose3d",
    "Dropout": "dropout",
    "Dropout2d": "dropout2d",
    "Dropout3d": "dropout3d",
    "ELU": "elu",
    "Flatten": "flatten",
    "Fold": "fold",
    "GELU": "gelu",
    "GLU": "glu",
    "GroupNorm": "group_norm",
    "Hardsigmoid": "hardsigmoid",
    "Hardswish": "hardswish",
    "Hardtanh": "hardtanh",
    "Identity": "identity",
    "InstanceNorm2d": "instance_norm",
    "InstanceNorm3d": "instance_norm",
    "LPPool2d": "lp_pool2d",
    "LayerNorm": "layer_norm",
    "LeakyReLU": "leaky_relu",
    "Linear": "linear",
    "LogSoftmax": "log_softmax",
    "MaxPool2d": "max_pool2d",
    "MaxPool3d": "max_pool3d",
    "MaxUnpool2d": "max_unpool2d",
    "MaxUnpool3d": "max_unpool3d",
    "Mish": "mish",
    "PReLU": "prelu",
    "PixelShuffle": "pixel_shuffle",
    "PixelUnshuffle": "pixel_unshuffle",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "ReflectionPad2d": "reflection_pad2d",
    "ReflectionPad3d": "reflection_pad3d",
    "ReplicationPad2d": "replication_pad2d",
    "ReplicationPad3d": "replication_pad3d",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
    "Softmax": "softmax",
    "Softmax2d": "softmax",
    "Softplus": "softplus",
    "Tanh": "tanh",
    "Unflatten": "unflatten",
    "Upsample": "upsample",
    "UpsamplingBilinear2d": "upsample_bilinear",
    "UpsamplingNearest2d": "upsample_nearest",
    "ZeroPad2d": "constant_pad_nd",
    "ZeroPad3d": "constant_pad_nd",
}
"""Modules of torch.nn that are called whole in a graph from `torch.fx.symbolic_trace`."""
