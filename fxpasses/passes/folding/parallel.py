"""Parallel convolutions of one input become one convolution, of which they were parts.

parallel_conv_merge: a sum. A convolution is linear in its weight, so

    conv(x, W) + conv(x, V)  =  conv(x, W + pad(V))
    conv(x, W) + BN_eval(x)  =  conv(x, W + s · I, t)      conv(x, W) + x  =  conv(x, W + I)

where pad puts the smaller kernel where it reads the same places as before (`fxpasses.graph.geometry`), I is
the kernel that copies its input (one at the place that reads it, for each channel), s and t are the batch
norm's scale and shift. Written into the graph it trains: RepVGG's three branches (Ding et al., "RepVGG:
Making VGG-style ConvNets Great Again", arXiv 2101.03697) are one convolution in every forward and backward
pass, and W and V keep gradients of their own. More than two branches are merged pair by pair.

Legal where
- all read the same tensor, with the same stride and number of groups, at the same places; a convolution pads
  with zeros, so outside the input both read zero;
- an identity keeps shape and channels: stride 1, as many channels out as in;
- nobody else reads what is summed; a sum in place writes to a branch's result, not to the input;
- a batch norm uses running statistics, which take no gradient;
- grad mode, autocast, functorch level and stream are the same for all, and nothing is written to on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxpasses.graph.affine import Affine, affine_steps, is_affine, same_shape
from fxpasses.graph.canonical import operator_of
from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.geometry import Geometry
from fxpasses.graph.metadata import tensor
from fxpasses.graph.operands import Operand, tensor_of
from fxpasses.graph.views import BatchNorm, Convolution, read_producer
from fxpasses.passes.folding.profit import bytes_of, merge_profit
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
)
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.rule import Match, Rule, first_decline

_IN_PLACE: tuple[object, ...] = (operator.iadd, "add_", torch.ops.aten.add_.Tensor)

Branch = Convolution | BatchNorm | Node
"""A convolution, a batch norm of the input, or the input itself."""


@dataclass(frozen=True)
class ParallelMatch(Match):
    """Convolutions, a batch norm or the input, and what joins them.

    Attributes:
        host: the convolution whose kernel holds the others.
        others: the other branches.
    """

    host: Convolution
    others: tuple[Branch, ...]

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All that the branches read."""
        return tuple(operand for branch in (self.host, *self.others) for operand in operands_of(branch))

    @property
    def pattern_size(self) -> int:
        """The branches and what joins them."""
        return 2 + sum(not isinstance(other, Node) for other in self.others)


def operands_of(branch: Branch) -> list[Operand]:
    """The tensors that a branch reads."""
    if isinstance(branch, Node):
        return [branch]
    held: tuple[Operand | None, ...]
    if isinstance(branch, Convolution):
        held = (branch.input, branch.weight, branch.bias)
    else:
        held = (branch.input, branch.gamma, branch.beta, branch.running_mean, branch.running_var)
    return [operand for operand in held if operand is not None]


