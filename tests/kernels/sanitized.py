"""A plugin of pytest: the kernels are compiled with the address and undefined-behaviour sanitizers.

The process must have been started with the address sanitizer's library loaded (`LD_PRELOAD`).
"""

from __future__ import annotations

from fxpasses.kernels import build

build._FLAGS = (*build._FLAGS, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
