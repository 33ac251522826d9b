"""Packed weights: convolutions over kept weights, in oneDNN's own format and with its fused epilogues.

Inductor packs weights only where it freezes a model, and what it freezes is stale after an update. Here the
same operators are written by a pass over inductor's graph, and the packed tensors are ours:

    convolution(x, weight, bias)  ->  mkldnn._convolution_pointwise(x, packed, bias, ...)

A packed tensor is a constant of the generated code. When the weights change its content is replaced and the
code stays, so a refresh costs one pass over the weights. Inductor's own patterns then fuse what follows the
convolution (an activation, a sum) into it, as they do in a frozen graph.

The dense tensor that was packed is not needed any more: the graph's input for it becomes a husk, a tensor of
the same shape and strides without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from fxpasses.graph.metadata import set_value, tensor
from fxpasses.report import Remark
from fxpasses.rewrite.decline import Decline
from fxpasses.torch_internals import (
    RealConstantsAllowed,
    onednn_takes,
    pack_convolution_weight,
    packed_convolution,
    with_joint_pass,
    without_fake_tensors,
)

NAME = "packed_weights"


@dataclass(frozen=True)
class PackedWeight:
    """One constant of the generated code.

    Attributes:
        index: which of the kept tensors it is packed from.
        constant: the tensor that the code reads; its content changes, the object stays.
        pack: from the dense weight to a packed tensor.
    """

    index: int
    constant: torch.Tensor
    pack: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class WeightPacking:
    """The pass of one compilation, and what it packed.

    Attributes:
        examples: metadata of the graph's inputs, the kept tensors last.
        kept: how many of the inputs are kept tensors.
        packed, remarks: what was packed, and what was not and why.
        constants_allowed: the block in which inductor compiles the graph.
    """

    examples: Sequence[object]
    kept: int
    packed: list[PackedWeight] = field(default_factory=list)
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
        first = len(placeholders) - self.kept
        for index, weight in enumerate(placeholders[first:]):
            users = list(weight.users)
            if not any(each.target is torch.ops.aten.convolution.default for each in users):
                continue
            reasons = [why for each in users if (why := _unpackable(each, weight)) is not None]
            if reasons:
                self._decline(reasons[0], users[0].name)
                continue
            for convolution in users:
                self._pack(graph, convolution, weight, index)

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
        module = graph.owning_module
        found, image = tensor(weight), tensor(convolution.args[0])
        assert module is not None, "inductor's graphs have a module"
        assert found is not None
        assert image is not None
        self.constants_allowed.allow(found)
        pack = pack_convolution_weight(convolution.args, tuple(image.shape))
        with without_fake_tensors():
            # The values come before the first call; the format depends on sizes alone.
            constant = pack(torch.zeros(found.shape, dtype=found.dtype))
        name = f"_fxpasses_packed_{len(self.packed)}"
        module.register_buffer(name, constant)
        with graph.inserting_before(convolution):
            read = graph.get_attr(name)
            set_value(read, found)
            operator, arguments = packed_convolution(convolution.args, read)
            written = graph.call_function(operator, arguments)
        written.meta.update(convolution.meta)
        convolution.replace_all_uses_with(written)
        graph.erase_node(convolution)
        self.packed.append(PackedWeight(index, constant, pack))

    def _decline(self, why: Decline, node: str) -> None:
        self.remarks.append(Remark(NAME, "declined", why.code, why.message, node=node, stage="check"))


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
