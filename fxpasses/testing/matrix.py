"""The matrix: which spelling of a pattern a rule finds at which level.

print(fxpasses.testing.matrix(rule, {"operator": (model, inputs), "method": (other, inputs)}))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxpasses.rewrite.registry import AnyRule
from fxpasses.testing.captures import LEVELS, rewrite_at
from fxpasses.testing.expectation import alone


@dataclass(frozen=True)
class Matrix:
    """What a rule did with each spelling at each level.

    Attributes:
        rule: the rule's name.
        cells: by spelling and level: ``"applied"``, or the code of the nearest miss, or ``"-"``.
    """

    rule: str
    cells: Mapping[str, Mapping[str, str]]

    @property
    def complete(self) -> bool:
        """Whether the rule was applied everywhere."""
        return all(cell == "applied" for row in self.cells.values() for cell in row.values())

    def __str__(self) -> str:
        levels = list(dict.fromkeys(level for row in self.cells.values() for level in row))
        rows = [[self.rule, *levels]]
        rows += [[name, *(row.get(level, "") for level in levels)] for name, row in self.cells.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(levels) + 1)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def matrix(
    rule: AnyRule, spellings: Mapping[str, tuple[nn.Module, Sequence[Any]]], levels: Sequence[str] = LEVELS
) -> Matrix:
    """Tries a rule on every spelling at every level.

    Args:
        rule: a rule, registered or not.
        spellings: models by name, each with the arguments of one call.
        levels: the levels, of `LEVELS`.
    """
    cells: dict[str, dict[str, str]] = {}
    for name, (model, inputs) in spellings.items():
        cells[name] = {level: _outcome(rule, level, model, inputs) for level in levels}
    return Matrix(rule.name, cells)


def _outcome(rule: AnyRule, level: str, model: nn.Module, inputs: Sequence[Any]) -> str:
    options = {**alone(rule), "profit": "always", "verify": "numerics"}
    report = rewrite_at(level, model, inputs, options).report
    if report.applied:
        return "applied"
    return report.declined[0].code if report.declined else "-"
