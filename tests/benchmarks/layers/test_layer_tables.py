"""Rows, losses and totals from the parts of several runtimes, and their tables."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from benchmarks.layers.layer import Layer
from benchmarks.layers.part import Part
from benchmarks.layers.peak import Peaks, fma_flops
from benchmarks.layers.report import frequent, print_failures, print_frequent, print_model, to_json
from benchmarks.layers.table import NOT_MATCHED, OUTSIDE, SEVERAL, Measured, table_of

PEAKS = Peaks(fma_flops=2e9, matmul_flops=1e9, convolution_flops=1e9, bandwidth=1e9)
RUNTIMES = ("fxpasses", "onednn", "onnxruntime", "openvino")


def layer(name, taps, groups=1):
    spaces = ((1, 1), (taps // 2,) * 2, (1, 1))
    return Layer(name, (1, 8, 4, 4), (8, 8 // groups, taps, taps), (1, 8, 4, 4), *spaces, groups)


LAYERS = (layer("a", 3), layer("b", 1), layer("c", 3), layer("d", 3, groups=8))


def measured(whole, *turns):
    return Measured((whole,) * len(turns), tuple(tuple(turn) for turn in turns))


def each(a, b, c, d, *more):
    named = enumerate(zip("abcd", (a, b, c, d), strict=True))
    return [*(Part(name, seconds, (at,)) for at, (name, seconds) in named), *more]


TABLE = table_of(
    "net",
    LAYERS,
    {
        "fxpasses": measured(20.0, each(3, 2, 4, 1, Part("pool", 1.0, (), "pooling")), each(5, 2, 4, 1)),
        "onednn": measured(25.0, each(4, 4, 4, 4), each(4, 4, 4, 4)),
        "onnxruntime": measured(10.0, each(1, 3, 1, 1), each(1, 3, 2, 1)),
        "openvino": Measured(failure="no such CPU"),
    },
)


def row(table, kind):
    (found,) = (one for one in table.rows if one.kind == kind)
    return found


def test_layers_of_equal_sizes_are_one_row_with_the_sum_of_their_seconds_in_each_turn():
    found = row(TABLE, "3x3")
    assert found.names == (("a",), ("c",))
    assert found.seconds == {"fxpasses": (7, 9), "onednn": (8, 8), "onnxruntime": (2, 3)}
    assert found.flops == 2 * LAYERS[0].flops
    assert found.num_bytes == 2 * LAYERS[0].num_bytes


def test_what_is_lost_is_taken_turn_by_turn():
    found = row(TABLE, "3x3").lost
    assert found is not None
    assert (found.median, found.n) == (5.5, 2)


def test_rows_that_lose_most_come_first_and_those_that_do_not_lose_not_at_all():
    assert [one.kind for one in TABLE.losing_most(10)] == ["3x3"]
    assert TABLE.losing_most(0) == []


def test_the_totals_of_each_runtime_add_up_to_its_whole_call():
    for runtime, whole in TABLE.wholes.items():
        sums = [sum(found[runtime][turn] for found in TABLE.totals.values()) for turn in range(2)]
        assert sums == pytest.approx(list(whole))
    assert TABLE.totals["pooling"]["fxpasses"] == (1.0, 0.0)
    assert TABLE.totals[OUTSIDE]["onednn"] == (9.0, 9.0)


def test_layers_that_one_runtime_computes_at_once_are_one_row_in_all():
    at_once = measured(9.0, [Part("ab", 4.0, (0, 1)), Part("c", 1.0, (2,)), Part("d", 1.0, (3,))])
    table = table_of("net", LAYERS, {"fxpasses": measured(9.0, each(1, 2, 3, 1)), "openvino": at_once})
    found = row(table, SEVERAL)
    assert found.names == (("a", "b"),)
    assert found.seconds == {"fxpasses": (3,), "openvino": (4,)}
    assert found.flops == LAYERS[0].flops + LAYERS[1].flops
    assert table.totals[SEVERAL] == {"fxpasses": (3,), "openvino": (4,)}


def test_a_layer_that_a_runtime_does_not_match_has_no_seconds_there_and_is_told():
    parts = [Part("a", 1.0, (0,)), Part("b", 1.0, (1,)), Part("unknown", 5.0, None), Part("d", 1.0, (3,))]
    peer = measured(9.0, each(1, 1, 1, 1))
    table = table_of("net", LAYERS, {"fxpasses": measured(9.0, parts), "onnxruntime": peer})
    assert row(table, "3x3").seconds == {"onnxruntime": (2,)}
    assert row(table, "3x3").lost is None
    assert table.not_matched == {"fxpasses": ("unknown",), "onnxruntime": ()}
    assert table.not_found == {"fxpasses": ("c",), "onnxruntime": ()}
    text = printed(lambda console: print_model(table, RUNTIMES, PEAKS, console, 10))
    assert "fxpasses: parts that may be layers, it is not certain which (1): unknown" in text
    assert "fxpasses: layers that are not matched (1): c" in text
    assert table.totals[NOT_MATCHED] == {"fxpasses": (5,), "onnxruntime": (1,)}
    assert table.totals["3x3"] == {"fxpasses": (1,), "onnxruntime": (1,)}


def printed(*calls):
    console = Console(file=io.StringIO(), width=200)
    for call in calls:
        call(console)
    return console.file.getvalue()


def test_the_tables_show_losses_shares_of_the_peak_and_what_failed():
    text = printed(
        lambda console: print_model(TABLE, RUNTIMES, PEAKS, console, 10),
        lambda console: print_failures(TABLE, console),
    )
    (line,) = (line for line in text.splitlines() if "3x3 8→8 on 4x4, batch 1" in line)
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells[1:6] == ["2", "8000.000", "8000.000", "2500.000", "-"]
    assert cells[6].startswith("5500.000 [")
    assert "net: openvino: failed: no such CPU" in text
    assert "whole call" in text
    assert "2.00" in text


def test_the_most_frequent_layers_are_counted_over_all_models():
    assert [(sizes[0][:3], len(rows)) for sizes, rows in frequent([TABLE, TABLE], 1)] == [("3x3", 2)]
    text = printed(lambda console: print_frequent([TABLE, TABLE], RUNTIMES, PEAKS, console, 20))
    (line,) = (line for line in text.splitlines() if "3x3 8→8 on 4x4, batch 1" in line)
    assert [cell.strip() for cell in line.strip("│ ").split("│")][1:3] == ["4", "2"]


def test_json_has_every_row_in_microseconds():
    told = json.loads(json.dumps(to_json([TABLE], PEAKS)))
    assert told["peaks"]["flops"] == 2e9
    (model,) = told["models"]
    assert model["failures"] == {"openvino": "no such CPU"}
    assert model["whole"]["onednn"] == [25e6, 25e6, 25e6]
    rows = {one["kind"]: one for one in model["rows"]}
    assert rows["3x3"]["microseconds"]["onnxruntime"] == [2.5e6, 2.25e6, 2.75e6]
    assert rows["3x3"]["lost"][0] == 5.5e6
    assert rows["depthwise"]["flops"] == LAYERS[3].flops


def test_the_peaks_are_the_best_that_were_measured():
    other = Peaks(fma_flops=0.0, matmul_flops=3e9, convolution_flops=2e9, bandwidth=5e8)
    best = Peaks(fma_flops=2e9, matmul_flops=3e9, convolution_flops=2e9, bandwidth=1e9)
    assert PEAKS.best_with(other) == other.best_with(PEAKS) == best
    assert best.flops == 3e9


@pytest.mark.full
@pytest.mark.vectors
@pytest.mark.needs_kernels
def test_a_loop_of_products_tells_the_peak_of_the_cores():
    flops = fma_flops()
    assert flops is not None
    assert flops > 0


def test_without_vectors_of_ours_there_is_no_loop(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert fma_flops() is None
