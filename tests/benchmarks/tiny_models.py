"""Models small enough for a test, for `--models tests.benchmarks.tiny_models:FACTORY`."""

from __future__ import annotations

import os

import torch
from torch import nn


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm and a classifier; images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.first_norm(self.first(images)))
        features = torch.relu(self.second_norm(self.second(features)))
        return self.classifier(self.dropout(features.mean((2, 3))))


class WrongWhenCompiled(TinyNet):
    """Gives other numbers as soon as Dynamo traces it: a miscompilation made to order."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(images)
        return outputs + 0.5 if torch.compiler.is_compiling() else outputs


class WrongGradientWhenCompiled(TinyNet):
    """The right outputs, and no gradient for the first convolution once Dynamo traces it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        weight = self.first.weight.detach() if torch.compiler.is_compiling() else self.first.weight
        features = torch.relu(self.first_norm(nn.functional.conv2d(images, weight, padding=1)))
        features = torch.relu(self.second_norm(self.second(features)))
        return self.classifier(self.dropout(features.mean((2, 3))))


class DiesWhenCompiled(TinyNet):
    """Ends the process that compiles it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            _die()
        return super().forward(images)


class Random(TinyNet):
    """Draws random numbers that no switch turns off."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = super().forward(images)
        return outputs + torch.randn_like(outputs)


@torch.compiler.assume_constant_result
def _die() -> int:
    print("the compiler ran out of luck", flush=True)
    os._exit(7)


def tiny() -> nn.Module:
    """The model that works."""
    return TinyNet()


def wrong_when_compiled() -> nn.Module:
    """See the class."""
    return WrongWhenCompiled()


def wrong_gradient_when_compiled() -> nn.Module:
    """See the class."""
    return WrongGradientWhenCompiled()


def dies_when_compiled() -> nn.Module:
    """See the class."""
    return DiesWhenCompiled()


def random() -> nn.Module:
    """See the class."""
    return Random()
