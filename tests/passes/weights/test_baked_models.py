"""weights="baked" over models: eager's answers in float64, no foldable norm and no work on weights left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxpasses.cli.model_specs import load_model
from tests.helpers import image, randomised
from tests.passes.weights.baking import (
    baked,
    left_over,
    norms,
    require_same,
    signed,
)

aten = torch.ops.aten

SOME = {
    "timm:resnet18": 64,
    "timm:mobilenetv3_small_050": 64,
    "timm:nf_resnet26": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
}
MANY = {
    "timm:vit_tiny_patch16_224": 224,
    "torchvision:googlenet": 96,
    "timm:edgenext_xx_small": 64,
    "timm:convnext_atto": 64,
    "timm:regnetx_002": 64,
    "timm:repvgg_a0": 64,
    "timm:mobileone_s0": 64,
    "timm:swin_tiny_patch4_window7_224": 224,
    "timm:ghostnet_050": 64,
    "timm:tf_efficientnetv2_b0": 64,
    "timm:fbnetc_100": 64,
    "timm:hrnet_w18_small": 64,
    "timm:res2net50_14w_8s": 64,
    "timm:dla34": 64,
    "timm:cspresnet50": 64,
    "timm:skresnet18": 64,
    "timm:resnest14d": 64,
    "timm:efficientvit_b0": 64,
    "timm:inception_v3": 96,
    "timm:gernet_s": 64,
    "timm:mobilenetv4_conv_small": 64,
    "timm:coat_lite_tiny": 224,
    "timm:maxvit_rmlp_nano_rw_256": 256,
    "torchvision:mnasnet0_5": 64,
    "torchvision:vgg11_bn": 64,
    "torchvision:fcn_resnet50": 64,
    "torchvision:deeplabv3_mobilenet_v3_large": 64,
}
PARTLY = {
    "torchvision:densenet121": 62,
    "timm:mixnet_s": 34,
    "timm:resnetv2_50": 17,
    "timm:xcit_nano_12_p16_224": 12,
}
"""Norms that follow no convolution: of concatenations, in front of a ReLU or of a padded convolution."""


@pytest.mark.parametrize(
    ("spec", "size"),
    [*SOME.items(), *(pytest.param(*each, marks=pytest.mark.full) for each in MANY.items())],
)
def test_a_model_gives_eager_s_answers_without_norms_and_work_on_weights(spec, size):
    model, x = randomised(load_model(spec)), image(2, 3, size, size, grad=False)
    with torch.no_grad():
        program, report = baked(model, x)
        require_same(program.module()(x), model(x))
    assert not norms(program)
    # A class token is read again and again along the batch, which takes no memory as long as it is a view.
    assert all(0 in node.meta["val"].stride() for node in left_over(program))
    signed(program)
    constants = [name for name in program.state_dict if "baked" in name]
    assert len(constants) == report.kept_tensors
    assert sum(program.state_dict[name].nbytes for name in constants) == report.kept_bytes


@pytest.mark.full
@pytest.mark.parametrize(("spec", "count"), PARTLY.items())
def test_only_norms_that_cannot_be_folded_are_left(spec, count):
    model, x = randomised(load_model(spec)), image(2, 3, 224, 224, grad=False)
    with torch.no_grad():
        program, _ = baked(model, x)
        require_same(program.module()(x), model(x))
    assert len(norms(program)) == count
    signed(program)


@pytest.mark.full
@pytest.mark.parametrize("name", ["ResNetModel", "ConvNextModel", "MobileViTModel", "BertModel", "GPT2Model"])
def test_models_of_transformers_give_eager_s_answers(name):
    model = _small(name)
    given = (
        torch.randint(0, 9, (2, 7)) if name in ("BertModel", "GPT2Model") else image(2, 3, 64, 64, grad=False)
    )
    with torch.no_grad():
        expected = model(given).last_hidden_state
        program, _ = baked(model, given)
        require_same(program.module()(given).last_hidden_state, expected)
    assert not norms(program)
    signed(program)


def _small(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "BertModel": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        "GPT2Model": {"n_layer": 2, "n_embd": 32, "n_head": 2, "use_cache": False},
        "MobileViTModel": {"image_size": 64},
    }
    made = getattr(transformers, name)
    return randomised(made(made.config_class(**sizes.get(name, {}))))
