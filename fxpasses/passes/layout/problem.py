"""The optimisation problem: two labels, submodular costs, and copies that are shared.

    E(x) = sum over variables i   cost_i[x_i]
         + sum over values v      to_L(v) · [x_producer = C and some user has x_user = L]
                                + to_C(v) · [x_producer = L and some user has x_user = C]

A variable is the label that one operator works in; a value is a tensor, made by one variable and read by
others. A value that is needed in both labels is copied once, however many users want the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fxpasses.graph.layouts import C, L, Label

FIXED_C = 0
FIXED_L = 1
"""The two variables whose labels are given; what is forced reads or makes its values as one of these."""


@dataclass(frozen=True)
class Value:
    """A tensor that may be copied from one layout to the other.

    Attributes:
        producer: the variable whose label it has.
        users: the variables that read it, each once.
        to_contiguous, to_channels_last: the cost of a copy, in seconds.
    """

    producer: int
    users: tuple[int, ...]
    to_contiguous: float
    to_channels_last: float


@dataclass
class Problem:
    """Variables and values; the first two variables are `FIXED_C` and `FIXED_L`.

    Attributes:
        contiguous: for each variable, the cost of label C, in seconds.
        channels_last: the same of label L.
        values: the tensors.
    """

    contiguous: list[float] = field(default_factory=lambda: [0.0, 0.0])
    channels_last: list[float] = field(default_factory=lambda: [0.0, 0.0])
    values: list[Value] = field(default_factory=list)

    @property
    def size(self) -> int:
        """The number of variables."""
        return len(self.contiguous)

    def energy(self, labels: Sequence[Label]) -> float:
        """E of a labelling, in seconds."""
        own = sum(
            first if label == C else last
            for label, first, last in zip(labels, self.contiguous, self.channels_last, strict=True)
        )
        return own + sum(copy_seconds(value, labels) for value in self.values)

    def uniform(self, label: Label) -> list[Label]:
        """Every variable at one label, but for those that are given."""
        labels = [label] * self.size
        labels[FIXED_C], labels[FIXED_L] = C, L
        return labels


def copy_seconds(value: Value, labels: Sequence[Label]) -> float:
    """What the copy of a value costs under a labelling; 0 where all agree."""
    label = labels[value.producer]
    if all(labels[user] == label for user in value.users):
        return 0.0
    return value.to_channels_last if label == C else value.to_contiguous
