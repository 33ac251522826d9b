"""Known architectures under plans that act: values, gradients and strides are those of eager.

Costs are invented, so that a plan has borders wherever it can: every convolution has a layout that it gains
by, drawn from its sizes, and copies cost next to nothing. Three ways to run the result:

    inductor   generated code: the plan on the joint graph of forward and backward
    traced     the same graphs, run operator by operator instead of being compiled
    plain      inner="aot_eager": the plan on Dynamo's graph, as copies that eager runs
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpasses
from fxpasses.cli.model_specs import load_model
from fxpasses.devices.profile import DeviceProfile, Estimate, Layout, Roofline
from fxpasses.options import Options
from fxpasses.passes.layout.joint import joint_layout
from fxpasses.report import counters
from fxpasses.report.report import Report
from fxpasses.torch_internals.pytree import tree_leaves

MODES = ("inference", "frozen_statistics", "training")

IMAGE = (2, 3, 64, 64)


class UNet(nn.Module):
    """An encoder of timm with a decoder: features are upsampled and concatenated with the larger ones."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.encoder = timm.create_model("resnet18", features_only=True)
        widths = self.encoder.feature_info.channels()
        self.blocks = nn.ModuleList()
        for above, below in zip(widths[-2::-1], widths[:0:-1], strict=True):
            convolution = nn.Conv2d(above + below, above, 3, padding=1, bias=False)
            self.blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(above), nn.ReLU()))
        self.up = nn.ConvTranspose2d(widths[0], 8, 2, stride=2)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *features, y = self.encoder(x)
        for block, skip in zip(self.blocks, features[::-1], strict=True):
            up = F.interpolate(y, size=skip.shape[2:], mode="bilinear", align_corners=False)
            y = block(torch.cat([up, skip], 1))
        return self.head(self.up(y))


ARCHITECTURES: dict[str, tuple[int, ...]] = {
    "timm:resnet18": IMAGE,
    "timm:resnet50": IMAGE,
    "timm:resnext50_32x4d": IMAGE,
    "timm:regnetx_002": IMAGE,
    "timm:regnety_008": IMAGE,
    "timm:convnext_atto": IMAGE,
    "timm:coatnet_nano_rw_224": (1, 3, 224, 224),
    "timm:mobilevit_xxs": IMAGE,
    "timm:densenet121": IMAGE,
    "timm:efficientnet_b0": IMAGE,
    "timm:mobilenetv2_100": IMAGE,
    "timm:mobilenetv3_small_100": IMAGE,
    "timm:repvgg_a0": IMAGE,
    "timm:ghostnet_100": IMAGE,
    "timm:hrnet_w18_small": IMAGE,
    "timm:dla34": IMAGE,
    "timm:rexnet_100": IMAGE,
    "timm:inception_v3": (2, 3, 128, 128),
    "torchvision:shufflenet_v2_x0_5": IMAGE,
    "torchvision:squeezenet1_1": IMAGE,
    "torchvision:vgg11_bn": (2, 3, 32, 32),
    "torchvision:fcn_resnet50": IMAGE,
    "torchvision:deeplabv3_mobilenet_v3_large": IMAGE,
    "torchvision:r3d_18": (2, 3, 8, 32, 32),
    "tests.passes.layout.test_layout_models:UNet": IMAGE,
}

GENERATED = (
    "timm:resnet18",
    "timm:regnety_008",
    "timm:convnext_atto",
    "timm:mobilevit_xxs",
    "timm:mobilenetv3_small_100",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:r3d_18",
    "tests.passes.layout.test_layout_models:UNet",
)
"""Those that are compiled by inductor too, which takes the longest."""


ROUNDED = (
    "timm:mobilenetv3_small_100",
    "timm:ghostnet_100",
    "torchvision:deeplabv3_mobilenet_v3_large",
)
"""Those with a hard sigmoid: eager's kernel for its gradient rounds 1/6 to float32, its decomposition does
not (3e-8 apart in stock inductor too), so that gradients are compared with those of decomposed operators."""


