"""What the trainer tests share: a small network with frozen statistics, and twenty steps of an optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

STEPS = 20
RULE = "efficient_conv_bn_eval"


class Network(nn.Module):
    """Three convolutions with batch norms in eval mode, a residual connection, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        y = torch.relu(y + self.body(y))
        return self.head(y.mean((2, 3)))


def network() -> Network:
    """The same network every time, with statistics that are no identity."""
    torch.manual_seed(0)
    model = Network().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def batch(step: int, rank: int = 0, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of one step on one rank."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    labels = torch.randint(0, 5, (size,), generator=generator)
    # What is to be learnt: the brightness of one channel is the label.
    images = torch.randn(size, 3, 8, 8, generator=generator)
    images[:, 0] += labels[:, None, None]
    return images, labels


Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of one batch."""
    return nn.functional.cross_entropy(model(images), labels)


def losses(
    model: nn.Module,
    loss: Loss = cross_entropy,
    *,
    rank: int = 0,
    accumulate: int = 1,
    compiled_step: Any = None,
) -> list[float]:
    """The losses of twenty steps of SGD with momentum.

    Args:
        model: what is trained; its parameters are changed.
        loss: of one batch.
        rank: whose batches.
        accumulate: how many batches a step takes.
        compiled_step: a backend for `torch.compile(optimizer.step)`.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = torch.compile(optimizer.step, backend=compiled_step) if compiled_step else optimizer.step
    found = []
    for index in range(STEPS):
        found.append(0.0)
        for part in range(accumulate):
            value = loss(model, *batch(index * accumulate + part, rank)) / accumulate
            value.backward()
            found[-1] += value.item()
        step()
        optimizer.zero_grad()
    return found


def pair() -> tuple[nn.Module, nn.Module]:
    """Two copies of the network: one to compile, one for eager."""
    model = network()
    return copy.deepcopy(model), model
