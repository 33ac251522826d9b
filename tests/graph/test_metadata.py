"""Metadata: every node gets its fake value, without running anything real."""

from __future__ import annotations

import pytest
import torch
from helpers import ATEN_LEVELS, CAPTURES, image, pair
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import fxpasses
from fxpasses.errors import MissingMetadataError
from fxpasses.graph.metadata import FakeEvaluator, ensure_metadata, tensor, value
from fxpasses.torch_internals.fake_tensors import FakeTensor, FakeTensorMode
from fxpasses.torch_internals.tensors import storage_key


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
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ensure_metadata(graph_module, (image(grad=False),))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    values = [value(node) for node in graph_module.graph.nodes if node.op != "output"]
    assert all(isinstance(fake, FakeTensor) for fake in values)


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
    assert [isinstance(size, torch.SymInt) for size in sizes] == [True]
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
        return [_described(part) for part in given]
    if not isinstance(given, torch.Tensor):
        return given
    return given.shape, given.stride(), given.dtype, given.requires_grad


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_repeated_call_with_several_results_gives_eagers_metadata(
    memory_format: torch.memory_format,
) -> None:
    gradient, x, weight = image(2, 4, 6, 6), image(2, 4, 6, 6), torch.randn(4, 4, 3, 3)
    gradient, x = (given.detach().to(memory_format=memory_format) for given in (gradient, x))

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


aten, prims = torch.ops.aten, torch.ops.prims
ONCE, TWICE, FULL = (1, 3, 1, 1), (2, 3, 1, 1), (2, 3, 4, 5)
LAST = torch.channels_last


def _laid_out_anew(function: object, *operands: object, **options: object) -> object:
    """What the rule says of a call on tensors, or numbers, in a graph traced from contiguous ones."""
    given = [operand for operand in operands if isinstance(operand, torch.Tensor)]
    graph_module = make_fx(lambda *given: given, tracing_mode="fake")(*given)
    nodes = iter(graph_module.graph.find_nodes(op="placeholder"))
    args = tuple(next(nodes) if isinstance(operand, torch.Tensor) else operand for operand in operands)
    evaluator = FakeEvaluator(graph_module)
    fake = [evaluator.fake(torch.empty(operand.shape, dtype=operand.dtype)) for operand in given]
    remaining = iter(fake)
    before = function(
        *[next(remaining) if isinstance(operand, torch.Tensor) else operand for operand in operands],
        **options,
    )  # type: ignore[operator]
    found = evaluator.laid_out_anew(function, args, options, before)
    if found is not None:
        eager = function(*operands, **options)  # type: ignore[operator]
        assert _described(found) == _described(eager) == _described(evaluator.call(function, args, options))  # type: ignore[arg-type]
        assert storage_key(found) not in map(storage_key, fake)
    return found


