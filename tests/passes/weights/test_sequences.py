"""Kernels that follow one another in one call, against eager in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import randomised, sampled_cases
from torch import nn

import fxpasses
from fxpasses.kernels import convolution
from fxpasses.kernels.kernel import Kernel, Kind
from fxpasses.passes.weights import own_kernels

pytestmark = [pytest.mark.vectors, pytest.mark.needs_kernels]


def compiled(model):
    options = {"weights": "cached", "profit": "always"}
    return torch.compile(model, backend="fxpasses", options=options)


def seeded(kind, seed=0):
    torch.manual_seed(seed)
    return randomised(kind(), torch.float32)


def assert_eagers(run, model, *inputs):
    """Within twice of eager's own rounding error of a float64 reference, and with eager's strides."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*(tensor.double() for tensor in inputs))
        eager, found = (
            model(*(tensor.clone() for tensor in inputs)),
            run(*(tensor.clone() for tensor in inputs)),
        )
    if isinstance(found, torch.Tensor):
        exact, eager, found = (exact,), (eager,), (found,)
    for want, plain, got in zip(exact, eager, found, strict=True):
        allowed = 2 * (plain.double() - want).abs().max() + 1e-6 * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed
        assert got.stride() == plain.stride()


def leaves(found):
    """The tensors of what a model gives, which may be one, or several in tuples and lists."""
    if isinstance(found, torch.Tensor):
        return [found]
    return [leaf for each in found for leaf in leaves(each)]


def calls():
    """How many kernels each call has."""
    remarks = fxpasses.last_report().remarks
    return [int(remark.message.split()[0]) for remark in remarks if remark.rule == "kernel_sequences"]


class Dense(nn.Module):
    """Layers that read all before them, as in DenseNet: norm, clamp, convolution, concatenation."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 12 * at) for at in range(3))
        self.points = nn.ModuleList(nn.Conv2d(16 + 12 * at, 24, 1) for at in range(3))
        self.squares = nn.ModuleList(nn.Conv2d(24, 12, 3, padding=1) for at in range(3))

    def forward(self, x):
        found = [self.first(x)]
        for norm, point, square in zip(self.norms, self.points, self.squares, strict=True):
            found.append(square(torch.relu(point(torch.relu(norm(torch.cat(found, 1)))))))
        return torch.cat(found, 1)


@pytest.mark.parametrize(
    "shape",
    sampled_cases([(1, 3, 12, 12), (2, 3, 9, 5), (1, 3, 1, 1)], [(2, 3, 9, 5), (1, 3, 1, 1)]),
    ids=str,
)
def test_dense_layers_read_their_operands_where_they_lie(shape):
    model = seeded(Dense)
    run = compiled(model)
    assert_eagers(run, model, torch.randn(shape))
    if shape[2] > 1:  # one pixel at a time has kernels of its own, which do not gather
        assert calls() == [7]
    with torch.no_grad():
        model.norms[1].running_var.mul_(3)
        model.norms[2].bias.add_(1)
    assert_eagers(run, model, torch.randn(shape))
    model.load_state_dict(seeded(Dense, 5).state_dict())
    assert_eagers(run, model, torch.randn(shape))


class Gated(nn.Module):
    """Squeeze and excitation round a depthwise convolution, twice."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1, groups=32), nn.SiLU())
        self.squeeze = nn.Sequential(nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.Sigmoid())
        self.back = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        y = self.deep(self.expand(x))
        y = self.back(y * self.squeeze(y.mean((2, 3), keepdim=True)))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize(
    "shape",
    sampled_cases([(1, 16, 12, 12), (3, 16, 7, 9), (2, 16, 1, 1)], [(1, 16, 12, 12), (3, 16, 7, 9)]),
    ids=str,
)
def test_a_gate_is_applied_while_the_image_is_read(shape):
    model = seeded(Gated)
    run = compiled(model)
    assert_eagers(run, model, torch.randn(shape))
    # Inductor writes the product of one row as a sum.
    assert calls() == [5 if shape[0] == 1 else 6]
    model.load_state_dict(seeded(Gated, 5).state_dict())
    assert_eagers(run, model, torch.randn(shape))


