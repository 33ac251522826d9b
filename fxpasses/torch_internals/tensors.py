"""Tensors: what functorch wraps around them, their storages and their memory formats.

Known for torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import torch


def is_functorch_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a functorch transform (grad, jvp, vmap) wraps the tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether vmap hides a batch dimension of the tensor, at any level."""
    while is_functorch_wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def unwrap_functorch(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor under every functorch wrapper."""
    while is_functorch_wrapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def storage_key(tensor: torch.Tensor) -> int | None:
    """An identity of the tensor's storage, equal for views of one another; None where there is none."""
    try:
        return int(unwrap_functorch(tensor).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def suggest_memory_format(given: torch.Tensor) -> torch.memory_format:
    """The format in which torch's kernels write the result of an operator that reads a tensor."""
    from torch._prims_common import suggest_memory_format as suggest

    return suggest(given)
