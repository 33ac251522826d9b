"""Ranges of sizes: for which batches, lengths or widths a rewrite pays."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxpasses.torch_internals.sizes import known_size, size_expression


@dataclass(frozen=True)
class SizeRange:
    """A size of the graph, and the values for which a rewrite pays.

    Attributes:
        name: what it is, in words: ``"batch"``.
        size: its value here, which may be a symbol.
        least: the smallest value for which it pays.
        most: the largest; None where there is none.
        guarded: whether to guard the decision where the size is a symbol: a call with a size for which it is
            the other way round has torch.compile make another version. Otherwise the size at hand decides
            for all calls.
    """

    name: str
    size: int | torch.SymInt
    least: int = 0
    most: int | None = None
    guarded: bool = False

    @property
    def seen(self) -> int | None:
        """The size at hand; None where it is only known when the graph runs."""
        return known_size(self.size)

    @property
    def symbol(self) -> str:
        """The size as an expression of the graph's symbols; empty where it is a number."""
        return "" if isinstance(self.size, int) else str(size_expression(self.size))

    def holds(self) -> bool:
        """Whether the size is in the range; guarded, where that was asked for."""
        if self.seen is None:
            return False
        size = self.size if self.guarded else self.seen
        return bool(size >= self.least) and (self.most is None or bool(size <= self.most))

    def __str__(self) -> str:
        return range_in_words(self.name, self.least, self.most)


def range_in_words(name: str, least: int, most: int | None) -> str:
    """A range as a condition on what it is of: ``"4 <= batch <= 16"``."""
    if most is None:
        return f"{name} >= {least}" if least else f"any {name}"
    return f"{least} <= {name} <= {most}" if least else f"{name} <= {most}"
