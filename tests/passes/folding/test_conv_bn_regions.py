"""Convolution and batch norm in regions: autocast, inference mode, function transforms, nested graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import RULE, check, check_compiled, image, pair
from torch import nn
from wiring import statistics, wired

import fxpasses
from fxpasses.testing import assert_rewrites, expect

# Grad mode, autocast, inference mode, functorch


def _autocast(m: Any, x: torch.Tensor, around: str) -> torch.Tensor:
    def region(on: bool) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=on)

    if around == "both":
        with region(True):
            return m.bn(m.conv(x))
    if around == "two regions":
        with region(True):
            y = m.conv(x)
        with region(True):
            return m.bn(y)
    if around == "conv":
        with region(True):
            y = m.conv(x)
        return m.bn(y)
    if around == "norm":
        y = m.conv(x)
        with region(True):
            return m.bn(y)
    with region(True):
        with region(around == "disabled inside both"):
            y = m.conv(x)
            if around == "disabled inside both":
                return m.bn(y)
        return m.bn(y)


AROUND = ("both", "two regions", "conv", "norm", "disabled inside both", "disabled inside conv")


@pytest.mark.parametrize("capture", ["compile", "pre_dispatch"])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("grads", [True, False])
def test_autocast_around_either_keeps_eagers_dtype(capture: str, around: str, grads: bool) -> None:
    model = wired(lambda m, x: _autocast(m, x, around), torch.float32)
    if capture == "pre_dispatch":
        check(capture, model, (image(dtype=torch.float32),), 1, grads=False, profit="always")
    else:
        check(capture, model, (image(dtype=torch.float32),), 1, grads=grads, profit="always")


def test_autocast_around_the_convolution_alone_with_a_late_gamma_has_no_place() -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = m.conv(x)
        return F.batch_norm(y, *statistics(m), m.vector * 2, m.bn.bias)

    inputs = (image(dtype=torch.float32),)
    check_compiled(wired(wire, torch.float32), inputs, "autocast", grads=False, profit="always")


def test_autocast_entered_by_the_caller() -> None:
    """The graph shows no region then; the ambient state holds at compile time and at run time."""
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.float32)
    compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager", "profit": "always"})
    x = image(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), expect(efficient_conv_bn_eval=1):
        found, expected = compiled(x), model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("which", ["both", "conv", "norm"])
def test_inference_mode_regions_are_not_crossed(which: str) -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        if which == "both":
            with torch.inference_mode():
                return m.bn(m.conv(x))
        if which == "conv":
            with torch.inference_mode():
                y = m.conv(x)
            return m.bn(y)
        y = m.conv(x)
        with torch.inference_mode():
            return m.bn(y)

    outcome: int | str = 1 if which == "both" else "region"
    model, x = wired(wire), image(grad=False)
    check_compiled(model, (x,), outcome, grads=False, profit="always")


def test_inference_mode_around_the_call() -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager", "profit": "always"})
    x = image(grad=False)
    with torch.inference_mode(), expect(efficient_conv_bn_eval=1):
        found = compiled(x)
        torch.testing.assert_close(found, model(x), rtol=1e-9, atol=1e-9)


def _functional(model: nn.Module) -> tuple[Callable[..., torch.Tensor], dict[str, torch.Tensor]]:
    values = {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}

    def call(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, values, (x,))

    return call, values


TRANSFORMS: dict[str, tuple[Callable[..., Any], int]] = {
    "functional_call": (lambda call, values, x: call(values, x), 1),
    "grad of the input": (
        lambda call, values, x: torch.func.grad(lambda x: call(values, x).square().sum())(x), 1
    ),
    "vjp": (
        lambda call, values, x: torch.func.vjp(lambda x: call(values, x).sin(), x)[1](x.new_ones(2, 4, 6, 6)),
        1,
    ),
    "vmap": (lambda call, values, x: torch.func.vmap(lambda x: call(values, x[None])[0])(x), 0),
    "grad in vmap": (
        lambda call, values, x: torch.func.vmap(
            torch.func.grad(lambda x: call(values, x[None]).square().sum())
        )(x),
        0,
    ),
    "jacrev": (lambda call, values, x: torch.func.jacrev(lambda x: call(values, x).sum((0, 2, 3)))(x), 1),
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_give_eagers_answers(transform: str) -> None:
    apply, count = TRANSFORMS[transform]
    call, values = _functional(pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = image(grad=False)
    expected = apply(call, values, x)
    options = {"inner": "eager", "profit": "always"}
    compiled = torch.compile(lambda values, x: apply(call, values, x), backend="fxpasses", options=options)
    with expect(efficient_conv_bn_eval=count):
        found = compiled(values, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if not count:
        assert {"functorch"} == {remark.code for remark in fxpasses.last_report().declined}


def test_forward_mode_derivatives_are_eagers() -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    program = torch.fx.symbolic_trace(model)
    x, tangent = image(grad=False), image(grad=False)
    ours = fxpasses.optimize(program, (x,)).graph_module
    expected = torch.func.jvp(model, (x,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (tangent,)), expected, rtol=1e-9, atol=1e-9)


# Graphs inside graphs


@pytest.mark.parametrize("capture", ["compile"])
def test_pairs_inside_checkpoints_are_rewritten_and_recomputed(capture: str) -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        def block(x: torch.Tensor) -> torch.Tensor:
            return torch.relu(m.bn(m.conv(x)))

        first = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return first + m.bn2(m.conv2(x))

    for inner in ("eager", "aot_eager"):
        report = check_compiled(wired(wire), (image(),), 2, inner=inner)
        assert {bool(remark.graph) for remark in report.remarks} == {True, False}


@pytest.mark.parametrize("positive", [True, False])
def test_pairs_inside_both_branches_of_cond_are_rewritten(positive: bool) -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: m.bn(m.conv(x)), lambda x: m.bn2(m.conv2(x)).sin(), (x,))

    x = image(grad=False).abs() * (1 if positive else -1)
    check_compiled(wired(wire), (x,), 2, grads=False, profit="always")


def test_a_write_inside_a_nested_graph_is_a_write() -> None:
    """A checkpointed function that writes to its argument stands between the two, and gamma comes late."""

    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        y = m.conv(x)
        with torch.no_grad():
            torch.utils.checkpoint.checkpoint(lambda x: x.mul_(2) + 1, x, use_reentrant=False)
        return F.batch_norm(y, *statistics(m), m.vector * 2, m.bn.bias) + x.mean()

    torch.compiler.reset()
    model = wired(wire)
    options = {"inner": "eager", "profit": "always"}
    assert_rewrites(model, (image(),), {RULE: 0}, grads=False, options=options)


# Ensembles: a convolution whose weights carry a hidden dimension


def test_stacked_models_under_vmap_give_eagers_answers() -> None:
    models = [pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    values = {name: value.detach() for name, value in {**parameters, **buffers}.items()}
    x = image(grad=False)

    def call(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(
            lambda state, x: torch.func.functional_call(models[0], state, (x,)), in_dims=(0, None)
        )(values, x)

    options = {"inner": "eager", "profit": "always"}
    with expect(efficient_conv_bn_eval=0):
        found = torch.compile(call, backend="fxpasses", options=options)(values, x)
    expected = torch.stack([model(x) for model in models])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert {remark.code for remark in fxpasses.last_report().declined} == {"functorch"}
