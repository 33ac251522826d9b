"""Convolutions of one dimension, written as those of images of height 1, so that a plan sees them.

    conv1d(x, w)    becomes    squeeze(conv2d(unsqueeze(x), unsqueeze(w)))

So does the gradient of one. A view without the height keeps the label of its image in a frame of three
dimensions, through what is elementwise and through transpositions: [N, T, C] is channels-last. What ATen
would copy into contiguous memory first is copied in the graph, where a plan may have it lie otherwise.
Without a plan that pays the graph is put back as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from fxpasses.devices.profile import CONVOLUTION_FORWARD
from fxpasses.devices.sizes import ConvolutionSizes
from fxpasses.graph.context import GraphContext
from fxpasses.graph.frames import is_one
from fxpasses.graph.metadata import tensor
from fxpasses.graph.operands import tensor_of
from fxpasses.graph.views import Convolution, read_producer
from fxpasses.passes.layout.convolutions import ConvolutionReading
from fxpasses.rewrite.builder import Builder
from fxpasses.torch_internals.sizes import size_hint

aten = torch.ops.aten

_HEIGHT = 2
"""Where the dimension of size 1 is."""

_IS_LINE = "fxpasses_is_line"
"""The key in a node's metadata that says that it was of one dimension."""

_BEFORE = {aten.convolution.default: (0, 1), aten.convolution_backward.default: (0, 1, 2)}
"""Where operators of one dimension have what becomes an image."""


def is_line(node: Node) -> bool:
    """Whether a convolution of images was one of one dimension."""
    return bool(node.meta.get(_IS_LINE))


def read_line(node: Node) -> ConvolutionReading | None:
    """Reads a batched convolution of one dimension, at any capture level, as one of images of height 1."""
    view = read_producer(node)
    if not isinstance(view, Convolution) or not isinstance(view.input, Node):
        return None
    given, weight, result = tensor(view.input), tensor_of(view.weight), tensor(node)
    if given is None or weight is None or result is None or (given.dim(), weight.dim()) != (3, 3):
        return None
    stride, dilation, padding, output_padding = map(
        _number, (view.stride, view.dilation, view.padding, view.output_padding)
    )
    if view.padding == "same":
        padding = dilation * (weight.shape[-1] - 1) // 2
    if view.padding == "valid":
        padding = 0
    arguments = ([1, stride], [0, padding], [1, dilation], bool(view.transposed), [0, output_padding or 0])
    images = (_sizes_of_image(found) for found in (given, weight, result))
    sizes = ConvolutionSizes(next(images), next(images), next(images), (*arguments, view.groups))
    return ConvolutionReading(sizes, given.dtype, (CONVOLUTION_FORWARD,), (view.input,))


def _number(given: Any) -> Any:
    return given[0] if isinstance(given, (list, tuple)) else given


def _sizes_of_image(given: torch.Tensor) -> tuple[Any, ...]:
    count, channels, width = given.shape
    return count, channels, 1, width


class _Erased(NamedTuple):
    """A node that was erased: what it was made of."""

    target: Any
    args: tuple[Any, ...]
    name: str
    meta: dict[str, Any]


class _Written(NamedTuple):
    """What stands for an operator that was erased.

    Attributes:
        erased: the operator, then the elements of its result that were read, by which of them they are.
        results: what stands for the operator, or for each of those elements.
    """

    erased: tuple[_Erased, ...]
    results: tuple[Node, ...]


