"""Plans of graphs whose sizes are symbols: they are carried out, and hold for other sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpasses
from fxpasses.graph.metadata import tensor
from fxpasses.passes.layout.edits import UnrestorableError
from fxpasses.testing.captures import capture, rewrite_at

Tensor = torch.Tensor


class Between(nn.Module):
    """Two convolutions with an operator in between."""

    def __init__(self, function: Callable[[Tensor], Tensor], kernel: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, kernel, padding=1)
        self.function, self.last = function, nn.Conv2d(8, 8, 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def _unbound(y: Tensor) -> Tensor:
    """Slices without channels, which a stack reads as they are traced, with gaps."""
    return torch.stack(y.square().unbind(1), 1)


def _slices(y: Tensor) -> Tensor:
    """Slices that a Fourier transform reads, which needs their traced strides, with gaps."""
    return torch.cat([torch.fft.fft2(y[:, :4]).real, y[:, 4:]], 1)


CASES = {
    "constant pad": Between(lambda y: F.pad(y, (1, 0, 0, 2))),
    "nearest": Between(lambda y: F.interpolate(y, scale_factor=2, mode="nearest-exact")),
    "unbind": Between(_unbound, kernel=3),
    "slices": Between(_slices),
}


def planned(model: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    program = capture("pre_dispatch", model, (x,), dynamic=True)
    result = fxpasses.optimize(program, (x,), {"layout": "channels_last", "profit": "always"})
    assert result.report.layout.decision == "applied", result.report.remarks
    return result.graph_module


def answers(call: Callable[[Tensor], Tensor], x: Tensor, grads: bool) -> list[Tensor]:
    """The result and, if wanted, the gradient of the input."""
    x = x.requires_grad_(grads)
    result = call(x)
    gradients = torch.autograd.grad(result.square().sum(), [x]) if grads else ()
    return [result.detach(), *gradients]


def images(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_carried_out_and_holds_for_other_sizes(name, grads):
    model = CASES[name].double().eval()
    with torch.set_grad_enabled(grads):
        graph_module = planned(model, images(2, 3, 6, 6).requires_grad_(grads))
        for shape in ((2, 3, 6, 6), (3, 3, 8, 8), (2, 3, 12, 12)):
            found, expected = (answers(call, images(*shape), grads) for call in (graph_module, model))
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
                assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("name", ["constant pad", "nearest"])
def test_sizes_stay_symbols_where_an_operator_is_run_anew(name):
    with torch.no_grad():
        graph_module = planned(CASES[name].double().eval(), images(2, 3, 6, 5))
    between = [tensor(node) for node in graph_module.graph.nodes if str(node.target).startswith("aten.")]
    images_between = [found for found in between if found is not None and found.shape[-1] not in (1, 3)]
    assert images_between
    assert all(isinstance(size, torch.SymInt) for found in images_between for size in found.shape[2:])


class Seen(nn.Module):
    """A view that a Fourier transform reads with its traced strides, and that is a result."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 1, padding=1), nn.Conv2d(8, 8, 1)
        self.view = view

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.first(x)
        viewed = self.view(y)
        return self.last(y), torch.fft.fft(viewed, dim=-1).real, viewed


VIEWS = {
    "unbind": lambda y: y.unbind(1)[2],
    "select": lambda y: y.select(2, 1),
    "chunk": lambda y: y.chunk(2, 1)[1],
    "permuted slice": lambda y: y[:, 1:3].permute(0, 2, 1, 3),
    "channels in groups": lambda y: y[:, 1:5].unflatten(1, (2, 2)),
    "strided slice": lambda y: y[..., ::2],
    "expanded": lambda y: y[:, :1].expand(-1, 3, -1, -1),
}


def seen(view: Callable[[Tensor], Tensor], level: str, *, dynamic: bool):
    """The report, where results are eager's in values and strides."""
    model, x = Seen(view).double().eval(), images(2, 2, 6, 5)
    options = {"passes": ("layout",), "layout": "channels_last", "profit": "always"}
    with torch.no_grad():
        found = rewrite_at(level, model, (x,), options, dynamic=dynamic)
        for ours, theirs in zip(found.call(x), model(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            assert ours.stride() == theirs.stride()
    assert found.report.layout.decision == "applied", found.report.remarks
    return found.report


@pytest.mark.parametrize("level", ["torch", "pre_dispatch", pytest.param("aten", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_with_gaps_is_taken_again_of_what_lies_as_traced(name, level):
    report = seen(VIEWS[name], level, dynamic=True)
    assert {remark.code for remark in report.remarks} == {"applied"}


def test_elements_of_an_expanded_view_that_is_a_result_overlap_as_eagers_do():
    report = seen(VIEWS["expanded"], "pre_dispatch", dynamic=False)
    assert {remark.code for remark in report.remarks} == {"applied"}


@pytest.mark.parametrize("level", ["torch", "pre_dispatch"])
def test_what_cannot_be_restored_keeps_its_layout_and_the_rest_of_the_plan_lives(level):
    """An alias is no view that is known to be one, and nothing else has its strides."""
    report = seen(lambda y: torch.ops.aten.alias.default(y[:, 1:3]), level, dynamic=True)
    assert report.layout.converted >= 2
    assert {(remark.status, remark.code) for remark in report.remarks} == {
        ("applied", "applied"),
        ("declined", "unrestorable-strides"),
    }


def test_a_plan_of_which_nothing_can_be_kept_is_declined(monkeypatch):
    def refuse(edits, source, before, reader):
        raise UnrestorableError({source: "strides of nobody"})

    monkeypatch.setattr("fxpasses.passes.layout.materialise.strided_copy", refuse)
    monkeypatch.setattr("fxpasses.passes.layout.assign.Assignment.keeping", lambda self, nodes: None)
    model, x = Seen(VIEWS["select"]).double().eval(), images(2, 2, 6, 5)
    with torch.no_grad():
        program = capture("pre_dispatch", model, (x,))
        result = fxpasses.optimize(program, (x,), {"layout": "channels_last"})
        for ours, theirs in zip(result.graph_module(x), model(x), strict=True):
            assert torch.equal(ours, theirs)
    (declined,) = result.report.remarks
    assert (declined.status, declined.code, declined.node) == ("declined", "unrestorable-strides", "select")
    assert result.report.layout.decision == "failed"
