"""Readers of raw memory one by one, cases that were wrong once, and graphs in which nothing is to be done."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import each_once, randomised, sampled_cases, strides_that_matter
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy.value_ranges import ValueRangeError

import fxpasses
from fxpasses.graph.storage import base_of
from fxpasses.passes.layout.raw_memory import keep_eagers_memory
from fxpasses.testing.strategies.readers import READERS
from fxpasses.torch_internals.pytree import tree_leaves

CACHED = {"weights": "cached", "inductor": {"fallback_random": True}}


class Read(nn.Module):
    """Layers, and what is done with their result."""

    def __init__(self, read, *layers):
        super().__init__()
        self.layers, self.read = nn.Sequential(*layers), read

    def forward(self, x):
        return self.read(self.layers(x))


def results(call, x):
    torch.manual_seed(3)
    return [leaf for leaf in tree_leaves(call(x)) if isinstance(leaf, torch.Tensor)]


def require_eagers(model, x, *, offsets=True, **options):
    """Compiles a model in float64 and compares values, strides and offsets with eager's."""
    found = results(torch.compile(copy.deepcopy(model), backend="fxpasses", options=options), x)
    expected = results(model, x)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert got.stride() == want.stride()
        assert not offsets or got.storage_offset() == want.storage_offset()


class ReadAll(nn.Module):
    """Several readers, each of layers of its own: one compilation for all of them."""

    def __init__(self, readers, *layers):
        super().__init__()
        self.parts = nn.ModuleList(Read(READERS[reader], *copy.deepcopy(layers)) for reader in readers)

    def forward(self, x):
        return [part(x) for part in self.parts]


APART = ("graph break", "resize", "set", "storage", "random like it", "dropout")
"""Those that end a graph, or draw numbers in an order."""

TOGETHER = [reader for reader in READERS if reader not in APART]


