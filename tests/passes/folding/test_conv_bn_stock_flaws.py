"""Where the conv-BN pass that torch ships gives wrong answers or crashes, and what it does right.

Each flaw is shown right at every capture level where it exists: rewritten with eager's numbers, or declined
with a reason. What the shipped pass gets right is kept.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import EVERYWHERE, SAMPLED, check, check_compiled, image, pair, randomised
from torch import nn

sampled = pytest.mark.parametrize("capture", SAMPLED)


class Functional(nn.Module):
    """A convolution called with the given arguments, then a batch norm module."""

    def __init__(self, function: Any, weight: torch.Tensor, channels: int, **arguments: Any) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments
        self.weight = nn.Parameter(weight)
        self.shift = nn.Parameter(torch.randn(channels))
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.function(x, self.weight, **self.arguments))


class KeywordBias(Functional):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.function(x, self.weight, bias=self.shift, **self.arguments))


class EveryKeyword(Functional):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.function(bias=self.shift, weight=self.weight, input=x, **self.arguments)
        return F.batch_norm(
            input=result,
            running_var=self.bn.running_var,
            running_mean=self.bn.running_mean,
            bias=self.bn.bias,
            weight=self.bn.weight,
            training=False,
        )


def _another_axis(capture: str) -> str:
    """Decomposition reshapes to and from the rank that the kernel wants, which stands between the two."""
    return "no-producer" if capture == "aten" else "channel-axis"


# Silent wrong answers -------------------------------------------------------------------------------


@sampled
@pytest.mark.parametrize("model", [KeywordBias, EveryKeyword])
def test_keyword_bias_is_honoured(capture: str, model: type[Functional]) -> None:
    check(capture, randomised(model(F.conv2d, torch.randn(4, 3, 3, 3), 4)), (image(),), 1)


@sampled
@pytest.mark.parametrize(
    "arguments",
    [
        {"stride": 2},
        {"padding": 1},
        {"padding": "same"},
        {"padding": "valid"},
        {"dilation": 2},
        {"stride": (1, 2), "padding": (2, 0), "dilation": (1, 2)},
    ],
    ids=str,
)
def test_keyword_geometry_is_honoured(capture: str, arguments: dict[str, Any]) -> None:
    model = randomised(Functional(F.conv2d, torch.randn(4, 3, 3, 3), 4, **arguments))
    check(capture, model, (image(),), 1)


@sampled
def test_keyword_geometry_of_a_transposed_convolution_is_honoured(capture: str) -> None:
    arguments = {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2}
    model = randomised(KeywordBias(F.conv_transpose2d, torch.randn(3, 4, 3, 3), 4, **arguments))
    check(capture, model, (image(),), 1)


@sampled
@pytest.mark.parametrize("shape", [(2, 4, 3), (4, 4, 3)], ids=str)
def test_linear_on_three_dimensions_is_normalised_over_the_middle_one(
    capture: str, shape: tuple[int, ...]
) -> None:
    """The result is [N, 4, 4]: the sizes agree and the axes do not."""
    check(capture, pair(nn.Linear(3, 4), nn.BatchNorm1d(4)), (image(*shape),), _another_axis(capture))


@sampled
def test_linear_on_four_dimensions_is_normalised_over_the_second_one(capture: str) -> None:
    check(capture, pair(nn.Linear(3, 4), nn.BatchNorm2d(4)), (image(2, 4, 5, 3),), _another_axis(capture))


@sampled
def test_linear_on_two_dimensions_is_rewritten(capture: str) -> None:
    check(capture, pair(nn.Linear(3, 4), nn.BatchNorm1d(4)), (image(5, 3),), 1)


@sampled
@pytest.mark.parametrize(
    ("conv", "norm", "shape"),
    [
        (nn.Conv2d(3, 6, 3), nn.BatchNorm1d(6), (3, 8, 8)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm2d(3), (2, 4, 4, 4)),
        (nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm1d(6), (3, 4, 4)),
        (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), (3, 8)),
    ],
    ids=["conv2d", "conv3d", "transposed", "conv1d"],
)
def test_unbatched_convolution_is_normalised_over_another_axis(
    capture: str, conv: nn.Module, norm: nn.Module, shape: tuple[int, ...]
) -> None:
    """The result is [C_out, H, ...] with H == C_out, and the batch norm takes H for the channels."""
    check(capture, pair(conv, norm), (image(*shape),), _another_axis(capture))


class WriteBetween(nn.Module):
    """Something is written to between the convolution and the batch norm."""

    def __init__(self, victim: str) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.victim = victim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1  # a leaf that requires grad cannot be written to
        y = self.conv(x)
        if self.victim == "input":
            x.mul_(3)
        elif self.victim == "view of the input":
            x[:, :2].mul_(3)
        elif self.victim == "input by index":
            x[:, 0] = 0
        elif self.victim == "nothing":
            x = x * 3
        return self.bn(y) + x.mean()


VICTIMS = ("input", "view of the input", "input by index", "nothing")


@pytest.mark.parametrize(
    ("capture", "victim"),
    # symbolic_trace refuses item assignment itself.
    [each for each in itertools.product(EVERYWHERE, VICTIMS) if each != ("symbolic_trace", "input by index")],
)
def test_input_written_after_the_convolution_is_read_before_that(capture: str, victim: str) -> None:
    """The write makes eager's backward of the convolution fail, so there are only outputs to compare."""
    model = randomised(WriteBetween(victim))
    check(capture, model, (image(),), 1, grads=False, profit="always")


