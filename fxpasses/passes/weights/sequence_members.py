"""Members: the nodes of a graph that a step of `fxpasses::sequence` can compute.

    fxpasses.convolution, and through it what it may read ahead     PRODUCT
    mean over height and width                                      MEAN
    an image times a gate, some channels of an image                GATHER
    a sum of two images                                             SUM
    maxima under a window                                           MAX
    one pixel under another name or shape                           no step: the value gets another name

Which of them can be done at once is `sequence_runs`' question.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from fxpasses.graph.metadata import tensor
from fxpasses.graph.storage import is_same_pixel
from fxpasses.kernels.kernel import Kernel
from fxpasses.kernels.sequence import GATHER, MAX, MEAN, PRODUCT, SUM
from fxpasses.passes.weights.read_ahead import RESHAPING, Read, alike, gate_of, is_image, read_ahead
from fxpasses.passes.weights.sequence_parts import maximum_of, part_of
from fxpasses.passes.weights.stride_order import readers_of, source_of, value_of
from fxpasses.torch_internals.sizes import size_hint, sizes_of

aten = torch.ops.aten

Operand = tuple[Node, bool]
"""A node that is read, and whether plane by plane."""


@dataclass(frozen=True)
class Member:
    """A node that a step computes, or that gives a value another name.

    Attributes:
        node: the node.
        kind: of the step: `PRODUCT`, `MEAN`, `GATHER`, `SUM` or `MAX`.
        read: what the step reads; None where the value gets another name.
        summand: what is added, or None.
        window: of a `MAX`, as `Step.window`.
    """

    node: Node
    kind: int
    read: Read | None
    summand: Node | None = None
    window: tuple[int, ...] = ()

    @property
    def reads_parts(self) -> bool:
        """Whether the step can read some channels of a value where they lie."""
        if self.read is None:
            return False
        return self.kind in (GATHER, SUM) or (self.kind == PRODUCT and kernel_of(self.node).reads_parts)

    @property
    def inputs(self) -> list[Node]:
        """The nodes that the member reads."""
        return [node for node, _ in self.operands]

    @property
    def operands(self) -> list[Operand]:
        """What the member reads, and whether plane by plane."""
        if self.read is None:
            return [(source_of(self.node.args[0]), False)]
        others = [node for node in (self.read.gate, self.summand) if node is not None]
        planar = self.kind == PRODUCT and _reads_planes(self.node)
        return [*((image, planar) for image in self.read.images), *((node, False) for node in others)]


def members_of(graph: Graph) -> tuple[dict[Node, Member], set[Node]]:
    """What steps can compute, and the nodes that are computed while others are read."""
    ours = torch.ops.fxpasses.convolution.default
    members: dict[Node, Member] = {}
    absorbed: set[Node] = set()
    for node in graph.find_nodes(op="call_function", target=ours):
        image, _, summand, sizes, *_ = node.args
        given = source_of(image)
        if gathers(sizes, kernel_of(node)):
            read = read_ahead(given, only_reader=readers_of(given) == {node})
        else:
            read = Read((given,))
        absorbed.update(read.nodes)
        members[node] = Member(node, PRODUCT, read, None if summand is None else source_of(summand))
    # Backwards, since what only serves a member is one too.
    for node in reversed(graph.nodes):
        if node in members or node in absorbed or not node.users:
            continue
        readers = readers_of(node)
        if not all(_serves(user, members, absorbed) for user in readers):
            continue
        if any(map(_reads_planes, readers)):  # what steps give lies in channels-last memory
            continue
        member = _other_member(node)
        if member is not None:
            members[node] = member
    return members, absorbed


def _serves(user: Node, members: Mapping[Node, Member], absorbed: AbstractSet[Node]) -> bool:
    """Whether only members read what a node gives, or it is one."""
    if user in members or user in absorbed:
        return True
    results = user.users  # of an operator that has several
    return bool(results) and all(one.target is operator.getitem and one in members for one in results)


def _reads_planes(node: Node) -> bool:
    """Whether it is a kernel of ours that reads an image in contiguous memory."""
    return node.target is torch.ops.fxpasses.convolution.default and kernel_of(node).planar


def kernel_of(node: Node) -> Kernel:
    """The kernel of a call of our operator."""
    code = node.args[4]
    assert isinstance(code, int)
    return Kernel.from_code(code)


def gathers(sizes: Sequence[int], kernel: Kernel) -> bool:
    """Whether a kernel can compute what it reads, for the operator's arguments `sizes` and `kernel`."""
    return kernel.is_blocked_product and list(sizes[1:4]) == [1, 1, 1] and list(sizes[6:8]) == [0, 0]


