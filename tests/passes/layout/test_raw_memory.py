"""Whoever reads memory raw finds eager's: random small models, in every mode that changes layouts.

A case is a model (convolutions, norms and activations of any rank), a reader of what it gives, a mode, a
dtype, and static or symbolic sizes. Results equal eager's in values and strides; with gradients on, so do
gradients, of which strides of dimensions of size 1 are not compared.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from helpers import covering, randomised, strides_that_matter
from torch import nn

from fxpasses.devices.profile import DeviceProfile, Estimate, Roofline
from fxpasses.devices.store import device_name
from fxpasses.testing import assert_close_to_eager
from fxpasses.testing.strategies.readers import READERS
from fxpasses.torch_internals.pytree import tree_leaves

DTYPES = (torch.float64, torch.float32, torch.bfloat16)

RANDOM = ("random like it", "dropout")

CASES = 1000


class Mode(NamedTuple):
    """A way to compile: options, whether gradients are on, and whether a profile is invented for a plan."""

    options: dict[str, Any]
    grad: bool = False
    invents: bool = False


MODES = {
    "cached": Mode({"weights": "cached"}),
    "own kernels": Mode({"weights": "cached", "profit": "always"}),
    "cached, eager": Mode({"weights": "cached", "inner": "aot_eager"}),
    "cached, channels-last": Mode({"weights": "cached", "layout": "channels_last"}),
    "plan": Mode({}, invents=True),
    "plan, gradients": Mode({}, grad=True, invents=True),
    "channels-last": Mode({"layout": "channels_last"}),
    "channels-last, gradients": Mode({"layout": "channels_last"}, grad=True),
    "channels-last, eager": Mode({"layout": "channels_last", "inner": "aot_eager"}, grad=True),
    "contiguous": Mode({"layout": "contiguous"}, grad=True),
    "stock": Mode({"layout": "off"}),
    "stock, gradients": Mode({"layout": "off"}, grad=True),
}
"""Every mode that changes layouts, and those in which stock inductor decides."""


class InventedProfile(DeviceProfile):
    """A profile that knows everything, by chance: plans of it mix layouts where no measured one would."""

    def seconds(self, operator: str, key: str, layout: str, *_: object, **__: object) -> Estimate:
        return Estimate(
            1e-5 * (1 + zlib.crc32(f"{operator} {key} {layout}".encode()) % 97), "aten.convolution"
        )

    def copy_seconds(
        self, num_bytes: int, layout: str, dtype: str = "float32", *, of_weight: bool = False
    ) -> float:
        return 1e-6


@dataclass(frozen=True)
class Case:
    """One model and how it is run, all drawn from a seed."""

    seed: int
    mode: str
    reader: str
    dtype: torch.dtype
    dynamic: bool
    rank: int
    memory_format: str

    @staticmethod
    def of(seed: int) -> Case:
        """The case of a seed; every pair of a mode and a reader is among the first `CASES`."""
        draw = random.Random(seed)
        pairs = len(MODES) * len(READERS)
        mode, number = divmod(seed * 151 % pairs, len(READERS))
        reader = list(READERS)[number]
        return Case(
            seed,
            list(MODES)[mode],
            reader,
            # What is drawn at random has no float64 reference, and bfloat16 is nothing without one.
            draw.choice(DTYPES[:2] if reader in RANDOM else DTYPES),
            draw.random() < 0.25,
            draw.choice((1, 2, 2, 2, 3)),
            draw.choice(("contiguous", "contiguous", "channels-last", "transposed")),
        )

    def __str__(self) -> str:
        sizes = "symbolic" if self.dynamic else "static"
        return f"{self.seed}-{self.mode}-{self.reader}-{self.rank}d-{str(self.dtype)[6:]}-{sizes}"


class Body(nn.Module):
    """A few layers of one rank, and a reader of what they give."""

    def __init__(self, layers: list[nn.Module], reader: str) -> None:
        super().__init__()
        self.layers, self.reader = nn.Sequential(*layers), reader

    def forward(self, x: torch.Tensor) -> Any:
        return READERS[self.reader](self.layers(x))


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def layers_of(draw: random.Random, rank: int) -> list[nn.Module]:
    """Two or three blocks: a convolution, and maybe a norm and an activation."""
    channels, layers = 3, []
    for _ in range(draw.choice((1, 2, 2))):
        filters, kernel = draw.choice((4, 8, 16)), draw.choice((1, 1, 3))
        kind = draw.choice((CONVOLUTIONS, CONVOLUTIONS, CONVOLUTIONS, TRANSPOSED))[rank - 1]
        padding = 0 if kind in TRANSPOSED else draw.choice((0, kernel // 2))
        layers.append(kind(channels, filters, kernel, padding=padding, bias=draw.random() < 0.5))
        norms = (NORMS[rank - 1], NORMS[rank - 1], INSTANCE[rank - 1], lambda n: nn.GroupNorm(2, n))
        if draw.random() < 0.75:
            layers.append(draw.choice(norms)(filters))
        if draw.random() < 0.5:
            layers.append(draw.choice((nn.SiLU, nn.Softplus, nn.Sigmoid))())
        channels = filters
    return layers


def laid_out(given: torch.Tensor, memory_format: str) -> torch.Tensor:
    """The same values in another layout."""
    if memory_format == "channels-last":
        return given.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory_format == "transposed":
        return given.transpose(-1, -2).contiguous().transpose(-1, -2)
    return given


def model_of(case: Case) -> nn.Module:
    """The model of a case, in eval mode."""
    draw = random.Random(-case.seed)
    torch.manual_seed(case.seed)
    model = randomised(Body(layers_of(draw, case.rank), case.reader), case.dtype)
    if draw.random() < 0.3:
        for module in model.modules():
            if isinstance(module, CONVOLUTIONS):
                module.weight = nn.Parameter(laid_out(module.weight.detach(), "channels-last"))
    return model


def inputs_of(case: Case) -> list[torch.Tensor]:
    """One input, and one of other sizes where sizes are symbols; in training only that of the batch."""
    sizes = [(2, 3, *(7, 6, 5)[: case.rank])]
    if case.dynamic:
        others = (7, 6, 5) if MODES[case.mode].grad else (9, 8, 6)
        sizes.append((3, 3, *others[: case.rank]))
    return [laid_out(torch.randn(size).to(case.dtype), case.memory_format) for size in sizes]


def run(
    call: Any, model: nn.Module, given: torch.Tensor, grad: bool, dynamic: bool = False
) -> tuple[list, list]:
    """Results, and gradients of a weighted sum of those that have one."""
    given = given.detach().clone(memory_format=torch.preserve_format).requires_grad_(grad)
    if grad and dynamic:
        torch._dynamo.maybe_mark_dynamic(given, 0)
    model.zero_grad()
    torch.manual_seed(7)
    with torch.set_grad_enabled(grad):
        results = [result for result in tree_leaves(call(given)) if isinstance(result, torch.Tensor)]
    targets = [result for result in results if result.requires_grad]
    if not targets:
        return results, []
    generator = torch.Generator().manual_seed(8)
    weights = [torch.randn(target.shape, generator=generator).to(target.dtype) for target in targets]
    torch.autograd.backward(targets, weights)
    leaves = [given, *model.parameters()]
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [result.detach() for result in results], gradients


@contextlib.contextmanager
def invented_profile(monkeypatch: pytest.MonkeyPatch, mode: Mode) -> Iterator[None]:
    peaks = tuple(Roofline(str(dtype)[6:], 1e11, 1e11, 1e10, 1e-6) for dtype in DTYPES)
    profile = InventedProfile(device_name("cpu"), torch.__version__, rooflines=peaks)
    with monkeypatch.context() as patched:
        patched.setattr("fxpasses.devices.store.find", lambda device: profile if mode.invents else None)
        yield


def check(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, model = MODES[case.mode], model_of(case)
    ours, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    # Otherwise inductor draws random numbers of its own.
    inductor = {"inductor": {"fallback_random": True}} if "inner" not in mode.options else {}
    dynamic = case.dynamic and not mode.grad
    compiled = torch.compile(ours, backend="fxpasses", options={**mode.options, **inductor}, dynamic=dynamic)
    for given in inputs_of(case):
        with invented_profile(monkeypatch, mode), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, wanted = run(model, model, given, mode.grad)
            found, gradients = run(compiled, ours, given, mode.grad, case.dynamic)
        assert [result.stride() for result in found] == [result.stride() for result in expected]
        if case.reader in RANDOM:
            truth = [result.double() for result in expected]  # float64 draws other numbers
        else:
            truth = run(exact, exact, given.double(), mode.grad)[0]
        assert_close_to_eager("result", found, expected, truth, factor=4.0)
        if case.dtype == torch.float64:
            for got, want in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
                assert strides_that_matter(got) == strides_that_matter(want)


def traits(case: Case) -> set[tuple[object, ...]]:
    """What the quick run must have met.

    That is all single traits, with gradients and without; and each mode for which no C++ is compiled with all
    ranks, formats and kinds of sizes.
    """
    mode = MODES[case.mode]
    generated = "inner" not in mode.options
    varied = {("dynamic", case.dynamic), ("rank", case.rank), ("format", case.memory_format)}
    single = {("mode", case.mode), ("reader", case.reader), ("dtype", case.dtype)}
    of = ("gradients" if mode.grad else "inference") if generated else case.mode
    return single | {(of, *trait) for trait in varied}


ALL = [Case.of(seed) for seed in range(CASES)]


def _cost(case: Case) -> tuple[bool, bool, int]:
    return "inner" not in MODES[case.mode].options, case.dynamic, case.rank


# The first that has what is missing is taken, and static sizes, few dimensions and no C++ take less time.
QUICK = covering(sorted(ALL, key=_cost), traits)
"""A covering set. Three quarters of it are cases that no C++ is compiled for."""


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_readers_of_raw_memory_find_eagers(case, monkeypatch):
    check(case, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in ALL if case not in QUICK], ids=str)
def test_a_thousand_readers_of_raw_memory_find_eagers(case, monkeypatch):
    check(case, monkeypatch)


def test_the_quick_run_meets_every_mode_and_every_reader():
    assert set().union(*map(traits, QUICK)) == set().union(*map(traits, ALL))
    assert {case.mode for case in QUICK} == set(MODES)
    assert {case.reader for case in QUICK} == set(READERS)
    assert {case.dtype for case in QUICK} == set(DTYPES)


def test_every_mode_meets_every_reader_among_the_thousand():
    drawn = {(case.mode, case.reader) for case in ALL}
    assert len(drawn) == len(MODES) * len(READERS)