class WeightUpdatedBetween(nn.Module):
    """The weight is updated in place after the convolution has read it."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.bn, self.what = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        with torch.no_grad():
            if self.what == "weight":
                self.conv.weight.mul_(2)
            elif self.what == "bias through data":
                self.conv.bias.data.add_(1)
            elif self.what == "gamma":
                self.bn.weight.mul_(2)
            elif self.what == "statistics":
                self.bn.running_var.mul_(4)
            elif self.what == "weight and gamma":
                self.conv.weight.mul_(2)
                self.bn.weight.mul_(2)
        return self.bn(y)


@pytest.mark.parametrize(
    ("what", "outcome"),
    [
        ("weight", 1),
        ("bias through data", 1),
        ("gamma", 1),
        ("statistics", 1),
        ("weight and gamma", "mutation"),
        ("nothing", 1),
    ],
)
def test_parameters_updated_between_are_read_where_eager_reads_them(what: str, outcome: int | str) -> None:
    model = randomised(WeightUpdatedBetween(what))
    check_compiled(model, (image(),), outcome, grads=False, profit="always")


def test_statistics_of_an_exported_program_may_share_memory_with_anything() -> None:
    """Nothing in the program says that its inputs are apart, so a write to one may be a write to another."""
    model = randomised(WeightUpdatedBetween("statistics"))
    check("export", model, (image(grad=False),), "mutation", grads=False, profit="always")


class NoGrad(nn.Module):
    """Each of the two layers under its own grad mode."""

    def __init__(self, conv_grad: bool, norm_grad: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv_grad, self.norm_grad = conv_grad, norm_grad
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.conv_grad):
            y = self.conv(x)
        with torch.set_grad_enabled(self.norm_grad):
            z = self.bn(y)
        return z * self.scale


@pytest.mark.parametrize("capture", ["compile", "pre_dispatch"])
@pytest.mark.parametrize(
    ("conv_grad", "norm_grad", "outcome"),
    [(False, True, "grad-mode"), (True, False, "grad-mode"), (False, False, 1), (True, True, 1)],
)
def test_convolution_under_another_grad_mode_keeps_its_gradients(
    capture: str, conv_grad: bool, norm_grad: bool, outcome: int | str
) -> None:
    check(capture, randomised(NoGrad(conv_grad, norm_grad)), (image(),), outcome, profit="always")


@pytest.mark.parametrize("grads", [(False, True), (True, False), (False, False)])
def test_a_grad_mode_region_of_an_exported_program_is_not_left(grads: tuple[bool, bool]) -> None:
    """Export puts each region into a graph of its own, so the two layers never meet."""
    check("export", randomised(NoGrad(*grads)), (image(),), "no-producer", profit="always")


class BothUnderNoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = self.bn(self.conv(x))
        return y * self.scale


@pytest.mark.parametrize("capture", ["compile", "pre_dispatch", "export"])
def test_both_layers_in_one_grad_mode_region_are_rewritten_inside_it(capture: str) -> None:
    check(capture, randomised(BothUnderNoGrad()), (image(),), 1, profit="always")


def test_hooks_of_a_leaf_module_are_not_dropped() -> None:
    for target in (0, 1):
        model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        model[target].register_forward_hook(lambda module, args, output: output * 2)  # type: ignore[index]
        check("symbolic_trace", model, (image(),), "hooks")


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_are_traced_into_the_graph(target: int, kind: str) -> None:
    """Dynamo inlines hooks: one between the two keeps them apart, one before or after does not."""
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    module = model[target]  # type: ignore[index]
    if kind == "forward":
        module.register_forward_hook(lambda module, args, output: output * 2)
    else:
        module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    between = (target, kind) in ((0, "forward"), (1, "forward_pre"))
    check_compiled(model, (image(),), "no-producer" if between else 1)


def test_old_weight_norm_on_a_leaf_module_is_not_ignored() -> None:
    """It recomputes the weight in a forward-pre hook."""
    with torch.no_grad():  # a weight with a history could not be copied
        conv = torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    check("symbolic_trace", pair(conv, nn.BatchNorm2d(4)), (image(),), "hooks")


class OutputSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x, output_size=[10, 10]))


@sampled
def test_output_size_of_a_transposed_convolution_is_kept(capture: str) -> None:
    outcome = "output-size" if capture == "symbolic_trace" else 1
    check(capture, randomised(OutputSize()), (image(2, 3, 4, 4),), outcome)


# Crashes --------------------------------------------------------------------------------------------


@sampled
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("conv", "norm", "inputs", "outputs", "groups"),
    [
        (nn.ConvTranspose1d, nn.BatchNorm1d, 4, 6, 2),
        (nn.ConvTranspose2d, nn.BatchNorm2d, 4, 6, 2),
        (nn.ConvTranspose2d, nn.BatchNorm2d, 4, 4, 4),
        (nn.ConvTranspose2d, nn.BatchNorm2d, 4, 12, 4),
        (nn.ConvTranspose3d, nn.BatchNorm3d, 4, 4, 2),
    ],
)
def test_grouped_transposed_convolution_scales_the_right_channels(
    capture: str,
    bias: bool,
    conv: type[nn.Module],
    norm: type[nn.Module],
    inputs: int,
    outputs: int,
    groups: int,
) -> None:
    size = (2, inputs, *[4] * int(conv.__name__[-2]))
    model = pair(conv(inputs, outputs, 2, stride=2, groups=groups, bias=bias), norm(outputs))
    check(capture, model, (image(*size),), 1)


@sampled
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_convolution_with_float32_batch_norm_gives_half(capture: str, half: torch.dtype) -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), torch.float32)
    model[0].to(half)  # type: ignore[index]
    check_half(capture, model, half)


def check_half(capture: str, model: nn.Module, half: torch.dtype) -> None:
    """Outputs only: gradients of half types have no yardstick that is tight."""
    check(capture, model, (image(dtype=half, grad=False),), 1, grads=False, profit="always")


class Dotted(nn.Module):
    """Layers that live two modules down."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {"stem": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features["stem"](x)


