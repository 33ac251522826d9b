"""Each runtime's profile of a small graph, read back to layers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.layers import onnxruntime_profile, openvino_profile, torch_profile
from benchmarks.layers.layer import Layer
from benchmarks.layers.onnx_graph import OnnxLayers
from benchmarks.layers.part import Part, ProfileError, other_kind
from benchmarks.layers.runtimes import median_parts
from fxpasses.kernels.kernel import DEPTHWISE, Kernel, Kind
from fxpasses.kernels.sequence import CHAIN, GATHER, MEAN, PRODUCT
from fxpasses.kernels.step_times import StepTime

onnx = pytest.importorskip("onnx")

CHANNELS, SIZE = 32, 8


def layer(name, taps=3, filters=CHANNELS):
    shapes = ((1, CHANNELS, SIZE, SIZE), (filters, CHANNELS, taps, taps), (1, filters, SIZE, SIZE))
    return Layer(name, *shapes, (1, 1), (taps // 2,) * 2, (1, 1))


LAYERS = (
    layer("a.weight"),
    layer("b.weight"),
    layer("side.weight", taps=1),
    Layer("head", (1, 32), (5, 32), (1, 5)),
)
NAMES = {"a": 0, "b": 1, "side": 2, "product": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """relu(a), then relu(b(...) + side(...)), the mean, and a product."""
    helper = onnx.helper
    generator = torch.Generator().manual_seed(0)

    def constant(name, shape):
        return onnx.numpy_helper.from_array(torch.randn(shape, generator=generator).numpy(), name)

    def convolution(name, weight, taps, given, value):
        return helper.make_node("Conv", [given, weight], [value], name, pads=[taps // 2] * 4)

    nodes = [
        convolution("a", "a.weight", 3, "image", "a_value"),
        helper.make_node("Relu", ["a_value"], ["a_relu"], "relu"),
        convolution("b", "b.weight", 3, "a_relu", "b_value"),
        convolution("side", "side.weight", 1, "a_relu", "side_value"),
        helper.make_node("Add", ["b_value", "side_value"], ["sum"], "add"),
        helper.make_node("Relu", ["sum"], ["relu_value"], "relu_of_sum"),
        helper.make_node("GlobalAveragePool", ["relu_value"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "head"], ["result"], "product", transB=1),
    ]
    tensor = helper.make_tensor_value_info
    given = tensor("image", onnx.TensorProto.FLOAT, (1, CHANNELS, SIZE, SIZE))
    result = tensor("result", onnx.TensorProto.FLOAT, (1, 5))
    weights = [constant(each.name, each.weight) for each in LAYERS]
    graph = helper.make_graph(nodes, "small", [given], [result], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(made, path)
    return path, made.graph


def image():
    return torch.randn(1, CHANNELS, SIZE, SIZE)


def computed(parts):
    """Which layers are in the parts, each once."""
    return sorted(position for part in parts for position in part.layers or ())


def test_the_nodes_of_an_onnx_graph_are_layers_by_the_names_of_their_weights(model):
    graph = OnnxLayers.of(model[1], LAYERS)
    assert graph.by_name == NAMES
    assert graph.uncertain == set()


def test_a_node_whose_weight_has_another_name_or_size_is_not_certain(model):
    others = (layer("a.weight", taps=1), layer("other.weight"), *LAYERS[2:])
    graph = OnnxLayers.of(model[1], others)
    assert graph.by_name == {"side": 2, "product": 3}
    assert graph.uncertain == {"a", "b"}


def test_products_of_images_are_no_layers_where_all_layers_are_known(model):
    graph = OnnxLayers.of(model[1], LAYERS[:3])
    assert graph.uncertain == set()
    assert graph.of_node("product") == ()
    run = [event("product/MatMulScaleFusion/", 0, operator="FusedMatMul")]
    assert onnxruntime_profile.parts_of(run, graph, LAYERS[:3])[0].kind == "elementwise and other"
    nodes = [openvino_profile.Executed("result", "MatMul", "gemm", 1e-3)]
    parts = openvino_profile.parts_of(nodes, {"result": ["result"]}, graph)
    assert (parts[0].layers, parts[0].kind) == ((), "elementwise and other")


def test_a_name_is_a_nodes_or_that_of_what_it_gives(model):
    graph = OnnxLayers.of(model[1], LAYERS)
    assert graph.of_node("a") == graph.of_node("a_value") == (0,)
    assert graph.of_node("relu") == ()
    assert graph.of_node("nothing") is None


def test_what_leads_to_a_value_ends_where_another_kernel_gave_one(model):
    graph = OnnxLayers.of(model[1], LAYERS)
    assert graph.behind("a_relu", ()) == (0,)
    assert graph.behind("relu_value", ()) == (1, 2)
    assert graph.behind("relu_value", {"side_value"}) == (1,)
    others = (*LAYERS[:2], layer("other.weight", taps=1), LAYERS[3])
    assert OnnxLayers.of(model[1], others).behind("relu_value", {"b_value"}) is None


def test_onnx_runtimes_own_profile_tells_every_layer(model, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = runtime.InferenceSession(str(model[0]), options, providers=["CPUExecutionProvider"])
    for _ in range(2):
        session.run(None, {"image": image().numpy()})
    with open(session.end_profiling(), encoding="utf-8") as file:
        runs = onnxruntime_profile.runs_of(json.load(file))
    assert len(runs) == 2
    parts = onnxruntime_profile.parts_of(runs[1], OnnxLayers.of(model[1], LAYERS), LAYERS)
    assert computed(parts) == [0, 1, 2, 3]
    assert all(part.layers is not None for part in parts)
    assert "pooling" in {part.kind for part in parts}
    assert sum(part.seconds for part in parts) == pytest.approx(sum(1e-6 * event["dur"] for event in runs[1]))


def event(name, start, operator="Conv", duration=4, shapes=()):
    args = {"op_name": operator, "input_type_shape": [{"float": list(shape)} for shape in shapes]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": duration, "args": args}


def test_a_blocked_convolution_is_known_by_the_value_that_it_gives(model):
    graph = OnnxLayers.of(model[1], LAYERS)
    run = [event("a_relu_nchwc", 0), event("side_value_nchwc", 5), event("relu_value_nchwc", 10)]
    parts = onnxruntime_profile.parts_of(run, graph, LAYERS)
    assert [part.layers for part in parts] == [(0,), (2,), (1,)]


def test_a_blocked_convolution_that_may_be_either_of_two_is_not_matched(model):
    graph = OnnxLayers.of(model[1], LAYERS)
    parts = onnxruntime_profile.parts_of([event("relu_value_nchwc", 0)], graph, LAYERS)
    assert [part.layers for part in parts] == [None]


def test_a_convolution_whose_weight_has_other_taps_is_not_matched(model):
    graph = OnnxLayers.of(model[1], LAYERS)
    shapes = (LAYERS[0].image, (CHANNELS, CHANNELS, 1, 1))
    parts = onnxruntime_profile.parts_of([event("a", 0, shapes=shapes)], graph, LAYERS)
    assert [part.layers for part in parts] == [None]


def test_nodes_of_no_run_are_an_error():
    runs = [{"cat": "Session", "name": "model_run", "ts": 10, "dur": 5, "args": {}}]
    with pytest.raises(ProfileError, match="1 nodes"):
        onnxruntime_profile.runs_of([event("a", 0), *runs])


def test_openvinos_own_profile_tells_every_layer(model):
    openvino = pytest.importorskip("openvino")
    from benchmarks.layers.runtimes import openvino_nodes, openvino_originals

    settings = {"PERF_COUNT": True, "INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.convert_model(model[0]), "CPU", settings)
    request = compiled.create_infer_request()
    request.infer([image().numpy()])
    nodes = openvino_nodes(request)
    graph = OnnxLayers.of(model[1], LAYERS)
    parts = openvino_profile.parts_of(nodes, openvino_originals(compiled), graph)
    assert computed(parts) == [0, 1, 2, 3]
    assert all(part.layers is not None for part in parts)
    assert "pooling" in {part.kind for part in parts}


def test_a_node_of_openvinos_that_holds_no_known_layer_is_not_matched(model):
    nodes = [openvino_profile.Executed("x", "Convolution", "jit", 1e-3)]
    graph = OnnxLayers.of(model[1], LAYERS)
    assert openvino_profile.parts_of(nodes, {}, graph)[0].layers is None
    assert openvino_profile.parts_of(nodes, {"x": ["b", "side", "add"]}, graph)[0].layers == (1, 2)


def profiled(call, *, steps=(), calls=1):
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(calls):
            with record_function(torch_profile.CALL):
                call()
    return torch_profile.calls_of(profiler.events(), steps)


def test_torchs_own_profile_tells_operators_that_compute_layers():
    x, head = image(), torch.randn(5, CHANNELS)
    a, side = (torch.randn(LAYERS[position].weight) for position in (0, 2))
    convolve = torch.ops.mkldnn._convolution_pointwise

    def call():
        y = convolve(x, a, None, [1, 1], [1, 1], [1, 1], 1, "relu", [], "")
        z = torch.ops.aten.convolution(y, side, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        return torch.addmm(torch.zeros(5), z.mean((2, 3)), head.t())

    first, second = profiled(call, calls=2)
    assert [found.name for found in first] == [found.name for found in second]
    layers = (LAYERS[0], LAYERS[2], LAYERS[3])
    parts = torch_profile.parts_of(first, layers)
    assert computed(parts) == [0, 1, 2]
    kinds = {part.name: part.kind for part in parts}
    assert kinds["aten::mean"] == "pooling"
    assert all(part.seconds > 0 for part in parts if part.layers)


def events(*names):
    """Those of one call, of which each lasts a millisecond."""
    span = SimpleNamespace(start=0, elapsed_us=lambda: 1e3)
    children = [
        SimpleNamespace(name=name, time_range=span, cpu_children=[], input_shapes=[], concrete_inputs=[])
        for name in names
    ]
    return [SimpleNamespace(name=torch_profile.CALL, time_range=span, cpu_children=children)]


def step(kind, seconds, *convolutions, stages=(), is_first=False):
    sizes = tuple(tuple(sizes) for sizes, _ in convolutions)
    kernels = tuple(kernel for _, kernel in convolutions)
    return StepTime(kind, (1, SIZE, SIZE, CHANNELS), sizes, kernels, is_first, seconds, stages)


ONE = ([CHANNELS, 1, 1, 1, 1, 1, 0, 0, 1, 1], Kernel(Kind.PRODUCT, 2))
THREE = ([CHANNELS, CHANNELS, 3, 3, 2, 2, 1, 1, 1, 1], DEPTHWISE)


def test_the_steps_of_a_sequence_are_parts_with_the_times_that_they_noted():
    steps = [step(PRODUCT, 3e-4, ONE, is_first=True), step(MEAN, 1e-5), step(GATHER, 2e-5)]
    (calls,) = torch_profile.calls_of(events("fxpasses::sequence", "graph_0_cpp_fused_cat_0"), steps)
    parts = torch_profile.parts_of(calls, (layer("", taps=1),))
    assert [part.seconds for part in parts] == [3e-4, 1e-5, 2e-5, 1e-3]
    assert [part.layers for part in parts] == [(0,), (), (), ()]
    assert [part.kind for part in parts[1:]] == ["pooling", "elementwise and other", "elementwise and other"]


def test_the_convolutions_of_a_chain_share_its_time_by_what_threads_spent_in_each():
    chain = step(CHAIN, 4e-4, ONE, THREE, stages=(3e-4, 1e-4), is_first=True)
    (calls,) = torch_profile.calls_of(events("fxpasses::sequence"), [chain])
    assert [call.seconds for call in calls] == pytest.approx([3e-4, 1e-4])
    wide, deep = (call.work for call in calls)
    assert wide is not None
    assert not wide.is_depthwise
    assert deep is not None
    assert deep.is_depthwise
    assert deep.image == (1, CHANNELS, SIZE, SIZE)
    assert deep.stride == (2, 2)


def test_steps_that_are_not_those_of_the_sequences_are_an_error():
    noted = [step(PRODUCT, 1e-4, ONE, is_first=True)]
    with pytest.raises(ProfileError, match="noted no steps"):
        torch_profile.calls_of(events("fxpasses::sequence", "fxpasses::sequence"), noted)
    with pytest.raises(ProfileError, match="not in the profile"):
        torch_profile.calls_of(events("aten::mean"), noted)


def test_parts_of_a_turn_are_medians_over_its_calls():
    calls = [[Part("a", seconds, (0,)), Part("b", 2 * seconds)] for seconds in (1.0, 9.0, 2.0)]
    assert median_parts(calls) == (Part("a", 2.0, (0,)), Part("b", 4.0))


def test_calls_that_ran_something_else_are_an_error():
    with pytest.raises(ProfileError, match="at one place"):
        median_parts([[Part("a", 1.0)], [Part("b", 1.0)]])
    with pytest.raises(ProfileError, match="kernels"):
        median_parts([[Part("a", 1.0)], []])


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("MaxPool", "pooling"),
        ("graph_0_cpp_fused_max_pool2d_with_indices_7", "pooling"),
        ("ReduceMean", "pooling"),
        ("ReorderInput", "reorder"),
        ("Transpose", "reorder"),
        ("Concat", "elementwise and other"),
        ("graph_0_cpp_fused_add_2", "elementwise and other"),
    ],
)
def test_the_kind_of_what_is_no_layer_follows_from_its_name(operator, kind):
    assert other_kind(operator) == kind
