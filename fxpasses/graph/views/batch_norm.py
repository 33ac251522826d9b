"""Batch norms: y = (x - mean) / sqrt(var + eps) * gamma + beta, per channel.

    in eval mode   mean and var are running_mean and running_var: y = scale * x + shift, which folds
    in training    they are those of the batch

Instance normalisation with running statistics is the same in eval mode. The operators differ in what they
call each part, and some give the batch's statistics beside the result.
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
from fxpasses.torch_internals.modules import InstanceNormBase

aten = torch.ops.aten


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
