"""Every test starts with empty counters and without a trace of what earlier ones compiled."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_state():
    import torch._dynamo

    import fxpasses

    torch._dynamo.reset()
    fxpasses.reset()
    torch.manual_seed(0)
