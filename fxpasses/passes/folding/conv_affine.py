"""conv_affine: multiplications and additions per channel become part of the convolution before them.

Detection and segmentation models write a frozen batch norm as `x * scale + bias` with buffers viewed as
[1, C, 1, 1] (torchvision's FrozenBatchNorm2d, detectron2, DETR); transformers scale a branch by a vector
(LayerScale). For any chain of y -> y · m, y / m, ±y ± t, BN_eval(y) after y = conv(x, W, b):

    y · s + t  =  conv(x, W · s, b · s + t)

with s and t multiplied out along the chain, once per channel instead of once per element.

affine_across_views folds the same chain where transpose, flatten, view, contiguous, dropout in eval mode or
upsampling by the nearest element stand inside it: conv - flatten - BN, linear - transpose - BN. They carry
every channel along unchanged (`fxpasses.graph.moves`), so they are done after the convolution.

Legal where
- each operand has one number per channel of the producer's output-channel axis, or one number in all, told
  by shape (`fxpasses.graph.affine`): [W] against [N, C, H, W] is another thing even where W equals C;
- nobody else reads what the chain computes, and no operand is computed from it;
- a batch norm in the chain uses running statistics, which take no gradient;
- a divisor cannot be zero: a channel divided by zero has eager's signs only element by element. (A factor
  that is infinite gives NaN instead of infinity, as it does in efficient_conv_bn_eval.);
- no step widens the result to float64, which a narrower convolution could not fill;
- grad mode, autocast, functorch level and stream are those of the producer, and nothing that is read is
  written to on the way.

The longest legal part of a chain is folded at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxpasses.graph.affine import (
    Affine,
    affine_steps,
    is_affine,
    is_never_zero,
    is_per_channel,
    same_shape,
)
from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import tensor
from fxpasses.graph.modes import difference
from fxpasses.graph.moves import Move, read_move
from fxpasses.graph.operands import ModuleTensor, Operand, tensor_of
from fxpasses.graph.views import BatchNorm, Producer, is_batch_norm, read_producer
from fxpasses.passes.folding.profit import ConvBnCost, conv_bn_benefit, conv_bn_profit
from fxpasses.passes.folding.spelling import fused_producer, repeated_move
from fxpasses.passes.folding.terms import (
    Terms,
    compute_dtype,
    constant_statistics,
    describe,
    dtype_of,
    folded_operands,
    known_groups,
    known_values,
    norm_at,
    output_channels,
    place_of_fold,
)
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.hazards import MODE_CODES
from fxpasses.rewrite.rule import Match, Rule, first_decline

Step = Affine | BatchNorm | Move

_LONGEST = 32
"""Steps of a chain; a longer one is folded in parts."""


@dataclass(frozen=True)
class ChainMatch(Match):
    """A producer and the steps after it, in program order."""

    producer: Producer
    steps: tuple[Step, ...]

    @functools.cached_property
    def place(self) -> Node | Decline:
        """The node before which the fused producer may stand, or why there is none."""
        *earlier, last = self.steps
        # The sizes that a view is given may be nodes; so may eps.
        numbers = [
            given
            for step in self.steps
            for given in step.nodes[0].all_input_nodes
            if tensor(given) is None or isinstance(step, Move)
        ]
        inside = set(self.nodes)
        numbers = [number for number in numbers if number not in inside]
        read_earlier = [operand for step in earlier for operand in operands_of(step)]
        return place_of_fold(
            self.context, self.producer, last.nodes[0], self.operands, numbers, read_earlier=read_earlier
        )

    @functools.cached_property
    def cost(self) -> ConvBnCost:
        """What decides whether folding pays."""
        factors: list[Operand | None] = []
        for step in self.steps:
            if isinstance(step, BatchNorm):
                factors.append(step.gamma)
            elif isinstance(step, Affine) and step.kind != "add":
                factors += operands_of(step)
        norms = [step for step in self.steps if isinstance(step, BatchNorm)]
        kernels = sum(not isinstance(step, Move) for step in self.steps)
        last = self.steps[-1].nodes[0]
        return ConvBnCost.of_fold(
            self.context, self.producer, last, factors, kernels=kernels, keeps_input=bool(norms)
        )

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The tensors that the steps read beside what the chain computes."""
        return tuple(operand for step in self.steps for operand in operands_of(step))

    @property
    def pattern_size(self) -> int:
        """The producer and its steps."""
        return 1 + len(self.steps)


def operands_of(step: Step) -> list[Operand]:
    """The tensors that a step reads beside its source."""
    if isinstance(step, Affine):
        return [step.operand] if isinstance(step.operand, (Node, ModuleTensor)) else []
    if isinstance(step, Move):
        return []
    return [
        operand
        for operand in (step.gamma, step.beta, step.running_mean, step.running_var)
        if operand is not None
    ]


