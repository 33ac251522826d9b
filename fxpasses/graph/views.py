"""Operator views: a normalised reading of a node, the same at every capture level.

A rule asks "is this a convolution, and what are its weight, bias and groups", not "is this
`torch.conv2d` with five positional arguments". Reading never changes the graph. What cannot be read with
certainty gives a `Decline` that says why; what is not that operator at all gives None.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxpasses.graph import modules
from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import tensor, value
from fxpasses.graph.operands import Operand, tensor_of
from fxpasses.graph.schema import bind
from fxpasses.torch_internals.modules import ConvNd, InstanceNormBase
from fxpasses.torch_internals.operators import LINEAR_FUNCTION

aten = torch.ops.aten


@dataclass(frozen=True)
class Convolution:
    """A convolution, direct or transposed, of any number of spatial dimensions.

    Attributes:
        nodes: the nodes that make it up, in program order; the last one is its result.
        input: [N, C_in, *spatial], or [C_in, *spatial] when it is not batched.
        weight: [C_out, C_in/groups, *kernel]; transposed: [C_in, C_out/groups, *kernel].
        bias: [C_out] or None.
        stride, padding, dilation, output_padding: as given: a number, one per dimension, or
            ``"same"``/``"valid"`` for the padding.
        transposed: whether it is a transposed convolution.
        groups: how many groups the channels fall into.
    """

    nodes: tuple[Node, ...]
    input: Operand
    weight: Operand
    bias: Operand | None
    stride: Any
    padding: Any
    dilation: Any
    transposed: bool
    output_padding: Any
    groups: int

    @property
    def channel_axis(self) -> int | None:
        """The axis of the output channels in the result; None without metadata."""
        given, weight = tensor_of(self.input), tensor_of(self.weight)
        if given is None or weight is None:
            return None
        return 1 if given.ndim == weight.ndim else 0


@dataclass(frozen=True)
class Linear:
    """A matrix product with a weight: `linear`, `addmm`, `mm`, `matmul`, or one of those and an addition.

    Attributes:
        nodes: the nodes that make it up, in program order; the last one is its result.
        input: [..., C_in].
        weight: [C_out, C_in], or [C_in, C_out] where `weight_axis` is 1.
        bias: [C_out] or None.
        weight_axis: the axis of the output channels in the weight.
    """

    nodes: tuple[Node, ...]
    input: Operand
    weight: Operand
    bias: Operand | None
    weight_axis: int

    @property
    def channel_axis(self) -> int | None:
        """The axis of the output channels in the result; None without metadata."""
        given = tensor_of(self.input)
        return None if given is None else given.ndim - 1


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation, or instance normalisation with running statistics, which is the same in eval mode.

    Attributes:
        nodes: the operator, and for one that returns a tuple the `getitem` that takes its result.
        input: [N, C, *spatial].
        gamma, beta: the affine parameters, [C] each, or None.
        running_mean, running_var: the statistics, [C] each, or None.
        training: whether it normalises with the statistics of the batch.
        eps: what is added to the variance; a node where it is an input of the graph.
        channel_axis: the axis of C in the input.
    """

    nodes: tuple[Node, ...]
    input: Operand
    gamma: Operand | None
    beta: Operand | None
    running_mean: Operand | None
    running_var: Operand | None
    training: bool
    eps: float | Node
    channel_axis: int = 1


Producer = Convolution | Linear

# Convolutions ----------------------------------------------------------------------------------------------

CONVOLUTIONS: frozenset[Any] = frozenset(
    {
        torch.conv1d, torch.conv2d, torch.conv3d,
        torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d, torch.convolution,
        aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding,
        aten.conv3d.default, aten.conv3d.padding, aten.conv_transpose1d.default,
        aten.conv_transpose2d.input, aten.conv_transpose3d.input,
        aten.convolution.default, aten._convolution.default,
    }
)  # fmt: skip

_TRANSPOSED: frozenset[Any] = frozenset(
    {
        torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
        aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    }
)  # fmt: skip


def read_producer(node: Node) -> Producer | Decline | None:
    """Reads a convolution or a linear operator that ends in `node`."""
    if node.op == "call_module":
        return _read_producer_module(node)
    if node.target in CONVOLUTIONS:
        return _read_convolution(node)
    return read_linear(node)


def _read_convolution(node: Node) -> Convolution | Decline:
    bound = bind(node)
    if isinstance(bound, Decline):
        return bound
    transposed = bound.get("transposed", node.target in _TRANSPOSED)
    if not isinstance(bound["groups"], int) or not isinstance(transposed, bool):
        return Decline("non-constant", "{} has a number of groups that is not a constant", node, (node.name,))
    operands = [bound["input"], bound["weight"], bound["bias"]]
    if not all(isinstance(operand, Node) for operand in operands[:2]) or not _is_optional_node(operands[2]):
        return Decline("unsupported-arguments", "{} has operands that are not tensors", node, (node.name,))
    return Convolution(
        nodes=(node,),
        input=bound["input"],
        weight=bound["weight"],
        bias=bound["bias"],
        stride=bound["stride"],
        padding=bound["padding"],
        dilation=bound["dilation"],
        transposed=transposed,
        output_padding=bound.get("output_padding", 0),
        groups=bound["groups"],
    )


