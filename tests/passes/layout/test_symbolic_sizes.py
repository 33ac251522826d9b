"""Plans of graphs whose sizes are symbols: they are carried out, and hold for other sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpasses
from fxpasses.graph.metadata import tensor
from fxpasses.testing.captures import capture

Tensor = torch.Tensor


class Between(nn.Module):
    """Two convolutions with an operator in between."""

    def __init__(self, function: Callable[[Tensor], Tensor], kernel: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, kernel, padding=1)
        self.function, self.last = function, nn.Conv2d(8, 8, 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def _unbound(y: Tensor) -> Tensor:
    """Slices without channels, which a stack reads as they are traced, with gaps."""
    return torch.stack(y.square().unbind(1), 1)


def _slices(y: Tensor) -> Tensor:
    """Slices that a Fourier transform reads, which needs their traced strides, with gaps."""
    return torch.cat([torch.fft.fft2(y[:, :4]).real, y[:, 4:]], 1)


CASES = {
    "constant pad": Between(lambda y: F.pad(y, (1, 0, 0, 2))),
    "nearest": Between(lambda y: F.interpolate(y, scale_factor=2, mode="nearest-exact")),
    "unbind": Between(_unbound, kernel=3),
    "slices": Between(_slices),
}


def planned(model: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    program = capture("pre_dispatch", model, (x,), dynamic=True)
    result = fxpasses.optimize(program, (x,), {"layout": "channels_last", "profit": "always"})
    assert result.report.layout.decision == "applied", result.report.remarks
    return result.graph_module


def answers(call: Callable[[Tensor], Tensor], x: Tensor, grads: bool) -> list[Tensor]:
    """The result and, if wanted, the gradient of the input."""
    x = x.requires_grad_(grads)
    result = call(x)
    gradients = torch.autograd.grad(result.square().sum(), [x]) if grads else ()
    return [result.detach(), *gradients]


def images(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_carried_out_and_holds_for_other_sizes(name, grads):
    model = CASES[name].double().eval()
    with torch.set_grad_enabled(grads):
        graph_module = planned(model, images(2, 3, 6, 6).requires_grad_(grads))
        for shape in ((2, 3, 6, 6), (3, 3, 8, 8), (2, 3, 12, 12)):
            found, expected = (answers(call, images(*shape), grads) for call in (graph_module, model))
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
                assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("name", ["constant pad", "nearest"])
def test_sizes_stay_symbols_where_an_operator_is_run_anew(name):
    with torch.no_grad():
        graph_module = planned(CASES[name].double().eval(), images(2, 3, 6, 5))
    between = [tensor(node) for node in graph_module.graph.nodes if str(node.target).startswith("aten.")]
    images_between = [found for found in between if found is not None and found.shape[-1] not in (1, 3)]
    assert images_between
    assert all(isinstance(size, torch.SymInt) for found in images_between for size in found.shape[2:])
