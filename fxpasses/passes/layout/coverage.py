"""Coverage: what the plan does with every operator of torch, as a page.

    python -m fxpasses.passes.layout.coverage > fxpasses/passes/layout/OPERATORS.md

The page is that of the tables `labels` and `forced`; a test holds it to them, and them to what torch has.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from fxpasses.passes.layout.forced import FAMILIES
from fxpasses.passes.layout.labels import ELEMENTWISE, OPERATORS, Kind

_WIDTH = 116

_HEAD = """\
# What the layout plan does with each operator

Written by `python -m fxpasses.passes.layout.coverage`; do not edit. Names are those of ATen and of
`torch.nn.functional`, without overloads and trailing underscores; some are regular expressions of names.
What an operator is given may decide: a `dropout` that drops nothing, a `copy` that gives a new tensor and
an index of slices and numbers keep a layout; `max` and `min` of two tensors are elementwise; a circular
`pad`, and a `matmul` whose second operand has no more dimensions than the first, read any strides.
"""


def page() -> str:
    """The page, in Markdown."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield from _HEAD.rstrip().splitlines()
    for kind in Kind:
        yield from ("", f"## {kind.name.capitalize()}: {kind.value}")
        if kind is not Kind.FORCING:
            names = sorted(name for name, row in OPERATORS.items() if row is kind)
            yield from _listed([*names, *([ELEMENTWISE] if kind is Kind.AGNOSTIC else [])])
            continue
        for family in FAMILIES:
            yield from ("", f"### {family.reason[0].upper()}{family.reason[1:]}")
            yield from _listed(family.names.split())


def _listed(names: Sequence[str]) -> list[str]:
    text = " ".join(f"`{name}`" for name in names)
    return ["", *textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)]


if __name__ == "__main__":
    print(page(), end="")
