"""Quantised graphs: those of int8 inference and of quantisation-aware training, which are left as they are.

What compiles them later matches `dequantize -> conv2d -> quantize` to the letter, and a scale that is folded
into a weight behind its quantisation is one that no kernel of small integers can carry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch.fx import Node

from fxpasses.graph.names import base_name

_NAMES = re.compile(r"quantize|obs_fq_helper|int[48]pack|_int_mm|^quantized\.")


def quantises(node: Node) -> bool:
    """Whether an operator converts to or from quantised values, or computes with them.

    Quantisation-aware training's `fake_quantize_per_channel_affine` is one, as are `dequantize_per_tensor`
    and `_int_mm`.
    """
    return node.op.startswith("call") and bool(_NAMES.search(base_name(node)))


def first_quantising(nodes: Iterable[Node]) -> Node | None:
    """The first of them that does."""
    return next(filter(quantises, nodes), None)
