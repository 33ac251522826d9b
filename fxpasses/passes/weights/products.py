"""Linear layers in inductor's graph: matrix products with a transposed weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.fx import Node

from fxpasses.graph.metadata import tensor


class Product(NamedTuple):
    """One of them.

    Attributes:
        node: `aten.addmm` or `aten.mm`.
        image: what is multiplied.
        bias: a vector, or None.
        value: the metadata of `image`.
    """

    node: Node
    image: Node
    bias: Node | None
    value: torch.Tensor


def is_transposition(node: Node) -> bool:
    """Whether a node is a matrix, transposed."""
    if node.target is torch.ops.aten.t.default:
        return True
    return node.target is torch.ops.aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]


def products_with(transposed: Sequence[Node]) -> Iterator[Product]:
    """The products whose second factor is one of some transposed weights."""
    for product in [user for node in transposed for user in node.users]:
        if product.kwargs:
            continue
        if product.target is torch.ops.aten.addmm.default and product.args[2] in transposed:
            bias, image, _ = product.args
            found = tensor(bias)
            fits = found is not None and found.ndim == 1
        else:
            bias, image = None, product.args[0] if product.args else None
            fits = product.target is torch.ops.aten.mm.default and product.args[1] in transposed
        value = tensor(image)
        if fits and isinstance(image, Node) and value is not None:
            yield Product(product, image, bias, value)  # type: ignore[arg-type]  # a node or None
