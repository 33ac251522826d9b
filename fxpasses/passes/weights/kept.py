"""Kept weights: results of parameter work, used again as long as every parameter is what it was.

At every call each parameter and buffer that the work reads is compared with what it was when the work was
done: the same object, the same version counter, the same memory (which stays allocated meanwhile, or a new
tensor might come to lie at the old address). `load_state_dict`, an optimiser's step, in-place updates,
replaced parameters and `param.data = other` are all seen. What torch does not tell of (eager's batch norm,
which updates its running statistics without a new version, and writes through `param.data` or a numpy view)
is seen by values: those of statistics all, of the others a few (`contents`). A write to a few elements that
misses these is not seen: call `fxpasses.refresh()` after it. Inference tensors have no version counter, so
with one among the parameters the work is done at every call.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch.fx import GraphModule

from fxpasses.kernels.pages import LargePages
from fxpasses.passes.weights.contents import Contents
from fxpasses.passes.weights.packed import PackedWeight
from fxpasses.passes.weights.parameter_work import ParameterWork
from fxpasses.passes.weights.recipes import Recipe
from fxpasses.torch_internals.comparison import comparison

_version = attrgetter("_version")
_address = torch.Tensor.data_ptr

_ATTEMPTS = 10
"""How often work is begun again that an update by another thread has overtaken."""

_alive: weakref.WeakSet[KeptWeights] = weakref.WeakSet()


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

    def with_contents(self, contents: Contents) -> Callable[[tuple[Any, ...]], bool]:
        """A function of the arguments of a call: whether neither it nor the contents tell of a change."""
        positions, blocks = self._positions, contents.blocks
        if blocks is None:  # nothing is compared by C++

            def hold(arguments: tuple[Any, ...]) -> bool:
                sources = [arguments[position] for position in positions]
                return self.is_of(sources) and contents.hold(sources)

            return hold
        compare = comparison(self._sources, positions, self._versions, self._addresses, blocks)
        if not contents.groups:
            return compare
        return lambda arguments: compare(arguments) and contents.groups_hold(self._sources)

    def is_of(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether these are the tensors, and nothing tells of a change."""
        return (
            len(sources) == len(self._sources)
            and all(map(is_, sources, self._sources))
            and list(map(_version, sources)) == self._versions
            and list(map(_address, sources)) == self._addresses
        )


@dataclass(frozen=True)
class _Snapshot:
    """Parameters as they were, and what was computed from them. Immutable, so threads may share it.

    Attributes:
        sources: the parameters.
        memory: what they hold, which stays allocated.
        guard, contents: tell whether they are what they were.
        holds: whether the parameters among the arguments of a call are what they were.
        values: the kept tensors.
        packed: packed tensors, by what they are made of and their form.
    """

    sources: tuple[torch.Tensor, ...]
    memory: tuple[torch.Tensor, ...]
    guard: _SourceGuard
    contents: Contents
    holds: Callable[[tuple[Any, ...]], bool]
    values: tuple[torch.Tensor, ...]
    packed: Mapping[object, torch.Tensor]

    @property
    def is_fresh(self) -> bool:
        """Whether they still are what they were, whoever calls."""
        return self.guard.is_of(self.sources) and self.contents.hold(self.sources)


