"""Device profiles: exact answers or None, copies between the sizes measured, and what may be merged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxpasses.devices.keys import bytes_key, convolution_key
from fxpasses.devices.profile import (
    CONVOLUTION_FORWARD,
    LAYOUT_COPY,
    WEIGHT_COPY,
    DeviceProfile,
    Estimate,
    Layout,
    Measurement,
    Roofline,
)

aten = torch.ops.aten
KEY = convolution_key((8, 64, 56, 56), (64, 64, 1, 1), (1, 1), (0, 0), (1, 1))


def row(
    seconds: float,
    layout: Layout = "contiguous",
    implementation: str = "aten.convolution",
    *,
    operator: str = CONVOLUTION_FORWARD,
    key: str = KEY,
    dtype: str = "float32",
) -> Measurement:
    return Measurement(operator, key, layout, implementation, dtype, seconds, seconds / 10, 20)


def a_profile(*rows: Measurement, device: str = "Imaginary 9000") -> DeviceProfile:
    peaks = Roofline("float32", matmul_flops=1e12, convolution_flops=5e11, bandwidth=1e11, call_seconds=1e-6)
    return DeviceProfile(device, "2.13.0", {"onednn": "3.12.0"}, {"threads": "2"}, (peaks,), rows)


def test_the_fastest_implementation_of_a_layout_wins_and_is_named() -> None:
    profile = a_profile(row(3e-4), row(2e-4, "channels_last"), row(1e-4, "channels_last", "mm"))
    assert profile.seconds(CONVOLUTION_FORWARD, KEY, "contiguous") == Estimate(3e-4, "aten.convolution")
    assert profile.seconds(CONVOLUTION_FORWARD, KEY, "channels_last") == Estimate(1e-4, "mm")


def test_an_implementation_that_may_not_be_chosen_is_not() -> None:
    profile = a_profile(row(2e-4, "channels_last"), row(1e-4, "channels_last", "mm"))

    def best(*names: str) -> Estimate | None:
        return profile.seconds(CONVOLUTION_FORWARD, KEY, "channels_last", implementations=names)

    assert best("aten.convolution") == Estimate(2e-4, "aten.convolution")
    assert best("something else") is None


@pytest.mark.parametrize(
    ("operator", "key", "layout", "dtype"),
    [
        ("convolution.input_grad", KEY, "contiguous", "float32"),
        (CONVOLUTION_FORWARD, KEY.replace("56x56", "28x28"), "contiguous", "float32"),
        (CONVOLUTION_FORWARD, KEY, "channels_last", "float32"),
        (CONVOLUTION_FORWARD, KEY, "contiguous", "bfloat16"),
    ],
    ids=["operator", "shape", "layout", "dtype"],
)
def test_what_was_not_measured_is_none_and_never_a_neighbour(
    operator: str, key: str, layout: Layout, dtype: str
) -> None:
    profile = a_profile(row(1e-4))
    assert profile.seconds(CONVOLUTION_FORWARD, KEY, "contiguous", "float32") is not None
    assert profile.seconds(operator, key, layout, dtype) is None


def test_copies_are_interpolated_between_the_sizes_measured() -> None:
    copies = [
        row(time, "channels_last", "aten.copy_", operator=LAYOUT_COPY, key=bytes_key(size))
        for size, time in ((1000, 1e-6), (3000, 5e-6))
    ]
    profile = a_profile(*copies)
    assert profile.copy_seconds(2000, "channels_last") == pytest.approx(3e-6)
    assert profile.copy_seconds(10, "channels_last") == pytest.approx(1e-6)
    assert profile.copy_seconds(6000, "channels_last") == pytest.approx(1e-5)
    assert profile.copy_seconds(2000, "contiguous") is None
    assert profile.copy_seconds(2000, "channels_last", "float16") is None


def test_a_weights_copy_is_what_was_measured_of_weights_else_of_images() -> None:
    image = row(4e-6, "channels_last", "aten.copy_", operator=LAYOUT_COPY, key=bytes_key(1000))
    weight = row(1e-6, "channels_last", "aten.copy_", operator=WEIGHT_COPY, key=bytes_key(1000))
    assert a_profile(image).copy_seconds(1000, "channels_last", of_weight=True) == 4e-6
    assert a_profile(image, weight).copy_seconds(1000, "channels_last", of_weight=True) == 1e-6
    assert a_profile(image, weight).copy_seconds(1000, "channels_last") == 4e-6
    assert a_profile(weight).copy_seconds(1000, "channels_last") is None


def test_the_roofline_is_the_slower_of_arithmetic_and_traffic_plus_the_call() -> None:
    peaks = a_profile().roofline("float32")
    assert peaks is not None
    assert peaks.seconds(5e9, 1e6) == pytest.approx(1e-6 + 1e-2)
    assert peaks.seconds(5e9, 1e6, kind="matmul") == pytest.approx(1e-6 + 5e-3)
    assert peaks.seconds(0, 1e9) == pytest.approx(1e-6 + 1e-2)
    assert a_profile().roofline("bfloat16") is None


def test_merging_keeps_the_old_rows_and_prefers_the_new_ones() -> None:
    old = a_profile(row(3e-4), row(2e-4, "channels_last"))
    new = a_profile(row(9e-4), row(1e-4, dtype="bfloat16"))
    merged = old.merged(new)
    assert {(row.layout, row.dtype): row.seconds for row in merged.measurements} == {
        ("contiguous", "float32"): 9e-4,
        ("channels_last", "float32"): 2e-4,
        ("contiguous", "bfloat16"): 1e-4,
    }
    assert len(merged.rooflines) == 1


def with_operands(profile: DeviceProfile, operands: str) -> DeviceProfile:
    return replace(profile, settings={**profile.settings, "operands": operands})


def test_a_profile_that_does_not_say_how_operands_were_read_was_measured_hot() -> None:
    profile = a_profile(row(3e-4))
    assert (profile.operands, with_operands(profile, "cold").operands) == ("hot", "cold")
    assert profile.merged(with_operands(a_profile(), "hot")).operands == "hot"
    with pytest.raises(ValueError, match=r"different settings.*'operands': 'hot'.*'operands': 'cold'"):
        profile.merged(with_operands(a_profile(), "cold"))


def test_profiles_of_different_devices_do_not_merge() -> None:
    with pytest.raises(ValueError, match=r"different device.*Imaginary 9000.*Other"):
        a_profile().merged(a_profile(device="Other"))


def test_the_digest_tells_contents_apart() -> None:
    assert a_profile(row(3e-4)).digest == a_profile(row(3e-4)).digest
    assert a_profile(row(3e-4)).digest != a_profile(row(4e-4)).digest
