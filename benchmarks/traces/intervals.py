"""Sets of points in time as sorted, disjoint, half-open intervals [start, end) of integer nanoseconds.

With integers the algebra is exact: |A ∪ B| = |A| + |B| - |A ∩ B| holds to the nanosecond.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[int, int]
Intervals = tuple[Interval, ...]


def union(intervals: Iterable[Interval]) -> Intervals:
    """The points that lie in any of the intervals, given in any order; empty ones vanish."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def intersection(first: Intervals, second: Intervals) -> Intervals:
    """The points that lie in both of two unions."""
    common: list[Interval] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            common.append((start, end))
        if first[i][1] <= second[j][1]:
            i += 1
        else:
            j += 1
    return tuple(common)


def length(intervals: Intervals) -> int:
    """The measure of a union, in nanoseconds."""
    return sum(end - start for start, end in intervals)


def innermost(intervals: Sequence[Interval]) -> list[bool]:
    """For calls of one thread, whether a call has no other one inside; equal intervals nest in their order.

    Args:
        intervals: calls of one thread, which either nest or follow each other, in any order.
    """
    result = [True] * len(intervals)
    open_calls: list[int] = []
    # At the same start the longer call is the outer one.
    for index in sorted(range(len(intervals)), key=lambda i: (intervals[i][0], -intervals[i][1], i)):
        while open_calls and intervals[open_calls[-1]][1] <= intervals[index][0]:
            open_calls.pop()
        if open_calls:
            result[open_calls[-1]] = False
        open_calls.append(index)
    return result
