"""What we change: each pass in a module of its own."""

from __future__ import annotations


def register_all() -> None:
    """Registers the passes that fxpasses ships; called once, when the registry is first asked for."""
    from fxpasses.passes.conv_bn import EfficientConvBnEval
    from fxpasses.passes.layout.passes import LAYOUT
    from fxpasses.rewrite.registry import REGISTRY

    if EfficientConvBnEval.name not in REGISTRY.names():
        REGISTRY.register(EfficientConvBnEval())
    if LAYOUT.name not in REGISTRY.names():
        REGISTRY.register(LAYOUT)
