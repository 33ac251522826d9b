"""Where a written node comes from: which rule wrote it, at which site, in the place of which nodes.

    node.meta["custom"]["fxpasses"] = [{"rule": ..., "site": ..., "replaced": [...]}, ...]   the oldest first

AOTAutograd hands this on to what it traces the node into, `torch.export.save` stores it, and graphs that
torch logs show it as an annotation. Inductor's provenance, and tlparse's pages with it, follows
`meta["from_node"]` instead, so the replaced nodes are named there, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch.fx import Node
from torch.fx.traceback import NodeSource, NodeSourceAction

KEY = "fxpasses"
"""The entry of a node's annotations."""


@dataclass(frozen=True)
class Provenance:
    """What wrote a node.

    Attributes:
        rule: the name of the rule or pass.
        site: the name of the node that it looked at.
        replaced: names of the nodes in whose place it wrote; empty where it added to them.
    """

    rule: str
    site: str
    replaced: tuple[str, ...] = ()


class Origin:
    """What is told of each node that is written in the place of others."""

    def __init__(self, rule: str, site: Node, replaced: Sequence[Node] = ()) -> None:
        """Args:
        rule: the name of the rule or pass.
        site: the node that it looks at.
        replaced: the nodes in whose place it writes.
        """
        sources = replaced or (site,)
        told = Provenance(rule, site.name, tuple(node.name for node in replaced))
        earlier = [entry for node in sources for entry in provenance_of(node)]
        self._entries = [{**asdict(each), "replaced": [*each.replaced]} for each in (*earlier, told)]
        before = [source for node in sources for source in node.meta.get("from_node", ())]
        action = NodeSourceAction.REPLACE if replaced else NodeSourceAction.CREATE
        self._from = [*before, *(NodeSource(node, f"{KEY}.{rule}", action) for node in sources)]

    def tell(self, node: Node) -> None:
        """Adds it to a written node's metadata; a user's own annotations stay."""
        node.meta["custom"] = {**node.meta.get("custom", {}), KEY: self._entries}
        node.meta["from_node"] = self._from


def provenance_of(node: Node) -> tuple[Provenance, ...]:
    """What has written a node, the oldest first; empty for what the user's program says itself."""
    custom = node.meta.get("custom")
    entries = custom.get(KEY, ()) if isinstance(custom, dict) else ()
    return tuple(Provenance(entry["rule"], entry["site"], tuple(entry["replaced"])) for entry in entries)


def inherit(written: Node, replaced: Sequence[Node], rule: str) -> None:
    """Gives a node the metadata of the last node in whose place it stands, and tells who wrote it."""
    written.meta.update(replaced[-1].meta)
    Origin(rule, replaced[-1], tuple(dict.fromkeys(replaced))).tell(written)
