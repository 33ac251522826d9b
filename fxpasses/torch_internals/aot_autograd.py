"""AOTAutograd: the marks that it reads in a graph, and what it guesses of gradients.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch


def is_module_tensor(placeholder: torch.fx.Node) -> bool:
    """Whether a graph input from Dynamo is a parameter or buffer of a module."""
    return bool(placeholder.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def mark_as_static_input(placeholder: torch.fx.Node) -> None:
    """Makes a graph input that we add look to AOTAutograd like one from Dynamo whose memory stays."""
    placeholder._dynamo_source = None  # where Dynamo keeps it
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def mark_for_recomputation(node: torch.fx.Node) -> None:
    """Tags a node as activation checkpointing would, for AOTAutograd's partitioner."""
    from torch.utils.checkpoint import CheckpointPolicy

    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    # Zero comes before the regions of the user's own checkpoints, which number from one.
    node.meta["ac_graph_id"] = 0


def positions_of_results(output: torch.fx.Node) -> frozenset[int]:
    """Which outputs of a graph from AOTAutograd are results of the function that was traced.

    The others are gradients, new values of inputs, tensors that results are taken from as views afterwards,
    and the like. None are where AOTAutograd does not tell.

    Args:
        output: the graph's output node.
    """
    from torch._functorch._aot_autograd.descriptors import PlainAOTOutput
    from torch.utils._pytree import tree_leaves

    described = output.meta.get("desc") or ()
    if len(described) != len(tree_leaves(output.args[0])):
        return frozenset()
    return frozenset(at for at, each in enumerate(described) if isinstance(each, PlainAOTOutput))


def guessed_tangents(*, as_outputs: bool) -> contextlib.AbstractContextManager[Any]:
    """A block in which AOTAutograd expects a result's gradient in the result's strides, or in a format."""
    from torch._functorch import config

    if as_outputs:
        return contextlib.nullcontext()
    return cast(
        "contextlib.AbstractContextManager[Any]", config.patch(guess_tangent_strides_as_outputs=False)
    )


def see_joint_graph(
    graph_module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    see: Callable[[torch.fx.GraphModule], None],
) -> None:
    """Traces a graph from Dynamo as inductor would have it, and shows what its joint passes would get.

    Args:
        graph_module: the graph; it is not changed.
        inputs: one (fake) value per placeholder.
        see: is given the graph of forward and backward, or of the forward where no gradient is wanted.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import default_partition
    from torch._inductor import lowering  # noqa: F401  # the decompositions look it up and do not import it
    from torch._inductor.decomposition import select_decomp_table

    def whole(seen: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        see(seen)
        return seen.forward

    def half(seen: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        return seen.forward

    def partition(seen: torch.fx.GraphModule, given: object, **sizes: Any) -> Any:
        see(seen)
        return default_partition(seen, given, **sizes)

    table = select_decomp_table()
    traced = aot_autograd(
        fw_compiler=half,
        bw_compiler=half,
        inference_compiler=whole,
        partition_fn=partition,
        decompositions=table,
    )
    traced(graph_module, inputs)


def backward_node(result: object) -> Any | None:
    """The autograd node that runs a compiled graph's backward; None where its results take no gradient.

    Args:
        result: what the compiled graph returned.
    """
    from torch.utils._pytree import tree_leaves

    pending = [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    for _ in range(_DEEPEST):
        found = [node for node in pending if node is not None]
        compiled = next((node for node in found if node.name() == "CompiledFunctionBackward"), None)
        if compiled is not None:
            return compiled
        # Results that are views are taken again outside of the compiled graph.
        pending = [before for node in found for before, _ in node.next_functions]
    return None


_DEEPEST = 4
"""How many views lie between a result and the compiled graph at most."""
