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

import contextlib
import functools
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch.fx import GraphModule

from fxpasses.passes.weights.packed import PackedWeight
from fxpasses.passes.weights.parameter_work import ParameterWork
from fxpasses.torch_internals.cpp import same_memory_function, unchanged_function

_version = attrgetter("_version")
_address = torch.Tensor.data_ptr

_alive: weakref.WeakSet[KeptWeights] = weakref.WeakSet()


@dataclass(frozen=True)
class _Statistics:
    """The values of those sources that may change without a new version: buffers that are vectors.

    Attributes:
        groups: positions among the sources, by dtype and device, and the values there, end to end.
        blocks: of those on the CPU, the memory and what it held.
    """

    groups: tuple[tuple[tuple[int, ...], torch.Tensor], ...]
    blocks: tuple[_Blocks, ...]

    @staticmethod
    def of(sources: Sequence[torch.Tensor]) -> _Statistics:
        positions: dict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
        for position, source in enumerate(sources):
            if source.ndim == 1 and not isinstance(source, torch.nn.Parameter):
                positions[source.dtype, source.device].append(position)
        groups, blocks = [], []
        for group in positions.values():
            members = [sources[at] for at in group]
            values = torch.cat(members)
            plain = all(member.is_cpu and member.is_contiguous() for member in members)
            if plain and same_memory_function() is not None:
                blocks.append(_Blocks(members, values))
            else:
                groups.append((tuple(group), values))
        return _Statistics(tuple(groups), tuple(blocks))

    def hold(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether the values are what they were, of sources that still lie at the same addresses."""
        return all(block.hold() for block in self.blocks) and all(
            torch.equal(torch.cat([sources[at] for at in group]), was) for group, was in self.groups
        )


class _Blocks:
    """Vectors on the CPU: 300 of them are compared in a few microseconds by one call of a C function."""

    def __init__(self, members: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        compare = same_memory_function()
        assert compare is not None
        addresses = torch.tensor([member.data_ptr() for member in members], dtype=torch.int64)
        sizes = torch.tensor(
            [member.numel() * member.element_size() for member in members], dtype=torch.int64
        )
        self._memory = (addresses, sizes, values, *members)  # stays alive as long as its addresses are used
        self._compare = functools.partial(
            compare, addresses.data_ptr(), sizes.data_ptr(), len(members), values.data_ptr()
        )

    def hold(self) -> bool:
        return bool(self._compare())


class _SourceGuard:
    """Tells of a change by which objects tensors are, their version counters and where their memory is."""

    def __init__(self, sources: Sequence[torch.Tensor], positions: Sequence[int]) -> None:
        """Args:
        sources: the tensors.
        positions: where they are among the arguments of a call.
        """
        self._sources = tuple(sources)
        self._positions = tuple(positions)
        self._versions = list(map(_version, sources))
        self._addresses = list(map(_address, sources))
        self._native: Callable[[tuple[Any, ...]], int] | None = None
        compare = unchanged_function()
        if compare is not None:
            with torch.inference_mode(False):
                lists = (self._positions, self._versions, self._addresses)
                self._words = [torch.tensor(numbers, dtype=torch.int64) for numbers in lists]
            where, versions, addresses = (numbers.data_ptr() for numbers in self._words)
            count, known = len(self._sources), self._sources
            self._native = lambda given: compare(given, where, count, known, versions, addresses)

    def hold(self, arguments: tuple[Any, ...]) -> bool:
        """Whether nothing tells of a change, by the arguments of a call."""
        if self._native is not None:
            return bool(self._native(arguments))
        sources = [arguments[position] for position in self._positions]
        return (
            all(map(is_, sources, self._sources))
            and list(map(_version, sources)) == self._versions
            and list(map(_address, sources)) == self._addresses
        )


@dataclass(frozen=True)
class _Snapshot:
    """Parameters as they were, and what was computed from them. Immutable, so threads may share it."""

    sources: tuple[torch.Tensor, ...]
    memory: tuple[torch.Tensor, ...]
    guard: _SourceGuard
    statistics: _Statistics
    values: tuple[torch.Tensor, ...]

    def holds(self, arguments: tuple[Any, ...]) -> bool:
        """Whether the parameters among the arguments of a call are what they were."""
        return self.guard.hold(arguments) and self.statistics.hold(self.sources)


class _ReadersWriterLock:
    """Lets any number of calls read at a time, or one renewal write what they all read."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with self._changed:
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Waits until nobody reads, and keeps new readers waiting."""
        with self._changed:
            self._changed.wait_for(lambda: self._readers == 0)
            yield


class KeptWeights:
    """A compiled graph that takes kept tensors after its own arguments."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        work: ParameterWork,
        packed: Sequence[PackedWeight] = (),
        unread: Collection[int] = (),
    ) -> None:
        """Args:
        compiled: the main part, compiled.
        work: the split graph.
        packed: constants of the compiled code that are made from kept tensors.
        unread: which of the kept tensors the code reads only there.
        """
        self._compiled = compiled
        self._prologue: GraphModule = work.prologue
        self._positions = work.sources
        self._inputs = work.inputs
        self._packed = tuple(packed)
        self._unread = tuple(unread)
        self._storageless: dict[int, torch.Tensor] = {}
        self._snapshot: _Snapshot | None = None
        self._lock = _ReadersWriterLock()
        _alive.add(self)

    def __call__(self, *arguments: Any) -> Any:
        given = [arguments[position] for position in self._inputs]
        snapshot = self._snapshot
        if not self._packed:
            if snapshot is None or not snapshot.holds(arguments):
                return self._compiled(*given, *self._renewed(arguments))
            return self._compiled(*given, *snapshot.values)
        with self._lock.reading():
            snapshot = self._snapshot
            if snapshot is not None and snapshot.holds(arguments):
                return self._compiled(*given, *snapshot.values)
        # The code reads the packed weights as constants, so this call ends before anyone may change them.
        with self._lock.writing():
            return self._compiled(*given, *self._renewed(arguments))

    def forget(self) -> None:
        """Drops what is kept; the next call computes it again."""
        self._snapshot = None

    def _renewed(self, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        sources = [arguments[position] for position in self._positions]
        self._snapshot = None  # what is packed is overwritten now
        if any(map(torch.Tensor.is_inference, sources)):
            return self._compute(sources)  # nothing will tell whether they change
        # The guard is made first: an update while the work is done makes the snapshot stale, not wrong.
        guard = _SourceGuard(sources, self._positions)
        with torch.inference_mode(False), torch.no_grad():
            statistics = _Statistics.of(sources)
            memory = tuple(source.detach() for source in sources)
        values = self._compute(sources)
        self._snapshot = _Snapshot(tuple(sources), memory, guard, statistics, values)
        return values

    def _compute(self, sources: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The kept tensors. Packed ones go to the constants of the code.

        Those that the code reads only there are left without memory.
        """
        # Kept tensors must outlive an inference-mode block, so they are no inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            values: list[torch.Tensor] = list(self._prologue(*sources))
            for packed in self._packed:
                packed.constant.data = packed.pack(*(values[index].detach() for index in packed.indices))
            for index in self._unread:
                if index not in self._storageless:
                    self._storageless[index] = _without_storage(values[index])
                values[index] = self._storageless[index]
        return tuple(values)


def _without_storage(dense: torch.Tensor) -> torch.Tensor:
    """A tensor of the same metadata without memory."""
    empty = torch.empty_strided(dense.shape, dense.stride(), dtype=dense.dtype, device=dense.device)
    empty.untyped_storage().resize_(0)
    return empty


def refresh(compiled: object = None) -> None:
    """Has parameter work done again at the next call, after writes that torch does not tell.

    Args:
        compiled: what torch.compile returned. What is kept for a module that shares a parameter or buffer
            with it is dropped too; without an argument, or for a function, everything is.
    """
    held = None
    if isinstance(compiled, torch.nn.Module):
        held = {id(tensor) for tensor in (*compiled.parameters(), *compiled.buffers())}
    for kept in list(_alive):
        snapshot = kept._snapshot
        if held is None or snapshot is None or any(id(source) in held for source in snapshot.sources):
            kept.forget()
