"""Trust per application: what is checked before a rewrite takes its place in the graph.

`check_replacement` always runs: shape, dtype, device, and every reader of the result comes after it.
`verify="structure"` adds: the graph lints, the metadata of every new node is what the operator gives when
it runs again on fake tensors, results that the user sees keep their strides, and no guard on a size has
been added. `verify="numerics"` adds: both subgraphs run on made-up values (`fxpasses.rewrite.numerics`).

A check answers with words, which the driver reports as `failed` after it has rolled the rewrite back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxpasses.graph.context import GraphContext
from fxpasses.graph.metadata import value
from fxpasses.rewrite.rule import Match
from fxpasses.torch_internals.pytree import tree_leaves
from fxpasses.torch_internals.sizes import size_hint
from fxpasses.torch_internals.tensors import storage_key


class WrongReplacementError(TypeError):
    """A replacement that cannot stand where the result stood."""


def check_replacement(match: Match, replacements: Sequence[Node], inserted: Sequence[Node]) -> None:
    """Raises unless each replacement has the shape, dtype and device of what it replaces.

    Raises:
        WrongReplacementError: it has not, or something stands before what it reads.
    """
    results, matched = match.results, set(match.nodes)
    if len(results) != len(replacements):
        raise WrongReplacementError(
            f"the rewrite gives {len(replacements)} results, and the match has {len(results)}"
        )
    for node in inserted:
        late = next((given for given in node.all_input_nodes if not given < node), None)
        if late is not None:
            raise WrongReplacementError(f"{node.name} was inserted before {late.name}, which it reads")
    for old, new in zip(results, replacements, strict=True):
        if new in results:
            raise WrongReplacementError("the replacement is the node that it replaces")
        difference = _difference(value(old), value(new))
        if difference is not None:
            raise WrongReplacementError(f"the replacement {difference}")
        early = next((user for user in old.users if user not in matched and not new < user), None)
        if early is not None:
            raise WrongReplacementError(f"{new.name} does not stand before {early.name}, which is to read it")


def _difference(expected: Any, found: Any) -> str | None:
    if not isinstance(expected, torch.Tensor):
        return None
    if not isinstance(found, torch.Tensor):
        return f"gives {type(found).__name__}, not a tensor"
    for name in ("dtype", "device"):
        if getattr(expected, name) != getattr(found, name):
            return f"has {name} {getattr(found, name)}, not {getattr(expected, name)}"
    if len(expected.shape) != len(found.shape) or any(
        isinstance(a, int) and isinstance(b, int) and a != b
        for a, b in zip(expected.shape, found.shape, strict=True)
    ):
        return f"has shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    return None


@dataclass(frozen=True)
class GuardCount:
    """The guards of a graph's sizes before a rule looked at a site."""

    context: GraphContext
    before: int

    @staticmethod
    def of(context: GraphContext) -> GuardCount:
        return GuardCount(context, context.evaluator.guard_count)

    @property
    def added(self) -> int:
        """How many have come since."""
        return self.context.evaluator.guard_count - self.before


def structural_fault(
    match: Match, replacements: Sequence[Node], inserted: Sequence[Node], guards: GuardCount
) -> str | None:
    """What is wrong with the structure of an inserted replacement, or None."""
    try:
        match.context.graph.lint()
    except Exception as error:
        return f"the graph does not lint: {error}"
    for node in inserted:
        if (stale := _stale_metadata(match.context, node)) is not None:
            return stale
    for old, new in zip(match.results, replacements, strict=True):
        fault = _stride_fault(old, new) or _size_fault(old, new)
        if fault is not None:
            return fault
    if guards.added:
        return f"{guards.added} guards on sizes were added, so other sizes would recompile"
    return None


def _stale_metadata(context: GraphContext, node: Node) -> str | None:
    """Whether a new node's metadata is not what its operator gives."""
    if node.op not in ("call_function", "call_method"):
        return None
    function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    with context.modes(node).entered():
        again = context.evaluator.call(function, node.args, dict(node.kwargs))
    held = tree_leaves(value(node))
    for claimed, found in zip(held, tree_leaves(again), strict=False):
        if isinstance(claimed, torch.Tensor) and _layout(claimed) != _layout(found):
            return f"{node.name} says that it is {_layout(claimed)}, and is {_layout(found)}"
    return None


def _layout(given: Any) -> object:
    if not isinstance(given, torch.Tensor):
        return type(given).__name__
    sizes = tuple(map(str, given.shape)), tuple(map(str, given.stride()))
    return (*sizes, given.dtype, str(given.device))


def _size_fault(old: Node, new: Node) -> str | None:
    """Symbolic sizes must be the same by the values that they had when traced."""
    expected, found = value(old), value(new)
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        return None
    hints = [tuple(size_hint(size) for size in given.shape) for given in (expected, found)]
    return None if hints[0] == hints[1] else f"the replacement has shape {hints[1]}, not {hints[0]}"


def _stride_fault(old: Node, new: Node) -> str | None:
    """A result that leaves the graph, or a view of it that does, must keep its strides."""
    expected, found = value(old), value(new)
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        return None
    if not leaves_graph(old):
        return None
    strides = [
        tuple(
            size_hint(step)
            for size, step in zip(given.shape, given.stride(), strict=True)
            if size_hint(size) != 1
        )
        for given in (expected, found)
    ]
    if strides[0] == strides[1]:
        return None
    return f"the user sees {old.name}, which has strides {strides[0]}; the replacement's are {strides[1]}"


def leaves_graph(start: Node) -> bool:
    """Whether the graph returns a node, or something that shares its storage."""
    held = value(start)
    storage = storage_key(held) if isinstance(held, torch.Tensor) else None
    pending, seen = [start], {start}
    while pending:
        for user in pending.pop().users:
            if user.op == "output":
                return True
            shared = value(user)
            is_view = isinstance(shared, torch.Tensor) and storage_key(shared) == storage
            if user not in seen and storage is not None and is_view:
                seen.add(user)
                pending.append(user)
    return False
