"""Converted weights: other strides, and nothing else that anyone can see."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxpasses
from fxpasses.devices.unsafe import OVERRUN
from fxpasses.graph.names import canonical
from fxpasses.passes.weights.convert import (
    Conversion,
    MemoryFormatError,
    SpatialRankError,
    conversions,
    convert_conv_weights,
)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2)),
        nn.Conv2d(6, 6, 3, groups=3),
    ).double()


def is_channels_last(weight: torch.Tensor) -> bool:
    wanted = torch.channels_last if weight.dim() == 4 else torch.channels_last_3d
    return weight.is_contiguous(memory_format=wanted)


def converted(module: nn.Module, *arguments: object) -> tuple[str, ...]:
    """Converts, and gives the names whose strides have changed, which `conversions` must have foretold."""
    expected = conversions(module, *arguments)
    before = {name: weight.stride() for name, weight in initialised(module)}
    assert convert_conv_weights(module, *arguments) is module
    after = {name: weight.stride() for name, weight in initialised(module)}
    changed = tuple(name for name in before if before[name] != after[name])
    assert tuple(conversion.name for conversion in expected if conversion.changes) == changed
    for conversion in expected:
        if conversion.before:
            assert (conversion.before, conversion.after) == (before[conversion.name], after[conversion.name])
    return changed


def initialised(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    named = module.named_parameters()
    return [pair for pair in named if not isinstance(pair[1], nn.parameter.UninitializedParameter)]


def test_every_convolution_is_converted_however_deep():
    model = network()
    assert converted(model, torch.channels_last) == ("0.weight", "1.1.weight", "2.weight")
    assert all(is_channels_last(convolution.weight) for convolution in (model[0], model[1][1], model[2]))


def test_the_public_name_is_this_function():
    assert fxpasses.convert_conv_weights is convert_conv_weights


def test_the_module_is_returned_as_by_torchs_own_utilities():
    model = nn.Conv2d(3, 4, 3)
    theirs = nn.utils.convert_conv2d_weight_memory_format(copy.deepcopy(model), torch.channels_last)
    assert convert_conv_weights(module=model, memory_format=torch.channels_last) is model
    assert model.weight.stride() == theirs.weight.stride()


@pytest.mark.parametrize(("dims", "names"), [((2,), ("0.weight",)), ([3], ("1.weight",)), ({2, 3}, None)])
def test_the_spatial_dimensions_choose_what_is_converted(dims, names):
    model = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.ConvTranspose3d(3, 4, 3)])
    assert converted(model, torch.channels_last, dims) == (names or ("0.weight", "1.weight"))


@pytest.mark.parametrize("dims", [(1,), (2, 4), (), 2, "23", (2, None)])
def test_other_spatial_dimensions_are_refused_and_nothing_is_converted(dims):
    model = network()
    for function in (convert_conv_weights, conversions):
        with pytest.raises(SpatialRankError, match=r"such as \(2, 3\) or \(2,\); got"):
            function(model, torch.channels_last, dims)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_what_is_converted_and_why_a_weight_is_not_is_known_beforehand():
    model = nn.ModuleDict(
        {
            "plain": nn.Conv2d(4, 8, 3),
            "lies right": nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last),
            "computed": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)),
            "lazy": nn.LazyConv2d(8, 3),
            "unsafe": nn.Conv2d(3, 8, 1, stride=2),
            "one": nn.Conv2d(4, 4, 3),
            "other": nn.Conv2d(4, 4, 3),
            "linear": nn.Linear(3, 3),
        }
    )
    model["other"].weight = nn.Parameter(model["one"].weight.detach())
    shared = "another parameter or buffer lies in its memory"
    contiguous, channels_last = (36, 9, 3, 1), (36, 1, 12, 4)
    assert conversions(model, torch.channels_last) == (
        Conversion("plain.weight", contiguous, channels_last),
        Conversion("lies right.weight", channels_last, channels_last),
        Conversion("computed.weight", (), (), "it is computed at every call"),
        Conversion("lazy.weight", (), (), "it is not initialised yet"),
        Conversion("unsafe.weight", (3, 1, 1, 1), (3, 1, 1, 1), OVERRUN),
        Conversion("one.weight", contiguous, contiguous, shared),
        Conversion("other.weight", contiguous, contiguous, shared),
    )
    assert model["plain"].weight.is_contiguous()
    assert converted(model, torch.channels_last) == ("plain.weight",)


def test_a_weight_that_several_convolutions_read_suits_all_of_them():
    first, second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1, stride=2)
    second.weight = first.weight
    model = nn.ModuleList([first, second])
    assert [(conversion.name, conversion.left) for conversion in conversions(model, torch.channels_last)] == [
        ("0.weight", OVERRUN)
    ]
    assert converted(model, torch.channels_last) == ()


def test_values_and_parameter_objects_are_unchanged():
    model, before = network(), {}
    for name, parameter in model.named_parameters():
        before[name] = (parameter, parameter.detach().clone())
    convert_conv_weights(model, torch.channels_last)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_three_dimensional_convolutions_become_channels_last_3d():
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ConvTranspose3d(4, 2, 2))
    assert converted(model, torch.channels_last_3d) == ("0.weight", "1.weight")
    assert all(
        convolution.weight.is_contiguous(memory_format=torch.channels_last_3d) for convolution in model
    )


def test_one_format_serves_modules_of_both_ranks():
    model = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3)])
    convert_conv_weights(model, torch.channels_last)
    assert all(is_channels_last(convolution.weight) for convolution in model)


def test_one_dimensional_convolutions_and_linear_layers_are_left_alone():
    model = nn.ModuleList([nn.Conv1d(3, 4, 3), nn.Linear(3, 4)])
    assert converted(model, torch.channels_last) == ()


def test_there_and_back_again():
    model = network()
    strides = [parameter.stride() for parameter in model.parameters()]
    convert_conv_weights(model, torch.channels_last)
    convert_conv_weights(model, torch.contiguous_format)
    assert [parameter.stride() for parameter in model.parameters()] == strides


def test_a_second_conversion_changes_nothing():
    model = network()
    convert_conv_weights(model, torch.channels_last)
    assert converted(model, torch.channels_last) == ()


def test_outputs_and_gradients_stay_the_same():
    model, x = network(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    reference = copy.deepcopy(model)
    convert_conv_weights(model, torch.channels_last)
    for module in (model, reference):
        module(x).square().sum().backward()
    assert torch.allclose(model(x), reference(x), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_a_gradient_at_hand_is_converted_with_its_parameter():
    model = nn.Conv2d(4, 8, 3)
    model(torch.randn(1, 4, 8, 8)).sum().backward()
    before = model.weight.grad.clone()
    convert_conv_weights(model, torch.channels_last)
    assert model.weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.weight.grad, before)


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.Adam])
def test_an_optimiser_in_the_middle_of_its_work_goes_on(make):
    model, x = network(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    reference = copy.deepcopy(model)
    pairs = [(module, make(module.parameters())) for module in (model, reference)]
    for step in range(4):
        if step == 2:
            convert_conv_weights(model, torch.channels_last)
        for module, optimiser in pairs:
            optimiser.zero_grad()
            module(x).square().mean().backward()
            optimiser.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_state_dict_loads_into_converted_weights_and_they_stay_converted():
    source, model = network(), network()
    convert_conv_weights(model, torch.channels_last)
    model.load_state_dict(source.state_dict())
    assert torch.equal(model[0].weight, source[0].weight)
    assert is_channels_last(model[0].weight)


def test_a_converted_state_dict_loads_into_a_plain_model():
    source, model = network(), network()
    convert_conv_weights(source, torch.channels_last)
    model.load_state_dict(source.state_dict())
    assert torch.equal(model[0].weight, source[0].weight)
    assert model[0].weight.is_contiguous()


def test_tied_weights_stay_tied():
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    second.weight = first.weight
    model = nn.ModuleList([first, second])
    convert_conv_weights(model, torch.channels_last)
    assert second.weight is first.weight
    assert is_channels_last(first.weight)


def test_parameters_that_share_memory_without_being_one_are_left_alone():
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    second.weight = nn.Parameter(first.weight.detach())
    model = nn.ModuleList([first, second, nn.Conv2d(4, 4, 3)])
    assert converted(model, torch.channels_last) == ("2.weight",)
    assert first.weight.data_ptr() == second.weight.data_ptr()


def test_a_parametrised_weight_is_left_alone():
    model = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3))
    assert converted(model, torch.channels_last) == ()


def test_a_lazy_module_is_left_alone_until_it_is_initialised():
    model = nn.LazyConv2d(8, 3)
    assert converted(model, torch.channels_last) == ()
    model(torch.randn(1, 4, 8, 8))
    assert converted(model, torch.channels_last) == ("weight",)


def test_a_frozen_weight_stays_frozen():
    model = nn.Conv2d(4, 8, 3).requires_grad_(False)
    convert_conv_weights(model, torch.channels_last)
    assert not model.weight.requires_grad


@pytest.mark.parametrize("wanted", [torch.preserve_format, "channels_last", None])
def test_anything_else_is_refused_with_what_is_valid(wanted):
    with pytest.raises(MemoryFormatError, match=r"torch\.channels_last.*LayoutPlan"):
        convert_conv_weights(network(), wanted)


@pytest.mark.parametrize(
    "name",
    ["layer1.0.weight", "layer1_0_weight", "L_self_modules_layer1_modules_0_parameters_weight_"],
)
def test_a_parameter_has_one_name_in_graphs_and_modules(name):
    assert canonical(name) == "layer1_0_weight"


def test_a_module_with_the_name_of_a_prefix_keeps_its_name():
    assert (
        canonical("L_self_modules_b_modules_0_parameters_weight_") == canonical("b.0.weight") == "b_0_weight"
    )


@pytest.mark.parametrize("capture", ["compile", "export"])
def test_a_plan_converts_the_weights_that_it_wants_and_no_others(capture):
    model, x = network(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    options = {"layout": "channels_last"}
    with torch.no_grad():
        if capture == "export":
            plan = fxpasses.optimize(torch.export.export(model, (x,)), options=options).report.layout
        else:
            plan = fxpasses.explain(model, x, options=options | {"inner": "eager"}).layout
    # The second weight is [6, 2, 3, 3] of a grouped convolution; all three are wanted channels-last.
    assert set(plan.weights.values()) == {"channels_last"}
    assert converted(model, plan) == ("0.weight", "1.1.weight", "2.weight")
    plan = fxpasses.explain(model, x, options={"layout": "contiguous", "inner": "eager"}).layout
    assert converted(model, plan) == ("0.weight", "1.1.weight", "2.weight")
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    stranger = nn.ModuleDict({"elsewhere": nn.Conv2d(4, 8, 3)})
    assert [conversion.left for conversion in conversions(stranger, plan)] == ["the plan does not know it"]
    assert converted(stranger, plan) == ()
