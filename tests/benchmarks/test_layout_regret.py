"""The regret of a plan, priced by the full table; the best plan is never dearer than stock's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import layout_regret
from benchmarks.layout_regret import joint_graphs, main, regret
from fxpasses.devices.own import own_store


@pytest.fixture(autouse=True)
def a_small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpasses.devices.arena.far", lambda device: 2**20)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)
    )


@pytest.mark.parametrize("training", [False, True])
def test_a_plan_is_priced_by_the_full_table(training):
    with torch.set_grad_enabled(training):
        (graph,) = joint_graphs(network().train(training), torch.randn(2, 3, 16, 16))
    ratio, stock, best, found = regret(graph, 60)
    assert ratio >= 1 - 1e-9
    assert stock >= 1 - 1e-9
    assert best.plan.measured == len(best.plan.convolutions)
    assert len(found.labels) == len(best.labels)
    assert own_store().profile().measurements == ()  # what it measures is not kept


def test_the_command_prints_a_row_for_each_graph(capsys, monkeypatch):
    monkeypatch.setattr(layout_regret, "load_model", lambda name, default_source: network())
    before = torch.get_num_threads()
    try:
        assert main(["--models", "small", "--size", "16"]) == 0
    finally:
        torch.set_num_threads(before)
    out = capsys.readouterr().out
    assert "small" in out
    assert "worst" in out
