"""Asking about a place: which sites answer, what is said of each rule, and what is said of no place."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses import cli
from fxpasses.report.codes import CODES
from fxpasses.report.data import Remark
from fxpasses.report.report import Report

RULE = "efficient_conv_bn_eval"


class Network(nn.Module):
    """A pair, and one whose convolution is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        y = self.conv2(x)
        return self.bn2(y) + y


def network() -> nn.Module:
    return Network().eval()


@pytest.fixture(scope="module")
def report() -> Report:
    return fxpasses.explain(network(), torch.randn(1, 3, 8, 8))


def test_a_module_has_the_verdict_of_each_rule_that_looked_at_it(report):
    answer = report.why("bn2")
    found = {verdict.rule: verdict.remark for verdict in answer.verdicts}
    assert found[RULE].code == "multiple-users"
    assert not answer.nearby
    assert found["bn_before_conv"] is None
    assert "no site here: " in str(answer)


def test_a_refusal_says_how_far_it_got_what_it_means_what_to_do_and_shows_a_case(report):
    text = str(report.why("bn2"))
    assert "declined [multiple-users], 2 of 2 operators found, and what others read would be " in text
    assert CODES["multiple-users"].meaning in text
    assert CODES["multiple-users"].advice in text
    assert "    -     return bn(y) + y\n    +     return bn(y) + conv(x)" in text


def edit_at(forward, place: str) -> str:
    """What is to be edited in a network of another forward, as `why` says."""

    class Other(Network):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(self, x)

    found = fxpasses.explain(Other().eval(), torch.randn(1, 3, 8, 8))
    (edit,) = [verdict.edit for verdict in found.why(place).verdicts if verdict.rule == RULE]
    return edit


def test_the_other_reader_is_named_with_its_line_and_what_to_do_about_it(report):
    _, first = inspect.getsourcelines(Network.forward)
    line, text = f"(report/test_why.py:{first + 3})", str(report.why("bn2"))
    conv2 = f"conv2 (report/test_why.py:{first + 2})"
    assert f"→ here: `add` {line} also reads the result of {conv2}: have it read that of bn2 {line}" in text


def test_a_module_that_also_reads_is_named_by_its_path():
    def forward(self, x):
        y = self.conv1(x)
        return self.bn1(y), self.conv2(y)

    edit = edit_at(forward, "bn1")
    assert edit.startswith("conv2 (report/test_why.py:")
    assert "also reads the result of conv1 (" in edit


def test_a_result_that_is_also_returned_is_named_and_the_edit_makes_the_rule_fire():
    def forward(self, x):
        y = self.conv1(x)
        return self.bn1(y), y

    def after(self, x):
        return self.bn1(self.conv1(x)), self.conv1(x)

    edit = edit_at(forward, "bn1")
    assert edit.startswith("the model also returns the result of conv1 (report/test_why.py:")
    assert "a second call of conv1" in edit
    assert edit_at(after, "bn1") == ""  # it is applied


def test_what_a_norm_reads_is_named():
    edit = edit_at(lambda self, x: self.bn2(self.bn1(self.conv1(x)).relu()), "bn2")
    assert "bn2 (report/test_why.py:" in edit
    assert "reads `relu` (report/test_why.py:" in edit


def test_a_write_in_between_is_named():
    def forward(self, x):
        x, scale = x.clone(), self.bn1.weight.clone()
        y = self.conv1(x)
        x.mul_(3), scale.mul_(5)
        return nn.functional.batch_norm(y, self.bn1.running_mean, self.bn1.running_var, scale), x

    assert edit_at(forward, "batch_norm").startswith("`mul` (report/test_why.py:")


def test_a_report_without_the_graph_names_nothing():
    remark = Remark(RULE, "declined", "multiple-users", "m", "bn", module="bn", blamed="add")
    (verdict,) = Report((remark,)).why("bn").verdicts
    assert verdict.edit == ""
    assert "here:" not in str(verdict)


def test_an_application_is_a_verdict_too(report):
    (verdict, *_) = report.why("bn1").verdicts
    assert verdict.remark.status == "applied"
    assert "replaced" in str(verdict)


def test_a_node_and_a_source_line_are_places(report):
    remark = next(each for each in report.remarks if each.module == "bn2")
    _, first = inspect.getsourcelines(Network.forward)
    for wanted in (remark.node, f"report/test_why.py:{first + 3}", f"test_why.py:{first + 3}"):
        assert remark in [verdict.remark for verdict in report.why(wanted).verdicts], wanted


def test_a_line_is_no_line_that_begins_alike(report):
    _, first = inspect.getsourcelines(Network.forward)
    with pytest.raises(fxpasses.FxpassesError, match="no module, node or source line"):
        report.why(f"y.py:{first + 3}")


def test_a_convolution_is_asked_about_through_the_norm_that_reads_it(report):
    answer = report.why("conv1")
    assert [verdict.remark.module for verdict in answer.verdicts if verdict.rule == RULE] == ["bn1"]


def test_a_place_that_no_rule_looks_at_answers_for_its_neighbours_and_says_so():
    found = fxpasses.explain(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.ones(1, 3, 8, 8)
    )
    answer = found.why("0")
    assert answer.nearby
    assert [verdict.remark.module for verdict in answer.verdicts if verdict.remark] == ["1"]
    assert "no rule looks at it" in str(answer)


def test_a_rule_that_looks_next_to_a_place_answers_besides_one_that_looks_at_it():
    """A norm is read by a layer, which reads it; both rules have something to say of that layer."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        answer = fxpasses.explain(model, torch.ones(1, 3, 8, 8)).why("2")
    found = {(verdict.rule, verdict.remark.module) for verdict in answer.verdicts if verdict.remark}
    assert found == {("bn_before_conv", "2"), (RULE, "1"), (RULE, "3")}
    assert not answer.nearby


def test_options_that_were_tried_are_part_of_the_answer():
    with torch.no_grad():
        text = str(fxpasses.explain(network(), torch.randn(1, 3, 8, 8)).why("bn1"))
    assert '→ weights="cached" was tried: 1 site more' in text


def test_a_place_that_does_not_exist_names_the_closest(report):
    with pytest.raises(fxpasses.FxpassesError, match=r"'bn3'\. The closest: .*bn[12]") as caught:
        report.why("bn3")
    assert "not recorded" not in str(caught.value)


def test_a_graph_that_is_not_recorded_is_said_to_be_none():
    with pytest.raises(fxpasses.FxpassesError, match="more than 5000 nodes is not recorded"):
        Report((Remark(RULE, "declined", "c", "m", "n"),)).why("elsewhere")


def test_a_report_from_a_file_answers_as_well(report):
    assert str(Report.from_json(report.to_json()).why("bn2")) == str(report.why("bn2"))


def test_a_module_is_not_one_whose_name_begins_alike():
    remarks = [Remark("r", "declined", "c", "m", f"n{path}", module=path) for path in ("layer1.0", "layer10")]
    assert [each.remark.module for each in Report(tuple(remarks)).why("layer1").verdicts] == ["layer1.0"]


def test_the_command_prints_the_answer(capsys):
    arguments = ["explain", "tests.report.test_why:network", "--input", "1,3,8,8", "--train"]
    assert cli.main([*arguments, "--why", "bn2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("why bn2\n")
    assert "[multiple-users]" in out
    assert cli.main([*arguments, "--why", "nowhere_at_all"]) == 2
    assert "no module, node or source line 'nowhere_at_all'" in capsys.readouterr().err
