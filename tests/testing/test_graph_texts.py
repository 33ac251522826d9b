"""Counts of operators before and after the passes, and the text of graphs."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import RULE, image, pair
from torch import nn

import fxpasses
from fxpasses.errors import FxpassesError
from fxpasses.testing import LEVELS, assert_graph, assert_op_counts, graph_text, rewrite_at
from fxpasses.testing.captures import capture

ALWAYS = {"profit": "always"}


def network():
    return pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


# Counts ----------------------------------------------------------------------------------------------------

NORMS = dict.fromkeys(LEVELS, "batch_norm") | {"aten": "_native_batch_norm_legit_no_training"}


@pytest.mark.parametrize("level", LEVELS)
def test_operators_are_counted_before_and_after_at_every_level(level):
    norm, convolution = NORMS[level], "convolution" if level == "aten" else "conv2d"
    before, after = {norm: 1, convolution: 1, "mul": 0}, {norm: 0, convolution: 1, "mul": 3}
    given = {"level": level, "options": ALWAYS}
    assert_op_counts(network(), (image(),), before=before, after=after, **given)
    assert_op_counts(
        network(), (image(),), before=before, after=before, level=level, options={"disable": RULE}
    )
    with pytest.raises(AssertionError, match=f"{norm}: expected 1 calls after the passes, found 0"):
        assert_op_counts(network(), (image(),), after={norm: 1}, **given)
    with pytest.raises(AssertionError, match=f"{norm}: expected 2 calls before the passes, found 1"):
        assert_op_counts(network(), (image(),), before={norm: 2}, **given)


def test_the_message_has_all_counts_and_the_remarks():
    with pytest.raises(AssertionError) as caught:
        assert_op_counts(network(), (image(),), after={"batch_norm": 1}, options=ALWAYS)
    message = str(caught.value)
    assert "before: batch_norm 1, conv2d 1\nafter: add 2, conv2d 1, mul 3" in message
    assert f"{RULE} at" in message


def test_every_spelling_of_an_operator_counts_and_a_name_that_does_not_exist_is_an_error():
    class Spellings(nn.Module):
        def forward(self, x):
            return (x + 1).add(2).add_(3) + torch.add(x, 4)

    x = torch.randn(3)
    assert_op_counts(Spellings(), (x,), before={"add": 5}, after={"add": 5, "clone": 0})
    with pytest.raises(FxpassesError, match=r"unknown operator 'addd'.*Did you mean 'add'"):
        assert_op_counts(Spellings(), (x,), after={"addd": 0})


def test_nested_graphs_and_every_graph_of_a_model_are_counted():
    class Checkpointed(nn.Module):
        def forward(self, x):
            y = torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False)
            torch._dynamo.graph_break()
            return torch.sin(y)

    x = torch.randn(3, requires_grad=True)
    assert_op_counts(Checkpointed(), (x,), before={"sin": 2}, after={"sin": 2})


# Text ------------------------------------------------------------------------------------------------------


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, bias=False)

    def forward(self, x):
        y = torch.relu(self.conv(x)) + 1
        y = y.mean((2, 3))[:, 1:3]
        return y, {"wide": torch.cat([y, y], dim=1).to(torch.float64)}


GOLDEN = {
    "symbolic_trace": """
        %0 = input
        %1 = conv2d(%0, padding=[0, 0], stride=[2, 2], weight=conv.weight)
        %2 = relu(%1)
        %3 = add(%2, other=1)
        %4 = mean(%3, dim=[2, 3])
        %5 = getitem(%4, [slice(None, None, None), slice(1, 3, None)])
        %6 = cat(dim=1, tensors=[%5, %5])
        %7 = to(%6, dtype=f64)
        return [%5, {wide: %7}]
    """,
    "export": """
        %0 = input : f32[4, 3, 3, 3]
        %1 = input : f32[2, 3, 8, 8]
        %2 = conv2d(%1, padding=[0, 0], stride=[2, 2], weight=%0) : f32[2, 4, 3, 3]
        %3 = relu(%2) : f32[2, 4, 3, 3]
        %4 = add(%3, other=1) : f32[2, 4, 3, 3]
        %5 = mean(%4, dim=[2, 3]) : f32[2, 4]
        %6 = slice(%5, dim=1, end=3, start=1) : f32[2, 2]
        %7 = cat(dim=1, tensors=[%6, %6]) : f32[2, 4]
        %8 = _assert_tensor_metadata(a=%7, device=cpu, dtype=f32, layout=strided)
        %9 = to(%7, dtype=f64) : f64[2, 4]
        return [%6, %9]
    """,
}


def graph_at(level, model, *inputs, dynamic=None):
    found = capture(level, model, inputs, dynamic=dynamic)
    return found if isinstance(found, torch.fx.GraphModule) else found.graph_module


@pytest.mark.parametrize("level", GOLDEN)
def test_the_text_of_a_graph_is_the_same_in_every_version_of_torch(level):
    """These texts are compared by the tests of every supported version."""
    assert_graph(graph_at(level, Tower(), torch.randn(2, 3, 8, 8)), GOLDEN[level])


def test_a_rewritten_graph_is_told_with_strides_and_numbered_symbols():
    class Shifted(nn.Module):
        def forward(self, x, y):
            return x.t() + y.t(), x.shape[0] + y.shape[1]

    class AddTransposed(fxpasses.Rule):
        name = "add_transposed"

        @property
        def is_anchor(self):
            return lambda node: node.target is torch.ops.aten.add.Tensor

        def match(self, node, context):
            return fxpasses.Match(context, (*node.all_input_nodes, node))

        def insertion_point(self, match):
            return match.result

        def rewrite(self, match, build):
            first, second = (node.args[0] for node in match.nodes[:2])
            return build.call(torch.ops.aten.t.default, (build.add(first, second),))

    x, y = torch.randn(3, 5), torch.randn(3, 5)
    found = rewrite_at("export", Shifted(), (x, y), {"rules": AddTransposed()}, dynamic=True)
    text = graph_text(found.graph_module, strides=True)
    assert "%0 = input : f32[s0, s1 | s1, 1]" in text
    assert re.search(
        r"add\(%\d, other=%\d\) : f32\[s0, s1 \| s1, 1\]\n%\d+ = t\(%\d+\) : f32\[s1, s0 \| 1, s1\]", text
    )
    assert re.search(r": s0 \+ s1$|= add\(%\d, %\d\) : s0 \+ s1", text, re.MULTILINE)


def test_one_and_true_are_two_constants_and_a_symbol_adds_no_guard():
    def function(x):
        return torch.ops.aten.sum.dim_IntList(x, [0], True), torch.ops.aten.sum.dim_IntList(x, [0])

    traced = torch.fx.symbolic_trace(function)
    assert graph_text(traced).splitlines()[1:3] == [
        "%1 = sum(%0, dim=[0], keepdim=True)",
        "%2 = sum(%0, dim=[0])",
    ]

    class Viewed(nn.Module):
        def forward(self, x):
            return x.view(x.shape[1], x.shape[0])

    program = torch.export.export(
        Viewed(), (torch.randn(4, 6),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    symbol = next(iter(program.range_constraints))
    constraints = str(program.range_constraints[symbol])
    assert "view(%0, size=[6, %1]) : f32[6, s0]" in graph_text(program.graph_module)
    assert str(program.range_constraints[symbol]) == constraints


def test_a_module_that_is_more_than_one_operator_is_named():
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    assert graph_text(torch.fx.symbolic_trace(model)).splitlines()[1] == "%1 = batch_norm(%0, module=0)"


def test_nested_graphs_stand_behind_their_graph():
    class Branches(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    text = graph_text(graph_at("export", Branches(), torch.randn(3)))
    (name,) = re.findall(r"^graph (\S*true\S*):$", text, re.MULTILINE)
    assert text.partition(f"graph {name}:\n")[2].splitlines()[:2] == [
        "    %0 = input : f32[3]",
        "    %1 = sin(%0) : f32[3]",
    ]


def test_a_difference_is_told_line_by_line():
    traced = torch.fx.symbolic_trace(lambda x: torch.sin(x) + 1)
    assert_graph(traced, "%0 = input\n%1 = sin(%0)\n  %2 = add(%1, other=1)\nreturn %2".replace("\n  ", "\n"))
    with pytest.raises(AssertionError) as caught:
        assert_graph(traced, "%0 = input\n%1 = cos(%0)\n%2 = add(%1, other=1)\nreturn %2")
    assert "-%1 = cos(%0)\n+%1 = sin(%0)" in str(caught.value)
