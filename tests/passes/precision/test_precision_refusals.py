"""Where a float32 model keeps its precision, and what the report says of it."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from lowered import Lowered, is_cast, relative
from torch import nn

import fxpasses
from fxpasses.passes.precision import legality
from fxpasses.report.precision import Precision

OPTIONS = {"precision": "bfloat16", "profit": "always"}


def codes(report: fxpasses.Report) -> list[str]:
    return [remark.code for remark in report.declined if remark.rule == "precision"]


def untouched(lowered: Lowered) -> bool:
    return not lowered.in_bfloat16() and not lowered.casts() and lowered.report.precision is None


# Refusals --------------------------------------------------------------------------------------------------


def test_training_keeps_float32_and_says_why():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), torch.randn(2, 4)
    lowered = Lowered(model)
    result = lowered._compiled(x)
    assert untouched(lowered)
    assert codes(lowered.report) == ["records-gradients"]
    assert torch.equal(result, model(x))
    assert any(node.kwargs.get("inplace") for node in lowered.graph.nodes)
    result.sum().backward()
    assert model[0].weight.grad is not None


def test_frozen_parameters_and_an_input_that_requires_grad_are_training():
    model = nn.Linear(4, 4).requires_grad_(False)
    lowered = Lowered(model)
    lowered._compiled(torch.randn(2, 4, requires_grad=True))
    assert codes(lowered.report) == ["records-gradients"]
    lowered._compiled(torch.randn(2, 4))
    assert lowered.report.applied == {"precision": 1}, "no gradient can be asked for"


def test_a_float32_model_under_autocast_is_left_to_it():
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    lowered = Lowered(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert lowered(x).dtype == torch.bfloat16
    assert not lowered.casts()
    assert lowered.report.precision is None
    assert codes(lowered.report) == ["autocast"]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_region_of_autocast_is_left_as_it_is(enabled):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)

    def model(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = first(x)
        return second(y.float())

    lowered = Lowered(model)
    with torch.no_grad():
        assert relative(lowered(torch.ones(2, 4)), model(torch.ones(2, 4))) < 0.02
    assert codes(lowered.report) == ["autocast"]
    assert lowered.report.precision.operators == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_of_other_types_are_left_as_they_are(dtype):
    lowered = Lowered(nn.Linear(4, 4).to(dtype))
    assert lowered(torch.randn(2, 4, dtype=dtype)).dtype == dtype
    assert untouched(lowered)
    assert codes(lowered.report) == ["dtype"]


def test_a_model_of_bfloat16_has_nothing_to_lower():
    lowered = Lowered(nn.Linear(4, 4).bfloat16())
    lowered(torch.randn(2, 4, dtype=torch.bfloat16))
    assert not lowered.casts()
    assert codes(lowered.report) == []


def test_products_of_whole_numbers_are_left_as_they_are():
    lowered = Lowered(lambda a: a @ a)
    assert torch.equal(lowered(torch.ones(2, 2, dtype=torch.int64)), torch.full((2, 2), 2))
    assert untouched(lowered)


def test_a_quantised_graph_is_left_as_it_is():
    layer = nn.Linear(4, 4)
    lowered = Lowered(lambda x: layer(torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127)))
    lowered(torch.randn(2, 4))
    assert untouched(lowered)
    assert codes(lowered.report) == ["quantised"]


def test_a_graph_under_vmap_is_left_as_it_is():
    layer, x = nn.Linear(4, 4), torch.randn(3, 2, 4)
    lowered = Lowered(torch.vmap(layer))
    torch.testing.assert_close(lowered(x), layer(x))
    assert untouched(lowered)
    assert codes(lowered.report) == ["functorch"]


def test_a_device_that_is_slow_in_bfloat16_keeps_float32_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(legality, "multiplies_fast", lambda device: False)
    lowered = Lowered(nn.Linear(4, 4), profit="model")
    lowered(torch.randn(2, 4))
    assert untouched(lowered)
    assert codes(lowered.report) == ["slow-precision"]
    lowered = Lowered(nn.Linear(4, 4), profit="always")
    lowered(torch.randn(2, 4))
    assert lowered.report.applied == {"precision": 1}


def test_a_branch_of_cond_keeps_float32_and_gets_it():
    conv, layer = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def model(x):
        y = layer(x)
        return torch.cond(y.sum() > 0, lambda y: conv(y), lambda y: y.sin(), (y,))

    lowered = Lowered(model)
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        assert relative(lowered(x), model(x)) < 0.02
    assert codes(lowered.report) == ["nested-graph"]
    assert lowered.report.precision.operators == 1


def test_a_leaf_module_of_symbolic_trace_keeps_float32():
    model, x = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)
    with torch.no_grad():
        result = fxpasses.optimize(model, (x,), options=OPTIONS)
        assert torch.equal(result.graph_module(x), model(x))
    assert codes(result.report) == ["whole-layer"]


@pytest.mark.usefixtures("without_fast_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_an_attention_layer_that_gives_weights_under_a_mask_keeps_float32(dtype):
    layer, x = nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(2, 5, 16)
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, float("-inf"))
    mask = mask if dtype == torch.float32 else mask < 0
    for need_weights in (True, False):
        lowered = Lowered(lambda x, w=need_weights: layer(x, x, x, attn_mask=mask, need_weights=w)[0])
        found = lowered(x)
        with torch.no_grad():
            assert relative(found, layer(x, x, x, attn_mask=mask, need_weights=need_weights)[0]) < 0.05
        assert codes(lowered.report) == (["whole-layer"] if need_weights else [])


def test_an_encoder_layer_on_the_fast_path_keeps_float32():
    model, x = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), torch.randn(2, 7, 32)
    lowered = Lowered(model)
    with torch.no_grad():
        assert torch.equal(lowered(x), model(x))
    assert untouched(lowered)
    assert codes(lowered.report) == ["whole-layer"]


def test_a_product_that_writes_keeps_float32():
    def model(a, b):
        c = torch.zeros(2, 2)
        c.addmm_(a, b)
        return c

    a = torch.randn(2, 2)
    lowered = Lowered(model)
    assert torch.equal(lowered(a, a), model(a, a))
    assert codes(lowered.report) == ["mutation"]


# Memory that is shared and written to ----------------------------------------------------------------------


def test_in_place_activations_and_sums_that_nobody_else_can_see_follow():
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def model(x):
        y = F.relu(first(x), inplace=True)
        z = second(y)
        z += y
        return z.relu_().mul_(2)

    x = torch.randn(2, 4, 5, 5)
    lowered = Lowered(model, passes=("precision",))
    with torch.no_grad():
        assert relative(lowered(x), model(x)) < 0.02
    assert len(lowered.in_bfloat16()) == 6
    assert len([to for _, to in lowered.casts() if to == torch.float32]) == 1
    assert not any(node.target in (operator.iadd, "relu_", "mul_") for node in lowered.graph.nodes)


@pytest.mark.parametrize(
    "write",
    [
        lambda y: (y[:, 0].zero_(), y)[1],
        lambda y: (y.view(-1).mul_(2), y)[1],
        lambda y: (y.relu_(), y * 2)[1],
        lambda y: (y.__setitem__((0, 0), 7.0), y)[1],
        lambda y: (y.t().add_(1), y.t())[1],
    ],
    ids=["slice", "view", "read-again", "setitem", "transpose"],
)
def test_a_result_that_is_written_to_through_a_view_is_written_to(write):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)

    def model(x):
        y = first(x)
        before = second(y)
        y = write(y)
        return before, second(y), y

    x = torch.randn(4, 4)
    lowered = Lowered(model)
    with torch.no_grad():
        for found, expected in zip(lowered(x), model(x), strict=True):
            assert relative(found, expected) < 0.02
            assert found.stride() == expected.stride()


def test_writes_to_inputs_and_views_of_them_reach_the_caller():
    layer = nn.Linear(4, 4)

    def model(x):
        x[0].mul_(2)
        y = layer(x)
        x.add_(1)
        return y, layer(x), x.view(-1)

    x = torch.randn(2, 4)
    ours, eagers = x.clone(), x.clone()
    lowered = Lowered(model)
    with torch.no_grad():
        found, expected = lowered(ours), model(eagers)
    assert torch.equal(ours, eagers)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 0.02
    assert found[2].data_ptr() == ours.data_ptr()
    precision = lowered.report.precision
    assert precision.errors == ()
    assert "writes to" in precision.unmeasured


def test_results_that_are_views_of_one_another_still_are():
    layer = nn.Conv2d(3, 8, 3)

    def model(x):
        y = layer(x)
        return y, y.flatten(1), y[:, ::2], y[:, 0].expand(5, 2, 4, 4), *y.chunk(2, 1)

    x = torch.randn(2, 3, 6, 6)
    lowered = Lowered(model)
    with torch.no_grad():
        found, expected = lowered(x), model(x)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.stride() == other.stride()
        assert one.storage_offset() == other.storage_offset()
        assert one.untyped_storage().data_ptr() == found[0].untyped_storage().data_ptr()
        assert relative(one, other) < 0.02
    assert len(lowered.casts()) == 4


def test_what_reads_numbers_that_bfloat16_does_not_hold_gets_float32():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)

    def model(x):
        y = layer(x)
        return y.clamp(max=3.4e38), y.masked_fill(y > 0, -3.4e38), y + torch.tensor([1.0, 2, 3, 4])

    lowered = Lowered(model)
    with torch.no_grad():
        for found, expected in zip(lowered(x), model(x), strict=True):
            assert found.dtype == torch.float32
            assert relative(found, expected) < 0.02
    assert len(lowered.in_bfloat16()) == 1


def test_a_custom_operator_gets_float32(monkeypatch):
    @torch.library.custom_op("precision_tests::mean_of", mutates_args=())
    def mean_of(x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32
        return x * 2

    mean_of.register_fake(lambda x: torch.empty_like(x))
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    lowered = Lowered(lambda x: mean_of(layer(x)))
    assert relative(lowered(x), 2 * layer(x)) < 0.02


# The error -------------------------------------------------------------------------------------------------


def test_the_first_call_alone_is_compared_with_float32():
    layer = nn.Linear(4, 4)
    lowered = Lowered(layer)
    first, second = torch.randn(2, 4), torch.randn(2, 4)
    with torch.no_grad():
        expected = layer(first)
    found = lowered(first)
    precision = lowered.report.precision
    assert precision.errors == (pytest.approx(relative(found, expected), rel=1e-6),)
    lowered(second)
    assert lowered.report.precision is precision
    assert len(fxpasses.reports()) == 1


def test_a_program_that_draws_random_numbers_is_not_run_twice():
    layer = nn.Linear(4, 4)
    lowered = Lowered(lambda x: layer(x) + torch.rand(4))
    x = torch.randn(2, 4)
    torch.manual_seed(1)
    found, after = lowered(x), torch.get_rng_state()
    torch.manual_seed(1)
    with torch.no_grad():
        expected = layer(x) + torch.rand(4)
    assert torch.equal(after, torch.get_rng_state())
    assert relative(found, expected) < 0.02
    assert lowered.report.precision.errors == ()
    assert "random" in lowered.report.precision.unmeasured
    assert "not compared" in str(lowered.report)


def test_batch_norm_that_updates_its_statistics_is_not_run_twice():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    Lowered(model)(torch.randn(2, 3, 4, 4))
    assert int(model[1].num_batches_tracked) == 1
    assert "writes to" in fxpasses.last_report().precision.unmeasured


def test_a_dry_run_counts_and_compares_nothing():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), torch.randn(2, 4)
    with torch.no_grad():
        report = fxpasses.explain(model, x, options=OPTIONS)
    assert report.precision == Precision("bfloat16", operators=1, casts=4)
    assert "precision: bfloat16, 1 operator, 4 casts" in str(report).splitlines()


def test_a_report_with_errors_survives_json_and_merges():
    lowered = Lowered(nn.Linear(4, 4))
    lowered(torch.randn(2, 4))
    report = lowered.report
    assert fxpasses.Report.from_json(report.to_json()).precision == report.precision
    other = fxpasses.Report(precision=Precision("bfloat16", 2, 3, (0.5, float("inf"))))
    assert fxpasses.Report.from_json(other.to_json()).precision == other.precision
    merged = fxpasses.Report.merge([report, other, fxpasses.Report()]).precision
    assert merged == Precision(
        "bfloat16", 3, report.precision.casts + 3, (*report.precision.errors, 0.5, float("inf"))
    )
    assert merged.largest_error == float("inf")


def test_overflow_is_an_infinite_error():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    lowered = Lowered(layer)
    lowered(torch.full((1, 1), 3.4e38))
    assert lowered.report.precision.errors == (float("inf"),)


def test_a_race_keeps_its_verdict_beside_the_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FXPASSES_PROFILE_DIR", str(tmp_path))  # else an earlier verdict ends it
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    chosen = {**OPTIONS, "inner": "eager", "race": True}
    compiled = torch.compile(layer, backend="fxpasses", options=chosen)
    with torch.no_grad():
        for _ in range(60):
            compiled(x)
    report = fxpasses.last_report()
    assert report.precision.errors
    assert "dropped" in {remark.code for remark in report.declined}


def test_one_cast_serves_readers_before_and_after_a_region():
    layer = nn.Linear(4, 4)

    def model(x):
        with torch.inference_mode():
            y = layer(x)
        with torch.no_grad():
            return y.exp(), y.softmax(0)

    lowered = Lowered(model)
    lowered(torch.randn(2, 4))
    assert len([node for node in lowered.graph.nodes if is_cast(node)]) == 4
