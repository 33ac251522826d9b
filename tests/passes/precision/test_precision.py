"""Float32 models compute their products in bfloat16 on request, and everything else as before."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lowered import LOWER, Lowered, gives, relative
from torch import nn

import fxpasses
from fxpasses.cli.model_specs import load_model
from fxpasses.errors import UnknownOptionError
from fxpasses.graph.names import base_name
from fxpasses.testing import expect
from tests.helpers import image, randomised

UNIT_ROUNDOFF = 2.0**-8
"""Half the distance from 1 to the next bfloat16."""


def close(found: torch.Tensor, expected: torch.Tensor, depth: int) -> None:
    """Fails unless the error is that of `depth` layers, each of which rounds its operands and its result."""
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    assert 0 < relative(found, expected) < 3 * depth * UNIT_ROUNDOFF


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(8, 16, 3), (2, 8, 20)),
        (nn.Conv2d(8, 16, 3, padding=1), (2, 8, 9, 9)),
        (nn.Conv3d(4, 8, 3), (1, 4, 5, 6, 7)),
        (nn.ConvTranspose1d(8, 4, 3, stride=2), (2, 8, 9)),
        (nn.ConvTranspose2d(8, 4, 3, stride=2), (2, 8, 9, 9)),
        (nn.ConvTranspose3d(4, 4, 2), (1, 4, 4, 5, 6)),
        (nn.Linear(32, 16), (5, 7, 32)),
        (nn.Linear(32, 16, bias=False), (5, 32)),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, nn.Module) else "",
)
def test_each_kind_of_layer_computes_in_bfloat16_and_gives_float32(layer, shape):
    x = torch.randn(shape)
    lowered = Lowered(layer)
    close(lowered(x), layer(x), depth=1)
    assert len(lowered.in_bfloat16()) == 1
    assert lowered.report.precision.operators == 1


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: a @ b,
        lambda a, b: torch.bmm(a, b),
        lambda a, b: torch.baddbmm(torch.ones(1), a, b),
        lambda a, b: torch.mm(a[0], b[0]),
        lambda a, b: torch.addmm(b[0, 0], a[0], b[0]),
        lambda a, b: a.matmul(b),
        lambda a, b: F.scaled_dot_product_attention(a, a, a),
    ],
)
def test_each_product_computes_in_bfloat16(product):
    a, b = torch.randn(3, 8, 16), torch.randn(3, 16, 16)
    lowered = Lowered(product)
    close(lowered(a, b), product(a, b), depth=1)
    assert lowered.report.precision.operators == 1


def test_what_follows_a_layer_stays_in_bfloat16_up_to_the_next_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 16, 1), nn.Linear(64, 4)

        def forward(self, x):
            y = F.hardswish(F.max_pool2d(F.relu(self.a(x)), 2))
            left, right = y.chunk(2, dim=1)
            z = torch.cat([F.pad(left, (0, 0)), right.sigmoid() * left], 1)
            z = self.b(z[:, 4:12]) + y
            z = F.interpolate(F.dropout(z, 0.5, training=False), scale_factor=2)
            return self.c(F.adaptive_avg_pool2d(z, 2).transpose(1, 2).flatten(1))

    model, x = Net(), image(2, 3, 10, 10, dtype=torch.float32, grad=False)
    lowered = Lowered(model)
    close(lowered(x), model(x), depth=3)
    assert not any(gives(node, torch.float32) for node in lowered.graph.nodes if base_name(node) != "to")
    back = [to for _, to in lowered.casts() if to == torch.float32]
    assert len(back) == 1


def test_norms_softmax_reductions_and_losses_get_float32():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x):
            y = self.b(self.norm(self.a(x)))
            return y.softmax(-1), y.exp(), y.mean(), y.var(1), F.mse_loss(y, x), y.cumsum(0), y.log1p()

    model, x = Net(), torch.rand(8, 16) + 1
    lowered = Lowered(model)
    lowered(x)
    assert {base_name(node) for node in lowered.in_bfloat16()} == {"linear"}
    # Seven readers share one cast.
    assert [to for _, to in lowered.casts()].count(torch.float32) == 2


def test_each_value_is_cast_once_whoever_reads_it():
    layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
    lowered = Lowered(lambda x: [layer(x).softmax(0) for layer in layers] + [x.exp()])
    lowered(torch.randn(4, 8))
    casts = lowered.casts()
    assert len(casts) == len(set(casts)) == 1 + 3 * 4
    assert lowered.report.precision.casts == len(casts)


def test_norms_are_folded_in_float32_before_anything_is_rounded():
    model = randomised(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True)), torch.float32
    )
    x = image(dtype=torch.float32, grad=False)
    lowered = Lowered(model)
    with expect(efficient_conv_bn_eval=1, precision=1):
        close(lowered(x), model(x), depth=1)
    assert [base_name(node) for node in lowered.in_bfloat16()] == ["conv2d", "relu"]
    expected = copy.deepcopy(model)
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(expected[0], expected[1])
    halved = F.relu(folded.bfloat16()(x.bfloat16())).float()
    torch.testing.assert_close(lowered(x), halved, rtol=2 * UNIT_ROUNDOFF, atol=1e-2)


@pytest.mark.parametrize("weights", ["live", "cached"])
def test_updates_of_parameters_are_seen(weights):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), torch.randn(2, 3, 9, 9)
    lowered = Lowered(model, weights=weights)
    before = lowered(x)
    with torch.no_grad():
        model[2].weight.mul_(-2)
    close(lowered(x), model(x), depth=2)
    assert relative(before, model(x)) > 0.5
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    read = [source.name for source, _ in lowered.casts()]
    assert any("weight" in name for name in read) == (weights == "live")
    assert lowered.report.kept_tensors == (4 if weights == "cached" else 0)


def test_inductor_packs_kept_weights_in_bfloat16_for_onednn():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    x = torch.randn(2, 3, 8, 8)
    chosen = {**LOWER, "inner": "inductor", "weights": "cached"}
    compiled = torch.compile(model, backend="fxpasses", options=chosen)
    with torch.no_grad():
        close(compiled(x), model(x), depth=2)
        model[0].weight.mul_(-2)
        close(compiled(x), model(x), depth=2)
    report = fxpasses.last_report()
    assert report.precision.operators == 2
    assert len(report.precision.errors) == 1
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert report.packed_tensors == 2
        assert not [remark for remark in report.declined if remark.rule == "packed_weights"]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_batch_of_any_size_runs_the_same_program(inner):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 4)).eval()
    compiled = torch.compile(model, backend="fxpasses", options={**LOWER, "inner": inner}, dynamic=True)
    with torch.no_grad():
        for batch in (2, 5, 3):
            x = torch.randn(batch, 3, 8, 8)
            close(compiled(x), model(x), depth=2)
    assert len(fxpasses.reports()) == 1


def test_images_in_channels_last_stay_so():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 9, 9).to(memory_format=torch.channels_last)
    close(Lowered(model)(x), model(x), depth=2)


def test_a_mask_of_attention_that_bfloat16_does_not_hold_stays_float32():
    mask = torch.zeros(4, 4)
    mask[:, 2:] = torch.finfo(torch.float32).min
    mask[3] = torch.finfo(torch.float32).min
    q = torch.randn(2, 2, 4, 16)

    def attend(q):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    lowered = Lowered(attend)
    close(lowered(q), attend(q), depth=1)
    assert lowered.report.precision.errors


@pytest.mark.usefixtures("without_fast_path")
@pytest.mark.parametrize("need_weights", [True, False])
def test_an_attention_layer_is_one_product(need_weights):
    layer, x = nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 7, 32)

    def attend(x):
        return [found for found in layer(x, x, x, need_weights=need_weights) if found is not None]

    lowered = Lowered(attend)
    for found, expected in zip(lowered(x), attend(x), strict=True):
        close(found, expected, depth=3)
    assert lowered.report.precision.operators == 1
    assert len(lowered.report.precision.errors) == 1 + need_weights


# Models ----------------------------------------------------------------------------------------------------


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)


@pytest.mark.parametrize(
    ("make", "shape", "depth"),
    [
        (lambda: load_model("timm:resnet18"), (2, 3, 64, 64), 18),
        (lambda: load_model("timm:mobilenetv3_small_100"), (2, 3, 64, 64), 30),
        (encoder, (2, 7, 32), 4),
    ],
    ids=["resnet18", "mobilenetv3", "encoder"],
)
@pytest.mark.usefixtures("without_fast_path")
def test_a_model_is_no_further_from_float64_than_twice_autocast(make, shape, depth):
    model, x = make().eval(), torch.randn(shape)
    lowered = Lowered(model, weights="cached")
    found = lowered(x)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(x).float()
        plain = model(x)
    assert found.dtype == torch.float32
    assert found.stride() == plain.stride()
    assert relative(found, exact) <= 2 * relative(autocast, exact)
    assert relative(found, exact) <= 3 * depth * UNIT_ROUNDOFF
    (error,) = lowered.report.precision.errors
    assert error == pytest.approx(relative(found, plain), rel=0.05)


# Options ---------------------------------------------------------------------------------------------------


def test_an_unknown_precision_is_an_error_that_names_the_known_ones():
    with pytest.raises(UnknownOptionError, match="bfloat16"):
        fxpasses.Options(precision="bf16")


def test_nothing_is_lowered_unless_asked_for():
    lowered = Lowered(nn.Linear(8, 8), precision="eager")
    lowered(torch.randn(2, 8))
    assert lowered.in_bfloat16() == []
    assert lowered.report.precision is None


def test_the_pass_is_left_out_by_its_name():
    lowered = Lowered(nn.Linear(8, 8), disable=("precision",))
    lowered(torch.randn(2, 8))
    assert lowered.in_bfloat16() == []


def test_the_key_of_a_pipeline_tells_precisions_apart():
    from fxpasses.rewrite.registry import pipeline_key

    keys = {pipeline_key(fxpasses.Options(precision=each)) for each in ("eager", "bfloat16")}
    assert len(keys) == 2


def test_an_exported_program_is_lowered_too_and_its_weights_baked():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), torch.randn(2, 3, 9, 9)
    for weights in ("live", "baked"):
        with torch.no_grad():
            program = torch.export.export(model, (x,))
            chosen = {"precision": "bfloat16", "profit": "always", "weights": weights}
            result = fxpasses.optimize(program, options=chosen)
            close(result.exported_program.module()(x), model(x), depth=2)
        assert result.report.precision.operators == 2
        assert result.report.precision.errors == ()
    assert all(held.dtype == torch.bfloat16 for held in result.exported_program.state_dict.values())
