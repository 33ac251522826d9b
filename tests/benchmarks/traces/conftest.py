"""What several tests of the benchmarks are given."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from made_traces import Raw, WriteTrace


@pytest.fixture
def write_trace(tmp_path: Path) -> WriteTrace:
    """Writes a trace of the given events."""

    def to_file(events: Sequence[Raw], name: str = "trace.json") -> Path:
        path = tmp_path / name
        data = json.dumps({"schemaVersion": 1, "traceEvents": list(events)}).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return to_file
