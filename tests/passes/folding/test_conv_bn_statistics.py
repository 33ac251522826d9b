"""conv-BN folds statistics that are constant to autograd: buffers, inputs, frozen or detached parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check, check_compiled, image, pair, randomised
from torch import nn
from wiring import sampled, statistics, wired

import fxpasses


@sampled
def test_training_mode_is_left_alone(capture: str) -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].train()  # type: ignore[index]
    if capture in ("compile", "symbolic_trace"):
        check(capture, model, (image(),), "training-mode")
    else:
        # Tracing with real tensors runs the model once, and export returns updated statistics.
        program = torch.export.export(model, (image(),))
        report = fxpasses.optimize(program).report
        assert [remark.code for remark in report.remarks] == ["training-mode"]


class ParameterStatistics(nn.Module):
    """Its mean is a parameter, frozen or not."""

    def __init__(self, trainable: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.mean = nn.Parameter(torch.randn(4), requires_grad=trainable)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.bn.running_var, self.bn.weight, self.bn.bias)


@sampled
@pytest.mark.parametrize(("trainable", "outcome"), [(True, "statistics-require-grad"), (False, 1)])
def test_statistics_that_require_grad_would_get_one(
    capture: str, trainable: bool, outcome: int | str
) -> None:
    """Eager refuses such statistics while autograd records, so there are no gradients to compare."""
    model = randomised(ParameterStatistics(trainable))
    check(capture, model, (image(grad=False),), outcome, grads=False, profit="always")


@pytest.mark.parametrize("capture", ["compile", "pre_dispatch", "export", "symbolic_trace"])
def test_statistics_computed_from_a_detached_parameter(capture: str) -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(m.conv(x), (m.vector * 2).detach(), m.bn.running_var, m.bn.weight, m.bn.bias)

    check(capture, wired(wire), (image(),), 1)


@sampled
def test_statistics_given_as_inputs_are_used(capture: str) -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
            return F.batch_norm(self.conv(x), mean, var, None, None, False, 0.1, 1e-3)

    inputs = (image(), image(4, grad=False), image(4, grad=False).abs() + 0.5)
    check(capture, randomised(Given()), inputs, 1)


@pytest.mark.parametrize("which", ["both", "one"])
def test_one_parameter_in_two_roles(which: str) -> None:
    """The bias of the convolution is beta as well (and gamma, too)."""

    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, m.conv.weight, m.vector)
        gamma = m.vector if which == "both" else m.bn.weight
        return F.batch_norm(y, *statistics(m), gamma, m.vector)

    check_compiled(wired(wire), (image(),), 1)


def test_statistics_that_share_memory_with_a_parameter() -> None:
    """The mean is a detached alias of the convolution's bias, as in a network that is folded by hand."""
    model = wired(
        lambda m, x: F.batch_norm(m.conv(x), m.conv.bias.detach(), m.bn.running_var, m.bn.weight, m.bn.bias)
    )
    check_compiled(model, (image(),), 1)
