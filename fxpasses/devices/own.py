"""The device's own store: what was measured here, in one file a device, torch version, threads and settings.

    store = own_store("cpu")
    store.profile()                 what is known, to whichever process found it out
    store.add(rows, rooflines)      known from now on, to all of them

Several processes may add at once: each holds a lock while it reads, merges and replaces the file. A file
that cannot be read is named in a warning, set aside and made anew. Where nothing can be written, a warning
says so, and what was measured is known to this process alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import filelock
import torch

from fxpasses.devices.identity import device_name, settings_in_force
from fxpasses.devices.profile import DeviceProfile, Measurement, Roofline
from fxpasses.devices.store import (
    DeviceProfileWarning,
    UnusableProfileError,
    cache_folder,
    file_name,
    read_profile,
)

_PATIENCE = 10.0
"""Seconds to wait for another process that writes, which takes it some milliseconds."""


@dataclass
class OwnStore:
    """What was measured on one device under one torch version and one set of settings.

    Attributes:
        path: the file.
        empty: a profile without rows, which says what the device, the version and the settings are.
    """

    path: Path
    empty: DeviceProfile
    _unwritten: DeviceProfile = field(init=False)
    _lock: filelock.BaseFileLock = field(init=False)
    _warned: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._unwritten = self.empty
        self._lock = filelock.FileLock(self.path.with_suffix(".lock"), timeout=_PATIENCE)

    def profile(self) -> DeviceProfile:
        """What is known by now."""
        with contextlib.suppress(UnusableProfileError):
            return self._known()
        try:
            with self._locked():  # or what another process has just made anew would be set aside
                return self._known()
        except UnusableProfileError as reason:
            self._set_aside(reason)
        except OSError:
            pass  # no lock in a folder that cannot be written: whoever adds says so
        return self._unwritten

    def add(self, rows: Sequence[Measurement], rooflines: Sequence[Roofline] = ()) -> None:
        """Adds rows and peaks, which take the place of those of the same key."""
        self.merge(self.of(rows, rooflines))

    def of(self, rows: Sequence[Measurement], rooflines: Sequence[Roofline] = ()) -> DeviceProfile:
        """A profile of this device that has these rows and peaks alone."""
        return replace(self.empty, measurements=tuple(rows), rooflines=tuple(rooflines))

    def merge(self, newer: DeviceProfile) -> None:
        """Adds what another profile has, which takes the place of what is known of the same key.

        Raises:
            ValueError: it was measured on another device, or under another version or other settings.
        """
        self._unwritten = self._unwritten.merged(newer)
        try:
            with self._locked():
                self.profile().save(self.path)
                self._unwritten = self.empty
        except OSError as error:
            reason = f"what was measured is not kept in {self.path} ({error}): this process alone knows it"
            self._warn("unwritten", reason)

    @contextlib.contextmanager
    def measuring(self, patience: float) -> Iterator[None]:
        """A block in which no other process measures, unless one takes longer than `patience` seconds."""
        lock = filelock.FileLock(self.path.with_suffix(".measuring"))
        with contextlib.ExitStack() as held:
            # Who cannot lock measures all the same: a busy machine is better measured than not at all.
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock.acquire(timeout=patience))
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            yield

    def _known(self) -> DeviceProfile:
        """What is in the file, with what could not be written to it."""
        return self._read().merged(self._unwritten) if self.path.is_file() else self._unwritten

    def _read(self) -> DeviceProfile:
        found = read_profile(self.path, self.empty.device)
        for name in ("torch_version", "settings"):
            theirs, ours = getattr(found, name), getattr(self.empty, name)
            if theirs != ours:
                raise UnusableProfileError(f"its {name} is {theirs!r}, and here it is {ours!r}")
        return found

    def _set_aside(self, reason: UnusableProfileError) -> None:
        aside = self.path.with_suffix(".broken")
        message = f"device profile {self.path} is not used: {reason}; it is measured anew"
        try:
            self.path.replace(aside)
            message += f". The file is now {aside}"
        except OSError as error:
            message += f". It could not be set aside ({error}): delete it"
        self._warn("broken", message)

    def _warn(self, kind: str, message: str) -> None:
        # The reader of a compilation's log needs to be told once, not for every graph.
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, DeviceProfileWarning, stacklevel=4)


def own_store(device: str | torch.device = "cpu") -> OwnStore:
    """The store of a device under the settings in force; where it lies, `cache_folder` says."""
    found = DeviceProfile(device_name(device), str(torch.__version__), {}, settings_in_force(device))
    return _opened(cache_folder(), found.device, found.torch_version, tuple(sorted(found.settings.items())))


@functools.cache
def _opened(folder: Path, device: str, torch_version: str, settings: tuple[tuple[str, str], ...]) -> OwnStore:
    conditions: Mapping[str, str] = dict(settings)
    digest = hashlib.sha256(json.dumps([torch_version, settings]).encode()).hexdigest()[:8]
    name = file_name(f"{device}, torch {torch_version}, {digest}")
    return OwnStore(folder / name, DeviceProfile(device, torch_version, {}, conditions))
