"""The only module of the benchmarks that imports private names of torch.

Each function says which names it rests on. They exist in torch 2.11 to 2.15 unless it says otherwise.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

Module = TypeVar("Module", bound=torch.nn.Module)


def fake_copy(module: Module) -> tuple[FakeTensorMode, Module]:
    """A copy of `module` whose parameters and buffers have shapes but no values, and the mode they need."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        return mode, copy.deepcopy(module)