class Convolutions(nn.Module):
    """Three convolutions over single pixels, put together by a function."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(16, 16, 1) for _ in range(3))
        self.vector = nn.Parameter(torch.rand(16) + 0.5)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


X = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("function", "kernels"),
    [
        (lambda m, x: m.c(m.b(m.a(x))), [3]),
        (lambda m, x: (m.a(x), m.c(m.b(m.a(x)))), [4]),
        # What lies between two of them is not ours.
        (lambda m, x: m.c(torch.sin(m.b(m.a(x)))), [2]),
        (lambda m, x: m.c(m.b(torch.sin(m.a(x)))), [2]),
        # A reader of the first, which stands before the last.
        (lambda m, x: (torch.sin(y := m.a(x)), m.b(y)), [2]),
        (lambda m, x: torch.cos(torch.sin(y := m.a(x))) * m.c(m.b(y)), [3]),
        # What is added last is an operand of the last kernel.
        (lambda m, x: torch.cos(torch.sin(y := m.a(x))) + m.c(m.b(y)), [2]),
        # One that both follows one and precedes another.
        (lambda m, x: m.c(m.b(y := m.a(x)) + torch.sin(y)), [2]),
        (lambda m, x: (y := m.a(x), m.b(x).flatten(1), m.c(y).mean((2, 3))), [3]),
        # Pooling to one pixel, which AOTAutograd writes as a mean and `as_strided`.
        (lambda m, x: m.c(nn.functional.adaptive_avg_pool2d(m.b(m.a(x)), 1)), [3]),
        (lambda m, x: (y := nn.functional.adaptive_avg_pool2d(m.b(m.a(x)), 1), m.c(y).flatten(1)), [2]),
    ],
    ids=lambda given: None if callable(given) else str(given),
)
def test_runs_end_where_something_else_lies_between(function, kernels):
    model = seeded(lambda: Convolutions(function))
    assert_eagers(compiled(model), model, X)
    assert calls() == kernels


class Several(nn.Module):
    """Several functions, each over convolutions of its own: one compilation for all of them."""

    def __init__(self, kind, functions):
        super().__init__()
        self.parts = nn.ModuleList(map(kind, functions))

    def forward(self, x):
        results = []
        for part in self.parts:
            found = part(x)
            results += found if isinstance(found, tuple) else (found,)
        return tuple(results)


NEAR_MISSES = [
    # A gate of every image, of one channel, of a row; and one that is as large as the image.
    lambda m, x: m.b(m.a(x) * m.c(x).mean((0, 2, 3), keepdim=True)),
    lambda m, x: m.b(m.a(x) * m.c(x).mean((1, 2, 3), keepdim=True)),
    lambda m, x: m.b(m.a(x) * m.c(x).mean((1, 2), keepdim=True)),
    lambda m, x: m.b(m.a(x) * m.c(x)),
    # Vectors along the channels, the rows and the columns.
    lambda m, x: m.b(m.a(x) * m.vector[:, None, None]),
    lambda m, x: m.b(m.a(x) * m.vector[:, None]),
    lambda m, x: m.b(m.a(x) * m.vector),
    lambda m, x: m.b((m.a(x) * m.vector.exp()[None, :, None, None] + m.vector.neg()[:, None, None]).relu()),
    lambda m, x: m.b(torch.add(m.a(x), m.vector.neg()[:, None, None], alpha=2)),
    # Read by something else too.
    lambda m, x: (y := m.a(x) * m.c(x).mean((2, 3), keepdim=True), m.b(y)),
    lambda m, x: (y := torch.cat([m.a(x), x], 1)[:, 8:24], m.b(y)),
    lambda m, x: (m.b(y := torch.relu(m.a(x) + x)), m.c(y)),
    # Along another axis, or of other sizes.
    lambda m, x: m.b(torch.cat([m.a(x), x], 2)),
    lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 1).view(2, 16, 32, 16)),
    lambda m, x: m.b(torch.cat([m.a(x)[:, :8], m.c(x)[:, 8:]], 1)),
    # Means over other axes, and of a few pixels.
    lambda m, x: m.b(m.a(x).mean((-1, -2), keepdim=True)),
    lambda m, x: m.b(m.a(x).mean(2, keepdim=True)),
    lambda m, x: m.b(m.a(x).mean((1, 2), keepdim=True).expand(2, 16, 16, 16)),
    lambda m, x: (y := m.a(x).mean((2, 3)), m.b(y[:, :, None, None])),
    # Other parts of the means' memory.
    lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True).as_strided((2, 16, 1, 1), (1, 2, 1, 1))),
    lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True).as_strided((2, 16, 1, 1), (0, 1, 1, 1), 16)),
    lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True).as_strided((1, 16, 1, 2), (16, 1, 1, 16))),
    lambda m, x: (y := m.a(x).mean((2, 3), keepdim=True).flatten(1), m.b(y.view(2, 16, 1, 1)), y + 1),
    lambda m, x: m.c(m.b(nn.functional.hardtanh(m.a(x), -0.5, 0.5))),
    lambda m, x: m.b(nn.functional.hardtanh(x * m.c(x).mean((2, 3), keepdim=True), -0.5, 0.5)),
]


@pytest.mark.parametrize(
    "functions",
    [
        *(pytest.param(NEAR_MISSES[at::5], id=f"every fifth from {at}") for at in range(5)),
        *(pytest.param([each], id=str(at), marks=pytest.mark.full) for at, each in enumerate(NEAR_MISSES)),
    ],
)
def test_near_misses_and_what_is_read_in_other_ways(functions):
    model = seeded(lambda: Several(Convolutions, functions))
    run = compiled(model)
    assert_eagers(run, model, X)
    model.load_state_dict(seeded(lambda: Several(Convolutions, functions), 3).state_dict())
    assert_eagers(run, model, X)


class Stems(nn.Module):
    """Convolutions of few channels, put together by a function."""

    def __init__(self, function):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.other = nn.Conv2d(3, 16, 3, 2, 1)
        self.back = nn.Conv2d(16, 3, 1)
        self.point = nn.Conv2d(3, 16, 1, 2)
        self.same = nn.Conv2d(3, 3, 3, padding=1)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def _kernels():
    remarks = fxpasses.last_report().remarks
    found = [
        remark.message for remark in remarks if remark.rule == "own_kernels" and remark.status == "applied"
    ]
    return [Kernel.from_code(int(message.split(",")[0].split()[1])) for message in found]


IMAGE = torch.randn(2, 3, 15, 20, generator=torch.Generator().manual_seed(1))


STEMS = [
    (lambda m, x: m.back(m.stem(x)), 1),
    # Worked out by inductor, which writes what is asked for.
    (lambda m, x: m.back(m.stem((x - 0.5) / 2)), 1),
    (lambda m, x: m.back(m.stem(x * torch.sigmoid(x.mean((2, 3), keepdim=True)))), 1),
    # One input that is read both ways, and as a summand too.
    (lambda m, x: m.back(m.stem(x) + m.point(x)), 1),
    (lambda m, x: m.back(m.stem(x).relu() + m.other(x)), 2),
    (lambda m, x: m.back(m.point(x + m.same(x))), 1),
    (lambda m, x: (m.back(m.stem(x)), x.mean((2, 3), keepdim=True)), 1),
    # What a convolution gave lies pixel by pixel.
    (lambda m, x: m.stem(m.back(m.other(x))), 1),
    (lambda m, x: m.stem(m.back(m.point(x)).relu() + 1), 0),
]
"""And how many kernels read a contiguous image plane by plane."""


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "cases",
    [
        *(pytest.param(STEMS[at::3], id=f"every third from {at}") for at in range(3)),
        *(pytest.param([each], id=str(at), marks=pytest.mark.full) for at, each in enumerate(STEMS)),
    ],
)
def test_images_of_few_channels_are_read_as_they_lie(cases, order):
    functions, planar = [function for function, _ in cases], sum(count for _, count in cases)
    model = seeded(lambda: Several(Stems, functions))
    run = compiled(model)
    x = IMAGE.contiguous(memory_format=order)
    assert_eagers(run, model, x)
    is_planar = order is torch.contiguous_format
    assert sum(kernel.planar for kernel in _kernels()) == (planar if is_planar else 0)
    model.load_state_dict(seeded(lambda: Several(Stems, functions), 3).state_dict())
    assert_eagers(run, model, x)


def test_an_input_that_is_written_to_is_read_before():
    def function(m, x):
        y = m.a(x)
        x.mul_(2)
        return m.c(m.b(y) + m.b(x))

    model = seeded(lambda: Convolutions(function))
    run = compiled(model)
    assert_eagers(run, model, X)
    mine, theirs = X.clone(), X.clone()
    with torch.no_grad():
        run(mine)
        model(theirs)
    assert torch.equal(mine, theirs)


def test_a_large_expansion_in_a_model():
    class Expansion(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = nn.Sequential(nn.Conv2d(8, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU6())
            self.deep = nn.Sequential(nn.Conv2d(64, 64, 3, 2, 1, groups=64), nn.BatchNorm2d(64), nn.ReLU6())
            self.back = nn.Conv2d(64, 8, 1)

        def forward(self, x):
            return self.back(self.deep(self.wide(x)))

    model = seeded(Expansion)
    assert_eagers(compiled(model), model, torch.randn(1, 8, 96, 70))
    assert calls() == [3]


def test_several_threads_share_a_sequence():
    from concurrent.futures import ThreadPoolExecutor

    model = seeded(Gated)
    run = compiled(model)
    inputs = [torch.randn(1, 16, 12, 12) for _ in range(8)]
    with torch.no_grad():
        wanted = [run(tensor) for tensor in inputs]

    def call(x):
        with torch.no_grad():
            return run(x)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, inputs * 5))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted * 5, strict=True))


class Residual(nn.Module):
    """Two convolutions of three taps each way, the second of which is added to."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))

    def forward(self, x):
        x = self.first(x)
        return torch.relu(x + self.second(x))


