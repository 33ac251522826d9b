"""AOTAutograd: the marks that it reads in a graph, and what it guesses of gradients.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
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


def guessed_tangents(*, as_outputs: bool) -> contextlib.AbstractContextManager[Any]:
    """A block in which AOTAutograd expects a result's gradient in the result's strides, or in a format."""
    from torch._functorch import config

    if as_outputs:
        return contextlib.nullcontext()
    return cast(
        "contextlib.AbstractContextManager[Any]", config.patch(guess_tangent_strides_as_outputs=False)
    )
