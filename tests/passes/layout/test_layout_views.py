"""Views in the plan: norms over groups and attention over pixels read either layout, without copies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import CAPTURES, sampled_cases
from torch import nn

import fxpasses
from fxpasses.passes.layout.assign import assign
from fxpasses.passes.layout.network import Role
from fxpasses.report.layout_plan import CutEdge, LayoutPlan
from fxpasses.torch_internals.pytree import tree_leaves
from tests.passes.layout.test_graphs import context_of, labelled_at_random
from tests.passes.layout.test_inductor import MODES, check, outputs_and_gradients
from tests.passes.layout.test_joint import joint_graph
from tests.passes.layout.test_layout_models import traced

X = (2, 4, 6, 6)


def conv(kernel: int = 1, width: int = 8) -> nn.Conv2d:
    return nn.Conv2d(width, width, kernel, padding=kernel // 2)


class Norms(nn.Module):
    """Norms over groups of channels, with weights and without."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(4, 8, 3, padding=1), conv(3), conv(3)
        self.a, self.b = nn.GroupNorm(4, 8, affine=affine), nn.GroupNorm(2, 8, affine=affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(F.silu(self.a(self.first(x))))
        return self.third(F.silu(self.b(y)) + y)


class PlainNorms(Norms):
    def __init__(self) -> None:
        super().__init__(affine=False)


class PixelAttention(nn.Module):
    """Attention over pixels, as products of matrices of [N, H*W, C] and [N, C, H*W]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(4, 8), conv(3)
        self.q, self.k, self.v, self.out = conv(), conv(), conv(), conv()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        z = self.norm(y)
        n, c, h, w = z.shape
        q, k, v = (part(z).view(n, c, h * w) for part in (self.q, self.k, self.v))
        scores = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * c**-0.5, 2)
        mixed = torch.bmm(scores, v.permute(0, 2, 1)).permute(0, 2, 1).view(n, c, h, w)
        return self.last(y + self.out(mixed))


class TokenAttention(nn.Module):
    """The same over tokens with linear layers and heads, and the norm over [N, C, H*W]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(4, 8), conv(3)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        n, c, h, w = y.shape
        tokens = self.norm(y.view(n, c, h * w)).transpose(1, 2)
        q, k, v = (part(tokens).view(n, h * w, 2, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return self.last(self.out(mixed).transpose(-1, -2).reshape(n, c, h, w) + y)


class Squeezed(nn.Module):
    """Dimensions of size one come and go, rows are unflattened, one image is selected."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), conv(3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.first(x).unsqueeze(2).relu().squeeze(2)
        y = y.flatten(2).sigmoid().unflatten(2, (y.shape[2], y.shape[3]))
        z = self.last(y.unflatten(1, (2, 4)).tanh().flatten(1, 2))
        return z, z.select(0, 1) * 2


class Tokens(nn.Module):
    """A vision transformer's way in: pixels become tokens, with a layer norm and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.patch = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 2, stride=2)
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.place = nn.Parameter(torch.randn(1, 9, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(self.first(x)).flatten(2).transpose(1, 2) + self.place
        return tokens + self.linear(self.norm(tokens))


class Merged(nn.Module):
    """A view that glues channels to pixels, one that glues images to channels, and a shuffle of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), conv(3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.first(x)
        n, c, h, w = y.shape
        rows = (y.view(n, c * h, w) + 1).view(n, c, h, w)
        columns = (y.view(n * c, h, w) * 2).view(n, c, h, w)
        shuffled = y.view(n, 2, 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last(rows + columns + shuffled), y.flatten(1)


class Shuffles(nn.Module):
    """Channels are shuffled, pixels made of channels and channels of pixels, an image of windows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(4, 8, 3, padding=1), conv(3), nn.Conv2d(2, 8, 1)
        self.fourth, self.last = nn.Conv2d(32, 8, 1), conv(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        n, c, h, w = y.shape
        y = self.second(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))
        y = self.third(F.pixel_shuffle(y, 2))
        y = self.fourth(F.pixel_unshuffle(y, 2)).contiguous()
        windows = y.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        image = windows.relu().view(n, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        return self.last(image + y)


class Rows(nn.Module):
    """Operators that keep what they read in order, and such as take any."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.act = nn.Conv2d(4, 8, 3, padding=1), conv(3), nn.PReLU(8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.act(self.first(x)).flip(3)
        z = self.last(torch.softmax(y, 1) + torch.log_softmax(y, 2) + torch.cumsum(y, 1))
        w = torch.slice_scatter(z, y[:, :2] * 2, 1, 3, 5)
        return w, w.argmax(1), torch.logsumexp(w, (1, 2)), w.argmin(2)


FREE = [Norms, PlainNorms, PixelAttention, TokenAttention]
KINDS = [*FREE, Shuffles, Rows, Squeezed, Tokens, Merged]


def model_and_input(kind: type[nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return kind().double().eval(), torch.randn(X, dtype=torch.float64, requires_grad=True)


def inside(plan: LayoutPlan) -> list[CutEdge]:
    """The copies that are neither of inputs and weights, nor of results and gradients."""
    return [
        edge
        for edge in plan.cut_edges
        if edge.operator not in ("placeholder", "get_attr") and set(edge.wanted_by) != {"output"}
    ]


def plan_of(model: nn.Module, x: torch.Tensor, mode: str = "inference") -> LayoutPlan:
    """The plan of the graph that inductor would generate code for."""
    torch.compiler.reset()
    fxpasses.reset()
    model.train(mode == "training")
    with torch.set_grad_enabled(mode != "inference"):
        compiled = traced(layout="channels_last")(model)
        outputs_and_gradients(compiled, x.detach().requires_grad_(mode != "inference"), mode)
    plan = fxpasses.last_report().layout
    assert plan is not None
    assert plan.decision == "applied"
    return plan


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", FREE)
def test_nothing_is_copied_around_norms_of_groups_and_attention(kind, batch):
    plan = plan_of(kind(), torch.randn(batch, *X[1:]))
    assert inside(plan) == []
    assert plan.repairs == 0


@pytest.mark.parametrize("kind", [Norms, PlainNorms])
def test_nothing_is_copied_around_norms_of_groups_in_training(kind):
    plan = plan_of(kind(), torch.randn(X), "training")
    assert inside(plan) == []
    assert plan.repairs == 0


def test_a_view_that_glues_channels_to_pixels_or_images_is_copied_for():
    plan = plan_of(Merged(), torch.randn(X))
    wanting = {name for edge in inside(plan) for name in edge.wanted_by}
    assert {"view", "view_2"} <= wanting


@pytest.mark.parametrize("executor", ["eager", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_labelling_gives_the_same_values_and_strides(kind, executor):
    model, x = model_and_input(kind)
    program = CAPTURES["pre_dispatch"](model, (x,))
    expected = tree_leaves(model(x))
    for module in labelled_at_random(program, (x,), executor, 8):
        found = tree_leaves(module(x))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            if executor == "eager":
                assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("kind", KINDS)
def test_any_labelling_of_a_joint_graph_gives_the_same_outputs_and_gradients(kind):
    model, x = model_and_input(kind)
    graph_module, inputs = joint_graph(model.train(), x)
    with torch.no_grad():
        expected = graph_module(*inputs)
        for module in labelled_at_random(graph_module, inputs, "fused", 6):
            for ours, theirs in zip(module(*inputs), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_models_equal_eager(kind, mode):
    check(*model_and_input(kind), mode)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["auto", "contiguous"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_models_equal_eager_in_other_layouts(kind, mode, layout):
    check(*model_and_input(kind), mode, layout=layout)


@pytest.mark.parametrize("kind", sampled_cases(FREE, [Norms]))
def test_one_compilation_holds_for_all_sizes(kind):
    torch.compiler.reset()
    model, _ = model_and_input(kind)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fxpasses", options={"layout": "channels_last"}, fullgraph=True)
    fxpasses.reset()
    with torch.no_grad():
        for batch, height, width in ((2, 6, 6), (3, 8, 5), (5, 4, 9)):
            x = torch.randn(batch, 4, height, width, dtype=torch.float64)
            for d in (0, 2, 3):
                torch._dynamo.mark_dynamic(x, d)
            ours, theirs = compiled(x), eager(x)
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            assert ours.stride() == theirs.stride()
    assert len(fxpasses.reports()) == 1
    plan = fxpasses.last_report().layout
    assert plan is not None
    assert inside(plan) == []


def test_a_view_that_the_caller_gets_shares_the_memory_of_the_input():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.conv(x.view(2, 2, 2, 6, 6).tanh().flatten(1, 2)), x.view(2, 2, 2, 36)

    model, x = Shared().eval(), torch.randn(X)
    for run in (
        torch.compile(model, backend="fxpasses", options={"layout": "channels_last"}),
        fxpasses.optimize(
            CAPTURES["pre_dispatch"](model, (x,)), (x,), {"layout": "channels_last"}
        ).graph_module,
    ):
        with torch.no_grad():
            _, view = run(x)
        assert view.data_ptr() == x.data_ptr()
        assert view.stride() == (144, 72, 36, 1)


def test_what_no_convolution_is_connected_with_stays_as_it_is_traced():
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.conv(x), (other * 2).relu().sum((1, 2))

    model, x = Apart().eval(), torch.randn(X)
    program = CAPTURES["pre_dispatch"](model, (x, x))
    with torch.no_grad():
        report = fxpasses.optimize(program, (x, x), {"layout": "channels_last"}).report
    assert report.layout.copies == 3  # the image, the weight, and the result


def roles(forward, *inputs: torch.Tensor, executor: str = "fused") -> dict[str, Role]:
    """How each operator of a graph is treated, by its name; of one for inductor unless told otherwise."""
    context = context_of(CAPTURES["pre_dispatch"](forward, inputs), inputs, executor)
    return {node.name: role for node, role in assign(context, "channels_last").network.roles.items()}


def weight(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes)


def test_tensors_of_frames_that_do_not_agree_are_refused():
    def forward(x, y):
        groups = torch.conv2d(x, weight(8, 4, 1, 1)).view(2, 2, 4, 36)
        return groups + torch.conv2d(y, weight(2, 3, 1, 1))

    found = roles(forward, torch.randn(X), torch.randn(2, 3, 4, 36))
    assert (found["view"], found["add"]) == (Role.LABELLED, Role.EXACT)


def test_statistics_of_another_frame_are_read_as_they_are():
    def forward(x, scale):
        groups = torch.conv2d(x, weight(8, 4, 1, 1)).view(2, 2, 4, 36)
        return torch.conv2d((groups * (scale * 2)).view(2, 8, 6, 6), weight(8, 8, 1, 1))

    found = roles(forward, torch.randn(X), torch.randn(2, 2, 4, 1))
    assert {found[name] for name in ("view", "mul", "mul_1", "view_1")} == {Role.LABELLED}


def test_a_view_as_another_type_is_forced():
    def forward(x):
        return torch.conv2d(x, weight(8, 4, 1, 1)).view(torch.int32) + 1

    assert roles(forward, torch.randn(X))["view"] is Role.EXACT


def test_what_a_linear_layer_gives_is_an_image_once_it_lies_like_one():
    def forward(x):
        pixels = torch.mm(torch.conv2d(x, weight(8, 4, 1, 1)).flatten(2)[0].t(), weight(8, 8))
        image = pixels.view(1, 6, 6, 8).sigmoid().permute(0, 3, 1, 2)
        return torch.conv2d(image, weight(8, 8, 1, 1))

    context = context_of(CAPTURES["pre_dispatch"](forward, (torch.randn(X),)), (torch.randn(X),), "fused")
    assignment = assign(context, "channels_last")
    (image,) = [node for node in assignment.network.tensors if "permute" in node.name]
    assert assignment.network.tensors[image].original == "channels_last"
    assert inside(assignment.plan) == []


def test_a_mean_over_pixels_that_are_one_dimension_is_read_in_either_layout():
    def forward(x):
        return torch.conv2d(x, weight(8, 4, 1, 1)).flatten(2).mean(2)

    def of_rows(x):
        return torch.conv2d(x, weight(8, 4, 1, 1)).view(2, 2, 4, 6, 6).mean(4)

    assert roles(forward, torch.randn(X))["mean"] is Role.LABELLED
    # Code is generated in either layout; a kernel gives a contiguous tensor, whatever it reads.
    assert roles(of_rows, torch.randn(X))["mean"] is Role.LABELLED
    assert roles(of_rows, torch.randn(X), executor="eager")["mean"] is Role.FREE


def test_copies_that_a_graph_makes_to_glue_dimensions_are_made_in_the_layout_that_is_wanted():
    plan = plan_of(Shuffles(), torch.randn(X))
    assert inside(plan) == []
    assert plan.repairs == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.softmax(x, 1),
        lambda x: torch.log_softmax(x, 2),
        lambda x: torch.cumsum(x, 1),
        lambda x: torch.cumprod(x, 3),
        lambda x: torch.bmm(x.flatten(2), x.flatten(2).mT),
    ],
)
def test_what_takes_any_strides_gives_the_same_ones(call):
    x = torch.randn(X)
    there = x.contiguous(memory_format=torch.channels_last)
    assert call(there).stride() == call(x).stride()
    torch.testing.assert_close(call(there), call(x))


def test_copies_of_a_graph_that_is_run_as_it_is_stay_as_they_are():
    def forward(x):
        return torch.conv2d(x, weight(8, 4, 1, 1)).clone(memory_format=torch.contiguous_format) + 1

    x = torch.randn(X)
    program = CAPTURES["pre_dispatch"](forward, (x,))
    anew = {name: assign(context_of(program, (x,), name)).network.anew for name in ("eager", "fused")}
    assert len(anew["fused"]) == 1
    assert anew["eager"] == set()
