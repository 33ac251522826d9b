"""Running a model once without leaving a trace in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def undisturbed(model: Callable[..., Any]) -> Iterator[None]:
    """Puts buffers and random generators back as they were."""
    buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    saved = [(buffer, buffer.detach().clone()) for buffer in buffers]
    devices = sorted({buffer.device.index for buffer in buffers if buffer.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in saved:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)
