"""Which implementation is taken: what was measured, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxpasses.devices.own import own_store
from fxpasses.kernels import choice as choices
from fxpasses.kernels.choice import KernelTiming, choose, choose_linear, keep
from fxpasses.kernels.convolution import Sizes, kernels_for
from fxpasses.kernels.kernel import DEPTHWISE, SLIDING, Kernel, Kind

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


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A store of this test alone: what is measured here is not for others."""
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(tmp_path))
    return own_store("cpu")


@pytest.mark.parametrize("slow", ["theirs", "ours"])
def test_the_fastest_is_chosen(monkeypatch, slow):
    theirs = 2.0 if slow == "theirs" else 0.1
    monkeypatch.setattr(choices, "_medians", lambda calls, copies: [theirs, *(1.0 for _ in calls[1:])])
    found = choose(SIZES, (1, 16, 8, 8))
    assert found.pays == (slow == "theirs")
    assert found.kernel in kernels_for(SIZES, 64)


@pytest.mark.parametrize(("seconds", "slides"), [(1.0, True), (1.04, True), (1.06, False)])
def test_of_two_alike_the_one_is_chosen_that_makes_single_rows(monkeypatch, seconds, slides):
    sizes = Sizes(32, 32, 2, (3, 3), (1, 1), (1, 1), (1, 1))
    ours = kernels_for(sizes, 64)
    assert SLIDING in ours
    times = [seconds if kernel is SLIDING else 1.0 for kernel in ours]
    monkeypatch.setattr(choices, "_medians", lambda calls, copies: [2.0, *times])
    found = choose(sizes, (1, 32, 8, 8))
    assert (found.kernel is SLIDING) == slides
    assert found.seconds == (seconds if slides else 1.0)


def test_it_is_measured_once_and_random_numbers_are_left_alone(monkeypatch):
    state = torch.random.get_rng_state()
    first = choose(SIZES, (1, 16, 8, 8)), choose_linear(4, 16, 32)
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(choices, "_medians", None)
    assert (choose(SIZES, (1, 16, 8, 8)), choose_linear(4, 16, 32)) == first
    assert all(timing.seconds > 0 and timing.theirs > 0 for timing in first)


def test_another_process_finds_what_was_measured_in_the_store(monkeypatch, store):
    first = choose(SIZES, (1, 16, 8, 8)), choose_linear(4, 16, 32)
    assert not store.path.exists()
    keep()
    assert store.path not in choices._unwritten
    monkeypatch.setattr(choices, "_medians", None)
    assert (choose(SIZES, (1, 16, 8, 8)), choose_linear(4, 16, 32)) == first
    assert len(store.profile().choices) == 2
    keep()  # there is nothing to write


@pytest.mark.parametrize("changed", ["sizes", "image", "summand", "planar", "far", "threads", "kernels"])
def test_what_decides_the_time_is_measured_anew(monkeypatch, changed):
    measured = []
    monkeypatch.setattr(choices, "_medians", lambda calls, copies: measured.append(1) or [1.0] * len(calls))
    sizes, image, given = SIZES, (1, 16, 8, 8), {"summand": False, "planar": False, "far": False}
    choose(sizes, image, **given)
    choose(sizes, image, **given)
    assert len(measured) == 1
    threads = torch.get_num_threads()
    if changed == "sizes":
        sizes = replace(sizes, stride=(2, 2))
    elif changed == "image":
        image = (2, 16, 8, 8)
    elif changed == "kernels":
        monkeypatch.setattr(choices.library, "identity", lambda: "others")
    elif changed == "threads":
        torch.set_num_threads(threads + 1)
    else:
        given[changed] = True
    try:
        choose(sizes, image, **given)
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 2


def test_without_kernels_torch_keeps_the_convolution(monkeypatch):
    monkeypatch.setattr(choices, "kernels_for", lambda *given, **others: ())
    assert not choose(SIZES, (1, 16, 8, 8)).pays
    assert not choose_linear(4, 16, 32).pays


def test_a_sum_is_measured_as_one():
    found = choose(SIZES, (1, 16, 8, 8), summand=True)
    assert found.kernel in kernels_for(SIZES, 64)
    assert found.seconds > 0


@pytest.mark.parametrize("planar", [False, True])
def test_few_channels_are_measured_as_they_lie(monkeypatch, planar):
    read = []
    original = choices._call
    monkeypatch.setattr(choices, "_call", lambda *given: read.append(given[2][0]) or original(*given))
    stem = Sizes(3, 16, 1, (3, 3), (2, 2), (1, 1), (1, 1))
    found = choose(stem, (1, 3, 16, 16), planar=planar)
    assert found.kernel in kernels_for(stem, 64, planar=planar)
    assert {image.is_contiguous() for image in read} == {planar}


def test_filters_that_are_far_lie_elsewhere_at_each_turn(monkeypatch):
    monkeypatch.setattr(choices, "far_bytes", lambda device: 4 * 4 * 1000)
    packed = [torch.zeros(30), torch.zeros(100), torch.zeros(7)]
    found = choices._apart(packed)
    assert [{len(view) for view in views} for views in found] == [{30}, {100}, {7}]
    turns = [view for views in zip(*found, strict=True) for view in views]
    taken = [(view.data_ptr(), view.data_ptr() + view.nbytes) for view in turns]
    read: list[tuple[int, int]] = []
    for start, stop in taken:
        earlier = [at for at, one in enumerate(read) if one[0] < stop and start < one[1]]
        if earlier:  # not before nearly all of the memory was read
            assert sum(high - low for low, high in read[earlier[-1] + 1 :]) >= 0.6 * 4000
        read.append((start, stop))
    assert len(choices._apart([torch.zeros(5000)])[0]) > 1


@pytest.mark.parametrize("summand", [False, True])
def test_far_filters_are_measured(summand):
    found = choose(SIZES, (1, 16, 8, 8), far=True, summand=summand)
    assert found.kernel in kernels_for(SIZES, 64)
    assert found.seconds > 0
    assert found.theirs > 0
