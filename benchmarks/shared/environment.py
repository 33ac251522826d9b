"""The environment block: what a figure was measured on, as plain JSON.

A time means nothing without the device, the number of threads and the versions of the libraries that
took it. Every benchmark stores this block beside its figures, and `comparable` says whether two blocks
describe the same kind of machine. Nothing that identifies a person or a host is recorded.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # its stubs are no test requirement
import torch

from fxpasses.devices.store import processor_name
from fxpasses.errors import FxpassesError

_LIBRARIES = (
    "diffusers",
    "fxpasses",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "scipy",
    "segmentation-models-pytorch",
    "timm",
    "torch",
    "torchvision",
    "transformers",
    "triton",
    "ultralytics",
)
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "LD_PRELOAD",
    "MALLOC_CONF",
    "TORCHINDUCTOR_CUDAGRAPHS",
)
_SAME_CLASS = ("device", "processor", "physical_cores")


class UnavailableDeviceError(FxpassesError, RuntimeError):
    """A device that this machine, or this build of torch, does not have."""


def check_device(device: str) -> torch.device:
    """The device, once it is known to exist here.

    Raises:
        UnavailableDeviceError: the name does not parse, or this machine has no such device.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        message = f"device {device!r} is not a torch device; write cpu or cuda or cuda:INDEX."
        raise UnavailableDeviceError(message) from error
    if parsed.type not in ("cpu", "cuda"):
        raise UnavailableDeviceError(
            f"device {device!r} is not supported here; write cpu or cuda or cuda:INDEX."
        )
    count = torch.cuda.device_count()
    if parsed.type == "cuda" and (parsed.index or 0) >= count:
        raise UnavailableDeviceError(
            f"device {device!r} does not exist here: torch {torch.__version__} sees {count} CUDA devices. "
            "Use --device cpu."
        )
    return parsed


def physical_cores() -> int:
    """The physical cores that this process may use: the default number of threads of a measurement."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or usable, usable))


def environment_block(device: str) -> dict[str, object]:
    """The device, the machine, the versions and the source revision, ready for `json.dump`.

    Args:
        device: a torch device such as ``"cpu"`` or ``"cuda"``.

    Returns:
        Keys `device` (its marketing name), `processor`, `physical_cores`, `logical_cores`,
        `memory_bytes`, `cpu_capability`, `operating_system`, `python`, `compiler`, `libraries` (name to
        version), `torch_revision`, `onednn`, `variables` (environment variables that change timings),
        `revision` (the git commit, with ``+modified`` appended where files differ from it), `date` (UTC).
        On a CUDA device also `cuda`, `cudnn`, `compute_capability`, `device_memory_bytes`.

    Raises:
        UnavailableDeviceError: this machine has no such device.
    """
    checked = check_device(device)
    processor = processor_name()
    block: dict[str, object] = {
        "device": processor if checked.type == "cpu" else torch.cuda.get_device_name(checked),
        "processor": processor,
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "operating_system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "compiler": _first_line(os.environ.get("CXX", "g++"), "--version"),
        "libraries": _versions(),
        "torch_revision": torch.version.git_version,
        "onednn": _onednn_version(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "revision": _revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if checked.type == "cuda":
        block |= _cuda_block(checked)
    return block


def comparable(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    """What keeps two environment blocks from being the same class of machine; empty where nothing does."""
    return [
        f"{key}: {first.get(key)!r} against {second.get(key)!r}"
        for key in _SAME_CLASS
        if first.get(key) != second.get(key)
    ]


def _cuda_block(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # torch leaves it untyped
        "compute_capability": f"{properties.major}.{properties.minor}",
        "device_memory_bytes": properties.total_memory,
    }


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def _onednn_version() -> str | None:
    match = re.search(r"(?:oneDNN|MKL-DNN) v([\w.]+)", torch.__config__.show())
    return match.group(1) if match else None


def _first_line(*command: str) -> str | None:
    """The first line that a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.partition("\n")[0].strip() or None if result.returncode == 0 else None


def _revision() -> str | None:
    """The commit of the checkout that this file stands in, if it stands in one."""
    here = str(Path(__file__).resolve().parent)
    commit = _first_line("git", "-C", here, "rev-parse", "HEAD")
    if commit is None:
        return None
    modified = _first_line("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+modified" if modified else commit


def save_sizes(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Writes the figures of a benchmark over graphs of several sizes, and what machine they are of."""
    content = {"schema": 1, "environment": environment_block("cpu"), "sizes": rows}
    path.write_text(json.dumps(content, indent=2))
