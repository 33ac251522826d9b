"""The operator `fxpasses::sequence` against the same steps in float64."""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from fxpasses.kernels import library
from fxpasses.kernels.convolution import ACTIVATIONS, Sizes, pack
from fxpasses.kernels.kernel import DEPTHWISE, SLIDING, Kernel, Kind
from fxpasses.kernels.sequence import (
    CHAIN,
    GATHER,
    MAX,
    MEAN,
    PRODUCT,
    SUM,
    Convolution,
    Reading,
    Step,
    joined,
    program,
    shapes_argument,
)
from fxpasses.torch_internals.cpp import cpp_compiler

pytestmark = [pytest.mark.vectors, pytest.mark.needs_kernels]

LIMITS = (-0.5, 1.5)
REFERENCES = {"none": lambda x: x, "clamp": lambda x: x.clamp(*LIMITS), "silu": functional.silu}


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


class Program:
    """Steps, and what they give in float64."""

    def __init__(self, inputs):
        self.inputs = inputs
        self.exact = [image.double() for image in inputs]
        self.constants = []
        self.steps = []

    def constant(self, tensor):
        self.constants.append(tensor)
        return len(self.constants) - 1

    def read(self, reading):
        firsts = reading.firsts or (0,) * len(reading.values)
        parts = zip(reading.values, firsts, reading.widths, strict=True)
        image = torch.cat([self.exact[value][:, first : first + width] for value, first, width in parts], 1)
        if reading.gate is not None:
            image = image * self.exact[reading.gate]
        if reading.scale is not None:
            image = image * self.constants[reading.scale].double()[:, None, None]
        if reading.shift is not None:
            image = image + self.constants[reading.shift].double()[:, None, None]
        return image if reading.limits is None else image.clamp(*reading.limits)

    def convolution(self, sizes, kernel, summand=None, activation="none"):
        filters = torch.randn(sizes.filters, sizes.channels // sizes.groups, *sizes.kernel)
        filters /= filters[0].numel() ** 0.5  # so that values stay about one, as errors do
        bias = torch.randn(sizes.filters)
        at = self.constant(pack(sizes, kernel, filters, bias))
        which = ACTIVATIONS.index(activation)
        arguments = Convolution(sizes.argument(kernel), kernel, at, summand, which, *LIMITS)
        space = (sizes.stride, sizes.padding, sizes.dilation)

        def exact(image):
            found = torch.conv2d(image, filters.double(), bias.double(), *space, sizes.groups)
            return REFERENCES[activation](found if summand is None else found + self.exact[summand])

        return arguments, exact

    def add(self, kind, reading, result, *convolutions, window=()):
        image = self.read(reading)
        channels = reading.widths[0] if kind == SUM else image.shape[1]
        shape = (image.shape[0], *image.shape[2:], channels)
        arguments = tuple(arguments for arguments, _ in convolutions)
        self.steps.append(Step(kind, len(self.exact), reading, shape, arguments, window))
        self.exact.append(result(image))
        return len(self.exact) - 1

    def plain(self, value):
        return Reading((value,), (self.exact[value].shape[1],))

    def run(self, results):
        """The values at `results`, which are numbered after the inputs as the operator wants them."""
        given = [*range(len(self.inputs)), *results]
        order = [*given, *(value for value in range(len(self.exact)) if value not in given)]
        number = {value: at for at, value in enumerate(order)}.__getitem__
        steps = [_renumbered(step, number) for step in self.steps]
        words = torch.tensor(program(steps, len(given), len(order) - len(given)))
        shapes = shapes_argument([self.exact[value].shape for value in results])
        return torch.ops.fxpasses.sequence(self.inputs, self.constants, words, shapes)


def _renumbered(step, number):
    reading = step.reading
    gate = None if reading.gate is None else number(reading.gate)
    values = tuple(map(number, reading.values))
    read = replace(reading, values=values, gate=gate)
    convolutions = tuple(
        one._replace(summand=None if one.summand is None else number(one.summand))
        for one in step.convolutions
    )
    return replace(step, result=number(step.result), reading=read, convolutions=convolutions)


def product(width):
    """The kernel of so many vectors of output channels."""
    return Kernel(Kind.PRODUCT, width)


def few_channels(width, *, planar=False):
    return Kernel(Kind.FEW_CHANNELS, width, planar=planar)


def assert_equal(found, wanted):
    assert found.shape == wanted.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-12


def _single(channels, filters, stride=1):
    return Sizes(channels, filters, 1, (1, 1), (stride, stride), (0, 0), (1, 1))


def _depthwise(channels, side=3, stride=1, padding=1, dilation=1):
    return Sizes(channels, channels, channels, (side, side), (stride,) * 2, (padding,) * 2, (dilation,) * 2)


def random_program(chosen: random.Random) -> Program:
    count, height, width = chosen.choice([(1, 6, 5), (2, 4, 7), (3, 1, 1), (1, 17, 9)])
    made = Program([channels_last(count, channels, height, width) for channels in (16, 19, 3)])
    images, gates = [0, 1, 2], {}
    for _ in range(8):
        kind = chosen.choice(("gathering", "gathering", "square", "depthwise", "gate", "mean"))
        value = chosen.choice(images)
        channels = made.exact[value].shape[1]
        if kind == "gathering":
            values = tuple(chosen.choice(images) for _ in range(chosen.choice((1, 1, 2, 3))))
            widths = tuple(made.exact[one].shape[1] for one in values)
            total = sum(widths)
            gate = gates.get(values[0]) if len(values) == 1 else None
            scale = made.constant(torch.randn(total)) if gate is None and chosen.random() < 0.5 else None
            shift = made.constant(torch.randn(total)) if chosen.random() < 0.5 else None
            limits = chosen.choice((None, (0.0, 6.0), (0.0, float("inf"))))
            sizes = _single(total, chosen.choice((5, 16, 24, 48, 130)))
            same = [image for image in images if made.exact[image].shape[1] == sizes.filters]
            summand = chosen.choice(same) if same and chosen.random() < 0.5 else None
            activation = chosen.choice(list(REFERENCES))
            convolution = made.convolution(sizes, product(chosen.choice((1, 2, 3, 4))), summand, activation)
            reading = Reading(values, widths, gate, scale, shift, limits)
            images.append(made.add(PRODUCT, reading, convolution[1], convolution))
        elif kind == "square":
            sizes = Sizes(channels, 20, 1, (3, 3), (1, 1), (1, 1), (1, 1))
            convolution = made.convolution(sizes, product(chosen.choice((1, 2))))
            images.append(made.add(PRODUCT, made.plain(value), convolution[1], convolution))
        elif kind == "depthwise" and channels >= library.vector_length():
            convolution = made.convolution(_depthwise(channels), DEPTHWISE, None, "silu")
            images.append(made.add(PRODUCT, made.plain(value), convolution[1], convolution))
        elif kind == "mean":
            mean = made.add(MEAN, made.plain(value), lambda image: image.mean((2, 3), keepdim=True))
            gates[value] = mean
        elif kind == "gate" and value in gates:
            reading = Reading((value,), (channels,), gates[value])
            images.append(made.add(GATHER, reading, lambda image: image))
    return made


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_equal_float64(seed):
    torch.manual_seed(seed)
    chosen = random.Random(seed)
    made = random_program(chosen)
    values = range(len(made.inputs), len(made.exact))
    results = sorted(chosen.sample(values, chosen.randint(1, len(values))))
    for found, at in zip(made.run(results), results, strict=True):
        assert_equal(found, made.exact[at])


DEEP = [
    ((1, 24, 60, 40), _depthwise(64)),  # more rows than are near at a time
    ((2, 24, 61, 40), _depthwise(64, stride=2)),
    ((2, 8, 33, 50), _depthwise(48, side=5, padding=2)),
    ((3, 8, 5, 4), _depthwise(16, side=5, padding=2, stride=2)),
    ((1, 8, 40, 40), _depthwise(64, side=3, padding=3, dilation=3)),
    ((1, 8, 1, 1), _depthwise(16, side=5, padding=2)),
    ((2, 8, 9, 9), _depthwise(16, side=3, padding=0)),
    ((1, 8, 70, 30), _depthwise(64, side=2, padding=0, stride=3)),  # rows that nothing reads
]


def assert_chain_is_exact(made, value, convolutions):
    """Float64's values, and the same bits for any number of threads."""

    def exact(x):
        for _, convolve in convolutions:
            x = convolve(x)
        return x

    at = made.add(CHAIN, made.plain(value), exact, *convolutions)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += made.run([at])
    finally:
        torch.set_num_threads(before)
    assert_equal(found[0], made.exact[at])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


GROUPED = [
    ((1, 8, 9, 12), Sizes(32, 32, 2, (3, 3), (1, 1), (1, 1), (1, 1))),
    ((2, 8, 30, 17), Sizes(64, 64, 2, (3, 3), (2, 2), (1, 1), (1, 1))),
    ((1, 8, 23, 11), Sizes(64, 64, 16, (3, 3), (1, 1), (1, 1), (1, 1))),
    ((2, 8, 7, 31), Sizes(32, 64, 2, (5, 3), (2, 1), (2, 0), (2, 1))),
]
"""Groups of one or two vectors, and several groups in one."""


@pytest.mark.parametrize("kind", ["head", "narrow", "summands", "behind few"])
@pytest.mark.parametrize(("image", "grouped"), GROUPED, ids=str)
def test_a_chain_with_groups_equals_float64(image, grouped, kind):
    """With the same bits for any number of threads."""
    torch.manual_seed(0)
    count, channels, height, width = image
    made = Program([channels_last(*image), torch.randn(count, 3, height, width)])
    wide = made.convolution(_single(channels, grouped.channels), product(2), None, "silu")
    thin = made.convolution(_single(grouped.filters, 21), product(3), None, "clamp")
    filtered = made.convolution(grouped, SLIDING, None, "clamp")
    value, convolutions = 0, [wide, filtered]
    if kind == "narrow":
        convolutions = [wide, filtered, thin]
    elif kind == "summands":
        middle = made.add(PRODUCT, made.plain(0), wide[1], wide)
        end = made.add(PRODUCT, made.plain(middle), filtered[1], filtered)
        convolutions = [wide, made.convolution(grouped, SLIDING, end, "silu"), thin]
    elif kind == "behind few":
        few = Sizes(3, grouped.channels, 1, (3, 3), (1, 1), (1, 1), (1, 1))
        value, convolutions = 1, [made.convolution(few, few_channels(2), None, "silu"), filtered]
    assert_chain_is_exact(made, value, convolutions)


KINDS = ("head", "planes", "rows", "deep", "narrow", "summands", "twice")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("image", "deep"), DEEP, ids=str)
def test_a_chain_row_by_row_equals_float64(image, deep, kind):
    """Depthwise convolutions behind and before others, with the same bits for any number of threads."""
    torch.manual_seed(0)
    count, channels, height, width = image
    made = Program([channels_last(*image), torch.randn(count, 3, height, width)])
    wide = made.convolution(_single(channels, deep.channels), product(2), None, "silu")
    thin = made.convolution(_single(deep.channels, 21), product(3), None, "clamp")
    again = made.convolution(_single(21, deep.channels), product(4))
    few = Sizes(3, deep.channels, 1, (3, 3), (1, 1), (1, 1), (1, 1))
    filtered = made.convolution(deep, DEPTHWISE, None, "clamp")
    value, convolutions = 0, [wide, filtered]
    if kind in ("planes", "rows"):
        kernel = few_channels(2, planar=kind == "planes")
        value, convolutions = 1, [made.convolution(few, kernel, None, "silu"), filtered, thin]
    elif kind == "deep":
        middle = made.add(PRODUCT, made.plain(0), wide[1], wide)
        value, convolutions = middle, [filtered, thin]
    elif kind == "narrow":
        convolutions = [wide, filtered, thin]
    elif kind == "summands":
        middle = made.add(PRODUCT, made.plain(0), wide[1], wide)
        end = made.add(PRODUCT, made.plain(middle), filtered[1], filtered)
        near = made.convolution(_single(channels, deep.channels), product(2), middle, "silu")
        far = made.add(PRODUCT, made.plain(end), thin[1], thin)
        convolutions = [
            near,
            filtered,
            made.convolution(_single(deep.channels, 21), product(3), far, "clamp"),
        ]
    elif kind == "twice":
        convolutions = [wide, filtered, thin, again, filtered]
        if min(height, width) < 40:
            convolutions = [wide, thin, again]
    assert_chain_is_exact(made, value, convolutions)


