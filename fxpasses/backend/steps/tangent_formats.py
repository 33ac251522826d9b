"""Gradients of results whose elements overlap in memory, as those of `unfold` do.

AOTAutograd (2.11 to 2.15) copies such a gradient into the same strides, in which elements overwrite others.
Where strides are symbols, it only asks for a format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fxpasses.backend.compilation import Step
from fxpasses.graph.metadata import tensor
from fxpasses.graph.strides import memory_order
from fxpasses.torch_internals.aot_autograd import guessed_tangents


class TangentFormats(Step):
    """Where elements of a result that takes a gradient may overlap."""

    def applies(self) -> bool:
        (output,) = self.compilation.graph_module.graph.find_nodes(op="output")
        results = [found for found in map(tensor, output.all_input_nodes) if found is not None]
        return any(
            all(type(stride) is int for stride in result.stride()) and memory_order(result) is None
            for result in results
            if result.requires_grad
        )

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with guessed_tangents(as_outputs=False):
            yield
