"""The pass `precision`: convolutions, linear layers and matrix products of float32 compute in bfloat16.

    x ─ conv ─ relu ─ conv ─ softmax
    x ─ to(bfloat16) ─ conv ─ relu ─ conv ─ to(float32) ─ softmax

A product reads bfloat16, and so does what follows it as long as all that it reads is bfloat16. Everybody else
gets float32 back. Each tensor is cast once each way, whoever wants it, right behind what makes it; one that
somebody writes to stays float32 and is cast anew for each product. A view of a bfloat16 tensor is made again
of the float32 one, so that strides and shared storage are as they were:

    y = conv(x);  v = y[:, ::2]          float32:  to(y, float32)[:, ::2]
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.levels import called_by
from fxpasses.graph.locations import location_of, module_of
from fxpasses.graph.metadata import set_value, tensor, value
from fxpasses.graph.strides import has_gaps, memory_order, same_layout
from fxpasses.options import Options
from fxpasses.passes.precision.in_place import refresh, write_out_of_place
from fxpasses.passes.precision.legality import candidates, refusal_of_graph, refusal_of_node
from fxpasses.passes.precision.operators import follows, masks_of, reads_sizes
from fxpasses.report.data import Remark
from fxpasses.report.precision import Precision
from fxpasses.rewrite.builder import Builder
from fxpasses.rewrite.graph_pass import GraphPass, Outcome

NAME = "precision"

_DTYPES = {"bfloat16": torch.bfloat16}


def run(context: GraphContext, options: Options) -> Outcome:
    """Has the products of one graph compute as `Options.precision` says."""
    dtype = _DTYPES[options.precision]
    found = candidates(context, dtype)
    if not found:
        return Outcome()
    context.forget_effects()  # rules have written what they do not know
    if (refusal := refusal_of_graph(context, found[0])) is not None:
        return Outcome((_remark(context, found[0], refusal),))
    costs = options.profit == "always"
    verdicts = {node: refusal_of_node(context, node, whatever_it_costs=costs) for node in found}
    changes = None in verdicts.values()
    precision = None
    if changes:
        lowering = Lowering(context, dtype, [node for node in found if verdicts[node] is None])
        verdicts.update(lowering.run())
        lowered = sum(verdict is None for verdict in verdicts.values())
        precision = Precision(options.precision, lowered, lowering.casts)
    remarks = tuple(_remark(context, node, verdict) for node, verdict in verdicts.items())
    return Outcome(remarks, changed=changes, precision=precision)


PRECISION = GraphPass(NAME, run, last=True, asked=lambda options: options.precision in _DTYPES)
"""It runs behind all rules: norms are folded in float32, and what comes of it is rounded once."""


def _remark(context: GraphContext, node: Node, refusal: Decline | None) -> Remark:
    place = node.name, location_of(node)
    if refusal is None:
        told = ("applied", module_of(node), "", context.path)
        return Remark(NAME, "applied", "applied", "computes in bfloat16", *place, *told)
    stage = "profit" if refusal.code == "slow-precision" else "check"
    blamed = refusal.node.name if refusal.node is not None else ""
    told = (stage, module_of(node), blamed, context.path)
    return Remark(NAME, "declined", refusal.code, refusal.message, *place, *told)


@dataclass
class Lowering:
    """One graph on its way to a lower precision.

    Attributes:
        context: the graph; it is changed.
        dtype: the lower precision.
        products: what is to compute in it.
    """

    context: GraphContext
    dtype: torch.dtype
    products: list[Node]
    _written: set[Node] = field(default_factory=set)
    _sharing: set[Node] = field(default_factory=set)
    _lowered: set[Node] = field(default_factory=set)
    _moved: set[Node] = field(default_factory=set)
    _low: dict[Node, Node] = field(default_factory=dict)
    _high: dict[Node, Node] = field(default_factory=dict)
    _inserted: list[Node] = field(default_factory=list)

    @property
    def casts(self) -> int:
        """How many casts were written."""
        return sum(_is_cast(node) for node in self._inserted)

    def run(self) -> dict[Node, Decline]:
        """Goes over the graph once, in its order; returns which products could not be lowered, and why."""
        refused: dict[Node, Decline] = {}
        write_out_of_place(self.context)
        nodes, products = list(self.context.graph.nodes), set(self.products)
        self._written = {node for node in nodes if self.context.is_written(node)}
        for node in nodes:
            is_view = self.context.may_return_argument(node) and node not in products
            if is_view or (_is_part(node) and node.args[0] in self._sharing):
                self._sharing.add(node)
        for node in nodes:
            if node in products and self._lower_product(node):
                continue
            if node in products:
                refused[node] = Decline(
                    "unrestorable-strides", "{} would have other strides", node, (node.name,)
                )
            if node.op in ("placeholder", "get_attr") or reads_sizes(node) or self._picks_indices(node):
                continue
            if not (self._may_follow(node) and self._lower(node, node.args, node.kwargs)):
                self._keep(node)
        for node in reversed(self._inserted):
            if not node.users:
                self.context.graph.erase_node(node)
                self._inserted.remove(node)
        self.context.forget_effects()
        return refused

    # What becomes of a node

    def _lower_product(self, product: Node) -> bool:
        """Has a product read and give the lower precision; False where its strides would be others."""
        masks = masks_of(product)

        def operand(node: Node) -> Node:
            if node in masks:
                return self._in_float32(node)
            return self._lowly(node, product) if self._is_float(node) else node

        if not self._lower(product, *map_arg((product.args, product.kwargs), operand)):
            return False
        if product in self._written:
            self._high[product] = self._cast(product, product.next, torch.float32)
        return True

    def _may_follow(self, node: Node) -> bool:
        """Whether a node may compute in the lower precision, since all that it reads is in it."""
        if node in self._written or not follows(node):
            return False
        read = [operand for operand in node.all_input_nodes if _holds_tensors(operand)]
        if not read or not all(map(self._is_lowered, read)):
            return False
        return isinstance(value(node), torch.Tensor) or all(
            user.target is operator.getitem and user not in self._written for user in node.users
        )

    def _is_lowered(self, node: Node) -> bool:
        """Whether a node's value is in the lower precision; what is written to is a cast of it."""
        return node in self._lowered and node not in self._written

    def _lower(self, node: Node, args: Any, kwargs: Any) -> bool:
        """Has a node compute in the lower precision, of other operands; False where it cannot."""
        before = value(node)
        try:
            result = self._evaluate(node, args, kwargs)
        except Exception:  # an operator that does not take the type
            return False
        for found, expected in zip(_tensors(result), _tensors(before), strict=True):
            wanted = self.dtype if expected.is_floating_point() else expected.dtype
            if found.dtype != wanted or not same_layout(found, expected):
                return False
            # A cast back would close gaps, unless the node is a view, which is made again instead.
            if node not in self._sharing and (has_gaps(found) or memory_order(found) is None):
                return False
        node.args, node.kwargs = args, kwargs
        set_value(node, result, like=node)
        self._lowered.add(node)
        return True

    def _keep(self, node: Node) -> None:
        """Has a node read float32, as it did."""
        read = node.all_input_nodes
        raised = {operand: self._in_float32(operand) for operand in read if _holds_tensors(operand)}
        changed = any(operand is not other for operand, other in raised.items())
        if changed:
            given = map_arg((node.args, node.kwargs), lambda operand: raised.get(operand, operand))
            node.args, node.kwargs = given
        if node in self._sharing and (changed or any(operand in self._moved for operand in read)):
            refresh(self.context, [node])
            self._moved.add(node)

    def _picks_indices(self, node: Node) -> bool:
        """Whether a node takes of several results one that is no float, such as the indices of pooling."""
        return _is_part(node) and node.args[0] in self._lowered and not self._is_float(node)

    # Both precisions of a tensor

    def _lowly(self, node: Node, reader: Node) -> Node:
        """A node in the lower precision."""
        if node in self._written:
            return self._cast(self._in_float32(node), reader, self.dtype)
        if self._is_lowered(node):
            return node
        if node not in self._low:
            self._low[node] = self._cast(node, self._behind(node), self.dtype)
        return self._low[node]

    def _in_float32(self, node: Node) -> Node:
        """A node in float32: itself, a cast of it, or a view of such a cast."""
        if node not in self._lowered:
            return node
        if node not in self._high:
            if node in self._sharing or not isinstance(value(node), torch.Tensor):
                given = map_arg((node.args, node.kwargs), self._in_float32)
                self._high[node] = self._insert(
                    node, node.next, lambda build: build.call(node.target, *given)
                )
            else:
                self._high[node] = self._cast(node, node.next, torch.float32)
        return self._high[node]

    def _behind(self, node: Node) -> Node:
        """The first node before which something may be inserted that reads a node."""
        behind = node.next
        while behind.op == "placeholder":
            behind = behind.next
        return behind

    def _cast(self, node: Node, before: Node, dtype: torch.dtype) -> Node:
        return self._insert(node, before, lambda build: build.cast(node, dtype))

    def _insert(self, origin: Node, before: Node, write: Callable[[Builder], Node]) -> Node:
        build = Builder(self.context, before, origin, rule=NAME)
        written = write(build)
        self._inserted += build.inserted
        return written

    def _evaluate(self, node: Node, args: Any, kwargs: Any) -> Any:
        function: Any = called_by(self.context.module, node)
        with self.context.modes(node).entered():
            return self.context.evaluator.call(function, args, dict(kwargs))

    @staticmethod
    def _is_float(node: Node) -> bool:
        found = tensor(node)
        return found is not None and found.is_floating_point()


def _is_part(node: Node) -> bool:
    """Whether a node takes one of several results."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and isinstance(value(source), (tuple, list))


def _holds_tensors(node: Node) -> bool:
    return bool(_tensors(value(node)))


def _tensors(found: Any) -> list[torch.Tensor]:
    parts = found if isinstance(found, (tuple, list)) else (found,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _is_cast(node: Node) -> bool:
    source = node.all_input_nodes[0]
    found, given = tensor(node), tensor(source)
    return found is not None and given is not None and found.dtype != given.dtype
