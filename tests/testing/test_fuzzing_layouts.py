"""Random networks under the pass `layout`: as graphs that are run as they are, and as graphs for inductor.

The full run has 2,000 networks at each level. The default one is a small seeded one.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from itertools import count

import hypothesis
import pytest
import torch
from helpers import CAPTURES
from torch import nn

from fxpasses.comparison import assert_close_to_eager
from fxpasses.passes.layout import labels
from fxpasses.testing import LEVELS, Specimen, check_specimen, fuzz, strategies
from fxpasses.testing.specimens import _nudged_answers
from fxpasses.testing.strategies.layouts import LAYOUTS, STEPS
from fxpasses.torch_internals.pytree import tree_leaves
from tests.passes.layout.test_graphs import labelled_at_random

SAMPLED = {"torch": 4, "symbolic_trace": 10, "pre_dispatch": 6, "export": 4, "aten": 4}
"""Networks at each level; how many depends on what a capture takes."""


@pytest.mark.parametrize("level", LEVELS)
def test_the_layout_pass_survives_random_networks(level):
    assert fuzz("layout", examples=SAMPLED[level], levels=[level]) >= SAMPLED[level]


@pytest.mark.full
@pytest.mark.parametrize("level", LEVELS)
def test_the_layout_pass_survives_two_thousand_networks(level):
    seen = Counter()
    specimens = strategies.layouts().map(lambda specimen: seen.update([specimen.label]) or specimen)
    assert fuzz("layout", specimens, examples=2000, levels=[level], seed=1) >= 2000
    assert {label.partition(",")[0] for label in seen} == set(LAYOUTS)


def for_random_networks(examples: int, seed: int):
    """Runs a test of one specimen on so many."""

    def decorate(check):
        settings = hypothesis.settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.seed(seed)(settings(hypothesis.given(strategies.layouts())(check)))()

    return decorate


def labelled(specimen: Specimen) -> None:
    """Any labelling, in a graph for inductor, which is run without it, and in one that is run as it is."""
    if specimen.label.startswith(("written", "symbolic")):
        return
    model, (x,) = specimen.model, specimen.inputs
    x, quiet, seeds = x.detach(), replace(specimen, grads=False), count()

    def nudged() -> list[torch.Tensor]:
        return _nudged_answers(quiet, next(seeds))

    with torch.no_grad():
        program, expected = CAPTURES["pre_dispatch"](model, (x,)), tree_leaves(model(x))
        for executor in ("fused", "eager"):
            for module in labelled_at_random(program, (x,), executor, 2):
                found = tree_leaves(module(x))
                # Of numbers that rounding alone tells apart, a maximum may take another.
                assert_close_to_eager("result", found, expected, expected, nudged=nudged)
                if executor == "eager":
                    assert [ours.stride() for ours in found] == [theirs.stride() for theirs in expected]


def compiled(specimen: Specimen) -> None:
    """Through inductor, in training."""
    torch.compiler.reset()
    model, (x,) = specimen.model, specimen.inputs
    eager = copy.deepcopy(model)
    run = torch.compile(
        model, backend="fxpasses", options=dict(specimen.options), dynamic=specimen.dynamic or None
    )
    for ours, theirs in zip(_answers(run, model, x), _answers(eager, eager, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
        assert ours.stride() == theirs.stride()


def _answers(call, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    results = tree_leaves(call(x))
    total = sum((each.square() * 0.1).sum() for each in results)
    gradients = torch.autograd.grad(total, [x, *model.parameters()], allow_unused=True)
    return [*results, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("examples", [6, pytest.param(2000, marks=pytest.mark.full)])
def test_any_labelling_of_random_networks_gives_the_same_values_and_strides(examples):
    for_random_networks(examples, seed=2)(labelled)


@pytest.mark.full
@pytest.mark.parametrize("examples", [200])
def test_random_networks_through_inductor_equal_eager(examples):
    for_random_networks(examples, seed=3)(compiled)


def test_networks_are_drawn_with_operators_of_every_family():
    names = {name for steps in STEPS.values() for name in steps}
    assert {"group_norm", "channel_shuffle", "reflection pad", "roll", "stack of groups", "windows"} <= names
    assert {len(torch.empty([2] * rank).shape) for rank in STEPS} == {3, 4, 5}
    seen = Counter()
    specimens = strategies.layouts()

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=100, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(specimens)
    def see(specimen: Specimen) -> None:
        seen.update(type(step).__name__ for step in specimen.model.steps)

    see()
    assert {"Conv1d", "Conv2d", "Conv3d", "Step"} <= set(seen)
    assert seen["Step"] > 100


@pytest.mark.full
def test_fuzzing_finds_a_view_that_is_taken_for_one_in_both_layouts(monkeypatch):
    """Channels glued to pixels, as if they were neighbours in memory."""
    monkeypatch.setattr("fxpasses.graph.frames._are_neighbours", lambda dims, order: True)
    with pytest.raises(AssertionError):
        fuzz("layout", examples=300, levels=["pre_dispatch"])


def test_a_network_of_one_family_is_checked_by_one_line():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1)).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    specimen = Specimen("shuffle", model, (x,), count=1).with_options(layout="channels_last")
    assert check_specimen("layout", specimen, "symbolic_trace").layout.decision == "applied"
    assert labels.row_of("pixel_shuffle") is labels.Kind.ABSORBING
