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

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch.fx import Node

from fxpasses.devices.profile import CONVOLUTION_WEIGHT_GRAD
from fxpasses.devices.unsafe import FORGETS_PADDING, OVERRUN, forgets_padding, overruns
from fxpasses.graph.context import Executor, GraphContext
from fxpasses.graph.frames import CHANNELS, PIXELS, Frame, is_one, plain, without
from fxpasses.graph.layouts import C, L, order_of
from fxpasses.graph.metadata import tensor, value
from fxpasses.graph.names import base_name
from fxpasses.graph.storage import is_view, viewed
from fxpasses.passes.layout.boundary import Boundary
from fxpasses.passes.layout.causes import FORCES_STRIDES
from fxpasses.passes.layout.convolutions import may_be_product, read_convolution, weight_trains
from fxpasses.passes.layout.costs import CostModel
from fxpasses.passes.layout.framing import (
    common_frame,
    escapes,
    glued_frame,
    is_image,
    may_write,
    reduced,
    sliced_frame,
    viewed_frame,
)
from fxpasses.passes.layout.labels import GROUP_NORMS, INDEXING, Kind, is_generated, kind_of
from fxpasses.passes.layout.measurable import directions_of, operator_of
from fxpasses.passes.layout.network import Network, Priced, Role, Tensor, fitting
from fxpasses.passes.layout.prices import price_copies, price_reading
from fxpasses.passes.layout.problem import FIXED_C, FIXED_L
from fxpasses.torch_internals.pytree import tree_leaves


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


