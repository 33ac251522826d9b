"""Weights that are kept between calls: what depends on parameters alone is done once per version of them.

    graph(parameters, x)  ->  main(parameters, x, kept)      kept: computed again when a parameter changes

Where inductor compiles for a CPU, and the user left layouts to us, weights are packed for their kernels too.
"""

from __future__ import annotations

import contextlib
import functools
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
from fxpasses.passes.weights.kept import InUse
from fxpasses.passes.weights.kept import KeptWeights as KeptTensors
from fxpasses.passes.weights.own_kernels import OwnKernels, own_kernel_of_linear
from fxpasses.passes.weights.packed import WeightPacking
from fxpasses.passes.weights.parameter_work import PacksLinear, ParameterWork, split_parameter_work
from fxpasses.report.report import Report
from fxpasses.torch_internals.aot_autograd import is_module_tensor
from fxpasses.torch_internals.dynamo import real_tensor_of

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
        for left_out in found.left_out:
            self.compilation.refuse(self, left_out, str(left_out.node))
        return True

    def handed(self, given: Handed) -> Handed:
        own = (given.inputs[position] for position in self.work.inputs)
        return Handed(self.work.main, [*own, *self.work.examples])

    def _kept(self, function: Compiled, *packed: Any) -> KeptTensors:
        everywhere = self.compilation.options.sentinels == "all"
        return KeptTensors(function, self.work, *packed, everywhere=everywhere)

    def reported(self, report: Report) -> Report:
        return replace(report, kept_tensors=len(self.work.examples), kept_bytes=self.work.kept_bytes)


class KeptWeights(_Split):
    """Weights are kept, in the format of the graph."""

    def applies(self) -> bool | Decline:
        if self.compilation.options.weights != "cached" or packs(self.compilation):
            return False
        if not self.compilation.keeps_weights:
            return Decline("grad-mode", "gradients are recorded, and kept weights would cut them off")
        return self._split(None)

    def compiled(self, function: Compiled) -> Compiled:
        return self._kept(function)


class PackedWeights(_Split):
    """Weights are kept, those of convolutions and linear layers in the format of their kernel."""

    packing: WeightPacking

    def applies(self) -> bool | Decline:
        return packs(self.compilation) and self._split(self._packs_linear)

    def _packs_linear(self, name: str, channels: int, filters: int, given: Any) -> bool:
        if self._own == "measured" and self._in_use.names:
            return name in self._in_use.names  # as in another graph of the module: it is in memory once
        sizes = Sizes.of_linear(channels, filters)
        return isinstance(own_kernel_of_linear(self._own, sizes, given), Kernel)

    @functools.cached_property
    def _in_use(self) -> InUse:
        """What other graphs of the module keep."""
        inputs = self.compilation.graph_module.graph.find_nodes(op="placeholder")
        given = (real_tensor_of(node) for node in inputs if is_module_tensor(node))
        return InUse.of(tensor for tensor in given if tensor is not None)

    @property
    def _own(self) -> OwnKernels:
        return self.compilation.own_kernels or _OWN_KERNELS[self.compilation.options.profit]

    def handed(self, given: Handed) -> Handed:
        handed = super().handed(given)
        key = self.compilation.graph_key
        known = self._in_use.forms
        forms = {index: known[made_of] for index, made_of in enumerate(self.work.keys) if made_of in known}
        self.packing = WeightPacking(handed.inputs, len(self.work.examples), self._own, key, forms)
        return handed

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return self.packing.patches(given)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with self.packing.compiling():
            yield

    def compiled(self, function: Compiled) -> Compiled:
        return self._kept(function, self.packing.packed, self.packing.unread)

    def reported(self, report: Report) -> Report:
        return self.packing.completed(super().reported(report))


def packs(compilation: Compilation) -> bool:
    """Whether weights are kept and packed, which they are unless the user asked for a layout."""
    options = compilation.options
    return compilation.keeps_weights and compilation.for_inductor_on_cpu and options.layout in ("auto", "off")
