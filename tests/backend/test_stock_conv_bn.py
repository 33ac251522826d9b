"""Inductor's own conv-BN pass is switched on: ours takes its place, right where it is wrong, and says so."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import pair, randomised, sampled_cases
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

import fxpasses

RULE = "efficient_conv_bn_eval"
NAME = "efficient_conv_bn_eval_fx_passes"
SETTING = {NAME: True}


GLOBALLY, BY_OPTIONS, OFF = "globally", "by options", "off"


def run(model, x, switched=GLOBALLY, *, grad=True, inductor=None, **options):
    """Compares with eager, gradients included; how many pairs we rewrote and inductor did, and the report."""
    counters.clear()
    inductor = {**(inductor or {}), **(SETTING if switched == BY_OPTIONS else {})}
    ours = copy.deepcopy(model)
    compiled = torch.compile(ours, backend="fxpasses", options={**options, "inductor": inductor})
    with torch.set_grad_enabled(grad):
        # What comes from a cache is not counted by inductor.
        switch = SETTING if switched == GLOBALLY else {}
        with inductor_config.patch({**switch, "force_disable_caches": True}):
            found = compiled(x)
        counted = counters["fxpasses"][RULE], counters["inductor"][RULE]
        expected = model(x)
    torch.testing.assert_close(found, expected)
    if grad:
        found.sum().backward()
        expected.sum().backward()
        for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    return counted, fxpasses.last_report()


def remarks_on_the_setting(report):
    return [(each.status, each.code) for each in report.remarks if each.rule == NAME]


def image():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


class KeywordBias(nn.Module):
    """Inductor's pass drops the bias and the stride."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(F.conv2d(x, self.weight, bias=self.bias, stride=2))


class WriteBetween(nn.Module):
    """Inductor's pass moves the convolution behind the write."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = x + 1
        y = self.conv(x)
        x.mul_(3)
        return self.bn(y) + x.mean()


GETS_WRONG = {
    "keyword arguments": (KeywordBias, image, 1),
    "linear layer on three dimensions": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        lambda: torch.randn(2, 4, 3, dtype=torch.float64),
        0,
    ),
    "write in between": (WriteBetween, image, 1),
}


TAKEN_OVER = [("declined", "taken-over")]


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("switched", sampled_cases([GLOBALLY, BY_OPTIONS], [GLOBALLY]))
@pytest.mark.parametrize("case", GETS_WRONG)
def test_what_inductors_pass_gets_wrong_is_right(case, switched):
    factory, inputs, pairs = GETS_WRONG[case]
    # Eager has no gradient behind a write to what a convolution has read.
    found, report = run(randomised(factory()), inputs(), switched, grad=factory is not WriteBetween)
    assert found == (pairs, 0)
    assert remarks_on_the_setting(report) == TAKEN_OVER


@pytest.mark.usefixtures("no_code")
def test_inference_is_rewritten_once_as_the_setting_says_although_it_does_not_pay():
    found, report = run(pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(), grad=False)
    assert found == (1, 0)
    (applied,) = [each for each in report.remarks if each.status == "applied"]
    assert "inductor's own setting, against the cost model (live-weights" in applied.message


@pytest.mark.usefixtures("no_code")
def test_without_the_setting_a_pair_has_to_pay_and_nothing_is_said():
    found, report = run(pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(), OFF, grad=False)
    assert found == (0, 0)
    assert [each.code for each in report.declined] == ["live-weights"]


@pytest.mark.usefixtures("no_code")
def test_other_rules_still_have_to_pay():
    """A scale and a shift per channel, which inductor's pass does not look at either."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x):
            return self.conv(x) * self.scale

    found, report = run(Scaled().double(), image(), grad=False)
    assert found == (0, 0)
    assert "conv_affine" not in report.applied


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize(
    ("options", "switched"),
    [
        ({"disable": (RULE,)}, GLOBALLY),
        ({"passes": ("layout",)}, BY_OPTIONS),
        pytest.param({"disable": (RULE,)}, BY_OPTIONS, marks=pytest.mark.full),
        pytest.param({"passes": ("layout",)}, GLOBALLY, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_where_our_rule_is_left_out_inductors_pass_runs(options, switched):
    found, report = run(pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(), switched, **options)
    assert found == (0, 1)
    assert not remarks_on_the_setting(report)


@pytest.mark.usefixtures("no_code")
def test_a_graph_without_a_norm_has_no_remark():
    found, report = run(nn.Conv2d(3, 4, 3).double(), image(), grad=False)
    assert found == (0, 0)
    assert not remarks_on_the_setting(report)


def test_inductors_pass_does_not_run_under_freezing_and_so_is_not_replaced():
    found, report = run(
        pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(), grad=False, inductor={"freezing": True}
    )
    assert found == (0, 0)
    assert not remarks_on_the_setting(report)


def test_kept_weights_are_folded_once():
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.float32)
    found, report = run(model, image().float(), grad=False, weights="cached")
    assert found == (1, 0)
    assert remarks_on_the_setting(report) == TAKEN_OVER


def test_a_checkpointed_pair_is_rewritten_once():
    """Stock inductor writes code that does not compile for it."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(lambda y: self.bn(self.conv(y)), x, use_reentrant=False)

    assert run(randomised(Checkpointed()), image())[0] == (1, 0)


@pytest.mark.usefixtures("no_code")
def test_a_limit_holds_for_inductors_pass_too():
    """Or the search for the rewrite that breaks a model would find it everywhere."""
    found, _ = run(pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(), grad=False, limit=0)
    assert found == (0, 0)


def test_a_dry_run_tells_the_same():
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with inductor_config.patch(SETTING), torch.no_grad():
        report = fxpasses.explain(model, image())
    assert dict(report.applied) == {RULE: 1}
    assert remarks_on_the_setting(report) == TAKEN_OVER


def test_another_inner_backend_has_no_such_pass():
    found, report = run(pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(), inner="aot_eager", grad=False)
    assert found == (0, 0)
    assert not remarks_on_the_setting(report)


@pytest.mark.usefixtures("no_code")
def test_the_setting_is_as_it_was_afterwards():
    with inductor_config.patch(SETTING):
        run(pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(), grad=False)
        assert inductor_config.efficient_conv_bn_eval_fx_passes
