"""Arguments by name: every spelling binds to the same values, and what does not fit is refused."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph, Node

from fxpasses.graph.decline import Decline
from fxpasses.graph.schema import bind, signature_of_overload, with_arguments

aten = torch.ops.aten


def call(target: Any, *names: str, op: str = "call_function", **arguments: Any) -> tuple[Node, list[Node]]:
    """A call on placeholders of the given names, and the placeholders."""
    graph = Graph()
    given = [graph.placeholder(name) for name in names]
    return graph.create_node(op, target, tuple(given), arguments), given


def test_defaults_are_filled_in_from_the_schema() -> None:
    node, (x, w) = call(torch.conv2d, "x", "w")
    bound = bind(node)
    geometry = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    assert bound == {"input": x, "weight": w, "bias": None, **geometry}


ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
VALUES: dict[str, Any] = {"stride": [2, 2], "padding": [1, 1], "dilation": [1, 2], "groups": 3}


@given(st.integers(0, len(ARGUMENTS)), st.permutations(ARGUMENTS))
def test_positional_and_keyword_arguments_bind_alike(positional: int, order: list[str]) -> None:
    graph = Graph()
    values = {name: VALUES.get(name) or graph.placeholder(name) for name in ARGUMENTS}
    args = tuple(values[name] for name in ARGUMENTS[:positional])
    kwargs = {name: values[name] for name in order if name not in ARGUMENTS[:positional]}
    node = graph.call_function(torch.conv2d, args, kwargs)
    assert bind(node) == values


@given(st.integers(0, len(ARGUMENTS)), st.sets(st.sampled_from(ARGUMENTS), max_size=3))
def test_replaced_arguments_bind_to_their_new_values(positional: int, changed: set[str]) -> None:
    graph = Graph()
    values = {name: VALUES.get(name) or graph.placeholder(name) for name in ARGUMENTS}
    args = tuple(values[name] for name in ARGUMENTS[:positional])
    kwargs = {name: values[name] for name in ARGUMENTS[positional:]}
    node = graph.call_function(torch.conv2d, args, kwargs)
    new = {name: graph.placeholder(f"new_{name}") for name in changed}
    args, kwargs = with_arguments(node, new)
    assert bind(graph.call_function(torch.conv2d, args, kwargs)) == {**values, **new}


def test_an_argument_left_to_its_default_is_appended_or_named() -> None:
    node, (x, w) = call(torch.conv2d, "x", "w")
    assert with_arguments(node, {"bias": w}) == ((x, w, w), {})
    assert with_arguments(node, {"groups": 2}) == ((x, w), {"groups": 2})


@pytest.mark.parametrize(
    ("target", "names", "arguments", "complaint"),
    [
        (torch.conv2d, ("x", "w"), {"accumulate": 1}, "unknown argument 'accumulate'"),
        (torch.conv2d, ("x",), {}, "no value for 'weight'"),
        (torch.conv2d, ("x", "w"), {"weight": 1}, "two values for 'weight'"),
        (torch.conv2d, tuple("abcdefgh"), {}, "8 positional arguments, of at most 7"),
        (F.batch_norm, ("x",), {}, "no value for 'running_mean'"),
        (aten.conv2d.padding, ("x", "w"), {"groups": 1, "groups_": 1}, "unknown argument 'groups_'"),
        (torch.sin, ("x",), {}, "without a known signature"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    target: Any, names: tuple[str, ...], arguments: dict[str, Any], complaint: str
) -> None:
    bound = bind(call(target, *names, **arguments)[0])
    assert isinstance(bound, Decline)
    assert bound.code == "unsupported-arguments"
    assert complaint in bound.message


@pytest.mark.parametrize(
    ("op", "target"),
    [
        ("call_function", torch.matmul),
        ("call_function", operator.matmul),
        ("call_method", "matmul"),
        ("call_method", "__matmul__"),
        ("call_function", aten.matmul.default),
    ],
)
def test_spellings_of_one_operator_bind_alike(op: str, target: Any) -> None:
    node, (a, b) = call(target, "a", "b", op=op)
    assert bind(node) == {"self": a, "other": b}


def test_pythons_name_of_the_first_argument_is_understood() -> None:
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    node = graph.call_function(torch.mm, (), {"mat2": b, "input": a})
    bound = bind(node)
    assert isinstance(bound, dict)
    assert (bound["self"], bound["mat2"]) == (a, b)
    assert with_arguments(node, {"self": b}) == ((), {"mat2": b, "input": b})


def test_keyword_only_arguments_are_not_positional() -> None:
    signature = signature_of_overload(aten.addmm.default)
    assert {"beta", "alpha"} <= signature.keyword_only
    graph = Graph()
    a, b, c = (graph.placeholder(name) for name in "abc")
    bound = bind(graph.call_function(torch.addmm, (a, b, c), {"alpha": 2}))
    assert isinstance(bound, dict)
    assert (bound["self"], bound["beta"], bound["alpha"]) == (a, 1, 2)
