"""Which versions of torch are supported: those that this package is known for."""

from __future__ import annotations

import re

import torch

from fxpasses.errors import UnsupportedTorchError

SUPPORTED_TORCH = ((2, 11), (2, 16))
"""The oldest supported (major, minor) version of torch, and the first one above the range."""


def require_supported_torch() -> None:
    """Raises `UnsupportedTorchError` unless the installed torch is in the supported range."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    oldest, beyond = SUPPORTED_TORCH
    if not oldest <= version < beyond:
        low, high = (".".join(map(str, version)) for version in SUPPORTED_TORCH)
        raise UnsupportedTorchError(
            f"fxpasses supports torch >={low},<{high} and found {torch.__version__}. "
            f"Install one of those, such as `pip install 'torch>={low},<{high}'`."
        )
