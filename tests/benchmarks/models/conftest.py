"""In the tests' process a turn is one short sample, and memory stays with the process."""

from __future__ import annotations

import pytest

from benchmarks.models import memory, worker


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    """To search and trim a heap as large as the tests' takes longer than what is measured here."""
    monkeypatch.setattr(worker, "SAMPLE_SECONDS", 1e-3)
    monkeypatch.setattr(worker, "release_free_pages", lambda: None)
    monkeypatch.setattr(memory.MemoryMeter, "_at_rest", lambda self: None)
