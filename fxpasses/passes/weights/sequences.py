"""Sequences: kernels of ours that follow one another become one call.

    fxpasses.convolution(...), mean, fxpasses.convolution(...), x * gate  ->  fxpasses.sequence(...)

A run of them is taken where no other node lies between two of its members, so that it can be done at once.
`sequence_members` says what a step can compute, `sequence_runs` which of that can be done at once,
`read_ahead` what a convolution computes while it reads; here the call is written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from fxpasses.graph.provenance import inherit
from fxpasses.kernels.sequence import PRODUCT, SUM, Convolution, Reading, Step, program, shapes_argument
from fxpasses.passes.weights.sequence_members import Member, Operand, kernel_of, members_of, with_parts
from fxpasses.passes.weights.sequence_runs import Run, outer_readers, runs_of
from fxpasses.passes.weights.stride_order import in_order, value_of
from fxpasses.torch_internals.fake_tensors import without_fake_tensors
from fxpasses.torch_internals.sizes import as_arguments, size_hint

Constant = Callable[[str, torch.Tensor, torch.Tensor], Node]
"""Makes a node that reads a tensor, from a name, the tensor and its metadata."""


def write_sequences(graph: Graph, constant: Constant) -> list[int]:
    """Writes runs of our kernels as one call each; how many kernels each has.

    Args:
        graph: inductor's, with our operators in it.
        constant: makes a node that reads a tensor.
    """
    members, absorbed = members_of(graph)
    written: list[int] = []
    replaced: dict[Node, Node] = {}
    for run in runs_of(graph, members, absorbed):
        kernels = [member for member in run.members if member.kind == PRODUCT]
        gathering = any(member.read is not None and member.read.nodes for member in kernels)
        if len(kernels) > 1 or gathering:
            _write(graph, run, f"_fxpasses_program_{len(written)}", constant, replaced)
            written.append(len(kernels))
    return written


@dataclass
class _Values:
    """The values of one call and their numbers: the inputs, then the results, then the others.

    Attributes:
        inputs: what the call reads.
        results: the nodes whose values it gives.
        replaced: what stands for nodes of the runs before.
        numbers: of each value.
        others: how many values are no inputs and no results.
        constants: the nodes of vectors and filters, and their numbers.
    """

    inputs: list[Operand]
    results: list[Node]
    replaced: dict[Node, Node]
    numbers: dict[Operand, int] = field(init=False)
    others: int = 0
    constants: dict[Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = (*self.inputs, *((node, False) for node in self.results))
        self.numbers = {operand: number for number, operand in enumerate(known)}

    @property
    def known(self) -> int:
        """How many values are inputs or results."""
        return len(self.inputs) + len(self.results)

    def of(self, operand: Operand) -> int:
        """The number of what a member reads."""
        node, planar = operand
        return self.numbers[self.replaced.get(node, node), planar]

    def given_by(self, node: Node) -> int:
        """The number of what a member gives, a new one where it is no result."""
        if (node, False) not in self.numbers:
            self.numbers[node, False] = self.known + self.others
            self.others += 1
        return self.numbers[node, False]

    def rename(self, node: Node, source: Node) -> None:
        """Has a node stand for the value of another."""
        self.numbers[node, False] = self.of((source, False))

    def constant(self, node: Node | None) -> int | None:
        """The number of a constant; None for None."""
        return None if node is None else self.constants.setdefault(node, len(self.constants))


def _write(graph: Graph, run: Run, name: str, constant: Constant, replaced: dict[Node, Node]) -> None:
    """Replaces the members of a run by one call, and notes in `replaced` what stands for them now."""
    stays, results = _seen_outside(run)
    members = with_parts(run.members)
    operands = (operand for member in members for operand in member.operands)
    outside = ((replaced.get(node, node), planar) for node, planar in operands if node not in run.inside)
    values = _Values(list(dict.fromkeys(outside)), results, replaced)
    steps = _steps(members, values)
    with without_fake_tensors():
        words = torch.tensor(program(steps, values.known, values.others), dtype=torch.int64)
    last = run.members[-1].node
    with graph.inserting_before(last):
        read = constant(name, words, value_of(last).new_empty(words.shape, dtype=torch.int64))
        ordered = [in_order(graph, node, planar=planar) for node, planar in values.inputs]
        shapes = as_arguments(graph, shapes_argument([tuple(value_of(node).shape) for node in results]))
        call = graph.call_function(
            torch.ops.fxpasses.sequence.default, (ordered, list(values.constants), read, shapes)
        )
        call.meta["val"] = [value_of(node) for node in results]
        behind = call
        for position, node in enumerate(results):
            behind = graph.call_function(operator.getitem, (call, position))
            inherit(behind, (node,), "kernel_sequences")
            node.replace_all_uses_with(behind)
            replaced[node] = behind
    for node in sorted({*run.after, *stays}):
        if node < behind or node in stays:
            behind.append(node)
            behind = node
    _erase(graph, [member.node for member in run.members if member.node not in stays])


def _seen_outside(run: Run) -> tuple[set[Node], list[Node]]:
    """The renamings of a run that are read outside, which stay as they were, and what the call must give."""
    outer = outer_readers(run)
    stays: set[Node] = set()
    for member in reversed(run.members):
        if member.read is None and (outer[member.node] or not stays.isdisjoint(member.node.users)):
            stays.add(member.node)
    computed = [member.node for member in run.members if member.read is not None]
    return stays, [node for node in computed if outer[node] or not stays.isdisjoint(node.users)]


def _steps(members: Sequence[Member], values: _Values) -> list[Step]:
    """The members of a run as steps, in program order, but for those whose value no step reads."""
    steps: list[Step] = []
    for member in members:
        if member.read is None:
            values.rename(member.node, member.inputs[0])
        else:
            result = values.given_by(member.node)
            steps.append(_step(member, result, [values.of(operand) for operand in member.operands], values))
    read, needed = set(range(values.known)), []
    for step in reversed(steps):
        if step.result in read:
            needed.append(step)
            read.update(step.read)
    return needed[::-1]


def _step(member: Member, result: int, operands: Sequence[int], values: _Values) -> Step:
    """A member as a step, from the numbers of its result and its operands."""
    read = member.read
    assert read is not None
    images, others = operands[: len(read.images)], iter(operands[len(read.images) :])
    widths = read.widths or tuple(size_hint(value_of(image).shape[1]) for image in read.images)
    gate = None if read.gate is None else next(others)
    scale, shift = values.constant(read.scale), values.constant(read.shift)
    reading = Reading(tuple(images), widths, gate, scale, shift, read.limits, read.firsts)
    count, _, height, width = (*map(size_hint, value_of(read.images[0]).shape), 1, 1)[:4]
    image = (count, height, width, widths[0] if member.kind == SUM else sum(widths))
    if member.kind != PRODUCT:
        return Step(member.kind, result, reading, image, window=member.window)
    arguments: tuple[Any, ...] = member.node.args
    _, filters, _, sizes, _, activation, low, high = arguments
    which = values.constant(filters)
    assert which is not None
    summand = None if member.summand is None else next(others)
    kernel = kernel_of(member.node)
    convolution = Convolution(list(sizes), kernel, which, summand, activation, low, high)
    return Step(PRODUCT, result, reading, image, (convolution,))


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
