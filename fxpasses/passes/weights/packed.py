"""Packed weights: convolutions over kept weights, in the format of whichever implementation is the fastest.

Inductor packs weights only where it freezes a model, and what it freezes is stale after an update. Here the
same operators are written by a pass over inductor's graph, and the packed tensors are ours:

    convolution(x, weight, bias)  ->  mkldnn._convolution_pointwise(x, packed, bias, ...)
    activation(convolution(x, weight, bias) + y)  ->  fxpasses.convolution(x, packed, y, ...)

The second is a kernel of ours (`fxpasses.kernels`), taken where it was measured to be faster.

A packed tensor is a constant of the generated code. When the weights change its content is replaced and the
code stays, so a refresh costs one pass over the weights. Inductor's own patterns then fuse what follows the
convolution (an activation, a sum) into oneDNN's, as they do in a frozen graph; ours are fused here.

A dense tensor that was packed and that nothing else reads is not needed any more: the graph's input for it
gets a tensor of the same shape and strides without memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from fxpasses.graph.decline import Decline
from fxpasses.graph.locations import location_of, module_of
from fxpasses.graph.metadata import set_value, tensor
from fxpasses.kernels.convolution import ACTIVATIONS, Sizes, pack
from fxpasses.kernels.kernel import Kernel, Kind
from fxpasses.kernels.library import missing
from fxpasses.passes.weights.epilogues import epilogue_of
from fxpasses.passes.weights.own_kernels import (
    OwnKernels,
    may_be_ours,
    own_kernel_of_convolution,
    own_kernel_of_linear,
    sizes_of,
)
from fxpasses.passes.weights.sequences import write_sequences
from fxpasses.passes.weights.stride_order import in_order
from fxpasses.report.data import Remark, Status
from fxpasses.torch_internals.fake_tensors import RealConstantsAllowed, without_fake_tensors
from fxpasses.torch_internals.inductor import with_joint_pass, writes_cpp_wrapper
from fxpasses.torch_internals.onednn import onednn_takes, pack_convolution_weight, packed_convolution

NAME = "packed_weights"
OWN = "own_kernels"
SEQUENCES = "kernel_sequences"


@dataclass(frozen=True)
class PackedWeight:
    """One constant of the generated code.

    Attributes:
        indices: which of the kept tensors it is packed from, the weight first.
        constant: the tensor that the code reads; its content changes, the object stays.
        pack: from those tensors to a packed one.
    """

    indices: tuple[int, ...]
    constant: torch.Tensor
    pack: Callable[..., torch.Tensor]


@dataclass
class WeightPacking:
    """The pass of one compilation, and what it packed.

    Attributes:
        examples: metadata of the graph's inputs, the kept tensors last.
        kept: how many of the inputs are kept tensors.
        own: when kernels of ours are taken.
        packed, remarks: what was packed, and what was not and why.
        unread: which of the kept tensors the code reads only packed.
        constants_allowed: the block in which inductor compiles the graph.
    """

    examples: Sequence[object]
    kept: int
    own: OwnKernels = "measured"
    packed: list[PackedWeight] = field(default_factory=list)
    unread: frozenset[int] = frozenset()
    remarks: list[Remark] = field(default_factory=list)
    constants_allowed: RealConstantsAllowed = field(default_factory=RealConstantsAllowed)

    def patches(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inductor's settings with this pass among them.

        The pass has no key, so that no cache hands its constants to another process, where nobody would
        fill them.
        """
        return with_joint_pass(given, self._run, lambda: None)

    def _run(self, graph: Graph) -> None:
        placeholders = graph.find_nodes(op="placeholder")
        if not self._corresponds(placeholders):
            self._decline(Decline("inputs-changed", "AOTAutograd gave the graph other inputs"), "")
            return
        if self.own != "never" and any(map(may_be_ours, graph.nodes)) and (reason := missing()):
            none = Decline("no-kernels", "there are no kernels of fxpasses: {}", None, (reason,))
            self._decline(none, "", OWN)
        first = len(placeholders) - self.kept
        given = _before_convolutions(graph)
        for index, weight in enumerate(placeholders[first:]):
            self._pack_linears(graph, weight, placeholders[first:])
            users = list(weight.users)
            if not any(user.target is torch.ops.aten.convolution.default for user in users):
                continue
            reasons = [why for user in users if (why := _unpackable(user, weight)) is not None]
            if reasons:
                self._decline(reasons[0], users[0].name)
                continue
            for convolution in users:
                planar = convolution.args[0] in given and _is_contiguous(convolution.args[0])
                if not self._pack_for_own_kernel(graph, convolution, placeholders[first:], planar):
                    self._pack(graph, convolution, weight, index)
        # Without a kernel of ours its library may not have been loaded, and the operators not exist.
        has_own = any(remark.rule == OWN and remark.status == "applied" for remark in self.remarks)
        if has_own and not writes_cpp_wrapper():
            for kernels in write_sequences(graph, functools.partial(self._constant, graph)):
                self.remarks.append(
                    Remark(SEQUENCES, "applied", "applied", f"{kernels} kernels in one call", node="")
                )
        read = {index for packed in self.packed for index in packed.indices}
        self.unread = frozenset(index for index in read if not placeholders[first + index].users)

    def _corresponds(self, placeholders: Sequence[Node]) -> bool:
        """Whether the graph's inputs are those of the compiled function, one by one."""
        if len(placeholders) != len(self.examples):
            return False
        pairs = zip(placeholders[len(placeholders) - self.kept :], self.examples[-self.kept :], strict=True)
        for placeholder, example in pairs:
            found = tensor(placeholder)
            if found is None or not isinstance(example, torch.Tensor):
                return False
            if (found.shape, found.dtype) != (example.shape, example.dtype):
                return False
        return True

    def _pack(self, graph: Graph, convolution: Node, weight: Node, index: int) -> None:
        """Writes a convolution as oneDNN's over a packed weight."""
        found, image = tensor(weight), tensor(convolution.args[0])
        assert found is not None
        assert image is not None
        self.constants_allowed.allow(found)
        pack = pack_convolution_weight(convolution.args, tuple(image.shape))
        with without_fake_tensors():
            # The values come before the first call; the format depends on sizes alone.
            constant = pack(torch.zeros(found.shape, dtype=found.dtype))
        with graph.inserting_before(convolution):
            read = self._constant(graph, self._next_name(), constant, found)
            operator, arguments = packed_convolution(convolution.args, read)
            written = graph.call_function(operator, arguments)
        written.meta.update(convolution.meta)
        convolution.replace_all_uses_with(written)
        graph.erase_node(convolution)
        self.packed.append(PackedWeight((index,), constant, pack))

    def _constant(self, graph: Graph, name: str, constant: torch.Tensor, value: torch.Tensor) -> Node:
        """A node that reads a constant, with `value` as its metadata."""
        assert graph.owning_module is not None, "inductor's graphs have a module"
        graph.owning_module.register_buffer(name, constant)
        read = graph.get_attr(name)
        set_value(read, value)
        return read

    def _next_name(self) -> str:
        return f"_fxpasses_packed_{len(self.packed)}"

    def _pack_for_own_kernel(
        self, graph: Graph, convolution: Node, kept: Sequence[Node], planar: bool
    ) -> bool:
        """Writes a convolution and what follows it as our operator, if that is faster; whether it did."""
        image, weight, bias, *_ = convolution.args
        result = tensor(convolution)
        sizes = sizes_of(convolution)
        if sizes is None or result is None or not result.numel():
            return False
        if bias is not None and bias not in kept:
            live = Decline("live-bias", "its bias is worked out in every call", convolution)
            self._remark(convolution, "declined", live.message, live.code)
            return False
        kernel = own_kernel_of_convolution(self.own, convolution, sizes, planar=planar)
        if isinstance(kernel, Kernel):
            self._write(graph, convolution, (image, weight, bias), kept, sizes, kernel)
            return True
        if kernel is not None:
            self._remark(convolution, "declined", kernel.message, kernel.code)
        return False

    def _pack_linears(self, graph: Graph, weight: Node, kept: Sequence[Node]) -> None:
        """Writes the matrix products with a transposed weight as our operator, where that is faster."""
        found = tensor(weight)
        if found is None or found.ndim != 2 or not weight.users:
            return
        transposed = [node for node in weight.users if _is_transposition(node)]
        for product in [user for node in transposed for user in node.users]:
            image, bias = _operands_of_product(product, transposed)
            value = tensor(image)
            if value is None or not (bias is None or bias in kept):
                continue
            sizes = Sizes.of_linear(found.shape[1], found.shape[0])
            kernel = own_kernel_of_linear(self.own, sizes, value)
            if isinstance(kernel, Kernel):
                self._write(graph, product, (image, weight, bias), kept, sizes, kernel)
        for node in transposed:
            if not node.users:
                graph.erase_node(node)

    def _write(
        self,
        graph: Graph,
        producer: Node,
        operands: tuple[Any, Any, Any],
        kept: Sequence[Node],
        sizes: Sizes,
        kernel: Kernel,
    ) -> None:
        """Replaces a convolution or linear layer, and what follows it, by our operator."""
        image, weight, bias = operands
        filters = tensor(weight)
        assert filters is not None
        self.constants_allowed.allow(filters)

        def packer(*dense: torch.Tensor) -> torch.Tensor:
            return pack(sizes, kernel, dense[0], dense[1] if len(dense) > 1 else None)

        with without_fake_tensors():
            zeros = torch.zeros(filters.shape), torch.zeros(sizes.filters)
            constant = packer(*(zeros if bias is not None else zeros[:1]))
        epilogue = epilogue_of(producer, summand=kernel.kind is not Kind.DEPTHWISE)
        last, summand = epilogue.last, epilogue.summand
        with graph.inserting_before(last):
            read = self._constant(graph, self._next_name(), constant, filters.new_empty(constant.shape))
            arguments = (
                in_order(graph, image, planar=kernel.planar),
                read,
                None if summand is None else in_order(graph, summand),
                sizes.argument(kernel),
                kernel.code,
                ACTIVATIONS.index(epilogue.activation),
                epilogue.low,
                epilogue.high,
            )
            written = graph.call_function(torch.ops.fxpasses.convolution.default, arguments)
        written.meta.update(last.meta)
        last.replace_all_uses_with(written)
        for node in sorted(epilogue.nodes, reverse=True):
            graph.erase_node(node)
        positions = {node: position for position, node in enumerate(kept)}
        indices = (positions[weight], *((positions[bias],) if bias is not None else ()))
        self.packed.append(PackedWeight(indices, constant, packer))
        self._remark(producer, "applied", f"kernel {kernel.code}, followed by {epilogue.activation}")

    def _remark(self, node: Node, status: Status, message: str, code: str = "applied") -> None:
        """What happened to a node that a kernel of ours may compute."""
        stage = "applied" if status == "applied" else "profit"
        location, module = location_of(node), module_of(node)
        self.remarks.append(Remark(OWN, status, code, message, node.name, location, stage, module))

    def _decline(self, why: Decline, node: str, rule: str = NAME) -> None:
        self.remarks.append(Remark(rule, "declined", why.code, why.message, node=node, stage="check"))


