"""Rows of the taxonomy that keep a layout: right values, gradients and strides, as few copies as said.

Each operator stands between two convolutions, in a graph that is run as it is and in one for inductor.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import CAPTURES, callable_of
from torch import nn

import fxpasses
from fxpasses.passes.layout.labels import FOLLOWING
from fxpasses.report.layout_plan import LayoutPlan
from fxpasses.testing.captures import capture
from fxpasses.torch_internals.pytree import tree_leaves
from tests.passes.layout.operator_cases import CASES, VIDEO, Between, Case
from tests.passes.layout.test_graphs import labelled_at_random
from tests.passes.layout.test_layout_views import inside

OF_EACH_KIND = ("expand of pixels", "gather", "roll")
"""Operators that the default run compiles; the full run compiles all."""

COMPILED = [pytest.param(name, marks=() if name in OF_EACH_KIND else pytest.mark.full) for name in CASES]


def model_and_input(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    case = CASES[name]
    return Between(case).double().eval(), torch.randn(case.shape, dtype=torch.float64)


def answers(call, x: torch.Tensor, leaves: list[torch.Tensor], grads: bool) -> list[torch.Tensor]:
    """The results, with the gradients of a weighted sum of them for the input and `leaves`."""
    x = x.detach().requires_grad_(grads)
    with torch.set_grad_enabled(grads):
        results = tree_leaves(call(x))
        if not grads:
            return results
        weights = [torch.linspace(0, 1, each.numel(), dtype=each.dtype).view(each.shape) for each in results]
        total = sum((each * weight).sum() for each, weight in zip(results, weights, strict=True))
        return [*results, *torch.autograd.grad(total, [x, *leaves])]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], of: int | None = None) -> None:
    """The same values, and strides: of the first so many, or of all."""
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert ours.stride() == theirs.stride() or (of is not None and index >= of)


def copies_inside(plan: LayoutPlan, case: Case) -> int:
    """Those that are neither of inputs and weights nor of results.

    Both convolutions of a video give a contiguous tensor on a CPU, which is copied whatever stands between.
    """
    return len(inside(plan)) + plan.repairs - (2 if case.shape == VIDEO else 0)


@pytest.mark.parametrize("name", CASES)
def test_a_graph_that_is_run_as_it_is_has_no_more_copies_than_its_row_says(name):
    model, x = model_and_input(name)
    with torch.no_grad():
        result = fxpasses.optimize(CAPTURES["pre_dispatch"](model, (x,)), (x,), {"layout": "channels_last"})
        assert_same(tree_leaves(callable_of(result)(x)), tree_leaves(model(x)))
    assert copies_inside(result.report.layout, CASES[name]) == CASES[name].eager


@pytest.mark.parametrize("executor", ["eager", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_any_labelling_gives_the_same_values_and_strides(name, executor):
    model, x = model_and_input(name)
    with torch.no_grad():
        expected = tree_leaves(model(x))
        for module in labelled_at_random(CAPTURES["pre_dispatch"](model, (x,)), (x,), executor, 3):
            found = tree_leaves(module(x))
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
                if executor == "eager":
                    assert ours.stride() == theirs.stride()


@pytest.mark.full
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "auto"])
@pytest.mark.parametrize("level", ["symbolic_trace", "pre_dispatch", "export", "aten"])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_eager_at_every_level(name, level, layout):
    if level == "symbolic_trace" and "unpool" in name:
        pytest.skip("symbolic_trace cannot unpack a result")
    case, (model, x) = CASES[name], model_and_input(name)
    leaves = list(model.parameters())
    with torch.set_grad_enabled(case.grads):
        given = x.detach().requires_grad_(case.grads)
        program = CAPTURES[level](model, (given,))
        call = callable_of(fxpasses.optimize(program, (given,), {"layout": layout}))
    # Core ATen has no `detach`: what the graph computes as it was captured is the truth.
    truth = program.module() if level == "aten" else model
    found = answers(call, x, leaves, case.grads)
    expected = answers(truth, x, list(truth.parameters()), case.grads)
    # The gradient of a layer that is called whole has the strides of the layout that it works in.
    assert_same(found, expected, of=len(tree_leaves(model(x))) if level == "symbolic_trace" else None)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dynamic])
def test_one_graph_of_symbolic_sizes_is_right_for_all(name):
    model, x = model_and_input(name)
    with torch.no_grad():
        program = capture("export", model, (x,), dynamic=True)
        call = callable_of(fxpasses.optimize(program, (x,), {"layout": "channels_last"}))
        assert_same(tree_leaves(call(x)), tree_leaves(model(x)))


def compiled(model: nn.Module, layout: str, **arguments: object):
    torch.compiler.reset()
    fxpasses.reset()
    return torch.compile(model, backend="fxpasses", options={"layout": layout}, **arguments)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_graph_has_no_more_copies_than_its_row_says(name):
    model, x = model_and_input(name)
    with torch.no_grad():
        call = compiled(model, "channels_last", dynamic=False)
        assert_same(tree_leaves(call(x)), tree_leaves(model(x)))
    assert copies_inside(fxpasses.last_report().layout, CASES[name]) == CASES[name].compiled


@pytest.mark.full
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "auto"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.grads])
def test_compiled_results_and_gradients_are_those_of_eager(name, layout):
    model, x = model_and_input(name)
    eager = copy.deepcopy(model)
    call = compiled(model, layout, dynamic=False)
    found = answers(call, x, list(model.parameters()), True)
    expected = answers(eager, x, list(eager.parameters()), True)
    # Without measurements stock inductor decides, which gives gradients the strides that it likes.
    assert_same(found, expected, of=len(tree_leaves(eager(x))) if layout == "auto" else len(expected))


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dynamic])
def test_one_compilation_is_right_for_all_sizes(name):
    model, x = model_and_input(name)
    with torch.no_grad():
        call = compiled(model, "channels_last", dynamic=True)
        for given in (x, torch.cat([x, x[:1]])):
            assert_same(tree_leaves(call(given)), tree_leaves(model(given)))


class Written(nn.Module):
    """Writes to one channel, which lies in the same order in both layouts, but with other gaps."""

    def __init__(self, write) -> None:
        super().__init__()
        self.first, self.last, self.write = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x) * 1.5
        self.write(y[:, :1])
        return self.last(y)


@pytest.mark.parametrize("level", ["symbolic_trace", "pre_dispatch", "export"])
@pytest.mark.parametrize(
    "write",
    [
        lambda part: part.mul_(2),
        lambda part: part.cumsum_(2),
        lambda part: part.copy_(part.sin()),
        lambda part: part.sigmoid_().unsqueeze(2).add_(1),
    ],
)
def test_what_is_written_to_a_part_without_a_label_is_seen(level, write):
    model, x = Written(write).double().eval(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        result = fxpasses.optimize(CAPTURES[level](model, (x,)), (x,), {"layout": "channels_last"})
        assert_same(tree_leaves(callable_of(result)(x)), tree_leaves(model(x)))


def test_elementwise_operators_read_a_part_without_a_label_as_it_lies():
    class Part(Written):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.last(y * y[:, 0].sigmoid().unsqueeze(1))

    model, x = Part(None).double().eval(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        program = CAPTURES["pre_dispatch"](model, (x,))
        result = fxpasses.optimize(program, (x,), {"layout": "channels_last"})
        assert_same(tree_leaves(callable_of(result)(x)), tree_leaves(model(x)))
    assert copies_inside(result.report.layout, CASES["roll"]) == 0


def test_strides_with_gaps_are_restored_in_a_program_that_may_not_write():
    class Gaps(Written):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x)) + torch.fft.fft2(self.first(x)[:, :1, ::2].real)[..., :1, :1].real

    model, x = Gaps(None).double().eval(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    given = x.detach().requires_grad_()
    result = fxpasses.optimize(CAPTURES["aten"](model, (given,)), (given,), {"layout": "channels_last"})
    targets = {str(node.target) for node in result.graph_module.graph.nodes}
    assert "aten.constant_pad_nd.default" in targets
    assert "aten.copy_.default" not in targets
    leaves = list(model.parameters())
    assert_same(answers(callable_of(result), x, leaves, True), answers(model, x, leaves, True))


def test_symbolic_sizes_that_are_written_in_two_ways_are_the_same():
    """What convolutions make of a size depends on the strides that the tracer sees."""
    layers = [nn.Conv2d(2, 4, 1, padding=1), nn.Conv2d(4, 4, 1, padding=1), nn.Conv2d(4, 4, 1, padding=1)]
    model, x = nn.Sequential(*layers).double().eval(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        program = capture("pre_dispatch", model, (x,), dynamic=True)
        result = fxpasses.optimize(program, (x,), {"layout": "channels_last"})
        assert result.report.applied == {"layout": 1}
        assert_same(tree_leaves(result.graph_module(x)), tree_leaves(model(x)))


def test_a_tuple_that_is_handed_on_whole_is_as_traced():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.conv(x).chunk(2, 1)

    model, x = Whole().double().eval(), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        program = torch.fx.symbolic_trace(model)
        call = callable_of(fxpasses.optimize(program, (x,), {"layout": "channels_last"}))
        assert_same(tree_leaves(call(x)), tree_leaves(model(x)))


@pytest.mark.parametrize("rank", [4, 5])
def test_kernels_follow_their_operands_where_metadata_say_that_they_do_not(rank):
    """Of those that `FOLLOWING` names: the real strides."""
    last = torch.channels_last if rank == 4 else torch.channels_last_3d
    x = torch.randn(2, 4, 6, 8, 6)[..., 0] if rank == 4 else torch.randn(2, 4, 6, 8, 6)
    x = x.contiguous(memory_format=last)
    aten, pads = torch.ops.aten, [1] * (2 * (rank - 2))
    pooled = nn.functional.max_pool2d(x, 2, return_indices=True) if rank == 4 else ()
    calls = {
        "roll": lambda: x.roll(1, 2),
        "fft_fftshift": lambda: torch.fft.fftshift(x),
        "fft_ifftshift": lambda: torch.fft.ifftshift(x),
        "channel_shuffle": lambda: torch.channel_shuffle(x, 2),
        "native_channel_shuffle": lambda: aten.native_channel_shuffle(x, 2),
        "pad": lambda: nn.functional.pad(x, pads, mode="reflect"),
        f"reflection_pad{rank - 2}d": lambda: getattr(aten, f"reflection_pad{rank - 2}d")(x, pads),
        f"replication_pad{rank - 2}d": lambda: getattr(aten, f"replication_pad{rank - 2}d")(x, pads),
    }
    if rank == 4:
        calls["max_unpool2d"] = lambda: nn.functional.max_unpool2d(*pooled, 2)
    for name in ("reflection_pad", "replication_pad"):
        grown = nn.functional.pad(x, pads).contiguous(memory_format=last)
        backward = f"{name}{rank - 2}d_backward"
        calls[backward] = lambda backward=backward, grown=grown: getattr(aten, backward)(grown, x, pads)
    for name, call in calls.items():
        assert call().is_contiguous(memory_format=last), name
    assert set(calls) >= {name for name in FOLLOWING if f"{7 - rank}d" not in name and "unpool" not in name}
