"""Intervals are sets of moments: union, intersection, length; and which of nested ones are the innermost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.traces.intervals import Interval, innermost, intersection, length, union

moments = st.integers(0, 60)
intervals = st.lists(st.tuples(moments, moments), max_size=8)


def points(pieces: Sequence[Interval]) -> set[int]:
    return {point for start, end in pieces for point in range(start, end)}


@given(intervals, intervals)
def test_the_algebra_of_intervals_is_that_of_sets(first: list[Interval], second: list[Interval]) -> None:
    a, b = union(first), union(second)
    assert points(a) == points(first)
    assert length(a) == len(points(first))
    assert list(a) == sorted(a)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(a))
    assert points(intersection(a, b)) == points(first) & points(second)
    assert length(union([*a, *b])) == length(a) + length(b) - length(intersection(a, b))


def test_the_innermost_calls_are_those_without_another_inside() -> None:
    calls = [(0, 100), (10, 50), (20, 30), (60, 90), (100, 110), (100, 110)]
    assert innermost(calls) == [False, False, True, True, False, True]
