"""Random models around every rule that comes with the package, and around the tutorial's, at every level.

The full run has 2,000 models for each rule and level, and draws every kind of them, near misses included. The
default one is a small seeded one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import functools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import RULE
from torch import nn

from fxpasses.rewrite import declarative
from fxpasses.testing import LEVELS, Specimen, check_specimen, fuzz, strategies
from fxpasses.testing.captures import rewrite_at
from fxpasses.testing.specimens import _answers, _nudged_answers
from fxpasses.testing.strategies.parallel import _Window

SAMPLED = {"torch": 3, "symbolic_trace": 10, "pre_dispatch": 3, "export": 3, "aten": 3}
"""Models at each level; how many depends on what a capture takes."""


@functools.cache
def tutorial_rules():
    """The rules of the declarative rules' documentation, as it defines them."""
    (tutorial,) = doctest.DocTestFinder(recurse=False).find(declarative, "tutorial")
    doctest.DocTestRunner().run(tutorial, out=lambda _: None, clear_globs=False)
    return {name: tutorial.globs[name] for name in TUTORIAL}


TUTORIAL = ("DoubleNegation", "RmsNorm", "AddMM")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rule", strategies.FAMILIES)
def test_a_rule_survives_random_models(rule, level):
    assert fuzz(rule, examples=SAMPLED[level], levels=[level]) >= SAMPLED[level]


@pytest.mark.parametrize("name", TUTORIAL)
def test_the_tutorial_s_rules_survive_random_models(name):
    assert fuzz(tutorial_rules()[name], examples=4) >= 4 * len(LEVELS)


@pytest.mark.full
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rule", strategies.FAMILIES)
def test_a_rule_survives_two_thousand_models(rule, level):
    seen = Counter()
    specimens = strategies.of(rule).map(lambda specimen: seen.update([specimen.label]) or specimen)
    assert fuzz(rule, specimens, examples=2000, levels=[level], seed=1) >= 2000
    assert seen.keys() == strategies.KINDS[rule].keys()


@pytest.mark.full
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", TUTORIAL)
def test_the_tutorial_s_rules_survive_two_thousand_models(name, level):
    assert fuzz(tutorial_rules()[name], examples=2000, levels=[level], seed=1) >= 2000


@pytest.mark.parametrize("rule", strategies.FAMILIES)
def test_every_rule_has_models_that_it_must_rewrite_and_near_misses_with_a_code(rule):
    kinds = strategies.KINDS[rule]
    assert kinds["plain"].count == 1
    codes = {kind.code for kind in kinds.values() if isinstance(kind.code, str)}
    assert len(codes) >= 2
    assert "multiple-users" in codes


@pytest.mark.parametrize(
    ("rule", "broken", "found"),
    [
        ("conv_affine", "_sole_readers", "extra-user|own-mean"),
        ("parallel_conv_merge", "_holds_kernel", "misplaced|other-groups"),
        ("bn_before_conv", "_no_border", "padded|transposed"),
    ],
)
def test_fuzzing_finds_a_rule_without_one_of_its_guards(rule, broken, found, monkeypatch):
    module = {"parallel_conv_merge": "parallel"}.get(rule, rule)
    monkeypatch.setattr(f"fxpasses.passes.folding.{module}.{broken}", lambda match: None)
    with pytest.raises(AssertionError, match=found):
        fuzz(rule, examples=200, levels=["symbolic_trace"])


def test_fuzzing_finds_a_factor_that_is_ignored(monkeypatch):
    """As inductor's own matcher ignores the alpha of an addition."""
    from fxpasses.graph import affine

    made = affine.Affine

    def careless(node, source, kind, operand, sign=1.0, factor=1.0):
        return made(node, source, kind, operand, sign, 1.0 if factor > 0 else -1.0)

    monkeypatch.setattr(affine, "Affine", careless)
    with pytest.raises(AssertionError, match="off, relative"):
        fuzz("conv_affine", examples=100, levels=["symbolic_trace"])


def test_a_level_without_the_operator_says_so():
    """Nearest upsampling of one dimension is an index in core ATen: no site, and nothing wrong."""
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Upsample(scale_factor=2), nn.BatchNorm1d(3)).double().eval()
    specimen = Specimen("nearest", model, (torch.randn(2, 2, 5).double(),), count=1)
    check_specimen("affine_across_views", specimen, "export")
    with pytest.raises(AssertionError, match=r"0 applications, 1 expected\s+\(no site"):
        check_specimen("affine_across_views", specimen, "aten")