@sampled
def test_dotted_module_names_are_followed(capture: str) -> None:
    check(capture, randomised(Dotted()), (image(),), 1)


@sampled
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_without_running_statistics_uses_the_batch(capture: str, affine: bool) -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine, track_running_stats=False))
    # Decomposition writes it as an operator without statistics, which is no site at all.
    check(capture, model, (image(),), 0 if capture == "aten" else "training-mode")


class DefaultArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var)


@sampled
def test_functional_batch_norm_with_default_arguments(capture: str) -> None:
    check(capture, randomised(DefaultArguments()), (image(),), 1)


# Correct in the shipped pass, and kept --------------------------------------------------------------


@sampled
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: nn.BatchNorm2d(4, momentum=None),
        lambda: nn.BatchNorm2d(4, eps=0.5),
        lambda: nn.SyncBatchNorm(4),
    ],
    ids=["affine=False", "momentum=None", "eps", "SyncBatchNorm"],
)
def test_variants_of_batch_norm_are_rewritten(capture: str, norm: Any) -> None:
    check(capture, pair(nn.Conv2d(3, 4, 3), norm()), (image(),), 1)


@sampled
def test_lazy_modules_are_rewritten_once_they_are_materialised(capture: str) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).double()
    model(image(grad=False))
    check(capture, randomised(model), (image(),), 1)


