"""A convolution that was not measured is predicted from those that resemble it, with how sure that is."""

from __future__ import annotations

import pytest

from fxpasses.devices.convolutions import Convolution
from fxpasses.devices.prediction import Predictor
from fxpasses.devices.profile import CONVOLUTION_FORWARD, DeviceProfile, Measurement, Roofline

PEAKS = Roofline("float32", matmul_flops=1e11, convolution_flops=1e11, bandwidth=1e10, call_seconds=1e-6)


def plain(channels: int, pixels: int = 28, kernel: int = 3, groups: int = 1) -> Convolution:
    sizes = (1, channels, pixels, pixels), (channels, channels // groups, kernel, kernel)
    return Convolution.of(*sizes, padding=(kernel // 2,), groups=groups)


def bound(case: Convolution) -> float:
    """The roofline, written out."""
    x, w = 1, 1
    for size in case.input_size:
        x *= size
    for size in case.weight_size:
        w *= size
    moved = 4 * (2 * x + w)  # as many channels come out as go in
    return 1e-6 + max(case.flops / 1e11, moved / 1e10)


def profile(times: dict[Convolution, float]) -> DeviceProfile:
    rows = tuple(
        Measurement(CONVOLUTION_FORWARD, case.key, "contiguous", "aten.convolution", "float32", seconds, 0, 7)
        for case, seconds in times.items()
    )
    return DeviceProfile("here", "2", rooflines=(PEAKS,), measurements=rows)


def predicted(times: dict[Convolution, float], case: Convolution):
    return Predictor(profile(times)).predict(CONVOLUTION_FORWARD, case, "contiguous", "float32")


def test_neighbours_that_take_three_times_their_roofline_say_the_same_of_another():
    times = {case: 3 * bound(case) for case in (plain(32), plain(64), plain(256))}
    found = predicted(times, plain(128))
    assert found.seconds == pytest.approx(3 * bound(plain(128)))
    assert 1.1 < found.factor < 1.3


def test_neighbours_that_differ_say_less():
    alike = predicted({case: 3 * bound(case) for case in (plain(64), plain(256))}, plain(128))
    times = {plain(64): 2 * bound(plain(64)), plain(256): 6 * bound(plain(256))}
    apart = predicted(times, plain(128))
    assert 2 * bound(plain(128)) < apart.seconds < 6 * bound(plain(128))
    assert apart.factor > 1.5 > alike.factor


def test_the_nearest_counts_the_most():
    times = {plain(64): 2 * bound(plain(64)), plain(1024): 6 * bound(plain(1024))}
    near, far = predicted(times, plain(72)), predicted(times, plain(900))
    assert near.seconds / bound(plain(72)) < 2.6
    assert far.seconds / bound(plain(900)) > 4.5


def test_one_that_is_far_says_less_than_one_that_is_near():
    times = {plain(64): 3 * bound(plain(64)), plain(80): 3 * bound(plain(80))}
    assert predicted(times, plain(2048)).factor > predicted(times, plain(72)).factor


def test_another_kernel_size_counts_less_than_the_same():
    times = {
        plain(64, kernel=5): 9 * bound(plain(64, kernel=5)),
        plain(32, kernel=3): 2 * bound(plain(32, kernel=3)),
    }
    assert predicted(times, plain(64)).seconds / bound(plain(64)) < 4


def test_one_alone_is_not_trusted_to_be_typical():
    one = predicted({plain(64): 3 * bound(plain(64))}, plain(80))
    two = predicted({case: 3 * bound(case) for case in (plain(64), plain(96))}, plain(80))
    assert one.factor > two.factor


@pytest.mark.parametrize(
    "other",
    [
        plain(64, groups=64),
        plain(64, groups=2),
        Convolution.of((1, 64, 28, 28), (64, 64, 2, 2), (2,), transposed=True),
    ],
    ids=["depthwise", "grouped", "transposed"],
)
def test_another_kind_of_convolution_says_nothing(other):
    assert predicted({plain(64): 1e-3}, other) is None


def test_another_layout_direction_or_dtype_says_nothing():
    predictor = Predictor(profile({plain(64): 1e-3}))
    case = plain(128)
    assert predictor.predict(CONVOLUTION_FORWARD, case, "contiguous", "float32") is not None
    assert predictor.predict(CONVOLUTION_FORWARD, case, "channels_last", "float32") is None
    assert predictor.predict("convolution.input_grad", case, "contiguous", "float32") is None
    assert predictor.predict(CONVOLUTION_FORWARD, case, "contiguous", "bfloat16") is None


@pytest.mark.parametrize(
    "case",
    [
        plain(64),
        plain(64, groups=64),
        Convolution.of((1, 64, 28, 27), (64, 32, 2, 3), (2, 1), (1, 0), (1, 2), True, (1, 0), 2),
        Convolution.of((1, 4, 5, 6, 7), (8, 4, 1, 2, 3)),
    ],
    ids=["plain", "depthwise", "transposed", "3-D"],
)
def test_a_key_says_all_of_its_convolution(case):
    assert Convolution.of_key(case.key) == case


@pytest.mark.parametrize("key", ["", "bytes=3", "input=1x2", plain(64).key.replace("64x64", "64x63")])
def test_what_is_no_key_of_a_convolution_is_refused(key):
    with pytest.raises(ValueError, match="is no key of a convolution"):
        Convolution.of_key(key)
