"""What a training step keeps between its forward and its backward pass, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Fate = Literal["kept", "recomputed"]


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of the forward pass that the backward pass reads.

    Attributes:
        name: of its node in the joint graph.
        operator: what made it.
        shape: its sizes, ``"8x64x56x56"``.
        dtype: ``"float32"``.
        bytes: the size of its memory at the sizes that were traced; what it would take, where it is computed
            again; 0 where it shares the memory of one that is listed before it.
        readers: the operators of the backward pass that read it.
        fate: ``"kept"`` between the passes, or ``"recomputed"`` by the backward pass.
        rule: the rule that wrote it, or that has it computed again; empty for torch's own choice.
        module: the qualified name of the module that it came from, where it is known.
        location: the user's source line, where the graph carries it.
    """

    name: str
    operator: str
    shape: str
    dtype: str
    bytes: int
    readers: tuple[str, ...]
    fate: Fate = "kept"
    rule: str = ""
    module: str = ""
    location: str = ""

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> SavedTensor:
        """The tensor that `dataclasses.asdict` and JSON made a mapping of."""
        return SavedTensor(**{**data, "readers": tuple(data["readers"])})
