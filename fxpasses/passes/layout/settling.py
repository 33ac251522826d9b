"""Settling: which results inductor is told to put into memory just as the metadata says, on a GPU.

Inductor computes most results where they are read, and gives those that it keeps whatever strides suit it:

    permuted ── relu ── index     one kernel, which reads `permuted` in its own order
    permuted ── relu* ── index    relu is settled (*): it lies as planned, and the index walks that

For an operator that indexes or concatenates the order decides the speed, so what it reads is settled.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from fxpasses.graph.layouts import order_of
from fxpasses.graph.metadata import tensor
from fxpasses.graph.names import base_name
from fxpasses.passes.layout.labels import Kind, kind_of
from fxpasses.torch_internals.inductor import REALIZE_TO_STRIDES


class Settling:
    """What was settled in a graph, so that it can be taken back."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._settled: list[Node] = []
        self._contiguous: set[Node] = set()

    def undo(self) -> None:
        """Leaves everything to inductor again."""
        for node in self._settled:
            del node.meta[REALIZE_TO_STRIDES]

    def settle_concatenations(self) -> None:
        """Has inductor concatenate channels-last what the plan wants so.

        It lays a concatenation out like the operands whose strides are settled by then, and contiguous where
        none are; then a kernel that gathers from one layout into the other is five times slower on a GPU. A
        convolution settles what it makes and what it reads. Where there is none, an operand that others read
        as well, which lies in memory of its own anyway, is settled.
        """
        for node in self._graph.nodes:
            found = tensor(node)
            if base_name(node) != "cat" or found is None or order_of(found) != "channels_last":
                continue
            operands = [operand for operand in node.all_input_nodes if tensor(operand) is not None]
            if any(_is_settled(operand, node) for operand in operands):
                continue
            for operand in operands:
                held = tensor(operand)
                is_shared = operand.op == "call_function" and len(operand.users) > 1
                if is_shared and held is not None and order_of(held) == "channels_last":
                    self.settle(operand)
                    break

    def settle(self, node: Node) -> None:
        """Has inductor put a result into memory as its metadata says, and not compute it where it is read.

        What an operator that indexes reads would else lie as whatever it was computed from lies, whether
        there is a copy in between or not, and the kernel would walk the other layout.
        """
        found = tensor(node)
        computed = node.op == "call_function" and found is not None and found.dim() in (4, 5)
        if computed and REALIZE_TO_STRIDES not in node.meta:
            node.meta[REALIZE_TO_STRIDES] = True
            self._settled.append(node)

    def may_walk_channels_last(self, node: Node) -> bool:
        """Whether code that computes a result where it is read may read a channels-last tensor for it."""
        pending, seen = [node], set[Node]()
        while pending:
            source = pending.pop()
            if source in seen or source in self._contiguous:
                continue
            seen.add(source)
            found = tensor(source)
            if found is not None and order_of(found) == "channels_last":
                return True
            if source.op == "call_function" and kind_of(source) is not Kind.PREFERRING:
                pending += source.all_input_nodes
        self._contiguous |= seen
        return False


def _is_settled(operand: Node, reader: Node) -> bool:
    """Whether inductor knows the strides of an operand for certain when it comes to the reader."""
    return (
        operand.op in ("placeholder", "get_attr")
        or REALIZE_TO_STRIDES in operand.meta
        or kind_of(operand) is Kind.PREFERRING
        or any(user < reader and kind_of(user) is Kind.PREFERRING for user in operand.users)
    )