def _before_convolutions(graph: Graph) -> set[Node]:
    """The nodes that depend on no convolution, which lie in memory as the graph's inputs do."""
    found: set[Node] = set()
    for node in graph.nodes:
        is_before = node.target is not torch.ops.aten.convolution.default
        if is_before and all(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def _is_contiguous(node: Node) -> bool:
    found = tensor(node)
    return found is not None and found.is_contiguous()


def _is_transposition(node: Node) -> bool:
    if node.target is torch.ops.aten.t.default:
        return True
    return node.target is torch.ops.aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]


def _operands_of_product(node: Node, transposed: Sequence[Node]) -> tuple[Any, Any]:
    """What a product with a transposed weight reads, and its bias; None for other nodes."""
    if node.kwargs:
        return None, None
    if node.target is torch.ops.aten.addmm.default and node.args[2] in transposed:
        bias = tensor(node.args[0])
        return (node.args[1], node.args[0]) if bias is not None and bias.ndim == 1 else (None, None)
    if node.target is torch.ops.aten.mm.default and node.args[1] in transposed:
        return node.args[0], None
    return None, None


def _unpackable(node: Node, weight: Node) -> Decline | None:
    """Why a user of a kept weight cannot take it packed."""
    if node.target is not torch.ops.aten.convolution.default or node.args[1] is not weight:
        return Decline("other-reader", "the weight is also read by {}", node, (node.name,))
    image, found = tensor(node.args[0]), tensor(weight)
    if image is None or found is None or found.ndim not in (4, 5) or node.args[6]:
        return Decline("unpackable", "only plain 2-D and 3-D convolutions are packed", node)
    if not all(type(size) is int for size in (*image.shape, *found.shape)):
        return Decline(
            "unpackable", "the format depends on sizes, and {} has symbolic ones", node, (node.name,)
        )
    if image.dtype != found.dtype or not onednn_takes(found.dtype):
        return Decline("unpackable", "oneDNN does not pack {} on this CPU", node, (found.dtype,))
    return None
