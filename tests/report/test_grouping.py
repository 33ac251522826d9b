"""Sites that share a reason are told as one: patterns, sums, advice, and which options would change it."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxpasses
from fxpasses.report.codes import CODES
from fxpasses.report.data import Attempt, Remark
from fxpasses.report.grouping import added, applications, patterns, reasons
from fxpasses.report.page import render_html
from fxpasses.report.report import Report
from tests.helpers import graph_of
from tests.report.test_text import remark_of, report_of

RULE = "efficient_conv_bn_eval"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["bn1"], {"bn1": 1}),
        (["bn1", "bn2", "bn3"], {"bn[1-3]": 3}),
        (["bn1", "bn3", "bn4"], {"bn[1,3-4]": 3}),
        (["bn1", "bn1"], {"bn1": 2}),
        (["blocks.0.0.bn1", "blocks.1.2.bn3", "blocks.0.1.bn2"], {"blocks.*.*.bn[1-3]": 3}),
        (["layer1.0.bn1", "layer1.1.bn1", "bn1"], {"layer1.*.bn1": 2, "bn1": 1}),
        (["batch_norm", "batch_norm_1", "batch_norm_2"], {"batch_norm": 1, "batch_norm_[1-2]": 2}),
        (["body_0: bn1", "body_0: bn2"], {"body_0: bn[1-2]": 2}),
        ([""], {"": 1}),
        ([], {}),
    ],
)
def test_names_fold_to_patterns(names, expected):
    assert patterns(names) == expected


@given(st.lists(st.text(alphabet="ab01.#[]*", max_size=12)))
def test_every_name_is_counted_in_one_pattern_whatever_it_is(names):
    assert sum(patterns(names).values()) == len(names)


def test_figures_are_added_by_name():
    assert added([{"kept_bytes": 3}, {"kept_bytes": 4, "weight_bytes": 1}, {}]) == {
        "kept_bytes": 7,
        "weight_bytes": 1,
    }


def declined(number: int, code: str, **figures: float) -> Remark:
    return replace(remark_of(number, "declined", code, "profit"), figures=figures)


def test_a_reason_has_all_sites_the_sum_of_their_figures_and_advice():
    remarks = [declined(number, "live-weights", weight_bytes=1_000_000) for number in range(3)]
    (reason,) = reasons(report_of(*remarks))
    assert (reason.count, reason.places, reason.figures) == (3, "layer.*", {"weight_bytes": 3_000_000})
    assert reason.advice == CODES["live-weights"].advice
    text = str(report_of(*remarks))
    assert "3 x some_rule declined [live-weights]: layer.*" in text
    assert "together it would mean 3.0 MB of weights moved at every call" in text
    assert f"→ {reason.advice}" in text
    assert text.count("message") == 1


def test_one_site_is_no_example_of_others():
    text = str(report_of(declined(1, "live-weights", weight_bytes=1_000_000)))
    assert "such as" not in text
    assert "together" not in text


def test_a_code_of_a_rule_s_own_has_no_advice():
    assert "→" not in str(report_of(declined(1, "a-code-of-my-own")))


def test_the_page_has_patterns_sums_and_advice():
    page = render_html(report_of(*(declined(n, "multiple-users", kept_bytes=1e6) for n in range(4))))
    assert "layer.*" in page
    assert "4.0 MB less to keep for the backward pass" in page
    assert CODES["multiple-users"].advice in page


def test_where_a_rule_was_applied_is_folded_too():
    remarks = [replace(remark_of(number), figures={"kept_bytes": 500_000.0}) for number in range(4)]
    reason = applications(report_of(*remarks))["some_rule"]
    assert (reason.places, reason.together) == ("layer.*", "2.0 MB less to keep for the backward pass")
    assert "2.0 MB less to keep" in str(report_of(*remarks))


def test_reasons_beyond_the_first_few_are_named_with_their_counts():
    remarks = [declined(number, f"code-{number}") for number in range(12)]
    text = " ".join(str(report_of(*remarks)).split())
    assert all(f"[code-{number}]" in text for number in range(12))
    assert len(str(report_of(*remarks)).splitlines()) <= 20


# What would change it --------------------------------------------------------------------------------------


def test_a_report_of_nothing_names_options_without_having_tried_them():
    lines = str(report_of(declined(1, "live-weights"))).splitlines()
    assert lines[1].startswith("nothing applied")
    assert 'not tried here (fxpasses explain tries it): weights="cached" or profit="always"' in lines[2]


@pytest.mark.parametrize(
    "report",
    [report_of(declined(1, "mutation")), report_of(remark_of(1), declined(2, "live-weights"))],
    ids=["no option helps", "something was applied"],
)
def test_no_option_is_named_where_none_helps_or_something_was_applied(report):
    assert "not tried" not in str(report)


def test_what_was_tried_is_said_with_what_it_would_bring():
    tried = Attempt({"profit": "always"}, {"some_rule": 2}, {"weight_bytes": 2e6})
    report = replace(report_of(declined(1, "live-weights")), dry_run=True, tried=(tried,))
    line = str(report).splitlines()[2]
    assert line.startswith('tried: profit="always" applies at 2 sites more (some_rule 2), against the cost')
    assert Report.from_json(report.to_json()) == report


def test_attempts_of_several_graphs_are_added_up():
    tried = [Attempt({"weights": "cached"}, {"r": n}, {"kept_bytes": float(n)}) for n in (1, 2)]
    merged = Report.merge([Report(tried=(each,)) for each in (*tried, Attempt({"limit": None}, {"r": 5}))])
    assert [(each.options, each.gained) for each in merged.tried] == [
        ({"weights": "cached"}, {"r": 3}),
        ({"limit": None}, {"r": 5}),
    ]
    assert merged.tried[0].figures == {"kept_bytes": 3.0}


def pairs() -> nn.Module:
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))]
    return nn.Sequential(*layers).eval()


@torch.no_grad()
def test_explain_tries_the_options_of_the_table_and_they_do_what_it_says():
    model, x = pairs(), torch.randn(1, 4, 16, 16)
    report = fxpasses.explain(model, x)
    assert not report.applied
    assert [each.options for each in report.tried] == [{"weights": "cached"}, {"profit": "always"}]
    for attempt in report.tried:
        assert attempt.gained == {RULE: 3}
        torch.compiler.reset()
        fxpasses.reset()
        followed = {**attempt.options, "inner": "aot_eager"}
        torch.testing.assert_close(torch.compile(model, backend="fxpasses", options=followed)(x), model(x))
        assert fxpasses.last_report().applied == {RULE: 3}


def test_explain_tries_nothing_where_nothing_was_declined_for_an_option():
    assert fxpasses.explain(pairs(), torch.randn(1, 4, 16, 16)).tried == ()
    assert fxpasses.explain(pairs().train(), torch.randn(1, 4, 16, 16)).tried == ()


def test_explain_of_a_graph_tries_only_what_a_graph_can_do():
    with torch.no_grad():
        program = torch.export.export(pairs(), (torch.randn(1, 4, 16, 16),))
        report = fxpasses.explain(program, options={"limit": 1, "profit": "always"})
    assert report.applied == {RULE: 1}
    assert [(each.options, each.gained) for each in report.tried] == [({"limit": None}, {RULE: 2})]


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            self.texts.append(record.getMessage())


def test_the_log_has_the_grouped_report():
    logger, kept = logging.getLogger("fxpasses"), Kept()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(kept)
    torch.compile(pairs(), backend="fxpasses", options={"inner": "eager"})(torch.randn(1, 4, 16, 16))
    logger.removeHandler(kept)
    logger.setLevel(before)
    (text,) = kept.texts
    assert text == str(fxpasses.last_report())
    assert "3 of 3 norms folded" in text


# Coverage --------------------------------------------------------------------------------------------------


def test_coverage_counts_norms_of_the_graph_and_not_sites():
    norm = nn.BatchNorm2d(4)  # after no convolution, so that it stays
    report = fxpasses.explain(nn.Sequential(norm, nn.ReLU(), pairs()).eval(), torch.randn(1, 4, 16, 16))
    assert (report.norms, report.norms_left) == (4, 1)
    assert "3 of 4 norms folded" in str(report)


@pytest.mark.parametrize("capture", ["symbolic_trace", "export", "aten", "pre_dispatch"])
def test_norms_are_counted_at_every_capture_level(capture):
    report = fxpasses.explain(graph_of(capture, pairs(), (x := torch.randn(1, 4, 16, 16),)), x)
    assert (report.norms, report.norms_left) == (3, 0)


def test_coverage_says_so_where_there_are_no_norms():
    assert "no batch norms" in str(fxpasses.explain(nn.Conv2d(4, 4, 3), torch.randn(1, 4, 16, 16)))


def test_flops_are_those_of_the_convolutions_that_the_plan_knows():
    plan = fxpasses.explain(nn.Conv2d(4, 8, 3, groups=2), torch.randn(2, 4, 10, 10)).layout
    (convolution,) = plan.convolutions
    assert convolution.flops == 2 * (2 * 8 * 8 * 8) * (2 * 3 * 3)
    assert replace(plan, convolutions=(replace(convolution, measured=True),)).measured_share == 1.0
    assert replace(plan, convolutions=(replace(convolution, flops=0.0),)).measured_share is None


def test_kept_bytes_of_a_remark_are_the_bytes_of_the_convolution_s_result():
    (remark,) = fxpasses.explain(
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).eval(), torch.randn(2, 4, 10, 10)
    ).remarks[:1]
    assert remark.figures["kept_bytes"] == 4 * 2 * 8 * 8 * 8


class WithOwnLookUp(nn.Module):
    """Dynamo reaches the children of such a module through its `__dict__`."""

    def __init__(self) -> None:
        super().__init__()
        self.down = pairs()

    def __getattr__(self, name: str) -> object:
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(x)


def test_a_module_with_a_look_up_of_its_own_has_its_usual_path():
    report = fxpasses.explain(nn.Sequential(WithOwnLookUp().eval()), torch.randn(1, 4, 16, 16))
    modules = {remark.module for remark in report.remarks if remark.rule == RULE}
    assert modules == {"0.down.1", "0.down.3", "0.down.5"}