def _dense(size: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose dimensions lie in this order in memory."""
    return torch.randn([size[d] for d in order]).permute([order.index(d) for d in range(len(size))])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)])
@torch.no_grad()
def test_element_wise_results_lie_as_their_operands_do(order: tuple[int, ...]) -> None:
    x, y, mask = _dense(FULL, order), _dense(FULL, order), _dense(FULL, order) > 0
    once = torch.randn(ONCE)
    for function, operands in (
        (aten.relu.default, (x,)),
        (aten.clone.default, (x,)),
        (aten.le.Scalar, (x, 0)),
        (aten.add.Tensor, (x, y)),
        (aten.add.Tensor, (x, torch.tensor(2.0))),
        (aten.mul.Tensor, (once, x)),
        (aten.sub.Tensor, (x, torch.randn(5))),
        (aten.where.self, (mask, torch.tensor(0.0), x)),
        (aten.where.self, (mask, x, once)),
        (aten.hardtanh.default, (x, 0.0, 6.0)),
        (aten.threshold_backward.default, (x, y, 0)),
        (prims.convert_element_type.default, (x, torch.bfloat16)),
        (aten.add.Tensor, (x, y.to(torch.float64))),
    ):
        assert _laid_out_anew(function, *operands) is not None, function
    with torch.autocast("cpu", torch.bfloat16):
        assert _laid_out_anew(aten.add.Tensor, x, y) is not None


@torch.no_grad()
def test_where_the_rule_of_element_wise_results_says_nothing() -> None:
    x = torch.randn(FULL)
    for function, operands in (
        (aten.add.Tensor, (x, x.to(memory_format=LAST))),  # the first counts
        (aten.add.Tensor, (x, torch.randn(TWICE))),  # it varies along two dimensions, whose order may count
        (aten.mul.Tensor, (torch.randn(2, 1, 1, 1), torch.randn(1, 3, 4, 5))),  # none has the result's shape
        (aten.relu.default, (torch.randn(2, 1, 4, 5),)),  # strides of such a dimension mean nothing
        (aten.relu.default, (torch.randn(2, 0, 4, 5),)),
        (aten.relu.default, (torch.randn(2, 3, 4, 8)[..., ::2],)),  # the result has no gaps
        (aten.relu.default, (torch.randn(1, 3, 4, 5).expand(FULL),)),  # nor does it overlap itself
        (aten.positive.default, (x,)),  # its result is its operand
        (aten.relu_.default, (x,)),
        (aten.cumsum.default, (x, 1)),  # not element-wise
        (aten._to_copy.default, (x,)),
    ):
        assert _laid_out_anew(function, *operands) is None, function
    assert _laid_out_anew(aten.clone.default, x, memory_format=LAST) is None
    with torch.enable_grad():
        assert _laid_out_anew(aten.relu.default, x) is None


@torch.no_grad()
def test_the_rule_of_element_wise_results_guards_no_symbol() -> None:
    graph_module = make_fx(torch.add, tracing_mode="symbolic")(torch.randn(FULL), torch.randn(FULL))
    *nodes, result, _ = graph_module.graph.nodes
    evaluator = FakeEvaluator(graph_module)
    before = evaluator.guard_count
    assert evaluator.laid_out_anew(aten.add.Tensor, nodes, {}, value(result)) is None
    assert evaluator.guard_count == before


@torch.no_grad()
def test_the_rule_of_element_wise_results_leaves_symbolic_strides_alone() -> None:
    """Static sizes, and gaps of a size that nobody knows: the result has none."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    frames = [DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC]
    clips = mode.from_tensor(torch.randn(2, 9, 4, 5), symbolic_context=StatelessSymbolicContext(frames))
    graph_module = make_fx(lambda x: x[:, 0] + x[:, 1], tracing_mode="fake")(clips)
    (result,) = graph_module.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert any(isinstance(stride, torch.SymInt) for stride in value(result.args[0]).stride())
    assert FakeEvaluator(graph_module).laid_out_anew(aten.add.Tensor, result.args, {}, value(result)) is None


@torch.no_grad()
@pytest.mark.parametrize("is_symbolic", [True, False])
def test_an_operator_that_decomposes_keeps_the_symbols_of_sizes(is_symbolic: bool) -> None:
    """In C++ `pad` would take the numbers that the symbols stood for."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    frames = [DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC if is_symbolic else DimDynamic.STATIC]
    x = mode.from_tensor(torch.randn(2, 3, 6), symbolic_context=StatelessSymbolicContext(frames))
    graph_module = make_fx(lambda x: x * 2, tracing_mode="fake")(x)
    (node,) = graph_module.graph.find_nodes(op="placeholder")
    made = FakeEvaluator(graph_module).call(aten.pad.default, (node, [1, 2]), {})
    assert isinstance(made.shape[2], torch.SymInt) is is_symbolic
    assert str(made.shape[2]) == ("9" if not is_symbolic else str(x.shape[2] + 3))
