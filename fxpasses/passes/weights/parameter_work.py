"""Parameter work: what depends on parameters and buffers alone is split off, to be done once per version.

    graph(parameters, x)  =  main(parameters, x, prologue(parameters))

The prologue holds every pure, deterministic node whose inputs are all parameters or buffers that nothing in
the graph writes to: folded batch norms, normalised weights, casts. Views are not kept, since they are free;
what they view is. On a CPU inductor lays convolution weights out channels-last at every call, so those
copies belong to the prologue too. And it works out a batch norm's 1 / sqrt(var + eps) anew for every element,
so a norm that nothing folded becomes x · s + t, which is how eager's kernel computes it.

A convolution follows the layout of its weight, and whoever reads memory behind it must find eager's strides.
So the main part is traced over copies of the weights in eager's strides. In inductor's graph they have done
their service, and `passes.layout.raw_memory.read_kept_weights` takes them out:

    convolution(x, clone(kept, contiguous))  ->  convolution(x, kept)

Kept tensors never hold more bytes than the parameters and buffers: what grows most is left out first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import set_value, tensor
from fxpasses.graph.operands import tensor_of
from fxpasses.graph.quantised import first_quantising
from fxpasses.graph.views import CONVOLUTIONS, BatchNorm, Linear, read_linear
from fxpasses.passes.folding.terms import Terms, norm_at
from fxpasses.passes.weights.one_dimensional import write_as_images
from fxpasses.passes.weights.stable import (
    bytes_of,
    kept_nodes,
    keys_of,
    metadata_of,
    prologue_of,
    sources_of,
    stable_nodes,
)
from fxpasses.rewrite.builder import Builder
from fxpasses.torch_internals.aot_autograd import is_module_tensor, mark_as_static_input
from fxpasses.torch_internals.onednn import linears_are_onednns

PacksLinear = Callable[[str, int, int, torch.Tensor], bool]
"""Whether a linear layer's weight is packed: name, channels before and after, and metadata of the input."""


@dataclass(frozen=True)
class ParameterWork:
    """A graph split in two.

    Attributes:
        main: the rest of the graph; its placeholders are those of the whole that it reads, then one per kept
            tensor.
        inputs: positions of the placeholders of the whole that `main` has.
        prologue: from the tensors at `sources` to the kept tensors.
        sources: positions of the placeholders that the prologue reads.
        examples: the metadata of the kept tensors.
        keys: of the kept tensors; equal keys are the same work on inputs of the same names.
        names: of the placeholders that the prologue reads.
        left_out: what depends on parameters alone and is computed at every call, since it takes more memory.
    """

    main: GraphModule
    inputs: tuple[int, ...]
    prologue: GraphModule
    sources: tuple[int, ...]
    examples: tuple[torch.Tensor, ...]
    keys: tuple[str, ...]
    names: tuple[str, ...]
    left_out: tuple[Decline, ...] = ()

    @property
    def kept_bytes(self) -> int:
        """Size of the kept tensors, in bytes."""
        return sum(map(bytes_of, self.examples))


