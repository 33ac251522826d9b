"""Reading a graph as a network: every operator gets a role, and every tensor that has a label its users.

     conv2d ── relu ──┬── max_pool2d     LABELLED  works in the label of its variable; relu's costs nothing
                     └── flatten        EXACT     reads relu with the strides of the traced graph
                          └── size      FREE      does not care

A tensor without a label (see `labels`) is nobody's concern. Views that are views in either layout, such as a
permute to N, *spatial, C, channels in groups or pixels in one row, keep the label in a frame of their own, so
that what follows (a norm, a matrix product) may absorb a layout for free. Where the graph writes to a tensor,
everything that shares its storage has one label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.fx import Node

from fxpasses.devices.profile import CONVOLUTION_WEIGHT_GRAD
from fxpasses.devices.unsafe import FORGETS_PADDING, OVERRUN, forgets_padding, overruns
from fxpasses.graph.context import GraphContext
from fxpasses.graph.frames import Frame, plain, without
from fxpasses.graph.layouts import C, L, order_of
from fxpasses.graph.metadata import tensor, value
from fxpasses.graph.names import base_name
from fxpasses.graph.storage import is_part_of_tuple, is_view, viewed
from fxpasses.passes.layout.boundary import Boundary
from fxpasses.passes.layout.causes import FORCES_STRIDES
from fxpasses.passes.layout.convolutions import may_be_product, read_convolution, weight_trains
from fxpasses.passes.layout.costs import CostModel
from fxpasses.passes.layout.entries import Entries, fixed
from fxpasses.passes.layout.framing import (
    VIEWS,
    agree_in_sizes,
    escapes,
    glued_frame,
    is_image,
    keeps_no_order,
    reduced,
    sliced_frame,
    stacked_frame,
    viewed_frame,
)
from fxpasses.passes.layout.labels import FOLLOWING, GROUP_NORMS, INDEXING, Kind, is_generated, kind_of
from fxpasses.passes.layout.measurable import directions_of
from fxpasses.passes.layout.network import Network, Priced, Role
from fxpasses.passes.layout.problem import FIXED_C
from fxpasses.torch_internals.pytree import tree_leaves

_JOINS = frozenset(("cat", "concat", "concatenate"))
"""What lays tensors side by side along a dimension that any frame may have."""


def read_network(context: GraphContext, costs: CostModel, boundary: Boundary | None = None) -> Network:
    """Reads a graph whose nodes carry metadata.

    Args:
        context: the graph.
        costs: what operators and copies are asked for.
        boundary: which results need not have the strides of the traced graph; None where all must.

    Raises:
        UnplannableError: the graph's writes tie tensors of different layouts together.
    """
    reader = _Reader(context, costs, context.executor)
    reader.network.boundary = boundary or Boundary()
    for node in context.graph.nodes:
        reader.read(node)
    return reader.network


class _Reader(Entries):
    def read(self, node: Node) -> None:
        """Gives the node its role, and enters what it makes and reads."""
        if node.op in ("placeholder", "get_attr") or base_name(node) in FORCES_STRIDES:
            self._borrowed.add(node)
            self._exact(node)
        elif node.op == "output":
            self._give(node)
        elif is_part_of_tuple(node):
            self._project(node)
        else:
            handler = _HANDLERS.get(kind_of(node)) if node.op.startswith("call") else None  # type: ignore[arg-type]
            if kind_of(node) is None and self._labelled_operands(node):
                self.network.unknown.append(node)
            if handler is None or not handler(self, node):
                self._exact(node)
                if is_view(node) and viewed(node) in self._borrowed:
                    self._borrowed.add(node)

    # Handlers: whether the node could be read as its kind.

    def _preferring(self, node: Node) -> bool:
        found = read_convolution(node)
        operands = self._labelled_operands(node)
        if found is None or not self._plain_frames(operands):
            return False
        sizes, dtype, directions, activations = found
        if not any(activation in self.network.tensors for activation in activations):
            return False
        # Under autograd the gradients would be other operators than those that were measured.
        as_product = not self._autograd_follows and may_be_product(node, sizes)
        price = partial(self._costs.convolution, sizes, dtype, directions, as_product=as_product)
        if not self._labelled(node, operands, plain(len(sizes.input))):
            return False
        self.network.convolutions[node] = price()
        self._price(node, Priced(price, partial(directions_of, sizes, dtype, directions)))
        if overruns(sizes, dtype, self._costs.device_type) and self._gives_weight_gradient(node, directions):
            self._keep_contiguous(node, OVERRUN)
        return True

    def _keep_contiguous(self, node: Node, reason: str) -> None:
        self.network.unsafe[node] = reason
        self.network.unify(self.network.variables[node], FIXED_C)

    def _gives_weight_gradient(self, node: Node, directions: Sequence[str]) -> bool:
        """Whether the gradient of a convolution's weight is computed in the layout that the node works in."""
        if base_name(node) == "convolution_backward":
            return CONVOLUTION_WEIGHT_GRAD in directions
        return self._autograd_follows and weight_trains(self._context, node)

    def _agnostic(self, node: Node) -> bool:
        operands = self._labelled_operands(node)
        if not operands and not self._fused:
            return self._unlabelled(node)
        if base_name(node) in INDEXING and not self._may_index(node):
            return False
        if not operands:
            self.network.flexible.add(node)
        return self._labelled(node, operands)

    def _unlabelled(self, node: Node) -> bool:
        """Operands whose dimensions have one order in both layouts are read as they lie, gaps or not."""
        results = [leaf for leaf in tree_leaves(value(node)) if isinstance(leaf, torch.Tensor)]
        if any(order_of(result) == "other" for result in results):
            return False
        self.network.roles[node] = Role.FREE
        self._make_as_traced(node)
        return True

    def _costed(self, node: Node) -> bool:
        operands = self._labelled_operands(node)
        found = next((given for given in map(tensor, operands) if given is not None), None)
        name = base_name(node)
        if found is None:
            return self._is_compiled_here and is_generated(node) and self._labelled(node, [])
        if name not in _JOINS and not self._plain_frames(operands):
            return False
        if name in INDEXING and not self._may_index(node):
            return False
        if name in FOLLOWING and self._fused:
            return False  # a kernel whose strides compiled code would not expect
        if name in GROUP_NORMS and not self._fused and self._costs.device_type != "cpu":
            return False  # eager's kernels for GPUs read and give contiguous tensors, whatever metadata say
        frame = None if name in _JOINS else plain(found.dim())
        is_labelled = self._labelled_at_a_price(node, operands, found.dtype, frame)
        if is_labelled and node in self.network.variables and self._pools_unsafely(node, operands):
            self._keep_contiguous(node, FORGETS_PADDING)
        return is_labelled

    def _pools_unsafely(self, node: Node, operands: Sequence[Node]) -> bool:
        """Whether the gradient of an average pooling, in the layout of the node, could be wrong."""
        name = base_name(node)
        if name == "avg_pool2d":
            trains = self._autograd_follows and any(map(self._context.requires_grad, operands))
        else:
            trains = name == "avg_pool2d_backward"
        return trains and forgets_padding(node, self._costs.device_type, generated=self._fused)

    def _reducing(self, node: Node) -> bool:
        operands = self._labelled_operands(node)
        given = tensor(operands[0]) if len(operands) == 1 else None
        if given is None:
            return False
        frame, dims = self.network.frames[operands[0]], reduced(node, given.dim())
        if not dims:
            return False
        if not keeps_no_order(frame, given, dims):
            if not self._fused:
                return self._absorbing(node)
            self.network.flexible.add(node)
        made = next(leaf for leaf in tree_leaves(value(node)) if isinstance(leaf, torch.Tensor))
        left = frame if made.dim() == given.dim() else without(frame, dims)
        return self._labelled_at_a_price(node, operands, given.dtype, left)

    def _slicing(self, node: Node) -> bool:
        operands = self._labelled_operands(node)
        if self._must_share(node, operands):
            return False
        frame = sliced_frame(node, self.network.frames[operands[0]])
        return self._labelled(node, operands, frame)

    def _stacking(self, node: Node) -> bool:
        operands = self._labelled_operands(node)
        frames = {self.network.frames[operand] for operand in operands}
        frame = stacked_frame(node, frames.pop()) if len(frames) == 1 else None
        return frame is not None and self._labelled(node, operands, frame)

    def _expanding(self, node: Node) -> bool:
        source, found = (node.args or (None,))[0], tensor(node)
        given = tensor(source)
        if not isinstance(source, Node) or given is None or found is None:
            return False
        if source in self.network.tensors and agree_in_sizes(given, found):
            if self._must_share(node, [source]):
                return False
            self.network.aside.update((node, other) for other in node.all_input_nodes if other is not source)
            return self._labelled(node, [source], self.network.frames[source])
        is_viewed = escapes(node) or any(kind_of(user) in VIEWS for user in node.users)
        if self._fused and not is_viewed and self._absorbing(node):
            return True
        self._borrowed.add(node)
        if source in self.network.tensors:
            return False
        # `expand_as` reads the sizes of another tensor.
        self.network.roles[node] = Role.FREE
        self._make_as_traced(node)
        return True

    def _gathering(self, node: Node) -> bool:
        if not self._fused:
            return self._absorbing(node)
        return self._may_index(node) and self._labelled(node, self._labelled_operands(node))

    def _may_index(self, node: Node) -> bool:
        """Whether code is generated for an operator in either label, or kernels run whose metadata tell."""
        if self.network.generates and base_name(node) in INDEXING:
            return False
        if self._fused:
            self.network.flexible.add(node)
        return bool(self._labelled_operands(node))

    def _viewing(self, node: Node) -> bool:
        source = node.args[0] if node.args else node.kwargs.get("input")
        operands = [operand for operand in self._labelled_operands(node) if operand is source]
        if self._must_share(node, operands):
            return False
        given, found = tensor(operands[0]), tensor(node)
        frame = None if given is None else viewed_frame(node, self.network.frames[operands[0]], given)
        if frame is None or found is None or (operands[0] in self._guessed and is_image(found, frame)):
            return False
        # `view_as` reads the sizes of another tensor.
        self.network.aside.update((node, other) for other in node.all_input_nodes if other is not source)
        return self._labelled(node, operands, frame)

    def _must_share(self, node: Node, operands: Sequence[Node]) -> bool:
        """Whether a view has to share the memory of an input, or is of nothing that has a label."""
        is_borrowed = not operands or bool(self._borrowed.intersection(operands))
        if is_borrowed:
            self._borrowed.add(node)
        may_be_copied = self._fused and kind_of(node) is not Kind.SLICING and not escapes(node)
        return is_borrowed and not (operands and may_be_copied)

    def _absorbing(self, node: Node) -> bool:
        """Any strides will do, and those of the result are not their matter."""
        operands = self._labelled_operands(node)
        if not operands or any(map(self._is_written, operands)):
            return False
        self.network.roles[node] = Role.FREE
        self._make_as_traced(node)
        return True

    def _copying(self, node: Node) -> bool:
        """A copy to a given layout reads any and makes that one; what it copies is charged as a copy."""
        operands = self._labelled_operands(node)
        wanted = node.kwargs.get("memory_format", node.args[1] if len(node.args) > 1 else None)
        if wanted is None and base_name(node) == "contiguous":
            wanted = torch.contiguous_format
        found, glued = tensor(node), glued_frame(node) if self._fused else None
        if not operands:
            return wanted is torch.contiguous_format and glued is not None and self._made_anew(node, glued)
        if wanted in (None, torch.preserve_format):
            return self._labelled(node, operands)
        frame = self.network.frames[operands[0]]
        if found is None or self._is_written(operands[0]):
            return False
        label = order_of(found, frame)
        if label in (C, L) and self._is_compiled_here and self._is_given(operands[0]):
            return self._copied_as_it_lies(node, operands, frame)
        if label in (C, L) and self._fused:
            return self._labelled(node, operands) and self._made_anew(node, frame)
        if label not in (C, L) and wanted is torch.contiguous_format:
            if glued is None and self._fused and order_of(found) in (C, L):
                glued = plain(found.dim())
            if glued is not None:
                return self._copied_as_it_lies(node, operands, glued)
        if label not in (C, L):
            # No order that the operand may have saves the copy.
            return wanted is torch.contiguous_format and self._absorbing(node)
        self.network.roles[node] = Role.FREE
        self._use(operands[0], node, fixed(label))
        self._make(node, fixed(label), frame)
        return True

    def _copied_as_it_lies(self, node: Node, operands: Sequence[Node], frame: Frame) -> bool:
        self.network.aside.update((node, operand) for operand in operands)
        return self._made_anew(node, frame)

    def _made_anew(self, node: Node, frame: Frame) -> bool:
        """Enters a copy that the graph makes anyway, which is made in the layout that is wanted of it."""
        self.network.anew.add(node)
        if node not in self.network.variables:
            self.network.roles[node] = Role.LABELLED
            self.network.variables[node] = self.network.variable()
            self._make(node, self.network.variables[node], frame)
        return True

    def _generating(self, node: Node) -> bool:
        if self._fused:
            self.network.flexible.add(node)
        return self._fused and self._labelled(node, [])

    def _measuring(self, node: Node) -> bool:
        self.network.roles[node] = Role.FREE
        return True


_HANDLERS: dict[Kind, Callable[[_Reader, Node], bool]] = {
    Kind.PREFERRING: _Reader._preferring,
    Kind.AGNOSTIC: _Reader._agnostic,
    Kind.COSTED: _Reader._costed,
    Kind.REDUCING: _Reader._reducing,
    Kind.SLICING: _Reader._slicing,
    Kind.STACKING: _Reader._stacking,
    Kind.PERMUTING: _Reader._viewing,
    Kind.VIEWING: _Reader._viewing,
    Kind.EXPANDING: _Reader._expanding,
    Kind.GATHERING: _Reader._gathering,
    Kind.ABSORBING: _Reader._absorbing,
    Kind.COPYING: _Reader._copying,
    Kind.GENERATING: _Reader._generating,
    Kind.MEASURING: _Reader._measuring,
}
