"""Compiles networks and prints what the reports and inductor's counters say, for a process of its own.

Its arguments are a factor that is part of each network, so that no cache has it yet, and names of networks.
A first process fills inductor's caches, a second finds all in them: what is counted, remarked, planned and
packed must be the same, although none of our passes behind the caches has run. $CACHE_ARCHIVE is a file that
the caches are saved to, or loaded from where it exists. See test_second_process.py.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

import fxpasses


class Times(nn.Module):
    """A multiplication."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def pair(first: nn.Module) -> dict[str, Any]:
    """A convolution and a norm that train with frozen statistics; ReLU6's mask is read off its result."""
    model = nn.Sequential(first, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6()).eval()
    x = torch.randn(2, 3, 8, 8)
    out = torch.compile(model, backend="fxpasses")(x)
    out.sum().backward()
    assert torch.allclose(out, model(x), atol=1e-5)
    report = fxpasses.last_report()
    return {
        "ours": dict(counters["fxpasses"]),
        "masks": report.applied["activation_masks"],
        "remarks": len(report.remarks),
    }


def plan(first: nn.Module) -> dict[str, Any]:
    """A layout plan."""
    model = nn.Sequential(first, nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    compiled = torch.compile(model, backend="fxpasses", options={"layout": "channels_last"})
    with torch.no_grad():
        compiled(torch.ones(1, 4, 8, 8, dtype=torch.float64))
    report = fxpasses.last_report()
    return {
        "applied": dict(report.applied),
        "counted": counters["fxpasses"]["layout"],
        "plan": [report.layout.converted, len(report.layout.cut_edges)],
    }


def given(first: nn.Module, **options: Any) -> dict[str, Any]:
    """A result in the layout of the plan."""
    model = nn.Sequential(first, nn.Conv2d(3, 8, 5), nn.ReLU()).eval()
    compiled = torch.compile(
        model, backend="fxpasses", options={"io": "any", **(options or {"layout": "channels_last"})}
    )
    with torch.no_grad():
        assert compiled(torch.ones(1, 3, 9, 9)).is_contiguous(memory_format=torch.channels_last)
    return {"io": [str(each) for each in fxpasses.last_report().io]}


def given_by_kernels(first: nn.Module) -> dict[str, Any]:
    """A result in the layout of a packed convolution."""
    return given(first, weights="cached")


def _scale(layer: nn.Conv2d) -> None:
    layer.weight.mul_(-1)


def _load(layer: nn.Conv2d) -> None:
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})


def _replace(layer: nn.Conv2d) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def _give_data(layer: nn.Conv2d) -> None:
    layer.bias.data = torch.randn_like(layer.bias)


def _write_untold(layer: nn.Conv2d) -> None:
    layer.weight.data.copy_(torch.randn_like(layer.weight))


UPDATES = (_scale, _load, _replace, _give_data, _write_untold)


def kept(first: nn.Module, dtype: torch.dtype, *layers: nn.Module, **options: Any) -> dict[str, Any]:
    """Convolutions with cached weights: constants of the process, not of the graph that a cache holds.

    No update leaves an answer stale, whether the code was compiled here or came from a cache.
    """
    torch.seed()  # each process has weights of its own
    model = nn.Sequential(first, *layers or (nn.Conv2d(3, 8, 3), nn.ReLU())).eval().to(dtype)
    x = torch.randn(1, 3, 9, 9, dtype=dtype)
    run = torch.compile(model, backend="fxpasses", options={"weights": "cached", **options})
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
        for _ in range(25):
            random.choice(UPDATES)(model[1])
            torch.testing.assert_close(run(x), model(x))
    report = fxpasses.last_report()
    codes = [remark.code for remark in report.remarks if remark.rule == "own_kernels"]
    others = [remark.code for remark in report.remarks if remark.code == "other-kernels"]
    return {"packed": report.packed_tensors, "kernels": codes, "others": others}


def half(first: nn.Module) -> dict[str, Any]:
    """Before this process needs kernels of ours, which make our operators known: there are none for it."""
    return kept(first, torch.bfloat16)


def sequence(first: nn.Module) -> dict[str, Any]:
    """Several kernels of ours in one call."""
    layers = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 3))
    return kept(first, torch.float32, *layers, profit="always")


def measured(first: nn.Module) -> dict[str, Any]:
    """The faster kernel of each layer, as it was measured."""
    from fxpasses.kernels import choice

    times = choice._medians
    count = 0

    def counting(*given: Any) -> list[float]:
        nonlocal count
        count += 1
        return times(*given)

    choice._medians = counting
    layers = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 49, 24))
    told = kept(first, torch.float32, *layers)
    choice._medians = times
    printed_measurements.append(count)
    return told


printed_measurements: list[int] = []


def main(factor: str, *names: str) -> None:
    printed = {}
    archive = os.environ.get("CACHE_ARCHIVE")
    if archive is not None and Path(archive).exists():
        torch.compiler.load_cache_artifacts(Path(archive).read_bytes())
    for network in (pair, plan, given, half, sequence, measured, given_by_kernels):
        if names and network.__name__ not in names:
            continue
        torch.compiler.reset()
        fxpasses.reset()
        counters.clear()
        torch.manual_seed(0)
        told = network(Times(float(factor)))
        printed[network.__name__] = {
            "told": told,
            "inductor": dict(counters["inductor"]),
            "aot": dict(counters["aot_autograd"]),
            "measured": sum(printed_measurements),
        }
    if archive is not None and not Path(archive).exists():
        saved = torch.compiler.save_cache_artifacts()
        assert saved is not None
        Path(archive).write_bytes(saved[0])
    print(json.dumps(printed))


if __name__ == "__main__":
    main(*sys.argv[1:])
