"""Model specifications: a line of text that names an architecture, built with random weights.

======================== ===================================================================
`timm:NAME`              `timm.create_model(NAME)`
`torchvision:NAME`       `torchvision.models.get_model(NAME)`, submodules such as `video` too
`transformers:CLASS`     the class built from its default configuration
`package.module:factory` a callable without arguments that returns an `nn.Module`
======================== ===================================================================

Nothing is downloaded: weights are whatever the architecture initialises itself with.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch

from fxpasses.errors import ModelSpecError, unknown_name
from fxpasses.torch_internals.operators import has_kernel

_FORMS = "timm:NAME, torchvision:NAME, transformers:CLASS or package.module:factory"
_declarations: list[torch.library.Library] = []


def load_model(spec: str, *, default_source: str | None = None) -> torch.nn.Module:
    """Builds the model that `spec` names, in training mode as its factory left it.

    Args:
        spec: one of the forms in the module's docstring.
        default_source: the source of a name without a colon, such as ``"timm"``.

    Raises:
        ModelSpecError: the specification does not parse, import or build.
    """
    source, colon, name = spec.partition(":")
    if not colon:
        if default_source is None:
            raise ModelSpecError(f"model spec {spec!r} has no source; write {_FORMS}.")
        source, name = default_source, spec
    if not source or not name:
        raise ModelSpecError(f"model spec {spec!r} is incomplete; write {_FORMS}.")
    builders: dict[str, Callable[[str], Any]] = {
        "timm": _timm,
        "torchvision": _torchvision,
        "transformers": _transformers,
    }
    try:
        model = builders[source](name) if source in builders else _factory(source, name)
    except ModelSpecError:
        raise
    except Exception as error:
        raise ModelSpecError(
            f"model spec {spec!r} does not build: {type(error).__name__}: {error}. What it names must be "
            "callable without arguments."
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise ModelSpecError(f"model spec {spec!r} gave a {type(model).__name__}, not a torch.nn.Module.")
    return model


def declare_torchvision_operators() -> None:
    """Makes torchvision importable where its compiled extension does not load.

    torchvision registers fake kernels for operators that only its extension defines, and the extension of
    a CUDA build does not load beside a CPU-only torch. The declarations let its pure-Python models import.
    """
    if _declarations or has_kernel("torchvision::nms"):
        return
    if torch.version.cuda is not None:
        return
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declarations.append(library)


def _import(module: str, spec: str, install: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:
        advice = f" Install it with `pip install {install}`." if install else ""
        reason = f"{type(error).__name__}: {error}"
        raise ModelSpecError(f"model spec {spec!r}: cannot import {module!r} ({reason}).{advice}") from error


def _timm(name: str) -> Any:
    declare_torchvision_operators()
    timm = _import("timm", f"timm:{name}", "timm")
    if not timm.is_model(name):
        raise ModelSpecError(_not_found("timm", name, timm.list_models()))
    return timm.create_model(name)


def _torchvision(name: str) -> Any:
    declare_torchvision_operators()
    models = _import("torchvision.models", f"torchvision:{name}", "torchvision")
    if name not in models.list_models():
        raise ModelSpecError(_not_found("torchvision", name, models.list_models()))
    extra = {"weights_backbone": None} if "backbone" in _parameters(models, name) else {}
    return models.get_model(name, weights=None, **extra)


def _parameters(models: Any, name: str) -> str:
    import inspect

    return " ".join(inspect.signature(models.get_model_builder(name)).parameters)


def _transformers(name: str) -> Any:
    declare_torchvision_operators()
    transformers = _import("transformers", f"transformers:{name}", "transformers")
    model_class = getattr(transformers, name, None)
    if model_class is None or not hasattr(model_class, "config_class"):
        names = [name for name in dir(transformers) if name.endswith("Model")]
        raise ModelSpecError(_not_found("transformers", name, names))
    return model_class(model_class.config_class())


def _factory(module: str, name: str) -> Any:
    spec = f"{module}:{name}"
    factory = getattr(_import(module, spec), name, None)
    if factory is None:
        public = [name for name in dir(importlib.import_module(module)) if not name.startswith("_")]
        raise ModelSpecError(f"model spec {spec!r}: " + unknown_name(f"name in {module}", name, public))
    if not callable(factory):
        raise ModelSpecError(
            f"model spec {spec!r}: {name} is not callable; name a function that returns a module."
        )
    return cast(Callable[[], Any], factory)()


def _not_found(source: str, name: str, valid: list[str]) -> str:
    import difflib

    closest = difflib.get_close_matches(name, valid, n=3, cutoff=0.4)
    hint = f" Closest: {', '.join(closest)}." if closest else ""
    return f"{source} has no model {name!r} ({len(valid)} are known).{hint}"
