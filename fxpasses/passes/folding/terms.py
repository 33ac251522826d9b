"""The terms of a fold: when it is legal, and s and t laid out for a weight and a bias.

    conv(x, W, b) · s + t  =  conv(x, W · s, b · s + t)          s, t: [C_out], [1], or a number

A fold replaces a producer and what reads it by the producer with another weight and bias. It is legal where
nobody else reads what is replaced, every tensor is known, and the new producer can stand at the last of the
replaced nodes, or at the producer, with nothing that it reads written to on the way and in the same grad
mode, autocast, functorch level and stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.modes import difference
from fxpasses.graph.operands import Operand, tensor_of
from fxpasses.graph.quantised import quantises
from fxpasses.graph.views import BatchNorm, Convolution, Linear, Producer, is_batch_norm, read_batch_norm
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.hazards import MODE_CODES
from fxpasses.torch_internals.tensors import is_batched

# Reading ---------------------------------------------------------------------------------------------------


def norm_at(node: Node) -> BatchNorm | None:
    """A batch norm with running statistics whose result is `node`, or whose operator is."""
    first = node.args[0] if getattr(node.target, "__name__", "") == "getitem" and node.args else node
    if not isinstance(first, Node) or not is_batch_norm(first):
        return None
    norm = read_batch_norm(first)
    if isinstance(norm, Decline) or norm.training or norm.running_mean is None or norm.running_var is None:
        return None
    return norm


# Legality --------------------------------------------------------------------------------------------------


def known_values(operands: Iterable[Operand | None], result: Node) -> Decline | None:
    """Every tensor has metadata, of a real floating dtype, hides no batch dimension and was not quantised."""
    for operand in operands:
        found = tensor_of(operand)
        if operand is None:
            continue
        if found is None:
            return Decline("no-metadata", "{} has no metadata", result, (describe(operand),))
        if not found.is_floating_point():
            return Decline("dtype", "{} is of {}", result, (describe(operand), found.dtype))
        if is_batched(found):
            return Decline("functorch", "vmap hides a dimension of {}", result, (describe(operand),))
        if isinstance(operand, Node) and quantises(operand):
            return Decline("quantised", "{} is a quantised value", result, (describe(operand),))
    return None


def known_groups(producer: Producer) -> Decline | None:
    """Laying s out by group takes numbers; a symbolic size would have to be guarded on."""
    weight = tensor_of(producer.weight)
    if isinstance(producer, Linear) or not producer.transposed or producer.groups == 1 or weight is None:
        return None
    if all(isinstance(size, int) for size in weight.shape[:2]):
        return None
    message = "{} is transposed and grouped, and its weight has a symbolic number of channels"
    return Decline("symbolic-channels", message, producer.nodes[-1], (producer.nodes[-1].name,))


def constant_statistics(context: GraphContext, norms: Iterable[BatchNorm], result: Node) -> Decline | None:
    """A batch norm gives its statistics no gradient; the rewritten one would."""
    for norm in norms:
        for operand in (norm.running_mean, norm.running_var):
            if context.requires_grad(operand):
                return Decline("statistics-require-grad", "{} requires grad", result, (describe(operand),))
    return None


def same_state(
    context: GraphContext, nodes: Sequence[Node], last: Node, operands: Iterable[Operand | None]
) -> Decline | None:
    """One mode for all nodes, and no write to an operand between the first and the last.

    Args:
        context: the graph.
        nodes: what is replaced, in program order.
        last: the last of them, where the replacement stands.
        operands: the tensors that they read.
    """
    first = nodes[0]
    for node in nodes[:-1]:
        apart = difference(context.modes(node), context.modes(last))
        if apart is not None:
            message = "{} and {} stand under another {} mode"
            return Decline(MODE_CODES[apart], message, node, (node.name, last.name, apart))
    written = context.written_between(operands, first, last)
    if written is None:
        return None
    message = "{} may write to something that {} reads, before {} runs"
    return Decline("mutation", message, written, (describe(written), first.name, last.name))


def place_of_fold(
    context: GraphContext,
    producer: Producer,
    last: Node,
    operands: Sequence[Operand | None],
    numbers: Sequence[object] = (),
    *,
    read_earlier: Sequence[Operand | None] = (),
) -> Node | Decline:
    """The node before which the new producer may stand, or why there is none.

    Args:
        context: the graph.
        producer: what the fold goes into.
        last: the last of the replaced operators.
        operands: the tensors that the replaced operators read beside the producer's result.
        numbers: further arguments of theirs, which may be nodes.
        read_earlier: those of `operands` that another operator than `last` reads.
    """
    first, source = producer.nodes[0], producer.nodes[-1]
    apart = difference(context.modes(first), context.modes(last))
    if apart not in (None, "autocast") or difference(context.modes(first), context.modes(source)):
        message = "{} and {} stand under another {} mode"
        return Decline(MODE_CODES[apart or "autocast"], message, source, (source.name, last.name, apart))
    written = context.written_between((producer.input, producer.weight, producer.bias), first, last)
    if written is None:
        written = context.written_between(read_earlier, source, last)
    if apart is None and written is None:
        return last
    # Earlier means at the producer's last node: a bias that is added in a node of its own is read there.
    late = [
        operand
        for operand in (*operands, *numbers)
        if isinstance(operand, Node) and operand.op != "get_attr" and not operand < source
    ]
    early = context.written_between((producer.input, producer.weight), first, source)
    rewritten = context.written_between(operands, source, last)
    if not late and early is None and rewritten is None:
        return source
    if apart is not None:
        message = "{} and {} stand under another autocast state, and the norm's parameters come only later"
        return Decline("autocast", message, source, (source.name, last.name))
    message = "{} may write to something that {} reads, before {} runs"
    return Decline("mutation", message, written, (describe(written), source.name, last.name))


def describe(operand: object) -> str:
    """A node by name and operator, a module's tensor by path."""
    if not isinstance(operand, Node):
        return getattr(operand, "path", str(operand))
    name = (
        operand.target
        if isinstance(operand.target, str)
        else getattr(operand.target, "__name__", operand.target)
    )
    return f"{operand.name} ({operand.op if operand.op in ('placeholder', 'get_attr', 'output') else name})"


