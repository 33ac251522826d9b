"""Sequences: kernels of ours that follow one another become one call.

    fxpasses.convolution(...), mean, fxpasses.convolution(...), x * gate  ->  fxpasses.sequence(...)

A run of them is taken where no other node lies between two of its members, so that it can be done at once.
What a convolution over single pixels reads is computed while it reads: a concatenation, times a gate or a
scale, plus a shift, clamped. None of that is ever written to memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch.fx import Graph, Node

from fxpasses.graph.metadata import set_value, tensor
from fxpasses.graph.storage import is_same_pixel
from fxpasses.kernels.kernel import Kernel
from fxpasses.kernels.sequence import (
    GATHER,
    MEAN,
    PRODUCT,
    Convolution,
    Reading,
    Step,
    floats_of,
    program,
    shapes_argument,
)
from fxpasses.torch_internals.fake_tensors import without_fake_tensors
from fxpasses.torch_internals.inductor import force_stride_order

aten = torch.ops.aten

_RESHAPING = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)


@dataclass(frozen=True)
class Read:
    """What a convolution reads, through the nodes that are computed while it does.

    Attributes:
        images: the tensors whose channels lie one after another.
        gate: a factor of each image's channels, or None.
        scale, shift: vectors of a factor and a term of each channel, or None.
        limits: of a clamp afterwards, or None.
        nodes: what need not be computed any more.
    """

    images: tuple[Node, ...]
    gate: Node | None = None
    scale: Node | None = None
    shift: Node | None = None
    limits: tuple[float, float] | None = None
    nodes: tuple[Node, ...] = ()


_Operand = tuple[Node, bool]


@dataclass(frozen=True)
class _Member:
    """A node that a step computes, or (`read` is None) that renames a value."""

    node: Node
    kind: int
    read: Read | None
    summand: Node | None = None

    @property
    def inputs(self) -> list[Node]:
        return [node for node, _ in self.operands]

    @property
    def operands(self) -> list[_Operand]:
        """What the member reads, and whether plane by plane."""
        if self.read is None:
            return [(_source(self.node.args[0]), False)]
        others = [each for each in (self.read.gate, self.summand) if each is not None]
        planar = self.kind == PRODUCT and _reads_planes(self.node)
        return [*((each, planar) for each in self.read.images), *((each, False) for each in others)]


@dataclass
class _Run:
    """Members in program order, and the nodes outside that depend on them."""

    members: list[_Member] = field(default_factory=list)
    inside: set[Node] = field(default_factory=set)
    after: dict[Node, None] = field(default_factory=dict)

    def admits(self, inputs: Sequence[Node]) -> bool:
        return not any(each in self.after for each in inputs)

    def depends(self, node: Node) -> bool:
        return any(each in self.inside or each in self.after for each in node.all_input_nodes)


def read_ahead(image: Node, *, only_reader: bool = True) -> Read:
    """What a convolution over single pixels may read in place of an image.

    Args:
        image: the node that it reads now.
        only_reader: whether nothing else reads that.
    """
    plain = Read((image,))
    found = tensor(image)
    if not only_reader or found is None or found.dim() != 4:
        return plain
    nodes: list[Node] = []
    limits, at = _clamp_of(image)
    if limits is not None:
        nodes.append(image)
    shift = scale = gate = None
    if _is_free(at, nodes) and (terms := _by_channel(at, aten.add.Tensor)) is not None:
        nodes.append(at)
        at, shift = terms
    if _is_free(at, nodes) and (terms := _by_channel(at, aten.mul.Tensor)) is not None:
        nodes.append(at)
        at, scale = terms
    elif _is_free(at, nodes) and shift is None and (gated := _gated(at)) is not None:
        nodes.append(at)
        at, gate = gated
    images: tuple[Node, ...] = (at,)
    if _is_free(at, nodes) and (parts := _concatenated(at)) is not None:
        nodes.append(at)
        images = parts
    return Read(images, gate, scale, shift, limits, tuple(nodes)) if nodes else plain


def _is_free(node: Node, nodes: Sequence[Node]) -> bool:
    """Whether only what was passed already reads a node (the first is read by the convolution alone)."""
    return not nodes or all(user is nodes[-1] for user in node.users)


def _clamp_of(node: Node) -> tuple[tuple[float, float] | None, Node]:
    """The limits of a clamp and what it is of; None and the node itself where it is none."""
    if node.kwargs or not node.args or not isinstance(node.args[0], Node):
        return None, node
    if node.target is aten.relu.default:
        return (0.0, inf), node.args[0]
    if node.target is aten.hardtanh.default and len(node.args) == 3:
        low, high = node.args[1:]
        if isinstance(low, (int, float)) and isinstance(high, (int, float)):
            return (float(low), float(high)), node.args[0]
    return None, node


def _by_channel(node: Node, target: object) -> tuple[Node, Node] | None:
    """The image and the vector that an operator takes channel by channel."""
    if node.target is not target or node.kwargs or len(node.args) != 2:
        return None
    result = tensor(node)
    for image, other in (node.args, node.args[::-1]):
        if not isinstance(image, Node) or not isinstance(other, Node):
            continue
        vector, value = _vector_of(other), tensor(image)
        if vector is not None and _alike(value, result):
            return image, vector
    return None


def _vector_of(node: Node) -> Node | None:
    """The kept vector that a node lays along the channels."""
    found = tensor(node)
    if found is None or found.dim() not in (3, 4) or found.shape[-3] != found.numel():
        return None
    while node.target in _RESHAPING:
        node = _source(node.args[0])
    base = tensor(node)
    usable = base is not None and base.dim() == 1 and base.dtype == torch.float32
    return node if usable and node.op == "placeholder" else None


def _gated(node: Node) -> tuple[Node, Node] | None:
    """The image and its gate, where one is multiplied by one number for each channel of each image."""
    if node.target is not aten.mul.Tensor or node.kwargs:
        return None
    result = tensor(node)
    for image, gate in (node.args, node.args[::-1]):
        if not isinstance(image, Node) or not isinstance(gate, Node):
            continue
        value, factor = tensor(image), tensor(gate)
        if not _alike(value, result) or not _is_image(factor):
            continue
        assert result is not None
        assert factor is not None
        if tuple(factor.shape) == (*result.shape[:2], 1, 1):
            return image, gate
    return None


def _concatenated(node: Node) -> tuple[Node, ...] | None:
    """The images whose channels a node puts one after another."""
    if node.target is not aten.cat.default or node.kwargs or len(node.args) != 2:
        return None
    parts, axis = node.args
    assert isinstance(parts, (list, tuple))
    images = tuple(each for each in parts if isinstance(each, Node) and _is_image(tensor(each)))
    return images if axis in (1, -3) and len(images) == len(parts) else None


def _alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if not _is_image(one) or not _is_image(other):
        return False
    assert one is not None
    assert other is not None
    return one.shape == other.shape


def _is_image(found: torch.Tensor | None) -> bool:
    """Whether it is a 4-D float32 tensor on a CPU, of sizes that are known."""
    if found is None or found.dim() != 4 or found.dtype != torch.float32 or found.device.type != "cpu":
        return False
    return all(type(size) is int for size in found.shape) and found.numel() > 0


def _source(argument: object) -> Node:
    """What a node stands for, without the order in memory that inductor is told."""
    assert isinstance(argument, Node)
    while argument.target is force_stride_order():
        argument = argument.args[0]
        assert isinstance(argument, Node)
    return argument


def gathers(sizes: Sequence[int], kernel: Kernel) -> bool:
    """Whether a kernel can compute what it reads, for the operator's arguments `sizes` and `kernel`."""
    return kernel.is_blocked_product and list(sizes[1:4]) == [1, 1, 1] and list(sizes[6:8]) == [0, 0]


