"""Copies of graph modules: graphs of their own, shared parameters, nothing of the caller's changed."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import CAPTURES, RULE, dynamo_graph, image, pair, printed
from torch import nn
from torch.fx import GraphModule

import fxpasses
from fxpasses.graph.copying import copy_graph_module
from fxpasses.graph.levels import nested_graphs


def test_nodes_names_and_metadata_come_along_and_parameters_are_shared() -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    original = CAPTURES["pre_dispatch"](model, (image(),))
    assert isinstance(original, GraphModule)
    copied = copy_graph_module(original)
    assert [node.name for node in copied.graph.nodes] == [node.name for node in original.graph.nodes]
    assert copied.code == original.code
    assert not set(copied.graph.nodes) & set(original.graph.nodes)
    for twin, node in zip(copied.graph.nodes, original.graph.nodes, strict=True):
        assert twin.meta.keys() == node.meta.keys()
        assert twin.meta is not node.meta
    shared = dict(original.named_parameters())
    assert all(parameter is shared[name] for name, parameter in copied.named_parameters())


@pytest.mark.parametrize("where", ["outer", "nested"])
def test_changing_the_copy_leaves_the_original(where: str) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=False) + 1

    original = dynamo_graph(call, image(3))
    before = printed(original)
    copied = copy_graph_module(original)
    ((_, child, _),) = nested_graphs(copied)
    target = copied if where == "outer" else child
    with target.graph.inserting_before(target.graph.output_node()):
        (result,) = (node for node in target.graph.output_node().all_input_nodes)
        target.graph.call_function(torch.neg, (result,))
    target.recompile()
    assert printed(original) == before
    assert printed(copied) != before


def test_dynamos_notes_on_placeholders_come_along() -> None:
    original = dynamo_graph(pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image())
    copied = copy_graph_module(original)
    pairs = list(zip(copied.graph.nodes, original.graph.nodes, strict=True))
    sources = [(getattr(a, "_dynamo_source", None), getattr(b, "_dynamo_source", None)) for a, b in pairs]
    assert any(source is not None for _, source in sources)
    assert all(ours is theirs for ours, theirs in sources)
    assert copied.meta == original.meta


def test_signature_of_a_pytree_call_comes_along() -> None:
    program = torch.export.export(Nested(), ({"a": image(), "b": [image()]},)).module()
    assert isinstance(program, GraphModule)
    x = {"a": image(), "b": [image()]}
    found, expected = copy_graph_module(program)(x), program(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Nested(nn.Module):
    def forward(self, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"sum": given["a"] + given["b"][0]}


# What `optimize` and the backend do with what they are given


@pytest.mark.parametrize("capture", CAPTURES)
def test_optimising_changes_neither_graph_nor_parameters_nor_buffers(capture: str) -> None:
    model, x = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image()
    program = CAPTURES[capture](model, (x,))
    before, state = printed(program), copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    result = fxpasses.optimize(program, (x,))
    assert result.report.applied == {RULE: 1}
    assert torch.equal(torch.get_rng_state(), generator)
    assert printed(program) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_graph_that_dynamo_hands_over_is_not_changed() -> None:
    seen: list[tuple[GraphModule, str]] = []

    def backend(gm: GraphModule, inputs: Any) -> Any:
        seen.append((gm, printed(gm)))
        return fxpasses.backend(gm, inputs, options={"inner": "eager"})

    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.compile(model, backend=backend)(image())
    assert fxpasses.last_report().applied == {RULE: 1}
    ((graph_module, before),) = seen
    assert printed(graph_module) == before


def test_inductor_does_not_get_the_graph_that_dynamo_hands_over() -> None:
    """It takes graphs over and mutates them."""
    seen: list[tuple[GraphModule, str]] = []

    def backend(gm: GraphModule, inputs: Any) -> Any:
        seen.append((gm, printed(gm)))
        return fxpasses.backend(gm, inputs)

    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.compile(model, backend=backend)(image())
    ((graph_module, before),) = seen
    assert printed(graph_module) == before


@pytest.mark.parametrize("capture", ["pre_dispatch", "symbolic_trace"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_rewritten_graph_modules_are_copied_and_pickled(capture: str, how: str) -> None:
    model, x = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image()
    program = CAPTURES[capture](model, (x,))
    graph_module = fxpasses.optimize(program, (x,)).graph_module
    twin = copy.deepcopy(graph_module) if how == "deepcopy" else pickle.loads(pickle.dumps(graph_module))
    torch.testing.assert_close(twin(x), model(x), rtol=1e-9, atol=1e-9)
    if how == "deepcopy":  # a pickled graph is traced again and names its nodes anew
        assert twin.code == graph_module.code


def test_a_rewritten_module_can_be_traced_and_compiled_again() -> None:
    model, x = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image()
    graph_module = fxpasses.optimize(torch.fx.symbolic_trace(model), (x,)).graph_module
    again = torch.fx.symbolic_trace(graph_module)
    torch.testing.assert_close(again(x), model(x), rtol=1e-9, atol=1e-9)
    compiled = torch.compile(graph_module, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)


def test_optimising_twice_finds_nothing_more() -> None:
    for capture in CAPTURES:
        model, x = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image()
        once = fxpasses.optimize(CAPTURES[capture](model, (x,)), (x,))
        twice = fxpasses.optimize(once.exported_program or once.graph_module, (x,))
        assert not twice.report.remarks, capture
        assert printed(twice.graph_module) == printed(once.graph_module)


# Exported programs


def exported(grads: bool = True) -> tuple[nn.Module, torch.export.ExportedProgram, torch.Tensor]:
    model, x = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), image(grad=grads)
    return model, torch.export.export(model, (x,)), x


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_rewritten_program_verifies_saves_and_loads(decomposed: bool) -> None:
    model, program, x = exported()
    program = program.run_decompositions() if decomposed else program
    rewritten = fxpasses.optimize(program).exported_program
    assert rewritten is not None
    rewritten.validate()
    file = io.BytesIO()
    torch.export.save(rewritten, file)
    file.seek(0)
    loaded = torch.export.load(file)
    torch.testing.assert_close(loaded.module()(x), model(x), rtol=1e-9, atol=1e-9)
    assert sum("batch_norm" in str(node.target) for node in loaded.graph.nodes) == 0


def test_a_rewritten_program_keeps_its_signature_and_state() -> None:
    _, program, _ = exported()
    rewritten = fxpasses.optimize(program).exported_program
    assert rewritten is not None
    assert rewritten.graph_signature == program.graph_signature
    assert rewritten.graph_signature is not program.graph_signature
    assert rewritten.state_dict.keys() == program.state_dict.keys()
    assert all(rewritten.state_dict[name] is value for name, value in program.state_dict.items())


def test_a_rewritten_program_decomposes_and_unflattens() -> None:
    model, program, x = exported()
    rewritten = fxpasses.optimize(program).exported_program
    assert rewritten is not None
    torch.testing.assert_close(rewritten.run_decompositions().module()(x), model(x), rtol=1e-9, atol=1e-9)
    unflattened = torch.export.unflatten(rewritten)
    torch.testing.assert_close(unflattened(x), model(x), rtol=1e-9, atol=1e-9)


def test_the_original_program_still_runs() -> None:
    model, program, x = exported()
    fxpasses.optimize(program)
    program.validate()
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-9, atol=1e-9)


def test_explain_leaves_buffers_generators_and_compiled_code_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).double().train()
    x = image(grad=False)
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = fxpasses.explain(model, x)
    assert [remark.code for remark in report.remarks] == ["training-mode"]
    assert report.dry_run
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert fxpasses.reports() == ()