def split_parameter_work(
    context: GraphContext, *, for_cpu: bool, packs_linear: PacksLinear | None = None
) -> ParameterWork | Decline:
    """Splits the graph of `context`, which becomes `main` and is changed in place.

    Args:
        context: a graph from Dynamo of which no gradient is recorded.
        for_cpu: whether inductor compiles it for a CPU: then the weights of 2-D convolutions are kept
            channels-last, and batch norms as a scale and a shift.
        packs_linear: tells which linear layers will have their weights packed, which are kept then.

    Returns:
        The two parts, or why there is nothing to keep.
    """
    if (quantising := first_quantising(context.graph.nodes)) is not None:
        return Decline("quantised", "{} quantises", quantising, (quantising.name,))
    placeholders = context.graph.find_nodes(op="placeholder")
    sources = [node for node in placeholders if is_module_tensor(node) and not context.is_written(node)]
    stable = stable_nodes(context, sources)
    if packs_linear is not None and write_as_images(context, stable):
        stable = stable_nodes(context, sources)
    if for_cpu and _write_norms_as_terms(context, stable):
        stable = stable_nodes(context, sources)
    copies = _Copies(context, stable)
    moved: frozenset[Node] = frozenset()
    if for_cpu:
        moved = _add_layout_copies(context, copies)
        if packs_linear is not None:
            _add_linear_copies(context, copies, packs_linear)
            _add_video_copies(context, copies)
    kept = kept_nodes(context, stable)
    if not kept:
        return Decline("no-parameter-work", "no node depends on parameters alone")
    fitting = _what_fits(context, copies, kept, sources)
    if isinstance(fitting, Decline):
        return fitting
    kept, stable, left_out = fitting
    prologue, read = prologue_of(context, kept, placeholders)
    positions = tuple(map(placeholders.index, read))
    _replace_by_inputs(context, kept, stable, placeholders[-1], moved)
    examples = tuple(metadata_of(node) for node in kept)
    names = tuple(node.name for node in read)
    inputs = _drop_unread(context, placeholders)
    keys = keys_of(prologue.graph)
    return ParameterWork(context.module, inputs, prologue, positions, examples, keys, names, left_out)


def _what_fits(
    context: GraphContext, copies: _Copies, kept: list[Node], sources: Sequence[Node]
) -> tuple[list[Node], dict[Node, None], tuple[Decline, ...]] | Decline:
    """What is kept in no more memory than the parameters take, the stable nodes, and what is left out.

    Left out is first what takes the most beyond the parameters that it is made of: a table of biases that is
    spread out for every pair of positions must not keep the weights beside it from being kept.
    """
    stable, excluded, left_out = copies.stable, list[Node](), list[Decline]()
    first, bound = (sum(bytes_of(tensor(node)) for node in group) for group in (kept, sources))
    while (total := sum(bytes_of(tensor(node)) for node in kept)) > bound:
        made_of = sources_of(stable)
        growth = {
            node: bytes_of(tensor(node)) - sum(bytes_of(tensor(source)) for source in made_of[node])
            for node in kept
        }
        worst = max(kept, key=lambda node: (growth[node], bytes_of(tensor(node))))
        origin = copies.origin(worst)
        told = "keeping {} bytes, more than the {} of the parameters; {} of them are left out"
        details = (total, bound, bytes_of(tensor(worst)))
        left_out.append(Decline("cached-memory", told, origin, details))
        excluded.append(origin)
        copies.undo({origin})
        stable = stable_nodes(context, sources, visible=excluded)
        copies.undo(copies.operands() - stable.keys())  # which are not stable either
        kept = kept_nodes(context, stable)
    if kept:
        return kept, stable, tuple(left_out)
    return Decline(
        "cached-memory", "keeping {} bytes, more than the {} of the parameters", None, (first, bound)
    )


def _write_norms_as_terms(context: GraphContext, stable: dict[Node, None]) -> bool:
    """Writes each batch norm with stable statistics as a scale and a shift; whether there was one."""
    norms = [found for node in context.graph.nodes if (found := norm_at(node)) is not None]
    written = False
    for norm in norms:
        parameters = [
            parameter
            for parameter in (norm.running_mean, norm.running_var, norm.gamma, norm.beta)
            if parameter
        ]
        result = norm.nodes[-1]
        if result in stable or not all(parameter in stable for parameter in parameters):
            continue
        values = [tensor_of(operand) for operand in (norm.input, *parameters)]
        if any(value is None or value.dtype not in (torch.float32, torch.float64) for value in values):
            continue
        if len({value.dtype for value in values if value is not None}) > 1 or isinstance(norm.eps, Node):
            continue
        _write_as_terms(context, norm)
        written = True
    return written


def _write_as_terms(context: GraphContext, norm: BatchNorm) -> None:
    result = norm.nodes[-1]
    found = tensor_of(norm.input)
    assert found is not None
    build = Builder(context, norm.nodes[0], norm.nodes[0], rule="kept_weights", replaced=norm.nodes)
    terms = Terms(build, found.dtype)
    terms.normalise(norm)
    assert isinstance(terms.scale, Node)
    assert isinstance(terms.shift, Node)
    shape = [-1, *[1] * (found.ndim - 1 - norm.channel_axis)]
    scaled = build.mul(build.operand(norm.input), build.reshape(terms.scale, shape))
    result.replace_all_uses_with(build.add(scaled, build.reshape(terms.shift, shape)))
    for node in reversed(norm.nodes):
        context.graph.erase_node(node)


