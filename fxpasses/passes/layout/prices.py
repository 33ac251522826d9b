"""Prices: what a tensor that lies in one layout costs whoever wants it in the other.

made C ── copy ── convolution      a kernel that is called needs memory: a copy, shared by all readers
made C ── add                      a loop that inductor writes reads it as it lies, at the price of a copy
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxpasses.devices.sizes import Seconds
from fxpasses.graph.frames import Frame
from fxpasses.graph.layouts import C, L, Label, order_of
from fxpasses.graph.metadata import tensor
from fxpasses.passes.layout.convolutions import is_weight
from fxpasses.passes.layout.costs import Cost, CostModel
from fxpasses.passes.layout.network import Tensor, fitting


def price_reading(tensors: Sequence[Tensor], frame: Frame, costs: CostModel) -> dict[Label, Cost]:
    """What reading tensors as they lie costs under each label: copies of those that lie otherwise."""
    seconds: dict[Label, Seconds] = {C: 0.0, L: 0.0}
    factor = 1.0
    for held in tensors:
        found = tensor(held.node)
        assert found is not None
        order, factor = order_of(found, fitting(frame, found)), max(factor, held.factor)
        if order == C:
            seconds[L] += costs.copy(found, L)
        elif order == L:
            seconds[C] += costs.copy(found, C)
    return {label: Cost(seconds[label], "read as it lies", factor) for label in (C, L)}


def price_copies(held: Tensor, given: torch.Tensor, costs: CostModel) -> None:
    """Gives a tensor the costs of its copies, or new ones."""
    of_weight = is_weight(held.node)
    held.to_contiguous, held.to_channels_last = (costs.copy(given, to, of_weight=of_weight) for to in (C, L))
    held.factor = costs.copy_factor(given.dtype)
