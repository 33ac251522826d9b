"""efficient_conv_bn_eval: a batch norm with fixed statistics becomes part of the convolution before it.

For y = BN_eval(conv(x, W, b)) with gamma, beta, mean, var, eps:

    s  = gamma / sqrt(var + eps)
    W' = W · s     along the output channels
    b' = beta + (b - mean) · s
    y  = conv(x, W', b')

It is written into the graph, so it trains: gradients flow through W' and b' to W, b, gamma and beta, and
the convolution's output need not be kept for the backward pass.
Source: You et al., "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv 2305.11624.

Legal where
- the normalisation uses running statistics, which exist and take no gradient;
- its channel axis is the output-channel axis of what it normalises (a linear layer on [N, T, C] has
  another one, whatever the sizes happen to be);
- nobody else reads the convolution's result;
- the fused convolution can stand where the batch norm stands, or where the convolution stands, with
  nothing that it reads written to on the way, and with the same grad mode, autocast, functorch level and
  stream.

The output-channel axis of a weight is 0; of a matrix product's 1; of a transposed convolution's weight,
[C_in, C_out/g, ...], the channels run through (group, axis 1), so s is laid out as [C_in, C_out/g].
Half types are folded in float32 and cast once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.operands import Operand
from fxpasses.graph.views import BatchNorm, Producer, is_batch_norm, read_batch_norm, read_producer
from fxpasses.passes.folding.profit import ConvBnCost, conv_bn_benefit, conv_bn_profit
from fxpasses.passes.folding.spelling import fused_producer
from fxpasses.passes.folding.terms import (
    along_channels,
    compute_dtype,
    constant_statistics,
    describe,
    dtype_of,
    known_groups,
    known_values,
    norm_scale,
    place_of_fold,
)
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.rule import Match, Rule, first_decline


@dataclass(frozen=True)
class ConvBnMatch(Match):
    """A convolution or linear layer and the batch norm that reads it."""

    producer: Producer
    norm: BatchNorm

    @functools.cached_property
    def place(self) -> Node | Decline:
        """The node before which the fused convolution may stand, or why there is none."""
        norm = self.norm
        return place_of_fold(self.context, self.producer, norm.nodes[0], self.norm_operands, (norm.eps,))

    @functools.cached_property
    def cost(self) -> ConvBnCost:
        """What decides whether folding pays."""
        return ConvBnCost.of(self.context, self.producer, self.norm)

    @property
    def producer_operands(self) -> tuple[Operand | None, ...]:
        """What the convolution reads."""
        return (self.producer.input, self.producer.weight, self.producer.bias)

    @property
    def norm_operands(self) -> tuple[Operand | None, ...]:
        """What the batch norm reads beside the convolution."""
        norm = self.norm
        return (norm.gamma, norm.beta, norm.running_mean, norm.running_var)


class EfficientConvBnEval(Rule[ConvBnMatch]):
    """A batch norm with fixed statistics becomes part of the convolution or linear layer before it."""

    name = "efficient_conv_bn_eval"
    pattern_size = 2
    folds_weights = True

    @property
    def is_anchor(self) -> Callable[[Node], bool]:
        """Every batch norm is a site."""
        return is_batch_norm

    def match(self, node: Node, context: GraphContext) -> ConvBnMatch | Decline | None:
        """A batch norm in eval mode on the result of a convolution or a linear operator."""
        norm = read_batch_norm(node)
        if isinstance(norm, Decline):
            return norm
        if norm.training:
            return Decline("training-mode", "{} normalises with the batch's statistics", node, (node.name,))
        if norm.running_mean is None or norm.running_var is None:
            return Decline("no-statistics", "{} has no running statistics", node, (node.name,))
        source = norm.input
        producer = read_producer(source) if isinstance(source, Node) else None
        if producer is None:
            return Decline(
                "no-producer",
                "{} reads {}, which is no convolution or linear operator",
                node,
                (node.name, describe(source)),
            )
        if isinstance(producer, Decline):
            return producer
        return ConvBnMatch(context, (*producer.nodes, *norm.nodes), producer, norm)

    def legality(self, match: ConvBnMatch) -> Decline | None:
        """The conditions of the module's docstring, one by one."""
        # A Decline is falsy, so `or` would throw it away.
        checks = (
            _sole_user,
            _known_values,
            _same_channel_axis,
            _known_groups,
            _constant_statistics,
            _has_place,
        )
        return first_decline(match, checks)

    def profitability(self, match: ConvBnMatch) -> Decline | None:
        """Who trains, who runs the graph, and how many bytes move: see `fxpasses.passes.folding.profit`."""
        return conv_bn_profit(match.cost, match.result)

    def benefit(self, match: ConvBnMatch) -> str:
        """What is not kept, or not moved."""
        return conv_bn_benefit(match.cost)

    def figures(self, match: ConvBnMatch) -> Mapping[str, float]:
        """The bytes that decide."""
        return match.cost.figures

    def insertion_point(self, match: ConvBnMatch) -> Node:
        """The batch norm, or the convolution where only its place is right."""
        assert isinstance(match.place, Node)
        return match.place

    def rewrite(self, match: ConvBnMatch, build: Builder) -> Node:
        """Writes s, W', b' and the convolution with them."""
        producer, norm = match.producer, match.norm
        given = build.operand(producer.input)
        weight = build.operand(producer.weight)
        dtype = compute_dtype((producer.weight, producer.bias, *match.norm_operands))
        scale = norm_scale(norm, build, dtype)
        fused_weight = build.mul(build.cast(weight, dtype), along_channels(scale, producer, build))
        fused_weight = build.cast(fused_weight, dtype_of(producer.weight))
        fused_bias = build.cast(_shift(producer, norm, scale, build, dtype), dtype_of(producer.weight))
        build.recompute_in_backward()
        result = fused_producer(producer, build, given, fused_weight, fused_bias)
        return build.cast(result, dtype_of(match.result))


