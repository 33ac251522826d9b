"""Costs: how many seconds an operator or a copy takes under each label, as an expression of the sizes.

In this order: what a device profile measured for exactly this operator, arguments and sizes; for a
convolution, what it measured of those that resemble it; else a roofline from the profile's peaks; else a
roofline from coarse peaks of the kind of device. A roofline knows no layout, so a convolution under the label
that its kernels do not work in pays, on top, for reordering its activations there and back: oneDNN on a CPU
and tensor cores in half precision work in channels_last.

A measurement holds at the sizes it was made at; at others it is scaled with the roofline. A static graph's
costs are plain numbers; with symbolic sizes they are sympy expressions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.fx import Node

from fxpasses.devices.convolutions import Convolution
from fxpasses.devices.prediction import Predictor
from fxpasses.devices.profile import COLD, OPERATORS_OF_CONVOLUTIONS, DeviceProfile, Estimate, Roofline
from fxpasses.devices.sizes import ConvolutionSizes, Seconds, product
from fxpasses.graph.layouts import C, L, Label
from fxpasses.graph.metadata import value
from fxpasses.passes.layout.measurable import named
from fxpasses.torch_internals.pytree import tree_leaves
from fxpasses.torch_internals.sizes import size_expression, size_hint

_T = TypeVar("_T")

_PEAKS = {
    "cpu": Roofline("float32", 6e10, 5e10, 1e10, 5e-6),
    "cuda": Roofline("float32", 4e13, 3e13, 1.5e12, 5e-6),
}
"""Orders of magnitude of a small CPU and of a data-centre GPU, for devices that nobody has measured."""

_ROOFLINE = "roofline"
_PREDICTED = "predicted"

_ROOFLINE_FACTOR = 4.0
"""A roofline is a bound: what runs may take so many times as long, and coarse peaks may be as far off."""

PRODUCT = "mm"
"""What a profile calls the matrix product that a 1x1 convolution is, channels-last."""

_MEASURED_FACTOR = 1.05
"""What two measurements of one kernel differ by."""

_OPERATOR_FACTOR = 2.0
"""The same of an operator that moves data, whose layouts differ by less."""

_CONVOLUTION = ("aten.convolution",)
_WITH_PRODUCT = (*_CONVOLUTION, PRODUCT)

_PRODUCT_MARGIN = 1.1
"""How many times faster a matrix product must have been measured than the convolution: less is what two
measurements of one kernel differ by."""

_PRODUCT_PASSES = 2
"""How often a matrix product's input and result are charged to pass through a CPU's memory beyond what was
measured hot: such a measurement repeats one call, with both in the cache, and the library packs what it
multiplies. One with cold operands has that in it.
On an EPYC of family 25, in float32, eight products that were measured to gain 0.9 ms made mobilenetv2_100 at
batch 8 2.3 % slower (75 ms), and one measured to gain 0.05 ms made regnety_008 at batch 1 lose 0.2 ms.
Seen within three models at batch 1, those that promise more than two passes gain 0.9 ms together."""

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Cost:
    """What an operator costs under one label: seconds, and the implementation that takes them.

    Attributes:
        seconds: the best guess.
        implementation: what runs, or what the guess is.
        factor: the truth is expected between `seconds / factor` and `seconds * factor`.
    """

    seconds: Seconds
    implementation: str
    factor: float = 1.0

    @property
    def is_measured(self) -> bool:
        """Whether a profile says so: a guess names itself as the implementation."""
        return _ROOFLINE not in self.implementation and not self.is_predicted

    @property
    def is_predicted(self) -> bool:
        """Whether it follows from measurements of what resembles it, at least in part."""
        return _PREDICTED in self.implementation


@dataclass
class CostModel:
    """Costs on one device.

    Attributes:
        device_type: ``"cpu"`` or ``"cuda"``.
        profile: what was measured there; None for the roofline alone.
        hints: the values of the size symbols at which the profile's measurements are looked up.
        generates: whether copies, and all operators but convolutions, are generated for this graph and move
            data as fast as the device can, in either layout. What was measured of them is eager's kernels:
            on an H200, those copy to another layout five times slower than what inductor generates.
    """

    device_type: str = "cpu"
    profile: DeviceProfile | None = None
    hints: Mapping[Any, int] = field(default_factory=dict)
    generates: bool = False
    _predictor: Predictor | None = None
    _known: dict[object, dict[Label, Cost]] = field(default_factory=dict)
    _copies: dict[object, Seconds] = field(default_factory=dict)

    def convolution(
        self,
        sizes: ConvolutionSizes,
        dtype: torch.dtype,
        directions: Sequence[str],
        *,
        as_product: bool = False,
    ) -> dict[Label, Cost]:
        """The cost of a convolution's `directions` together, under each label.

        Args:
            sizes: the convolution.
            dtype: of its input.
            directions: `profile.CONVOLUTION_FORWARD` or the two of its gradients.
            as_product: whether a matrix product may take its place, where that was measured to be faster.
        """
        allowed = _WITH_PRODUCT if as_product else _CONVOLUTION
        parts = [self._direction(sizes, dtype, direction, allowed) for direction in directions]
        return {
            label: Cost(
                sum(part[label].seconds for part in parts),
                "+".join(dict.fromkeys(part[label].implementation for part in parts)),
                max((part[label].factor for part in parts), default=1.0),
            )
            for label in (C, L)
        }

    def learn(self, profile: DeviceProfile) -> None:
        """Takes costs from another profile from now on."""
        self.profile = profile
        self._known.clear()
        self._copies.clear()
        self._predictor = None

    def lacks(self, operator: str, key: str, dtype: torch.dtype) -> bool:
        """Whether the profile does not have measurements of an operator under both labels."""
        allowed = _CONVOLUTION if operator in OPERATORS_OF_CONVOLUTIONS else None
        return len(self._rows(operator, key, dtype, allowed)) < 2

    def knows(self, sizes: ConvolutionSizes, dtype: torch.dtype, directions: Sequence[str]) -> bool:
        """Whether the profile has measurements of a convolution in all `directions`, under both labels."""
        key = sizes.key()
        return not any(self.lacks(direction, key, dtype) for direction in directions)

    def _direction(
        self, sizes: ConvolutionSizes, dtype: torch.dtype, direction: str, allowed: tuple[str, ...]
    ) -> dict[Label, Cost]:
        key = (direction, sizes.key(), dtype, allowed, *map(_exact, (*sizes.input, *sizes.weight)))
        if key not in self._known:
            floor = self._convolution_roofline(sizes, dtype)
            least_gain = self._passes(sizes, dtype) if PRODUCT in allowed else 0.0
            measured = self._measured(direction, sizes.key(), dtype, floor, allowed, least_gain)
            self._known[key] = measured or self._predicted(direction, sizes, dtype, floor) or floor
        return self._known[key]

    def _predicted(
        self, direction: str, sizes: ConvolutionSizes, dtype: torch.dtype, floor: Mapping[Label, Cost]
    ) -> dict[Label, Cost] | None:
        """What measurements of convolutions that resemble it say of both labels, or None."""
        if self.profile is None:
            return None
        self._predictor = self._predictor or Predictor(self.profile)
        case, found = Convolution.at_hints(sizes), {}
        for label in (C, L):
            prediction = self._predictor.predict(direction, case, label, _name(dtype))
            if prediction is None:
                return None
            seconds = self._rescaled(prediction.seconds, floor[label].seconds)
            found[label] = Cost(seconds, _PREDICTED, prediction.factor)
        return found

    def _convolution_roofline(self, sizes: ConvolutionSizes, dtype: torch.dtype) -> dict[Label, Cost]:
        peaks = self._peaks(dtype)
        activations = _activations(sizes, dtype)
        moved = activations + product(sizes.weight) * dtype.itemsize
        seconds = peaks.call_seconds + _larger(sizes.flops / peaks.convolution_flops, moved / peaks.bandwidth)
        native = self._native(sizes, dtype)
        reorder = 2 * activations / peaks.bandwidth
        return {
            label: Cost(seconds if label == native else seconds + reorder, _ROOFLINE, _ROOFLINE_FACTOR)
            for label in (C, L)
        }

    def _passes(self, sizes: ConvolutionSizes, dtype: torch.dtype) -> float:
        """How many seconds a matrix product must gain over a convolution, beyond the margin."""
        if self.device_type != "cpu" or self.profile is None or self.profile.operands == COLD:
            return 0.0
        once = _activations(sizes, dtype) / self._peaks(dtype).bandwidth
        return _PRODUCT_PASSES * seconds_at(once, self.hints)

    def _native(self, sizes: ConvolutionSizes, dtype: torch.dtype) -> Label:
        """The label that the library's kernels work in."""
        if self.device_type == "cpu":
            # oneDNN has no float64; torch's own kernels for it read contiguous tensors.
            return C if dtype == torch.float64 else L
        # cuDNN's tensor-core kernels for several channels a group are slower in NHWC (inductor's
        # decide_layout_opt measured 1.358x).
        is_grouped = sizes.groups > 1 and not (isinstance(sizes.weight[1], int) and sizes.weight[1] == 1)
        return L if dtype in _HALF and not is_grouped else C

    def operator(self, node: Node, dtype: torch.dtype, *, as_measured: bool = True) -> dict[Label, Cost]:
        """The cost under each label of an operator that moves data, such as pooling or a reduction.

        Args:
            node: the operator.
            dtype: of what it reads.
            as_measured: whether measurements of it in either layout hold, as they do of images.
        """
        tensors = [
            leaf for given in (*node.all_input_nodes, node) for leaf in tree_leaves(value(given))
            if isinstance(leaf, torch.Tensor)
        ]  # fmt: skip
        signature = [(tuple(map(_exact, tensor.shape)), tensor.dtype) for tensor in tensors]
        key = (str(node.target), tuple(signature), str(node.args), str(node.kwargs), as_measured)
        if key not in self._known:
            peaks = self._peaks(dtype)
            moved = sum(_bytes(tensor) for tensor in tensors)
            seconds = peaks.call_seconds + moved / peaks.bandwidth
            floor = {label: Cost(seconds, _ROOFLINE, _OPERATOR_FACTOR) for label in (C, L)}
            measured = self._measured_operator(node, dtype, floor) if as_measured else None
            self._known[key] = measured or floor
        return self._known[key]

    def _measured_operator(
        self, node: Node, dtype: torch.dtype, floor: Mapping[Label, Cost]
    ) -> dict[Label, Cost] | None:
        if self.profile is None or self.generates:
            return None
        found = named(node)
        return found and self._measured(*found, dtype, floor)

    def copy(self, given: torch.Tensor, to: Label, *, of_weight: bool = False) -> Seconds:
        """The cost of copying a tensor into the layout of a label.

        Args:
            given: an image, or with `of_weight` the weight of a convolution.
            to: the label.
            of_weight: whose copies are measured apart, since its rows are short.
        """
        key = (to, of_weight, given.dtype, *map(_exact, given.shape))
        if key not in self._copies:
            self._copies[key] = self._copy(given, to, of_weight)
        return self._copies[key]

    def copy_factor(self, dtype: torch.dtype) -> float:
        """How far the truth may be from what a copy costs: 1 where copies were measured, or are generated."""
        profile = self.profile
        if self.generates:
            return 1.0
        known = profile and self._known_of(dtype, lambda name: profile.copy_seconds(1, C, name))
        return 1.0 if known else _OPERATOR_FACTOR

    def _copy(self, given: torch.Tensor, to: Label, of_weight: bool) -> Seconds:
        num_bytes = _bytes(given)
        peaks = self._peaks(given.dtype)
        floor = peaks.call_seconds + 2 * num_bytes / peaks.bandwidth
        hint = math.prod(map(size_hint, given.shape)) * given.dtype.itemsize
        profile = self.profile
        if profile is None or self.generates:
            return floor
        measured = self._known_of(
            given.dtype, lambda name: profile.copy_seconds(hint, to, name, of_weight=of_weight)
        )
        return floor if measured is None else self._rescaled(measured, floor)

    def _measured(
        self,
        operator: str,
        key: str,
        dtype: torch.dtype,
        floor: Mapping[Label, Cost],
        allowed: tuple[str, ...] | None = None,
        least_gain: float = 0.0,
    ) -> dict[Label, Cost] | None:
        """What the profile measured; None unless it knows both labels: one alone does not compare."""
        rows = self._rows(operator, key, dtype, allowed, least_gain)
        if len(rows) < 2:
            return None
        return {
            label: Cost(
                self._rescaled(row.seconds, floor[label].seconds), row.implementation, _MEASURED_FACTOR
            )
            for label, row in rows.items()
        }

    def _rows(
        self,
        operator: str,
        key: str,
        dtype: torch.dtype,
        allowed: tuple[str, ...] | None,
        least_gain: float = 0.0,
    ) -> dict[Label, Estimate]:
        """The fastest implementation measured under each label, of those that can be brought about.

        A matrix product must have been faster than the convolution by `least_gain` seconds.
        """
        if self.profile is None:
            return {}
        found: dict[Label, Estimate] = {}
        for label in (C, L):
            row = self._row(operator, key, label, dtype, allowed, least_gain)
            if row is not None:
                found[label] = row
        return found

    def _row(
        self,
        operator: str,
        key: str,
        label: Label,
        dtype: torch.dtype,
        allowed: tuple[str, ...] | None,
        least_gain: float,
    ) -> Estimate | None:
        profile = self.profile
        assert profile is not None

        def fastest(implementations: tuple[str, ...] | None) -> Estimate | None:
            return self._known_of(
                dtype,
                lambda dtype_name: profile.seconds(
                    operator, key, label, dtype_name, implementations=implementations
                ),
            )

        row = fastest(allowed)
        if row is None or row.implementation != PRODUCT:
            return row
        library = fastest(_CONVOLUTION)
        if library is None or (
            library.seconds > _PRODUCT_MARGIN * row.seconds and library.seconds - row.seconds > least_gain
        ):
            return row
        return library

    def _known_of(self, dtype: torch.dtype, ask: Callable[[str], _T | None]) -> _T | None:
        """What a profile knows of a type, by its name; of a half type on a GPU, what it knows of the other.

        A GPU's kernels for the two differ in how they round.
        """
        names = [_name(dtype)]
        if self.device_type == "cuda" and dtype in _HALF:
            names += [_name(half) for half in _HALF if half != dtype]
        return next((found for found in map(ask, names) if found is not None), None)

    def _rescaled(self, measured: float, floor: Seconds) -> Seconds:
        """A measurement made at the hints, carried to other sizes in proportion to the roofline."""
        return (
            measured if isinstance(floor, (int, float)) else measured * floor / seconds_at(floor, self.hints)
        )

    def _peaks(self, dtype: torch.dtype) -> Roofline:
        found = self._known_of(dtype, self.profile.roofline) if self.profile else None
        found = found or (self.profile.roofline() if self.profile else None)
        return found or _PEAKS.get(self.device_type, _PEAKS["cuda"])


def _activations(sizes: ConvolutionSizes, dtype: torch.dtype) -> Any:
    """The bytes of a convolution's input and result."""
    return (product(sizes.input) + product(sizes.output)) * dtype.itemsize


def seconds_at(seconds: Seconds, sizes: Mapping[Any, int]) -> float:
    """The cost at given values of the size symbols."""
    return float(seconds) if isinstance(seconds, (int, float)) else float(seconds.subs(sizes))


def _exact(size: int | torch.SymInt) -> object:
    """Something hashable that tells sizes apart without a guard."""
    return size_expression(size)


def _bytes(given: torch.Tensor) -> Any:
    return product(given.shape) * given.dtype.itemsize


def _larger(first: Any, second: Any) -> Any:
    if isinstance(first, (int, float)) and isinstance(second, (int, float)):
        return max(first, second)
    import sympy

    return sympy.Max(first, second)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
