"""What `kernel_time` asks of the process of a runtime, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.layers.layer import Layer
from benchmarks.layers.peak import Peaks
from benchmarks.models.cases import Case


@dataclass(frozen=True)
class Describe:
    """Exports the model of a case as ONNX to `path`; replies `Description`."""

    case: Case
    path: str


@dataclass(frozen=True)
class Description:
    """The layers of a model, and the peaks of the device."""

    layers: tuple[Layer, ...]
    peaks: Peaks


@dataclass(frozen=True)
class Prepare:
    """Builds a runtime and checks its results; replies None."""

    case: Case
    runtime: str
    path: str
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class TakeTurn:
    """Times some calls, then profiles as many; replies the median of the former."""


@dataclass(frozen=True)
class Finish:
    """Replies the parts of each turn, and ends the runtime."""