@pytest.fixture
def winograd_first(monkeypatch):
    """Takes a kernel of Winograd's wherever there is one."""

    def kernels_for(*given, **named):
        return sorted(convolution.kernels_for(*given, **named), key=lambda one: one.kind is not Kind.WINOGRAD)

    monkeypatch.setattr(own_kernels, "kernels_for", kernels_for)


@pytest.mark.parametrize("dynamic", [False, True])
def test_winograds_kernels_follow_one_another_for_sizes_of_all_kinds(dynamic, winograd_first):
    model = seeded(Residual)
    run = torch.compile(
        model,
        backend="fxpasses",
        options={"weights": "cached", "profit": "always"},
        dynamic=dynamic,
    )
    shapes = [(2, 16, 9, 14), (3, 16, 6, 7), (2, 16, 2, 3)] if dynamic else [(2, 16, 9, 14)]
    for shape in shapes:
        assert_eagers(run, model, torch.randn(shape).contiguous(memory_format=torch.channels_last))
    assert calls() == [2]
    with torch.no_grad():
        model.second[1].running_mean.add_(1)
        model.first[0].weight.mul_(2)
    for shape in shapes:
        assert_eagers(run, model, torch.randn(shape).contiguous(memory_format=torch.channels_last))


class Parts(nn.Module):
    """A block as detectors have: halves, a sum behind an activation, three poolings, a concatenation."""

    def __init__(self, channels=32, depthwise=False):
        super().__init__()
        groups = channels if depthwise else 1
        self.first = nn.Conv2d(16, 2 * channels, 1)
        self.square = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        self.last = nn.Conv2d(6 * channels, 24, 1)

    def forward(self, x):
        left, right = nn.functional.silu(self.first(x)).chunk(2, 1)
        right = right + nn.functional.silu(self.square(right))
        pooled = [right]
        for _ in range(3):
            pooled.append(nn.functional.max_pool2d(pooled[-1], 5, 1, 2))
        return self.last(torch.cat([left, *pooled, left + right], 1))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("shape", [(1, 16, 9, 12), (2, 16, 5, 5)], ids=str)
