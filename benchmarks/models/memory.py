"""Peak memory of a step: resident pages on a CPU, allocated bytes on a GPU.

On Linux the peak of the resident set (`VmHWM`) can be reset, so that the peak of one step is known exactly.
Free pages that the allocator still holds are handed back first: otherwise they would hide the step's own.
"""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFERENCES = Path("/proc/self/clear_refs")


class MemoryMeter:
    """The peak of a step over the memory at the time when the meter was made, in bytes.

    Make it once the model stands and the compiler's modules are imported, and before anything is compiled:
    copies of weights that a variant keeps, and what its compiler leaves behind, then count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.baseline = self._at_rest()

    def start(self) -> None:
        """Forgets the peak so far."""
        self._at_rest()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            _CLEAR_REFERENCES.write_text("5", encoding="ascii")
        except OSError:
            self.baseline = None

    def peak(self) -> int | None:
        """Bytes over the baseline since `start`; None where the system does not tell."""
        if self.baseline is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.baseline
        peak = _status("VmHWM")
        return None if peak is None else max(0, peak - self.baseline)

    def _at_rest(self) -> int | None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.memory_allocated(self.device)
        release_free_pages()
        return _status("VmRSS")


def release_free_pages() -> None:
    """Hands the allocators' free memory back to the system, so that processes at rest do not hold it."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's only
    if trim is not None:
        trim(0)


def _status(field: str) -> int | None:
    try:
        text = _STATUS.read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None
