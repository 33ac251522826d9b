"""Leaf modules of symbolic_trace: what else a module computes, or who listens to it, keeps it whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import RULE, check, check_compiled, image, pair, randomised
from torch import nn
from torch.nn.utils import parametrizations

import fxpasses


class Doubling(nn.Conv2d):
    """Derives from a convolution and computes more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def _patched(module: nn.Module) -> nn.Module:
    original = module.forward
    module.forward = lambda x: original(x) * 2  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("conv", "code"),
    [
        (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "parametrized"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), "parametrized"),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding-mode"),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), "padding-mode"),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="zeros"), 1),
        (lambda: nn.Conv2d(3, 4, 3), 1),
    ],
    ids=["weight_norm", "spectral_norm", "reflect", "circular", "zeros", "plain"],
)
def test_leaf_modules_that_compute_more_are_refused(conv: Callable[[], nn.Module], code: int | str) -> None:
    check("symbolic_trace", pair(conv(), nn.BatchNorm2d(4)), (image(),), code)


@pytest.mark.parametrize(
    "conv",
    [
        lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        lambda: parametrizations.orthogonal(nn.Conv2d(3, 4, 3)),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal"],
)
def test_dynamo_traces_parametrisations_into_the_graph(conv: Callable[[], nn.Module]) -> None:
    check_compiled(pair(conv(), nn.BatchNorm2d(4)), (image(),), 1)


class LeafTracer(torch.fx.Tracer):
    """Keeps every convolution and batch norm whole, those of users too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.modules.batchnorm._BatchNorm))


def _leaf_graph(model: nn.Module) -> torch.fx.GraphModule:
    return torch.fx.GraphModule(model, LeafTracer().trace(model))


@pytest.mark.parametrize(
    ("build", "code"),
    [
        (lambda: nn.Sequential(Doubling(3, 4, 3), nn.BatchNorm2d(4)), "unknown-module"),
        (lambda: nn.Sequential(_patched(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), "unknown-module"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), _patched(nn.BatchNorm2d(4))), "unknown-module"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "applied"),
    ],
    ids=["subclass", "patched convolution", "patched batch norm", "plain"],
)
def test_modules_with_a_forward_of_their_own_are_refused(build: Callable[[], nn.Module], code: str) -> None:
    model = randomised(build())
    x = image(grad=False)
    result = fxpasses.optimize(_leaf_graph(model), (x,), {"profit": "always"})
    assert [remark.code for remark in result.report.remarks] == [code]
    torch.testing.assert_close(result.graph_module(x), model(x), rtol=1e-9, atol=1e-9)


def test_quantisation_aware_modules_are_refused() -> None:
    from torch.ao.nn.intrinsic.qat import ConvBn2d
    from torch.ao.nn.qat import Conv2d
    from torch.ao.quantization import get_default_qat_qconfig

    config = get_default_qat_qconfig("x86")
    x = image(dtype=torch.float32, grad=False)
    for conv in (Conv2d(3, 4, 3, qconfig=config), ConvBn2d(3, 4, 3, qconfig=config)):
        model = pair(conv, nn.BatchNorm2d(4), torch.float32)
        result = fxpasses.optimize(_leaf_graph_of_quantised(model), (x,), {"profit": "always"})
        assert [remark.code for remark in result.report.remarks] == ["unknown-module"]


def _leaf_graph_of_quantised(model: nn.Module) -> torch.fx.GraphModule:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    return torch.fx.GraphModule(model, Tracer().trace(model))


def test_hooks_on_every_module_are_respected() -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    program = torch.fx.symbolic_trace(model)
    x = image(grad=False)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        report = fxpasses.optimize(program, (x,), {"profit": "always"}).report
    finally:
        handle.remove()
    assert [remark.code for remark in report.remarks] == ["hooks"]
    assert fxpasses.optimize(program, (x,), {"profit": "always"}).report.applied == {RULE: 1}


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_hook_of_any_kind_keeps_a_leaf_module_whole(target: int, register: str) -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    getattr(model[target], register)(lambda *_: None)  # type: ignore[index]
    check("symbolic_trace", model, (image(),), "hooks")


def test_a_hook_on_the_outer_module_keeps_nothing() -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model.register_forward_hook(lambda *_: None)
    check("symbolic_trace", model, (image(),), 1)
