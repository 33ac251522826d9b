"""Parts: what one runtime's profile of a call consists of."""

from __future__ import annotations

from dataclasses import dataclass

OTHERS = ("pooling", "reorder", "elementwise and other")
"""The kinds of parts that compute no layer."""


@dataclass(frozen=True)
class Part:
    """A kernel that a runtime ran.

    Attributes:
        name: the runtime's own.
        seconds: that it took; of a turn the median over its calls.
        layers: the positions of the layers that it computes; None where it is not certain which these are.
        kind: of a part without layers one of `OTHERS`, else empty.
        kernel: which implementation of its operator it is, as the runtime calls it.
    """

    name: str
    seconds: float
    layers: tuple[int, ...] | None = ()
    kind: str = ""
    kernel: str = ""


class ProfileError(ValueError):
    """A profile that does not have what is known of its runtime."""


_POOLING = ("pool", "mean", "reduce")
_REORDERS = ("reorder", "transpose", "convert", "copy")


def other_kind(operator: str) -> str:
    """The kind of an operator that is no layer, by its name."""
    name = operator.lower()
    if any(word in name for word in _POOLING):
        return "pooling"
    return "reorder" if any(word in name for word in _REORDERS) else "elementwise and other"
