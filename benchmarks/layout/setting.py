"""On what, with which arithmetic and with how much effort operators are measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from fxpasses.comparison import kernel_tolerance
from fxpasses.devices.caches import sets_needed
from fxpasses.devices.timing import Effort

Set = TypeVar("Set")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """On what, with which arithmetic and with how much effort to measure.

    Attributes:
        dtype: as in ``float32``.
        device: where.
        effort: how long.
        tf32: whether a GPU may use TF32 for float32.
        hot: whether every call has the same operands, and so finds them in a cache.
    """

    dtype: str
    device: torch.device
    effort: Effort
    tf32: bool = False
    hot: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that `dtype` names."""
        return DTYPES[self.dtype]

    @property
    def tolerance(self) -> float:
        """Relative, and absolute for results of unit variance."""
        return kernel_tolerance(self.torch_dtype, tf32=self.tf32 and self.device.type == "cuda")

    def sets(self, first: Set, copied: Callable[[Set], Set], num_bytes: int) -> list[Set]:
        """The sets of operands to take in turn: `first`, and as many copies as it takes.

        Args:
            first: one set.
            copied: makes another of it, elsewhere in memory.
            num_bytes: that one call reads and writes.
        """
        count = 1 if self.hot else sets_needed(num_bytes, self.device)
        return [first, *(copied(first) for _ in range(count - 1))]

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """No autograd, and TF32 exactly where it was asked for; restored afterwards."""
        convolution, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = convolution.allow_tf32, matmul.allow_tf32
        try:
            convolution.allow_tf32 = matmul.allow_tf32 = self.tf32
            with torch.no_grad():
                yield
        finally:
            convolution.allow_tf32, matmul.allow_tf32 = before
