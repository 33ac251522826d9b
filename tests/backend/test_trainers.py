"""The usual ways to train give eager's losses over twenty steps, and the rewrites happen in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from trainers import RULE, Network, batch, cross_entropy, losses, network, pair

import fxpasses

RELATIVE = 1e-4

INNERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)]
inners = pytest.mark.parametrize("inner", INNERS)


def compile_with(inner: str, call: Any, **options: Any) -> Any:
    return torch.compile(call, backend="fxpasses", options={"inner": inner, **options})


def require_close(found: list[float], expected: list[float], relative: float = RELATIVE) -> None:
    assert sum(found[-5:]) < sum(found[:5]), "it does not learn"
    assert found == pytest.approx(expected, rel=relative)


def test_inductor_gives_eagers_losses() -> None:
    ours, eager = pair()
    with fxpasses.testing.expect(**{RULE: 3}):
        found = losses(compile_with("inductor", ours))
    require_close(found, losses(eager))


@inners
def test_gradient_accumulation(inner: str) -> None:
    ours, eager = pair()
    with fxpasses.testing.expect(**{RULE: 3}):
        found = losses(compile_with(inner, ours), accumulate=3)
    require_close(found, losses(eager, accumulate=3))


@inners
def test_gradient_checkpointing(inner: str) -> None:
    def loss(model: Any, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        y = model.stem(images)
        y = torch.relu(y + checkpoint(model.body, y, use_reentrant=False))
        return nn.functional.cross_entropy(model.head(y.mean((2, 3))), labels)

    ours, eager = pair()
    with fxpasses.testing.expect(**{RULE: 3}):
        found = losses(ours, compile_with(inner, loss))
    require_close(found, losses(eager, loss))


@inners
def test_autocast_in_bfloat16(inner: str) -> None:
    """Rounding differs, so both are compared with float32: eager's distance from it is the yardstick."""

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, images, labels)

    ours, eager = pair()
    with fxpasses.testing.expect(**{RULE: 3}):
        found = losses(ours, compile_with(inner, loss))
    exact, rounded = losses(network()), losses(eager, loss)
    assert sum(found[-5:]) < sum(found[:5])
    yardstick = max(abs(a - b) / b for a, b in zip(rounded, exact, strict=True))
    ours_off = max(abs(a - b) / b for a, b in zip(found, exact, strict=True))
    assert ours_off <= max(2 * yardstick, 1e-2)


@inners
def test_parameters_in_channels_last(inner: str) -> None:
    ours, eager = (each.to(memory_format=torch.channels_last) for each in pair())

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model, images.to(memory_format=torch.channels_last), labels)

    with fxpasses.testing.expect(**{RULE: 3}):
        found = losses(ours, compile_with(inner, loss))
    require_close(found, losses(eager, loss))


@inners
def test_an_optimisers_step_that_is_compiled_too(inner: str) -> None:
    ours, eager = pair()
    with fxpasses.testing.expect(**{RULE: 3}):
        found = losses(
            compile_with(inner, ours), compiled_step="inductor" if inner == "inductor" else "eager"
        )
    require_close(found, losses(eager))


@inners
def test_functional_gradients(inner: str) -> None:
    model = network()

    def value(parameters: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor) -> Any:
        return (
            torch.func.functional_call(model, parameters, (images,))
            .log_softmax(1)[range(4), labels]
            .neg()
            .mean()
        )

    def train(gradients: Any) -> list[float]:
        parameters = {name: each.detach().clone() for name, each in network().named_parameters()}
        found = []
        for step in range(20):
            changes, loss = gradients(parameters, *batch(step % 4))
            parameters = {name: each - 0.1 * changes[name] for name, each in parameters.items()}
            found.append(loss.item())
        return found

    both = torch.func.grad_and_value(value)
    with fxpasses.testing.expect(**{RULE: 3}):
        # Under a transform gradients are taken whatever requires grad, which the cost model cannot see.
        found = train(compile_with(inner, both, profit="always"))
    require_close(found, train(both))


def test_the_network_has_three_pairs() -> None:
    assert sum(isinstance(each, nn.BatchNorm2d) for each in Network().modules()) == 3
