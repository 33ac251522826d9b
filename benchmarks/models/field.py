"""The suite `field`: networks that people run now, of several packages, with random weights.

A function here builds one, so that `benchmarks.models.field:yolo11n` is a specification for `--models`; what
it returns has `example_inputs(batch, size)`. Nothing is downloaded: models are built from configurations,
small enough for a call to take well under a second on two cores. `size` is that of an image: latents, clips,
spectrograms and waveforms are made from it, and some models have one size only.

The packages (the extra `field`) are imported inside the functions, since whoever has none of them may
still name the suite.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.models.vocoder import HifiGan
from fxpasses.cli.model_specs import declare_torchvision_operators

Inputs = Callable[[int, int], tuple[torch.Tensor, ...]]

PACKAGES: Mapping[str, str] = {
    "yolo11n": "ultralytics",
    "yolov8n_seg": "ultralytics",
    "vae_decoder": "diffusers",
    "unet2d": "diffusers",
    "unet2d_condition": "diffusers",
    "unet_resnet34": "segmentation_models_pytorch",
    "deeplabv3plus_mobilenet_v2": "segmentation_models_pytorch",
    "whisper_encoder": "transformers",
    "wav2vec2": "transformers",
    "segformer": "transformers",
    "convnextv2": "transformers",
    "hifi_gan": "torch",
    "r3d_18": "torchvision",
    "mc3_18": "torchvision",
    "raft_small": "torchvision",
    "swin_tiny": "timm",
    "maxvit_nano": "timm",
    "efficientvit_b0": "timm",
    "mobilenetv4_conv_small": "timm",
    "fastvit_t8": "timm",
}
"""The models of the suite, and the module that each needs."""


def specifications() -> tuple[str, ...]:
    """The models whose packages are installed, as `--models` takes them."""
    return tuple(f"{__name__}:{name}" for name, package in PACKAGES.items() if _is_installed(package))


def not_installed() -> tuple[str, ...]:
    """The models that are left out, each with the package that it needs."""
    return tuple(f"{name} ({package})" for name, package in PACKAGES.items() if not _is_installed(package))


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _module(name: str) -> Any:
    """A module of another package, which is kept from fetching and from installing what it misses."""
    declare_torchvision_operators()
    for setting, value in _OFFLINE.items():
        os.environ.setdefault(setting, value)
    return importlib.import_module(name)


_OFFLINE = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}


class Network(nn.Module):
    """A model of another package, with the inputs that a call takes.

    Args:
        model: the model.
        inputs: makes inputs from a batch size and the size of an image.
        given: what else every call of the model is given.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, **given: object) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs
        self._given = given

    def example_inputs(self, batch: int, size: int) -> tuple[torch.Tensor, ...]:
        """The inputs of one call, the same each time, with which the model has been called when in eval mode.

        Some models keep what they make at their first call, such as anchors, and Dynamo breaks the graph of
        that call: what would be compiled and checked is not what is called, and timed, from then on.
        """
        inputs = self._inputs(batch, size)
        if not self.training:
            with torch.no_grad():
                self(*(each.to(self._like(each)) for each in inputs))
        return inputs

    def _like(self, given: torch.Tensor) -> torch.Tensor:
        """What has the device of the parameters, and their type if that of the input is a real number's."""
        parameter = next(self.parameters(), torch.empty(0))
        return parameter if given.is_floating_point() else parameter.to(given.dtype)

    def forward(self, *inputs: torch.Tensor) -> object:
        """What the model gives."""
        return self.model(*inputs, **self._given)


# Inputs ----------------------------------------------------------------------------------------------------


