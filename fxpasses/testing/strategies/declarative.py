"""Models around a declarative rule's pattern, which is all that they are made from.

The pattern is put between other operators, and bent: a value of its inside that is read elsewhere, an operand
that is written on the way, other dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule, Node

from fxpasses.graph.levels import Level
from fxpasses.rewrite.declarative_rule import DeclarativeRule
from fxpasses.rewrite.recording import fake_of, record
from fxpasses.testing.captures import LEVELS
from fxpasses.testing.specimens import Specimen
from fxpasses.testing.strategies.layers import WRITES_SURVIVE
from fxpasses.torch_internals.fake_tensors import new_fake_mode

_SHAPE_KEEPING: tuple[tuple[Callable[..., Any], tuple[float, ...]], ...] = (
    (torch.sin, ()),
    (torch.tanh, ()),
    (torch.mul, (1.5,)),
    (torch.add, (0.25,)),
    (torch.nn.functional.softplus, ()),
)
"""What stands before and after a pattern; smooth, since gradients are compared."""


@st.composite
def around(draw: st.DrawFn, rule: DeclarativeRule) -> Specimen:
    """Models around a declarative rule's pattern.

    The rule's `check` must accept its own examples. A pattern of one operator has no inside to bend.
    """
    example = draw(st.sampled_from(rule.examples))
    steps = st.lists(st.integers(0, len(_SHAPE_KEEPING) - 1), min_size=1, max_size=3)
    before, after, seed = draw(steps), draw(steps), draw(st.integers(0, 2**16))
    graph = _pattern_graph(rule, example)
    inside = [node for node in graph.nodes if node.op.startswith("call") and not _is_returned(node)]
    kinds = ["plain", "plain", "symbolic", "float32", "mixed-dtypes"]
    kind = draw(st.sampled_from([*kinds, *(["extra-user", "written"] if inside else [])]))
    levels: tuple[str, ...] = LEVELS
    code: str | Mapping[str, str] | None = None
    if kind == "extra-user":
        _return_too(graph, draw(st.sampled_from(inside)))
        code = "multiple-users"
    elif kind == "written":
        code = _write_after(graph, draw(st.sampled_from(inside)))
        levels = WRITES_SURVIVE if code else ()
    inputs = _random_inputs(example, seed, torch.float32 if kind == "float32" else torch.float64)
    if kind == "mixed-dtypes":
        if _with_mixed_dtypes(draw, graph, inputs):
            code = "mixed-dtypes"
        else:
            kind, graph = "plain", _pattern_graph(rule, example)
    _surround(graph, before, after)
    model, symbolic = GraphModule(nn.Module(), graph), kind == "symbolic"
    return Specimen(
        kind, model, inputs, int(code is None), code, levels, grads=kind != "written", dynamic=symbolic
    )


def _with_mixed_dtypes(draw: st.DrawFn, graph: torch.fx.Graph, inputs: Sequence[torch.Tensor]) -> bool:
    """Casts one operand of several to float32, and the results; whether eager takes it so.

    The results are cast because a float64 result of float32 operands has float32's rounding errors.
    """
    placeholders = graph.find_nodes(op="placeholder")
    floating = [node for node, tensor in zip(placeholders, inputs, strict=True) if tensor.is_floating_point()]
    if len(floating) < 2:
        return False
    operand = draw(st.sampled_from(floating))
    with graph.inserting_before(min(operand.users)):
        cast = graph.call_method("to", (operand, torch.float32))
    operand.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    output = graph.find_nodes(op="output")[0]
    with graph.inserting_before(output):
        results = [graph.call_method("to", (result, torch.float32)) for result in _returned(output)]
    output.args = (tuple(results),)
    try:
        torch.fx.Interpreter(GraphModule(nn.Module(), graph)).run(*inputs)
    except RuntimeError:
        return False
    return True


def _pattern_graph(rule: DeclarativeRule, example: dict[str, Any]) -> torch.fx.Graph:
    return record(rule.pattern, fake_of(example, mode := new_fake_mode()), Level.TORCH, mode)


def _surround(graph: torch.fx.Graph, before: list[int], after: list[int]) -> None:
    """Puts operators between the inputs and the pattern, and between the pattern and the outputs."""
    for node in graph.find_nodes(op="placeholder"):
        readers = list(node.users)
        with graph.inserting_before(min(readers)):
            through = _chain(graph, node, before)
        node.replace_all_uses_with(through, delete_user_cb=lambda user, readers=readers: user in readers)
    output = graph.find_nodes(op="output")[0]
    with graph.inserting_before(output):
        output.args = (tuple(_chain(graph, result, after) for result in _returned(output)),)


def _returned(output: Node) -> Sequence[Any]:
    results = output.args[0]
    return results if isinstance(results, (tuple, list)) else (results,)


def _chain(graph: torch.fx.Graph, node: Any, steps: list[int]) -> Node:
    for step in steps:
        function, constants = _SHAPE_KEEPING[step]
        node = graph.call_function(function, (node, *constants))
    assert isinstance(node, Node)
    return node


def _is_returned(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _return_too(graph: torch.fx.Graph, node: Node) -> None:
    """Makes an inner value one of the results."""
    output = graph.find_nodes(op="output")[0]
    output.args = ((*_returned(output), node),)


def _write_after(graph: torch.fx.Graph, node: Node) -> Mapping[str, str]:
    """Writes to a copy of an operand of the pattern after an inner node, if the operand is read before it.

    Returns:
        The reason code of each level; empty where nothing is written.
    """
    operand = next((source for source in node.all_input_nodes if source.op == "placeholder"), None)
    if operand is None:
        return {}
    with graph.inserting_before(min(user for user in operand.users)):
        copied = graph.call_method("clone", (operand,))
    operand.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)
    readers = list(copied.users)
    with graph.inserting_after(node):
        written = graph.call_method("add_", (copied, 0.5))
    codes = dict.fromkeys(WRITES_SURVIVE, "mutation")
    if any(written < reader for reader in readers):
        # Who traces operators gives the tensor another name after the write.
        codes.update(dict.fromkeys(("pre_dispatch", "export"), "other-operand"))
    return codes


def _random_inputs(example: dict[str, Any], seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [tensor for tensor in example.values() if isinstance(tensor, torch.Tensor)]
    made = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in tensors]
    return tuple(
        drawn.to(dtype).requires_grad_() if given.is_floating_point() else given
        for drawn, given in zip(made, tensors, strict=True)
    )