class ParallelConvMerge(Rule[ParallelMatch]):
    """A sum of convolutions of one input, of its batch norm and of itself becomes one convolution."""

    name = "parallel_conv_merge"
    after = ("efficient_conv_bn_eval", "conv_affine", "affine_across_views")
    pattern_size = 3
    folds_weights = True

    @property
    def is_anchor(self) -> Callable[[Node], bool]:
        """Every addition, in place or not."""
        return _is_addition

    def match(self, node: Node, context: GraphContext) -> ParallelMatch | Decline | None:
        """A convolution plus another branch of the same input."""
        pair = _summands(node)
        branches = [] if pair is None else [_branch(operand) for operand in pair]
        convolutions = [branch for branch in branches if isinstance(branch, Convolution)]
        if pair is None or not convolutions:
            return None
        host, other = branches if isinstance(branches[0], Convolution) else branches[::-1]
        if len(convolutions) == 2:
            first, second = map(Geometry.of, convolutions)
            if first is not None and second is not None and first.elements < second.elements:
                host, other = other, host
        given = other if isinstance(other, Node) else other.input if other is not None else None
        assert isinstance(host, Convolution)
        if other is None or given is not host.input or pair[0] is pair[1]:
            return None
        if isinstance(other, Node) and node.target in _IN_PLACE and pair[0] is other:
            return Decline("mutation", "{} writes to {}, which is the input", node, (node.name, other.name))
        inside = [*host.nodes, *(() if isinstance(other, Node) else other.nodes)]
        return ParallelMatch(context, (*sorted(inside), node), host, (other,))

    def legality(self, match: ParallelMatch) -> Decline | None:
        """The conditions of the module's docstring, one by one."""
        checks = (_sole_readers, _known, _same_shapes, _constant_statistics, _holds_kernel, _same_state)
        return first_decline(match, checks)

    def profitability(self, match: ParallelMatch) -> Decline | None:
        """A convolution's pass over its input and result, against summing weights at every step."""
        context, host = match.context, match.host
        (other,) = match.others
        weight = other.weight if isinstance(other, Convolution) else host.weight
        return merge_profit(
            context,
            match.result,
            host_trains=context.requires_grad(host.weight),
            others_train=any(context.requires_grad(operand) for operand in operands_of(other)[1:]),
            result_bytes=bytes_of(match.result) * (1 if isinstance(other, Node) else 2),
            weight_bytes=bytes_of(host.weight) + bytes_of(weight),
        )

    def insertion_point(self, match: ParallelMatch) -> Node:
        """The addition."""
        return match.result

    def rewrite(self, match: ParallelMatch, build: Builder) -> Node:
        """Writes the sum of the weights, the sum of the biases, and the convolution with them."""
        host, (other,) = match.host, match.others
        terms = Terms(build, compute_dtype(match.operands[1:]))
        if host.bias is not None:
            terms.add(terms.tensor(host.bias))
        weight = build.cast(build.operand(host.weight), terms.dtype)
        added, shift = _part(other, host, terms)
        weight = build.cast(build.add(weight, added), dtype_of(host.weight))
        if shift is not None:
            terms.add(shift)
        bias = None
        if isinstance(terms.shift, Node):
            bias = build.cast(terms.shift, dtype_of(host.weight))
        build.recompute_in_backward()
        result = fused_producer(host, build, build.operand(host.input), weight, bias)
        return build.cast(result, dtype_of(match.result))


# Matching --------------------------------------------------------------------------------------------------


def _is_addition(node: Node) -> bool:
    return node.target in _IN_PLACE or (is_affine(node) and operator_of(node) == "aten::add")


def _summands(node: Node) -> tuple[Node, Node] | None:
    """The two nodes that an addition adds, each once."""
    if node.target in _IN_PLACE:
        pair = node.args
        if len(pair) != 2 or node.kwargs or not all(isinstance(operand, Node) for operand in pair):
            return None
        return pair  # type: ignore[return-value]  # two nodes, just checked
    steps = affine_steps(node)
    step = steps[0] if isinstance(steps, list) and steps else None
    if not isinstance(step, Affine) or not isinstance(step.operand, Node):
        return None
    return (step.source, step.operand) if step.sign == step.factor == 1 else None


def _branch(node: Node) -> Branch | None:
    producer = read_producer(node)
    if isinstance(producer, Convolution):
        known = tensor_of(producer.weight) is not None and not producer.transposed
        return producer if known else None
    if producer is not None:
        return None
    return norm_at(node) or node


# Legality --------------------------------------------------------------------------------------------------


def _sole_readers(match: ParallelMatch) -> Decline | None:
    inside = set(match.nodes)
    for node in match.nodes[:-1]:
        other = next((user for user in node.users if user not in inside), None)
        if other is not None:
            message = "the result of {} is also used by {}"
            return Decline("multiple-users", message, other, (node.name, describe(other)))
        if node in match.operands:
            return Decline("multiple-users", "{} is also an operand of a branch", node, (node.name,))
    return None


def _known(match: ParallelMatch) -> Decline | None:
    problem = known_values((*match.operands, match.result, match.host.nodes[-1]), match.result)
    if problem is not None:
        return problem
    branches = (match.host, *match.others)
    results = [branch if isinstance(branch, Node) else branch.nodes[-1] for branch in branches]
    if len({dtype_of(node) for node in (*results, match.result)}) > 1:
        return Decline("dtype", "the branches of {} have several dtypes", match.result, (match.result.name,))
    return None