def _random(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


def _rounded(size: int, multiple: int) -> int:
    """The largest multiple that is no larger, but at least one."""
    return max(multiple, size // multiple * multiple)


def _image(batch: int, size: int) -> tuple[torch.Tensor, ...]:
    return (_random(batch, 3, _rounded(size, 32), _rounded(size, 32)),)


def _image_of(size: int) -> Inputs:
    """Images of one size, whatever is asked for."""
    return lambda batch, _: (_random(batch, 3, size, size),)


def _clip(batch: int, size: int) -> tuple[torch.Tensor, ...]:
    return (_random(batch, 3, 8, _rounded(size // 2, 16), _rounded(size // 2, 16)),)


def _two_images(batch: int, size: int) -> tuple[torch.Tensor, ...]:
    """The second is the first, moved by three pixels; under 128 the pyramid of correlations has no top."""
    side = max(128, _rounded(size, 8))
    first = _random(batch, 3, side, side)
    return first, first.roll(3, dims=-1)


def _latent(batch: int, size: int) -> tuple[torch.Tensor, ...]:
    return (_random(batch, 4, max(4, size // 8), max(4, size // 8)),)


def _noisy(channels: int) -> Inputs:
    """A sample to denoise, and the step; that is 0, of which sines in float32 are the same everywhere."""

    def inputs(batch: int, size: int) -> tuple[torch.Tensor, ...]:
        side = _rounded(size // 7, 8)
        return _random(batch, channels, side, side), torch.zeros(batch, dtype=torch.long)

    return inputs


def _noisy_with_text(batch: int, size: int) -> tuple[torch.Tensor, ...]:
    return (*_noisy(4)(batch, size), _random(batch, 16, _TEXT_WIDTH))


# ultralytics -----------------------------------------------------------------------------------------------


def yolo11n() -> nn.Module:
    """A detector."""
    tasks = _module("ultralytics.nn.tasks")
    return Network(tasks.DetectionModel("yolo11n.yaml", verbose=False), _image)


def yolov8n_seg() -> nn.Module:
    """A detector that gives masks as well."""
    tasks = _module("ultralytics.nn.tasks")
    return Network(tasks.SegmentationModel("yolov8n-seg.yaml", verbose=False), _image)


# diffusers -------------------------------------------------------------------------------------------------

_TEXT_WIDTH = 64


def vae_decoder() -> nn.Module:
    """The decoder of Stable Diffusion's autoencoder, of a quarter of its width: latents to images."""
    vae = _module("diffusers").AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        norm_num_groups=8,
    )
    return Network(nn.Sequential(vae.post_quant_conv, vae.decoder), _latent)


def unet2d() -> nn.Module:
    """A denoiser with attention over pixels."""
    model = _module("diffusers").UNet2DModel(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return Network(model, _noisy(3), return_dict=False)


def unet2d_condition() -> nn.Module:
    """A denoiser with attention over pixels and over text."""
    model = _module("diffusers").UNet2DConditionModel(
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        cross_attention_dim=_TEXT_WIDTH,
        norm_num_groups=8,
    )
    return Network(model, _noisy_with_text, return_dict=False)


# segmentation_models_pytorch -------------------------------------------------------------------------------


def unet_resnet34() -> nn.Module:
    """ResNet-34 with a U-Net's decoder."""
    return Network(_module("segmentation_models_pytorch").Unet("resnet34", encoder_weights=None), _image)


def deeplabv3plus_mobilenet_v2() -> nn.Module:
    """MobileNetV2 with dilated convolutions, side by side, behind it."""
    build = _module("segmentation_models_pytorch").DeepLabV3Plus
    return Network(build("mobilenet_v2", encoder_weights=None), _image)


# transformers ----------------------------------------------------------------------------------------------


def whisper_encoder() -> nn.Module:
    """The encoder of Whisper-tiny, for six seconds of sound instead of thirty."""
    seconds = 6
    configuration = _module("transformers").WhisperConfig(max_source_positions=50 * seconds)
    build = _module("transformers.models.whisper.modeling_whisper").WhisperEncoder
    return Network(build(configuration), lambda batch, _: (_random(batch, 80, 100 * seconds),))


def wav2vec2() -> nn.Module:
    """Convolutions over a waveform, then attention."""
    transformers = _module("transformers")
    configuration = transformers.Wav2Vec2Config(
        conv_dim=(128,) * 7,
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=768,
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    model = transformers.Wav2Vec2Model(configuration)
    return Network(model, lambda batch, size: (_random(batch, 100 * size),))


def segformer() -> nn.Module:
    """SegFormer-B0."""
    transformers = _module("transformers")
    configuration = transformers.SegformerConfig(num_labels=21)
    return Network(transformers.SegformerForSemanticSegmentation(configuration), _image)


def convnextv2() -> nn.Module:
    """ConvNeXt V2 atto."""
    transformers = _module("transformers")
    configuration = transformers.ConvNextV2Config(hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 6, 2])
    return Network(transformers.ConvNextV2Model(configuration), _image)


# Ours, torchvision and timm --------------------------------------------------------------------------------


def hifi_gan() -> nn.Module:
    """A vocoder; see `benchmarks.models.vocoder`."""
    return HifiGan()


def r3d_18() -> nn.Module:
    """A ResNet for video."""
    return Network(_module("torchvision.models.video").r3d_18(weights=None), _clip)


def mc3_18() -> nn.Module:
    """The same, whose later kernels are one frame thick."""
    return Network(_module("torchvision.models.video").mc3_18(weights=None), _clip)


def raft_small() -> nn.Module:
    """Optical flow in four rounds; the coordinates that torchvision makes are given the images' type."""
    raft = _module("torchvision.models.optical_flow.raft")

    class Correlation(raft.CorrBlock):  # type: ignore[name-defined, misc]  # torchvision has no types
        def index_pyramid(self, centroids_coords: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = super().index_pyramid(centroids_coords.to(self.corr_pyramid[0].dtype))
            return found

    def typed(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(each.to(given[0].dtype) for each in given)

    model = raft.raft_small(weights=None, corr_block=Correlation(num_levels=4, radius=3))
    model.update_block.register_forward_pre_hook(typed)
    return Network(model, _two_images, num_flow_updates=4)


def swin_tiny() -> nn.Module:
    """Attention in windows that shift."""
    return _timm("swin_tiny_patch4_window7_224", _image_of(224))


def maxvit_nano() -> nn.Module:
    """Inverted residuals, attention in windows, attention over a grid."""
    return _timm("maxvit_nano_rw_256", _image_of(256))


def efficientvit_b0() -> nn.Module:
    """Convolutions with linear attention."""
    return _timm("efficientvit_b0", _image)


def mobilenetv4_conv_small() -> nn.Module:
    """Inverted bottlenecks of several kinds."""
    return _timm("mobilenetv4_conv_small", _image)


def fastvit_t8() -> nn.Module:
    """Parallel branches of convolution and batch norm, as they are trained."""
    return _timm("fastvit_t8", _image)


def _timm(name: str, inputs: Inputs) -> nn.Module:
    return Network(_module("timm").create_model(name), inputs)
