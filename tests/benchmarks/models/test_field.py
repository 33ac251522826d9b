"""The suite `field`: what it is made of, what is left out where packages are missing, and its vocoder."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrize

from benchmarks.models import __main__ as models
from benchmarks.models import field
from benchmarks.models.arguments import say_what_is_left_out
from benchmarks.models.vocoder import MELS, HifiGan
from tests.benchmarks.refusals import refusal

PREFIX = "benchmarks.models.field:"


@pytest.fixture
def only_torch(monkeypatch):
    """No package of a suite is installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name == "torch" else None)


def planned(*arguments: str) -> tuple[str, ...]:
    """The models that a command would run."""
    suite, _, _ = models._plan(models._parser().parse_args(arguments))
    return suite.models


def test_every_model_of_the_suite_is_a_function_without_arguments():
    assert all(callable(getattr(field, name)) for name in field.PACKAGES)


def test_the_suite_stands_for_all_that_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert planned("--suite", "field") == tuple(PREFIX + name for name in field.PACKAGES)
    assert not field.not_installed()


@pytest.mark.usefixtures("only_torch")
def test_what_is_not_installed_is_left_out_by_name():
    assert planned("--suite", "field") == (PREFIX + "hifi_gan",)
    missing = field.not_installed()
    assert len(missing) == len(field.PACKAGES) - 1
    assert "yolo11n (ultralytics)" in missing
    assert "unet_resnet34 (segmentation_models_pytorch)" in missing


@pytest.mark.usefixtures("only_torch")
@pytest.mark.parametrize(("arguments", "said"), [(["--suite", "field"], True), ([], False)])
def test_the_command_says_what_is_left_out_of_a_suite(arguments, said):
    console = Console(record=True, quiet=False, width=1000)
    say_what_is_left_out(models._parser().parse_args(arguments), console)
    assert ("not installed and left out: yolo11n (ultralytics)" in console.export_text()) is said


def test_without_a_suite_the_models_are_those_named():
    assert planned() == ("resnet18",)
    assert planned("--models", "resnet18, resnet50,resnet18") == ("resnet18", "resnet50")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--suite", "field", "--models", "resnet18"], "not allowed with argument"),
        (["--suite", "farm"], "invalid choice"),
    ],
)
def test_other_ways_to_name_a_suite_are_refused(arguments, reason, capsys):
    assert reason in refusal(models.main, arguments, capsys)


def test_the_vocoder_makes_256_samples_of_a_frame_by_one_dimensional_convolutions_alone():
    generator = HifiGan(width=32).double().eval()
    (mels,) = generator.example_inputs(2, 70)
    assert mels.shape == (2, MELS, 10)
    with torch.no_grad():
        sound = generator(mels.double())
    assert sound.shape == (2, 1, 2560)
    assert sound.isfinite().all()
    assert sound.abs().max() <= 1
    kinds = {type(module).__mro__[1] for module in generator.modules() if hasattr(module, "stride")}
    assert kinds == {nn.Conv1d, nn.ConvTranspose1d}


def test_every_weight_of_the_vocoder_is_normalised():
    convolutions = [module for module in HifiGan().modules() if hasattr(module, "stride")]
    assert len(convolutions) == 2 + 4 + 4 * 3 * 6
    assert all(parametrize.is_parametrized(module, "weight") for module in convolutions)


def test_inputs_are_the_same_each_time_and_sizes_are_what_models_take():
    network = field.Network(nn.Identity(), field._image)
    (first,), (again,) = (network.example_inputs(2, 100) for _ in range(2))
    assert first.shape == (2, 3, 96, 96)
    assert torch.equal(first, again)
    assert field._two_images(1, 32)[0].shape == (1, 3, 128, 128)
    assert field._latent(1, 224)[0].shape == (1, 4, 28, 28)


def test_what_a_call_is_given_besides_its_inputs_is_handed_on():
    class Scaled(nn.Module):
        def forward(self, x, scale):
            return x * scale

    network = field.Network(Scaled(), field._image, scale=3)
    assert torch.equal(network(torch.ones(2)), torch.full((2,), 3.0))


@pytest.mark.parametrize("training", [False, True])
def test_a_model_has_been_called_when_its_inputs_are_made_but_not_to_train(training):
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
            self.anchors = None

        def forward(self, x, step):
            if self.anchors is None:
                self.anchors = x * self.scale + step.sum()
            return self.anchors

    network = field.Network(Keeps(), field._noisy(3)).train(training)
    noisy, step = network.example_inputs(2, 56)
    assert (noisy.dtype, step.dtype) == (torch.float32, torch.long)
    if training:
        assert network.model.anchors is None
    else:
        assert network.model.anchors.dtype == torch.float64
        assert not network.model.anchors.requires_grad
