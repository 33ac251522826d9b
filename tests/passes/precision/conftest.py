import pytest
import torch


@pytest.fixture
def without_fast_path():
    """Has layers of attention made of several operators, as they are in training."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)
