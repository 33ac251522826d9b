"""The network: a graph as an optimisation problem, with costs as expressions of its size symbols.

    variable   what an operator works in: C or L      costs own[C] or own[L]
       │ makes
    tensor     has the label of its producer          costs one copy if any reader has the other label
       │ is read by
    variable, variable, FIXED_C, ...

Every operator has a role (`Role`), every labelled operator a variable, every tensor its readers. Variables
that must agree are unified: they are the sets of a union-find, and the two that are given, `FIXED_C` and
`FIXED_L`, stand for theirs. At given sizes the network is a `Problem`, in numbers.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fxpasses.devices.sizes import Seconds
from fxpasses.graph.frames import Frame
from fxpasses.graph.layouts import C, L, Label
from fxpasses.passes.layout.boundary import Boundary
from fxpasses.passes.layout.costs import Cost, seconds_at
from fxpasses.passes.layout.measurable import Measurable
from fxpasses.passes.layout.problem import FIXED_C, FIXED_L, Problem, Value


class Role(enum.Enum):
    """How an operator is treated.

    LABELLED   reads all its labelled operands in the label of its variable, and makes its results in it
    EXACT      reads its operands with the strides of the traced graph, and makes what it made there
    FREE       does not care: nothing that it reads or makes has a label
    """

    LABELLED = "labelled"
    EXACT = "exact"
    FREE = "free"


class UnplannableError(Exception):
    """Why a graph gets no plan."""


@dataclass
class Tensor:
    """A tensor that has a label.

    Attributes:
        node: what makes it.
        producer: the variable whose label it has.
        original: its label in the traced graph.
        users: who reads it, and the variable in whose label.
        to_contiguous, to_channels_last: the cost of a copy, in seconds.
        factor: how far the truth may be from those, as in `Cost`.
    """

    node: Node
    producer: int
    original: Label
    users: list[tuple[Node, int]] = field(default_factory=list)
    to_contiguous: Seconds = 0.0
    to_channels_last: Seconds = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class Priced:
    """An operator with costs of its own.

    Attributes:
        price: asks the cost model for them.
        measurable: what a device profile can say of them.
    """

    price: Callable[[], Mapping[Label, Cost]]
    measurable: Callable[[], Sequence[Measurable]]


@dataclass
class Network:
    """A graph as an optimisation problem; see the module's text.

    Attributes:
        roles: of every node that computes.
        variables: of every labelled operator.
        frames: what each dimension of a labelled tensor, and of what is made of one, stands for.
        anew: copies that the graph makes itself, and that may be made in either layout.
        flexible: operators whose generated code gives either label, whatever their metadata say.
        aside: operators and operands that they read in whatever layout these have.
        tensors: the labelled tensors, by node.
        convolutions: of every convolution, its cost and implementation under each label.
        priced: the operators with costs of their own.
        unsafe: what is kept contiguous because its channels-last kernel is wrong, and how that is.
        unknown: operators that the taxonomy does not know and that read a labelled tensor.
        boundary: what the graph takes and gives.
        free: the results that may have another label than in the traced graph.
        generates: as in `CostModel`.
    """

    roles: dict[Node, Role] = field(default_factory=dict)
    variables: dict[Node, int] = field(default_factory=dict)
    frames: dict[Node, Frame] = field(default_factory=dict)
    anew: set[Node] = field(default_factory=set)
    flexible: set[Node] = field(default_factory=set)
    aside: set[tuple[Node, Node]] = field(default_factory=set)
    tensors: dict[Node, Tensor] = field(default_factory=dict)
    convolutions: dict[Node, Mapping[Label, Cost]] = field(default_factory=dict)
    priced: dict[Node, Priced] = field(default_factory=dict)
    unsafe: dict[Node, str] = field(default_factory=dict)
    unknown: list[Node] = field(default_factory=list)
    boundary: Boundary = field(default_factory=lambda: Boundary())
    free: set[Node] = field(default_factory=set)
    generates: bool = False
    _own: list[tuple[Seconds, Seconds]] = field(default_factory=lambda: [(0.0, 0.0), (0.0, 0.0)])
    _factors: dict[int, tuple[float, float]] = field(default_factory=dict)
    _parent: list[int] = field(default_factory=lambda: [FIXED_C, FIXED_L])

    def price(self, node: Node, priced: Priced) -> None:
        """Gives a labelled operator its costs, or new ones."""
        costs = priced.price()
        variable = self.variables[node]
        self.priced[node] = priced
        self._own[variable] = costs[C].seconds, costs[L].seconds
        self._factors[variable] = costs[C].factor, costs[L].factor
        if node in self.convolutions:
            self.convolutions[node] = costs

    @property
    def size(self) -> int:
        """The number of variables, with those that are given."""
        return len(self._parent)

    def variable(self, own: tuple[Seconds, Seconds] = (0.0, 0.0)) -> int:
        """A new variable, with its cost under C and under L."""
        self._own.append(own)
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def find(self, variable: int) -> int:
        """The variable that stands for this one."""
        while self._parent[variable] != variable:
            self._parent[variable] = self._parent[self._parent[variable]]
            variable = self._parent[variable]
        return variable

    def own(self, variable: int) -> tuple[Seconds, Seconds]:
        """What the operator of a variable costs under C and under L, copies apart."""
        return self._own[variable]

    def factors(self, variable: int) -> tuple[float, float]:
        """How far the truth may be from what the operator of a variable costs, as in `Cost`."""
        return self._factors.get(variable, (1.0, 1.0))

    def unify(self, first: int, second: int) -> None:
        """Gives two variables one label.

        Raises:
            UnplannableError: one label is given as C and the other as L.
        """
        first, second = sorted((self.find(first), self.find(second)))
        if (first, second) == (FIXED_C, FIXED_L):
            raise UnplannableError("tensors that share a storage have different layouts")
        self._parent[second] = first

    def problem(self, sizes: Mapping[Any, int], *, favoured: Label | None = None) -> Problem:
        """The problem at given values of the size symbols.

        Args:
            sizes: those values.
            favoured: the label that is to cost the least that it may, and the other the most; None for what
                each is expected to cost.
        """
        problem = Problem([0.0] * len(self._own), [0.0] * len(self._own))
        for variable, (contiguous, channels_last) in enumerate(self._own):
            more = [1.0, 1.0]
            if favoured is not None:
                of_c, of_l = self.factors(variable)
                more = [1 / of_c, of_l] if favoured == C else [of_c, 1 / of_l]
            problem.contiguous[self.find(variable)] += more[0] * seconds_at(contiguous, sizes)
            problem.channels_last[self.find(variable)] += more[1] * seconds_at(channels_last, sizes)
        for held in self.tensors.values():
            producer = self.find(held.producer)
            users = tuple(sorted({self.find(variable) for _, variable in held.users} - {producer}))
            if users:
                costs = (seconds_at(cost, sizes) for cost in (held.to_contiguous, held.to_channels_last))
                problem.values.append(Value(producer, users, *costs))
        return problem

    def uniform(self, label: Label) -> list[Label]:
        """One label for all that convolutions are connected with; the rest stays as it was traced."""
        connected = self.connected_with(self.convolutions)
        labels = [
            label if self.find(variable) in connected else traced
            for variable, traced in enumerate(self.traced_labels())
        ]
        labels[FIXED_C], labels[FIXED_L] = C, L
        return labels

    def connected_with(self, nodes: Iterable[Node]) -> set[int]:
        """The free variables that share tensors with these operators, and with each other, in a chain."""
        neighbours: dict[int, set[int]] = defaultdict(set)
        for held in self.tensors.values():
            producer = self.find(held.producer)
            for user in {self.find(variable) for _, variable in held.users}:
                if not {producer, user} & {FIXED_C, FIXED_L}:
                    neighbours[producer].add(user)
                    neighbours[user].add(producer)
        found: set[int] = set()
        pending = [self.find(self.variables[node]) for node in nodes if node in self.variables]
        while pending:
            variable = pending.pop()
            if variable not in found and variable not in (FIXED_C, FIXED_L):
                found.add(variable)
                pending += neighbours[variable]
        return found

    def traced_labels(self) -> list[Label]:
        """The labels that a graph has as it was traced: those of what its operators make, else read."""
        labels: list[Label] = [C] * self.size
        for held in self.tensors.values():
            for _, variable in held.users:
                labels[self.find(variable)] = held.original
        for held in self.tensors.values():
            labels[self.find(held.producer)] = held.original
        labels[FIXED_C], labels[FIXED_L] = C, L
        return [labels[self.find(variable)] for variable in range(len(labels))]


def fitting(frame: Frame | None, given: torch.Tensor) -> Frame | None:
    """The frame, unless the tensor is of another rank."""
    return frame if frame is not None and len(frame) == given.dim() else None
