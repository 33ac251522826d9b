"""When the rewrite is legal and does not pay, it is declined with figures; right next to there it is applied.

The decision is a function of who trains, who runs the graph and how many bytes move: no clock is involved.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest
import torch
from helpers import ATEN_LEVELS, CAPTURES, RULE, check, check_compiled, image, pair
from torch import nn

import fxpasses
from fxpasses.passes.folding.profit import ConvBnCost, conv_bn_profit

TRAINING = ConvBnCost(
    recording=True,
    weight_trains=True,
    gamma_trains=True,
    input_trains=True,
    result_bytes=1 << 20,
    weight_bytes=1 << 10,
    flops=1 << 24,
    fused=True,
    weights_cached=False,
)


def code(**changed: Any) -> str:
    """The decision for training behind a fusing compiler, with some of it changed."""
    node = torch.fx.Graph().placeholder("x")
    declined = conv_bn_profit(dataclasses.replace(TRAINING, **changed), node)
    return "applied" if declined is None else declined.code


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("input_trains", [True, False])
def test_training_both_keeps_one_tensor_less(fused: bool, input_trains: bool) -> None:
    assert code(fused=fused, input_trains=input_trains) == "applied"


@pytest.mark.parametrize(("fused", "expected"), [(True, "nothing-saved"), (False, "applied")])
def test_a_frozen_gamma_saves_nothing_where_the_compiler_fuses(fused: bool, expected: str) -> None:
    assert code(gamma_trains=False, fused=fused) == expected


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("input_trains", [True, False])
def test_training_the_batch_norm_alone_would_add_a_weight_gradient(fused: bool, input_trains: bool) -> None:
    assert code(weight_trains=False, fused=fused, input_trains=input_trains) == "adds-weight-gradient"


def test_training_only_what_comes_before_saves_nothing() -> None:
    assert code(weight_trains=False, gamma_trains=False) == "nothing-saved"


def test_inference_depends_on_who_runs_the_graph() -> None:
    frozen = {"recording": False}
    assert code(**frozen, fused=True) == "live-weights"
    assert code(**frozen, fused=True, weights_cached=True) == "applied"
    assert code(**frozen, fused=False) == "applied"


def test_nothing_that_trains_is_inference_even_while_autograd_records() -> None:
    nothing = {"weight_trains": False, "gamma_trains": False, "input_trains": False}
    assert code(**nothing, fused=True) == code(recording=False, fused=True) == "live-weights"


def test_inference_in_eager_mode_pays_where_the_result_outweighs_the_weight() -> None:
    large, small = 1 << 24, 1 << 8
    assert code(recording=False, fused=False, result_bytes=large, weight_bytes=small) == "applied"
    assert code(recording=False, fused=False, result_bytes=small, weight_bytes=large) == "live-weights"
    # Growing the result can only speak for the rewrite.
    decisions = [code(recording=False, fused=False, result_bytes=1 << n) for n in range(8, 30)]
    assert decisions == sorted(decisions, key=lambda each: each == "applied")


# Read off graphs


def _frozen(model: nn.Module, *names: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    return model


CASES: dict[str, tuple[tuple[str, ...], str, str]] = {
    # what is frozen: the decision where operators run one by one, and where they are fused
    "nothing": ((), "applied", "applied"),
    "bias and beta": (("0.bias", "1.bias"), "applied", "applied"),
    "gamma": (("1.weight",), "applied", "nothing-saved"),
    "convolution": (("0.weight", "0.bias"), "adds-weight-gradient", "adds-weight-gradient"),
    "weight alone": (("0.weight",), "adds-weight-gradient", "adds-weight-gradient"),
    "everything": (("0.weight", "0.bias", "1.weight", "1.bias"), "nothing-saved", "nothing-saved"),
}


@pytest.mark.parametrize("frozen", CASES)
@pytest.mark.parametrize("capture", ["compile", "pre_dispatch", "export", "symbolic_trace"])
def test_what_is_frozen_is_read_off_the_graph(capture: str, frozen: str) -> None:
    names, expected, _ = CASES[frozen]
    model = _frozen(pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), *names)
    check(capture, model, (image(),), 1 if expected == "applied" else expected)


@pytest.mark.parametrize("frozen", CASES)
def test_what_is_frozen_is_read_off_the_graph_behind_a_fusing_compiler(frozen: str) -> None:
    """A backend of the user's is taken for one that fuses; this one returns the graph as it is."""
    names, _, expected = CASES[frozen]
    model = _frozen(pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), *names)
    check_compiled(
        model, (image(),), 1 if expected == "applied" else expected, inner=lambda gm, inputs: gm.forward
    )


@pytest.mark.parametrize("capture", ["compile", "pre_dispatch", "export", "symbolic_trace"])
def test_a_frozen_model_on_an_input_that_takes_no_gradient_is_inference(capture: str) -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
    model.append(nn.Conv2d(4, 2, 1).double())  # type: ignore[operator]
    # Small: folding costs more than the pass over the result.
    check(capture, model, (image(grad=False),), "live-weights")