UNIT_STRIDES = (
    "timm:convnext_atto",
    "timm:coatnet_nano_rw_224",
    "torchvision:deeplabv3_mobilenet_v3_large",
)
"""Those whose weight gradients eager's kernels and torch's fake ones give other strides in dimensions of
size 1 (1x1, depthwise or dilated, where eager's activations are channels-last); inductor, stock too, follows
the fake ones."""


@dataclass(frozen=True)
class Patchwork(DeviceProfile):
    """Costs by which about half of all convolutions gain by either layout, and copies are nearly free."""

    def seconds(
        self,
        operator: str,
        key: str,
        layout: Layout,
        dtype: str = "float32",
        *,
        implementations: Collection[str] | None = None,
    ) -> Estimate | None:
        if not operator.startswith("convolution."):
            return None
        gains = ("contiguous", "channels_last")[zlib.crc32(f"{operator} {key}".encode()) % 2]
        return Estimate(1e-4 if layout == gains else 1e-2, "aten.convolution")

    def copy_seconds(
        self, num_bytes: int, layout: Layout, dtype: str = "float32", *, of_weight: bool = False
    ) -> float | None:
        return 1e-8


PATCHWORK = Patchwork("here", "2", rooflines=(Roofline("float32", 1e12, 1e12, 1e12, 1e-9),))


@pytest.fixture
def patchwork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxpasses.devices.store.find", lambda device: PATCHWORK)


