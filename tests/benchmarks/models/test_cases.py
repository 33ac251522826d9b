"""Cases: BatchNorms that do something, the same start for everyone, inputs of the right shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.models.accuracy import initial_state
from benchmarks.models.cases import (
    Case,
    CaseError,
    build_inputs,
    build_model,
    disable_regularisers,
    randomise_batch_norms,
    run_step,
)

TINY = "tests.benchmarks.tiny_models:tiny"


def test_every_batch_norm_does_something_and_always_the_same():
    state, again = initial_state(Case(TINY, size=8)), initial_state(Case(TINY, size=8))
    assert all(torch.equal(state[name], again[name]) for name in state)
    for norm in ("first_norm", "second_norm"):
        for name, neutral in (("running_mean", 0), ("running_var", 1), ("weight", 1), ("bias", 0)):
            assert (state[f"{norm}.{name}"] - neutral).abs().max() > 1e-3
        assert (state[f"{norm}.running_var"] > 0).all()


def test_a_channel_that_hardly_varies_is_not_divided_by_next_to_nothing():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def example_inputs(self, batch, size):
            return (100 + 1e-3 * torch.randn(batch, 3, size, size),)

        def forward(self, x):
            return self.norm(x)

    flat = Flat().eval()
    randomise_batch_norms(Case("", size=8), flat)
    assert (flat.norm.running_var > 0.4 * 100**2).all()
    assert (flat.norm.running_mean - 100).abs().max() < 0.5 * 100
    assert not flat.norm._forward_pre_hooks


def test_statistics_are_those_of_what_a_norm_reads_perturbed():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).train()
    randomise_batch_norms(Case("", size=32), net)
    first, second = net
    assert first.training
    assert ((first.running_var > 0.4) & (first.running_var < 1.6)).all()  # of a standard normal input
    expected = (first.weight**2 / first.running_var + first.bias**2).detach()
    assert ((second.running_var > 0.3 * expected) & (second.running_var < 3 * expected)).all()


def test_another_seed_gives_another_start():
    first, second = (initial_state(Case(TINY, size=8, seed=seed)) for seed in (0, 1))
    assert not torch.equal(first["first.weight"], second["first.weight"])


@pytest.mark.parametrize(
    ("mode", "training", "trainable"),
    [("inference", False, False), ("frozen-training", False, True), ("training", True, True)],
)
def test_the_mode_decides_about_statistics_and_gradients(mode, training, trainable):
    model = build_model(Case(TINY, mode=mode))
    assert model.training is training
    assert {parameter.requires_grad for parameter in model.parameters()} == {trainable}
    assert model.dropout.p == (0.0 if mode == "training" else 0.5)


def test_regularisers_are_switched_off_wherever_they_keep_their_probability():
    class DropPath(nn.Module):
        drop_prob = 0.3

    model = nn.Sequential(nn.Dropout2d(0.2), DropPath(), nn.AlphaDropout(0.1))
    model.drop_rate = 0.1
    disable_regularisers(model)
    assert [model[0].p, model[1].drop_prob, model[2].p, model.drop_rate] == [0.0] * 4


def test_gradients_are_those_of_one_step_alone():
    case = Case(TINY, mode="frozen-training", batch=2, size=8)
    model = build_model(case)
    inputs = build_inputs(case, model)
    gradients = []
    for _ in range(2):
        run_step(case, model, list(model.parameters()), inputs)
        gradients.append(model.first.weight.grad.clone())
    assert torch.equal(*gradients)


def test_inference_leaves_no_graph():
    case = Case(TINY, batch=2, size=8)
    model = build_model(case)
    step = run_step(case, model, [], build_inputs(case, model))
    assert step.loss is None
    assert not step.outputs[0].requires_grad


def test_inputs_are_images_unless_the_model_says_otherwise():
    class Tokens(nn.Module):
        def example_inputs(self, batch, size):
            return (torch.zeros(batch, size, dtype=torch.long), torch.zeros(batch, size))

    case = Case("", batch=2, size=8, dtype="bfloat16")
    (images,) = build_inputs(case, nn.Identity())
    tokens, mask = build_inputs(case, Tokens())
    assert (images.shape, images.dtype) == ((2, 3, 8, 8), torch.bfloat16)
    assert (tokens.shape, tokens.dtype, mask.dtype) == ((2, 8), torch.long, torch.bfloat16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "train"}, "valid: inference"),
        ({"dtype": "float8"}, "valid: float32"),
        ({"dynamic": "yes"}, "valid: none"),
        ({"batch": 0}, "at least 1"),
        ({"dynamic": "batch", "batch": 1}, "--batch 2 or more"),
    ],
)
def test_a_case_that_cannot_be_measured_is_refused(fields, message):
    with pytest.raises(CaseError, match=message):
        Case(TINY, **fields)


def test_a_model_without_parameters_in_its_outputs_cannot_be_trained():
    case = Case("", mode="training", batch=2, size=8)
    with pytest.raises(CaseError, match="cannot be trained"):
        run_step(case, nn.Identity(), [], build_inputs(case, nn.Identity()))
