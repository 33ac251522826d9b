"""The boundary of a graph: what it takes and gives, and which results may have other strides than eager's.

    x ── conv2d ──┬── relu ──────────── result      in memory of its own: free
                  └── add ──┬────────── result      in memory that another result views:
                            └── view ── result      both as in eager

With ``io="any"`` a plan lays a free result out as it likes. It is a tensor of 4 or 5 dimensions that is given
once, shares its memory with no input and no other result, is no new value of an input, and no gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch.fx import Graph, Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.layouts import C, L, order_of
from fxpasses.graph.metadata import tensor
from fxpasses.graph.modes import Modes
from fxpasses.graph.names import base_name
from fxpasses.graph.storage import is_view
from fxpasses.torch_internals.aot_autograd import is_module_tensor, positions_of_results
from fxpasses.torch_internals.pytree import tree_leaves


@dataclass(frozen=True)
class Boundary:
    """What a graph takes and gives.

    Attributes:
        inputs: its inputs, other than parameters and gradients.
        results: what a caller gets.
        free: the results that may have other strides than in the traced graph.
    """

    inputs: tuple[Node, ...] = ()
    results: tuple[Node, ...] = ()
    free: frozenset[Node] = frozenset()


def boundary_of(
    context: GraphContext,
    parameters: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    *,
    frees: bool = False,
) -> Boundary:
    """The boundary of a graph; a nested one has none.

    Args:
        context: the graph, as traced.
        parameters: the names of inputs that are parameters or buffers, where the graph does not tell.
        names: what these inputs are called in `parameters`, where that is not what the graph calls them.
        frees: whether results may be free.
    """
    if context.path:
        return Boundary()
    inputs = tuple(
        node
        for node in context.graph.find_nodes(op="placeholder")
        if not node.name.startswith("tangents")
        and not is_module_tensor(node)
        and node.name not in context.parameters
        and (names or {}).get(node.name, node.name) not in parameters
    )
    given = [leaf for leaf in _given(context.graph) if isinstance(leaf, Node)]
    results = [leaf for leaf in _given(context.graph, context.results) if isinstance(leaf, Node)]
    results = list(dict.fromkeys(results))
    if not frees:
        return Boundary(inputs, tuple(results))
    gradients = _after_backward(context.graph) if context.results is None else frozenset()
    free = (
        node
        for node in results
        if node not in gradients and _is_image(node) and _owns_memory(context, node, given)
    )
    return Boundary(inputs, tuple(results), frozenset(free))


def joint_context(graph: Graph) -> GraphContext:
    """The context of a graph inside inductor, where AOTAutograd says which outputs are results."""
    assert graph.owning_module is not None
    results = positions_of_results(graph.output_node())
    return GraphContext(graph.owning_module, Modes(grad=False), executor="fused", results=results)


def free_results(graph: Graph) -> frozenset[Node]:
    """The free results of a graph inside inductor."""
    return boundary_of(joint_context(graph), frees=True).free


def free_positions(graph: Graph, free: Collection[Node]) -> list[int]:
    """Where free results are among what the graph gives."""
    return [at for at, leaf in enumerate(_given(graph)) if leaf in free]


def _given(graph: Graph, positions: Collection[int] | None = None) -> list[object]:
    """What a graph gives, at these positions or at all."""
    leaves: list[object] = tree_leaves(graph.output_node().args[0])
    return [leaf for at, leaf in enumerate(leaves) if positions is None or at in positions]


def _is_image(node: Node) -> bool:
    found = tensor(node)
    return found is not None and found.dim() in (4, 5) and order_of(found) in (C, L)


def _owns_memory(context: GraphContext, node: Node, given: Collection[Node]) -> bool:
    """Whether nobody but the result's caller sees its memory: as an input, or as another of those `given`."""
    if node.op in ("placeholder", "get_attr") or Counter(given)[node] != 1:
        return False
    if context.executor == "fused" and is_view(node):
        return False  # autograd, or whoever takes the view again, may go by the strides of what is viewed
    inputs = [
        *context.graph.find_nodes(op="placeholder"),
        *(other for other in context.graph.find_nodes(op="get_attr") if tensor(other) is not None),
    ]
    return not any(context.may_alias(node, other) for other in (*inputs, *given) if other is not node)


def _after_backward(graph: Graph) -> frozenset[Node]:
    """Everything that depends on an operator of a backward pass: gradients are among it."""
    found: set[Node] = set()
    for node in graph.nodes:
        is_backward = node.op.startswith("call") and (
            base_name(node).endswith("backward") or base_name(node) == "grad"
        )
        if is_backward or (node.op != "output" and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return frozenset(found)
