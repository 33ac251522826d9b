"""Rules that pay for some sizes: the size at hand decides, and the report says for which sizes it stands."""

from __future__ import annotations

import pytest
import torch
from rules import SineToCosine

import fxpasses
from fxpasses.graph.decline import Decline
from fxpasses.graph.metadata import tensor
from fxpasses.report.data import SizeBound
from fxpasses.report.report import Report
from fxpasses.rewrite.declarative_rule import DeclarativeRule

EAGER = {"inner": "eager"}


class ForSizes(SineToCosine):
    """sin(x) becomes cos(x), which anybody can see, for some sizes of one dimension."""

    def __init__(self, name="for_sizes", dim=0, **bounds):
        super().__init__(name)
        self.dim, self.bounds = dim, bounds

    def pays_for(self, match):
        return fxpasses.SizeRange("batch", tensor(match.result).shape[self.dim], **self.bounds)


def report_on(batch, *rules, function=torch.sin, **options):
    return fxpasses.explain(lambda x: function(x), torch.zeros(batch, 3), options={"rules": rules, **options})


def test_a_size_outside_the_range_is_declined_with_the_range():
    (remark,) = report_on(3, ForSizes(least=4)).remarks
    assert (remark.status, remark.code, remark.stage) == ("declined", "sizes", "profit")
    assert remark.message == "it pays for batch >= 4, and that is 3 here"
    assert remark.sizes == (SizeBound("batch", least=4, seen=3),)


@pytest.mark.parametrize(
    ("bounds", "batch", "applied"),
    [
        ({"least": 4}, 4, 1),
        ({"least": 4}, 3, 0),
        ({"most": 8}, 8, 1),
        ({"most": 8}, 9, 0),
        ({"least": 4, "most": 8}, 6, 1),
        ({"least": 4, "most": 8}, 9, 0),
        ({}, 1, 1),
    ],
)
def test_both_ends_belong_to_the_range(bounds, batch, applied):
    assert report_on(batch, ForSizes(**bounds)).applied.get("for_sizes", 0) == applied


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"least": 4}, "batch >= 4"),
        ({"most": 8}, "batch <= 8"),
        ({"least": 4, "most": 8}, "4 <= batch <= 8"),
        ({}, "any batch"),
    ],
)
def test_a_range_in_words(bounds, words):
    assert str(fxpasses.SizeRange("batch", 5, **bounds)) == words
    assert str(SizeBound("batch", **bounds)) == words
    assert str(SizeBound("batch", symbol="s0", **bounds)) == words.replace("batch", "batch (s0)")


def test_profit_always_does_not_ask():
    (remark,) = report_on(3, ForSizes(least=4), profit="always").remarks
    assert (remark.status, remark.sizes) == ("applied", ())


def test_a_size_must_be_in_every_range():
    class Two(ForSizes):
        def pays_for(self, match):
            rows, columns = tensor(match.result).shape
            return (fxpasses.SizeRange("rows", rows, least=2), fxpasses.SizeRange("columns", columns, most=2))

    (remark,) = report_on(5, Two()).remarks
    assert remark.message == "it pays for columns <= 2, and that is 3 here"
    assert [str(each) for each in remark.sizes] == ["columns <= 2"]


def test_a_rule_may_decline_with_a_range_of_its_own():
    class Own(ForSizes):
        def pays_for(self, match):
            return ()

        def profitability(self, match):
            sizes = (fxpasses.SizeRange("batch", tensor(match.result).shape[0], least=100),)
            return Decline("too-small", "a batch of {} is too small", match.result, (3,), sizes=sizes)

    (remark,) = report_on(3, Own()).remarks
    assert (remark.code, remark.sizes) == ("too-small", (SizeBound("batch", least=100, seen=3),))


def test_a_rule_made_of_functions_has_ranges_too():
    def made(least):
        return DeclarativeRule(
            "negation",
            lambda x: x.neg().neg(),
            lambda x: x,
            (torch.randn(2, 3),),
            pays_for=lambda match: fxpasses.SizeRange("batch", match.tensor("x").shape[0], least),
        )

    def function(x):
        return x.exp().neg().neg()

    assert report_on(3, made(3), function=function).applied == {"negation": 1}
    report = report_on(3, made(4), function=function)
    assert report.applied == {}
    assert "sizes" in {remark.code for remark in report.remarks}
    assert made(3).uuid() != made(4).uuid()


# Symbols ---------------------------------------------------------------------------------------------------