def write_sequences(graph: Graph, constant: Callable[[str, torch.Tensor, torch.Tensor], Node]) -> list[int]:
    """Writes runs of our kernels as one call each; how many kernels each has.

    Args:
        graph: inductor's, with our operators in it.
        constant: makes a node that reads a tensor, from a name, the tensor and its metadata.
    """
    members, absorbed = _members(graph)
    written: list[int] = []
    replaced: dict[Node, Node] = {}
    for run in _runs(graph, members, absorbed):
        kernels = [each for each in run.members if each.kind == PRODUCT]
        gathering = any(each.read is not None and each.read.nodes for each in kernels)
        if len(kernels) > 1 or gathering:
            _write(graph, run, len(written), constant, replaced)
            written.append(len(kernels))
    return written


def _members(graph: Graph) -> tuple[dict[Node, _Member], set[Node]]:
    """What steps can compute, and the nodes that are computed while others are read."""
    ours = torch.ops.fxpasses.convolution.default
    members: dict[Node, _Member] = {}
    absorbed: set[Node] = set()
    for node in graph.find_nodes(op="call_function", target=ours):
        image, _, summand, sizes, *_ = node.args
        given = _source(image)
        if gathers(sizes, _kernel_of(node)):
            read = read_ahead(given, only_reader=_readers(given) == {node})
        else:
            read = Read((given,))
        absorbed.update(read.nodes)
        members[node] = _Member(node, PRODUCT, read, None if summand is None else _source(summand))
    # Backwards, since what only serves a member is one too.
    for node in reversed(graph.nodes):
        if node in members or node in absorbed or not node.users:
            continue
        readers = _readers(node)
        if not all(user in members or user in absorbed for user in readers):
            continue
        if any(map(_reads_planes, readers)):  # what steps give lies in channels-last memory
            continue
        member = _other_member(node)
        if member is not None:
            members[node] = member
    return members, absorbed


