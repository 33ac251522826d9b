"""Preferences: the operators behind a tensor's layout, past those that take any.

    conv2d ── relu ──┬── max_pool2d        made channels_last, since conv2d gains by it; relu takes any
                     └ copy ── add ── view    wanted contiguous: add takes any, view needs the traced strides

The reader of a copied tensor is often elementwise and has no preference of its own. The search goes on from
there, through whatever has the same label, to the nearest operators that gain by it or are bound to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from torch.fx import Node

from fxpasses.devices.sizes import Seconds
from fxpasses.graph.layouts import C, Label
from fxpasses.passes.layout.network import Network, Role

_FOUND = 3
"""How many operators are named on each side of a cut edge."""

_VISITED = 100
"""How many are looked at for that."""


def preferences(
    network: Network,
    labels: Sequence[Label],
    starts: Iterable[Node],
    label: Label,
    apart: Node | None,
    seconds: Callable[[Seconds], float],
) -> tuple[str, ...]:
    """The nearest operators that prefer `label` or are bound to it, each with its reason.

    Args:
        network: the graph as a problem.
        labels: of each variable.
        starts: where to begin.
        label: what they have in common.
        apart: the tensor that is copied, across which the search does not go; None to begin with it.
        seconds: evaluates a cost.
    """
    found: list[str] = []
    pending: deque[Node] = deque(starts)
    seen: set[Node | None] = {apart}
    while pending and len(found) < _FOUND and len(seen) < _VISITED:
        node = pending.popleft()
        if node in seen:
            continue
        seen.add(node)
        reason = _reason(network, node, label, seconds)
        if reason:
            found.append(f"{node.name} {reason}")
        else:
            pending.extend(_neighbours(network, labels, node, label))
    return tuple(found)


def _reason(network: Network, node: Node, label: Label, seconds: Callable[[Seconds], float]) -> str:
    if node.op in ("placeholder", "get_attr"):
        return "comes so"
    if node.op == "output":
        return "has eager's strides"
    if network.roles.get(node) is Role.EXACT:
        return "needs the traced strides"
    if node in network.unsafe:
        return "is right in it alone" if label == C else ""
    variable = network.variables.get(node)
    contiguous, channels_last = map(seconds, network.own(variable)) if variable is not None else (0.0, 0.0)
    gain = channels_last - contiguous if label == C else contiguous - channels_last
    return f"gains {gain * 1e6:.1f} us" if gain > 0 else ""


def _neighbours(network: Network, labels: Sequence[Label], node: Node, label: Label) -> list[Node]:
    """What shares the label with an operator, next to it."""
    read = [
        operand
        for operand in node.all_input_nodes
        if operand in network.tensors and labels[network.find(network.tensors[operand].producer)] == label
    ]
    held = network.tensors.get(node)
    users = held.users if held is not None else []
    readers = [user for user, variable in users if labels[network.find(variable)] == label]
    elements = [user for user in node.users if held is None and user in network.variables]
    return [*read, *readers, *elements]
