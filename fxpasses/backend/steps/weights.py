"""Weights that are kept between calls: what depends on parameters alone is done once per version of them.

    graph(parameters, x)  ->  main(parameters, x, kept)      kept: computed again when a parameter changes

Where inductor compiles for a CPU, and the user left layouts to us, weights are packed for their kernels too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fxpasses.backend.compilation import Compilation, Compiled, Handed, Step
from fxpasses.graph.context import GraphContext
from fxpasses.graph.copying import copy_graph_module
from fxpasses.graph.decline import Decline
from fxpasses.graph.modes import Modes
from fxpasses.kernels.convolution import Sizes
from fxpasses.kernels.kernel import Kernel
from fxpasses.passes.weights.kept import KeptWeights as KeptTensors
from fxpasses.passes.weights.own_kernels import OwnKernels, own_kernel_of_linear
from fxpasses.passes.weights.packed import WeightPacking
from fxpasses.passes.weights.parameter_work import PacksLinear, ParameterWork, split_parameter_work
from fxpasses.pipeline import keeps_weights
from fxpasses.report.report import Report

_OWN_KERNELS: dict[str, OwnKernels] = {"model": "measured", "always": "always"}
"""When kernels of ours are taken, by `Options.profit`."""


class _Split(Step):
    """Splits the graph in two, and hands on the part that reads kept tensors."""

    name: ClassVar[str] = "kept_weights"
    work: ParameterWork

    def _split(self, packs_linear: PacksLinear | None) -> bool | Decline:
        # The split changes its graph, which stays as it was where there is nothing to keep.
        copied = copy_graph_module(self.compilation.graph_module)
        context = GraphContext(module=copied, initial_modes=Modes(grad=False))
        for_cpu = self.compilation.for_inductor_on_cpu
        found = split_parameter_work(context, for_cpu=for_cpu, packs_linear=packs_linear)
        if isinstance(found, Decline):
            return found
        self.work = found
        return True

    def handed(self, given: Handed) -> Handed:
        own = (given.inputs[position] for position in self.work.inputs)
        return Handed(self.work.main, [*own, *self.work.examples])

    def reported(self, report: Report) -> Report:
        return replace(report, kept_tensors=len(self.work.examples), kept_bytes=self.work.kept_bytes)


class KeptWeights(_Split):
    """Weights are kept, in the format of the graph."""

    def applies(self) -> bool | Decline:
        options = self.compilation.options
        if options.weights != "cached" or packs(self.compilation):
            return False
        if not keeps_weights(options):
            return Decline("grad-mode", "gradients are on, and kept weights would cut them off")
        return self._split(None)

    def compiled(self, function: Compiled) -> Compiled:
        return KeptTensors(function, self.work)


class PackedWeights(_Split):
    """Weights are kept, those of convolutions and linear layers in the format of their kernel."""

    packing: WeightPacking

    def applies(self) -> bool | Decline:
        return packs(self.compilation) and self._split(self._packs_linear)

    def _packs_linear(self, channels: int, filters: int, given: Any) -> bool:
        sizes = Sizes.of_linear(channels, filters)
        return isinstance(own_kernel_of_linear(self._own, sizes, given), Kernel)

    @property
    def _own(self) -> OwnKernels:
        return self.compilation.own_kernels or _OWN_KERNELS[self.compilation.options.profit]

    def handed(self, given: Handed) -> Handed:
        handed = super().handed(given)
        self.packing = WeightPacking(handed.inputs, len(self.work.examples), self._own)
        return handed

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return self.packing.patches(given)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with self.packing.constants_allowed:
            yield

    def compiled(self, function: Compiled) -> Compiled:
        return KeptTensors(function, self.work, self.packing.packed, self.packing.unread)

    def reported(self, report: Report) -> Report:
        remarks = (*report.remarks, *self.packing.remarks)
        packed = len(self.packing.packed)
        return replace(super().reported(report), remarks=remarks, packed_tensors=packed)


def packs(compilation: Compilation) -> bool:
    """Whether weights are kept and packed, which they are unless the user asked for a layout."""
    options = compilation.options
    return keeps_weights(options) and compilation.for_inductor_on_cpu and options.layout in ("auto", "off")
