"""The demo finds what is wrong, and its figures are what they are said to be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses.cli import demonstration as demo
from fxpasses.errors import FxpassesError

RULE = "efficient_conv_bn_eval"


def without_inductor(model: nn.Module) -> demo.Step:
    return torch.compile(model, backend="fxpasses", options={"inner": "aot_eager"})


def test_every_batch_norm_of_the_model_is_folded_and_the_result_is_right():
    model = demo.build_model()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    checks = demo.check_against_eager(model, demo.build_images(), without_inductor)
    assert [check.right for check in checks] == [True, True, True]
    assert fxpasses.last_report().applied == {RULE: norms}
    assert norms == 11


def test_the_model_is_in_eval_mode_and_trains_all_of_its_parameters():
    model = demo.build_model()
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_no_batch_norm_of_the_model_is_the_identity():
    for module in demo.build_model().modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.std() > 0.1
            assert module.running_var.std() > 0.1


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()


@pytest.mark.parametrize("scale", [1 + 1e-4, math.nan, 0.0])
def test_a_wrong_output_is_found(scale):
    checks = demo.check_against_eager(
        small_model(), torch.randn(2, 3, 8, 8), lambda model: lambda x: model(x) * scale
    )
    assert not any(check.right for check in checks)


def test_a_wrong_gradient_of_one_parameter_is_found():
    def with_a_wrong_gradient(model: nn.Module) -> demo.Step:
        model[3].bias.register_hook(lambda gradient: gradient * 1.001)
        return model

    checks = demo.check_against_eager(small_model(), torch.randn(2, 3, 8, 8), with_a_wrong_gradient)
    assert [check.right for check in checks] == [True, False, True]


def test_a_lost_gradient_is_found():
    def with_a_frozen_bias(model: nn.Module) -> demo.Step:
        model[3].bias.requires_grad_(False)
        return model

    with pytest.raises(FxpassesError, match="only 5 parameters"):
        demo.check_against_eager(small_model(), torch.randn(2, 3, 8, 8), with_a_frozen_bias)


def test_eager_itself_is_right():
    checks = demo.check_against_eager(small_model(), torch.randn(2, 3, 8, 8), lambda model: model)
    assert [check.error for check in checks[:2]] == [0.0, 0.0]
    assert checks[2].error == checks[2].eager_error
    assert all(check.right for check in checks)


def test_a_result_where_nothing_was_rewritten_is_not_right():
    timings = {name: demo.Timing((1.0, 1.0), 1) for name in demo.VARIANTS}
    checks = (demo.Check("c", 0.0, 1.0),)
    applied = fxpasses.Report((fxpasses.Remark("r", "applied", "applied", "m", "n"),))
    assert demo.DemoResult(applied, checks, timings, 1).right
    assert not demo.DemoResult(fxpasses.Report(), checks, timings, 1).right


def test_saved_bytes_count_each_storage_once_without_parameters_and_inputs():
    model = nn.Linear(4, 8)
    images = torch.randn(2, 4)
    assert demo.measure_saved_bytes(model, model, images) == 0
    # exp keeps its result, and the product keeps both factors, which are that result: 2 · 8 floats, once.
    assert demo.measure_saved_bytes(lambda x: model(x).exp().square(), model, images) == 2 * 8 * 4


def test_the_ratio_is_that_of_paired_steps():
    inductor, ours = demo.Timing((2.0, 6.0, 4.0), 0), demo.Timing((1.0, 2.0, 4.0), 0)
    ratio = demo.Ratio.of(inductor, ours)
    assert (ratio.lower, ratio.median, ratio.upper) == (1.5, 2.0, 2.5)
    assert ratio.verdict == "faster"


@pytest.mark.parametrize(
    ("quartiles", "verdict"),
    [
        ((1.01, 1.2, 1.3), "faster"),
        ((0.99, 1.2, 1.3), "inconclusive"),
        ((1.0, 1.2, 1.3), "inconclusive"),
        ((0.7, 0.8, 0.99), "slower"),
        ((0.7, 0.8, 1.01), "inconclusive"),
    ],
)
def test_a_spread_that_straddles_one_is_inconclusive(quartiles, verdict):
    assert demo.Ratio(*quartiles).verdict == verdict


@pytest.mark.full
def test_variants_take_turns_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(demo, "VARIANTS", ("eager",))
    said: list[str] = []
    timings = demo.measure_in_turns(rounds=2, threads=1, progress=said.append)
    assert len(timings["eager"].seconds) == 2
    assert min(timings["eager"].seconds) > 0
    # the network keeps at least the results of its eleven batch norms for the backward pass
    assert timings["eager"].saved_bytes > 4 * demo.BATCH * 32 * demo.IMAGE**2
    assert said[-1] == "timing in turns: round 2 of 2"


def test_a_process_that_fails_hands_its_error_on(monkeypatch):
    monkeypatch.setattr(demo, "VARIANTS", ("eager",))
    with pytest.raises(FxpassesError, match=r"process of eager failed: RuntimeError.*thread"):
        demo.measure_in_turns(rounds=2, threads=-1, progress=lambda _: None)


def test_one_round_has_no_spread_and_is_refused():
    with pytest.raises(FxpassesError, match="at least 2 rounds"):
        demo.run_demo(rounds=1)


@pytest.mark.full
def test_the_whole_demo_is_right():
    result = demo.run_demo(rounds=2, threads=1)
    assert result.right
    assert result.report.applied == {RULE: 11}
    assert set(result.timings) == {"eager", "inductor", "fxpasses"}
    assert result.timings["fxpasses"].saved_bytes < result.timings["eager"].saved_bytes
