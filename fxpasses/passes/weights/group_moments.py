"""Means and variances of group norms and instance norms over channels-last images, by a kernel of ours.

    var_mean(view(x, [N, G, C / G, H * W]), [2, 3])    becomes    moments(x, G)

Where a group has fewer channels than a vector has floats, inductor (2.13) reads such an image number by
number: on one core 34 ms for 64 channels of 224 x 224 in 32 groups, where one pass over memory takes 0.1 ms.
What is done with the two is left to inductor, which fuses it with its neighbours.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from fxpasses.graph.layouts import order_of
from fxpasses.graph.locations import location_of, module_of
from fxpasses.graph.metadata import set_value, tensor
from fxpasses.graph.provenance import inherit
from fxpasses.kernels.library import identity
from fxpasses.passes.weights.stride_order import in_order
from fxpasses.report import sidecar
from fxpasses.report.data import Remark
from fxpasses.report.report import Report
from fxpasses.torch_internals.inductor import joint_key, with_joint_pass
from fxpasses.torch_internals.sizes import as_arguments, size_expression, size_hint, sizes_of

NAME = "group_moments"

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_LEAST = 2**13
"""Numbers of an image from which on a call pays."""


def may_matter(graph_module: GraphModule) -> bool:
    """Whether a captured graph may take moments of groups; told by names, so that most graphs are spared."""
    names = (getattr(node.target, "__name__", str(node.target)) for node in graph_module.graph.nodes)
    return any(part in name for name in names for part in ("group_norm", "instance_norm", "var_mean"))


@dataclass
class GroupMoments:
    """The pass of one compilation, on inductor's joint graph.

    Attributes:
        graph_key: what names the graph among all that are compiled.
        packed: whether convolutions read packed weights, so that images behind them are channels-last,
            whatever the graph's metadata say.
    """

    graph_key: str
    packed: bool
    _patches: Mapping[str, Any] = field(default_factory=dict)
    _remarks: list[Remark] | None = None

    def patches(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inductor's settings with this pass among them."""
        self._patches = with_joint_pass(given, self._run, lambda: self._key)
        return dict(self._patches)

    def completed(self, report: Report) -> Report:
        """The report with what this pass did, or with what it did when the artifact was made."""
        name = sidecar.digest(joint_key(self._patches), self.graph_key, str(sorted(self._patches)))
        remarks = sidecar.remarks_of(NAME, name, self._remarks, self._patches)
        return replace(report, remarks=(*report.remarks, *remarks))

    @functools.cached_property
    def _key(self) -> tuple[str, ...]:
        return NAME, sidecar.sources(), identity(), str(self.packed)

    def _run(self, graph: Graph) -> None:
        behind = _behind_convolutions(graph) if self.packed else set()
        self._remarks = self._remarks or []
        for node in list(graph.find_nodes(op="call_function", target=aten.var_mean.correction)):
            found = _groups_of(node)
            if found is None:
                continue
            image, groups = found
            if not (image in behind if self.packed else _is_channels_last(image)):
                continue
            self._write(graph, node, image, groups)

    def _write(self, graph: Graph, node: Node, image: Node, groups: int) -> None:
        value = tensor(image)
        assert value is not None
        with graph.inserting_before(node):
            read = in_order(graph, image) if self.packed else image
            moments = graph.call_function(torch.ops.fxpasses.moments.default, (read, groups))
            inherit(moments, (node,), NAME)
            made = value.new_empty((2, value.shape[0], groups, 1, 1))
            set_value(moments, made)
        for taken in list(node.users):
            wanted = tensor(taken)
            assert wanted is not None
            with graph.inserting_before(taken):
                one = graph.call_function(aten.select.int, (moments, 0, taken.args[1]))
                inherit(one, (taken,), NAME)
                set_value(one, made[0])
                if sizes_of(made[0]) != sizes_of(wanted):
                    one = graph.call_function(aten.reshape.default, (one, as_arguments(graph, wanted.shape)))
                    inherit(one, (taken,), NAME)
            taken.replace_all_uses_with(one)
            graph.erase_node(taken)
        viewed = node.args[0]
        graph.erase_node(node)
        if isinstance(viewed, Node) and viewed is not image and not viewed.users:
            graph.erase_node(viewed)
        message = f"mean and variance of {groups} groups of {image.name} by a kernel of ours"
        where = location_of(moments), module_of(moments)
        assert self._remarks is not None
        self._remarks.append(
            Remark(NAME, "applied", "applied", message, node.name, where[0], "applied", where[1])
        )


def _behind_convolutions(graph: Graph) -> set[Node]:
    """The nodes that depend on a convolution, by whichever kernel."""
    found: set[Node] = set()
    for node in graph.nodes:
        if _convolves(node) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _convolves(node: Node) -> bool:
    return node.op == "call_function" and any(
        part in str(node.target) for part in ("convolution", "fxpasses.sequence")
    )


def _is_channels_last(image: Node) -> bool:
    found = tensor(image)
    return found is not None and order_of(found) == "channels_last"


def _groups_of(node: Node) -> tuple[Node, int] | None:
    """The float32 image on a CPU, and the number of groups of its channels, that `var_mean` is about."""
    read, axes = node.args[0], node.args[1] if len(node.args) > 1 else None
    if node.kwargs.get("correction") != 0 or not isinstance(read, Node):
        return None
    image = read.args[0] if read.target in _VIEWS else read
    found, seen = tensor(image), tensor(read)
    if not isinstance(image, Node) or found is None or seen is None or found.dim() != 4:
        return None
    if not isinstance(axes, (list, tuple)):
        return None
    if (found.dtype, found.device.type) != (torch.float32, "cpu"):
        return None
    if any(user.target is not operator.getitem for user in node.users):
        return None
    if math.prod(map(size_hint, found.shape)) < _LEAST:
        return None
    groups = _leading(seen, {axis % seen.dim() for axis in axes}, found)
    return (image, groups) if groups else None


def _leading(seen: torch.Tensor, reduced: set[int], image: torch.Tensor) -> int:
    """The number of groups, if a view is reduced over all but them and the images; 0 for other reductions."""
    axes = [axis for axis, size in enumerate(seen.shape) if not (type(size) is int and size == 1)]
    kept = [axis for axis in axes if axis not in reduced]
    if axes[: len(kept)] != kept:
        return 0
    count, channels, height, width = map(size_expression, image.shape)
    left = _product([seen.shape[axis] for axis in kept])
    groups = sympy.cancel(left / sympy.sympify(count))
    if not groups.is_Integer or type(channels) is not int or channels % int(groups):
        return 0
    inside = _product([seen.shape[axis] for axis in axes if axis in reduced])
    wanted = sympy.expand(channels // int(groups) * sympy.sympify(height) * sympy.sympify(width))
    return int(groups) if sympy.expand(inside - wanted) == 0 else 0


def _product(sizes: list[int | torch.SymInt]) -> sympy.Expr:
    return sympy.expand(sympy.prod([sympy.sympify(size_expression(size)) for size in sizes]))
