"""What other options would gain is predicted where this device was measured, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses.devices.own import own_store
from fxpasses.devices.profile import CONVOLUTION_FORWARD, Choice, Measurement, Roofline
from fxpasses.devices.sizes import ConvolutionSizes
from fxpasses.kernels import choice
from fxpasses.kernels.convolution import Sizes

PEAKS = Roofline("float32", matmul_flops=1e11, convolution_flops=1e11, bandwidth=1e10, call_seconds=1e-6)
KEY = ConvolutionSizes(
    (2, 3, 8, 8), (16, 3, 3, 3), (2, 16, 6, 6), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
).key()
KEPT = Sizes(3, 16, 1, (3, 3), (1, 1), (0, 0), (1, 1))


def row(layout: str, seconds: float) -> Measurement:
    return Measurement(CONVOLUTION_FORWARD, KEY, layout, "aten.convolution", "float32", seconds, 0.0, 5)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(tmp_path))
    monkeypatch.setenv("FXPASSES_SHIPPED_PROFILES", "0")


def explained(*, rows: bool = True, choices: bool = True, layers: int = 1) -> fxpasses.Report:
    """A dry run where a convolution was measured to take 4 ms, and 2 ms over a weight that is kept."""
    store = own_store("cpu")
    measured = (row("contiguous", 4e-3), row("channels_last", 9e-3)) if rows else ()
    key = choice._key(KEPT, (2, 3, 8, 8), summand=False, planar=False, far=False)
    kept = {key: Choice(None, 2e-3, 2e-3)} if choices else {}
    store.merge(replace(store.empty, rooflines=(PEAKS,), measurements=measured, choices=kept))
    pairs = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)]
    if layers == 2:
        pairs += [nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4)]
    with torch.no_grad():
        return fxpasses.explain(nn.Sequential(*pairs).eval(), torch.randn(2, 3, 8, 8))


def test_advice_says_how_much_faster_convolutions_would_be():
    report = explained()
    (cached, always) = report.tried
    assert cached.options == {"weights": "cached"}
    assert (cached.otherwise_seconds, cached.seconds) == (4e-3, 2e-3)
    assert always.seconds is None
    words = "predicted for convolutions and copies: 2.00x (4.000 ms now, 2.000 ms then)"
    assert words in " ".join(str(report).split())
    assert words in str(report.why("1"))
    assert fxpasses.Report.from_json(report.to_json()).tried == report.tried


@pytest.mark.parametrize(
    "lacking",
    [{"choices": False}, {"rows": False}, {"layers": 2}],
    ids=["no kernel was timed", "no layout was measured", "another convolution was not measured"],
)
def test_what_was_not_measured_is_not_predicted(lacking):
    report = explained(**lacking)
    assert report.tried
    assert {attempt.seconds for attempt in report.tried} == {None}
    assert "predicted for convolutions" not in str(report)


def test_figures_of_several_graphs_are_added_where_all_are_known():
    known, unknown = explained(), explained(choices=False, layers=2)
    (cached, _) = fxpasses.Report.merge([known, known]).tried
    assert (cached.otherwise_seconds, cached.seconds) == (8e-3, 4e-3)
    (cached, _) = fxpasses.Report.merge([known, unknown]).tried
    assert cached.seconds is None