# Arithmetic ------------------------------------------------------------------------------------------------


def dtype_of(operand: Operand) -> torch.dtype:
    """The dtype of an operand that has metadata."""
    found = tensor_of(operand)
    assert found is not None, "legality asks for metadata"
    return found.dtype


def compute_dtype(operands: Iterable[Operand | None]) -> torch.dtype:
    """float32, or wider where an operand is: half types are folded in float32 and cast once."""
    dtype = torch.float32
    for operand in operands:
        if operand is not None:
            dtype = torch.promote_types(dtype, dtype_of(operand))
    return dtype


def norm_scale(norm: BatchNorm, build: Builder, dtype: torch.dtype) -> Node:
    """S = gamma / sqrt(var + eps), of shape [C]."""
    assert norm.running_var is not None
    variance = build.cast(build.operand(norm.running_var), dtype)
    inverse = build.rsqrt(build.add(variance, norm.eps))
    if norm.gamma is None:
        return inverse
    return build.mul(inverse, build.cast(build.operand(norm.gamma), dtype))


def along_channels(scale: Node, producer: Producer, build: Builder) -> Node:
    """S of shape [C_out] (or [1]) shaped to multiply the weight along its output channels."""
    weight, given = tensor_of(producer.weight), tensor_of(scale)
    assert weight is not None
    if given is not None and given.ndim == 1 and isinstance(given.shape[0], int) and given.shape[0] == 1:
        return build.reshape(scale, [1] * weight.ndim)
    if isinstance(producer, Linear):
        return scale if producer.weight_axis == 1 else build.reshape(scale, [-1, 1])
    kernel = [1] * (weight.ndim - 2)
    if not producer.transposed:
        return build.reshape(scale, [-1, 1, *kernel])
    if producer.groups == 1:
        return build.reshape(scale, [1, -1, *kernel])
    return _along_grouped_channels(scale, producer, build, weight)


