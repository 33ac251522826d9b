"""Which implementation is taken: what was measured, and nothing else."""

from __future__ import annotations

import pytest
import torch

from fxpasses.kernels import choice as choices
from fxpasses.kernels.choice import KernelTiming, choose, choose_linear
from fxpasses.kernels.convolution import Sizes, kernels_for
from fxpasses.kernels.kernel import DEPTHWISE, Kernel, Kind

pytestmark = [pytest.mark.vectors, pytest.mark.needs_kernels]

ONE_VECTOR = Kernel(Kind.PRODUCT, 1)
SIZES = Sizes(16, 32, 1, (3, 3), (1, 1), (1, 1), (1, 1))


def test_a_kernel_pays_if_what_it_saves_in_a_model_makes_up_for_the_rest():
    assert KernelTiming(ONE_VECTOR, 0.96, 1.0).pays
    assert KernelTiming(ONE_VECTOR, 1.04, 1.0).pays
    assert not KernelTiming(ONE_VECTOR, 1.06, 1.0).pays
    assert KernelTiming(ONE_VECTOR, 12e-6, 5e-6).pays
    assert not KernelTiming(ONE_VECTOR, 16e-6, 5e-6).pays
    assert not KernelTiming(None, 1.0, 1.0).pays
    assert KernelTiming(DEPTHWISE, 0.5, 1.0).pays  # its number is 0


@pytest.mark.parametrize("slow", ["theirs", "ours"])
def test_the_fastest_is_chosen(monkeypatch, slow):
    theirs = 2.0 if slow == "theirs" else 0.1
    monkeypatch.setattr(choices, "_medians", lambda calls, copies: [theirs, *(1.0 for _ in calls[1:])])
    choices._choose.cache_clear()
    found = choose(SIZES, (1, 16, 8, 8))
    choices._choose.cache_clear()
    assert found.pays == (slow == "theirs")
    assert found.kernel in kernels_for(SIZES, 64)


def test_it_is_measured_once_and_random_numbers_are_left_alone(monkeypatch):
    choices._choose.cache_clear()
    choices._choose_linear.cache_clear()
    state = torch.random.get_rng_state()
    first = choose(SIZES, (1, 16, 8, 8)), choose_linear(4, 16, 32)
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(choices, "_medians", None)
    assert (choose(SIZES, (1, 16, 8, 8)), choose_linear(4, 16, 32)) == first
    assert all(timing.seconds > 0 and timing.theirs > 0 for timing in first)


def test_without_kernels_torch_keeps_the_convolution(monkeypatch):
    monkeypatch.setattr(choices, "kernels_for", lambda *given, **others: ())
    choices._choose.cache_clear()
    choices._choose_linear.cache_clear()
    assert not choose(SIZES, (1, 16, 8, 8)).pays
    assert not choose_linear(4, 16, 32).pays
    choices._choose.cache_clear()
    choices._choose_linear.cache_clear()


def test_a_sum_is_measured_as_one():
    choices._choose.cache_clear()
    found = choose(SIZES, (1, 16, 8, 8), summand=True)
    assert found.kernel in kernels_for(SIZES, 64)
    assert found.seconds > 0


@pytest.mark.parametrize("planar", [False, True])
def test_few_channels_are_measured_as_they_lie(monkeypatch, planar):
    read = []
    original = choices._call
    monkeypatch.setattr(choices, "_call", lambda *given: read.append(given[2][0]) or original(*given))
    stem = Sizes(3, 16, 1, (3, 3), (2, 2), (1, 1), (1, 1))
    choices._choose.cache_clear()
    found = choose(stem, (1, 3, 16, 16), planar=planar)
    assert found.kernel in kernels_for(stem, 64, planar=planar)
    assert {image.is_contiguous() for image in read} == {planar}
