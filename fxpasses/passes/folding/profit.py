"""When folding a batch norm pays: who trains, who runs the graph, how many bytes move.

A batch norm over a result of A bytes reads and writes 2·A when it runs as a kernel of its own (eager), and
nothing when a compiler fuses it with its neighbours (inductor does, with the ReLU that follows). Folding
reads and writes the weight of B bytes, 2·B, at every call, unless weights are cached.

In training the question is what must be kept for the backward pass. The gradient of gamma needs the
convolution's result: A bytes kept. The folded form needs the gradient of W' instead, which is the gradient
of W where W trains anyhow. So

=================== ================================ =============================================
W trains, gamma too saves A bytes                    rewrite
gamma frozen        fused: nothing is saved          decline; eager keeps A bytes anyway, so rewrite
only gamma trains   adds the gradient of a weight    decline: as many FLOPs as the forward pass
=================== ================================ =============================================

A multiplication by a frozen scale (FrozenBatchNorm) keeps nothing in eager either, unlike the batch norm's
operator; there only the traffic of its kernels counts, 2·A each and 2·A for the gradient. Merging parallel
convolutions saves what the smaller one writes and the sum reads, whoever runs the graph.

Measured (torch 2.13, CPU): resnet50, everything trainable, 4.79 -> 2.28 GiB saved; gamma frozen 2.19 ->
2.28 GiB; inference with live weights 0.87x of stock inductor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.operands import Operand, tensor_of
from fxpasses.graph.views import BatchNorm, Convolution, Linear, Producer
from fxpasses.torch_internals.sizes import size_hint

_LAUNCH_BYTES = 65536
"""What the six small kernels that fold the parameters cost in eager mode, as bytes that could be moved
meanwhile (about 3 µs each, at 10 GB/s, and twice that: once to read, once to write)."""


@dataclass(frozen=True)
class ConvBnCost:
    """What decides whether folding pays at one site.

    Attributes:
        recording: whether autograd records here.
        weight_trains, gamma_trains, input_trains: what requires grad.
        result_bytes: size of the convolution's result, in bytes, at the sizes it was traced with.
        flops: floating-point operations of the convolution's forward pass, at the same sizes; the gradient of
            its weight takes as many.
        weight_bytes: size of the weight, in bytes.
        fused: whether a compiler will fuse the batch norm with its neighbours.
        weights_cached: whether folded weights are kept between calls.
        kernels: how many operators over the result are folded.
        keeps_input: whether eager keeps the result for the backward pass whoever trains, as a batch norm's
            operator does and a multiplication does not.
    """

    recording: bool
    weight_trains: bool
    gamma_trains: bool
    input_trains: bool
    result_bytes: int
    weight_bytes: int
    flops: int
    fused: bool
    weights_cached: bool
    kernels: int = 1
    keeps_input: bool = True

    @property
    def trains(self) -> bool:
        """Whether autograd records here and anything takes a gradient."""
        return self.recording and (self.weight_trains or self.gamma_trains or self.input_trains)

    @property
    def keeps_result(self) -> bool:
        """Whether the convolution's result is kept for the backward pass as long as nothing is folded."""
        return self.gamma_trains or (self.keeps_input and not self.fused)

    @property
    def weights_moved(self) -> int:
        """Bytes of weights that folding reads and writes at every call; their gradient is scaled as well."""
        return 2 * self.weight_bytes * (2 if self.trains and self.weight_trains else 1)

    @property
    def traffic_saved(self) -> int:
        """Bytes that kernels of their own read and write, and those of the gradient; none are, once fused."""
        return 0 if self.fused else 2 * self.kernels * self.result_bytes * (2 if self.trains else 1)

    @property
    def figures(self) -> dict[str, float]:
        """What folding saves and costs, in bytes, under the names of `fxpasses.Remark`; no zeros."""
        once = self.weights_cached and not self.trains
        found: dict[str, float] = {
            "kept_bytes": self.result_bytes if self.trains and self.keeps_result else 0,
            "traffic_bytes": self.traffic_saved,
            "weight_bytes": 0 if once else self.weights_moved,
        }
        return {name: figure for name, figure in found.items() if figure}

    @staticmethod
    def of(context: GraphContext, producer: Producer, norm: BatchNorm) -> ConvBnCost:
        """Reads the cost of a site off its metadata."""
        return ConvBnCost.of_fold(context, producer, norm.nodes[0], (norm.gamma,))

    @staticmethod
    def of_fold(
        context: GraphContext,
        producer: Producer,
        last: Node,
        factors: Sequence[Operand | None],
        *,
        kernels: int = 1,
        keeps_input: bool = True,
    ) -> ConvBnCost:
        """The cost of folding operators that multiply by `factors`, the last of which is `last`."""
        return ConvBnCost(
            recording=context.modes(last).grad,
            weight_trains=context.requires_grad(producer.weight),
            gamma_trains=any(map(context.requires_grad, factors)),
            input_trains=context.requires_grad(producer.input),
            result_bytes=bytes_of(producer.nodes[-1]),
            weight_bytes=bytes_of(producer.weight),
            flops=flops_of(producer),
            fused=context.executor == "fused",
            weights_cached=context.weights_cached,
            kernels=kernels,
            keeps_input=keeps_input,
        )


def conv_bn_profit(cost: ConvBnCost, site: Node) -> Decline | None:
    """Declines where folding costs more than it saves, with the figures."""
    return _training_profit(cost, site) if cost.trains else _inference_profit(cost, site)


