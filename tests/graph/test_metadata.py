"""Metadata: every node gets its fake value, without running anything real."""

from __future__ import annotations

import pytest
import torch
from helpers import ATEN_LEVELS, CAPTURES, image, pair
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import fxpasses
from fxpasses.errors import MissingMetadataError
from fxpasses.graph.metadata import FakeEvaluator, ensure_metadata, tensor, value
from fxpasses.torch_internals import storage_key


def traced() -> tuple[GraphModule, nn.Module]:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return torch.fx.symbolic_trace(model), model


def test_shapes_dtypes_and_strides_are_eagers() -> None:
    graph_module, model = traced()
    x = image().to(memory_format=torch.channels_last)
    ensure_metadata(graph_module, (x,))
    (result,) = [tensor(node) for node in graph_module.graph.nodes if node.target == "1"]
    expected = model(x)
    assert result is not None
    assert (result.shape, result.dtype, result.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    )


def test_values_are_fake_and_nothing_real_is_run() -> None:
    graph_module, model = traced()
    model[1].train()  # type: ignore[index]
    before = {name: each.clone() for name, each in model.named_buffers()}
    ensure_metadata(graph_module, (image(grad=False),))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    values = [value(node) for node in graph_module.graph.nodes if node.op != "output"]
    assert all(isinstance(each, torch._subclasses.FakeTensor) for each in values)


def test_random_operators_leave_the_generator_alone() -> None:
    graph_module = torch.fx.symbolic_trace(lambda x: torch.nn.functional.dropout(x, 0.5, True))
    before = torch.get_rng_state()
    ensure_metadata(graph_module, (torch.randn(3, generator=torch.Generator().manual_seed(0)),))
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_example_inputs_are_asked_for() -> None:
    graph_module, _ = traced()
    with pytest.raises(MissingMetadataError, match="no example inputs were given"):
        ensure_metadata(graph_module, None)


@pytest.mark.parametrize("inputs", [(), (1, 2)])
def test_a_wrong_number_of_inputs_is_named(inputs: tuple[int, ...]) -> None:
    graph_module, _ = traced()
    with pytest.raises(MissingMetadataError, match=rf"1 placeholders .* and {len(inputs)} example"):
        ensure_metadata(graph_module, inputs)


def test_inputs_that_do_not_run_are_named_with_the_operator() -> None:
    graph_module, _ = traced()
    with pytest.raises(MissingMetadataError, match="the example inputs do not run"):
        ensure_metadata(graph_module, (image(2, 5, 8, 8),))


def test_errors_change_nothing() -> None:
    graph_module, _ = traced()
    before = str(graph_module.graph)
    for inputs in (None, (), (image(2, 5, 8, 8),)):
        with pytest.raises(MissingMetadataError):
            fxpasses.optimize(graph_module, inputs)
    assert str(graph_module.graph) == before
    assert not any(node.meta.get("val") is not None for node in graph_module.graph.nodes)


def test_a_default_argument_of_the_model_needs_no_input() -> None:
    def call(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return torch.sin(x) * scale

    ensure_metadata(graph := torch.fx.symbolic_trace(call), (image(3),))
    assert any(tensor(node) is not None for node in graph.graph.nodes)


@pytest.mark.parametrize("capture", ATEN_LEVELS)
def test_graphs_that_carry_metadata_need_no_inputs(capture: str) -> None:
    program = CAPTURES[capture](pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (image(),))
    graph_module = program if isinstance(program, GraphModule) else program.graph_module
    ensure_metadata(graph_module, None)
    used = [node for node in graph_module.graph.nodes if node.users]
    assert all("val" in node.meta for node in used)


def test_an_evaluator_mixes_values_of_several_fake_modes() -> None:
    """make_fx with real inputs gives every value a mode of its own, which torch refuses to mix."""
    graph_module = make_fx(lambda x, y: x + y, pre_dispatch=True)(torch.randn(2, 3), torch.randn(2, 3))
    x, y, *_ = graph_module.graph.nodes
    found = FakeEvaluator(graph_module).call(torch.add, (x, y), {})
    assert found.shape == (2, 3)


def test_symbolic_sizes_stay_symbolic() -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    program = torch.export.export(model, (image(),), dynamic_shapes=({0: batch},))
    result = fxpasses.optimize(program)
    assert result.report.applied == {"efficient_conv_bn_eval": 1}
    sizes = [
        tensor(node).shape[0] for node in result.graph_module.graph.nodes if "conv2d" in str(node.target)
    ]  # type: ignore[union-attr]
    assert [isinstance(each, torch.SymInt) for each in sizes] == [True]
    assert result.exported_program is not None
    assert result.exported_program.range_constraints == program.range_constraints
    for n in (2, 5):
        x = image(n, 3, 8, 8)
        torch.testing.assert_close(result.exported_program.module()(x), model(x), rtol=1e-9, atol=1e-9)


def _called_twice(function: object, *inputs: torch.Tensor, **options: object) -> list[object]:
    """The metadata of one call and of its repetition, which may come from memory."""
    graph_module = make_fx(lambda *given: given, tracing_mode="fake")(*inputs)
    nodes = tuple(graph_module.graph.find_nodes(op="placeholder"))
    evaluator = FakeEvaluator(graph_module)
    return [evaluator.call(function, nodes, options) for _ in range(2)]  # type: ignore[arg-type]


def _described(given: object) -> object:
    if isinstance(given, (tuple, list)):
        return [_described(each) for each in given]
    if not isinstance(given, torch.Tensor):
        return given
    return given.shape, given.stride(), given.dtype, given.requires_grad


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_repeated_call_with_several_results_gives_eagers_metadata(
    memory_format: torch.memory_format,
) -> None:
    gradient, x, weight = image(2, 4, 6, 6), image(2, 4, 6, 6), torch.randn(4, 4, 3, 3)
    gradient, x = (each.detach().to(memory_format=memory_format) for each in (gradient, x))

    def backward(gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> object:
        sizes = (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (False, True, False)
        return torch.ops.aten.convolution_backward(gradient, x, weight, None, *sizes)

    wanted = _described(backward(gradient, x, weight))
    first, second = _called_twice(backward, gradient, x, weight)
    assert _described(first) == _described(second) == wanted
    assert first[1] is not second[1]  # type: ignore[index]


def test_a_repeated_call_whose_results_are_views_shares_storage_again() -> None:
    def with_view_of_input(given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return given.relu(), given[:1]

    def with_view_of_result(given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = given.relu()
        return made, made.view(-1)

    x = image(2, 4, 6, 6)
    for found in _called_twice(with_view_of_input, x):
        assert found[1]._base is not None  # type: ignore[index]
    for found in _called_twice(with_view_of_result, x):
        assert storage_key(found[0]) == storage_key(found[1])  # type: ignore[index]