@pytest.mark.parametrize("readers", [TOGETHER[at::5] for at in range(5)], ids=", ".join)
def test_readers_behind_cached_weights_find_eagers_memory(readers):
    model = randomised(ReadAll(readers, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        require_eagers(model, torch.randn(2, 3, 7, 8, dtype=torch.float64), **CACHED)


@pytest.mark.parametrize("reader", sampled_cases(READERS, ["graph break", "resize", "random like it"]))
def test_each_reader_behind_cached_weights_finds_eagers_memory(reader):
    model = randomised(Read(READERS[reader], nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        require_eagers(model, torch.randn(2, 3, 7, 8, dtype=torch.float64), **CACHED)


VIEWS = ["slice", "expanded", "real part", "as_strided at an offset", "diagonal", "strides of a slice"]


@pytest.mark.parametrize("layout", ["off", "channels_last", "contiguous"])
def test_views_of_convolutions_have_eagers_strides_and_offsets(layout):
    model = ReadAll(VIEWS, nn.Conv2d(3, 4, 3)).double()
    with torch.no_grad():
        require_eagers(model, torch.randn(2, 3, 7, 8, dtype=torch.float64), layout=layout)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["off", "channels_last", "contiguous"])
@pytest.mark.parametrize("reader", VIEWS)
def test_views_of_a_convolution_have_eagers_strides_and_offsets(reader, layout):
    model = Read(READERS[reader], nn.Conv2d(3, 4, 3)).double()
    with torch.no_grad():
        require_eagers(model, torch.randn(2, 3, 7, 8, dtype=torch.float64), layout=layout)


@pytest.mark.parametrize("weights", sampled_cases(["live", "cached"], ["cached"]))
def test_the_real_part_of_a_spectrum_has_eagers_gaps(weights):
    model = randomised(
        Read(lambda y: torch.fft.ifft2(torch.fft.fft2(y)).real, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    )
    with torch.no_grad():
        require_eagers(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), weights=weights)


@pytest.mark.parametrize("weights", ["live", "cached"])
@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
def test_a_conversion_to_complex_numbers_gives_their_dtype(given, weights):
    kinds = (torch.complex64, torch.complex128)
    model = Read(lambda y: [y.to(wanted) * 1j for wanted in kinds], nn.Conv2d(3, 4, 3)).to(given)
    x = torch.randn(2, 3, 7, 8, dtype=given)
    with torch.no_grad():
        found = torch.compile(model, backend="fxpasses", options={"weights": weights})(x)
        for ours, theirs in zip(found, model(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", sampled_cases(["auto", "off", "channels_last"], ["auto"]))
@pytest.mark.parametrize(
    "view",
    [lambda y: y.roll(-1, 0).as_strided((5, 10), (4, 1), 0), lambda y: y.unfold(-1, 3, 1)],
    ids=["as_strided of a roll", "unfold"],
)
def test_gradients_of_a_result_whose_elements_overlap_are_eagers(view, layout):
    """AOTAutograd would copy the gradient into overlapping memory, where elements overwrite others."""
    model = Read(view, nn.Conv2d(5, 5, 1)).double()
    x = torch.randn(2, 5, 2, 5, dtype=torch.float64)
    gradients = []
    for call in (torch.compile(model, backend="fxpasses", options={"layout": layout}), model):
        result = call(x)
        weights = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view(result.shape)
        gradients.append((result, *torch.autograd.grad(result, list(model.parameters()), weights)))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert strides_that_matter(got) == strides_that_matter(want)


class Views(nn.Module):
    """Results that are views of one, which is that of a convolution; another convolution may follow."""

    def __init__(self, views, *, norm=False, more=False):
        super().__init__()
        self.conv, self.more = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1) if more else None
        self.norm, self.views = nn.BatchNorm2d(4) if norm else nn.Identity(), views

    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.views(y) if self.more is None else (*self.views(y), self.more(y.relu()))


SHARED = {
    "slice and view": lambda y: (y[:, 1:], y.view(y.shape[0], -1)),
    "slice and as_strided": lambda y: (y[:, 1:], y.as_strided((3, 5), (4, 1), 1)),
    "whole and as_strided": lambda y: (y, y[1:].as_strided((2, 7), (3, 1))),
}


@pytest.mark.parametrize(
    ("views", "more", "norm", "layout"),
    each_once(
        SHARED,
        {"last": False, "not last": True},
        {"": False, "folded": True},
        {layout: layout for layout in ("auto", "off", "channels_last", "contiguous")},
    ),
)
def test_results_that_share_memory_are_eagers_with_gradients_on(views, more, norm, layout):
    model = randomised(Views(views, norm=norm, more=more))
    found, expected = copy.deepcopy(model), model
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    ours = torch.compile(found, backend="fxpasses", options={"layout": layout})(x)
    for got, want in zip(ours, expected(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert got.stride() == want.stride()
        got.sum().backward(retain_graph=True)
        want.sum().backward(retain_graph=True)
    for got, want in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("no_code")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("views", "shares"),
    [
        (lambda x, y: (y[:, 1:], y.sum()), False),
        (lambda x, y: (x[:, 1:], x.flatten(2), y), False),
        (lambda x, y: (y[:, 1:], y.flatten(2)), True),
    ],
    ids=["one view", "views of an input", "two views"],
)
def test_inductors_layouts_are_left_to_it_where_no_results_share_memory(views, shares, grad):
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 7, 8, requires_grad=True)
    run = torch.compile(lambda x: views(x, conv(x)), backend="fxpasses", options={"layout": "off"})
    with torch.set_grad_enabled(grad):
        run(x)
    codes = [remark.code for remark in fxpasses.last_report().remarks]
    assert ("shared-results" in codes) is (shares and grad)


@pytest.mark.parametrize("dynamic", sampled_cases([False, True], [True]))
def test_a_result_flattened_by_view_compiles_with_cached_weights(dynamic):
    """The view of eager's tensor is legal, whatever layout the kept weight has."""
    model = Read(lambda y: y.view(y.shape[0], -1), nn.Conv2d(3, 4, 3)).double()
    run = torch.compile(model, backend="fxpasses", options=CACHED, dynamic=dynamic)
    with torch.no_grad():
        for size in (7, 9) if dynamic else (7,):
            x = torch.randn(2, 3, size, 8, dtype=torch.float64)
            torch.testing.assert_close(run(x), model(x), rtol=1e-9, atol=1e-9)


def dynamic_results(read, layers, **options):
    """Results at two sizes of one artifact, eager's, and the codes of the report's remarks."""
    model = randomised(Read(read, *layers))
    run = torch.compile(copy.deepcopy(model), backend="fxpasses", options=options, dynamic=True)
    inputs = [
        torch.randn(2, 3, 7, 6, 5, dtype=torch.float64),
        torch.randn(3, 3, 9, 8, 6, dtype=torch.float64),
    ]
    inputs = [given[(...,) + (0,) * (5 - model.layers[0].weight.dim())] for given in inputs]
    with torch.no_grad():
        pairs = [(run(given), model(given)) for given in inputs]
    return pairs, [remark.code for remark in fxpasses.last_report().remarks]


def test_symbolic_strides_that_inductor_cannot_order_are_compared_for_equality_alone():
    """`force_stride_order` fails on these: the remainder of one stride by another keeps a quotient."""
    pairs, codes = dynamic_results(READERS["as_strided"], [nn.Conv3d(3, 4, 3)], layout="channels_last")
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert got.stride() == want.stride()
    assert "symbolic-strides" not in codes


@pytest.mark.parametrize("weights", sampled_cases(["live", "cached"], ["cached"]))
def test_a_graph_whose_strides_inductor_cannot_compare_runs_operator_by_operator(weights):
    layers = [nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), nn.Sigmoid()]
    pairs, codes = dynamic_results(
        READERS["view as complex"], layers, layout="channels_last", weights=weights
    )
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert got.stride() == want.stride()
    # Where inductor can compare them it compiles the graph.
    assert ("symbolic-strides" in codes) is (torch.__version__ < "2.15")


def failing_with(error):
    """A pass in a slot of inductor's that raises an error."""

    def fails(graph):
        raise error

    return {"post_grad_custom_pre_pass": fails, "force_disable_caches": True}


def test_a_comparison_that_inductor_fails_on_is_no_failure_of_the_compilation():
    model, x = nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 7, 8, dtype=torch.float64)
    options = {"inductor": failing_with(ValueRangeError("Invalid ranges [2:1]"))}
    found = torch.compile(model, backend="fxpasses", options=options)(x)
    torch.testing.assert_close(found, model(x), rtol=1e-9, atol=1e-9)
    assert fxpasses.last_report().remarks[-1].code == "symbolic-strides"


def test_another_failure_of_inductor_is_the_users_to_see():
    options = {"inductor": failing_with(ArithmeticError("planted"))}
    with pytest.raises(Exception, match="planted"):
        torch.compile(nn.Conv2d(3, 4, 3), backend="fxpasses", options=options)(torch.randn(2, 3, 7, 8))


# Must not fire ----------------------------------------------------------------------------------------------


def traced(function, *inputs):
    with torch.no_grad():
        return make_fx(function, tracing_mode="fake")(*inputs)


WEIGHT, IMAGE = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 6, 7)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch.conv2d(x, w).relu(),
        lambda x, w: torch.conv2d(x, w)[:, 1:].relu(),
        lambda x, w: (x[:, 1:], torch.conv2d(x, w)),
        lambda x, w: torch.as_strided(torch.conv2d(x, w), (3, 5), (4, 1), 0) + 1,
        lambda x, w: torch.conv2d(x, w).mean((2, 3)),
        lambda x, w: torch.ops.fxpasses_testing.flexible(torch.conv2d(x, w)[:, 1:]),
        lambda x, w: x.sin()[:, 1:],
    ],
    ids=[
        "no reader",
        "a view within the graph",
        "a view of an input",
        "as_strided of no view",
        "no view",
        "any layout will do",
        "no convolution",
    ],
)
def test_what_inductor_lays_out_rightly_is_left_alone(function):
    graph = traced(function, IMAGE, WEIGHT).graph
    before = str(graph)
    keep_eagers_memory(graph)
    assert str(graph) == before