def conv_bn_benefit(cost: ConvBnCost) -> str:
    """What folding saves where it pays, with the figures."""
    if cost.trains and cost.weight_trains and cost.keeps_result:
        return (
            f"{cost.result_bytes} bytes less to keep for the backward pass, which takes the gradient of the "
            f"weight ({cost.flops} FLOPs) anyway; {cost.weights_moved} bytes of weights moved a step"
        )
    if cost.weights_cached and not cost.trains:
        return f"{cost.traffic_saved} bytes of traffic less, and the weight is folded once a version"
    figures = (cost.traffic_saved, cost.weights_moved)
    return "{} bytes of traffic less, {} bytes of weights more at every call".format(*figures)


def _training_profit(cost: ConvBnCost, site: Node) -> Decline | None:
    if cost.weight_trains and cost.keeps_result:
        return None
    if cost.gamma_trains:
        message = (
            "only the batch norm trains: folding saves {} bytes for the backward pass, and adds the gradient "
            "of a weight of {} bytes, which takes {} FLOPs, as many as the forward pass, and keeps the "
            "convolution's input"
        )
        figures = (cost.result_bytes, cost.weight_bytes, cost.flops)
        return Decline("adds-weight-gradient", message, site, figures)
    moved = cost.weights_moved
    if cost.traffic_saved >= moved + _LAUNCH_BYTES:
        return None
    message = (
        "nothing that scales it takes a gradient, so the convolution's result ({} bytes) is not kept for the "
        "backward pass anyway, and folding would move {} bytes of weights at every step"
    )
    return Decline("nothing-saved", message, site, (cost.result_bytes, moved))


def _inference_profit(cost: ConvBnCost, site: Node) -> Decline | None:
    if cost.weights_cached:
        return None
    moved, saved = cost.weights_moved + _LAUNCH_BYTES, cost.traffic_saved
    if saved >= moved:
        return None
    message = (
        "in inference folding saves {} bytes of traffic ({}) and costs {} at every call, since the weights "
        "may change between calls"
    )
    reason = "the compiler fuses the batch norm with its neighbours" if cost.fused else "one kernel"
    return Decline("live-weights", message, site, (saved, reason, moved))


def input_norm_profit(cost: ConvBnCost, norm_bytes: int, site: Node) -> Decline | None:
    """Whether folding a batch norm into the layer after it pays.

    Args:
        cost: of the layer; `gamma_trains` is about the norm before it.
        norm_bytes: what the norm writes.
        site: the layer.
    """
    trains = cost.trains
    if trains and cost.gamma_trains and not cost.weight_trains:
        message = "only the batch norm trains: folding adds the gradient of a weight of {} bytes, {} FLOPs"
        return Decline("adds-weight-gradient", message, site, (cost.weight_bytes, cost.flops))
    if cost.weights_cached and not trains:
        return None
    moved = 2 * cost.weight_bytes * (2 if trains else 1) + _LAUNCH_BYTES
    saved = 0 if cost.fused else 2 * norm_bytes * (2 if trains else 1)
    if saved >= moved:
        return None
    code = "nothing-saved" if trains else "live-weights"
    message = "folding saves {} bytes of traffic and costs {}, at every call"
    return Decline(code, message, site, (saved, moved))


def merge_profit(
    context: GraphContext,
    site: Node,
    *,
    host_trains: bool,
    others_train: bool,
    result_bytes: int,
    weight_bytes: int,
) -> Decline | None:
    """Whether one convolution instead of two branches saves more traffic than summing their weights costs.

    Args:
        context: the graph.
        site: the node that joins the branches.
        host_trains: whether the weight of the convolution that stays requires grad.
        others_train: whether a parameter of the other branch does.
        result_bytes: what the other branch writes and the sum reads.
        weight_bytes: the size of the weights that are summed.
    """
    recording = context.modes(site).grad
    if recording and others_train and not host_trains:
        message = (
            "only the smaller branch trains: merging saves {} bytes of traffic and adds the gradient of the "
            "larger one's weight, of {} bytes"
        )
        return Decline("adds-weight-gradient", message, site, (result_bytes, weight_bytes))
    if context.weights_cached:
        return None
    passes = 2 if recording and host_trains else 1
    moved = 2 * passes * weight_bytes + (0 if context.executor == "fused" else _LAUNCH_BYTES)
    if passes * result_bytes >= moved:
        return None
    message = "merging saves {} bytes of traffic and moves {} bytes of weights at every step"
    return Decline("small-result", message, site, (passes * result_bytes, moved))


def flops_of(producer: Producer) -> int:
    """Floating-point operations of a convolution or linear operator, two a multiply-add, at the traced sizes.

    Every element of the result (of the input, where it is transposed) meets the weights of one channel.
    """
    weight = tensor_of(producer.weight)
    transposed = isinstance(producer, Convolution) and producer.transposed
    many = tensor_of(producer.input if transposed else producer.nodes[-1])
    if weight is None or many is None or weight.dim() == 0:
        return 0
    channels = size_hint(weight.shape[producer.weight_axis if isinstance(producer, Linear) else 0])
    return 2 * _count(many) * _count(weight) // max(1, channels)


def bytes_of(operand: Operand) -> int:
    """The size of a tensor, in bytes, with symbolic sizes as they were traced."""
    found = tensor_of(operand)
    return 0 if not isinstance(found, torch.Tensor) else found.element_size() * _count(found)


def _count(given: torch.Tensor) -> int:
    """The number of elements, with symbolic sizes as they were traced."""
    return math.prod(map(size_hint, given.shape))
