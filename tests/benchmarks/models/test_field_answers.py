"""The suite `field` in float64: outputs, gradients and strides are eager's, whatever the options.

    plain      inner="aot_eager": the plan on Dynamo's graph, as copies that eager runs
    traced     the plan on the graphs that inductor would compile, run operator by operator
    inductor   generated code; with cached weights, packed ones

Each is called twice, with other weights the second time. Under ``layout="auto"`` costs are invented, so that
a plan has borders wherever it can.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import fxpasses
from benchmarks.models import field
from benchmarks.models.accuracy import initial_state
from benchmarks.models.cases import Case, build_inputs, build_model, tensors_of
from fxpasses.cli.model_specs import declare_torchvision_operators
from tests.passes.layout.test_layout_models import PATCHWORK, compiled, require_equal, traced

pytestmark = pytest.mark.full

LAYOUTS = ("auto", "off", "channels_last", "contiguous")
NORMED = (
    "yolo11n",
    "yolov8n_seg",
    "unet_resnet34",
    "deeplabv3plus_mobilenet_v2",
    "segformer",
    "r3d_18",
    "mc3_18",
    "maxvit_nano",
    "efficientvit_b0",
    "mobilenetv4_conv_small",
    "fastvit_t8",
)
"""Those with batch norms."""

Compile = Callable[[nn.Module], Callable[..., Any]]


@pytest.fixture(autouse=True)
def _in_float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear attention of timm's computes in float32 whatever it is given."""

    def attention(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        found = q @ (k.transpose(-1, -2) @ v)
        return found[..., :-1] / (found[..., -1:] + self.eps)

    if field._is_installed("timm"):
        declare_torchvision_operators()
        monkeypatch.setattr("timm.models.efficientvit_mit.LiteMLA._attn", attention)
    monkeypatch.setattr("fxpasses.devices.store.find", lambda device: PATCHWORK)


def built(name: str, mode: str = "inference") -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model, whose batch norms do something, and its inputs."""
    package = field.PACKAGES[name]
    pytest.importorskip(package, reason=f"{package} is not installed")
    case = Case(f"benchmarks.models.field:{name}", mode, batch=2, size=64, dtype="float64")
    model = build_model(case, initial_state(case))
    return model, build_inputs(case, model)


def answers(
    call: Callable[..., Any], model: nn.Module, inputs: Sequence[torch.Tensor], *, trains: bool
) -> dict[str, Any]:
    """Outputs and gradients of two calls, with all parameters changed in between."""
    found: dict[str, Any] = {}
    for turn in (0, 1):
        given = [x.detach().clone().requires_grad_(trains and x.is_floating_point()) for x in inputs]
        with torch.set_grad_enabled(trains):
            outputs = tensors_of(call(*given))
        found |= {f"output {turn}.{index}": output.detach() for index, output in enumerate(outputs)}
        leaves = {f"input {index}": x for index, x in enumerate(given)} | dict(model.named_parameters())
        leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        if trains:
            taken = [output for output in outputs if output.requires_grad]
            total = sum((output * _weights(output)).sum() for output in taken)
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            found |= {
                f"gradient {turn} of {name}": each for name, each in zip(leaves, gradients, strict=True)
            }
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
    return found


def _weights(output: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0, 1, output.numel(), dtype=output.dtype).view(output.shape)


def check(name: str, compile_: Compile, *, trains: bool = False, is_plain: bool = False) -> None:
    """Compares a compiled model with eager."""
    model, inputs = built(name, "frozen-training" if trains else "inference")
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    eager = answers(theirs, theirs, inputs, trains=trains)
    fxpasses.reset()
    torch.compiler.reset()
    found = answers(compile_(ours), ours, inputs, trains=trains)
    leaves = {f"input {index}": x for index, x in enumerate(inputs)} | dict(model.named_parameters())
    named = {f"gradient {turn} of {key}": leaf for key, leaf in leaves.items() for turn in (0, 1)}
    require_equal(found, eager, eager, named if is_plain else None)
    failed = [
        remark for report in fxpasses.reports() for remark in report.remarks if remark.status == "failed"
    ]
    assert not failed, "\n".join(map(str, failed))


@pytest.mark.parametrize("weights", ["live", "cached"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", field.PACKAGES)
def test_plain(name: str, layout: str, weights: str) -> None:
    check(name, compiled(inner="aot_eager", layout=layout, weights=weights))


@pytest.mark.parametrize("layout", ["auto", "channels_last", "contiguous"])
@pytest.mark.parametrize("name", field.PACKAGES)
def test_traced(name: str, layout: str) -> None:
    check(name, traced(layout=layout))


@pytest.mark.parametrize(("layout", "weights"), [("channels_last", "live"), ("off", "cached")])
@pytest.mark.parametrize("name", field.PACKAGES)
def test_inductor(name: str, layout: str, weights: str) -> None:
    check(name, compiled(layout=layout, weights=weights))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NORMED)
def test_frozen_training_plain(name: str, layout: str) -> None:
    check(name, compiled(inner="aot_eager", layout=layout), trains=True, is_plain=True)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("name", NORMED)
def test_frozen_training_traced(name: str, layout: str) -> None:
    check(name, traced(layout=layout), trains=True)


def test_all_with_batch_norms_are_trained() -> None:
    for name in field.PACKAGES:
        if field._is_installed(field.PACKAGES[name]):
            model, _ = built(name)
            normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
            assert normed == (name in NORMED), name