def _read_producer_module(node: Node) -> Producer | Decline | None:
    found = modules.read(node, modules.PRODUCERS)
    if found is None or isinstance(found, Decline):
        return found
    module, arguments = found
    operands = modules.operands(node, module, ("weight", "bias"))
    if isinstance(module, nn.Linear):
        return Linear((node,), arguments["input"], operands["weight"], operands["bias"], weight_axis=0)  # type: ignore[arg-type]
    if not isinstance(module, ConvNd):
        return None
    if module.padding_mode != "zeros":
        return Decline(
            "padding-mode",
            "{} pads with {!r}, which a functional convolution cannot",
            node,
            (node.target, module.padding_mode),
        )
    if arguments.get("output_size") is not None:
        return Decline(
            "output-size", "{} is called with output_size, which sets its padding anew", node, (node.target,)
        )
    return Convolution(
        nodes=(node,),
        input=arguments["input"],
        weight=operands["weight"],  # type: ignore[arg-type]
        bias=operands["bias"],
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        transposed=module.transposed,
        output_padding=module.output_padding,
        groups=module.groups,
    )


# Linear ----------------------------------------------------------------------------------------------------

_LINEARS: frozenset[Any] = frozenset({LINEAR_FUNCTION, aten.linear.default})
_ADDMMS: frozenset[Any] = frozenset({torch.addmm, aten.addmm.default, "addmm"})
_PRODUCTS: frozenset[Any] = frozenset(
    {
        torch.mm,
        torch.matmul,
        operator.matmul,
        aten.mm.default,
        aten.matmul.default,
        "mm",
        "matmul",
        "__matmul__",
    }
)
_ADDITIONS: frozenset[Any] = frozenset({torch.add, operator.add, aten.add.Tensor, "add", "__add__"})


def is_linear(node: Node) -> bool:
    """Whether the node's operator is a matrix product, possibly a linear one."""
    return node.target in _LINEARS or node.target in _ADDMMS or node.target in _PRODUCTS


def read_linear(node: Node) -> Linear | Decline | None:
    """Reads a linear operator that ends in `node`, however it is spelled."""
    if node.op not in ("call_function", "call_method"):
        return None
    target = node.target
    if target in _LINEARS:
        return _read_linear_function(node)
    if target in _ADDMMS:
        return _read_addmm(node)
    if target in _PRODUCTS:
        return _read_product(node)
    if target in _ADDITIONS:
        return _read_biased_product(node)
    return None


def _read_linear_function(node: Node) -> Linear | Decline:
    bound = bind(node)
    if isinstance(bound, Decline):
        return bound
    return Linear((node,), bound["input"], bound["weight"], bound["bias"], weight_axis=0)


def _read_addmm(node: Node) -> Linear | Decline:
    bound = bind(node)
    if isinstance(bound, Decline):
        return bound
    if "out_dtype" in bound or bound["beta"] != 1 or bound["alpha"] != 1:
        return Decline("unsupported-arguments", "{} scales its operands", node, (node.name,))
    bias = tensor(bound["self"])
    if bias is None or bias.ndim != 1:
        return Decline("bias-shape", "{} adds a matrix, not one number per channel", node, (node.name,))
    return Linear((node,), bound["mat1"], bound["mat2"], bound["self"], weight_axis=1)


def _read_product(node: Node) -> Linear | Decline:
    bound = bind(node)
    if isinstance(bound, Decline):
        return bound
    given, weight = bound["self"], bound["mat2"] if "mat2" in bound else bound["other"]
    shapes = [tensor(given), tensor(weight)]
    if "out_dtype" in bound or any(shape is None or shape.ndim != 2 for shape in shapes):
        return Decline("not-a-linear", "{} is not a product of two matrices", node, (node.name,))
    return Linear((node,), given, weight, None, weight_axis=1)


def _read_biased_product(node: Node) -> Linear | Decline | None:
    """An addition of one number per channel to a product that nobody else reads."""
    bound = bind(node)
    if isinstance(bound, Decline) or bound.get("alpha", 1) != 1:
        return None
    for product, bias in ((bound["self"], bound["other"]), (bound["other"], bound["self"])):
        shape = tensor(bias)
        if not isinstance(product, Node) or shape is None or shape.ndim != 1 or len(product.users) != 1:
            continue
        found = _read_product(product) if product.target in _PRODUCTS else None
        if isinstance(found, Linear):
            return Linear((product, node), found.input, found.weight, bias, weight_axis=1)
    return None