def test_halves_sums_and_poolings_are_part_of_one_call(shape, depthwise):
    model = seeded(lambda: Parts(depthwise=depthwise))
    run = compiled(model)
    assert_eagers(run, model, torch.randn(shape))
    assert calls() == [3]
    with torch.no_grad():
        model.square.weight.mul_(2)
    assert_eagers(run, model, torch.randn(shape))


def test_parts_and_maxima_follow_sizes_that_change():
    model = seeded(Parts)
    run = torch.compile(
        model, backend="fxpasses", options={"weights": "cached", "profit": "always"}, dynamic=True
    )
    for shape in ((2, 16, 9, 12), (3, 16, 7, 5)):
        assert_eagers(run, model, torch.randn(shape))
    assert calls() == [3]


class Seen(nn.Module):
    """A part, a sum or a maximum that something else reads as well."""

    def __init__(self, reader):
        super().__init__()
        self.first, self.last = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)
        self.thin = nn.Conv2d(16, 16, 1)
        self.reader = reader

    def forward(self, x):
        return self.reader(self, torch.relu(self.first(x)))


@pytest.mark.parametrize(
    "reader",
    [
        lambda self, x: (self.thin(x[:, :16]), x[:, 16:] * 2),
        lambda self, x: (self.thin(x[:, 3:19]), x),
        lambda self, x: (self.thin(x.split(16, 1)[0]), torch.sort(x.split(16, 1)[0], 1)[0]),
        lambda self, x: self.thin(x.split([10, 16, 6], 1)[1].split(16, 1)[0] + x[:, 16:]),
        lambda self, x: (self.thin((x[:, :16] + x[:, 16:]).relu()), x[:, :16] + x[:, 16:]),
        lambda self, x: torch.max_pool2d(self.last(torch.max_pool2d(x, 3, 2, 1)), 2),
        lambda self, x: self.last(torch.nn.functional.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
        lambda self, x: self.last(torch.nn.functional.max_pool2d(x, (3, 2), (1, 2), (1, 0), (2, 1))),
        lambda self, x: self.last(torch.nn.functional.max_pool2d(x, 3, return_indices=True)[0]),
        lambda self, x: [self.last(y) for y in torch.nn.functional.max_pool2d(x, 3, return_indices=True)[:1]],
        lambda self, x: torch.nn.functional.max_pool2d(self.last(x), 3, return_indices=True),
        lambda self, x: self.last(x + x.mean((2, 3), keepdim=True)),
        lambda self, x: self.last(torch.add(x, x, alpha=2)),
        lambda self, x: self.thin(x[:, ::2]),
        lambda self, x: self.last(x[:, :, 1:, :-1]),
        lambda self, x: self.thin(x[:, -16:]) + x[:, :16],
        lambda self, x: self.last(torch.cat([x[:, :8], x[:, 8:]], 1) + x),
    ],
    ids=range(17),
)
def test_what_is_seen_elsewhere_or_almost_a_part_is_right(reader):
    model = seeded(lambda: Seen(reader))
    x = torch.randn(2, 16, 7, 9)
    assert_eagers(compiled(model), model, x)
    sorted_or_not = x.clone()
    sorted_or_not[0, :, 2, 3] = float("nan")
    with torch.no_grad():
        for found, wanted in zip(
            leaves(compiled(model)(sorted_or_not)),
            leaves(model(sorted_or_not)),
            strict=True,
        ):
            assert torch.equal(found.isnan(), wanted.isnan())