def block(image, *, activation="clamp", narrow=24):
    """Two inputs, an expansion, a depthwise convolution and a product that makes its result narrow."""
    made = Program([channels_last(*image), channels_last(image[0], narrow, *image[2:])])
    wide = made.convolution(_single(image[1], 64), product(2), None, activation)
    mid = made.add(PRODUCT, made.plain(0), wide[1], wide)
    deep = made.convolution(_depthwise(64), DEPTHWISE)
    end = made.add(PRODUCT, made.plain(mid), deep[1], deep)
    thin = made.convolution(_single(64, narrow), product(2), 1)
    made.add(PRODUCT, made.plain(end), thin[1], thin)
    return made


LARGE = (1, 8, 80, 64)  # 1.3 MB times 64 channels


def test_a_large_block_is_made_row_by_row():
    made = block(LARGE)
    (step,) = joined(made.steps, 2)
    assert (step.kind, len(step.convolutions), step.read) == (CHAIN, 3, [0, 1])
    (found,) = made.run([4])
    assert_equal(found, made.exact[4])


def test_a_large_bottleneck_with_groups_is_made_row_by_row():
    made = Program([channels_last(1, 8, 80, 64)])
    wide = made.convolution(_single(8, 64), product(2), None, "clamp")
    first = made.add(PRODUCT, made.plain(0), wide[1], wide)
    grouped = made.convolution(Sizes(64, 64, 4, (3, 3), (1, 1), (1, 1), (1, 1)), SLIDING, None, "clamp")
    second = made.add(PRODUCT, made.plain(first), grouped[1], grouped)
    thin = made.convolution(_single(64, 8), product(1), 0)
    made.add(PRODUCT, made.plain(second), thin[1], thin)
    (step,) = joined(made.steps, 1)
    assert (step.kind, len(step.convolutions)) == (CHAIN, 3)
    (found,) = made.run([3])
    assert_equal(found, made.exact[3])