class _ReadersWriterLock:
    """Lets any number of calls read at a time, or one thread write what they all read.

    Who wants to write waits for those who read already, and the next to read wait for them. The thread that
    writes may read.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._waiting = 0
        self._writer: int | None = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with self._changed:
            if self._writer != threading.get_ident():
                self._changed.wait_for(lambda: not self._waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with self._changed:
            before = self._writer
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._readers == 0)
            finally:
                self._waiting -= 1
                self._changed.notify_all()
            self._writer = threading.get_ident()
            try:
                yield
            finally:
                self._writer = before


class KeptWeights:
    """A compiled graph that takes kept tensors after its own arguments."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        work: ParameterWork,
        packed: Sequence[PackedWeight] = (),
        unread: Collection[int] = (),
        *,
        everywhere: bool = False,
    ) -> None:
        """Args:
        compiled: the main part, compiled.
        work: the split graph.
        packed: constants of the compiled code that are made from kept tensors.
        unread: which of the kept tensors the code reads only there.
        everywhere: whether untold writes are looked for on other devices than the CPU, too.
        """
        self._compiled = compiled
        self._prologue: GraphModule = work.prologue
        self._positions = work.sources
        self._inputs = work.inputs
        self._packed = tuple(packed)
        self._read = frozenset(range(len(work.examples))).difference(unread)
        self._keys, self._names, self._examples = work.keys, work.names, work.examples
        self._everywhere = everywhere
        self._storageless: dict[int, torch.Tensor] = {}
        self._snapshot: _Snapshot | None = None
        self._lock = _ReadersWriterLock()
        _alive.add(self)
        # Inductor never lets go of the modules of its code, and what their constants hold is no small thing.
        weakref.finalize(self, _empty, self._packed).atexit = False

    def __call__(self, *arguments: Any) -> Any:
        given = [arguments[position] for position in self._inputs]
        with self._lock.reading():
            snapshot = self._snapshot
            if snapshot is not None and snapshot.holds(arguments):
                return self._compiled(*given, *snapshot.values)
        # The code reads the packed weights as constants, so this call ends before anyone may change them.
        with self._lock.writing():
            snapshot = self._snapshot  # another thread may have renewed it in between
            values = snapshot.values if snapshot and snapshot.holds(arguments) else self._renewed(arguments)
            return self._compiled(*given, *values)

    def forget(self) -> None:
        """Drops what is kept; the next call computes it again."""
        self._snapshot = None

    def _renewed(self, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        sources = [arguments[position] for position in self._positions]
        self._snapshot = None  # what is packed is replaced now
        if any(map(torch.Tensor.is_inference, sources)):
            return self._compute(sources)[0]  # nothing will tell whether they change
        for _ in range(_ATTEMPTS):
            # The guard is made first: an update while the work is done makes the snapshot stale, not wrong.
            guard = _SourceGuard(sources, self._positions)
            with torch.inference_mode(False), torch.no_grad():
                contents = Contents.of(sources, everywhere=self._everywhere)
                memory = tuple(source.detach() for source in sources)
            values, packed = self._compute(sources)
            if guard.is_of(sources) and contents.hold(sources):
                break
        holds = guard.with_contents(contents)
        self._snapshot = _Snapshot(tuple(sources), memory, guard, contents, holds, values, packed)
        return values

    def _compute(
        self, sources: list[torch.Tensor]
    ) -> tuple[tuple[torch.Tensor, ...], dict[object, torch.Tensor]]:
        """The kept tensors, and the packed ones, which go to the constants of the code.

        Kept ones that the code reads only there are left without memory. What another graph of the same
        module has made of the same tensors is taken from there, so that it is in memory once.
        """
        known = self._found_elsewhere(sources)
        recipes = [packed.recipe for packed in self._packed]
        # Kept tensors must outlive an inference-mode block, so they are no inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            unpacked = (recipe for recipe in recipes if self._product(recipe) not in known)
            needed = self._read.union(*(recipe.indices for recipe in unpacked))
            if any(self._keys[index] not in known for index in needed):
                for key, value in zip(self._keys, self._prologue(*sources), strict=True):
                    known.setdefault(key, value)
            pages = LargePages(sum(self._examples[index].nbytes for index in needed - self._read))
            for packed in self._packed:
                recipe = packed.recipe
                product = self._product(recipe)
                if product not in known:
                    found = recipe.pack(*(known[self._keys[at]].detach() for at in recipe.indices))
                    known[product] = pages.moved(found)
                for place in packed.places:
                    place.fill(known[product])
            values = tuple(
                known[key] if index in self._read else self._without_memory(index)
                for index, key in enumerate(self._keys)
            )
        return values, {product: known[product] for product in map(self._product, recipes)}

    def _product(self, recipe: Recipe) -> object:
        """What a packed tensor is made of, and its form."""
        return tuple(self._keys[index] for index in recipe.indices), recipe.form

    def _without_memory(self, index: int) -> torch.Tensor:
        if index not in self._storageless:
            self._storageless[index] = _without_storage(self._examples[index])
        return self._storageless[index]

    def _found_elsewhere(self, sources: list[torch.Tensor]) -> dict[object, torch.Tensor]:
        """What other graphs keep of the same tensors as they are now, by what it is made of."""
        ours = dict(zip(self._names, sources, strict=True))
        known: dict[object, torch.Tensor] = {}
        for other in list(_alive):
            snapshot = other._snapshot
            if other is self or snapshot is None:
                continue
            theirs = zip(other._names, snapshot.sources, strict=True)
            if all(ours.get(name, source) is source for name, source in theirs) and snapshot.is_fresh:
                known |= {other._keys[index]: snapshot.values[index] for index in other._read}
                known |= snapshot.packed
        return known


def _empty(packed: Sequence[PackedWeight]) -> None:
    """Frees packed weights, when their code will not run again."""
    for one in packed:
        for place in one.places:
            place.fill(None)


@dataclass(frozen=True)
class InUse:
    """What is kept of some tensors by now.

    Attributes:
        names: of the inputs of graphs that something is kept of.
        forms: how weights are packed, by what they are made of.
    """

    names: frozenset[str]
    forms: Mapping[str, Recipe]

    @staticmethod
    def of(tensors: Iterable[torch.Tensor]) -> InUse:
        """What other graphs keep that read one of these tensors."""
        held = set(map(id, tensors))
        snapshots = ((kept, kept._snapshot) for kept in list(_alive))
        others = [kept for kept, found in snapshots if found and not held.isdisjoint(map(id, found.sources))]
        return InUse(
            frozenset(name for kept in others for name in kept._names),
            {kept._keys[one.recipe.indices[0]]: one.recipe for kept in others for one in kept._packed},
        )


def _without_storage(dense: torch.Tensor) -> torch.Tensor:
    """A real tensor of the same metadata without memory."""
    empty = torch.empty_strided(dense.shape, dense.stride(), dtype=dense.dtype, device=dense.device)
    empty.untyped_storage().resize_(0)
    return empty


def refresh(compiled: object = None) -> None:
    """Has parameter work done again at the next call, after writes that torch does not tell.

    Args:
        compiled: what torch.compile returned. What is kept for a module that shares a parameter or buffer
            with it is dropped too; without an argument, or for a function, everything is.
    """
    for kept in _kept_for(compiled):
        kept.forget()


@contextlib.contextmanager
def updating(compiled: object = None) -> Iterator[None]:
    """A block that updates weights while other threads call: a graph runs before all of it or after it.

        with fxpasses.updating(served):
            model.load_state_dict(state)

    It begins when the calls in flight have ended, and calls that begin meanwhile wait until it ends. Calls of
    the block's own thread go through. A graph that another thread compiles meanwhile is not held up.

    Args:
        compiled: what torch.compile returned with ``weights="cached"``; others are held up too where they
            share a parameter or buffer with it. Without an argument, or for a function, all are.
    """
    with contextlib.ExitStack() as held:
        for kept in sorted(_kept_for(compiled), key=id):  # in one order, so that two updates do not lock up
            held.enter_context(kept._lock.writing())
        yield


def _kept_for(compiled: object) -> list[KeptWeights]:
    """What is kept for a module, or shares a parameter or buffer with it; all, if it is no module."""
    if not isinstance(compiled, torch.nn.Module):
        return list(_alive)
    held = {id(tensor) for tensor in (*compiled.parameters(), *compiled.buffers())}
    snapshots = ((kept, kept._snapshot) for kept in list(_alive))
    return [
        kept
        for kept, snapshot in snapshots
        if snapshot is None or any(id(source) in held for source in snapshot.sources)
    ]