def _reads_planes(node: Node) -> bool:
    """Whether it is a kernel of ours that reads an image in contiguous memory."""
    return node.target is torch.ops.fxpasses.convolution.default and _kernel_of(node).planar


def _kernel_of(node: Node) -> Kernel:
    """The kernel of a call of our operator."""
    code = node.args[4]
    assert isinstance(code, int)
    return Kernel.from_code(code)


def _readers(node: Node) -> set[Node]:
    """What reads a node, in whichever order in memory."""
    found: set[Node] = set()
    for user in node.users:
        found |= _readers(user) if user.target is force_stride_order() else {user}
    return found


def _other_member(node: Node) -> _Member | None:
    found = tensor(node)
    if found is None or not node.args or not isinstance(node.args[0], Node):
        return None
    given = tensor(_source(node.args[0]))
    if node.target is aten.mean.dim and not node.kwargs and _is_image(given):
        axes = node.args[1]
        spatial = isinstance(axes, (list, tuple)) and sorted(axis % 4 for axis in axes) == [2, 3]  # type: ignore[operator]
        return _Member(node, MEAN, Read((_source(node.args[0]),))) if spatial else None
    if (gated := _gated(node)) is not None:
        return _Member(node, GATHER, Read((gated[0],), gated[1]))
    if _is_image(given) and is_same_pixel(node):
        return _Member(node, GATHER, None)
    if node.target in _RESHAPING and given is not None and given.dtype == torch.float32:
        # From a matrix to an image of one pixel, or back.
        if sorted((given.dim(), found.dim())) != [2, 4] or given.device.type != "cpu":
            return None
        image, matrix = (given, found) if given.dim() == 4 else (found, given)
        if tuple(image.shape) == (*matrix.shape, 1, 1) and all(type(size) is int for size in image.shape):
            return _Member(node, GATHER, None)
    return None


def _runs(graph: Graph, members: dict[Node, _Member], absorbed: set[Node]) -> list[_Run]:
    """Members that can be done one after another without anything between them."""
    runs: list[_Run] = []
    run = _Run()
    for node in graph.nodes:
        if node in members:
            member = members[node]
            if not run.admits(member.inputs):
                runs.append(run)
                run = _Run()
            run.members.append(member)
            run.inside.add(node)
        elif node in absorbed:
            continue
        elif node.op == "call_function" and _writes(node):
            runs.append(run)
            run = _Run()
        elif node.op != "output" and run.depends(node):
            if node.target is force_stride_order() and all(user in members for user in node.users):
                continue
            run.after[node] = None
    return [*runs, run]


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _write(
    graph: Graph,
    run: _Run,
    number: int,
    constant: Callable[[str, torch.Tensor, torch.Tensor], Node],
    replaced: dict[Node, Node],
) -> None:
    """Replaces the members of a run by one call, and notes in `replaced` what stands for them now."""
    last = run.members[-1].node
    outer = _outer_readers(run)
    # A renaming that is read outside stays what it was, behind the call.
    stays: set[Node] = set()
    for member in reversed(run.members):
        if member.read is None and (outer[member.node] or not stays.isdisjoint(member.node.users)):
            stays.add(member.node)
    inputs = list(
        dict.fromkeys(
            (replaced.get(each, each), planar)
            for member in run.members
            for each, planar in member.operands
            if each not in run.inside
        )
    )
    results = [
        each.node
        for each in run.members
        if each.read is not None and (outer[each.node] or not stays.isdisjoint(each.node.users))
    ]
    values = {operand: at for at, operand in enumerate((*inputs, *((each, False) for each in results)))}
    known = len(values)
    sizes: list[int] = []
    steps: list[Step] = []
    constants: dict[Node, int] = {}
    for member in run.members:
        if member.read is None:
            source = member.inputs[0]
            same = source if source in run.inside else replaced.get(source, source)
            values[member.node, False] = values[same, False]
            continue
        if (member.node, False) not in values:
            values[member.node, False] = known + len(sizes)
            sizes.append(floats_of(_value(member.node).shape))
        numbers = [values[replaced.get(each, each), planar] for each, planar in member.operands]
        steps.append(_step(member, values[member.node, False], numbers, constants))
    with without_fake_tensors():
        words = torch.tensor(program(steps, known, sizes), dtype=torch.int64)
    with graph.inserting_before(last):
        read = constant(
            f"_fxpasses_program_{number}", words, _value(last).new_empty(words.shape, dtype=torch.int64)
        )
        ordered = [in_order(graph, each, planar=planar) for each, planar in inputs]
        shapes = shapes_argument([tuple(map(int, _value(each).shape)) for each in results])
        call = graph.call_function(
            torch.ops.fxpasses.sequence.default, (ordered, list(constants), read, shapes)
        )
        call.meta["val"] = [_value(each) for each in results]
        behind = call
        for position, each in enumerate(results):
            behind = graph.call_function(operator.getitem, (call, position))
            behind.meta.update(each.meta)
            each.replace_all_uses_with(behind)
            replaced[each] = behind
    for node in sorted({*run.after, *stays}):
        if node < behind or node in stays:
            behind.append(node)
            behind = node
    _erase(graph, [each.node for each in run.members if each.node not in stays])


