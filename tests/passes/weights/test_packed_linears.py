"""weights="cached" packs linear layers of half types for oneDNN, as inductor's freezing does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses.torch_internals.onednn import onednn_takes

CACHED = {"weights": "cached"}


class Linears(nn.Module):
    """Linear layers over matrices and sequences, with and without a bias, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 48, bias=False)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return torch.tanh(self.second(self.second(x))) + x


@pytest.mark.skipif(not onednn_takes(torch.bfloat16), reason="oneDNN does not take bfloat16 on this CPU")
@pytest.mark.parametrize("how", ["bfloat16", "autocast", "max-autotune", "dynamic"])
@pytest.mark.parametrize("shape", [(5, 32), (2, 7, 32)], ids=["matrix", "sequence"])
def test_linear_layers_of_bfloat16_are_packed(shape, how):
    torch.manual_seed(0)
    model = Linears().eval()
    x = torch.randn(shape)
    exact = copy.deepcopy(model).double()
    if how != "autocast":
        model, x = model.bfloat16(), x.bfloat16()
        exact = copy.deepcopy(model).double()
    options = {**CACHED, "inductor": {"max_autotune": True} if how == "max-autotune" else {}}
    run = torch.compile(model, backend="fxpasses", options=options, dynamic=how == "dynamic" or None)
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found, expected = run(x), model(x)
            error = (found.double() - exact(x.double())).norm()
            assert found.dtype == expected.dtype
            assert found.stride() == expected.stride()
            assert error <= 2 * (expected.double() - exact(x.double())).norm()
        with torch.no_grad():
            for one in (model, exact):
                one.first.weight.mul_(2)
                one.second.weight.neg_()
    assert fxpasses.last_report().packed_tensors == (0 if how == "max-autotune" else 3)