class ConvAffine(Rule[ChainMatch]):
    """Multiplications and additions per channel become part of the convolution or linear layer before."""

    name = "conv_affine"
    after = ("efficient_conv_bn_eval",)
    pattern_size = 2
    folds_weights = True

    @property
    def is_anchor(self) -> Callable[[Node], bool]:
        """Every step that may end a chain."""
        return _ends_chain

    def suits(self, steps: tuple[Step, ...]) -> bool:
        """Whether the chain is this rule's: steps next to one another, and more than batch norms."""
        return not any(isinstance(step, Move) for step in steps) and any(
            isinstance(step, Affine) for step in steps
        )

    def match(self, node: Node, context: GraphContext) -> ChainMatch | Decline | None:
        """The chain that ends in `node`, unless it legally goes on."""
        found = self._chain(node, context)
        if not isinstance(found, ChainMatch) or len(found.result.users) != 1:
            return found
        (user,) = found.result.users
        if _ends_chain(user) and len(found.steps) < _LONGEST:
            longer = self._chain(user, context)
            goes_on = isinstance(longer, ChainMatch) and found.result in longer.nodes
            if goes_on and self.legality(longer) is None and self.legality(found) is None:  # type: ignore[arg-type]
                return None
        return found

    def _chain(self, node: Node, context: GraphContext) -> ChainMatch | Decline | None:
        written = tensor(node)
        if written is not None and written.ndim < 2:
            return None  # no batch of channels: arithmetic on parameters, such as that of a fold
        if read_producer(node) is not None:
            return None
        found = _descend(node, _LONGEST)
        if found is None or not self.suits(found[1]):
            return None
        producer, steps = found
        if isinstance(producer, Decline):
            return producer
        problem = _first_unsuitable(producer, steps)
        if problem is not None:
            return problem if isinstance(problem, Decline) else None
        nodes = (*producer.nodes, *(node for step in steps for node in step.nodes))
        return ChainMatch(context, nodes, producer, steps)

    def legality(self, match: ChainMatch) -> Decline | None:
        """The conditions of the module's docstring, one by one."""
        checks = (_sole_readers, _known, _same_modes, _constant_statistics, _divisors, _has_place)
        return first_decline(match, checks)

    def profitability(self, match: ChainMatch) -> Decline | None:
        """As for a batch norm; a multiplication keeps its input only where its factor trains."""
        return conv_bn_profit(match.cost, match.result)

    def benefit(self, match: ChainMatch) -> str:
        """What is not kept, or not moved."""
        return conv_bn_benefit(match.cost)

    def figures(self, match: ChainMatch) -> Mapping[str, float]:
        """The bytes that decide."""
        return match.cost.figures

    def insertion_point(self, match: ChainMatch) -> Node:
        """The last step, or the producer where only its place is right."""
        assert isinstance(match.place, Node)
        return match.place

    def rewrite(self, match: ChainMatch, build: Builder) -> Node:
        """Writes s, t, the producer with them, and the moves."""
        producer = match.producer
        terms = Terms(build, compute_dtype((producer.weight, producer.bias, *match.operands)))
        given = build.operand(producer.input)
        if producer.bias is not None:
            terms.add(terms.tensor(producer.bias))
        for step in match.steps:
            _append(step, terms)
        weight, bias = folded_operands(producer, terms)
        result = fused_producer(producer, build, given, weight, bias)
        for step in match.steps:
            if isinstance(step, Move) and not step.identity:
                result = repeated_move(step, build, result)
        return build.cast(result, dtype_of(match.result))


class AffineAcrossViews(ConvAffine):
    """Batch norms and steps per channel after a transpose, flatten, ... become part of the layer before."""

    name = "affine_across_views"
    after = ("conv_affine",)
    pattern_size = 3
    folds_weights = True

    def suits(self, steps: tuple[Step, ...]) -> bool:
        """Whether something stands between the producer and the last step that only moves channels."""
        return any(isinstance(step, Move) for step in steps)


# Matching --------------------------------------------------------------------------------------------------


def _ends_chain(node: Node) -> bool:
    return is_affine(node) or is_batch_norm(node)


def _descend(node: Node, budget: int) -> tuple[Producer | Decline, tuple[Step, ...]] | None:
    """The producer that a chain of steps ending in `node` starts from (or why it is none), and the steps."""
    producer = read_producer(node)
    if isinstance(producer, Decline) and producer.code in ("not-a-linear", "bias-shape"):
        return None
    if producer is not None:
        return producer, ()
    if budget == 0:
        return None
    refused = None
    for step in _steps_at(node):
        source = step.input if isinstance(step, BatchNorm) else step.source
        if not isinstance(source, Node) or (len(source.users) > 1 and read_producer(source) is None):
            continue
        found = _descend(source, budget - 1)
        if found is not None and not isinstance(found[0], Decline):
            return found[0], (*found[1], step)
        refused = refused or (found and (found[0], (*found[1], step)))
    return refused


def _steps_at(node: Node) -> list[Step]:
    if is_affine(node):
        steps = affine_steps(node)
        return [] if isinstance(steps, Decline) else [step for step in steps if _keeps_shape(step)]
    norm = norm_at(node)
    if norm is not None:
        return [norm]
    move = read_move(node)
    return [] if move is None else [move]