def _along_grouped_channels(scale: Node, producer: Convolution, build: Builder, weight: torch.Tensor) -> Node:
    """S as [C_in, C_out/g, 1, ...]: each group's channels, for every input channel of that group."""
    groups, per_group = producer.groups, int(weight.shape[1])
    inputs = int(weight.shape[0])
    by_group = build.reshape(scale, [groups, 1, per_group])
    repeated = build.repeat(by_group, [1, inputs // groups, 1])
    return build.reshape(repeated, [inputs, per_group, *[1] * (weight.ndim - 2)])


@dataclass
class Terms:
    """s and t of y -> y · s + t: numbers while they can be, tensors of [C] (or [1]) from then on.

    Attributes:
        build: where to write.
        dtype: what the arithmetic is done in.
        scale, shift: s and t.
    """

    build: Builder
    dtype: torch.dtype
    scale: Node | float = 1.0
    shift: Node | float = 0.0

    def multiply(self, factor: Node | float) -> None:
        """Followed by a multiplication."""
        self.scale = self._times(self.scale, factor)
        self.shift = self._times(self.shift, factor)

    def divide(self, divisor: Node | float) -> None:
        """Followed by a division."""
        self.scale, self.shift = self._over(self.scale, divisor), self._over(self.shift, divisor)

    def add(self, given: Node | float, factor: float = 1.0) -> None:
        """Followed by an addition of `factor` times a number or tensor."""
        self.shift = self._plus(self.shift, self._times(given, factor))

    def normalise(self, norm: BatchNorm) -> None:
        """Followed by a batch norm with fixed statistics."""
        assert norm.running_mean is not None
        self.add(self.tensor(norm.running_mean), -1.0)
        self.multiply(norm_scale(norm, self.build, self.dtype))
        if norm.beta is not None:
            self.add(self.tensor(norm.beta))

    def tensor(self, operand: Operand) -> Node:
        """An operand with one number per channel, or one in all, as a vector in the arithmetic's dtype."""
        node, found = self.build.operand(operand), tensor_of(operand)
        if found is None or found.ndim != 1:
            node = self.build.reshape(node, [-1])
        return self.build.cast(node, self.dtype)

    def _times(self, first: Node | float, second: Node | float) -> Node | float:
        if isinstance(second, Node):
            first, second = second, first
        if not isinstance(first, Node):
            assert not isinstance(second, Node)
            return first * second
        if isinstance(second, Node):
            return self.build.mul(first, second)
        return first if second == 1 else self.build.mul(first, second)

    def _plus(self, first: Node | float, second: Node | float) -> Node | float:
        if isinstance(second, Node):
            first, second = second, first
        if not isinstance(first, Node):
            assert not isinstance(second, Node)
            return first + second
        if not isinstance(second, Node) and second == 0:
            return first
        return self.build.add(first, second)

    def _over(self, first: Node | float, second: Node | float) -> Node | float:
        if isinstance(first, Node):
            return self.build.div(first, second)
        if not isinstance(second, Node):
            return first / second
        return 0.0 if first == 0 else self._times(self.build.reciprocal(second), first)


def folded_operands(producer: Producer, terms: Terms) -> tuple[Node, Node | None]:
    """W' = W · s and b' = t, which has b · s in it, in the weight's dtype; marked for recomputation."""
    build, scale, shift = terms.build, terms.scale, terms.shift
    weight = build.operand(producer.weight)
    if isinstance(scale, Node):
        weight = build.mul(build.cast(weight, terms.dtype), along_channels(scale, producer, build))
    elif scale != 1:
        weight = build.mul(build.cast(weight, terms.dtype), scale)
    weight = build.cast(weight, dtype_of(producer.weight))
    bias = None
    if isinstance(shift, Node) or shift != 0:
        bias = build.cast(_per_channel(shift, producer, terms), dtype_of(producer.weight))
    build.recompute_in_backward()
    return weight, bias


def _per_channel(shift: Node | float, producer: Producer, terms: Terms) -> Node:
    build, channels = terms.build, output_channels(producer)
    if not isinstance(shift, Node):
        assert isinstance(channels, int), "legality asks for a number of channels"
        return build.full([channels], shift, terms.dtype, like=build.operand(producer.weight))
    found = tensor_of(shift)
    assert found is not None
    if isinstance(found.shape[0], int) and found.shape[0] == 1 and isinstance(channels, int):
        return build.expand(shift, [channels])
    return shift


def weight_axes(producer: Producer) -> list[int]:
    """The axes of a direct producer's weight: that of the output channels, then the others."""
    weight = tensor_of(producer.weight)
    assert weight is not None
    first = producer.weight_axis if isinstance(producer, Linear) else 0
    return [first, *(axis for axis in range(weight.ndim) if axis != first)]


def output_channels(producer: Producer) -> int | torch.SymInt | None:
    """How many channels a producer writes."""
    found, axis = tensor_of(producer.nodes[-1]), producer.channel_axis
    return None if found is None or axis is None else found.shape[axis]
