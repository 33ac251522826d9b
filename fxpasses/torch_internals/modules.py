"""Modules of torch.nn: base classes that several layers share, and hooks.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from torch import nn

ConvNd = nn.modules.conv._ConvNd
BatchNormBase = nn.modules.batchnorm._BatchNorm
InstanceNormBase = nn.modules.instancenorm._InstanceNorm


def has_global_module_hooks() -> bool:
    """Whether hooks are registered that run at the call of every module."""
    found = nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]  # torch leaves it
    return bool(found)