def _other_member(node: Node) -> Member | None:
    """The node as a member, where it is no convolution; None where no step can compute it."""
    found = tensor(node)
    if found is None or not node.args or not isinstance(node.args[0], Node):
        return None
    if (part := part_of(node)) is not None:
        whole, first, width = part
        return Member(node, GATHER, Read((whole,), firsts=(first,), widths=(width,)))
    if (pooled := maximum_of(node)) is not None:
        whole, window = pooled
        return Member(node, MAX, Read((whole,)), window=window)
    if (summands := _summands_of(node)) is not None:
        return Member(node, SUM, Read(summands))
    if node.target is operator.getitem:
        return None
    given = tensor(source_of(node.args[0]))
    if node.target is aten.mean.dim and not node.kwargs and is_image(given):
        axes = node.args[1]
        spatial = isinstance(axes, (list, tuple)) and sorted(axis % 4 for axis in axes) == [2, 3]  # type: ignore[operator]
        return Member(node, MEAN, Read((source_of(node.args[0]),))) if spatial else None
    if (gated := gate_of(node)) is not None:
        return Member(node, GATHER, Read((gated[0],), gated[1]))
    if is_image(given) and is_same_pixel(node):
        return Member(node, GATHER, None)
    if node.target in RESHAPING and given is not None and given.dtype == torch.float32:
        # From a matrix to an image of one pixel, or back.
        if sorted((given.dim(), found.dim())) != [2, 4] or given.device.type != "cpu":
            return None
        image, matrix = (given, found) if given.dim() == 4 else (found, given)
        if sizes_of(image) == (*sizes_of(matrix), 1, 1):
            return Member(node, GATHER, None)
    return None


def _summands_of(node: Node) -> tuple[Node, Node] | None:
    """The two images of equal sizes of which a node is the sum; None where it is none."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    one, other = (source_of(each) if isinstance(each, Node) else None for each in node.args)
    if one is None or other is None or not alike(tensor(one), tensor(other)):
        return None
    return (one, other) if alike(tensor(one), tensor(node)) else None


def with_parts(members: Sequence[Member]) -> list[Member]:
    """Members of one run, which read the channels of an image where they lie, if they can."""
    parts: dict[Node, tuple[Node, int, int]] = {}
    found: list[Member] = []
    for member in members:
        if member.read is not None and member.reads_parts and not parts.keys().isdisjoint(member.read.images):
            member = replace(member, read=_through(member.read, parts))
        found.append(member)
        read = member.read
        if read is not None and member.kind == GATHER and read.gate is None and read.firsts and read.widths:
            parts[member.node] = read.images[0], read.firsts[0], read.widths[0]
    return found


def _through(read: Read, parts: Mapping[Node, tuple[Node, int, int]]) -> Read:
    images, firsts, widths = [], [], []
    for which, image in enumerate(read.images):
        first = read.firsts[which] if read.firsts else 0
        whole = value_of(image).shape[1]
        source, start, _ = parts.get(image, (image, 0, whole))
        images.append(source)
        firsts.append(start + first)
        widths.append(size_hint(read.widths[which] if read.widths else whole))
    return replace(read, images=tuple(images), firsts=tuple(firsts), widths=tuple(widths))
