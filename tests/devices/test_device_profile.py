"""Device profiles: exact answers or None, a round trip, and a warning for what cannot be trusted."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fxpasses
from fxpasses.devices import profile as device_profile
from fxpasses.devices.profile import (
    CONVOLUTION_FORWARD,
    LAYOUT_COPY,
    DeviceProfile,
    DeviceProfileWarning,
    Estimate,
    Layout,
    Measurement,
    Roofline,
    bytes_key,
    convolution_key,
    operator_key,
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(tmp_path))
    return tmp_path


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


def test_the_roofline_is_the_slower_of_arithmetic_and_traffic_plus_the_call() -> None:
    peaks = a_profile().roofline("float32")
    assert peaks is not None
    assert peaks.seconds(5e9, 1e6) == pytest.approx(1e-6 + 1e-2)
    assert peaks.seconds(5e9, 1e6, kind="matmul") == pytest.approx(1e-6 + 5e-3)
    assert peaks.seconds(0, 1e9) == pytest.approx(1e-6 + 1e-2)
    assert a_profile().roofline("bfloat16") is None


def test_a_profile_survives_saving_and_loading(tmp_path: Path) -> None:
    profile = a_profile(row(3e-4), row(1e-4, "channels_last", "mm"))
    path = tmp_path / "new folder" / "profile.json"
    profile.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device_profile.load(path) == profile
    assert [each.name for each in path.parent.iterdir()] == ["profile.json"]


def test_merging_keeps_the_old_rows_and_prefers_the_new_ones() -> None:
    old = a_profile(row(3e-4), row(2e-4, "channels_last"))
    new = a_profile(row(9e-4), row(1e-4, dtype="bfloat16"))
    merged = old.merged(new)
    assert {(each.layout, each.dtype): each.seconds for each in merged.measurements} == {
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


def test_find_prefers_the_users_own_profile(cache: Path) -> None:
    profile = a_profile(row(3e-4))
    profile.save(cache / device_profile.file_name("Imaginary 9000"))
    assert device_profile.find("Imaginary 9000") == profile


def test_a_device_without_a_profile_is_no_cause_for_a_warning(cache: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device_profile.find("Imaginary 9000") is None


def test_find_falls_back_to_the_shipped_profile_when_the_users_own_is_corrupt(
    cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path_factory.mktemp("package")
    monkeypatch.setattr("importlib.resources.files", lambda _: package)
    profile = a_profile(row(3e-4))
    profile.save(package / "profiles" / device_profile.file_name(profile.device))
    (cache / device_profile.file_name(profile.device)).write_text("{", "utf-8")
    with pytest.warns(DeviceProfileWarning, match="cannot be read as JSON"):
        assert device_profile.find(profile.device) == profile


def test_a_file_that_changes_is_read_again(cache: Path) -> None:
    path = cache / device_profile.file_name("Imaginary 9000")
    for seconds in (3e-4, 30e-4, 300e-4):
        a_profile(row(seconds)).save(path)
        assert device_profile.find("Imaginary 9000") == a_profile(row(seconds))


def test_the_digest_tells_contents_apart() -> None:
    assert a_profile(row(3e-4)).digest == a_profile(row(3e-4)).digest
    assert a_profile(row(3e-4)).digest != a_profile(row(4e-4)).digest


def test_every_shipped_profile_can_be_found_by_its_devices_name() -> None:
    shipped = sorted((Path(device_profile.__file__).parent / device_profile.SHIPPED).glob("*.json"))
    assert shipped
    for path in shipped:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            profile = device_profile.load(path)
        assert profile is not None
        assert path.name == device_profile.file_name(profile.device)


def test_profiles_are_part_of_the_package() -> None:
    settings = (Path(fxpasses.__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    assert f'"devices/{device_profile.SHIPPED}/*.json"' in settings


def damaged(path: Path, damage: str) -> None:
    a_profile(row(3e-4)).save(path)
    data = json.loads(path.read_text("utf-8"))
    first = data["measurements"][0]
    match damage:
        case "truncated":
            path.write_text(path.read_text("utf-8")[:-40], "utf-8")
            return
        case "not text":
            path.write_bytes(b"\xff\xfe\x00")
            return
        case "another schema":
            data["schema"] = 999
        case "a list":
            data = [data]
        case "no measurements":
            del data["measurements"]
        case "NaN seconds":
            first["seconds"] = float("nan")
        case "negative seconds":
            first["seconds"] = -1.0
        case "seconds as text":
            first["seconds"] = "3e-4"
        case "unknown layout":
            first["layout"] = "NC4HW4"
        case "copy without a size":
            first |= {"operator": LAYOUT_COPY, "key": "big"}
        case "zero bandwidth":
            data["rooflines"][0]["bandwidth"] = 0
    path.write_text(json.dumps(data), "utf-8")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("truncated", "cannot be read as JSON"),
        ("not text", "cannot be read as JSON"),
        ("another schema", "schema version is 999"),
        ("a list", "schema version is None"),
        ("no measurements", "KeyError: 'measurements'"),
        ("NaN seconds", "seconds must be positive and finite, got nan"),
        ("negative seconds", r"seconds must be positive and finite, got -1\.0"),
        ("seconds as text", "seconds must be a number, got '3e-4'"),
        ("unknown layout", "layout 'NC4HW4' is none of"),
        ("copy without a size", "bytes=N, got 'big'"),
        ("zero bandwidth", "bandwidth must be positive"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_named_and_ignored(cache: Path, damage: str, reason: str) -> None:
    path = cache / device_profile.file_name("Imaginary 9000")
    damaged(path, damage)
    with pytest.warns(DeviceProfileWarning, match=reason) as caught:
        assert device_profile.find("Imaginary 9000") is None
    assert str(path) in str(caught[0].message)


def test_a_profile_of_another_device_is_named_and_ignored(cache: Path) -> None:
    path = cache / device_profile.file_name("Imaginary 9000")
    a_profile(device="Other").save(path)
    with pytest.warns(DeviceProfileWarning, match="measured on 'Other', and this device is 'Imaginary 9000'"):
        assert device_profile.find("Imaginary 9000") is None


def test_one_value_stands_for_every_spatial_dimension_in_a_convolutions_key() -> None:
    def key(stride: list[int], padding: list[int], dilation: list[int]) -> str:
        return convolution_key((1, 3, 8, 8), (4, 3, 3, 3), stride, padding, dilation)

    assert key([2], [1], [1]) == key([2, 2], [1, 1], [1, 1])
    assert key([2], [1], [1]) != key([2, 1], [1, 1], [1, 1])


def test_output_padding_is_part_of_a_key_only_where_it_means_something() -> None:
    def key(transposed: bool, output_padding: tuple[int, int]) -> str:
        return convolution_key((1, 4, 8, 8), (4, 4, 3, 3), (2, 2), (1, 1), (1, 1), transposed, output_padding)

    assert key(False, (0, 0)) == key(False, (1, 1))
    assert key(True, (0, 0)) != key(True, (1, 1))
    assert key(True, (0, 0)) != key(False, (0, 0))


def test_defaults_and_keywords_do_not_change_an_operators_key() -> None:
    x = torch.empty(2, 8, 6, 6)
    target = aten.max_pool2d_with_indices.default
    short = operator_key(target, (x, [2, 2]), {})
    assert short == operator_key(target, (x, [2, 2], [], [0, 0], [1, 1], False), {})
    assert short == operator_key(target, (x,), {"kernel_size": [2, 2]})
    assert short != operator_key(target, (x, [2, 2], [1, 1]), {})
    assert "2x8x6x6" in short


def test_a_dimension_has_one_spelling_in_an_operators_key() -> None:
    x = torch.empty(2, 8, 6, 6)
    keys = {operator_key(aten.mean.dim, (x, dims), {}) for dims in ([2, 3], [-1, -2], [3, 2])}
    assert keys == {"input=2x8x6x6 dim=[2,3] keepdim=False dtype=None"}
    assert operator_key(aten.cat.default, ([x, x], -3), {}) == operator_key(aten.cat.default, ([x, x], 1), {})


def test_the_tensors_of_a_list_are_part_of_an_operators_key() -> None:
    x, y = torch.empty(2, 8, 6, 6), torch.empty(2, 4, 6, 6)
    key = operator_key(aten.cat.default, ([x, y], 1), {})
    assert key == "tensors=[2x8x6x6,2x4x6x6] dim=1"


def test_the_name_of_a_cpu_says_how_many_threads_it_may_use() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert device_profile.device_name("cpu").endswith(", 1 threads")
    finally:
        torch.set_num_threads(before)