class Lines:
    """The convolutions of one dimension of a joint graph, which are written as those of images."""

    def __init__(self, context: GraphContext) -> None:
        """Args:
        context: a graph for inductor, which is changed.
        """
        self._context = context
        self._images: dict[Node, Node] = {}
        self._inserted: list[Node] = []
        self._written: list[_Written] = []
        for node in list(context.graph.nodes):
            if _is_of_one_dimension(node):
                self._write(node)

    def __bool__(self) -> bool:
        return bool(self._written)

    def undo(self) -> None:
        """Puts the graph back as it was."""
        for erased, results in reversed(self._written):
            _restore(self._context.graph, erased, results)
        for node in reversed(self._inserted):
            self._context.graph.erase_node(node)

    def _write(self, node: Node) -> None:
        arguments: tuple[Any, ...] = node.args
        build = Builder(self._context, node, node, rule="layout", replaced=(node,))
        known = dict(self._images)
        positions = _BEFORE[node.target]  # type: ignore[index]  # it is one of them
        images = [self._image(build, arguments[at]) for at in positions]
        bias, stride, padding, dilation, transposed, output_padding, *rest = arguments[len(positions) :]
        lists = zip((1, 0, 1, 0), (stride, padding, dilation, output_padding), strict=True)
        stride, padding, dilation, output_padding = ([height, *given] for height, given in lists)
        given = (*images, bias, stride, padding, dilation, transposed, output_padding, *rest)
        written = build.call(node.target, given)
        written.meta[_IS_LINE] = True
        replaced = [node] if len(positions) == 2 else list(node.users)
        results = tuple(self._flat(build, one, written) for one in replaced)
        if not all(map(_agree, replaced, results)):
            for one in reversed(build.inserted):
                self._context.graph.erase_node(one)
            self._images = known
            return
        self._inserted += build.inserted
        erased = tuple(dict.fromkeys((node, *replaced)))
        known_of = tuple(_Erased(one.target, one.args, one.name, dict(one.meta)) for one in erased)
        self._written.append(_Written(known_of, results))
        for one, result in zip(replaced, results, strict=True):
            result.meta["val"] = one.meta["val"]  # with the strides of dimensions of size 1
            one.replace_all_uses_with(result)
        for one in reversed(erased):
            self._context.graph.erase_node(one)

    def _image(self, build: Builder, given: Any) -> Node:
        assert isinstance(given, Node)
        if given not in self._images:
            source = given
            if not _is_contiguous(tensor(given)):
                source = build.call(aten.clone.default, (given,), {"memory_format": torch.contiguous_format})
            self._images[given] = build.call(aten.unsqueeze.default, (source, _HEIGHT))
        return self._images[given]

    def _flat(self, build: Builder, replaced: Node, written: Node) -> Node:
        """What stands for the result of an operator, or for an element of it."""
        if replaced.target is operator.getitem:
            written = build.call(operator.getitem, (written, replaced.args[1]))
        found = tensor(written)
        is_image = found is not None and found.dim() == 4
        if not is_image:
            return written
        flat = build.call(aten.squeeze.dim, (written, _HEIGHT))
        if replaced.target is not operator.getitem:
            return flat
        # A gradient's strides of dimensions of size 1 are those of a view, whatever they were.
        for dim in [dim for dim in (2, 1) if is_one(flat.meta["val"].shape[dim])]:
            flat = build.call(aten.squeeze.dim, (flat, dim))
            flat = build.call(aten.unsqueeze.default, (flat, dim))
        return flat


def _is_of_one_dimension(node: Node) -> bool:
    positions = _BEFORE.get(node.target) if not node.kwargs else None  # type: ignore[call-overload]
    if positions is None or (len(positions) == 3 and not _is_read_by_elements(node)):
        return False
    operands = [tensor(node.args[at]) for at in positions]
    return all(
        found is not None
        and found.dim() == 3
        and found.layout is torch.strided
        and found.device.type == "cpu"
        for found in operands
    )


def _is_read_by_elements(node: Node) -> bool:
    return bool(node.users) and all(user.target is operator.getitem for user in node.users)


def _is_contiguous(found: torch.Tensor | None) -> bool:
    """Whether a tensor is contiguous, at the hints of its sizes, dimensions of size 1 included."""
    assert found is not None
    expected, strides = 1, []
    for size in reversed(found.shape):
        strides.append(expected)
        expected *= max(size_hint(size), 1)
    return list(map(size_hint, found.stride())) == strides[::-1]


def _agree(one: Node, other: Node) -> bool:
    """Whether two values have the same strides, at the hints of their sizes, but for dimensions of size 1."""
    first, second = tensor(one), tensor(other)
    if first is None or second is None:
        return first is second
    strides = ([size_hint(stride) for stride in found.stride()] for found in (first, second))
    sizes = map(size_hint, first.shape)
    return all(size == 1 or a == b for size, a, b in zip(sizes, *strides, strict=True))


def _restore(graph: Graph, erased: Sequence[_Erased], results: Sequence[Node]) -> None:
    """Writes an operator that was erased, and the elements of its result that were read."""
    made: list[Node] = []
    with graph.inserting_before(results[0]):
        for one in erased:
            args = one.args if not made else (made[0], *one.args[1:])
            node = graph.call_function(one.target, args)
            node.name = one.name
            node.meta.update(one.meta)
            made.append(node)
    for result, node in zip(results, made[-len(results) :], strict=True):
        result.replace_all_uses_with(node)