def compiled(*rules, **options):
    """A function with a symbolic batch, and how many reports there were since."""
    fxpasses.reset()
    given = {"rules": rules, **EAGER, **options}
    return torch.compile(lambda x: torch.sin(x), backend="fxpasses", dynamic=True, options=given)


def test_under_dynamic_shapes_the_report_says_for_which_sizes_the_graph_was_optimised():
    call = compiled(ForSizes(least=4))
    x = torch.linspace(0, 1, 24).reshape(8, 3)
    assert torch.equal(call(x), x.cos())
    (bound,) = fxpasses.last_report().sizes
    assert (bound.name, bound.least, bound.most, bound.seen, bound.guarded) == ("batch", 4, None, 8, False)
    assert bound.symbol
    text = f"optimised for batch ({bound.symbol}) >= 4; it was 8 when traced, and others run the same program"
    assert text in str(fxpasses.last_report()).replace("\n", " ")
    assert torch.equal(call(x[:2]), x[:2].cos())
    assert len(fxpasses.reports()) == 1, "nothing was guarded"


def test_a_decline_stands_for_the_sizes_on_its_side_of_the_range():
    for batch, least, most in ((2, 0, 3), (20, 9, None), (6, 4, 8)):
        compiled(ForSizes(least=4, most=8))(torch.zeros(batch, 3))
        torch._dynamo.reset()
        (bound,) = fxpasses.last_report().sizes
        assert (bound.least, bound.most) == (least, most)


def test_ranges_of_one_symbol_are_put_together():
    class Pays(ForSizes):
        def match(self, node, context):
            return super().match(node, context) if (node.args[0].op == "placeholder") == self.outer else None

    first, second = Pays("first", least=4), Pays("second", most=16)
    first.outer, second.outer = True, False
    options = {"rules": [first, second], **EAGER}
    torch.compile(lambda x: torch.sin(torch.sin(x)), backend="fxpasses", dynamic=True, options=options)(
        torch.zeros(8, 3)
    )
    assert fxpasses.last_report().applied == {"first": 1, "second": 1}
    (bound,) = fxpasses.last_report().sizes
    assert (bound.name, bound.least, bound.most) == ("batch", 4, 16)


def test_a_guarded_range_gives_two_versions():
    call = compiled(ForSizes(least=4, guarded=True), verify="structure")
    x = torch.linspace(0, 1, 60).reshape(20, 3)
    for batch, expected, versions in (
        (8, torch.cos, 1),
        (2, torch.sin, 2),
        (16, torch.cos, 2),
        (3, torch.sin, 2),
        (4, torch.cos, 2),
    ):
        assert torch.equal(call(x[:batch]), expected(x[:batch]))
        assert len(fxpasses.reports()) == versions
    large, small = fxpasses.reports()
    assert [(each.least, each.most, each.guarded) for each in (*large.sizes, *small.sizes)] == [
        (4, None, True),
        (0, 3, True),
    ]
    assert "others are compiled anew" in str(large).replace("\n", " ")


def test_a_guard_that_nobody_asked_for_is_still_found():
    class Careless(ForSizes):
        def legality(self, match):
            assert tensor(match.result).shape[0] > 2  # guards
            return

    compiled(Careless(least=4, guarded=True), verify="structure")(torch.zeros(8, 3))
    assert [remark.code for remark in fxpasses.last_report().remarks] == ["verify-structure"]


def test_a_size_that_only_the_run_knows_is_in_no_range():
    class Nonzero(torch.nn.Module):
        def forward(self, x):
            return torch.sin(x.nonzero().double())

    class Aten(ForSizes):
        def rewrite(self, match, build):
            return build.call(torch.ops.aten.cos.default, tuple(match.result.all_input_nodes))

    program = torch.export.export(Nonzero(), (torch.tensor([1.0, 0.0, 2.0]),))
    for guarded in (False, True):
        report = fxpasses.explain(program, options={"rules": Aten(least=0, guarded=guarded)})
        (remark,) = report.remarks
        assert remark.message == "it pays for any batch, and that is not known here"
        assert report.sizes == ()


def test_sizes_are_kept_in_json_and_when_reports_are_merged():
    call = compiled(ForSizes(least=4, guarded=True))
    call(torch.zeros(8, 3))
    call(torch.zeros(2, 3))
    merged = Report.merge(fxpasses.reports())
    assert len(merged.sizes) == 2
    for report in (*fxpasses.reports(), merged):
        assert Report.from_json(report.to_json()) == report
    assert Report.from_json(merged.to_json()).remarks[0].sizes[0].least == 4
