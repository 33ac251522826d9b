"""Applications: what one rewrite replaced and what it wrote instead, as two graphs that run on their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from fxpasses.graph.modes import Modes


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to make up: everything but its values.

    Attributes:
        shape, stride: in elements; symbolic sizes by the value that they had when traced.
        dtype: its dtype.
        device: where it lives.
        requires_grad: whether a gradient may flow to it.
        positive: whether its values must be above zero, as a variance's are.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cpu"
    requires_grad: bool = False
    positive: bool = False


@dataclass(frozen=True)
class Application:
    """One rewrite, taken out of its graph.

    Attributes:
        rule: the rule's name.
        node: the name of the node whose value was replaced.
        location: the user's source line, or empty.
        before, after: the replaced and the replacing operators; both take `inputs`, in order.
        inputs: name and `TensorSpec` (or a nest of them, or a number) of each input.
        modes: the grad mode and autocast regions that they stood in.
    """

    rule: str
    node: str
    location: str
    before: GraphModule
    after: GraphModule
    inputs: tuple[tuple[str, Any], ...]
    modes: Modes
