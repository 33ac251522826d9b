"""The device's own store: rows of all processes, and no failed compilation where it cannot be kept."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fxpasses.devices import own
from fxpasses.devices.own import own_store
from fxpasses.devices.store import DeviceProfileWarning, file_name
from tests.devices.test_device_profile import row

WRITE = """
import sys, torch
torch.set_num_threads(int(sys.argv[2]))  # a part of the store's name, which other tests may have set
from fxpasses.devices.own import own_store
from fxpasses.devices.profile import Measurement
store, number = own_store(), sys.argv[1]
for index in range(20):
    store.add([Measurement("op", f"{number}-{index}", "contiguous", "it", "float32", 1e-3, 0.0, 7)])
"""

FULL = """
import resource, signal, sys, warnings
from fxpasses.devices.own import own_store
from fxpasses.devices.profile import Measurement
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = own_store()
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for index in range(2):
        store.add([Measurement("op", str(index), "contiguous", "it", "float32", 1e-3, 0.0, 7)])
assert [row.key for row in store.profile().measurements] == ["0", "1"]
(warning,) = caught
print(warning.category.__name__, warning.message)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(tmp_path))
    return tmp_path


def keys_known() -> set[str]:
    return {each.key for each in own_store().profile().measurements}


def forget() -> None:
    """As in another process."""
    own._opened.cache_clear()


def test_what_is_added_is_known_to_this_process_and_to_others():
    own_store().add([row(3e-4, key="a")])
    own_store().add([row(3e-4, key="b")])
    assert keys_known() == {"a", "b"}
    forget()
    assert keys_known() == {"a", "b"}


def test_a_newer_row_takes_the_place_of_an_older_one():
    own_store().add([row(3e-4)])
    own_store().add([row(5e-4)])
    (only,) = own_store().profile().measurements
    assert only.seconds == 5e-4


def test_four_processes_that_write_at_once_lose_no_row(folder):
    command = [sys.executable, "-c", WRITE]
    threads = str(torch.get_num_threads())
    running = [subprocess.Popen([*command, str(number), threads]) for number in range(4)]
    assert [each.wait() for each in running] == [0] * 4
    assert keys_known() == {f"{number}-{index}" for number in range(4) for index in range(20)}
    assert len(list(folder.glob("*.json"))) == 1
    assert not list(folder.glob("*.partial"))


def test_other_threads_another_precision_and_another_torch_have_stores_of_their_own(monkeypatch):
    paths = [own_store().path]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        paths.append(own_store().path)
    finally:
        torch.set_num_threads(before)
    torch.set_float32_matmul_precision("medium")
    try:
        paths.append(own_store().path)
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    paths.append(own_store().path)
    monkeypatch.undo()
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(paths[0].parent))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    paths.append(own_store().path)
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1, "device"', "[]", '{"schema": 77}'])
def test_a_broken_file_is_named_set_aside_and_made_anew(text):
    store = own_store()
    store.add([row(3e-4)])
    store.path.write_text(text, "utf-8")
    forget()
    with pytest.warns(DeviceProfileWarning, match=f"{store.path.name} is not used.*is measured anew"):
        assert keys_known() == set()
    assert store.path.with_suffix(".broken").read_text("utf-8") == text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_store().add([row(4e-4, key="new")])
        forget()
        assert keys_known() == {"new"}


def test_a_file_of_other_settings_under_this_name_is_not_believed():
    store = own_store()
    replace(store.empty, settings={"vectors": "none"}, measurements=(row(3e-4),)).save(store.path)
    with pytest.warns(DeviceProfileWarning, match="its settings is .*none"):
        assert keys_known() == set()


def test_a_full_disk_is_a_warning_and_this_process_goes_on(folder):
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "DeviceProfileWarning what was measured is not kept in" in done.stdout
    assert "File too large" in done.stdout
    assert not list(folder.glob("*.json"))
    assert not list(folder.glob("*.partial"))


def test_a_folder_that_cannot_be_written_is_a_warning_and_this_process_goes_on(folder, monkeypatch):
    (folder / "file").write_text("no folder", "utf-8")
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(folder / "file"))
    with pytest.warns(DeviceProfileWarning, match="this process alone knows it"):
        own_store().add([row(3e-4, key="a")])
    with own_store().measuring(0.1):
        assert keys_known() == {"a"}


def test_a_store_that_could_not_be_written_is_written_when_it_can_be(folder, monkeypatch):
    (folder / "late").write_text("no folder yet", "utf-8")
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(folder / "late"))
    with pytest.warns(DeviceProfileWarning):
        own_store().add([row(3e-4, key="a")])
    (folder / "late").unlink()
    own_store().add([row(3e-4, key="b")])
    forget()
    assert keys_known() == {"a", "b"}


def test_rows_of_another_device_are_refused_and_nothing_is_changed():
    store = own_store()
    store.add([row(3e-4, key="a")])
    before = store.path.read_bytes()
    with pytest.raises(ValueError, match="different device"):
        store.merge(replace(store.empty, device="Other", measurements=(row(1e-4, key="b"),)))
    assert store.path.read_bytes() == before
    assert keys_known() == {"a"}


def test_who_measures_waits_for_another_but_not_for_ever():
    store = own_store()
    with store.measuring(1), store.measuring(0.05):
        pass  # the second one went on without the lock


def test_the_revision_survives_what_is_added_later():
    store = own_store()
    store.merge(replace(store.empty, revision="first"))
    store.add([row(3e-4)])
    forget()
    assert own_store().profile().revision == "first"


def test_the_name_of_a_store_tells_it_from_a_profile_of_the_device():
    store = own_store()
    assert store.path.name != file_name(store.empty.device)


def test_what_another_process_has_just_made_anew_is_not_set_aside(monkeypatch):
    store = own_store()
    store.add([row(3e-4, key="new")])
    good = store.path.read_text("utf-8")
    store.path.write_text("{", "utf-8")
    enter = store._lock.acquire

    def meanwhile(*args, **kwargs):
        store.path.write_text(good, "utf-8")
        return enter(*args, **kwargs)

    monkeypatch.setattr(store._lock, "acquire", meanwhile)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert keys_known() == {"new"}
    assert not store.path.with_suffix(".broken").exists()
