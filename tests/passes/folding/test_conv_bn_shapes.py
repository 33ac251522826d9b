"""conv-BN keeps eager's strides, takes extreme and symbolic sizes, and is as exact as eager in any dtype."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CAPTURES, RULE, callable_of, check, check_compiled, image, pair
from torch import nn
from wiring import sampled

import fxpasses
from fxpasses.testing import expect

# Strides and extreme sizes


FORMATS = (torch.contiguous_format, torch.channels_last)


@sampled
@pytest.mark.parametrize(
    ("input_format", "weight_format", "kernel"),
    list(itertools.product(FORMATS, FORMATS, (1, 3))),
    ids=str,
)
def test_results_have_eagers_strides(
    capture: str, input_format: torch.memory_format, weight_format: torch.memory_format, kernel: int
) -> None:
    model = pair(nn.Conv2d(3, 4, kernel), nn.BatchNorm2d(4))
    model[0].to(memory_format=weight_format)  # type: ignore[index]
    x = image(grad=False).to(memory_format=input_format)
    found = _rewritten(capture, model, x)
    assert found.stride() == model(x).stride()


def _rewritten(capture: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    options = {"profit": "always", "inner": "eager"}
    with expect(efficient_conv_bn_eval=1), torch.no_grad():
        if capture == "compile":
            return torch.compile(model, backend="fxpasses", options=options)(x)
        result = fxpasses.optimize(CAPTURES[capture](model, (x,)), (x,), options)
        call = callable_of(result)
        return call(x)


@sampled
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 3, 3, 3), (1, 3, 8, 3)], ids=str)
def test_empty_batches_and_single_pixels(capture: str, shape: tuple[int, ...]) -> None:
    # Decomposition has no batch norm for an empty batch.
    outcome = 0 if capture == "aten" and shape[0] == 0 else 1
    check(capture, pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (image(*shape),), outcome)


def test_a_batch_norm_over_one_channel() -> None:
    check_compiled(pair(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1)), (image(),), 1)


# Dynamic shapes


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: pair(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)),
        lambda: pair(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)),
    ],
    ids=["conv", "grouped transposed"],
)
def test_dynamic_batch_height_and_width(build: Callable[[], nn.Module], inner: str) -> None:
    model = build()
    channels = model[0].in_channels  # type: ignore[index]
    compiled = torch.compile(model, backend="fxpasses", dynamic=True, options={"inner": inner})
    for n, h, w in ((2, 8, 9), (3, 11, 7), (5, 4, 6)):
        x = image(n, channels, h, w)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    assert [dict(report.applied) for report in fxpasses.reports()] == [{RULE: 1}]


SYMBOLIC: dict[str, tuple[Callable[..., torch.Tensor], int, bool]] = {
    "plain": (lambda x, w: F.conv2d(x, w), 1, False),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2), 2, False),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w), 1, True),
    "grouped transposed": (lambda x, w: F.conv_transpose2d(x, w, groups=2), 2, True),
}


@pytest.mark.parametrize("kind", SYMBOLIC)
def test_symbolic_channels_get_no_guard_from_us(kind: str) -> None:
    """As many compilations as without us, and eager's numbers at every size."""
    conv, groups, transposed = SYMBOLIC[kind]
    compilations = []

    def count(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        compilations.append(gm)
        return gm

    def call(x: Any, weight: Any, mean: Any, var: Any, gamma: Any, beta: Any) -> torch.Tensor:
        return F.batch_norm(conv(x, weight), mean, var, gamma, beta)

    for backend, options in ((count, None), ("fxpasses", {"inner": "eager"})):
        torch.compiler.reset()
        compiled = torch.compile(call, backend=backend, dynamic=True, options=options)
        for inputs, outputs in ((4, 6), (6, 10), (8, 14)):
            shape = (inputs, outputs // groups, 3, 3) if transposed else (outputs, inputs // groups, 3, 3)
            arguments = [image(2, inputs, 5, 7), image(*shape), image(outputs, grad=False)]
            arguments += [image(outputs, grad=False).abs() + 0.5, image(outputs), image(outputs)]
            torch.testing.assert_close(compiled(*arguments), call(*arguments), rtol=1e-9, atol=1e-9)
    remarks = [remark.code for report in fxpasses.reports() for remark in report.remarks]
    assert remarks == ["symbolic-channels" if kind == "grouped transposed" else "applied"] * len(compilations)


def test_a_dynamic_number_of_groups_is_refused_or_specialised() -> None:
    def call(x: Any, weight: Any, mean: Any, groups: int) -> torch.Tensor:
        return F.batch_norm(F.conv2d(x, weight, None, groups=groups), mean, mean.exp())

    compiled = torch.compile(call, backend="fxpasses", dynamic=True, options={"inner": "eager"})
    x = image(2, 4, 5, 7)
    for groups in (2, 4):
        weight, mean = image(8, 4 // groups, 3, 3), image(8, grad=False)
        torch.testing.assert_close(
            compiled(x, weight, mean, groups), call(x, weight, mean, groups), rtol=1e-9, atol=1e-9
        )
    assert not [remark for r in fxpasses.reports() for remark in r.remarks if remark.status == "failed"]


# Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@sampled
def test_lower_precisions_are_as_close_to_the_truth_as_eager(capture: str, dtype: torch.dtype) -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), dtype)
    x = image(dtype=dtype, grad=False)
    reference = model(x)
    found = _rewritten(capture, model, x)
    exact = randomised_double(model)(x.double())
    own, ours = ((result.double() - exact).abs().max() for result in (reference, found))
    assert found.dtype == dtype
    assert ours <= max(2 * own, {torch.float32: 1e-5}.get(dtype, 1e-2) * exact.abs().max())


def randomised_double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def test_nearly_constant_channels_with_a_large_scale() -> None:
    """A variance of zero makes s = gamma / sqrt(eps): large, finite and the same as eager's."""
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].running_var.zero_()  # type: ignore[index]
    check_compiled(model, (image(),), 1)


def test_infinities_and_nans_stay_where_eager_has_them() -> None:
    model = pair(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    x = image(grad=False)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = float("nan"), float("inf")
    check_compiled(model, (x,), 1, grads=False, profit="always")
