"""Where the costs of a graph come from: a profile that knows its convolutions, or measuring while compiling.

layout_profile=FILE     that file, and nothing is measured
the device's own store  where it knows the graph's convolutions
a shipped profile       where that does
measuring               adds what is missing to the own store (tune_seconds)
neither                 the profile that knows more of them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxpasses.devices import store
from fxpasses.devices.own import OwnStore, own_store
from fxpasses.devices.profile import DeviceProfile
from fxpasses.options import Options
from fxpasses.passes.layout.convolutions import ConvolutionReading
from fxpasses.passes.layout.costs import CostModel
from fxpasses.passes.layout.tuning import Tuner

_MEASURED = ("cpu", "cuda")
"""The types of devices that can be measured."""


@dataclass(frozen=True)
class CostSource:
    """Where costs come from.

    Attributes:
        profile: what was measured; None where nothing was.
        tuner: measures what is missing; None where nothing may be measured.
        key: what compiled code depends on: the same in every process, whatever is measured meanwhile.
        known: how many of the graph's convolutions the profile knows.
    """

    profile: DeviceProfile | None
    tuner: Tuner | None = None
    key: str = ""
    known: int = 0


def cost_source(
    device: torch.device, options: Options, convolutions: Sequence[ConvolutionReading]
) -> CostSource:
    """Where the costs of a graph come from.

    Args:
        device: on which it runs.
        options: what the user chose.
        convolutions: those of the graph, with the directions whose costs matter.
    """
    name = store.device_name(device)
    if options.layout_profile is not None:
        named = store.load(options.layout_profile, device=name)
        return _given(named, _known(named, device, convolutions))
    own, given = own_store(device), store.find(name)
    measures = options.tune_seconds > 0 and device.type in _MEASURED
    tuner = Tuner(own, device, options.tune_seconds) if measures else None
    known = own.profile()
    of_own, of_given = (_known(found, device, convolutions) for found in (known, given))
    if of_given > of_own and (tuner is None or of_given == len(convolutions)):
        return _given(given, of_given)
    if not known.measurements and tuner is None:
        return _given(given, of_given)
    return CostSource(known, tuner, _identity(own, known), of_own)


def _given(profile: DeviceProfile | None, known: int) -> CostSource:
    return CostSource(profile, None, profile.digest if profile is not None else "", known)


def _known(
    profile: DeviceProfile | None, device: torch.device, convolutions: Sequence[ConvolutionReading]
) -> int:
    """How many of the convolutions a profile knows."""
    if profile is None:
        return 0
    costs = CostModel(device.type, profile)
    return sum(costs.knows(read.sizes, read.dtype, read.directions) for read in convolutions)


def _identity(own: OwnStore, known: DeviceProfile) -> str:
    # Not the rows: what one graph has had measured must not make the compiled code of all others stale.
    return f"{own.path.name} {known.revision}"
