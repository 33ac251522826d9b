"""The only module of the benchmarks that imports private names of torch.

Each function says which names it rests on. They exist in torch 2.11 to 2.15 unless it says otherwise.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

Module = TypeVar("Module", bound=torch.nn.Module)


def fake_copy(module: Module) -> tuple[FakeTensorMode, Module]:
    """A copy of `module` whose parameters and buffers have shapes but no values, and the mode they need."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        return mode, copy.deepcopy(module)


def cuda_sleep(cycles: int) -> None:
    """Keeps the current CUDA stream busy for about `cycles` clock cycles (`torch.cuda._sleep`)."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]  # torch leaves it untyped
