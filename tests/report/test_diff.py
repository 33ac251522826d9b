"""Two reports compared: what was lost and gained, where, and at which cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fxpasses.report.data import Remark
from fxpasses.report.diff import Difference
from fxpasses.report.layout_plan import LayoutPlan
from fxpasses.report.report import Report


def applied(module: str, **figures: float) -> Remark:
    return Remark(
        "r", "applied", "applied", "done", "n", location="/a/model.py:3", module=module, figures=figures
    )


def declined(module: str) -> Remark:
    return Remark("r", "declined", "multiple-users", "also read", "n", module=module, stage="check")


def plan(
    seconds: float, *, source: str = "roofline", copies: int = 0, decision: str = "applied"
) -> LayoutPlan:
    return LayoutPlan(
        {}, (), (), seconds, seconds, seconds, 0, source=source, copies=copies, decision=decision
    )


def test_a_lost_rewrite_has_its_module_its_reason_and_its_cost():
    before = Report((applied("bn1", kept_bytes=2e6), applied("bn2", kept_bytes=3e6)), norms=2)
    after = Report((applied("bn1", kept_bytes=2e6), declined("bn2")), norms=2, norms_left=1)
    found = Difference.of(before, after)
    (lost,) = found.lost
    assert (lost.rule, lost.place, lost.code, lost.figures) == (
        "r",
        "bn2",
        "multiple-users",
        {"kept_bytes": 3e6},
    )
    assert found.gained == ()
    assert found.saved_bytes == (5e6, 2e6)
    assert (found.norms, found.norms_folded) == ((2, 2), (2, 1))
    text = str(found)
    assert (
        "lost: 1 rewrite\n  r at bn2 (a/model.py:3): [multiple-users] also read" in text
        or "r at bn2: " in text
    )
    assert "that was 3.0 MB less to keep for the backward pass" in text
    assert "norms folded: 2 of 2 -> 1 of 2" in text


def test_what_one_loses_the_other_way_round_gains():
    one, other = Report((applied("bn1"),)), Report((applied("bn2"),))
    there, back = Difference.of(one, other), Difference.of(other, one)
    assert [each.place for each in there.lost] == [each.place for each in back.gained] == ["bn1"]
    assert [each.place for each in there.gained] == [each.place for each in back.lost] == ["bn2"]
    assert "there is no such site any more" in str(there)


def test_a_module_that_is_called_twice_loses_one_of_two():
    found = Difference.of(Report((applied("bn"), applied("bn"))), Report((applied("bn"),)))
    assert len(found.lost) == 1
    assert not Difference.of(Report((applied("bn"), applied("bn"))), Report((applied("bn"),) * 2)).lost


def test_sites_of_another_graph_or_rule_are_other_sites():
    here = applied("bn")
    for other in (replace(here, graph="body"), replace(here, rule="s")):
        found = Difference.of(Report((here,)), Report((other,)))
        assert (len(found.lost), len(found.gained)) == (1, 1)


def test_the_same_report_twice_differs_in_nothing():
    report = Report((applied("bn", kept_bytes=1.0), declined("bn2")), norms=2, norms_left=1, layout=plan(1.0))
    found = Difference.of(report, report)
    assert (found.lost, found.gained, found.slower, found.unlike) == ((), (), False, ())
    assert "->" not in str(found)


@pytest.mark.parametrize(("after", "slower"), [(1.2, True), (1.005, False), (0.5, False)])
def test_slower_is_by_more_than_a_hundredth(after, slower):
    assert Difference.of(Report(layout=plan(1.0)), Report(layout=plan(after))).slower is slower


@pytest.mark.parametrize(
    "other", [None, plan(9.0, source="profile of another CPU")], ids=["no plan", "another source"]
)
def test_times_of_two_sources_or_without_a_plan_are_not_compared(other):
    found = Difference.of(Report(layout=plan(1.0)), Report(layout=other))
    assert found.seconds is None
    assert not found.slower
    assert "predicted by the layout plan: cannot be compared" in str(found)


def test_copies_of_a_plan_that_is_not_carried_out_are_not_counted():
    one, other = Report(layout=plan(1.0, copies=3)), Report(layout=plan(1.0, copies=5, decision="no-profile"))
    assert Difference.of(one, other).copies == (3, 0)


def test_a_dry_run_against_a_compilation_is_said_to_be_that():
    assert "one is a dry run" in str(Difference.of(Report(dry_run=True), Report()))
