"""The store: where the profile of a device is looked for, and when it is not used.

    find(device_name())  =  the user's own    $FXPASSES_PROFILE_DIR, else ~/.cache/fxpasses/profiles
                            else the one that the package is shipped with    devices/profiles/
                            else None

A profile belongs to one device, whose name is the file's. A file that cannot be trusted (corrupt, of another
device, of another schema version) is named in a warning and ignored, so that a caller falls back instead of
failing a compilation. `python -m benchmarks.tensor_layout --sweep MODELS --profile FILE` writes one.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import warnings
from importlib import resources
from pathlib import Path

import torch

from fxpasses.devices.profile import SCHEMA_VERSION, DeviceProfile

SHIPPED = "profiles"
"""The folder of the package that holds the profiles it is shipped with."""


class DeviceProfileWarning(UserWarning):
    """A device profile was found and not used; the message names the file and the reason."""


def device_name(device: str | torch.device = "cpu") -> str:
    """The name that profiles of this device carry; for a CPU with the number of threads torch may use."""
    checked = torch.device(device)
    if checked.type == "cpu":
        return f"{processor_name()}, {torch.get_num_threads()} threads"
    if checked.type == "cuda":
        return torch.cuda.get_device_name(checked)
    return checked.type


def processor_name() -> str:
    """The processor's brand, family and model: virtual machines often hide the model behind a bare brand."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    name = fields.get("model name", "").strip() or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        return f"{name}, family {fields['cpu family']} model {fields['model']}"
    return name


def cache_folder() -> Path:
    """Where a user's own profiles live: $FXPASSES_PROFILE_DIR, else ~/.cache/fxpasses/profiles."""
    chosen = os.environ.get("FXPASSES_PROFILE_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fxpasses" / "profiles"


def file_name(device: str) -> str:
    """The name of the file that a profile of `device` is looked for under."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def find(device: str) -> DeviceProfile | None:
    """The profile of a device: the user's own if there is a usable one, else the one shipped, else None.

    Args:
        device: from `device_name`.
    """
    for folder in (cache_folder(), Path(str(resources.files("fxpasses.devices"))) / SHIPPED):
        path = folder / file_name(device)
        if path.is_file() and (profile := load(path, device=device)) is not None:
            return profile
    return None


def load(path: str | os.PathLike[str], *, device: str | None = None) -> DeviceProfile | None:
    """Reads a profile; where it cannot be used, warns with the file and the reason and returns None.

    A file is parsed once and again after it has changed, since every compiled graph asks for it.

    Args:
        path: a file that `DeviceProfile.save` wrote.
        device: the device it must belong to; None for any.
    """
    try:
        return _checked(Path(path), device)
    except _UnusableProfileError as reason:
        advice = "measure it anew with `python -m benchmarks.tensor_layout --sweep MODELS --profile FILE`"
        message = f"device profile {os.fspath(path)} is not used: {reason}; {advice}, or delete it."
        warnings.warn(message, DeviceProfileWarning, stacklevel=2)
        return None


class _UnusableProfileError(Exception):
    """Why a file is no profile for this device and this version."""


def _checked(path: Path, device: str | None) -> DeviceProfile:
    try:
        status = path.stat()
    except OSError as error:
        raise _UnusableProfileError(f"it cannot be read ({error})") from error
    profile = _read(path, status.st_mtime_ns, status.st_size)
    if device is not None and profile.device != device:
        raise _UnusableProfileError(f"it was measured on {profile.device!r}, and this device is {device!r}")
    return profile


@functools.lru_cache(maxsize=16)
def _read(path: Path, _modified: int, _size: int) -> DeviceProfile:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _UnusableProfileError(f"it cannot be read as JSON ({error})") from error
    version = data.get("schema") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise _UnusableProfileError(
            f"its schema version is {version!r}, and this fxpasses reads {SCHEMA_VERSION}"
        )
    try:
        return DeviceProfile.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise _UnusableProfileError(f"its content is not a profile's ({what})") from error