def _add_layout_copies(context: GraphContext, copies: _Copies) -> frozenset[Node]:
    """Gives every 2-D convolution whose weight is stable a channels-last copy of it, and one of its bias.

    A bias is copied so that it is kept beside its weight, and may be packed with it. A weight that is in
    neither layout is kept as it is.

    Returns:
        The copies of contiguous weights.
    """
    moved: set[Node] = set()
    stable = copies.stable
    for node in context.graph.nodes:
        if node.target not in CONVOLUTIONS or node in stable:
            continue
        operands = {
            operand: found for operand in node.all_input_nodes if (found := tensor(operand)) is not None
        }
        if not any(operand in stable and found.ndim == 4 for operand, found in operands.items()):
            continue
        for operand, found in operands.items():
            is_bias = found.ndim == 1 and operand.op == "placeholder"
            if operand not in stable or not (is_bias or _has_layout(found)):
                continue
            copied = copies.read(node, operand, None if is_bias else torch.channels_last)
            if not is_bias and found.is_contiguous() and found.stride() != metadata_of(copied).stride():
                moved.add(copied)
    return frozenset(moved)


def _has_layout(weight: torch.Tensor) -> bool:
    """Whether a weight of a 2-D convolution is contiguous or channels-last."""
    return weight.ndim == 4 and (
        weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    )


def _add_linear_copies(context: GraphContext, copies: _Copies, packs: PacksLinear) -> None:
    """Gives the linear layers whose weights will be packed copies of them, so that they are kept."""
    stable = copies.stable
    for node in list(context.graph.nodes):
        layer = read_linear(node)
        if not isinstance(layer, Linear) or layer.weight_axis != 0 or node in stable or len(layer.nodes) > 1:
            continue
        given, weight = tensor_of(layer.input), tensor_of(layer.weight)
        operands = [operand for operand in (layer.weight, layer.bias) if operand is not None]
        known = given is not None and weight is not None
        if not known or not all(isinstance(operand, Node) and operand in stable for operand in operands):
            continue
        assert given is not None
        assert weight is not None
        name = layer.weight.name if isinstance(layer.weight, Node) else ""
        filters, channels = map(int, weight.shape)
        rounded = _autocast(context, node) if weight.dtype == torch.float32 else None
        dtype = rounded or weight.dtype
        packed = dtype == torch.float32 and packs(name, channels, filters, given)
        if packed or linears_are_onednns(dtype):
            for operand in operands:
                if isinstance(operand, Node) and operand.op == "placeholder":
                    copies.read(node, operand, None)


def _add_video_copies(context: GraphContext, copies: _Copies) -> None:
    """Gives the 3-D convolutions with stable operands copies of them, so that they are kept and packed."""
    stable = copies.stable
    for node in list(context.graph.nodes):
        if node.target not in CONVOLUTIONS or node in stable:
            continue
        operands = [operand for operand in node.all_input_nodes if operand in stable]
        if not any(metadata_of(operand).ndim == 5 for operand in operands):
            continue
        for operand in operands:
            if operand.op == "placeholder":
                copies.read(node, operand, None)


def _autocast(context: GraphContext, node: Node) -> torch.dtype | None:
    """The type that autocast has a convolution or linear layer on a CPU compute in, if it does."""
    regions = [region for region in context.modes(node).autocast if region[0] == "cpu"]
    _, dtype, enabled, _ = regions[-1] if regions else ("cpu", None, torch.is_autocast_enabled("cpu"), None)
    return (dtype or torch.get_autocast_dtype("cpu")) if enabled else None


