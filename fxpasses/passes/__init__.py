"""What we change: each pass in a module of its own."""

from __future__ import annotations


def register_all() -> None:
    """Registers the passes that fxpasses ships; called once, when the registry is first asked for."""
    from fxpasses.passes.activation_masks import ACTIVATION_MASKS
    from fxpasses.passes.bn_before_conv import BnBeforeConv
    from fxpasses.passes.conv_affine import AffineAcrossViews, ConvAffine
    from fxpasses.passes.conv_bn import EfficientConvBnEval
    from fxpasses.passes.layout.passes import LAYOUT
    from fxpasses.passes.parallel import ParallelConvConcat, ParallelConvMerge
    from fxpasses.rewrite.registry import REGISTRY

    names = REGISTRY.names()
    family = (
        EfficientConvBnEval(),
        ConvAffine(),
        AffineAcrossViews(),
        ParallelConvMerge(),
        ParallelConvConcat(),
        BnBeforeConv(),
    )
    for each in (*family, ACTIVATION_MASKS, LAYOUT):
        if each.name not in names:
            REGISTRY.register(each)
