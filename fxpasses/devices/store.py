"""The store: where the profile of a device is looked for, and when it is not used.

    find(device_name())  =  the user's own    $FXPASSES_PROFILE_DIR, else profiles in `user_cache`
                            else the one that the package is shipped with    devices/profiles/
                            else None

A profile belongs to one device, whose name is the file's. A file that cannot be trusted (corrupt, of another
device, of another schema version) is named in a warning and ignored, so that a caller falls back instead of
failing a compilation. What is measured while compiling is kept beside them (`own`).
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from importlib import resources
from pathlib import Path

from fxpasses.devices.identity import device_name as device_name
from fxpasses.devices.identity import processor_name as processor_name
from fxpasses.devices.identity import settings_in_force
from fxpasses.devices.profile import SCHEMA_VERSION, DeviceProfile

_VECTORS = ("vectors", "onednn_limit")

SHIPPED = "profiles"
"""The folder of the package that holds the profiles it is shipped with."""


class DeviceProfileWarning(UserWarning):
    """A device profile was found and not used; the message names the file and the reason."""


def cache_folder() -> Path:
    """Where a user's own profiles live: $FXPASSES_PROFILE_DIR, else `profiles` in the user's cache."""
    chosen = os.environ.get("FXPASSES_PROFILE_DIR")
    return Path(chosen) if chosen else user_cache() / "profiles"


def user_cache() -> Path:
    """Where what is measured and compiled is kept: $XDG_CACHE_HOME/fxpasses, else ~/.cache/fxpasses."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    return (Path(chosen) if chosen else Path.home() / ".cache") / "fxpasses"


def file_name(device: str) -> str:
    """The name of the file that a profile of `device` is looked for under."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def find(device: str) -> DeviceProfile | None:
    """The profile of a device: the user's own if there is a usable one, else the one shipped, else None.

    One that was measured with other vectors than those in force is passed over, and the shipped ones are
    where $FXPASSES_SHIPPED_PROFILES is 0.

    Args:
        device: from `device_name`.
    """
    folders = [cache_folder()]
    if os.environ.get("FXPASSES_SHIPPED_PROFILES") != "0":
        folders.append(Path(str(resources.files("fxpasses.devices"))) / SHIPPED)
    for folder in folders:
        path = folder / file_name(device)
        if path.is_file() and (profile := load(path, device=device)) is not None and _fits(profile):
            return profile
    return None


def _fits(profile: DeviceProfile) -> bool:
    """Whether what a profile says of its vectors, if anything, is so here."""
    if "vectors" not in profile.settings:
        return True
    here = settings_in_force()
    return all(profile.settings.get(name) == here.get(name) for name in _VECTORS)


def load(path: str | os.PathLike[str], *, device: str | None = None) -> DeviceProfile | None:
    """Reads a profile; where it cannot be used, warns with the file and the reason and returns None.

    A file is parsed once and again after it has changed, since every compiled graph asks for it.

    Args:
        path: a file that `DeviceProfile.save` wrote.
        device: the device it must belong to; None for any.
    """
    try:
        return read_profile(Path(path), device)
    except UnusableProfileError as reason:
        advice = "measure it anew with `fxpasses tune SPEC --input SIZES --export FILE`"
        message = f"device profile {os.fspath(path)} is not used: {reason}; {advice}, or delete it."
        warnings.warn(message, DeviceProfileWarning, stacklevel=2)
        return None


class UnusableProfileError(Exception):
    """Why a file is no profile for this device and this version."""


def read_profile(path: Path, device: str | None) -> DeviceProfile:
    """Reads a profile, once and again after it has changed.

    Args:
        path: the file.
        device: the device it must belong to; None for any.

    Raises:
        UnusableProfileError: it cannot be read, or belongs to another device or version of this package.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UnusableProfileError(f"it cannot be read ({error})") from error
    profile = _read(path, status.st_mtime_ns, status.st_size)
    if device is not None and profile.device != device:
        raise UnusableProfileError(f"it was measured on {profile.device!r}, and this device is {device!r}")
    return profile


@functools.lru_cache(maxsize=16)
def _read(path: Path, _modified: int, _size: int) -> DeviceProfile:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnusableProfileError(f"it cannot be read as JSON ({error})") from error
    version = data.get("schema") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise UnusableProfileError(
            f"its schema version is {version!r}, and this fxpasses reads {SCHEMA_VERSION}"
        )
    try:
        return DeviceProfile.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UnusableProfileError(f"its content is not a profile's ({what})") from error