class _Copies:
    """Copies of stable tensors, one for all that read it in the same layout and type."""

    def __init__(self, context: GraphContext, stable: dict[Node, None]) -> None:
        """Args:
        context: the graph.
        stable: its stable nodes, to which copies are added.
        """
        self.stable = stable
        self._context = context
        self._made: dict[tuple[Node, torch.memory_format | None, torch.dtype | None], Node] = {}

    def origin(self, node: Node) -> Node:
        """What a copy is made of; any other node is its own."""
        return next((operand for (operand, *_), copied in self._made.items() if copied is node), node)

    def operands(self) -> set[Node]:
        """What there are copies of."""
        return {operand for operand, *_ in self._made}

    def undo(self, operands: Collection[Node]) -> None:
        """Takes out the copies of nodes, which are not to be made at every call."""
        for key in [key for key in self._made if key[0] in operands]:
            copied, operand = self._made.pop(key), key[0]
            copied.replace_all_uses_with(operand)
            while copied is not operand:
                (above,) = copied.all_input_nodes
                self._context.graph.erase_node(copied)
                copied = above

    def read(self, reader: Node, operand: Node, layout: torch.memory_format | None) -> Node:
        """Has a node read a copy in a layout, or (None) in that which the operand has; gives the copy.

        Where autocast would have the node round the operand at every call, the copy is rounded, once.
        """
        found = tensor(operand)
        dtype = (
            _autocast(self._context, reader) if found is not None and found.dtype == torch.float32 else None
        )
        if (operand, layout, dtype) not in self._made:
            rounded = operand if dtype is None else self._call("to", operand, dtype)
            if layout is not None:
                copied = self._call("contiguous", rounded, memory_format=layout)
            else:
                copied = self._call("clone", operand) if dtype is None else rounded
            self._made[operand, layout, dtype] = copied
        reader.replace_input_with(operand, self._made[operand, layout, dtype])
        return self._made[operand, layout, dtype]

    def _call(self, method: str, operand: Node, *given: Any, **options: Any) -> Node:
        with self._context.graph.inserting_after(operand):
            copied = self._context.graph.call_method(method, (operand, *given), options)
        function = getattr(torch.Tensor, method)
        set_value(copied, self._context.evaluator.call(function, (operand, *given), options), like=operand)
        self._context.adopt(copied, self._context.modes(operand))
        self.stable[copied] = None
        return copied


def _replace_by_inputs(
    context: GraphContext,
    kept: list[Node],
    stable: dict[Node, None],
    last_placeholder: Node,
    moved: frozenset[Node],
) -> None:
    """Makes each kept node an input of the graph, and erases what only they needed.

    Those in `moved` are read through a contiguous copy.
    """
    graph = context.graph
    first = last_placeholder.next
    for node in kept:
        with graph.inserting_after(last_placeholder):
            last_placeholder = graph.placeholder(f"kept_{node.name}")
        set_value(last_placeholder, metadata_of(node), like=node)
        mark_as_static_input(last_placeholder)
        node.replace_all_uses_with(last_placeholder)
        if node in moved:
            _read_contiguous(context, last_placeholder, first)
    for node in reversed(list(graph.nodes)):
        if node in stable and node.op != "placeholder" and not node.users:
            graph.erase_node(node)
    graph.lint()
    context.module.recompile()


def _read_contiguous(context: GraphContext, kept: Node, before: Node) -> None:
    """Has whoever reads a kept weight read a contiguous copy of it."""
    readers = list(kept.users)
    build = Builder(context, before, kept, rule="kept_weights")
    copied = build.call("clone", (kept,), {"memory_format": torch.contiguous_format})
    for reader in readers:
        reader.replace_input_with(kept, copied)


def _drop_unread(context: GraphContext, placeholders: list[Node]) -> tuple[int, ...]:
    """Erases tensor inputs that nothing reads, each of which costs every call; returns what is left.

    Sizes stay: they tell what the symbols in the metadata stand for.
    """
    left = []
    for position, placeholder in enumerate(placeholders):
        if placeholder.users or tensor(placeholder) is None or not is_module_tensor(placeholder):
            left.append(position)
        else:
            context.graph.erase_node(placeholder)
    context.module.recompile()
    return tuple(left)
