"""bn_before_conv: a batch norm with fixed statistics becomes part of the layer after it.

With s = gamma / sqrt(var + eps) and t = beta - mean · s, y = conv(x · s + t, W, b) is

    W' = W · s                      along the input channels
    b' = b + Σ W · t                over input channels and kernel
    y  = conv(x, W', b')

Legal where
- the convolution reads inside its input only: what it pads with is zero after the batch norm, and would have
  to be -t/s before it. A transposed convolution has such a border always;
- the norm's channel axis is the axis that the layer sums over (a linear layer sums over the last one);
- the normalisation uses running statistics, which take no gradient, and nobody else reads its result;
- the fused layer can stand where the layer stands, in one grad mode, autocast state, functorch level and
  stream, with nothing that it reads written to on the way.

A compiler that fuses kernels computes the batch norm with what comes before it and again in the backward
pass, so there it pays with kept weights only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.geometry import reads_inside
from fxpasses.graph.modules import PRODUCERS, is_instance
from fxpasses.graph.operands import Operand, tensor_of
from fxpasses.graph.views import (
    CONVOLUTIONS,
    BatchNorm,
    Convolution,
    Linear,
    Producer,
    is_linear,
    read_producer,
)
from fxpasses.passes.folding.profit import ConvBnCost, bytes_of, input_norm_profit
from fxpasses.passes.folding.spelling import fused_producer
from fxpasses.passes.folding.terms import (
    Terms,
    compute_dtype,
    constant_statistics,
    describe,
    dtype_of,
    known_values,
    norm_at,
    same_state,
    weight_axes,
)
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.rule import Match, Rule, first_decline


@dataclass(frozen=True)
class BnConvMatch(Match):
    """A batch norm and the layer that reads it."""

    norm: BatchNorm
    producer: Producer

    @property
    def operands(self) -> tuple[Operand | None, ...]:
        """All that the two read."""
        norm, layer = self.norm, self.producer
        held = (norm.gamma, norm.beta, norm.running_mean, norm.running_var)
        return (norm.input, *held, layer.weight, layer.bias)


class BnBeforeConv(Rule[BnConvMatch]):
    """A batch norm with fixed statistics becomes part of the linear layer or convolution after it."""

    name = "bn_before_conv"
    after = ("parallel_conv_merge",)
    pattern_size = 2
    folds_weights = True

    @property
    def is_anchor(self) -> Callable[[Node], bool]:
        """Every convolution and linear operator."""
        return _is_layer

    def match(self, node: Node, context: GraphContext) -> BnConvMatch | Decline | None:
        """A layer on the result of a batch norm in eval mode."""
        producer = read_producer(node)
        if isinstance(producer, Decline) or producer is None or not isinstance(producer.input, Node):
            return None
        norm = norm_at(producer.input)
        if norm is None or norm.nodes[-1] is not producer.input:
            return None
        return BnConvMatch(context, (*norm.nodes, *producer.nodes), norm, producer)

    def legality(self, match: BnConvMatch) -> Decline | None:
        """The conditions of the module's docstring, one by one."""
        checks = (_sole_user, _known, _summed_axis, _no_border, _constant_statistics, _same_state)
        return first_decline(match, checks)

    def profitability(self, match: BnConvMatch) -> Decline | None:
        """The batch norm's traffic against the weight's."""
        layer = match.producer
        cost = ConvBnCost.of_fold(match.context, layer, layer.nodes[0], (match.norm.gamma,))
        return input_norm_profit(cost, bytes_of(match.norm.nodes[-1]), match.result)

    def insertion_point(self, match: BnConvMatch) -> Node:
        """The layer."""
        return match.producer.nodes[-1]

    def rewrite(self, match: BnConvMatch, build: Builder) -> Node:
        """Writes s, t, W', b' and the layer with them."""
        layer = match.producer
        terms = Terms(build, compute_dtype(match.operands[1:]))
        terms.normalise(match.norm)
        assert isinstance(terms.scale, Node)
        assert isinstance(terms.shift, Node)
        weight = build.cast(build.operand(layer.weight), terms.dtype)
        _, *summed = weight_axes(layer)
        offset = build.sum(build.mul(weight, _along_inputs(terms.shift, layer, build)), summed)
        if layer.bias is not None:
            offset = build.add(offset, terms.tensor(layer.bias))
        folded = build.mul(weight, _along_inputs(terms.scale, layer, build))
        dtype = dtype_of(layer.weight)
        weight, bias = build.cast(folded, dtype), build.cast(offset, dtype)
        build.recompute_in_backward()
        given = match.norm.input
        assert isinstance(given, Node)
        return build.cast(fused_producer(layer, build, given, weight, bias), dtype_of(match.result))