class _Reader:
    def __init__(self, context: GraphContext, costs: CostModel, executor: Executor) -> None:
        self.network = Network(generates=costs.generates)
        self._context = context
        self._costs = costs
        self._fused = executor == "fused"
        self._is_compiled_here = self._fused and not costs.generates
        # Over a graph that is run as it is: what a compiler gets has its gradients in it.
        self._autograd_follows = not self._fused and context.initial_modes.grad
        self._nodes = (next(iter(context.graph.nodes)), context.graph.output_node())
        self._has_writes = any(map(may_write, context.graph.nodes))
        self._borrowed: set[Node] = set()
        # What is taken for images since nobody says what its dimensions are.
        self._guessed: set[Node] = set()

    def read(self, node: Node) -> None:
        """Gives the node its role, and enters what it makes and reads."""
        if node.op in ("placeholder", "get_attr") or base_name(node) in FORCES_STRIDES:
            self._borrowed.add(node)
            self._exact(node)
        elif node.op == "output":
            self._give(node)
        elif node.target is operator.getitem and isinstance(value(node.args[0]), (tuple, list)):  # type: ignore[arg-type]
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
        if not self._labelled(node, operands):
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
            return False
        return self._labelled(node, operands)

    def _costed(self, node: Node) -> bool:
        operands = self._labelled_operands(node)
        found = next((given for given in map(tensor, operands) if given is not None), None)
        if found is None:
            return self._is_compiled_here and self._labelled(node, [])
        if not self._plain_frames(operands) and not (self._is_compiled_here and base_name(node) == "cat"):
            return False
        if self.network.generates and base_name(node) in INDEXING:
            return False
        if base_name(node) in GROUP_NORMS and not self._fused and self._costs.device_type != "cpu":
            return False  # eager's kernels for GPUs read and give contiguous tensors, whatever metadata say
        is_labelled = self._labelled_at_a_price(node, operands, found.dtype)
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
        if not dims or not _keeps_no_order(frame, given, dims):
            return False
        made = next(leaf for leaf in tree_leaves(value(node)) if isinstance(leaf, torch.Tensor))
        left = frame if made.dim() == given.dim() else without(frame, dims)
        return self._labelled_at_a_price(node, operands, given.dtype, left)

    def _slicing(self, node: Node) -> bool:
        operands = self._labelled_operands(node)
        if self._must_share(node, operands):
            return False
        frame = sliced_frame(node, self.network.frames[operands[0]])
        return self._labelled(node, operands, frame)

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
        operands, found = self._labelled_operands(node), tensor(node)
        if not operands or found is None or any(map(self._is_written, operands)):
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
        if self._is_compiled_here and label in (C, L) and self._is_given(operands[0]):
            self.network.aside.add((node, operands[0]))
            return self._made_anew(node, frame)
        if self._fused and label in (C, L):
            return self._labelled(node, operands) and self._made_anew(node, frame)
        if label not in (C, L) and wanted is torch.contiguous_format and glued is not None:
            self.network.aside.update((node, operand) for operand in operands)
            return self._made_anew(node, glued)
        if (
            label not in (C, L)
            and wanted is torch.contiguous_format
            and self._fused
            and order_of(found) in (C, L)
        ):
            self.network.aside.update((node, operand) for operand in operands)
            return self._made_anew(node, plain(found.dim()))
        if label not in (C, L):
            # No order that the operand may have saves the copy.
            return wanted is torch.contiguous_format and self._absorbing(node)
        self.network.roles[node] = Role.FREE
        self._use(operands[0], node, _fixed(label))
        self._make(node, _fixed(label), frame)
        return True

    def _made_anew(self, node: Node, frame: Frame) -> bool:
        """Enters a copy that the graph makes anyway, which is made in the layout that is wanted of it."""
        self.network.anew.add(node)
        if node not in self.network.variables:
            self.network.roles[node] = Role.LABELLED
            self.network.variables[node] = self.network.variable()
            self._make(node, self.network.variables[node], frame)
        return True

    def _generating(self, node: Node) -> bool:
        return self._fused and self._labelled(node, [])

    def _measuring(self, node: Node) -> bool:
        self.network.roles[node] = Role.FREE
        return True

    # What the handlers share.

    def _labelled_at_a_price(
        self, node: Node, operands: list[Node], dtype: torch.dtype, frame: Frame | None = None
    ) -> bool:
        """Enters an operator that moves data, with what that costs in either layout."""
        if not self._labelled(node, operands, frame):
            return False
        # What is measured is an operator on images, not on views of them.
        is_measured = self._plain_frames(operands)
        measurable = (
            partial(operator_of, node, dtype) if is_measured and not self.network.generates else tuple
        )
        price = partial(self._costs.operator, node, dtype, as_measured=is_measured)
        self._price(node, Priced(price, measurable))
        return True

    def _price(self, node: Node, priced: Priced) -> None:
        if node in self.network.variables:
            self.network.price(node, priced)

    def _labelled(self, node: Node, operands: list[Node], frame: Frame | None = None) -> bool:
        """Enters a labelled operator, or a free one where neither operands nor results have a label."""
        results = [leaf for leaf in tree_leaves(value(node)) if isinstance(leaf, torch.Tensor)]
        aside: set[Node] = set()
        movable = self._movable(node, operands)
        if operands and frame is None:
            found = self._common_frame(movable, results)
            if found is None:
                return False
            frame, aside = found
        if any(order_of(result, fitting(frame, result)) == "other" for result in results):
            return False
        if not operands and all(order_of(result, fitting(frame, result)) == "both" for result in results):
            self.network.roles[node] = Role.FREE
            return True
        variable = self.network.variable()
        self.network.roles[node] = Role.LABELLED
        self.network.variables[node] = variable
        kind = kind_of(node)
        left = [operand for operand in operands if operand not in movable]
        self.network.aside.update((node, operand) for operand in (*aside, *left))
        if left and frame is not None:
            tensors = [self.network.tensors[operand] for operand in left]
            self._price(node, Priced(partial(price_reading, tensors, frame, self._costs), tuple))
        for operand in [operand for operand in movable if operand not in aside]:
            self._use(operand, node, variable)
            if kind not in (Kind.PREFERRING, Kind.COSTED, Kind.REDUCING) and self._is_written(operand):
                self.network.unify(variable, self.network.tensors[operand].producer)
        self._make(node, variable, frame)
        if kind not in (Kind.PREFERRING, Kind.COSTED) and self._guessed.issuperset(operands):
            self._guessed.add(node)
        return True

    def _movable(self, node: Node, operands: list[Node]) -> list[Node]:
        """The operands that are wanted in the layout of an operator; the others are read as they lie.

        A loop that inductor writes reads what was made in a given layout for what copying it would cost.
        """
        if not self._is_compiled_here or kind_of(node) is not Kind.AGNOSTIC or not is_generated(node):
            return operands
        found = [operand for operand in operands if not self._is_given(operand)]
        return found or operands

    def _is_given(self, operand: Node) -> bool:
        """Whether an operator makes its result in one layout, whatever is wanted."""
        producer = self.network.find(self.network.tensors[operand].producer)
        return operand.op.startswith("call") and producer in (FIXED_C, FIXED_L)

    def _common_frame(
        self, operands: Sequence[Node], results: Sequence[torch.Tensor]
    ) -> tuple[Frame, set[Node]] | None:
        """The frame of an operator and what it reads aside of that, as `common_frame` has it."""
        frames = {self.network.frames[operand] for operand in operands}
        rank = max((result.dim() for result in results), default=0)
        if len(frames) == 1 and len(next(iter(frames))) >= rank:
            return frames.pop(), set()
        given = [(self.network.frames[operand], tensor(operand)) for operand in operands]
        found = common_frame([(frame, held) for frame, held in given if held is not None], rank)
        if found is None:
            return None
        frame, is_aside = found
        return frame, {operand for operand, aside in zip(operands, is_aside, strict=True) if aside}

    def _exact(self, node: Node) -> None:
        self.network.roles[node] = Role.EXACT
        for operand in self._labelled_operands(node):
            if node.op == "output" and operand in self.network.free:
                continue
            held = self.network.tensors[operand]
            self._use(operand, node, _fixed(held.original))
            if self._is_written(operand):
                self.network.unify(held.producer, _fixed(held.original))
        self._make_as_traced(node)

    def _make_as_traced(self, node: Node) -> None:
        found = tensor(node)
        order = order_of(found) if found is not None else "both"
        if order in (C, L):
            self._make(node, _fixed(order), None)
            if node.op.startswith("call"):
                self._guessed.add(node)

    def _give(self, node: Node) -> None:
        """Results have the strides of the traced graph, but for those that may have others."""
        for operand in self._labelled_operands(node):
            if operand in self.network.boundary.free and self._plain_frames([operand]):
                self.network.free.add(operand)
        self._exact(node)

    def _project(self, node: Node) -> None:
        """An element of a tuple has the label that the tuple's maker works in."""
        (parent, *_) = node.all_input_nodes
        if self.network.roles.get(parent) is not Role.LABELLED:
            self._exact(node)
            return
        self.network.roles[node] = Role.LABELLED
        self.network.variables[node] = self.network.variables[parent]
        self._make(node, self.network.variables[parent], self.network.frames.get(parent))

    def _make(self, node: Node, producer: int, frame: Frame | None) -> None:
        found = tensor(node)
        if frame is not None and found is None:
            self.network.frames[node] = frame
        if found is None:
            return
        frame = fitting(frame, found)
        if frame is not None:
            self.network.frames[node] = frame
        order = order_of(found, frame)
        if order not in (C, L):
            return
        self.network.frames[node] = frame or plain(found.dim())
        held = Tensor(node, producer, order)
        price_copies(held, found, self._costs)
        self.network.tensors[node] = held

    def _use(self, operand: Node, user: Node, variable: int) -> None:
        self.network.tensors[operand].users.append((user, variable))

    def _labelled_operands(self, node: Node) -> list[Node]:
        return [operand for operand in node.all_input_nodes if operand in self.network.tensors]

    def _plain_frames(self, operands: Iterable[Node]) -> bool:
        frames = [self.network.frames[operand] for operand in operands]
        return all(len(frame) in (4, 5) and frame == plain(len(frame)) for frame in frames)

    def _is_written(self, node: Node) -> bool:
        return self._has_writes and self._context.written_between([node], *self._nodes) is not None


def _keeps_no_order(frame: Frame, given: torch.Tensor, dims: Iterable[int]) -> bool:
    """Whether what a reduction leaves lies in memory the same way under both labels."""
    kept = {frame[d][0] for d, size in enumerate(given.shape) if d not in dims and not is_one(size)}
    return not {CHANNELS, PIXELS} <= kept


def _fixed(label: str) -> int:
    return FIXED_C if label == C else FIXED_L


_HANDLERS: dict[Kind, Callable[[_Reader, Node], bool]] = {
    Kind.PREFERRING: _Reader._preferring,
    Kind.AGNOSTIC: _Reader._agnostic,
    Kind.COSTED: _Reader._costed,
    Kind.REDUCING: _Reader._reducing,
    Kind.SLICING: _Reader._slicing,
    Kind.PERMUTING: _Reader._viewing,
    Kind.VIEWING: _Reader._viewing,
    Kind.ABSORBING: _Reader._absorbing,
    Kind.COPYING: _Reader._copying,
    Kind.GENERATING: _Reader._generating,
    Kind.MEASURING: _Reader._measuring,
}
