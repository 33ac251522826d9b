"""The matching benchmark compares two searches that find the same."""

from __future__ import annotations

from benchmarks.matching_speed import chain, inductors, measure, ours


def test_both_find_one_block_in_ten_and_leave_the_graph_alone():
    for run in (ours(), inductors()):
        module = chain(400)
        before = module.code
        assert run(module) == 10
        module.recompile()
        assert module.code == before


def test_a_measurement_has_a_ratio_within_its_range():
    row = measure(400, 2)
    assert row["matches"] == 10
    assert row["lowest_ratio"] <= row["ratio"] <= row["highest_ratio"]
