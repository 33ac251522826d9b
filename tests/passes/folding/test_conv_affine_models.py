"""Models that people fine-tune with FrozenBatchNorm or LayerScale: every one folded, with eager's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import sampled_cases
from torch import nn

import fxpasses
from fxpasses.cli.model_specs import declare_torchvision_operators
from fxpasses.testing import assert_close_to_eager, assert_rewrites

RULE = "conv_affine"
ALWAYS = {"inner": "aot_eager", "profit": "always"}


def frozen_batch_norm(channels: int) -> nn.Module:
    declare_torchvision_operators()
    from torchvision.ops.misc import FrozenBatchNorm2d

    return FrozenBatchNorm2d(channels)


def with_statistics(model: nn.Module) -> nn.Module:
    """No frozen batch norm is the identity."""
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    return model


def block() -> nn.Module:
    """A bottleneck's end: two frozen batch norms and a residual connection."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), frozen_batch_norm(6)
            self.conv2, self.bn2 = nn.Conv2d(6, 4, 1, bias=False), frozen_batch_norm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.bn1(self.conv1(x)))
            return torch.relu(self.bn2(self.conv2(y)) + x)

    return with_statistics(Block())


def layer_scale() -> nn.Module:
    """LayerScale after the last linear layer of a branch."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
            self.gamma = nn.Parameter(torch.randn(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.nn.functional.gelu(self.up(x))) * self.gamma

    return Branch()


@pytest.mark.parametrize("inner", sampled_cases(["aot_eager", "inductor"], ["aot_eager"]))
def test_frozen_batch_norms_of_a_residual_block(inner: str) -> None:
    options = {"inner": inner, "profit": "always"}
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    assert_rewrites(block().double(), (x,), {RULE: 2}, options=options)


def test_frozen_batch_norms_are_folded_by_default_where_kernels_are_not_fused() -> None:
    x = torch.randn(2, 4, 96, 96, dtype=torch.float64)
    assert_rewrites(block().double(), (x,), {RULE: 2}, options={"inner": "aot_eager"})


def test_frozen_batch_norms_are_left_to_a_compiler_that_fuses_them() -> None:
    x = torch.randn(2, 4, 96, 96)
    compiled = torch.compile(block(), backend="fxpasses", options={"inner": lambda gm, inputs: gm.forward})
    compiled(x)
    declined = [each for each in fxpasses.last_report().declined if each.rule == RULE]
    assert [each.code for each in declined] == ["nothing-saved"] * 2
    assert str(2 * 6 * 96 * 96 * 4) in declined[0].message


@pytest.mark.parametrize("inner", sampled_cases(["aot_eager", "inductor"], ["aot_eager"]))
def test_layer_scale_that_trains_saves_its_input(inner: str) -> None:
    """By default: gamma's gradient would need what it multiplies."""
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert_rewrites(layer_scale().double(), (x,), {RULE: 1}, options={"inner": inner})


# Whole models


def train(call: Callable[..., torch.Tensor], model: nn.Module) -> tuple[torch.Tensor, list[Any]]:
    loss = call()
    loss.backward()
    return loss.detach(), [each.grad for each in model.parameters()]


def require_same(found: tuple[Any, list[Any]], expected: tuple[Any, list[Any]]) -> None:
    """The losses agree to 1e-9, and each parameter's gradients.

    A key's bias has no effect on attention: its gradient is rounding noise (1e-24), and not compared.
    """
    assert_close_to_eager("loss", [found[0]], [expected[0]], [expected[0]])
    assert [each is None for each in found[1]] == [each is None for each in expected[1]]
    largest = max(each.abs().max() for each in expected[1] if each is not None)
    for ours, eager in zip(found[1], expected[1], strict=True):
        if eager is not None and eager.abs().max() > 1e-18 * largest:
            assert_close_to_eager("gradient", [ours], [eager], [eager])


def faster_rcnn() -> nn.Module:
    declare_torchvision_operators()
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    torch.manual_seed(0)
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, trainable_backbone_layers=5)
    # Without weights torchvision takes batch norms that train; a checkpoint brings frozen ones.
    return with_statistics(_frozen(model)).double()


def _frozen(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, frozen_batch_norm(child.num_features))
        else:
            _frozen(child)
    return model


def count(model: nn.Module, kind: str) -> int:
    return sum(type(each).__name__ == kind for each in model.modules())