# Legality --------------------------------------------------------------------------------------------------


def _sole_user(match: ConvBnMatch) -> Decline | None:
    """The convolution's result and what lies between it and the batch norm is read once."""
    reader: Node = match.norm.nodes[0]
    for node in reversed(match.producer.nodes):
        others = [user for user in node.users if user is not reader]
        if others:
            return Decline(
                "multiple-users",
                "the result of {} is also used by {}",
                others[0],
                (node.name, describe(others[0])),
            )
        reader = node
    result = match.producer.nodes[-1]
    if any(operand is result for operand in match.norm_operands):
        return Decline("multiple-users", "{} is also a parameter of the batch norm", result, (result.name,))
    return None


def _known_values(match: ConvBnMatch) -> Decline | None:
    operands = (*match.producer_operands, *match.norm_operands, match.result, match.producer.nodes[-1])
    return known_values(operands, match.result)


def _same_channel_axis(match: ConvBnMatch) -> Decline | None:
    """The batch norm normalises over the axis that the convolution writes its output channels to."""
    produced, normalised = match.producer.channel_axis, match.norm.channel_axis
    if produced == normalised:
        return None
    source = match.producer.nodes[-1]
    message = "{} has its output channels on axis {}, and the batch norm normalises axis {}"
    return Decline("channel-axis", message, source, (source.name, produced, normalised))


def _known_groups(match: ConvBnMatch) -> Decline | None:
    return known_groups(match.producer)


def _constant_statistics(match: ConvBnMatch) -> Decline | None:
    return constant_statistics(match.context, (match.norm,), match.result)


def _has_place(match: ConvBnMatch) -> Decline | None:
    return match.place if isinstance(match.place, Decline) else None


# Rewrite ---------------------------------------------------------------------------------------------------


def _shift(producer: Producer, norm: BatchNorm, scale: Node, build: Builder, dtype: torch.dtype) -> Node:
    """B' = beta + (b - mean) · s, of shape [C_out]."""
    assert norm.running_mean is not None
    mean = build.cast(build.operand(norm.running_mean), dtype)
    if producer.bias is None:
        centred = build.neg(mean)
    else:
        centred = build.sub(build.cast(build.operand(producer.bias), dtype), mean)
    shift = build.mul(centred, scale)
    return shift if norm.beta is None else build.add(shift, build.cast(build.operand(norm.beta), dtype))
