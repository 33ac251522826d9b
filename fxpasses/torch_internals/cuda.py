"""The work of a CUDA stream.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import torch


def cuda_sleep(cycles: int) -> None:
    """Keeps the current CUDA stream busy for about `cycles` clock cycles (`torch.cuda._sleep`)."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]  # torch leaves it untyped