# Batch norm ------------------------------------------------------------------------------------------------

_PLAIN: dict[str, str] = {
    "gamma": "weight",
    "beta": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
    "training": "training",
    "eps": "eps",
}
_NO_TRAINING = {key: name for key, name in _PLAIN.items() if key != "training"}
_VENDOR = {**_PLAIN, "eps": "epsilon"}
_INSTANCE = {**_PLAIN, "training": "use_input_stats"}

BATCH_NORMS: dict[Callable[..., Any], dict[str, str]] = {
    F.batch_norm: _PLAIN,
    torch.batch_norm: _PLAIN,
    torch.native_batch_norm: _PLAIN,
    aten.batch_norm.default: _PLAIN,
    aten.native_batch_norm.default: _PLAIN,
    aten._native_batch_norm_legit.default: _PLAIN,
    aten._batch_norm_impl_index.default: _PLAIN,
    aten._native_batch_norm_legit_no_training.default: _NO_TRAINING,
    aten._batch_norm_no_update.default: _NO_TRAINING,
    aten.cudnn_batch_norm.default: _VENDOR,
    aten.miopen_batch_norm.default: _VENDOR,
    F.instance_norm: _INSTANCE,
    torch.instance_norm: _INSTANCE,
    aten.instance_norm.default: _INSTANCE,
}
"""The operators that normalise with running statistics, and what they call each part."""


def is_batch_norm(node: Node) -> bool:
    """Whether the node is a batch (or instance) normalisation, in any mode."""
    if node.op == "call_module":
        return modules.is_instance(node, modules.NORM_BASES)
    return node.op == "call_function" and node.target in BATCH_NORMS


def read_batch_norm(node: Node) -> BatchNorm | Decline:
    """Reads the normalisation that `node` is; `is_batch_norm(node)` holds."""
    if node.op == "call_module":
        return _read_batch_norm_module(node)
    names = BATCH_NORMS[node.target]  # type: ignore[index]
    bound = bind(node)
    if isinstance(bound, Decline):
        return bound
    parts: dict[str, Any] = {key: bound[name] for key, name in names.items()}
    result = _result_of(node)
    if isinstance(result, Decline):
        return result
    training = parts.pop("training", False)
    if isinstance(training, Node) or not _is_number(parts["eps"]):
        return Decline("non-constant", "{} has a mode or an eps that is not a constant", node, (node.name,))
    return BatchNorm(nodes=result, input=bound["input"], training=bool(training), **parts)


def _result_of(node: Node) -> tuple[Node, ...] | Decline:
    """The operator, and the `getitem` of its first result where it returns several."""
    if isinstance(tensor(node), torch.Tensor):
        return (node,)
    for user in node.users:
        if user.target is not operator.getitem or (user.args[1] != 0 and user.users):
            return Decline(
                "saved-statistics", "{} reads more of {} than its result", user, (user.name, node.name)
            )
    first = [user for user in node.users if user.args[1] == 0]
    if len(first) != 1:
        return Decline("saved-statistics", "the result of {} is read {} times", node, (node.name, len(first)))
    return (node, *(user for user in node.users if user is not first[0]), first[0])


_UNBATCHED_RANKS: dict[type[nn.Module], int] = {
    nn.InstanceNorm1d: 2,
    nn.InstanceNorm2d: 3,
    nn.InstanceNorm3d: 4,
}


def _read_batch_norm_module(node: Node) -> BatchNorm | Decline:
    found = modules.read(node, modules.NORMS)
    if found is None:
        return Decline("unknown-module", "{} is not a normalisation of torch.nn", node, (node.target,))
    if isinstance(found, Decline):
        return found
    module, arguments = found
    assert isinstance(module, modules.NORM_BASES)
    operands = modules.operands(node, module, ("weight", "bias", "running_mean", "running_var"))
    given = tensor_of(arguments["input"])
    is_instance = isinstance(module, InstanceNormBase)
    # An instance norm takes unbatched input, whose channels come first.
    unbatched = is_instance and given is not None and given.ndim == _UNBATCHED_RANKS[type(module)]
    uses_batch = module.training or not module.track_running_stats
    return BatchNorm(
        nodes=(node,),
        input=arguments["input"],
        gamma=operands["weight"],
        beta=operands["bias"],
        running_mean=operands["running_mean"],
        running_var=operands["running_var"],
        training=uses_batch if is_instance else module.training or module.running_mean is None,
        eps=module.eps,
        channel_axis=0 if unbatched else 1,
    )


def _is_number(given: object) -> bool:
    """Whether it is a number, or (with dynamic shapes Dynamo makes every float an input) a node of one."""
    return isinstance(value(given) if isinstance(given, Node) else given, (int, float, torch.SymFloat))


def _is_optional_node(given: object) -> bool:
    return given is None or isinstance(given, Node)
