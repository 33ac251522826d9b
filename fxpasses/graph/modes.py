"""Modes: the state that surrounds each node: grad mode, autocast, functorch levels, streams.

A graph switches modes by nodes of its own (`_set_grad_enabled(False)`, `_enter_autocast(...)`,
`_grad_increment_nesting()`). Two nodes may be fused only where it is known in which state the fusion runs:
a convolution under `no_grad` gives its weight no gradient, so moving it out of there would change training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from fxpasses.torch_internals.operators import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    SET_GRAD_ENABLED,
    HigherOrderOperator,
    operator_name,
)


@dataclass(frozen=True)
class Modes:
    """The state in which a node runs.

    Attributes:
        grad: whether autograd records.
        autocast: the arguments of the autocast regions around the node, outermost first.
        functorch: the nodes that opened the functorch levels around the node.
        other: the nodes that opened further regions (inference mode, saved-tensor hooks, unknown ones).
        stream: the stream that the node is annotated with.
    """

    grad: bool = True
    autocast: tuple[tuple[Any, ...], ...] = ()
    functorch: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    stream: Any = None

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """The grad mode and autocast regions of this state, for computing metadata under them."""
        if self.grad == torch.is_grad_enabled() and not self.autocast:
            return contextlib.nullcontext()
        return self._entered()

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device_type, dtype, enabled, cache in self.autocast:
                stack.enter_context(torch.autocast(device_type, dtype, enabled, cache))
            yield


def difference(first: Modes, second: Modes) -> str | None:
    """The name of the first mode in which two states differ, or None where they are the same."""
    for name in ("grad", "functorch", "other", "stream", "autocast"):
        if getattr(first, name) != getattr(second, name):
            return name
    return None


def modes_of(graph: Graph, initial: Modes) -> dict[Node, Modes]:
    """The state of every node of `graph`, given the state at its start."""
    current = initial
    opened: dict[Node, Modes] = {}
    result: dict[Node, Modes] = {}
    switches: dict[object, bool] = {}
    for node in graph.nodes:
        custom = node.meta.get("custom")
        stream = custom.get("stream") if isinstance(custom, dict) else None
        result[node] = current if stream == current.stream else replace(current, stream=stream)
        if node.op == "call_function":
            target = node.target
            if target not in switches:
                switches[target] = is_switch(target)
            if switches[target]:
                current = _after(node, current, opened)
    return result


def is_switch(target: object) -> bool:
    """Whether a function changes the state of what comes after it."""
    name = getattr(target, "__name__", "")
    named = "crement_nesting" in name or name.startswith((*_OPENING, *_CLOSING))
    return named or target in (SET_GRAD_ENABLED, ENTER_AUTOCAST, EXIT_AUTOCAST)


def _after(node: Node, current: Modes, opened: dict[Node, Modes]) -> Modes:
    """The state after a node, which is another one only after a mode switch."""
    target = node.target
    if target is SET_GRAD_ENABLED:
        return replace(current, grad=node.args[0] is True)
    if target is ENTER_AUTOCAST:
        opened[node] = current
        arguments = (*node.args, *([None] * (4 - len(node.args))))
        return replace(current, autocast=(*current.autocast, arguments))
    if target is EXIT_AUTOCAST and node.args and node.args[0] in opened:
        return replace(current, autocast=opened[node.args[0]].autocast)  # type: ignore[index]
    name = getattr(target, "__name__", "")
    if "increment_nesting" in name:
        return replace(current, functorch=(*current.functorch, node.name))
    if "decrement_nesting" in name:
        return replace(current, functorch=current.functorch[:-1])
    if name.startswith(_OPENING):
        opened[node] = current
        return replace(current, other=(*current.other, node.name))
    if name.startswith(_CLOSING):
        return replace(current, other=current.other[:-1])
    return current


_OPENING = ("_enter", "enter_", "_saved_tensors_hooks_disable", "_push")
_CLOSING = ("_exit", "exit_", "_saved_tensors_hooks_enable", "_pop")


def initial_modes_of_nested(reference: Node, outer: dict[Node, Modes]) -> Modes:
    """The state at the start of a graph that an operator runs, from the operator that takes it."""
    users = [user for user in reference.users if isinstance(user.target, HigherOrderOperator)]
    if not users:
        return outer[reference]
    user = users[0]
    modes = outer[user]
    name = operator_name(user.target) if isinstance(user.target, HigherOrderOperator) else ""
    if name == "wrap_with_set_grad_enabled":
        return replace(modes, grad=user.args[0] is True)
    if name == "wrap_with_autocast":
        arguments = tuple(user.args[:4])
        return replace(modes, autocast=(*modes.autocast, arguments))
    return modes