def _same_shapes(match: ParallelMatch) -> Decline | None:
    """Nothing is broadcast, and an identity keeps channels and places."""
    expected = tensor(match.result)
    for branch in (match.host, *match.others):
        node = branch if isinstance(branch, Node) else branch.nodes[-1]
        found = tensor(node)
        if expected is None or found is None or not same_shape(expected, found):
            message = "{} and {} have other shapes"
            return Decline("geometry", message, node, (node.name, match.result.name))
    return None


def _constant_statistics(match: ParallelMatch) -> Decline | None:
    norms = [other for other in match.others if isinstance(other, BatchNorm)]
    for branch in norms:
        found = constant_statistics(match.context, (branch,), match.result)
        if found is not None:
            return found
        if branch.channel_axis != match.host.channel_axis:
            message = "{} has its output channels on axis {}, and the batch norm normalises axis {}"
            details = (match.host.nodes[-1].name, match.host.channel_axis, branch.channel_axis)
            return Decline("channel-axis", message, match.result, details)
    return None


def _holds_kernel(match: ParallelMatch) -> Decline | None:
    """The host's kernel has a place for the other's."""
    (other,) = match.others
    if _offsets(match.host, other) is None or not _same_groups(match.host, other):
        details = (match.result.name, match.host.nodes[-1].name)
        return Decline("geometry", "the branches of {} do not fit into {}", match.result, details)
    return None


def _same_groups(host: Convolution, other: Branch) -> bool:
    if isinstance(other, Convolution):
        return host.groups == other.groups
    weight = tensor_of(host.weight)
    assert weight is not None
    # A symbolic number of channels would have to be guarded on.
    known = all(isinstance(size, int) for size in weight.shape[:2])
    return known and weight.shape[0] == weight.shape[1] * host.groups


def _offsets(host: Convolution, other: Branch) -> tuple[int, ...] | None:
    """Where the other branch's kernel lies in the host's; an identity is a kernel of one element."""
    outer = Geometry.of(host)
    if outer is None:
        return None
    inner: Geometry | None
    if isinstance(other, Convolution):
        inner = Geometry.of(other)
    else:
        rank = len(outer.kernel)
        inner = Geometry((1,) * rank, (1,) * rank, (0,) * rank, (1,) * rank)
    return None if inner is None else outer.offsets_of(inner)


def _same_state(match: ParallelMatch) -> Decline | None:
    """One state for all, and no write between the first branch and the join."""
    return same_state(match.context, match.nodes, match.result, match.operands)


# Rewrite ---------------------------------------------------------------------------------------------------


def _part(other: Branch, host: Convolution, terms: Terms) -> tuple[Node, Node | None]:
    """What a branch adds to the host's weight and bias."""
    build, offsets = terms.build, _offsets(host, other)
    outer = Geometry.of(host)
    assert outer is not None
    assert offsets is not None
    shift: Node | None = None
    if isinstance(other, Convolution):
        kernel = build.cast(build.operand(other.weight), terms.dtype)
        shift = None if other.bias is None else terms.tensor(other.bias)
        sizes: Sequence[int] = list(tensor_of(other.weight).shape[2:])  # type: ignore[union-attr]  # known
    else:
        kernel, shift = _identity(other, host, terms)
        sizes = [1] * len(offsets)
    amounts: list[int] = []
    for size, before, whole in reversed(list(zip(sizes, offsets, outer.kernel, strict=True))):
        amounts += [before, whole - size - before]
    return (build.pad(kernel, amounts) if any(amounts) else kernel), shift


def _identity(other: BatchNorm | Node, host: Convolution, terms: Terms) -> tuple[Node, Node | None]:
    """S · I as a kernel of one element, [C, C/groups, 1, ...], and t."""
    build = terms.build
    found = tensor_of(host.weight)
    assert found is not None
    channels, per_group = int(found.shape[0]), int(found.shape[1])
    kernel = build.eye(per_group, terms.dtype, like=build.operand(host.weight))
    if host.groups > 1:
        kernel = build.repeat(kernel, [host.groups, 1])
    shift = None
    if isinstance(other, BatchNorm):
        own = Terms(build, terms.dtype)
        own.normalise(other)
        assert isinstance(own.scale, Node)
        assert isinstance(own.shift, Node)
        kernel, shift = build.mul(kernel, build.reshape(own.scale, [-1, 1])), own.shift
    return build.reshape(kernel, [channels, per_group, *[1] * (found.ndim - 2)]), shift
