"""Torch's profile of compiled code: operators that it calls, and kernels that inductor generated.

An operator's arguments are found by the names in its schema. Of a call of `fxpasses::sequence` the steps have
times of their own, noted by its kernels; those of a chain share its time by what its threads spent in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.layers.layer import Layer
from benchmarks.layers.matching import Work, matched
from benchmarks.layers.part import Part, ProfileError, other_kind
from benchmarks.torch_internals import operator_arguments
from fxpasses.kernels.kernel import Kind
from fxpasses.kernels.sequence import GATHER, MAX, MEAN, SUM
from fxpasses.kernels.step_times import StepTime

CALL = "benchmarks.kernel_time: one call"
_SEQUENCE = "fxpasses::sequence"
_OWN = "fxpasses::convolution"
_CONVOLUTIONS = ("mkldnn::_convolution_pointwise", "mkldnn::_convolution_pointwise_", "aten::convolution")
_LINEARS = ("mkldnn::_linear_pointwise", "mkl::_mkl_linear", "aten::addmm", "aten::mm")
_IMAGES, _WEIGHTS = ("X", "input", "mat1", "self"), ("W", "ORI_W", "weight", "mat2")
"""What operators call them; where several are there, the first is it."""


@dataclass(frozen=True)
class Call:
    """One kernel of one call: its name, its seconds, and the convolution that it is, if it is one.

    `unknown` says that it may compute a layer, and its arguments do not say which.
    """

    name: str
    seconds: float
    work: Work | None = None
    unknown: bool = False
    kind: str = ""


def calls_of(events: Any, steps: Sequence[StepTime]) -> list[list[Call]]:
    """The kernels of each call that was recorded under the name `CALL`.

    Args:
        events: `torch.profiler.profile.events()`, recorded with shapes.
        steps: of all sequences in them.

    Raises:
        ProfileError: the steps are not those of the sequences.
    """
    sequences = _by_sequence(steps)
    roots = sorted(
        (event for event in events if event.name == CALL), key=lambda event: event.time_range.start
    )
    found = []
    for root in roots:
        calls: list[Call] = []
        for event in _kernels(root):
            if event.name != _SEQUENCE:
                calls.append(_call(event))
            elif sequences:
                calls += [call for step in sequences.pop(0) for call in _calls_of_step(step)]
            else:
                raise ProfileError("a sequence noted no steps")
        found.append(calls)
    if sequences:
        raise ProfileError(f"{len(sequences)} sequences noted steps, and are not in the profile")
    return found


def parts_of(calls: Sequence[Call], layers: Sequence[Layer]) -> list[Part]:
    """The parts of one call of the model."""
    works = [call.work for call in calls if call.work is not None]
    found = iter(matched(layers, works))
    parts = []
    for call in calls:
        if call.work is not None:
            parts.append(Part(call.name, call.seconds, next(found), kernel=call.name))
        elif call.unknown:
            parts.append(Part(call.name, call.seconds, None, kernel=call.name))
        else:
            parts.append(Part(call.name, call.seconds, (), call.kind))
    return parts


def _by_sequence(steps: Sequence[StepTime]) -> list[list[StepTime]]:
    found: list[list[StepTime]] = []
    for step in steps:
        if step.is_first:
            found.append([])
        found[-1].append(step)
    return found


def _kernels(event: Any) -> Iterator[Any]:
    """The outermost operators and generated kernels below an event, in order."""
    for child in sorted(event.cpu_children, key=lambda child: child.time_range.start):
        if "::" in child.name or "cpp_fused" in child.name:
            yield child
        else:
            yield from _kernels(child)


def _call(event: Any) -> Call:
    name, seconds = event.name, event.time_range.elapsed_us() * 1e-6
    if name in (*_CONVOLUTIONS, *_LINEARS):
        work = _work(name, event.input_shapes, event.concrete_inputs)
        return Call(name, seconds, work, unknown=work is None)
    if name == _OWN:
        shape, sizes, code = event.input_shapes[0], event.concrete_inputs[3], event.concrete_inputs[4]
        n, c, h, w = (*shape, 1, 1)[:4]
        return Call(f"{name} {code}", seconds, _own_work((n, h, w, c), sizes, is_depthwise=code == 0))
    return Call(name, seconds, kind=other_kind(name))


def _work(name: str, shapes: Sequence[Sequence[int]], values: Sequence[Any]) -> Work | None:
    """The work of an operator of torch's from its arguments; None where they do not tell."""
    arguments = operator_arguments(name, len(shapes))
    if arguments is None:
        return None
    image, weight = (
        next((tuple(shapes[arguments.index(each)]) for each in names if each in arguments), ())
        for names in (_IMAGES, _WEIGHTS)
    )
    if not image or not weight:
        return None
    if name in _LINEARS:
        filters = weight[1] if name.startswith("aten") else weight[0]
        rows = torch.Size(image[:-1]).numel()
        return Work.of_linear(rows, image[-1], filters)
    given = {argument: values[at] for at, argument in enumerate(arguments)}
    if not given["stride"] or given["groups"] is None:
        return None
    spaces = [tuple(given[space]) for space in ("stride", "padding", "dilation")]
    is_depthwise = 1 < given["groups"] == image[1] == weight[0]
    filters = weight[1] * given["groups"] if given.get("transposed") else weight[0]
    return Work(image, filters, weight[2:], *spaces, is_depthwise, bool(given.get("transposed"))).plain


def _calls_of_step(step: StepTime) -> Iterator[Call]:
    if not step.sizes:
        other = "elementwise and other"
        kind = {MEAN: "pooling", MAX: "pooling", GATHER: other, SUM: other}[step.kind]
        yield Call(f"step {kind}", step.seconds, kind=kind)
        return
    image, all_threads = step.image, sum(step.stages)
    for at, (sizes, kernel) in enumerate(zip(step.sizes, step.kernels, strict=True)):
        share = step.stages[at] / all_threads if step.stages and all_threads else 1 / len(step.sizes)
        work = _own_work(image, sizes, is_depthwise=kernel.kind is Kind.DEPTHWISE)
        chained = ", in a chain" * (len(step.sizes) > 1)
        yield Call(f"step {kernel.code}{chained}", share * step.seconds, work)
        n, h, w, _ = image
        extents = [
            (size + 2 * sizes[6 + space] - sizes[8 + space] * (sizes[2 + space] - 1) - 1) // sizes[4 + space]
            + 1
            for space, size in enumerate((h, w))
        ]
        image = (n, extents[0], extents[1], sizes[0])


def _own_work(image: tuple[int, int, int, int], sizes: Sequence[int], *, is_depthwise: bool) -> Work:
    """The work of the operator's argument `sizes` on an image of batch, height, width and channels."""
    n, h, w, c = image
    taps, stride, padding, dilation = (tuple(sizes[at : at + 2]) for at in (2, 4, 6, 8))
    return Work((n, c, h, w), sizes[0], taps, stride, padding, dilation, is_depthwise).plain