def test_views_of_one_result_are_taken_of_one_tensor_in_eagers_memory():
    graph = traced(lambda x, w: (*(y := torch.conv2d(x, w)).split(2, 1), y[1:]), IMAGE, WEIGHT).graph
    keep_eagers_memory(graph)
    forced = [node for node in graph.nodes if "force_stride_order" in str(node.target)]
    assert len(forced) == 1
    assert forced[0].args[1] == [80, 20, 5, 1]
    (convolution,) = graph.find_nodes(op="call_function", target=torch.ops.aten.convolution.default)
    assert list(convolution.users) == forced


def test_a_triton_kernel_reads_a_view_of_eagers_memory():
    """Triton is not needed to see what the kernel would be given."""
    graph = traced(lambda x, w: torch.conv2d(x, w)[:, 1:].sin(), IMAGE, WEIGHT).graph
    (sine,) = graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    (view,) = sine.all_input_nodes
    with graph.inserting_before(sine):
        kernel = torch.ops.higher_order.triton_kernel_wrapper_functional
        graph.call_function(kernel, (), {"kernel_idx": 0, "kwargs": {"x": view, "n": 4}})
    keep_eagers_memory(graph)
    (call,) = graph.find_nodes(op="call_function", target=kernel)
    (forced,) = base_of(call.kwargs["kwargs"]["x"]).all_input_nodes
    assert forced.target is torch.ops.aten.convolution.default
    assert sine.all_input_nodes == [view]


@pytest.mark.parametrize("moved", [False, True])
def test_one_pixel_under_another_name_is_left_alone_only_where_it_is_the_same_matrix(moved):
    """Behind kept weights all readers find eager's memory, but for those to which it makes no difference."""

    def function(x, w):
        y = torch.conv2d(x, w)
        y = torch.empty_strided((2, 4, 1, 1), (1, 2, 1, 1) if moved else (4, 1, 1, 1)).copy_(y[..., :1, :1])
        return (y * 2).as_strided((2, 4, 1, 1), (4, 1, 1, 1)) + 1

    graph = traced(function, IMAGE, WEIGHT).graph
    (read,) = graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default)
    read.args = read.args[:3]
    keep_eagers_memory(graph, kept_weights=True)
    forced = [node for node in graph.nodes if "force_stride_order" in str(node.target) and read in node.users]
    assert len(forced) == int(moved)
