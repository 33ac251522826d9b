"""conv-BN folds where the batch norm alone reads the convolution's result, and reads just that."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import EVERYWHERE, RULE, check, image, randomised
from torch import nn
from wiring import sampled, statistics, wired

from fxpasses.testing import assert_rewrites

READERS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "gamma": lambda m, y: F.batch_norm(y, *statistics(m), y.mean((0, 2, 3)), m.bn.bias),
    "statistics": lambda m, y: F.batch_norm(y, y.detach().mean((0, 2, 3)), m.bn.running_var),
    "a second batch norm": lambda m, y: m.bn(y) + m.bn2(y),
    "a view": lambda m, y: (m.bn(y), y.view(-1).sum()),
    "a detached reader": lambda m, y: (m.bn(y), y.detach()),
    "a dropout": lambda m, y: (m.bn(y), F.dropout(y, 0.5, False)),
    "its shape": lambda m, y: m.bn(y) * y.shape[1],
}


DROPPED_BY_DECOMPOSITION = {"statistics", "a detached reader"}
"""Decomposition drops `detach`, so that these programs have other gradients before we see them."""


@pytest.mark.parametrize(
    ("capture", "reader"),
    [
        (capture, reader)
        for capture, reader in itertools.product(EVERYWHERE, READERS)
        if reader != "its shape" and not (capture == "aten" and reader in DROPPED_BY_DECOMPOSITION)
    ],
)
def test_another_reader_of_the_convolution_keeps_it(capture: str, reader: str) -> None:
    model = wired(lambda m, x: READERS[reader](m, m.conv(x)))
    check(capture, model, (image(),), "multiple-users")


@pytest.mark.parametrize("capture", ["compile", "pre_dispatch", "export", "aten"])
def test_reading_the_static_shape_of_the_convolution_is_no_use(capture: str) -> None:
    check(capture, wired(lambda m, x: READERS["its shape"](m, m.conv(x))), (image(),), 1)


BETWEEN: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int | str]] = {
    "relu": (torch.relu, "no-producer"),
    "relu in place": (torch.relu_, "no-producer"),
    "transpose": (lambda y: y.transpose(2, 3), "no-producer"),
    "permuted channels": (lambda y: y.flip(1), "no-producer"),
    "channel slice": (lambda y: y[:, torch.tensor([3, 2, 1, 0])], "no-producer"),
    "nothing": (lambda y: y, 1),
}


@sampled
@pytest.mark.parametrize("between", BETWEEN)
def test_an_operator_between_the_two_keeps_them_apart(capture: str, between: str) -> None:
    apply, outcome = BETWEEN[between]
    check(capture, wired(lambda m, x: m.bn(apply(m.conv(x)))), (image(),), outcome)


@sampled
def test_batch_norm_before_the_convolution_is_left_alone(capture: str) -> None:
    model = randomised(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)))
    check(capture, model, (image(),), "no-producer")


@sampled
def test_two_batch_norms_in_a_row_are_both_folded(capture: str) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    check(capture, model, (image(),), 2)


@sampled
def test_result_written_in_place_afterwards(capture: str) -> None:
    check(capture, wired(lambda m, x: torch.relu_(m.bn(m.conv(x)).mul_(2))), (image(),), 1)


@sampled
def test_result_used_by_many_and_returned_twice(capture: str) -> None:
    def wire(m: Any, x: torch.Tensor) -> Any:
        y = m.bn(m.conv(x))
        return y, y.sum(), y * y

    check(capture, wired(wire), (image(),), 1)


@pytest.mark.parametrize("hook", [lambda y: y.register_hook(lambda g: g * 2), lambda y: y.retain_grad()])
def test_a_gradient_hook_on_the_convolutions_result_is_kept(hook: Callable[[torch.Tensor], Any]) -> None:
    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        hook(y)
        return m.bn(y)

    torch.compiler.reset()
    assert_rewrites(wired(wire), (image(),), {RULE: 0}, options={"inner": "eager"})
