"""`io="any"`: results stay in the plan's layout, where nobody else sees their memory; values are eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpasses
from fxpasses.errors import UnknownOptionError
from fxpasses.options import Options
from fxpasses.torch_internals.pytree import tree_leaves
from tests.helpers import Spelled, sampled_cases

LAST = torch.channels_last
ANY = {"layout": "channels_last", "io": "any"}


def encoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2))


def decoder() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))


def picture(*, grad: bool = False) -> torch.Tensor:
    return torch.randn(2, 3, 9, 9, dtype=torch.float64, requires_grad=grad)


def is_last(found: torch.Tensor) -> bool:
    return found.is_contiguous(memory_format=LAST) and not found.is_contiguous()


def run(model: Callable[..., Any], *inputs: torch.Tensor, grad: bool = False, **options: Any) -> list[Any]:
    """What a compiled model gives, compared with eager: values, never strides; without a trace of others."""
    torch.compiler.reset()
    fxpasses.reset()
    ours, theirs = copy.deepcopy(inputs), copy.deepcopy(inputs)
    eager = copy.deepcopy(model)
    with torch.set_grad_enabled(grad):
        expected = tree_leaves(eager(*theirs))
        found = tree_leaves(torch.compile(model, backend="fxpasses", options={**ANY, **options})(*ours))
    for mine, other in zip((*found, *ours), (*expected, *theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    return list(zip(found, expected, strict=True))


# What is free ----------------------------------------------------------------------------------------------


def test_a_result_of_a_convolutional_net_is_channels_last():
    ((found, eager),) = run(encoder().double(), picture())
    assert is_last(found)
    assert eager.is_contiguous()
    report = fxpasses.last_report()
    assert [(each.kind, each.label, each.eager) for each in report.io] == [
        ("input", "contiguous", "contiguous"),
        ("result", "channels_last", "contiguous"),
    ]
    assert report.layout.boundary == report.io
    assert "io: 0 inputs and 1 result in channels_last" in str(report)
    assert fxpasses.Report.from_json(report.to_json()).io == report.io


def test_a_result_of_three_spatial_dimensions_is_channels_last():
    model = nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU()).double()
    ((found, _),) = run(model, torch.randn(2, 3, 5, 5, 5, dtype=torch.float64))
    assert found.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_channels_last_input_may_give_a_contiguous_result():
    ((found, eager),) = run(encoder().double(), picture().to(memory_format=LAST), layout="contiguous")
    assert is_last(eager)
    assert found.is_contiguous()
    assert [each.label for each in fxpasses.last_report().io] == ["channels_last", "contiguous"]


@pytest.mark.parametrize("grad", [False, True])
def test_by_default_strides_are_those_of_eager_and_nothing_is_said(grad):
    ((found, eager),) = run(encoder().double(), picture(grad=grad), grad=grad, io="eager")
    assert found.stride() == eager.stride()
    assert fxpasses.last_report().io == ()
    assert "io:" not in str(fxpasses.last_report())


class Norms(nn.Module):
    """Two results of their own memory, one of them saved for the backward pass, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = torch.sigmoid(self.norm(self.conv(x)))
        z = self.head(y)
        return y, z, z.square().mean()


