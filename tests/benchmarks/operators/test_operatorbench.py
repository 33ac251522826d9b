"""The operator benchmark: every operator has a row, a wrong result is a failure, occurrences weigh."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from operator_compilers import broken, eager_graph, fails_when_repeated, wrong_by_a_factor, wrong_dtype

from benchmarks.operators import runs as operator_runs
from benchmarks.operators.accuracy import disagreement
from benchmarks.operators.call import RepeatableCall
from benchmarks.operators.inputs.log import Sample
from benchmarks.operators.inputs.materialise import Target
from benchmarks.operators.inputs.notation import parse_call
from benchmarks.operators.rows import (
    CsvError,
    CsvRows,
    appended_rows,
    make_row,
    pairs,
    row_in_words,
    row_to_json,
    total_seconds,
    weighted_quantiles,
)
from benchmarks.operators.runs import Measurement, Outcome, Plan, measure_operator
from fxpasses.devices.timing import Effort

aten = torch.ops.aten
QUICK = Effort(rounds=2, sample_seconds=1e-6, case_seconds=1e-6)


def samples(*lines: str) -> list[Sample]:
    return [
        Sample(parse_call(line), count, f"log:{count}") for count, line in zip((3, 1, 2), lines, strict=False)
    ]


def measured(operator, *lines: str, **configurations):
    plan = Plan(Target(torch.device("cpu")), configurations or {"graph": eager_graph}, QUICK)
    with torch.no_grad():
        reason, measurements = measure_operator(operator, samples(*lines), plan)
    return make_row(str(operator), reason, measurements, list(plan.configurations), 10, 1.0)


def measurement(count: int, eager: float, **times: float) -> Measurement:
    call = parse_call("((T([2], f32),), {})")
    outcomes = {name: Outcome("ok", "", (medians,) * 3, 0.25) for name, medians in times.items()}
    return Measurement(Sample(call, count, "log:1"), "", (eager,) * 3, outcomes)


def row_of(*measurements: Measurement, configurations=("a", "b")):
    return make_row("aten.relu.default", "", measurements, list(configurations), 100, 1.5)


# Rows.


def test_occurrences_weigh_the_totals_and_the_quantiles():
    row = row_of(measurement(9, 2.0, a=1.0, b=4.0), measurement(1, 60.0, a=10.0, b=12.0))
    assert row.seconds == {"eager": 9 * 2.0 + 60.0, "a": 9 * 1.0 + 10.0, "b": 9 * 4.0 + 12.0}
    over_eager = row.ratios["a/eager"]
    assert (over_eager.low, over_eager.median, over_eager.high) == (2.0, 2.0, 2.0)
    assert over_eager.total == pytest.approx(78 / 19)
    assert row.ratios["b/a"].total == pytest.approx(19 / 48)
    assert (row.occurrences, row.occurrences_logged) == (10, 100)


def test_a_quantile_is_the_least_value_whose_share_of_the_weight_reaches_it():
    assert weighted_quantiles([3.0, 1.0, 2.0], [1, 1, 2], (0.2, 0.25, 0.5, 0.75, 0.8, 1.0)) == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert weighted_quantiles([5.0], [7]) == [5.0, 5.0, 5.0]
    with pytest.raises(ValueError, match="no values"):
        weighted_quantiles([], [])


def test_totals_cover_the_operators_that_all_configurations_completed():
    complete = row_of(measurement(2, 3.0, a=1.0, b=2.0))
    skipped = make_row("aten.t.default", "a view", [], ["a", "b"], 5, 0.0)
    failed = row_of(
        Measurement(
            complete.measurements[0].sample,
            "",
            (1.0,),
            {"a": Outcome("ok", "", (1.0,), 0.1), "b": Outcome("failed", "no kernel")},
        )
    )
    assert total_seconds([complete, skipped, failed], ["a", "b"]) == {"eager": 6.0, "a": 2.0, "b": 4.0}
    assert total_seconds([skipped], ["a", "b"]) == {}
    assert failed.status == "failed"
    assert set(failed.ratios) == {"a/eager"}


def test_every_configuration_is_compared_with_eager_and_the_first():
    assert pairs(["a"]) == [("a", "eager")]
    assert pairs(["a", "b", "c"]) == [("a", "eager"), ("b", "eager"), ("c", "eager"), ("b", "a"), ("c", "a")]


def test_the_quantiles_of_each_sample_are_kept():
    data = row_to_json(row_of(measurement(9, 2.0, a=1.0, b=4.0)))
    (sample,) = data["samples"]
    assert sample["count"] == 9
    assert sample["eager"] == {"quantiles": {"0.2": 2.0, "0.5": 2.0, "0.8": 2.0}, "n": 3}
    assert sample["configurations"]["b"]["quantiles"]["0.5"] == 4.0
    json.dumps(data, allow_nan=False)


def test_an_input_that_was_not_run_leaves_the_others_their_figures():
    row = row_of(measurement(9, 2.0, a=1.0, b=4.0), Measurement(samples("((), {})")[0], "needs 9 bytes"))
    assert row.status == "ok"
    assert row.reason == "1 of 2 inputs not run: needs 9 bytes"
    assert row.occurrences == 9
    assert row.ratios["a/eager"].median == 2.0


def test_csv_rows_are_on_disk_as_soon_as_they_are_added(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        rows = CsvRows(file, ["a", "b"])
        rows.add(row_of(measurement(9, 2.0, a=1.0, b=4.0)))
        rows.add(make_row("aten.t.default", "a view", [], ["a", "b"], 5, 0.0))
        written = list(csv.DictReader(path.open(newline="")))
    assert [row["operator"] for row in written] == ["aten.relu.default", "aten.t.default"]
    assert written[0]["a/eager q50"] == "2"
    assert written[0]["b/a total"] == "0.25"
    assert written[0]["eager s"] == "18"
    assert written[0]["a compile s"] == "0.25"
    assert written[1]["status"] == "skipped"
    assert written[1]["a/eager q50"] == ""


def appended(path, names=("a", "b"), **run):
    with appended_rows(path, names, run) as rows:
        rows.add(row_of(measurement(9, 2.0, **dict.fromkeys(names, 1.0)), configurations=names))


def test_a_second_run_appends_its_rows_under_the_header_of_the_first(tmp_path):
    path = tmp_path / "rows.csv"
    appended(path, dtype="float32")
    appended(path, dtype="float16")
    assert [row["dtype"] for row in csv.DictReader(path.open(newline=""))] == ["float32", "float16"]


def test_a_row_that_was_not_written_to_its_end_does_not_take_the_next_one(tmp_path):
    path = tmp_path / "rows.csv"
    appended(path)
    path.write_bytes(path.read_bytes().rstrip(b"\r\n")[:-3])
    appended(path)
    assert [row["b/a total"] for row in csv.DictReader(path.open(newline=""))][1:] == ["1"]


@pytest.mark.parametrize("content", ["operator,status\n", "something else", "\x00\x01"])
def test_a_file_with_other_columns_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(CsvError, match="name another file by --csv"):
        appended(path)
    assert path.read_text() == content


def test_an_empty_file_gets_a_header(tmp_path):
    path = tmp_path / "rows.csv"
    path.touch()
    appended(path)
    assert [row["operator"] for row in csv.DictReader(path.open(newline=""))] == ["aten.relu.default"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CsvError, match=r"rows\.csv cannot be written"):
        appended(tmp_path / "missing" / "rows.csv")


def test_a_line_has_the_ratios_or_the_reason():
    row = row_of(measurement(9, 2.0, a=1.0, b=4.0), measurement(1, 60.0, a=10.0, b=12.0))
    assert row_in_words(row) == (
        "aten.relu.default: a/eager 2.00x (2.00 to 2.00); b/eager 0.50x (0.50 to 0.50); "
        "b/a 0.25x (0.25 to 0.25); 2 inputs, 1.5 s"
    )
    skipped = make_row("aten.t.default", "a view", [], ["a", "b"], 5, 0.0)
    assert row_in_words(skipped) == "aten.t.default: skipped: a view; 0 inputs, 0.0 s"


# Accuracy.


def compare(actual, expected, exact):
    return disagreement([actual], [expected], lambda: [exact])


def test_equal_results_agree_whatever_is_not_a_number():
    x = torch.tensor([1.0, math.nan, math.inf])
    assert compare(x, x.clone(), x.double()) == ""


def test_an_error_like_eagers_own_is_none():
    exact = torch.randn(10_000, dtype=torch.float64)
    eager, compiled = (
        (exact * (1 + 1e-4 * torch.randn(10_000, dtype=torch.float64))).float() for _ in range(2)
    )
    assert compare(compiled, eager, exact) == ""


def test_an_error_beyond_eagers_is_found_spread_out_and_in_a_single_place():
    exact = torch.randn(10_000, dtype=torch.float64)
    eager = exact.float()
    assert "relative error" in compare(eager * 1.001, eager, exact)
    single = eager.clone()
    single[17] += 1e-4
    assert "largest relative error" in compare(single, eager, exact)
    infinite = eager.clone()
    infinite[17] = math.inf
    assert "not finite" in compare(infinite, eager, exact)


def test_integers_must_be_equal():
    x = torch.arange(4)
    assert compare(x, x.clone(), x) == ""
    assert "Mismatched elements: 4 / 4" in compare(x + 1, x, x)


def test_number_shape_and_dtype_are_compared_even_of_random_results():
    x = torch.randn(4)
    assert disagreement([x], [x, x], lambda: [x]) == "1 results, eager has 2"
    assert "[2]" in disagreement([x[:2]], [x], lambda: [x], values=False)
    assert "float64" in disagreement([x.double()], [x], lambda: [x], values=False)
    assert disagreement([x + 1], [x], lambda: [x], values=False) == ""


def test_without_a_float64_kernel_the_tolerances_decide():
    def none():
        raise NotImplementedError("no float64 here")

    x = torch.randn(4)
    assert "NotImplementedError" in disagreement([x + 1], [x], none)
    assert disagreement([x + 1e-9], [x], none) == ""


# Calls.


def test_everyone_writes_to_a_copy_of_their_own():
    x, y = torch.ones(2, 3).t(), torch.ones(3, 2)
    call = RepeatableCall(aten.add_.Tensor, (x, y), {"alpha": 2})
    first, second = call.eager(), call.compiled(eager_graph, x)
    assert torch.equal(first.results()[-1], torch.full((3, 2), 3.0))
    assert torch.equal(second.results()[-1], torch.full((3, 2), 3.0))
    assert torch.equal(x, torch.ones(3, 2))
    assert first.written[0].stride() == x.stride()


def test_batch_norm_writes_to_statistics_that_its_schema_does_not_declare():
    x, mean, variance = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    call = RepeatableCall(
        aten.native_batch_norm.default, (x, None, None, mean, variance, True, 0.1, 1e-5), {}
    )
    call.eager().results()
    assert torch.equal(mean, torch.zeros(3))
    assert len(call.eager().written) == 2


def test_a_graph_returns_the_tensors_that_eager_returns():
    grad, x, weight = torch.randn(1, 4, 3, 3), torch.randn(1, 2, 5, 5), torch.randn(4, 2, 3, 3)
    rest = ([4], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False])
    call = RepeatableCall(aten.convolution_backward.default, (grad, x, weight, *rest), {})
    expected = call.eager().results()
    result = call.eager().function()
    actual = call.compiled(eager_graph, result).results()
    assert [value.shape for value in actual] == [x.shape, weight.shape]
    assert disagreement(actual, expected, call.exact) == ""
    assert call.exact()[0].dtype is torch.float64


def test_a_list_of_tensors_is_an_argument_and_a_result():
    pieces = [torch.randn(2, 3), torch.randn(1, 3)]
    call = RepeatableCall(aten.cat.default, (pieces,), {"dim": 0})
    assert torch.equal(call.compiled(eager_graph, torch.cat(pieces)).results()[0], torch.cat(pieces))
    call = RepeatableCall(aten.split.Tensor, (pieces[0], 1), {})
    result = call.eager().function()
    assert len(call.compiled(eager_graph, result).results()) == 2


# Running.


def test_a_right_configuration_has_times():
    row = measured(aten.relu.default, "((T([4, 4], f32),), {})", "((T([8], f16),), {})")
    assert (row.status, row.reason) == ("ok", "")
    assert set(row.ratios) == {"graph/eager"}
    assert len(row.measured) == 2


def test_a_wrong_result_is_a_failure_without_a_time():
    row = measured(aten.relu.default, "((T([40, 4], f32),), {})", wrong=wrong_by_a_factor, right=eager_graph)
    assert row.status == "inaccurate"
    assert row.reason.startswith("wrong: result 0: Mismatched elements")
    assert set(row.ratios) == {"right/eager"}
    assert "wrong" not in row.seconds
    assert row.measurements[0].outcomes["wrong"].times == ()


def test_a_result_of_another_dtype_is_wrong():
    row = measured(aten.relu.default, "((T([4], f32),), {})", wrong=wrong_dtype)
    assert row.status == "inaccurate"
    assert "float64" in row.reason


def test_a_configuration_that_raises_is_a_row_with_the_reason():
    row = measured(aten.relu.default, "((T([4], f32),), {})", broken=broken, right=eager_graph)
    assert row.status == "failed"
    assert row.reason == "broken: NotImplementedError: this compiler compiles nothing [log:3]"
    assert set(row.ratios) == {"right/eager"}


def test_a_configuration_that_can_run_only_once_is_a_row_with_the_reason():
    row = measured(aten.relu.default, "((T([4], f32),), {})", once=fails_when_repeated, right=eager_graph)
    assert (row.status, row.reason) == ("failed", "once: NotImplementedError: once is all there is [log:3]")
    assert set(row.ratios) == {"right/eager"}


@pytest.mark.parametrize(("seconds", "compiler"), [(9, eager_graph), (11, eager_graph), (11, broken)])
def test_a_compilation_above_ten_seconds_is_noted(monkeypatch, seconds, compiler):
    clock = iter(range(0, 100, seconds))
    monkeypatch.setattr(operator_runs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    notes: list[str] = []
    plan = Plan(Target(torch.device("cpu")), {"graph": compiler}, QUICK, note=notes.append)
    measure_operator(aten.relu.default, samples("((T([4], f32),), {})"), plan)
    expected = "aten.relu.default: graph: compiling and the first run took 11.0 s"
    assert notes == ([expected] if seconds > 10 else [])


def test_a_random_operator_is_compared_by_shape():
    row = measured(aten.bernoulli_.float, "((T([100], f32), 0.5), {})")
    assert row.status == "ok"


def test_an_operator_in_place_is_measured_on_copies():
    row = measured(aten.mul_.Tensor, "((T([4], f32), T([4], f32)), {})")
    assert row.status == "ok"


@pytest.mark.parametrize(
    ("operator", "text", "reason"),
    [
        (aten.view.default, "((T([4], f32), [2, 2]), {})", "computes nothing"),
        (aten.zeros_like.default, "((T([4], f32),), {})", "computes nothing"),
        (aten.nonzero.default, "((T([4], f32),), {})", "shape of its result"),
        (aten.index.Tensor, "((T([4], f32), [T([4], b8)]), {})", "a mask"),
        (aten.add.Tensor, "((ST([4], f32, torch.sparse_coo, True), 1), {})", "sparse"),
        (aten.relu.default, "((T([1000000, 1000000], f32),), {})", "needs 4,000,000,000,000 bytes"),
        (aten.mm.default, "((T([2, 3], f32), T([2, 3], f32)), {})", "eager: RuntimeError"),
        (aten.relu_.default, "((T([4], f32, stride=(0,)),), {})", "eager: RuntimeError"),
        (
            aten._cudnn_rnn_flatten_weight.default,
            "(([T([4], f32)], 1, 1, 2, 1, 0, 1, True, False), {})",
            "no kernel for the cpu",
        ),
    ],
)
def test_what_is_not_run_has_its_reason(operator, text, reason):
    row = measured(operator, text)
    assert row.status == "skipped"
    assert reason in row.reason
    assert row.ratios == {}


def test_an_operator_that_inductor_leaves_to_aten_says_so():
    text = "((T([2, 3, 4, 4], f32), T([2, 3, 8, 8], f32)), {})"
    row = measured(aten._adaptive_avg_pool2d_backward.default, text)
    assert row.status == "skipped"
    assert "inductor calls ATen's kernel: aten._adaptive_avg_pool2d_backward.default" in row.reason


def test_convolutions_are_measured_even_where_the_kernel_is_atens():
    text = (
        "((T([1, 4, 6, 6], f32), T([1, 2, 8, 8], f32), T([4, 2, 3, 3], f32), [0], [1, 1], [0, 0], [1, 1], "
        "False, [0, 0], 1, [True, True, False]), {})"
    )
    assert measured(aten.convolution_backward.default, text).status == "ok"
