"""The store of profiles: a round trip, whose profile is found, and a warning for what cannot be trusted."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

import fxpasses
from fxpasses.devices import store
from fxpasses.devices.profile import LAYOUT_COPY
from fxpasses.devices.store import DeviceProfileWarning
from tests.devices.test_device_profile import a_profile, row


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(tmp_path))
    return tmp_path


def test_a_profile_survives_saving_and_loading(tmp_path: Path) -> None:
    profile = a_profile(row(3e-4), row(1e-4, "channels_last", "mm"))
    path = tmp_path / "new folder" / "profile.json"
    profile.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.load(path) == profile
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def test_find_prefers_the_users_own_profile(cache: Path) -> None:
    profile = a_profile(row(3e-4))
    profile.save(cache / store.file_name("Imaginary 9000"))
    assert store.find("Imaginary 9000") == profile


def test_a_device_without_a_profile_is_no_cause_for_a_warning(cache: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.find("Imaginary 9000") is None


def test_find_falls_back_to_the_shipped_profile_when_the_users_own_is_corrupt(
    cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path_factory.mktemp("package")
    monkeypatch.setattr("importlib.resources.files", lambda _: package)
    profile = a_profile(row(3e-4))
    profile.save(package / "profiles" / store.file_name(profile.device))
    (cache / store.file_name(profile.device)).write_text("{", "utf-8")
    with pytest.warns(DeviceProfileWarning, match="cannot be read as JSON"):
        assert store.find(profile.device) == profile


def test_a_file_that_changes_is_read_again(cache: Path) -> None:
    path = cache / store.file_name("Imaginary 9000")
    for seconds in (3e-4, 30e-4, 300e-4):
        a_profile(row(seconds)).save(path)
        assert store.find("Imaginary 9000") == a_profile(row(seconds))


def test_every_shipped_profile_can_be_found_by_its_devices_name() -> None:
    shipped = sorted((Path(store.__file__).parent / store.SHIPPED).glob("*.json"))
    assert shipped
    for path in shipped:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            profile = store.load(path)
        assert profile is not None
        assert path.name == store.file_name(profile.device)


def test_profiles_are_part_of_the_package() -> None:
    settings = (Path(fxpasses.__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    assert f'"devices/{store.SHIPPED}/*.json"' in settings


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
    path = cache / store.file_name("Imaginary 9000")
    damaged(path, damage)
    with pytest.warns(DeviceProfileWarning, match=reason) as caught:
        assert store.find("Imaginary 9000") is None
    assert str(path) in str(caught[0].message)


def test_a_profile_of_another_device_is_named_and_ignored(cache: Path) -> None:
    path = cache / store.file_name("Imaginary 9000")
    a_profile(device="Other").save(path)
    with pytest.warns(DeviceProfileWarning, match="measured on 'Other', and this device is 'Imaginary 9000'"):
        assert store.find("Imaginary 9000") is None


def test_the_name_of_a_cpu_says_how_many_threads_it_may_use() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert store.device_name("cpu").endswith(", 1 threads")
    finally:
        torch.set_num_threads(before)