def _outer_readers(run: _Run) -> dict[Node, bool]:
    """For each member whether it is read outside the run, also behind what is computed while it is read."""
    absorbing = {each: one.node for one in run.members if one.read is not None for each in one.read.nodes}

    def is_outer(user: Node) -> bool:
        while user in absorbing:
            user = absorbing[user]
        return user not in run.inside

    return {each.node: any(map(is_outer, _readers(each.node))) for each in run.members}


def _step(member: _Member, result: int, operands: Sequence[int], constants: dict[Node, int]) -> Step:
    """A member as a step, from the numbers of its result and its operands."""
    read = member.read
    assert read is not None
    images, others = operands[: len(read.images)], iter(operands[len(read.images) :])

    def constant_of(node: Node | None) -> int | None:
        return None if node is None else constants.setdefault(node, len(constants))

    first = _value(read.images[0])
    widths = tuple(int(_value(each).shape[1]) for each in read.images)
    reading = Reading(
        tuple(images),
        widths,
        None if read.gate is None else next(others),
        constant_of(read.scale),
        constant_of(read.shift),
        read.limits,
    )
    flat = first.dim() == 2
    count, height, width = (1, first.shape[0], 1) if flat else (first.shape[0], *first.shape[2:])
    image = (int(count), int(height), int(width), sum(widths))
    if member.kind != PRODUCT:
        return Step(member.kind, result, reading, image)
    arguments: tuple[Any, ...] = member.node.args
    _, filters, _, sizes, _, activation, low, high = arguments
    which = constant_of(filters)
    assert which is not None
    summand = None if member.summand is None else next(others)
    convolution = Convolution(list(sizes), _kernel_of(member.node), which, summand, activation, low, high)
    return Step(PRODUCT, result, reading, image, (convolution,))


def _value(node: Node) -> torch.Tensor:
    found = tensor(node)
    assert found is not None, "members and what they read are tensors"
    return found


def in_order(graph: Graph, node: Node, *, planar: bool = False) -> Node:
    """The same tensor, which inductor is told to put into the memory that our operators read.

    Args:
        graph: where to write.
        node: a matrix or an image.
        planar: whether an image is read plane by plane.
    """
    value = _value(node)
    layout = torch.channels_last if value.dim() == 4 and not planar else torch.contiguous_format
    wanted = torch.empty_like(value, memory_format=layout)
    forced = graph.call_function(force_stride_order(), (node, list(wanted.stride())))
    set_value(forced, wanted)
    return forced


def _erase(graph: Graph, nodes: Sequence[Node]) -> None:
    """Erases nodes and what only they read."""
    pending = sorted(nodes, reverse=True)
    gone: set[Node] = set()
    while pending:
        node = pending.pop(0)
        if node in gone or node.users or node.op != "call_function":
            continue
        read = node.all_input_nodes
        graph.erase_node(node)
        gone.add(node)
        pending.extend(read)
