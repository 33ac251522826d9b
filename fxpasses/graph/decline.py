"""A failure to match is a value: falsy, cheap, and able to say why.

Nothing is formatted until somebody reads the message, so that declining at ten thousand sites costs little.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fxpasses.graph.sizes import SizeRange


@dataclass(frozen=True)
class Decline:
    """Why a rule did not fire at a site.

    Attributes:
        code: a stable reason code, such as ``"multiple-users"``; tests and filters rely on it.
        template: the message, with a `{}` for each detail.
        node: the node to blame.
        details: what fills the template.
        matched: how many nodes of the pattern had been found, where it was the structure that differed.
        pattern_size: how many there are, where that depends on the site; 0 for the rule's own.
        sizes: the sizes for which it would be otherwise, where it is for those that the rule declines.
    """

    code: str
    template: str
    node: Node | None = None
    details: tuple[object, ...] = ()
    matched: int = 1
    pattern_size: int = 0
    sizes: tuple[SizeRange, ...] = ()

    def __bool__(self) -> bool:
        return False

    @property
    def message(self) -> str:
        """The formatted reason."""
        return self.template.format(*self.details)