@pytest.mark.full
def test_every_frozen_batch_norm_of_faster_rcnn_is_folded(capsys: pytest.CaptureFixture[str]) -> None:
    """The backbone with its feature pyramid and the proposal head: all that has convolutions."""
    eager = faster_rcnn()
    assert count(eager, "FrozenBatchNorm2d") == 53
    ours = copy.deepcopy(eager)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)

    def loss(model: Any) -> torch.Tensor:
        features = list(model.backbone(x).values())
        scores, boxes = model.rpn.head(features)
        return sum(each.square().mean() for each in (*features, *scores, *boxes))

    compiled = torch.compile(loss, backend="fxpasses", options=ALWAYS)
    with fxpasses.testing.expect(conv_affine=53):
        found = train(lambda: compiled(ours), ours)
    expected = train(lambda: loss(eager), eager)
    print(dict(fxpasses.Report.merge(fxpasses.reports()).applied))
    require_same(found, expected)


@pytest.fixture
def box_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suppression of boxes in Python, where torchvision's compiled operators are not there."""
    declare_torchvision_operators()
    from torchvision import extension
    from torchvision.ops import boxes

    if extension._has_ops():
        return

    def batched_nms(found: Any, scores: Any, groups: Any, threshold: float) -> torch.Tensor:
        keep: list[int] = []
        for each in scores.argsort(descending=True).tolist():
            rivals = [other for other in keep if groups[other] == groups[each]]
            overlap = boxes.box_iou(found[each][None], found[rivals]) if rivals else torch.zeros(1)
            if overlap.max() <= threshold:
                keep.append(each)
        return torch.tensor(keep)

    monkeypatch.setattr(boxes, "batched_nms", torch.compiler.disable(batched_nms))


@pytest.mark.full
def test_the_whole_of_faster_rcnn_trains_as_in_eager(box_operators: None) -> None:
    """Its four losses and the gradients of all parameters, through proposals, pooling and heads."""
    eager = faster_rcnn().train()
    eager.rpn._pre_nms_top_n = {"training": 50, "testing": 50}
    eager.transform.min_size, eager.transform.max_size = (64,), 96
    ours = copy.deepcopy(eager)
    images = [torch.rand(3, 64, 64, dtype=torch.float64)]
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]).double(), "labels": torch.tensor([1])}]

    def loss(model: Any) -> torch.Tensor:
        torch.manual_seed(1)  # anchors and proposals are sampled
        return torch.stack([each for _, each in sorted(model(images, targets).items())]).sum()

    compiled: Any = torch.compile(ours, backend="fxpasses", options=ALWAYS)
    with fxpasses.testing.expect(conv_affine=53):
        found = train(lambda: loss(compiled), ours)
    require_same(found, train(lambda: loss(eager), eager))


def detr(depths: list[int], widths: list[int], layer_type: str) -> nn.Module:
    declare_torchvision_operators()
    transformers = pytest.importorskip("transformers", reason="not installed: pip install -e '.[bench]'")

    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=widths[0] // 4 if layer_type == "bottleneck" else widths[0],
        hidden_sizes=widths,
        depths=depths,
        layer_type=layer_type,
        out_features=[f"stage{len(depths)}"],
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        encoder_layers=1,
        decoder_layers=1,
        d_model=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
        attn_implementation="eager",
    )
    # DETR freezes the stem; here all of the backbone trains.
    return with_statistics(transformers.DetrForObjectDetection(config)).double().eval().requires_grad_(True)


def check_detr(eager: nn.Module, expected_count: int) -> None:
    assert count(eager, "DetrFrozenBatchNorm2d") == expected_count
    ours = copy.deepcopy(eager)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)

    def loss(model: Any) -> torch.Tensor:
        given = model(pixel_values=x)
        return given.logits.square().mean() + given.pred_boxes.square().mean()

    compiled = torch.compile(loss, backend="fxpasses", options=ALWAYS)
    with fxpasses.testing.expect(conv_affine=expected_count):
        found = train(lambda: compiled(ours), ours)
    expected = train(lambda: loss(eager), eager)
    require_same(found, expected)


def test_every_frozen_batch_norm_of_a_small_detr_is_folded() -> None:
    check_detr(detr([1, 1], [8, 16], "basic"), 6)


@pytest.mark.full
def test_every_frozen_batch_norm_of_detr_with_resnet50_is_folded() -> None:
    check_detr(detr([3, 4, 6, 3], [256, 512, 1024, 2048], "bottleneck"), 53)
