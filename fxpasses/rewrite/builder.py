"""The builder writes replacements in the dialect of the graph that they stand in.

A rule says `build.mul(a, b)`; the builder writes `torch.mul` into a graph of the `torch` level and
`aten.mul.Tensor` below it, computes the metadata of every node at once (on fake tensors, under the modes of
the insertion point), and passes on the user's source line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph import metadata
from fxpasses.graph.context import GraphContext
from fxpasses.graph.levels import Level
from fxpasses.graph.operands import Operand, tensor_of
from fxpasses.graph.provenance import Origin
from fxpasses.torch_internals.aot_autograd import mark_for_recomputation
from fxpasses.torch_internals.operators import OpOverload

aten = torch.ops.aten

_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


class Builder:
    """Inserts nodes before one node of a graph, on behalf of one application of one rule."""

    def __init__(
        self,
        context: GraphContext,
        before: Node,
        origin: Node,
        *,
        rule: str,
        replaced: Sequence[Node] = (),
    ) -> None:
        """Args:
        context: the graph.
        before: the node before which everything is inserted.
        origin: the node whose source line the new nodes inherit.
        rule: the name of the rule or pass that writes.
        replaced: the nodes in whose place it writes.
        """
        self.context = context
        self.inserted: list[Node] = []
        self._before = before
        self._origin = origin
        self._modes = context.modes(before)
        self._functional = isinstance(origin.target, OpOverload) or context.level is not Level.TORCH
        self._attributes: dict[str, Node] = {}
        self._told = Origin(rule, origin, replaced)
        self._inherited = {key: origin.meta[key] for key in _KEPT_META if key in origin.meta}

    def call(
        self, target: Callable[..., Any] | str, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
    ) -> Node:
        """A call of a function or (by name) of a method, exactly as spelled."""
        with self.context.graph.inserting_before(self._before):
            op = "call_method" if isinstance(target, str) else "call_function"
            name = target._opname if isinstance(target, OpOverload) else None
            node = self.context.graph.create_node(op, target, tuple(args), dict(kwargs or {}), name)
        self.inserted.append(node)
        self._annotate(node)
        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        with self._modes.entered():
            result = self.context.evaluator.call(function, node.args, dict(node.kwargs))
        metadata.set_value(node, result, like=self._origin)
        return node

    def operand(self, operand: Operand) -> Node:
        """The node of an operand; a tensor of a module that is not at hand is read by a new `get_attr`."""
        if isinstance(operand, Node):
            if operand.op != "get_attr" or operand < self._before:
                return operand
            # make_fx reads a parameter where it is first used, which may be after the insertion point.
            path, found = str(operand.target), metadata.tensor(operand)
        else:
            path, found = operand.path, operand.tensor
        if path not in self._attributes:
            self._attributes[path] = self._attribute(path, found)
        return self._attributes[path]

    def _attribute(self, path: str, found: torch.Tensor | None) -> Node:
        with self.context.graph.inserting_before(self._before):
            node = self.context.graph.create_node("get_attr", path)
        self.inserted.append(node)
        self._annotate(node)
        fake = None if found is None else self.context.evaluator.fake(found)
        metadata.set_value(node, fake, like=self._origin)
        return node

    def _annotate(self, node: Node) -> None:
        node.meta.update(self._inherited)
        self._told.tell(node)
        self.context.adopt(node, self._modes)

    def recompute_in_backward(self) -> None:
        """Has AOTAutograd compute what was written so far anew in the backward pass instead of keeping it.

        For work that is cheap beside the memory that its results take, such as folded weights. It concerns
        graphs from Dynamo where autograd records; a checkpoint around the site overrides it.
        """
        if "example_value" not in self._origin.meta or not self._modes.grad:
            return
        for node in self.inserted:
            if node.op != "get_attr":
                mark_for_recomputation(node)

    # Arithmetic, in the dialect of the graph.

    def _binary(self, name: str, first: Node, second: Node | float) -> Node:
        if not self._functional:
            return self.call(getattr(torch, name), (first, second))
        is_tensor = isinstance(second, Node) and tensor_of(second) is not None
        return self.call(getattr(getattr(aten, name), "Tensor" if is_tensor else "Scalar"), (first, second))

    def add(self, first: Node, second: Node | float) -> Node:
        """First + second, elementwise."""
        return self._binary("add", first, second)

    def sub(self, first: Node, second: Node | float) -> Node:
        """First - second, elementwise."""
        return self._binary("sub", first, second)

    def mul(self, first: Node, second: Node | float) -> Node:
        """First · second, elementwise."""
        return self._binary("mul", first, second)

    def div(self, first: Node, second: Node | float) -> Node:
        """First / second, elementwise."""
        return self._binary("div", first, second)

    def reciprocal(self, given: Node) -> Node:
        """1 / given, elementwise."""
        return self.call(aten.reciprocal.default if self._functional else torch.reciprocal, (given,))

    def expand(self, given: Node, shape: Sequence[int]) -> Node:
        """`given` read again along its axes of size 1."""
        if not self._functional:
            return self.call("expand", (given, *shape))
        return self.call(aten.expand.default, (given, list(shape)))

    def full(self, shape: Sequence[int], value: float, dtype: torch.dtype, *, like: Node) -> Node:
        """A tensor of one value, on the device of `like`."""
        found = tensor_of(like)
        device = None if found is None else found.device
        kwargs = {"dtype": dtype, "device": device}
        return self.call(aten.full.default if self._functional else torch.full, (list(shape), value), kwargs)

    def eye(self, size: int, dtype: torch.dtype, *, like: Node) -> Node:
        """The unit matrix, on the device of `like`."""
        found = tensor_of(like)
        device = None if found is None else found.device
        return self.call(
            aten.eye.default if self._functional else torch.eye, (size,), {"dtype": dtype, "device": device}
        )

    def sum(self, given: Node, axes: Sequence[int]) -> Node:
        """`given` summed over axes."""
        if not self._functional:
            return self.call(torch.sum, (given, list(axes)))
        return self.call(aten.sum.dim_IntList, (given, list(axes)))

    def pad(self, given: Node, amounts: Sequence[int]) -> Node:
        """`given` with zeros around it; two amounts per axis, the last axis first."""
        if not self._functional:
            return self.call(torch.nn.functional.pad, (given, list(amounts)))
        return self.call(aten.constant_pad_nd.default, (given, list(amounts), 0.0))

    def cat(self, given: Sequence[Node], axis: int) -> Node:
        """Tensors one after the other along an axis."""
        return self.call(aten.cat.default if self._functional else torch.cat, (list(given), axis))

    def neg(self, given: Node) -> Node:
        """-given."""
        return self.call(aten.neg.default if self._functional else torch.neg, (given,))

    def rsqrt(self, given: Node) -> Node:
        """1 / sqrt(given), elementwise."""
        return self.call(aten.rsqrt.default if self._functional else torch.rsqrt, (given,))

    def reshape(self, given: Node, shape: Sequence[int]) -> Node:
        """`given`, which is contiguous, with another shape."""
        if not self._functional:
            return self.call("view", (given, *shape))
        return self.call(aten.view.default, (given, list(shape)))

    def repeat(self, given: Node, times: Sequence[int]) -> Node:
        """`given` repeated along each of its axes."""
        if not self._functional:
            return self.call("repeat", (given, *times))
        return self.call(aten.repeat.default, (given, list(times)))

    def cast(self, given: Node, dtype: torch.dtype) -> Node:
        """`given` in another dtype; itself where it has that dtype already."""
        found = tensor_of(given)
        if found is not None and found.dtype == dtype:
            return given
        if not self._functional:
            return self.call("to", (given, dtype))
        if self.context.level is Level.ATEN:
            return self.call(aten._to_copy.default, (given,), {"dtype": dtype})
        return self.call(aten.to.dtype, (given, dtype))

    def linear(self, given: Node, weight: Node, bias: Node | None) -> Node:
        """Given · weightᵀ + bias, for a weight of [C_out, C_in]."""
        return self.call(
            aten.linear.default if self._functional else torch.nn.functional.linear, (given, weight, bias)
        )

    def addmm(self, bias: Node, given: Node, weight: Node) -> Node:
        """Bias + given · weight, for a weight of [C_in, C_out]."""
        return self.call(aten.addmm.default if self._functional else torch.addmm, (bias, given, weight))

    def mm(self, given: Node, weight: Node) -> Node:
        """Given · weight, for a weight of [C_in, C_out]."""
        return self.call(aten.mm.default if self._functional else torch.mm, (given, weight))
