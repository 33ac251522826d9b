"""Networks as detectors have them: `benchmarks.shared.detection:backbone` is a model specification."""

from __future__ import annotations

import torch

from fxpasses.cli.model_specs import declare_torchvision_operators


def backbone() -> torch.nn.Module:
    """ResNet-50 with batch norms that are constants for good: per channel, a product and a sum."""
    declare_torchvision_operators()
    from torchvision.models import resnet50
    from torchvision.ops import FrozenBatchNorm2d

    return resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
