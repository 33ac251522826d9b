"""What becomes of a baked program: it is saved, decomposed, exported and compiled; and graph modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fxpasses.errors import FxpassesError
from tests.helpers import image, printed, randomised
from tests.passes.weights.baking import (
    Block,
    baked,
    block,
    export,
    left_over,
    norms,
    require_same,
    signed,
    training,
)

aten = torch.ops.aten

# What becomes of a baked program ---------------------------------------------------------------------------


def test_it_is_saved_and_loaded(tmp_path):
    model, x = block(), image(grad=False)
    program, _ = baked(model, x)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    require_same(loaded.module()(x), model(x))
    assert loaded.state_dict.keys() == program.state_dict.keys()
    assert loaded.graph_signature == program.graph_signature
    signed(loaded)


def test_it_decomposes_and_a_decomposed_program_is_baked():
    model, x = block(), image(grad=False)
    program, _ = baked(model, x)
    require_same(program.run_decompositions().module()(x), model(x))
    decomposed, report = baked(export(model, x).run_decompositions())
    assert not norms(decomposed)
    assert report.kept_tensors == 3
    assert left_over(decomposed) == []
    require_same(decomposed.module()(x), model(x))


class Structured(nn.Module):
    """Nested inputs and results, a number, a constant written out, and a buffer that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.register_buffer("hidden", torch.randn(6), persistent=False)

    def forward(
        self, given: dict[str, torch.Tensor], *, scale: torch.Tensor, times: int, flag: Any = None
    ) -> Any:
        found = self.block(given["x"]) * scale * times + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double()
        return {"found": found, "times": times, "rest": (given["x"] + 1, flag, found * (self.hidden[:5] * 2))}


@pytest.mark.parametrize("strict", [False, True])
def test_inputs_and_results_of_any_structure_stay_as_they_are(strict, tmp_path):
    model, arguments = randomised(Structured()), ({"x": image(grad=False)},)
    keywords = {"scale": torch.tensor(2.0).double(), "times": 4, "flag": None}
    program, report = baked(torch.export.export(model, arguments, keywords, strict=strict))
    assert report.kept_tensors == 5
    assert not program.constants
    signed(program)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    expected = model(*arguments, **keywords)
    for each in (program, loaded, program.run_decompositions()):
        require_same(each.module()(*arguments, **keywords), expected)
    require_same(torch.export.unflatten(program)(*arguments, **keywords), expected)


def test_it_is_unflattened():
    model, x = block(), image(grad=False)
    require_same(torch.export.unflatten(baked(model, x)[0])(x), model(x))


def test_it_is_baked_again_without_a_change():
    model, x = block(), image(grad=False)
    first, _ = baked(model, x)
    second, report = baked(first)
    assert report.kept_tensors == 0
    assert printed(second) == printed(first)
    assert second.state_dict.keys() == first.state_dict.keys()


def test_the_batch_may_be_dynamic():
    model, x = block(), image(grad=False)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
    result, report = baked(program)
    assert report.kept_tensors == 3
    assert result.range_constraints == program.range_constraints
    for count in (2, 5):
        given = image(count, 3, 8, 8, grad=False)
        require_same(result.module()(given), model(given))


@pytest.mark.parametrize("layout", ["auto", "channels_last"])
def test_weights_are_baked_in_the_layout_that_they_are_read_in(layout):
    model, x = block(), image(2, 3, 32, 32, grad=False)
    program, _ = baked(model, x, layout=layout)
    assert left_over(program) == []
    require_same(program.module()(x), model(x))
    if layout == "channels_last":
        weight = program.state_dict["stem.baked_0_weight_1"]
        assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_runtime_gives_the_same(tmp_path, dynamic):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = randomised(Block(), torch.float32), torch.randn(2, 3, 16, 16)
    sizes = ({0: Dim("batch", min=1, max=9)},) if dynamic else None
    program, _ = baked(torch.export.export(model, (x,), dynamic_shapes=sizes), layout="auto")
    x = torch.randn(5, 3, 16, 16) if dynamic else x
    torch.onnx.export(program, None, tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    require_same(torch.from_numpy(found), model(x), 1e-5)
    onnx = pytest.importorskip("onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert "BatchNormalization" not in {node.op_type for node in nodes}


def test_a_package_of_aoti_gives_the_same(tmp_path):
    model, x = block(), image(grad=False)
    with torch.no_grad():
        program, _ = baked(model, x)
        # One wrapper of C++ takes less time than the header that would be compiled ahead for it.
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.precompile_headers": False},
        )
        require_same(torch._inductor.aoti_load_package(path)(x), model(x))


# Graph modules with parameters of their own ----------------------------------------------------------------

TRACES: dict[str, Callable[[nn.Module, torch.Tensor], GraphModule]] = {
    "symbolic_trace": lambda model, x: torch.fx.symbolic_trace(model),
    "make_fx": lambda model, x: make_fx(model)(x),
    "pre_dispatch": lambda model, x: make_fx(model, pre_dispatch=True)(x),
}


@pytest.mark.parametrize("trace", TRACES)
def test_a_graph_module_keeps_constants_itself(trace):
    model, x = block(), image(grad=False)
    with torch.no_grad():
        traced = TRACES[trace](model, x)
        before = traced.code, dict(traced.state_dict())
        result, report = baked(traced, x)
        require_same(result(x), model(x))
    assert report.kept_tensors >= 2
    assert not norms(result)
    assert traced.code == before[0]
    assert traced.state_dict().keys() == before[1].keys()
    assert sorted(result.state_dict()) == sorted(
        {str(node.target) for node in result.graph.find_nodes(op="get_attr")}
    )
    assert all("baked" in name for name in result.state_dict())


def test_a_graph_module_in_training_is_refused():
    x = image()
    with pytest.raises(FxpassesError, match="eval"):
        baked(torch.fx.symbolic_trace(training()), x)
    assert baked(torch.fx.symbolic_trace(training().eval()), x)[1].kept_tensors == 2


def test_modules_that_nothing_folds_are_left_as_they_are():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double()
    result, report = baked(torch.fx.symbolic_trace(model), torch.randn(4, dtype=torch.float64))
    assert report.kept_tensors == 0
    assert result.get_submodule("0") is model[0]


class Unknown(nn.Module):
    """A module that a tracer does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Unknown) or super().is_leaf_module(m, module_qualified_name)


def test_a_module_that_is_not_looked_into_is_no_reason_to_refuse():
    model, x = randomised(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Unknown())), image(grad=False)
    traced = GraphModule(model, Leaves().trace(model))
    result, report = baked(traced, x)
    assert report.kept_tensors == 2
    require_same(result(x), model(x))
    assert result.get_submodule("2") is model[2]


def test_a_program_without_weights_and_inputs_is_left_as_it_is():
    class Nothing(nn.Module):
        def forward(self) -> torch.Tensor:
            return torch.ones(3).double()

    program, report = baked(Nothing())
    assert report.kept_tensors == 0
    require_same(program.module()(), torch.ones(3).double())