@pytest.mark.parametrize(("size", "expected"), [(8, "live-weights"), (96, 1)])
@pytest.mark.parametrize("capture", ["compile", *ATEN_LEVELS, "symbolic_trace"])
def test_inference_pays_where_results_are_large(capture: str, size: int, expected: int | str) -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    check(capture, model, (image(2, 3, size, size, grad=False),), expected, grads=False)


def test_an_input_made_by_a_trainable_layer_counts_as_training() -> None:
    """The pair is frozen, and gradients flow through it to the layer before."""
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
    model.insert(0, nn.Conv2d(3, 3, 1).double())  # type: ignore[operator]
    for capture in ("compile", "pre_dispatch", "export", "symbolic_trace"):
        check(capture, model, (image(grad=False),), "nothing-saved")


def test_the_cost_model_sees_the_sizes_that_dynamic_shapes_were_traced_with() -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for size, applied in ((8, {}), (96, {RULE: 1})):
        torch.compiler.reset()
        fxpasses.reset()
        compiled = torch.compile(model, backend="fxpasses", dynamic=True, options={"inner": "eager"})
        with torch.no_grad():
            compiled(image(2, 3, size, size + 1, grad=False))
            compiled(image(3, 3, size + 3, size + 2, grad=False))
        assert [dict(each.applied) for each in fxpasses.reports()] == [applied], "no guard was added"


@pytest.mark.parametrize(
    ("profit", "weights"), list(itertools.product(("model", "always"), ("live", "cached")))
)
def test_options_override_the_cost_model(profit: str, weights: str) -> None:
    model, x = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(grad=False)
    options = {"profit": profit, "weights": weights, "inner": lambda gm, inputs: gm.forward}
    with torch.no_grad():
        found = torch.compile(model, backend="fxpasses", options=options)(x)
        torch.testing.assert_close(found, model(x), rtol=1e-9, atol=1e-9)
    expected = {} if (profit, weights) == ("model", "live") else {RULE: 1}
    assert fxpasses.last_report().applied == expected


def test_a_remark_gives_the_figures() -> None:
    """Bytes of the weight, 4·3·3·3, and of the result, 2·4·6·6, eight bytes each."""
    model = _frozen(pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "0.weight")
    report = check("symbolic_trace", model, (image(),), "adds-weight-gradient")
    (remark,) = report.declined
    assert remark.stage == "profit"
    flops = 2 * (2 * 4 * 6 * 6) * (3 * 3 * 3)  # two a multiply-add
    assert re.findall(r"\d+", remark.message) == [
        str(2 * 4 * 6 * 6 * 8),
        str(4 * 3 * 3 * 3 * 8),
        str(flops),
    ]


@pytest.mark.parametrize(
    ("layer", "shape", "flops"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 8), 2 * (2 * 6 * 6 * 6) * (2 * 9)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 5, 5), 2 * (2 * 4 * 5 * 5) * (3 * 4)),
        (nn.Linear(5, 7), (3, 5), 2 * 3 * 5 * 7),
    ],
    ids=["grouped", "transposed", "linear"],
)
def test_flops_are_those_of_arithmetic(layer: nn.Module, shape: tuple[int, ...], flops: int) -> None:
    norm = nn.BatchNorm1d(7) if isinstance(layer, nn.Linear) else nn.BatchNorm2d(6)
    model = _frozen(pair(layer, norm), "0.weight", "0.bias")
    report = check("symbolic_trace", model, (image(*shape),), "adds-weight-gradient")
    assert f"{flops} FLOPs" in report.declined[0].message


def test_an_application_says_what_it_saves() -> None:
    report = check("compile", pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (image(),), 1)
    (remark,) = [each for each in report.remarks if each.rule == RULE]
    assert f": {2 * 4 * 6 * 6 * 8} bytes less to keep for the backward pass" in remark.message


def test_an_application_against_the_cost_models_advice_says_so() -> None:
    model, x = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(grad=False)
    with torch.no_grad():
        program = CAPTURES["symbolic_trace"](model, ())
        report = fxpasses.optimize(program, (x,), options={"profit": "always"}).report
    (remark,) = report.remarks
    assert remark.status == "applied"
    assert "profit='always', against the cost model (live-weights: " in remark.message


def test_grad_mode_of_the_caller_decides_for_graphs_that_are_held() -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    program = CAPTURES["symbolic_trace"](model, ())
    x = image(grad=False)
    with torch.no_grad():
        inference = fxpasses.optimize(program, (x,)).report
    training = fxpasses.optimize(program, (x,)).report
    assert [each.code for each in inference.remarks] == ["live-weights"]
    assert [each.code for each in training.remarks] == ["applied"]
