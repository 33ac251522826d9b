"""Kept weights: results of parameter work, used again as long as every parameter is what it was.

At every call each parameter and buffer that the work reads is compared with what it was when the work was
done: the same object, the same version counter, the same memory (which stays allocated meanwhile, or a new
tensor might come to lie at the old address). `load_state_dict`, an optimiser's step, in-place updates,
replaced parameters and `param.data = other` are all seen. Eager's batch norm in training mode updates its
running statistics without moving their version counters, so vectors that are buffers are compared by value.

What torch does not tell (writing through `param.data` in place, or through a numpy array that shares its
memory) is not seen: call `fxpasses.refresh()` after it. Inference tensors have no version counter, so with
one among the parameters the work is done at every call.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch.fx import GraphModule

from fxpasses.passes.parameter_work import ParameterWork

_version = attrgetter("_version")
_address = torch.Tensor.data_ptr

_alive: weakref.WeakSet[KeptWeights] = weakref.WeakSet()


@dataclass(frozen=True)
class _Statistics:
    """The values of those sources that may change without a sign: buffers that are vectors.

    Attributes:
        groups: positions among the sources, by dtype and device, and the values there, end to end.
    """

    groups: tuple[tuple[tuple[int, ...], torch.Tensor], ...]

    @staticmethod
    def of(sources: Sequence[torch.Tensor]) -> _Statistics:
        positions: dict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
        for position, each in enumerate(sources):
            if each.ndim == 1 and not isinstance(each, torch.nn.Parameter):
                positions[each.dtype, each.device].append(position)
        return _Statistics(
            tuple((tuple(group), torch.cat([sources[at] for at in group])) for group in positions.values())
        )

    def hold(self, sources: Sequence[torch.Tensor]) -> bool:
        return all(torch.equal(torch.cat([sources[at] for at in group]), was) for group, was in self.groups)


@dataclass(frozen=True)
class _Snapshot:
    """Parameters as they were, and what was computed from them. Immutable, so threads may share it."""

    sources: tuple[torch.Tensor, ...]
    memory: tuple[torch.Tensor, ...]
    versions: list[int]
    addresses: list[int]
    statistics: _Statistics
    values: tuple[torch.Tensor, ...]

    def holds(self, sources: Sequence[torch.Tensor]) -> bool:
        return (
            all(map(is_, sources, self.sources))
            and list(map(_version, sources)) == self.versions
            and list(map(_address, sources)) == self.addresses
            and self.statistics.hold(sources)
        )


class KeptWeights:
    """A compiled graph that takes kept tensors after its own arguments."""

    def __init__(self, compiled: Callable[..., Any], work: ParameterWork) -> None:
        """Args:
        compiled: the main part, compiled.
        work: the split graph.
        """
        self._compiled = compiled
        self._prologue: GraphModule = work.prologue
        self._positions = work.sources
        self._snapshot: _Snapshot | None = None
        _alive.add(self)

    def __call__(self, *arguments: Any) -> Any:
        sources = [arguments[position] for position in self._positions]
        snapshot = self._snapshot
        if any(map(torch.Tensor.is_inference, sources)):
            values = self._compute(sources)
        elif snapshot is not None and snapshot.holds(sources):
            values = snapshot.values
        else:
            values = self._renew(sources)
        return self._compiled(*arguments, *values)

    def forget(self) -> None:
        """Drops what is kept; the next call computes it again."""
        self._snapshot = None

    def _renew(self, sources: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        # The versions are read first: an update while the work is done makes the snapshot stale, not wrong.
        versions, addresses = list(map(_version, sources)), list(map(_address, sources))
        with torch.inference_mode(False), torch.no_grad():
            statistics = _Statistics.of(sources)
            memory = tuple(each.detach() for each in sources)
        values = self._compute(sources)
        self._snapshot = _Snapshot(tuple(sources), memory, versions, addresses, statistics, values)
        return values

    def _compute(self, sources: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        # Kept tensors must outlive an inference-mode block, so they are no inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            values: tuple[torch.Tensor, ...] = self._prologue(*sources)
        return values


def refresh(compiled: object = None) -> None:
    """Has parameter work done again at the next call, after writes that torch does not tell.

    Args:
        compiled: what torch.compile returned. What is kept for a module that shares a parameter or buffer
            with it is dropped too; without an argument, or for a function, everything is.
    """
    held = None
    if isinstance(compiled, torch.nn.Module):
        held = {id(each) for each in (*compiled.parameters(), *compiled.buffers())}
    for each in list(_alive):
        snapshot = each._snapshot
        if held is None or snapshot is None or any(id(source) in held for source in snapshot.sources):
            each.forget()
