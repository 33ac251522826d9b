"""The steps of a compilation, in order: first come the passes that must see inductor's joint graph first."""

from __future__ import annotations

from fxpasses.backend.compilation import Compilation, Step
from fxpasses.backend.steps.activation_masks import ActivationMasks
from fxpasses.backend.steps.added_rules import AddedRules
from fxpasses.backend.steps.allocator import Allocator
from fxpasses.backend.steps.compared_precision import ComparedPrecision
from fxpasses.backend.steps.eagers_memory import EagersMemory
from fxpasses.backend.steps.given_results import GivenResults
from fxpasses.backend.steps.group_moments import GroupMoments
from fxpasses.backend.steps.input_strides import InputStrides
from fxpasses.backend.steps.planned_layout import PlannedLayout
from fxpasses.backend.steps.safe_kernels import SafeKernels
from fxpasses.backend.steps.saved_tensors import SavedTensors
from fxpasses.backend.steps.tangent_formats import TangentFormats
from fxpasses.backend.steps.weights import KeptWeights, PackedWeights

STEPS: tuple[tuple[type[Step], tuple[type[Step], ...]], ...] = (
    # step, and those where it is left out
    (Allocator, ()),
    (AddedRules, ()),
    (EagersMemory, ()),
    (PackedWeights, ()),
    (KeptWeights, (PackedWeights,)),
    (ActivationMasks, ()),
    # Packed convolutions work in channels-last, no slower than what a plan would choose from.
    (PlannedLayout, (PackedWeights,)),
    (InputStrides, (PlannedLayout,)),
    (SafeKernels, (PlannedLayout,)),
    # It reads in which layout the plan, or packing, has left each image.
    (GroupMoments, ()),
    (TangentFormats, ()),
    (SavedTensors, ()),
    # It sees what all others have made of the graph.
    (GivenResults, (PlannedLayout,)),
    # Last, since it calls what all others have made of the compiled function.
    (ComparedPrecision, ()),
)


def take_steps(compilation: Compilation) -> None:
    """Takes each step that applies and that none of those before it excludes."""
    for step, unless in STEPS:
        compilation.take(step(compilation), unless)