def _is_layer(node: Node) -> bool:
    if node.op == "call_module":
        return is_instance(node, tuple(PRODUCERS))
    return node.op in ("call_function", "call_method") and (node.target in CONVOLUTIONS or is_linear(node))


# Legality --------------------------------------------------------------------------------------------------


def _sole_user(match: BnConvMatch) -> Decline | None:
    for node, reader in zip(match.nodes, match.nodes[1:], strict=False):
        inside = set(match.norm.nodes) | {match.producer.nodes[0], reader}
        other = next((user for user in node.users if user not in inside), None)
        if other is not None:
            message = "the result of {} is also used by {}"
            return Decline("multiple-users", message, other, (node.name, describe(other)))
    normalised = match.norm.nodes[-1]
    if normalised in match.operands:
        return Decline("multiple-users", "{} is also a parameter", normalised, (normalised.name,))
    return None


def _known(match: BnConvMatch) -> Decline | None:
    problem = known_values((*match.operands, match.result, match.norm.nodes[-1]), match.result)
    if problem is not None:
        return problem
    given, normalised = (dtype_of(operand) for operand in (match.norm.input, match.norm.nodes[-1]))
    if given != normalised:
        message = "{} changes the dtype from {} to {}"
        details = (match.norm.nodes[-1].name, given, normalised)
        return Decline("dtype", message, match.norm.nodes[-1], details)
    return None


def _summed_axis(match: BnConvMatch) -> Decline | None:
    layer, given = match.producer, tensor_of(match.norm.input)
    assert given is not None
    summed = given.ndim - 1 if isinstance(layer, Linear) else layer.channel_axis
    if summed == match.norm.channel_axis:
        return None
    message = "{} sums over axis {}, and the batch norm normalises axis {}"
    details = (match.result.name, summed, match.norm.channel_axis)
    return Decline("channel-axis", message, match.result, details)


def _no_border(match: BnConvMatch) -> Decline | None:
    layer = match.producer
    if isinstance(layer, Linear):
        return None
    weight = tensor_of(layer.weight)
    if not reads_inside(layer):
        message = "{} pads with zeros, which the batch norm does not shift"
        return Decline("border", message, match.result, (match.result.name,))
    assert weight is not None
    if layer.groups > 1 and not all(isinstance(size, int) for size in weight.shape[:2]):
        message = "{} is grouped, and its weight has a symbolic number of channels"
        return Decline("symbolic-channels", message, match.result, (match.result.name,))
    return None


def _constant_statistics(match: BnConvMatch) -> Decline | None:
    return constant_statistics(match.context, (match.norm,), match.result)


def _same_state(match: BnConvMatch) -> Decline | None:
    return same_state(match.context, match.nodes, match.result, match.operands)


# Rewrite ---------------------------------------------------------------------------------------------------


def _along_inputs(vector: Node, layer: Producer, build: Builder) -> Node:
    """A vector of [C_in] shaped to multiply the weight along its input channels."""
    weight = tensor_of(layer.weight)
    assert weight is not None
    if isinstance(layer, Linear):
        return build.reshape(vector, [-1, 1]) if layer.weight_axis == 1 else build.reshape(vector, [1, -1])
    kernel = [1] * (weight.ndim - 2)
    if layer.groups == 1:
        return build.reshape(vector, [1, -1, *kernel])
    return _along_grouped_inputs(vector, layer, build, weight)


def _along_grouped_inputs(vector: Node, layer: Convolution, build: Builder, weight: torch.Tensor) -> Node:
    """As [C_out, C_in/g, 1, ...]: each group's channels, for every output channel of that group."""
    outputs, per_group = int(weight.shape[0]), int(weight.shape[1])
    by_group = build.reshape(vector, [layer.groups, 1, per_group])
    repeated = build.repeat(by_group, [1, outputs // layer.groups, 1])
    return build.reshape(repeated, [outputs, per_group, *[1] * (weight.ndim - 2)])
