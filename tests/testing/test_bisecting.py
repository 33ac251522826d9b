"""torch's compiler bisector finds the rewrite that breaks a function."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._inductor.compiler_bisector import BACKENDS, CompilerBisector

import fxpasses
from fxpasses.testing import bisectable, registered
from tests.rewrite.planted import SoftmaxRule, along_wrong_axis, by_hand

pytestmark = pytest.mark.usefixtures("no_code")


def function(x):
    for _ in range(5):
        x = torch.softmax(x + 1, 1)
    return x


X = torch.linspace(0, 1, 16).reshape(4, 4)


def wrong_at(number):
    """A rule whose rewrite is wrong at one site, of each compilation."""

    def write(rule, node, build):
        wrong = len([each for each in build.context.graph.nodes if each.target is torch.div]) == number - 1
        return (along_wrong_axis if wrong else by_hand)(rule, node, build)

    return SoftmaxRule(write)


def check():
    torch._dynamo.reset()
    return torch.allclose(torch.compile(lambda x: function(x), backend="fxpasses")(X), function(X), atol=1e-6)


def test_the_rewrite_is_found_by_its_number_and_place():
    """The bisector counts from 0."""
    with registered(wrong_at(3)), bisectable():
        found = CompilerBisector.do_bisect(check)
    assert (found.backend, found.subsystem, found.bisect_number) == ("fxpasses", "rewrites", 2)
    assert found.debug_info.startswith("softmax_rule at x_2 ")
    assert "test_bisecting.py:20" in found.debug_info


def test_a_function_that_no_rewrite_breaks_is_not_blamed_on_one():
    with registered(wrong_at(99)), bisectable():
        assert CompilerBisector.do_bisect(check) is None


def test_the_table_of_torch_s_is_as_it_was_and_without_a_bisection_all_is_applied():
    before = dict(BACKENDS)
    with contextlib.suppress(ZeroDivisionError), bisectable():
        assert list(BACKENDS) == [*before, "fxpasses"]
        with bisectable():
            pass
        assert "fxpasses" in BACKENDS
        raise ZeroDivisionError
    assert before == BACKENDS
    with bisectable():
        report = fxpasses.explain(function, X, options={"rules": wrong_at(99)})
    assert report.applied == {"softmax_rule": 5}