def _keeps_shape(step: Affine) -> bool:
    """Whether the source has the shape of the result, and the operand has not."""
    source, result = tensor(step.source), tensor(step.node)
    if source is None or result is None or not same_shape(source, result):
        return False
    operand = step.operand
    found = tensor_of(operand) if isinstance(operand, (Node, ModuleTensor)) else None
    if found is None or not same_shape(found, result):
        return True
    return sum(not (isinstance(size, int) and size == 1) for size in found.shape) <= 1


def _first_unsuitable(producer: Producer, steps: tuple[Step, ...]) -> Decline | bool | None:
    """Why the channels of a step are not the producer's: a reason, True for no pattern at all, or None."""
    axis = producer.channel_axis
    for step in steps:
        source = step.input if isinstance(step, BatchNorm) else step.source
        found = tensor_of(source)
        if axis is None or found is None:
            return Decline("no-metadata", "{} has no metadata", step.nodes[0], (describe(source),))
        if isinstance(step, Move):
            axis = step.axis_after(axis)
            if axis is None:
                return True
        elif isinstance(step, BatchNorm):
            if axis != step.channel_axis:
                message = "{} has its output channels on axis {}, and the batch norm normalises axis {}"
                return Decline("channel-axis", message, source, (describe(source), axis, step.channel_axis))  # type: ignore[arg-type]
        elif (problem := _operand_problem(step, found, axis)) is not None:
            return problem
    return None


def _operand_problem(step: Affine, source: torch.Tensor, axis: int) -> Decline | None:
    if not isinstance(step.operand, (Node, ModuleTensor)):
        return None
    operand = tensor_of(step.operand)
    if operand is None or is_per_channel(operand, source, axis):
        return None
    message = "{} has shape {}, which is not one number per channel of axis {} of {}"
    details = (describe(step.operand), tuple(operand.shape), axis, tuple(source.shape))
    return Decline("operand-shape", message, step.node, details)


# Legality --------------------------------------------------------------------------------------------------


def _sole_readers(match: ChainMatch) -> Decline | None:
    """Every result on the way is read by the next step alone, and there once."""
    readers = [*match.producer.nodes[1:], *(step.nodes[0] for step in match.steps)]
    results = [*match.producer.nodes, *(step.nodes[-1] for step in match.steps[:-1])]
    for result, reader in zip(results, readers, strict=True):
        other = next((user for user in result.users if user is not reader), None)
        if other is not None:
            message = "the result of {} is also used by {}"
            return Decline("multiple-users", message, other, (result.name, describe(other)))
        if any(operand is result for operand in match.operands):
            return Decline("multiple-users", "{} is also an operand of a step", result, (result.name,))
    return None


def _known(match: ChainMatch) -> Decline | None:
    producer = match.producer
    results = (match.result, producer.nodes[-1])
    operands = (producer.input, producer.weight, producer.bias, *match.operands, *results)
    problem = known_values(operands, match.result)
    problem = known_groups(producer) if problem is None else problem
    if problem is not None:
        return problem
    wide, narrow = map(dtype_of, results)
    if wide == torch.float64 and narrow != torch.float64:
        message = "{} is of {}, and the convolution's result of {}"
        return Decline("dtype", message, match.result, (match.result.name, wide, narrow))
    if not isinstance(output_channels(producer), int) and producer.bias is None:
        message = "{} has no bias, and a symbolic number of channels to make one for"
        return Decline("symbolic-channels", message, match.result, (producer.nodes[-1].name,))
    return None


def _same_modes(match: ChainMatch) -> Decline | None:
    """All steps run in one state; that of the producer is compared where its place is found."""
    modes = match.context.modes(match.steps[-1].nodes[0])
    for step in match.steps[:-1]:
        apart = difference(modes, match.context.modes(step.nodes[0]))
        if apart is not None:
            message = "{} and {} stand under another {} mode"
            details = (step.nodes[0].name, match.result.name, apart)
            return Decline(MODE_CODES[apart], message, step.nodes[0], details)
    return None


def _constant_statistics(match: ChainMatch) -> Decline | None:
    norms = [step for step in match.steps if isinstance(step, BatchNorm)]
    return constant_statistics(match.context, norms, match.result)


def _divisors(match: ChainMatch) -> Decline | None:
    for step in match.steps:
        if isinstance(step, Affine) and step.kind == "div" and not is_never_zero(step.operand):
            message = "{} may be zero, and a channel that is divided by zero cannot be folded"
            return Decline("zero-divisor", message, step.node, (describe(step.operand),))
    return None


def _has_place(match: ChainMatch) -> Decline | None:
    return match.place if isinstance(match.place, Decline) else None


# Profit and rewrite ----------------------------------------------------------------------------------------


def _append(step: Step, terms: Terms) -> None:
    if isinstance(step, BatchNorm):
        terms.normalise(step)
    elif isinstance(step, Affine):
        operand = step.operand
        given = terms.tensor(operand) if isinstance(operand, (Node, ModuleTensor)) else float(operand)
        if step.kind == "mul":
            terms.multiply(given)
        elif step.kind == "div":
            terms.divide(given)
        else:
            terms.multiply(step.sign)
            terms.add(given, step.factor)
