"""Several sites, several graphs, several calls: what changes between two calls is read anew."""

from __future__ import annotations

from typing import Any

import torch
from helpers import check, image, pair
from torch import nn
from wiring import wired

import fxpasses
from fxpasses.testing import expect


def test_a_pair_between_graph_breaks() -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.bn(m.conv(x))
        torch._dynamo.graph_break()
        z = m.conv2(x)
        torch._dynamo.graph_break()
        return y + m.bn2(z)

    model, x = wired(wire), image()
    compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager"})
    with expect(efficient_conv_bn_eval=1):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    assert "no-producer" in {remark.code for report in fxpasses.reports() for remark in report.declined}


def test_the_same_pair_called_in_a_loop() -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=x.dtype)
        for step in range(3):
            total = total + m.bn(m.conv(x * (step + 1))).square().mean()
        return total

    for capture in ("compile", "pre_dispatch", "export", "symbolic_trace"):
        check(capture, wired(wire), (image(),), 3)


def test_modes_switched_after_compilation_compile_anew() -> None:
    model, x = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(grad=False)
    compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager"})
    with expect(efficient_conv_bn_eval=1):
        compiled(x)
        model.train()
        compiled(x)
    model.eval()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    assert fxpasses.last_report().remarks[0].code == "training-mode"


def test_parameters_updated_between_calls_are_read_anew() -> None:
    model, x = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(grad=False)
    compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager"})
    compiled(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        model[1].running_var.add_(1)  # type: ignore[index]
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    model[1].running_mean = torch.ones(4, dtype=torch.float64)  # type: ignore[index]
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