def test_windows_lie_inside_one_another_where_convolutions_agree():
    """The oracle of parallel branches is itself held to eager: a kernel with zeros round it."""
    host, small = _Window(3, 2, 1, 1), _Window(1, 2, 0, 2)
    assert host.holds(small)
    assert not host.holds(_Window(1, 2, 2, 1))
    x, weight = torch.randn(1, 1, 5), torch.randn(1, 1, 1)
    padded = F.pad(weight, (1, 1))
    assert host.results(5) == small.results(5) == F.conv1d(x, weight, stride=2).shape[-1]
    torch.testing.assert_close(
        F.conv1d(x, padded, stride=2, padding=1), F.conv1d(x, weight, stride=2, dilation=2)
    )


def test_one_line_is_enough():
    assert fuzz(RULE, examples=3, levels=["symbolic_trace"]) >= 3


def test_a_gradient_of_nothing_but_rounding_is_held_to_what_eager_keeps_of_it():
    """That of a bias ahead of a norm over the batch: zero, the sum of 1,920 numbers that cancel out.

    It depends on the last bits of what is summed, so a rewrite that is right need not agree with eager.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(4, 2, 1), nn.BatchNorm3d(2, track_running_stats=False)).double()
    image = 10 * torch.randn(3, 4, 8, 8, 10).double()
    eager = _answers(model, model, (image,), grads=True)
    other = _nudged_answers(Specimen("nudged", model, (image,)))
    gap = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(other, eager, strict=True)]
    assert gap[2] > 1e-3  # the bias
    assert max(gap[:2] + gap[3:]) < 1e-14


OFF, NOT_A_NUMBER = "off, relative", "NaNs where eager"


@pytest.mark.parametrize(
    ("spoilt", "rewritten", "by", "message"),
    [
        ("every capture", False, torch.nan, None),
        ("every capture", True, 1.0, None),
        ("every capture", True, torch.nan, NOT_A_NUMBER),
        ("what passes ran over", False, torch.nan, NOT_A_NUMBER),
        ("what passes ran over", False, 1e-6, OFF),
        ("what passes ran over", True, 1e-6, OFF),
        ("captures without passes", True, 1.0, None),
    ],
)
def test_what_capturing_alone_changes_is_not_held_against_a_rule(monkeypatch, spoilt, rewritten, by, message):
    """Where nothing was rewritten, to the bit; else where it is finite."""

    def spoiling(level, model, inputs, options, **kwargs):
        found = rewrite_at(level, model, inputs, options, **kwargs)
        if spoilt != "every capture" and bool(options["passes"]) != (spoilt == "what passes ran over"):
            return found
        return dataclasses.replace(found, call=lambda *given: found.call(*given) + by)

    monkeypatch.setattr("fxpasses.testing.specimens.rewrite_at", spoiling)
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Conv1d(2, 3, 1), norm if rewritten else nn.ReLU()).double().eval()
    specimen = Specimen("spoilt", model, (torch.randn(2, 2, 5).double(),), count=int(rewritten))
    with pytest.raises(AssertionError, match=message) if message else contextlib.nullcontext():
        check_specimen("efficient_conv_bn_eval", specimen, "export")


@pytest.mark.parametrize("is_captures_own", [True, False])
def test_gradients_are_left_out_where_autograd_refuses_what_was_captured(monkeypatch, is_captures_own):
    """A circular pad in core ATen has a copy that has no derivative."""

    class Padded(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.pad(super().forward(x), (1, 1, 0, 1), mode="circular" if is_captures_own else "reflect")

    if not is_captures_own:

        def refusing(level, model, inputs, options, **kwargs):
            found = rewrite_at(level, model, inputs, options, **kwargs)
            return dataclasses.replace(
                found, call=lambda x: _Refusing.apply(found.call(x)) if options["passes"] else found.call(x)
            )

        monkeypatch.setattr("fxpasses.testing.specimens.rewrite_at", refusing)
    model = Padded(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).double().eval()
    specimen = Specimen("padded", model, (torch.randn(2, 2, 5, 5).double().requires_grad_(),), count=1)
    with contextlib.nullcontext() if is_captures_own else pytest.raises(RuntimeError, match="no derivative"):
        assert check_specimen("efficient_conv_bn_eval", specimen, "aten").applied


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given):
        return given.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no derivative")