@sampled
def test_parametrised_weight_norm_trains_through_the_rewrite(capture: str) -> None:
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    outcome = "parametrized" if capture == "symbolic_trace" else 1
    check(capture, pair(conv, nn.BatchNorm2d(4)), (image(),), outcome)


@sampled
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_and_depthwise_convolutions_are_rewritten(capture: str, groups: int, bias: bool) -> None:
    model = pair(nn.Conv2d(4, 8, 3, groups=groups, bias=bias), nn.BatchNorm2d(8))
    check(capture, model, (image(2, 4, 6, 6),), 1)


class SharedConvolution(nn.Module):
    """One convolution under two batch norms; gradients add up in its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn1(self.conv(x)) - self.bn2(self.conv(x * 2))


@sampled
def test_shared_convolution_is_rewritten_at_both_calls(capture: str) -> None:
    check(capture, randomised(SharedConvolution()), (image(),), 2)


@sampled
def test_gamma_of_zeros_still_gets_its_gradient(capture: str) -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].weight.zero_()  # type: ignore[index]
    check(capture, model, (image(),), 1)


PARAMETERS = ("0.weight", "0.bias", "1.weight", "1.bias")


@pytest.mark.parametrize("frozen", range(1, 16))
def test_frozen_parameters_get_no_gradient_and_the_others_theirs(frozen: int) -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    parameters = dict(model.named_parameters())
    for bit, name in enumerate(PARAMETERS):
        parameters[name].requires_grad_(not frozen >> bit & 1)
    check_compiled(model, (image(),), 1, profit="always")


@pytest.mark.parametrize("capture", ["pre_dispatch", "export", "symbolic_trace"])
@pytest.mark.parametrize("frozen", PARAMETERS)
def test_a_frozen_parameter_gets_no_gradient_in_a_held_graph(capture: str, frozen: str) -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    dict(model.named_parameters())[frozen].requires_grad_(False)
    check(capture, model, (image(),), 1, profit="always")


def test_dynamic_shapes_are_rewritten_once_for_all_sizes() -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    compiled = torch.compile(model, backend="fxpasses", dynamic=True, options={"inner": "eager"})
    for size in ((2, 3, 8, 9), (3, 3, 9, 7), (4, 3, 16, 5)):
        x = image(*size)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    import fxpasses

    assert [dict(report.applied) for report in fxpasses.reports()] == [{"efficient_conv_bn_eval": 1}]


def test_functional_gradients_are_eagers() -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    parameters = {name: each.detach() for name, each in model.named_parameters()}
    buffers = dict(model.named_buffers())
    x = image(grad=False)

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, (values, buffers), (x,)).square().sum()

    expected = torch.func.grad(loss)(parameters)
    compiled = torch.compile(torch.func.grad(loss), backend="fxpasses", options={"inner": "eager"})
    import fxpasses

    with fxpasses.testing.expect(efficient_conv_bn_eval=1):
        found = compiled(parameters)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)


def test_second_derivatives_are_eagers() -> None:
    model = pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    compiled = torch.compile(model, backend="fxpasses", options={"inner": "eager"})
    x = image()
    results = []
    for call in (model, compiled):
        (first,) = torch.autograd.grad(call(x).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, *model.parameters()]))
    import fxpasses

    assert fxpasses.last_report().applied == {"efficient_conv_bn_eval": 1}
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class TwoReaders(nn.Module):
    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.returned = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), returned

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return (self.bn(y), y) if self.returned else self.bn(y) + y


@sampled
@pytest.mark.parametrize("returned", [True, False])
def test_convolution_that_somebody_else_reads_is_left_alone(capture: str, returned: bool) -> None:
    check(capture, randomised(TwoReaders(returned)), (image(),), "multiple-users")


# The same behind real inductor ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "outcome"),
    [
        (lambda: pair(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)), (2, 4, 4, 4), 1),
        (lambda: pair(nn.Linear(3, 4), nn.BatchNorm1d(4)), (2, 4, 3), "channel-axis"),
    ],
    ids=["grouped transposed", "linear on three dimensions"],
)
def test_flaws_are_right_behind_inductor(model: Any, shape: tuple[int, ...], outcome: int | str) -> None:
    check_compiled(model(), (image(*shape),), outcome, inner="inductor")
