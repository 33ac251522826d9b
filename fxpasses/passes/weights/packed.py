"""Packed weights: convolutions over kept weights, in the format of whichever implementation is the fastest.

Inductor packs weights only where it freezes a model, and what it freezes is stale after an update. Here the
same operators are written by a pass over inductor's graph, and the packed tensors are ours:

    convolution(x, weight, bias)  ->  mkldnn._convolution_pointwise(x, packed, bias, ...)
    activation(convolution(x, weight, bias) + y)  ->  fxpasses.convolution(x, packed, y, ...)

The second is a kernel of ours (`fxpasses.kernels`), taken where it was measured to be faster.

A packed tensor is a constant of the generated code. When the weights change another takes its place and the
code stays, so a refresh costs one pass over the weights. The code comes from inductor's caches: an artifact
there has the recipes of its constants, not their values. Inductor's own patterns then fuse what follows the
convolution (an activation, a sum) into oneDNN's, as they do in a frozen graph; ours are fused here.

A dense tensor that was packed and that nothing else reads is not needed any more: the graph's input for it
gets a tensor of the same shape and strides without memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.fx import Graph, Node

from fxpasses.devices.caches import far
from fxpasses.errors import FxpassesError
from fxpasses.graph.decline import Decline
from fxpasses.graph.locations import location_of, module_of
from fxpasses.graph.metadata import set_value, tensor
from fxpasses.graph.provenance import inherit
from fxpasses.kernels.choice import keep
from fxpasses.kernels.convolution import ACTIVATIONS, Sizes, kernels_for, pack
from fxpasses.kernels.kernel import Kernel, Kind
from fxpasses.kernels.library import identity, missing
from fxpasses.passes.weights.epilogues import epilogue_of
from fxpasses.passes.weights.one_dimensional import join_images
from fxpasses.passes.weights.own_kernels import (
    OwnKernels,
    before_convolutions,
    is_contiguous,
    made_for_other_kernels,
    may_be_ours,
    own_kernel_of_convolution,
    own_kernel_of_linear,
    sizes_of,
)
from fxpasses.passes.weights.packable import convolves_with, sizes_of_packed, unpackable, write_packed
from fxpasses.passes.weights.products import is_transposition, products_with
from fxpasses.passes.weights.recipes import (
    ArtifactNotes,
    KernelRecipe,
    OneDnnLinearRecipe,
    OneDnnRecipe,
    Recipe,
    name_of,
)
from fxpasses.passes.weights.sequences import write_sequences
from fxpasses.passes.weights.stride_order import in_order
from fxpasses.report import sidecar
from fxpasses.report.data import Remark, Status
from fxpasses.report.report import Report
from fxpasses.torch_internals.constants import Declared, declare, loading, slots_of
from fxpasses.torch_internals.fake_tensors import RealConstantsAllowed, without_fake_tensors
from fxpasses.torch_internals.inductor import (
    record_result_strides,
    tunes_products,
    with_joint_pass,
    writes_cpp_wrapper,
)
from fxpasses.torch_internals.onednn import linears_are_onednns, packed_linear, transposed_convolution
from fxpasses.torch_internals.sizes import size_hint

NAME = "packed_weights"
OWN = "own_kernels"
SEQUENCES = "kernel_sequences"


class Place(Protocol):
    """Where generated code reads a constant."""

    def fill(self, value: torch.Tensor | None) -> None:
        """Has the code read another tensor from its next call on; None when it will not run again."""


@dataclass(frozen=True)
class _Object:
    """A tensor that the code has taken to itself: its content is replaced."""

    constant: torch.Tensor

    def fill(self, value: torch.Tensor | None) -> None:
        if value is not None:
            self.constant.data = value


@dataclass(frozen=True)
class PackedWeight:
    """One constant of the generated code.

    Attributes:
        recipe: what it is made from, and how.
        places: where the code reads it.
    """

    recipe: Recipe
    places: Sequence[Place]


@dataclass
class WeightPacking:
    """The pass of one compilation, and what it packed.

    Attributes:
        examples: metadata of the graph's inputs, the kept tensors last.
        kept: how many of the inputs are kept tensors.
        own: when kernels of ours are taken.
        graph_key: what names the graph among all that are compiled.
        forms: how other graphs of the module have packed a weight, by which of the kept tensors it is: in
            memory it is once, so they are taken where they can be.
        packed: what was packed; known when `compiling` is over.
    """

    examples: Sequence[object]
    kept: int
    own: OwnKernels = "measured"
    graph_key: str = ""
    forms: Mapping[int, Recipe] = field(default_factory=dict)
    packed: list[PackedWeight] = field(default_factory=list)
    _notes: ArtifactNotes = field(default_factory=ArtifactNotes)
    _declared: list[Declared] = field(default_factory=list)
    _ran: bool = False
    _may_be_ours: bool = False
    _in_cpp: bool = False
    _patches: Mapping[str, Any] = field(default_factory=dict)
    _constants_allowed: RealConstantsAllowed = field(default_factory=RealConstantsAllowed)

    @property
    def unread(self) -> frozenset[int]:
        """Which of the kept tensors the code reads only packed."""
        return self._notes.unread

    @property
    def remarks(self) -> list[Remark]:
        """What was packed, and what was not and why."""
        return self._notes.remarks

    def patches(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Inductor's settings with this pass among them."""
        self._patches = given
        return with_joint_pass(given, self._run, lambda: self._key)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """The block in which inductor compiles the graph, or loads what it once made of it."""
        transposed_convolution()  # which code from the cache may call
        with self._constants_allowed, loading() as loaded:
            yield
        keep()
        if self._in_cpp:
            places: Sequence[Sequence[Place]] = [[_Object(one.constant)] for one in self._declared]
            declared = self._declared
        else:
            # An artifact from the cache has constants of its own, even if the pass ran before it was found;
            # and those of artifacts whose guards did not hold are read by nobody.
            declared = [*self._declared, *loaded]
            places = slots_of([one.constant for one in declared])
        found = [(one, slots) for one, slots in zip(declared, places, strict=True) if slots]
        for one, slots in found:
            recipe, self._notes = one.recipe
            if not self._in_cpp:
                one.release()
            self.packed.append(PackedWeight(recipe, slots))
        of_artifact = [one for one in declared if one.recipe[1] is self._notes]
        if len(found) != len(of_artifact) or (declared and not found):
            raise FxpassesError(_UNREAD)

    def completed(self, report: Report) -> Report:
        """The report with what this pass did, or with what it did when the artifact was made."""
        if self._ran:
            known = self._may_be_ours and made_for_other_kernels(self.graph_key, self._patches)
            if isinstance(known, Decline):
                self._decline(known, "")
            sidecar.save(self._name, [asdict(remark) for remark in self.remarks], self._patches)
        elif not self.packed:  # or the artifact told
            try:
                self._notes.remarks = [Remark(**fields) for fields in sidecar.load(self._name)]
            except (OSError, ValueError, TypeError):
                gone = "the graph came from inductor's cache, and the record of what was packed is gone"
                self._decline(Decline("no-record", gone), "")
        remarks = (*report.remarks, *self.remarks)
        return replace(report, remarks=remarks, packed_tensors=len(self.packed))

    @functools.cached_property
    def _far(self) -> bool:
        """Whether the weights are more than the largest cache holds beside the images."""
        weights = (one for one in self.examples[-self.kept :] if isinstance(one, torch.Tensor))
        return 4 * sum(weight.nbytes for weight in weights) > far(torch.device("cpu"))

    @functools.cached_property
    def _key(self) -> str | None:
        """What is packed depends on this, beside the graph and kernels' times; None keeps caches away."""
        if writes_cpp_wrapper():
            return None  # whose constants are tensors of this process
        ours = self.own != "never" and any(map(_may_be_read_by_ours, self.examples[-self.kept :]))
        kernels = identity() if ours else ""
        return sidecar.digest(
            NAME, sidecar.sources(), self.own, str(self.kept), kernels, str(torch.get_num_threads())
        )

    @property
    def _name(self) -> str:
        return sidecar.digest(self._key or NAME, self.graph_key, str(sorted(self._patches)))

    def _run(self, graph: Graph) -> None:
        self._ran, self._in_cpp = True, writes_cpp_wrapper()
        placeholders = graph.find_nodes(op="placeholder")
        if not self._corresponds(placeholders):
            self._decline(Decline("inputs-changed", "AOTAutograd gave the graph other inputs"), "")
            return
        self._may_be_ours = self.own != "never" and any(map(may_be_ours, graph.nodes))
        if self._may_be_ours and (reason := missing()):
            self._decline(Decline("no-kernels", f"there are no kernels of fxpasses: {reason}"), "", OWN)
        join_images(graph)
        first = len(placeholders) - self.kept
        given = before_convolutions(graph)
        for index, weight in enumerate(placeholders[first:]):
            self._pack_linears(graph, weight, placeholders[first:])
            users = list(weight.users)
            if not any(convolves_with(user, weight) for user in users):
                continue
            reasons = [why for user in users if (why := unpackable(user, weight)) is not None]
            if reasons:
                self._decline(reasons[0], users[0].name)
                continue
            for convolution in users:
                planar = convolution.args[0] in given and is_contiguous(convolution.args[0])
                if not self._pack_for_own_kernel(graph, convolution, placeholders[first:], planar):
                    self._pack(graph, convolution, weight, index)
        # Without a kernel of ours its library may not have been loaded, and the operators not exist.
        has_own = any(remark.rule == OWN and remark.status == "applied" for remark in self.remarks)
        if has_own and not self._in_cpp:
            for kernels in write_sequences(graph, functools.partial(self._constant, graph)):
                self.remarks.append(
                    Remark(SEQUENCES, "applied", "applied", f"{kernels} kernels in one call", node="")
                )
        record_result_strides(graph)
        read = {index for one in self._declared for index in one.recipe[0].indices}
        self._notes.unread = frozenset(index for index in read if not placeholders[first + index].users)

    def _corresponds(self, placeholders: Sequence[Node]) -> bool:
        """Whether the graph's inputs are those of the compiled function, one by one."""
        if len(placeholders) != len(self.examples):
            return False
        pairs = zip(placeholders[len(placeholders) - self.kept :], self.examples[-self.kept :], strict=True)
        for placeholder, example in pairs:
            found = tensor(placeholder)
            if found is None or not isinstance(example, torch.Tensor):
                return False
            if (found.shape, found.dtype) != (example.shape, example.dtype):
                return False
        return True

    def _pack(self, graph: Graph, convolution: Node, weight: Node, index: int) -> None:
        """Writes a convolution as oneDNN's over a packed weight."""
        found, image = tensor(weight), tensor(convolution.args[0])
        assert found is not None
        assert image is not None
        given: Any = tuple(convolution.args[3:])
        recipe = OneDnnRecipe((index,), given, tuple(map(size_hint, image.shape)))
        with graph.inserting_before(convolution):
            read = self._declare(graph, recipe, found.new_empty(sizes_of_packed(convolution, found)))
            written = write_packed(graph, convolution, read)
        _replace(graph, convolution, written)

    def _constant(self, graph: Graph, name: str, constant: torch.Tensor, value: torch.Tensor) -> Node:
        """A node that reads a constant, with `value` as its metadata."""
        assert graph.owning_module is not None, "inductor's graphs have a module"
        graph.owning_module.register_buffer(name, constant)
        read = graph.get_attr(name)
        set_value(read, value)
        return read

    def _declare(self, graph: Graph, recipe: Recipe, like: torch.Tensor) -> Node:
        """A node that reads what a recipe makes, from a tensor of the same shape and dtype."""
        self._constants_allowed.allow(like)
        name = name_of(len(self._declared), recipe)
        told = (recipe, self._notes)
        if self._in_cpp:
            declared = Declared(_packed_zeros(recipe, self.examples[-self.kept :]), told)
        else:
            declared = declare(like.shape, like.dtype, told)
        self._declared.append(declared)
        return self._constant(graph, name, declared.constant, like.new_empty(like.shape))

    def _pack_for_own_kernel(
        self, graph: Graph, convolution: Node, kept: Sequence[Node], planar: bool
    ) -> bool:
        """Writes a convolution and what follows it as our operator, if that is faster; whether it did."""
        image, weight, bias, *_ = convolution.args
        result = tensor(convolution)
        sizes = sizes_of(convolution)
        if sizes is None or result is None or 0 in map(size_hint, result.shape):
            return False
        if bias is not None and bias not in kept:
            live = Decline("live-bias", "its bias is worked out in every call", convolution)
            self._remark(convolution, "declined", live.message, live.code)
            return False
        form = self.forms.get(kept.index(weight))
        if self.own == "measured" and isinstance(form, OneDnnRecipe):
            return False
        pixels = math.prod(map(size_hint, result.shape)) // sizes.filters
        kernel = self._kernel_in_use(form, sizes, pixels, planar=planar)
        if kernel is None:
            kernel = own_kernel_of_convolution(self.own, convolution, sizes, planar=planar, far=self._far)
        if isinstance(kernel, Kernel):
            self._write(graph, convolution, (image, weight, bias), kept, sizes, kernel)
            return True
        if kernel is not None:
            self._remark(convolution, "declined", kernel.message, kernel.code)
        return False

    def _kernel_in_use(
        self, form: Recipe | None, sizes: Sizes, pixels: int, *, planar: bool = False
    ) -> Kernel | Decline | None:
        """The kernel that reads a weight as another graph has packed it, if there is one."""
        if self.own != "measured" or not isinstance(form, KernelRecipe):
            return None
        if form.kernel.kind is Kind.WINOGRAD:  # which reads any number of pixels
            return None if planar else form.kernel
        kernels = kernels_for(sizes, pixels, planar=planar)
        return next((kernel for kernel in kernels if kernel.packing == form.kernel.packing), None)

    def _pack_linears(self, graph: Graph, weight: Node, kept: Sequence[Node]) -> None:
        """Writes the products with a transposed weight as our operator, where that is faster, or oneDNN's."""
        found = tensor(weight)
        if found is None or found.ndim != 2 or not weight.users:
            return
        transposed = [node for node in weight.users if is_transposition(node)]
        packs_linears = linears_are_onednns(found.dtype) and not tunes_products()
        for product, image, bias, value in products_with(transposed):
            rows = math.prod(map(size_hint, value.shape[:-1]))
            if packs_linears and value.dtype == found.dtype:
                recipe = OneDnnLinearRecipe((kept.index(weight),), rows)
                with graph.inserting_before(product):
                    read = self._declare(graph, recipe, found)
                    operator, arguments = packed_linear(image, read, bias)
                    written = graph.call_function(operator, arguments)
                _replace(graph, product, written)
                continue
            if not (bias is None or bias in kept):
                continue
            sizes = Sizes.of_linear(found.shape[1], found.shape[0])
            kernel = self._kernel_in_use(self.forms.get(kept.index(weight)), sizes, rows)
            if kernel is None:
                kernel = own_kernel_of_linear(self.own, sizes, value)
            if isinstance(kernel, Kernel):
                self._write(graph, product, (image, weight, bias), kept, sizes, kernel)
        for node in transposed:
            if not node.users:
                graph.erase_node(node)

    def _write(
        self,
        graph: Graph,
        producer: Node,
        operands: tuple[Any, Any, Any],
        kept: Sequence[Node],
        sizes: Sizes,
        kernel: Kernel,
    ) -> None:
        """Replaces a convolution or linear layer, and what follows it, by our operator."""
        image, weight, bias = operands
        filters = tensor(weight)
        assert filters is not None
        positions = {node: position for position, node in enumerate(kept)}
        indices = (positions[weight], *((positions[bias],) if bias is not None else ()))
        recipe = KernelRecipe(indices, sizes, kernel)
        with without_fake_tensors():
            length = pack(sizes, kernel, torch.empty(filters.shape, device="meta"), None).numel()
        epilogue = epilogue_of(producer, summand=kernel.kind is not Kind.DEPTHWISE)
        last, summand = epilogue.last, epilogue.summand
        with graph.inserting_before(last):
            read = self._declare(graph, recipe, filters.new_empty(length))
            arguments = (
                in_order(graph, image, planar=kernel.planar),
                read,
                None if summand is None else in_order(graph, summand),
                sizes.argument(kernel),
                kernel.code,
                ACTIVATIONS.index(epilogue.activation),
                epilogue.low,
                epilogue.high,
            )
            written = graph.call_function(torch.ops.fxpasses.convolution.default, arguments)
        inherit(written, (producer, last), OWN)
        last.replace_all_uses_with(written)
        for node in sorted(epilogue.nodes, reverse=True):
            graph.erase_node(node)
        self._remark(producer, "applied", f"kernel {kernel.code}, followed by {epilogue.activation}")

    def _remark(self, node: Node, status: Status, message: str, code: str = "applied") -> None:
        """What happened to a node that a kernel of ours may compute."""
        stage = "applied" if status == "applied" else "profit"
        location, module = location_of(node), module_of(node)
        self.remarks.append(Remark(OWN, status, code, message, node.name, location, stage, module))

    def _decline(self, why: Decline, node: str, rule: str = NAME) -> None:
        self.remarks.append(Remark(rule, "declined", why.code, why.message, node=node, stage="check"))


def _may_be_read_by_ours(kept: object) -> bool:
    """Whether a kernel of ours may read it: as the weight of a 2-D convolution or a linear layer."""
    return isinstance(kept, torch.Tensor) and kept.dtype == torch.float32 and kept.ndim in (2, 4)


_UNREAD = (
    "the code that inductor generated does not read a packed weight under the name that it was given, so "
    "that it cannot be filled. Compile with options={'weights': 'live'}, and please report the model."
)


def _packed_zeros(recipe: Recipe, kept: Sequence[object]) -> torch.Tensor:
    """What a recipe makes of zeros; the values come before the first call."""
    given: list[Any] = [kept[index] for index in recipe.indices]
    with without_fake_tensors():
        return recipe.pack(*(torch.zeros(one.shape, dtype=one.dtype) for one in given))


def _replace(graph: Graph, node: Node, written: Node) -> None:
    inherit(written, (node,), NAME)
    node.replace_all_uses_with(written)
    graph.erase_node(node)