def step(model: nn.Module, x: torch.Tensor, **options: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The results of a training step, and its gradients; of eager without options."""
    torch.compiler.reset()
    run = torch.compile(model, backend="fxpasses", options=options) if options else model
    results = tree_leaves(run(x))
    total = sum((result * result.detach().cos()).sum() for result in results)
    return results, list(torch.autograd.grad(total, [x, *model.parameters()]))


@pytest.mark.parametrize(
    ("training", "given"),
    [
        pytest.param(True, "contiguous", id="training-contiguous"),
        pytest.param(False, "channels_last", id="frozen_statistics-channels_last", marks=pytest.mark.full),
        pytest.param(True, "channels_last", id="training-channels_last", marks=pytest.mark.full),
        pytest.param(False, "contiguous", id="frozen_statistics-contiguous", marks=pytest.mark.full),
    ],
)
def test_a_training_step_has_eagers_values_and_eagers_gradients(training, given):
    model = Norms().double().train(training)
    x = picture(grad=True)
    if given == "channels_last":
        x = x.detach().to(memory_format=LAST).requires_grad_()
    expected, theirs = step(copy.deepcopy(model), x)
    found, ours = step(model, x, **ANY)
    assert [result.dim() == 4 and is_last(result) for result in found] == [True, True, False]
    for mine, other in zip((*found, *ours), (*expected, *theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.stride() == other.stride()
    report = fxpasses.last_report()
    assert [each.kind for each in report.io] == ["input", "result", "result"]


@pytest.mark.parametrize("last", [False, True])
def test_the_gradient_of_a_result_may_come_in_any_layout(last):
    model, x = encoder().double(), picture(grad=True)
    given = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    given = given.to(memory_format=LAST) if last else given
    compiled = torch.compile(model, backend="fxpasses", options=ANY)
    (found,) = torch.autograd.grad(compiled(x), x, given)
    (expected,) = torch.autograd.grad(model(x), x, given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found.stride() == expected.stride()


# What is not -----------------------------------------------------------------------------------------------


def returns_its_input(self: Any, x: torch.Tensor) -> Any:
    return self.conv(x), x


def returns_a_view_of_its_input(self: Any, x: torch.Tensor) -> Any:
    return self.conv(x), x[:, 1:]


def writes_to_its_input(self: Any, x: torch.Tensor) -> Any:
    y = self.conv(x * 1)
    return y, x.add_(self.conv(y))


def returns_two_views(self: Any, x: torch.Tensor) -> Any:
    z = F.relu(self.conv(x) + 1)
    return self.conv(x), z[:, :2], z[:, 1:]


def returns_a_result_twice(self: Any, x: torch.Tensor) -> Any:
    z = F.relu(self.conv(x) + 1)
    return self.conv(x), z, z.view(z.shape[0], -1)


def writes_to_a_buffer(self: Any, x: torch.Tensor) -> Any:
    y = self.conv(x)
    self.kept.copy_(y)
    return y + 1, self.kept


def returns_a_sequence(self: Any, x: torch.Tensor) -> Any:
    z = self.conv(x)
    return z + 1, z.flatten(2)


SHARING = [
    returns_its_input,
    returns_a_view_of_its_input,
    writes_to_its_input,
    returns_two_views,
    returns_a_result_twice,
    writes_to_a_buffer,
    returns_a_sequence,
]


_COMPILED_IN_TRAINING = (returns_its_input, writes_to_its_input, returns_two_views, returns_a_sequence)
"""The others are compiled by inductor for inference; the rest of both is for the full run."""


@pytest.mark.parametrize(
    ("inner", "grad", "spell"),
    [
        pytest.param(
            inner,
            grad,
            spell,
            id=f"{spell.__name__}-{'training' if grad else 'inference'}-{inner}",
            marks=pytest.mark.full
            if inner == "inductor" and grad is not (spell in _COMPILED_IN_TRAINING)
            else (),
        )
        for spell in SHARING
        for grad in (False, True)
        for inner in ("inductor", "aot_eager", "eager")
    ],
)
def test_results_whose_memory_others_see_have_eagers_strides(spell, grad, inner):
    """The first result of each may differ, and the others never."""
    model = Spelled(spell).double()
    model.conv = nn.Conv2d(3, 3, 3, padding=1).double()
    model.register_buffer("kept", torch.zeros(2, 3, 9, 9, dtype=torch.float64))
    (first, _), *others = run(model, picture(), grad=grad, inner=inner)
    assert is_last(first)
    for found, eager in others:
        assert found.stride() == eager.stride()


def test_a_slice_of_a_tensor_has_eagers_strides():
    model = Spelled(lambda self, x: (self.conv(x), F.relu(self.conv(x) + 1)[:, :2])).double()
    model.conv = nn.Conv2d(3, 3, 3).double()
    (first, _), (found, eager) = run(model, picture())
    assert is_last(first)
    assert found.stride() == eager.stride()


def test_the_new_value_of_a_buffer_is_told_to_be_as_the_buffer():
    def fills(self: Any, x: torch.Tensor) -> Any:
        self.kept.copy_(self.conv(x))
        return self.kept

    model = Spelled(fills).double()
    model.conv = nn.Conv2d(3, 3, 3, padding=1).double()
    model.register_buffer("kept", torch.zeros(2, 3, 9, 9, dtype=torch.float64))
    ((found, eager),) = run(model, picture())
    assert found.stride() == eager.stride()
    assert {each.label for each in fxpasses.last_report().io} == {"contiguous"}


def test_what_a_graph_gives_twice_has_eagers_strides():
    model, x = encoder().double(), picture()
    with torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: (y := model(x), y))(x)
        found = fxpasses.optimize(graph, (x,), options=ANY).graph_module(x)
    assert [each.stride() for each in found] == [each.stride() for each in graph(x)]


def test_the_same_tensor_twice_stays_one_tensor():
    model = Spelled(lambda self, x: (z := self.conv(x), z)).double()
    model.conv = nn.Conv2d(3, 3, 3).double()
    (first, _), (second, _) = run(model, picture())
    assert first is second


# Between graphs --------------------------------------------------------------------------------------------


def copies_of_pipeline(io: str, x: torch.Tensor) -> tuple[int, list[str]]:
    """The copies of an encoder and a decoder, and the tensors other than weights that are copied."""
    torch.compiler.reset()
    fxpasses.reset()
    torch.manual_seed(0)
    first, second = encoder().double(), decoder().double()
    options = {**ANY, "io": io}
    with torch.no_grad():
        between = torch.compile(first, backend="fxpasses", options=options)(x)
        found = torch.compile(second, backend="fxpasses", options=options)(between)
        torch.testing.assert_close(found, second(first(x)), rtol=1e-9, atol=1e-9)
    plans = [report.layout for report in fxpasses.reports()]
    assert len(plans) == 2
    edges = [edge for plan in plans for edge in plan.cut_edges if edge.tensor not in plan.weights]
    return sum(plan.copies for plan in plans), [edge.operator for edge in edges]


@pytest.mark.usefixtures("no_code")
def test_a_pipeline_hands_channels_last_on_without_copies():
    copies, copied = copies_of_pipeline("eager", picture())
    assert copied == ["placeholder", "convolution", "placeholder", "convolution"]
    fewer, left = copies_of_pipeline("any", picture())
    assert left == ["placeholder"]  # the picture, which comes contiguous
    assert copies - fewer == 3
    assert copies_of_pipeline("any", picture().to(memory_format=LAST))[1] == []


def test_dynamic_sizes():
    compiled = torch.compile(model := encoder().double(), backend="fxpasses", options=ANY, dynamic=True)
    with torch.no_grad():
        for size in (9, 11, 14):
            x = torch.randn(2, 3, size, size + 1, dtype=torch.float64)
            torch.testing.assert_close(found := compiled(x), model(x), rtol=1e-9, atol=1e-9)
            assert is_last(found)


def test_code_after_a_graph_break_sees_the_strides_that_are():
    @torch.compiler.disable
    def outside(y: torch.Tensor) -> torch.Tensor:
        return y

    def through(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        y = outside(model(x))
        return y.reshape(2, -1) + 1, y.is_contiguous()

    model, x = encoder().double(), picture()
    with torch.no_grad():
        found, is_contiguous = torch.compile(through, backend="fxpasses", options=ANY)(x)
        torch.testing.assert_close(found, model(x).reshape(2, -1) + 1, rtol=1e-9, atol=1e-9)
    assert not is_contiguous


# Kept weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", sampled_cases(["auto", "channels_last", "contiguous"], ["auto", "contiguous"])
)
@pytest.mark.parametrize("io", ["any", "eager"])
def test_cached_weights(layout, io):
    ((found, eager),) = run(encoder().double(), picture(), weights="cached", layout=layout, io=io)
    wanted = io == "any" and layout != "contiguous"
    assert is_last(found) == wanted
    assert found.stride() == eager.stride() or io == "any"
    report = fxpasses.last_report()
    labels = [each.label for each in report.io if each.kind == "result"]
    assert labels == ([] if io == "eager" else ["channels_last" if wanted else "contiguous"])


@pytest.mark.parametrize("dynamic", [False, True])
def test_packed_weights_give_channels_last_and_take_it(dynamic):
    first, second = encoder().eval(), decoder().eval()
    options = {"weights": "cached", "io": "any", "profit": "always"}
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        between = torch.compile(first, backend="fxpasses", options=options, dynamic=dynamic)(x)
        assert is_last(between)
        torch.testing.assert_close(between, first(x), rtol=1e-4, atol=1e-4)
        found = torch.compile(second, backend="fxpasses", options=options, dynamic=dynamic)(between)
        torch.testing.assert_close(found, second(first(x)), rtol=1e-4, atol=1e-4)
    *_, report = fxpasses.reports()
    assert ("input", "channels_last") in [(each.kind, each.label) for each in report.io]
    assert "io: 1 input and 1 result in channels_last" in str(report)


@pytest.mark.parametrize(
    "spell",
    sampled_cases(SHARING, [writes_to_its_input, returns_two_views, returns_a_sequence]),
    ids=lambda each: each.__name__,
)
def test_cached_weights_leave_results_whose_memory_others_see(spell):
    model = Spelled(spell).double()
    model.conv = nn.Conv2d(3, 3, 3, padding=1).double()
    model.register_buffer("kept", torch.zeros(2, 3, 9, 9, dtype=torch.float64))
    _, *others = run(model, picture(), weights="cached", layout="auto")
    for found, eager in others:
        assert found.stride() == eager.stride()


# Other doors -----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A program that writes to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("seen", torch.zeros(2, 3, 9, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        self.seen.add_(y)
        return F.relu(y)


@pytest.mark.parametrize("io", ["any", "eager"])
def test_an_exported_program_gives_its_results_so_and_its_buffers_not(io):
    model, x = Counting().double().eval(), picture()
    program = torch.export.export(copy.deepcopy(model), (x,)).run_decompositions()
    with torch.no_grad():
        result = fxpasses.optimize(program, options={**ANY, "io": io})
        found, expected = result.exported_program.module()(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert is_last(found) == (io == "any")
    assert result.exported_program.state_dict["seen"].stride() == model.seen.stride()
    kinds = [(each.kind, each.label) for each in result.report.io]
    assert kinds == ([("input", "contiguous"), ("result", "channels_last")] if io == "any" else [])


def test_a_graph_of_make_fx_gives_results_so_and_gradients_not():
    model, x = encoder().double(), picture(grad=True)

    def forward_and_backward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = model(x)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    graph = torch.fx.experimental.proxy_tensor.make_fx(forward_and_backward)(x)
    with torch.no_grad():
        expected = graph(x)
        found = fxpasses.optimize(graph, (x,), options=ANY).graph_module(x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert found[1].stride() == expected[1].stride()


def test_a_dry_run_foresees_it():
    with torch.no_grad():
        report = fxpasses.explain(encoder(), picture().float(), options=ANY)
    assert [(each.kind, each.label) for each in report.io] == [
        ("input", "contiguous"),
        ("result", "channels_last"),
    ]


def test_what_is_not_carried_out_has_eagers_layouts(monkeypatch):
    monkeypatch.setattr("fxpasses.devices.store.find", lambda device: None)
    with torch.no_grad():
        report = fxpasses.explain(encoder(), picture().float(), options={"io": "any"})
    assert report.layout.decision != "applied"
    assert {each.label for each in report.io} == {"contiguous"}


def test_without_a_plan_strides_are_eagers_and_a_remark_says_so():
    ((found, eager),) = run(encoder().double(), picture(), layout="off")
    assert found.stride() == eager.stride()
    (remark,) = [each for each in fxpasses.last_report().remarks if each.rule == "io"]
    assert (remark.status, remark.code) == ("declined", "no-plan")


def test_reports_merge_what_graphs_take_and_give():
    parts = [fxpasses.explain(model, picture().float(), options=ANY) for model in (encoder(), encoder())]
    assert fxpasses.Report.merge(parts).io == (*parts[0].io, *parts[1].io)


def test_another_value_is_refused():
    with pytest.raises(UnknownOptionError, match=r"'io'.*any"):
        Options(io="anything")