def build(spec: str, mode: str) -> nn.Module:
    """The architecture in float64, without dropout, with statistics that are no identity."""
    torch.manual_seed(0)
    model = load_model(spec).double().train(mode == "training")
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(getattr(module, "drop_rate", None), float):
            module.drop_rate = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def outputs_and_gradients(call: Callable[..., Any], model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Outputs; with gradients on, those of the input and of all parameters, for a weighted sum of outputs."""
    outputs = tree_leaves(call(x))
    found = {f"output {i}": output for i, output in enumerate(outputs)}
    if torch.is_grad_enabled():
        weights = [
            torch.linspace(0, 1, output.numel(), dtype=output.dtype).view(output.shape) for output in outputs
        ]
        total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        names = ["x", *(name for name, _ in model.named_parameters())]
        gradients = torch.autograd.grad(total, [x, *model.parameters()], allow_unused=True)
        found |= {f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return found | dict(model.named_buffers())


def require_equal(
    found: dict[str, Any],
    exact: dict[str, Any],
    eager: dict[str, Any],
    leaves: dict[str, torch.Tensor] | None = None,
    *,
    ones_count: bool = True,
) -> None:
    """Values to 1e-9 of the tensor's largest, or rounding against the largest gradient; eager's strides.

    Args:
        found: what is tested.
        exact: the right values.
        eager: eager's.
        leaves: what gradients belong to, where they may have its strides instead of eager's.
        ones_count: whether the strides of dimensions of size 1 are compared.
    """
    assert found.keys() == eager.keys()
    gradients = [
        gradient for name, gradient in exact.items() if name.startswith("gradient") and gradient is not None
    ]
    noise = 1e-13 * max((_largest(gradient) for gradient in gradients), default=0.0)
    for name, theirs in eager.items():
        ours, right = found[name], exact[name]
        assert (ours is None) == (theirs is None), name
        if theirs is None:
            continue
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        kept = [d for d, size in enumerate(theirs.shape) if size != 1 or ones_count]
        sources = [theirs, *([leaves[name]] if leaves and name in leaves else [])]
        valid = [[source.stride(d) for d in kept] for source in sources]
        assert [ours.stride(d) for d in kept] in valid, (name, ours.shape, ours.stride(), valid)
        # A bias in front of a batch norm in training has a gradient of zero, up to rounding.
        allowed = 1e-9 * _largest(right) + (noise if name.startswith("gradient") else 1e-12)
        assert _largest(ours - right) <= allowed, name


def _largest(given: torch.Tensor) -> float:
    return float(given.detach().abs().max()) if given.numel() else 0.0


def check(
    model: nn.Module,
    x: torch.Tensor,
    mode: str,
    compile_: Callable[[nn.Module], Callable[..., Any]],
    exact: Callable[[nn.Module], Callable[..., Any]] | None = None,
    *,
    is_plain: bool = False,
    ones_count: bool = True,
) -> Report:
    """Runs the model compiled and in eager, and compares; gives the report.

    Args:
        model: in the mode that `mode` stands for.
        x: its input.
        mode: one of `MODES`.
        compile_: from the model to what is tested.
        exact: from the model to what has the right values, where that is not eager.
        is_plain: whether autograd runs over the graph. Eager gives some contiguous weights gradients that are
            channels-last (`.grad` has the parameter's strides in any case); we give them the parameter's.
        ones_count: as in `require_equal`.
    """

    def run(compile_: Callable[[nn.Module], Callable[..., Any]]) -> dict[str, Any]:
        torch.compiler.reset()
        mine = copy.deepcopy(model)
        given = x.detach().clone().requires_grad_(mode != "inference")
        with torch.set_grad_enabled(mode != "inference"):
            return outputs_and_gradients(compile_(mine), mine, given)

    fxpasses.reset()
    found = run(compile_)
    report = Report.merge(fxpasses.reports())
    eager = run(lambda model: model)
    leaves = {f"gradient of {name}": leaf for name, leaf in (("x", x), *model.named_parameters())}
    right = run(exact) if exact is not None else eager
    require_equal(found, right, eager, leaves if is_plain else None, ones_count=ones_count)
    return report


def decomposed(spec: str, mode: str) -> Callable[[nn.Module], Callable[..., Any]] | None:
    """What has the right gradients where eager has not."""
    if spec not in ROUNDED or mode == "inference":
        return None
    return lambda model: torch.compile(model, backend="aot_eager_decomp_partition")


def compiled(**options: object) -> Callable[[nn.Module], Callable[..., Any]]:
    """torch.compile with options of ours."""
    return lambda model: torch.compile(model, backend="fxpasses", options=options)


def traced(**options: object) -> Callable[[nn.Module], Callable[..., Any]]:
    """As `compiled`, but inductor generates no code: the graphs that it would compile are run as they are."""
    from torch._inductor.compile_fx import compile_fx

    from fxpasses.pipeline import run_passes

    chosen = Options(**options)

    def inner_compile(graph_module: Any, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        def call(given: list[Any]) -> Any:
            return graph_module(*given)

        call._boxed_call = True
        return call

    def backend(graph_module: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        rewritten, report = run_passes(graph_module, inputs, chosen, executor="fused")
        layout = joint_layout(rewritten, inputs, chosen)
        assert layout is not None
        patches = layout.patches({"fx_graph_cache": False})
        run = compile_fx(rewritten, list(inputs), inner_compile=inner_compile, config_patches=patches)
        counters.record(layout.completed(report))
        return run

    return lambda model: torch.compile(model, backend=backend)


def require_borders(report: Report) -> None:
    """The plan acted: it has convolutions in both layouts, and copies between them."""
    plan = report.layout
    assert plan is not None
    assert report.applied["layout"] >= 1
    assert plan.decision == "applied"
    assert {convolution.label for convolution in plan.convolutions} == {"contiguous", "channels_last"}
    assert plan.copies > 0
    assert plan.seconds <= min(plan.contiguous_seconds, plan.channels_last_seconds) + 1e-12


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", ARCHITECTURES)
def test_traced(spec: str, mode: str, patchwork: None) -> None:
    x = torch.randn(ARCHITECTURES[spec], dtype=torch.float64)
    strict = spec not in UNIT_STRIDES
    require_borders(check(build(spec, mode), x, mode, traced(), decomposed(spec, mode), ones_count=strict))


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", ARCHITECTURES)
def test_plain(spec: str, mode: str, patchwork: None) -> None:
    x = torch.randn(ARCHITECTURES[spec], dtype=torch.float64)
    ours = compiled(inner="aot_eager")
    require_borders(check(build(spec, mode), x, mode, ours, is_plain=True))


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", GENERATED)
def test_inductor(spec: str, mode: str, patchwork: None) -> None:
    x = torch.randn(ARCHITECTURES[spec], dtype=torch.float64)
    strict = spec not in UNIT_STRIDES
    require_borders(check(build(spec, mode), x, mode, compiled(), decomposed(spec, mode), ones_count=strict))


@pytest.mark.full
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("way", ["traced", "plain"])
@pytest.mark.parametrize(
    "spec",
    [
        "timm:regnety_008",
        "timm:convnext_atto",
        "timm:mobilevit_xxs",
        "torchvision:shufflenet_v2_x0_5",
        "torchvision:r3d_18",
    ],
)
def test_one_layout_throughout(spec: str, way: str, layout: str, mode: str) -> None:
    x = torch.randn(ARCHITECTURES[spec], dtype=torch.float64)
    ours = traced(layout=layout) if way == "traced" else compiled(layout=layout, inner="aot_eager")
    strict = spec not in UNIT_STRIDES
    report = check(build(spec, mode), x, mode, ours, is_plain=way == "plain", ones_count=strict)
    assert {convolution.label for convolution in report.layout.convolutions} == {layout}
    # Contiguous they are without us, but for activations between permutes in some.
    valid = {"applied"} if layout == "channels_last" else {"applied", "no-gain"}
    assert report.layout.decision in valid


DYNAMIC = {
    "timm:resnet18": (0, 2, 3),
    "timm:mobilenetv2_100": (0, 2, 3),
    "timm:regnety_008": (0,),
    "timm:densenet121": (0,),
    "torchvision:r3d_18": (0,),
    "tests.passes.layout.test_layout_models:UNet": (0, 2, 3),
}
"""Architectures with dimensions that vary. H and W vary in inference only: the lowering of a convolution's
backward fixes them in stock inductor too."""


@pytest.mark.full
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("way", ["traced", "plain"])
@pytest.mark.parametrize("spec", DYNAMIC)
def test_one_compilation_serves_all_sizes(spec: str, way: str, mode: str, patchwork: None) -> None:
    model = build(spec, mode)
    dims = DYNAMIC[spec] if mode == "inference" else (0,)
    torch.compiler.reset()
    fxpasses.reset()
    mine = copy.deepcopy(model)
    run = (traced() if way == "traced" else compiled(inner="aot_eager"))(mine)
    shape = ARCHITECTURES[spec]
    for step in (0, 1, 2):
        sizes = [size + (step if d == 0 else 32 * step) * (d in dims) for d, size in enumerate(shape)]
        # Gradients of the input are left to the static tests, where their strides are plain numbers.
        x = torch.randn(sizes, dtype=torch.float64)
        for d in dims:
            torch._dynamo.mark_dynamic(x, d)
        with torch.set_grad_enabled(mode != "inference"):
            found, eager = (tree_leaves(call(x)) for call in (run, model))
            for ours, theirs in zip(found, eager, strict=True):
                assert ours.stride() == theirs.stride()
                assert _largest(ours - theirs) <= 1e-9 * _largest(theirs)
            if mode != "inference":
                for trained, outputs in ((mine, found), (model, eager)):
                    trained.zero_grad()
                    sum(output.square().mean() for output in outputs).backward()
                gradients = ({n: p.grad for n, p in trained.named_parameters()} for trained in (mine, model))
                gradients, expected = gradients
                require_equal(gradients, expected, expected)
    assert len(fxpasses.reports()) == 1
    require_borders(fxpasses.last_report())