def test_a_large_stem_is_the_head_of_a_chain():
    made = Program([torch.randn(1, 3, 160, 128)])
    sizes = Sizes(3, 32, 1, (3, 3), (2, 2), (1, 1), (1, 1))
    stem = made.convolution(sizes, few_channels(2, planar=True), None, "clamp")
    first = made.add(PRODUCT, made.plain(0), stem[1], stem)
    deep = made.convolution(_depthwise(32), DEPTHWISE)
    made.add(PRODUCT, made.plain(first), deep[1], deep)
    (step,) = joined(made.steps, 1)
    assert (step.kind, step.planar) == (CHAIN, (0,))
    (found,) = made.run([2])
    assert_equal(found, made.exact[2])


@pytest.mark.parametrize(
    "why",
    ["small", "read twice", "a result", "few rows", "not depthwise", "gated", "much to fetch", "two inputs"],
)
def test_what_is_no_chain_stays_single_steps(why, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    made = block((1, 8, 8, 8) if why == "small" else LARGE)
    given = 2
    if why == "read twice":
        made.add(MEAN, made.plain(2), lambda image: image.mean((2, 3), keepdim=True))
        made.add(MEAN, made.plain(3), lambda image: image.mean((2, 3), keepdim=True))
    elif why == "a result":
        given = 4
    elif why == "few rows":
        made = block((1, 8, 2, 4000))
    elif why == "not depthwise":
        del made.steps[1:], made.exact[3:]
        square = made.convolution(Sizes(64, 64, 1, (3, 3), (1, 1), (1, 1), (1, 1)), product(2))
        made.add(PRODUCT, made.plain(2), square[1], square)
    elif why == "gated":
        first = made.steps[0]
        read = Reading(first.reading.values, first.reading.widths, limits=(0.0, 6.0))
        made.steps = [Step(PRODUCT, first.result, read, first.image, first.convolutions), made.steps[1]]
    elif why == "much to fetch":
        made = Program([channels_last(1, 600, 40, 40)])
        wide, deep = (
            made.convolution(_single(600, 128), product(2)),
            made.convolution(_depthwise(128), DEPTHWISE),
        )
        made.add(PRODUCT, made.plain(0), wide[1], wide)
        made.add(PRODUCT, made.plain(1), deep[1], deep)
        given = 1
    elif why == "two inputs":
        both = made.convolution(_single(64 + 24, 16), product(2))
        made.steps = made.steps[1:2]
        made.add(PRODUCT, Reading((3, 1), (64, 24)), both[1], both)
    assert Counter(step.kind for step in joined(made.steps, given))[CHAIN] == 0


@pytest.mark.parametrize("why", ["square", "few channels behind", "gathered", "strided", "no kernel"])
def test_what_cannot_be_done_row_by_row_is_refused(why):
    made = Program([channels_last(1, 16, 8, 8)])
    point = made.convolution(_single(16, 16), product(1))
    other = {
        "square": lambda: made.convolution(Sizes(16, 16, 1, (3, 3), (1, 1), (1, 1), (1, 1)), product(1)),
        "few channels behind": lambda: made.convolution(_single(16, 16), few_channels(1)),
        "gathered": lambda: point,
        "strided": lambda: made.convolution(_single(16, 16, stride=2), product(1)),
        "no kernel": lambda: made.convolution(
            _single(16, 16), product(5)
        ),  # refused before threads share the work
    }[why]()
    reading = Reading((0,), (16,), limits=(0.0, 1.0)) if why == "gathered" else made.plain(0)
    made.add(CHAIN, reading, lambda x: other[1](point[1](x)), point, other)
    with pytest.raises(RuntimeError, match=r"single pixels|few channels|as it is|no kernel 5"):
        made.run([1])


def test_values_that_live_at_the_same_time_never_share_memory():
    """Each is another multiple of one image, or several beside one another."""
    chosen = random.Random(0)
    for _ in range(100):
        made = Program([channels_last(2, 3, 3, 2)])
        for _ in range(chosen.randint(1, 14)):
            narrow = [value for value, exact in enumerate(made.exact) if exact.shape[1] < 20]
            values = tuple(chosen.choices(narrow, k=chosen.randint(1, 2)))
            widths = tuple(made.exact[value].shape[1] for value in values)
            scale = made.constant(torch.randn(sum(widths)))
            made.add(GATHER, Reading(values, widths, scale=scale), lambda image: image)
        results = chosen.sample(range(1, len(made.exact)), k=min(3, len(made.exact) - 1))
        for value, found in zip(results, made.run(results), strict=True):
            torch.testing.assert_close(found.double(), made.exact[value], rtol=1e-5, atol=1e-6)


class Call(ctypes.Structure):
    """`FxpassesSequence`."""

    _fields_ = (
        ("program", ctypes.c_void_p),
        ("words", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("shapes", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("results", ctypes.c_int64),
        ("constants", ctypes.c_void_p),
        ("constant_count", ctypes.c_int64),
    )


@pytest.mark.parametrize(
    "kernel",
    [product(1), product(2), product(4), Kernel(Kind.WINOGRAD, 2), Kernel(Kind.WINOGRAD, 4)],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 3])
def test_some_channels_of_an_image_are_read_where_they_lie(kernel, groups):
    """Behind and before others, on every border; with groups also where each has some of them."""
    for first, width, total in ((0, 48, 64), (16, 48, 64), (7, 48, 60), (48, 48, 96)):
        made = Program([channels_last(2, total, 5, 9)])
        reading = Reading((0,), (width,), firsts=(first,))
        if kernel.kind is Kind.WINOGRAD and groups > 1:
            continue
        square = made.convolution(
            Sizes(width, 24, groups, (3, 3), (1, 1), (1, 1), (1, 1)), kernel, None, "silu"
        )
        made.add(PRODUCT, reading, square[1], square)
        if kernel.kind is Kind.PRODUCT and groups == 1:
            point = made.convolution(_single(width, 33), kernel)
            made.add(PRODUCT, reading, point[1], point)
        made.add(GATHER, reading, lambda image: image)
        results = range(1, len(made.exact))
        for found, at in zip(made.run(results), results, strict=True):
            assert_equal(found, made.exact[at])


@pytest.mark.parametrize("channels", [3, 16, 24, 37])
def test_sums_of_images_and_of_some_of_their_channels(channels):
    made = Program([channels_last(2, channels, 5, 9), channels_last(2, 2 * channels + 1, 5, 9)])
    for values, firsts in (((0, 0), None), ((0, 1), (0, 1)), ((1, 1, 0), (channels, 0, 0))):
        reading = Reading(values, (channels,) * len(values), firsts=firsts)
        whole = made.read(reading)
        wanted = sum(whole.split(channels, 1))
        made.add(SUM, reading, lambda image, wanted=wanted: wanted)
    for found, at in zip(made.run([2, 3, 4]), (2, 3, 4), strict=True):
        assert_equal(found, made.exact[at])


@pytest.mark.parametrize("channels", [3, 16, 24, 37])
@pytest.mark.parametrize(
    "window",
    [(3, 3, 2, 2, 1, 1, 1, 1), (5, 5, 1, 1, 2, 2, 1, 1), (2, 2, 2, 2, 0, 0, 1, 1), (2, 3, 1, 2, 1, 0, 2, 1)],
    ids=str,
)
def test_a_maximum_is_torchs_also_of_what_is_not_finite(window, channels):
    x = channels_last(2, channels, 9, 12)
    for value, place in ((float("nan"), (0, 0)), (float("inf"), (3, 4)), (-float("inf"), (8, 11))):
        x[0, 1, place[0], place[1]] = value
    x[1, 0] = -float("inf")
    made = Program([x])
    space = [window[at : at + 2] for at in (0, 2, 4, 6)]
    made.add(MAX, made.plain(0), lambda image: functional.max_pool2d(image, *space), window=window)
    (found,) = made.run([1])
    assert torch.equal(found.double().nan_to_num(7e7), made.exact[1].nan_to_num(7e7))
    assert torch.equal(found.isnan(), made.exact[1].isnan())


@pytest.mark.parametrize("why", ["depthwise", "few channels", "mean", "max", "one pixel", "sum"])
def test_steps_that_read_whole_images_refuse_parts_of_them(why):
    made = Program([channels_last(1, 40, 6, 6)])
    reading = Reading((0,), (16,), firsts=(16,))
    few = Reading((0,), (3,), firsts=(1,))
    if why == "depthwise":
        deep = made.convolution(_depthwise(16), DEPTHWISE)
        made.add(PRODUCT, reading, deep[1], deep)
    elif why == "few channels":
        stem = made.convolution(Sizes(3, 16, 1, (3, 3), (1, 1), (1, 1), (1, 1)), few_channels(1))
        made.add(PRODUCT, few, stem[1], stem)
    elif why == "one pixel":
        layer = made.convolution(_single(16, 16), Kernel(Kind.PRODUCT, 1, single_pixel=True))
        made.add(PRODUCT, reading, layer[1], layer)
    elif why == "mean":
        made.add(MEAN, reading, lambda image: image.mean((2, 3), keepdim=True))
    elif why == "max":
        made.add(MAX, reading, lambda image: image, window=(1, 1, 1, 1, 0, 0, 1, 1))
    else:
        made.add(SUM, Reading((0, 0), (16, 15), firsts=(0, 0)), lambda image: image[:, :16])
    with pytest.raises(RuntimeError, match=r"read some channels|summands of as many"):
        made.run([1])


@pytest.mark.parametrize(("batch", "floats"), [(1, 320), (3, 960)])
def test_memory_is_used_again_whatever_the_batch(batch, floats):
    steps = [Step(GATHER, 1 + at, Reading((at,), (160,)), (1, 1, 1, 160)) for at in range(10)]
    words = torch.tensor(program(steps, 1, 10))
    kernels = library._kernels(torch.backends.cpu.get_cpu_capability(), cpp_compiler())
    image, shape = torch.zeros(batch, 160), torch.tensor([batch, 1, 1, 160])
    value = ctypes.c_void_p(image.data_ptr())
    call = Call(words.data_ptr(), words.numel(), ctypes.addressof(value), shape.data_ptr(), 1, 0, None, 0)
    found, message = ctypes.c_int64(), ctypes.create_string_buffer(256)
    assert not kernels.fxpasses_sequence_memory(
        ctypes.byref(call), ctypes.byref(found), message, ctypes.c_int64(256)
    )
    assert found.value == floats


@pytest.mark.parametrize("seed", range(8))
def test_one_program_serves_all_batches_and_resolutions(seed):
    """Its words hold none of them."""
    words = set()
    for n, h, w in ((1, 9, 7), (3, 12, 5), (2, 30, 31)):
        made = Program([channels_last(n, 16, h, w)])
        torch.manual_seed(seed)
        first = made.convolution(_single(16, 24), product(2), activation="silu")
        made.add(PRODUCT, made.plain(0), first[1], first)
        second = made.convolution(Sizes(24, 24, 1, (3, 3), (2, 2), (1, 1), (1, 1)), product(1 + seed % 3))
        made.add(PRODUCT, made.plain(1), second[1], second)
        made.add(MEAN, made.plain(2), lambda image: image.mean((2, 3), keepdim=True))
        made.add(GATHER, Reading((2,), (24,), gate=3), lambda image: image)
        steps = made.steps
        words.add(tuple(program(steps, 2, 3)))
        (found,) = made.run([4])
        assert_equal(found, made.exact[4])
    assert len(words) == 1


STEM = Sizes(3, 20, 1, (3, 3), (2, 2), (1, 1), (1, 1))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_an_input_is_read_plane_by_plane(order):
    """Whatever memory it is given in; another input of the same values is read pixel by pixel."""
    x = torch.randn(2, 3, 9, 11).contiguous(memory_format=order)
    made = Program([x, x.clone()])
    for value, kernel in ((0, few_channels(2, planar=True)), (1, few_channels(1))):
        stem = made.convolution(STEM, kernel, None, "silu")
        made.add(PRODUCT, made.plain(value), stem[1], stem)
    last = made.convolution(_single(20, 16), product(2), None, "clamp")
    made.add(PRODUCT, made.plain(2), last[1], last)
    for found, at in zip(made.run([3, 4]), (3, 4), strict=True):
        assert_equal(found, made.exact[at])


@pytest.mark.parametrize("why", ["result", "both", "mean"])
def test_what_cannot_be_read_plane_by_plane_is_refused(why):
    made = Program([torch.randn(1, 3, 8, 8)])
    sizes = Sizes(3, 3, 1, (3, 3), (1, 1), (1, 1), (1, 1))
    stem = made.convolution(sizes, few_channels(1, planar=True))
    made.add(PRODUCT, made.plain(0), stem[1], stem)
    if why == "result":
        made.add(PRODUCT, made.plain(1), stem[1], stem)
    elif why == "both":
        again = made.convolution(_single(3, 8), product(1))
        made.add(PRODUCT, made.plain(0), again[1], again)
    else:
        made.add(MEAN, made.plain(0), lambda image: image.mean((2, 3), keepdim=True))
    with pytest.raises(RuntimeError, match=r"plane|alike in memory"):
        made.run([2])


def test_a_matrix_is_an_image_of_one_pixel():
    made = Program([torch.randn(3, 24)])
    layer = made.convolution(Sizes.of_linear(24, 40), product(2))
    reading = Reading((0,), (24,))
    words = program([Step(PRODUCT, 1, reading, (3, 1, 1, 24), (layer[0],))], 2, 0)
    (found,) = torch.ops.fxpasses.sequence(made.inputs, made.constants, torch.tensor(words), [3, 40, -1, -1])
    wanted = layer[1](made.inputs[0].double()[:, :, None, None])[:, :, 0, 0]
    assert found.shape == (3, 40)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda words, given: words[:-1], "ends where its length says"),
        (lambda words, given: [*words[:3], 9, *words[4:]], "no step 9"),
        (lambda words, given: [*words[:4], 7, *words[5:]], "numbered in range"),
        (lambda words, given: [*words[:8], 8, *words[9:]], "as many channels"),
        (lambda words, given: [*words[:7], 1, *words[8:]], "the channels that the step reads"),
        (lambda words, given: [*words[:10], 1, *words[11:]], "a gate of each image"),
        (lambda words, given: given[1].pop(), "out of range|index|at"),
        (lambda words, given: given[1].insert(0, torch.zeros(7)), "packed for this convolution"),
        (lambda words, given: given[0].__setitem__(0, given[0][0].double()), "float32 inputs"),
    ],
    ids=["cut", "kind", "result", "channels", "part", "gate", "constant", "weight", "dtype"],
)
def test_what_does_not_fit_is_refused(spoil, message):
    made = Program([channels_last(1, 16, 4, 4)])
    layer = made.convolution(_single(16, 16), product(2))
    words = program([Step(PRODUCT, 1, made.plain(0), (1, 4, 4, 16), (layer[0],))], 2, 0)
    given = (made.inputs, made.constants)
    spoilt = spoil(words, given)
    words = spoilt if isinstance(spoilt, list) else words
    with pytest.raises((RuntimeError, IndexError), match=message):
        torch.ops.fxpasses.sequence(*given, torch.tensor(words), [1, 16, 4, 4])


def test_fake_results_have_the_sizes_and_strides_of_real_ones():
    from fxpasses.torch_internals.fake_tensors import FakeTensorMode

    made = random_program(random.Random(1))
    results = [len(made.exact) - 1]
    (real,) = made.run(results)
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(image) for image in made.inputs]
        constants = [mode.from_tensor(constant) for constant in made.constants]
        shapes = shapes_argument([real.shape, (3, 5)])
        words = torch.zeros(4, dtype=torch.int64)
        first, second = torch.ops.fxpasses.sequence(inputs, constants, words, shapes)
    assert (first.shape, first.stride()) == (real.shape, real.stride())
    assert (second.shape, second.stride()) == ((3, 5), (5, 1))
