"""The suites: which architectures are recorded, on which inputs, and where their logs lie.

Architectures are built with random weights, and their inputs are what a user would choose: 32 images of
224x224 (or the size that the architecture is made for), 16 sentences of 128 tokens, 8 clips of 16 frames.
Attention is recorded in its mathematical form (products, softmax), because each device fuses it into an
operator of its own that no other device has. `logs/SUITE/manifest.json` says how each log was made.

The logs that PyTorch published, of its suites `timm`, `huggingface` and `torchbench`, are read from the
user's copy of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.operators.inputs.log import OperatorLog, read_logs
from benchmarks.operators.inputs.recorder import OperatorInputsMode
from benchmarks.torch_internals import fake_copy
from fxpasses.cli.model_specs import declare_torchvision_operators, load_model
from fxpasses.errors import FxpassesError, unknown_name

Mode = Literal["inference", "training"]
MODES: tuple[Mode, ...] = ("inference", "training")
LOGS = Path(__file__).parent / "logs"


class SuiteError(FxpassesError, ValueError):
    """A suite, a model of a suite or a mode that does not exist, or has no log."""


@dataclass(frozen=True)
class Entry:
    """A model of a suite and the inputs that it is recorded on.

    `shape` is that of the image, clip or sentence, without the batch. `part` names a submodule to record
    in place of the whole. `config` overrides fields of a transformers configuration.
    """

    spec: str
    batch: int
    shape: tuple[int, ...]
    part: str = ""
    config: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The architecture's name without its source, and what is recorded of it."""
        return self.spec.partition(":")[2] + (f".{self.part}" if self.part else "")


_IMAGE = (3, 224, 224)
_TIMM = (
    "botnet26t_256",
    "coat_lite_mini",
    "convnext_tiny",
    "densenet121",
    "dpn68",
    "efficientnet_b0",
    "ghostnet_100",
    "inception_v3",
    "mixer_s16_224",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "nf_resnet50",
    "regnety_016",
    "repvgg_a0",
    "res2net50_26w_4s",
    "resnest50d",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "seresnet50",
    "swin_tiny_patch4_window7_224",
    "vit_small_patch16_224",
)
_TIMM_SIZES = {"botnet26t_256": (3, 256, 256), "inception_v3": (3, 299, 299)}

SUITES: dict[str, tuple[Entry, ...]] = {
    "timm": tuple(Entry(f"timm:{name}", 32, _TIMM_SIZES.get(name, _IMAGE)) for name in _TIMM),
    "torchvision": (
        Entry("torchvision:alexnet", 32, _IMAGE),
        Entry("torchvision:deeplabv3_resnet50", 8, (3, 520, 520)),
        Entry("torchvision:fasterrcnn_resnet50_fpn", 2, (3, 800, 800), part="backbone"),
        Entry("torchvision:googlenet", 32, _IMAGE),
        Entry("torchvision:lraspp_mobilenet_v3_large", 8, (3, 520, 520)),
        Entry("torchvision:mobilenet_v3_small", 32, _IMAGE),
        Entry("torchvision:mvit_v1_b", 2, (3, 16, 224, 224)),
        Entry("torchvision:r3d_18", 8, (3, 16, 112, 112)),
        Entry("torchvision:s3d", 8, (3, 16, 224, 224)),
        Entry("torchvision:shufflenet_v2_x1_0", 32, _IMAGE),
        Entry("torchvision:squeezenet1_1", 32, _IMAGE),
        Entry("torchvision:ssd300_vgg16", 8, (3, 300, 300), part="backbone"),
        Entry("torchvision:swin_v2_t", 32, (3, 256, 256)),
        Entry("torchvision:vgg16", 32, _IMAGE),
    ),
    "transformers": (
        Entry("transformers:BertForMaskedLM", 16, (128,)),
        Entry("transformers:DistilBertForMaskedLM", 16, (128,)),
        Entry("transformers:GPT2LMHeadModel", 8, (256,)),
        Entry(
            "transformers:LlamaForCausalLM",
            8,
            (256,),
            config={
                "hidden_size": 512,
                "intermediate_size": 1376,
                "num_attention_heads": 8,
                "num_hidden_layers": 4,
            },
        ),
        Entry("transformers:OPTForCausalLM", 8, (256,)),
        Entry("transformers:RobertaForCausalLM", 16, (128,)),
        Entry("transformers:T5ForConditionalGeneration", 16, (128,), config={"decoder_start_token_id": 0}),
        Entry("transformers:ViTForImageClassification", 32, _IMAGE),
    ),
}

PYTORCH_FOLDERS = {"huggingface": "hf_train", "timm": "timm_train", "torchbench": "torchbench_train"}
"""PyTorch's suites, and the folder of each in its `operator_inp_logs`."""


def entry(suite: str, name: str) -> Entry:
    """The entry of a suite.

    Raises:
        SuiteError: there is no such suite, or the suite has no such model.
    """
    entries = {entry.name: entry for entry in entries_of(suite)}
    if name not in entries:
        raise SuiteError(unknown_name(f"model of suite {suite}", name, entries))
    return entries[name]


def entries_of(suite: str) -> tuple[Entry, ...]:
    """The models of a suite.

    Raises:
        SuiteError: there is no such suite.
    """
    if suite not in SUITES:
        raise SuiteError(unknown_name("suite", suite, SUITES))
    return SUITES[suite]


def log_path(directory: Path, suite: str, name: str, mode: Mode) -> Path:
    """The file that holds the log of a model in a mode."""
    return directory / suite / f"{name}_{mode}.txt"


def load_suite(suite: str, mode: Mode | Literal["all"] = "all", folder: Path | None = None) -> OperatorLog:
    """The logs of all models of a suite, as one: the shipped ones, or those in a folder.

    Args:
        suite: one of `SUITES`, or of `PYTORCH_FOLDERS`, of which only `timm` can do without a folder.
        mode: of the logs that are read.
        folder: PyTorch's `operator_inp_logs`, the suite's folder in it, or what
            `python -m benchmarks.operator_inputs --output` has written.

    Raises:
        SuiteError: there is no such suite, or no log of it.
        LogError: a log is missing or damaged.
    """
    if folder is not None:
        return read_logs(_logs_in(folder, suite, mode))
    if suite in PYTORCH_FOLDERS and suite not in SUITES:
        raise SuiteError(
            f"the logs of suite {suite!r} are not shipped; give the folder that holds them "
            "(benchmarks/dynamo/microbenchmarks/operator_inp_logs of PyTorch's sources) by --log-folder, or "
            f"choose a suite that is shipped: {', '.join(sorted(SUITES))}."
        )
    modes = MODES if mode == "all" else (mode,)
    return read_logs(log_path(LOGS, suite, entry.name, mode) for entry in entries_of(suite) for mode in modes)


def _logs_in(folder: Path, suite: str, mode: Mode | Literal["all"]) -> list[Path]:
    """The logs of a suite in a folder, or in the folder of the suite in it."""
    names = {PYTORCH_FOLDERS.get(suite, suite), suite}
    if folder.name in {*PYTORCH_FOLDERS, *PYTORCH_FOLDERS.values(), *SUITES} - names:
        raise SuiteError(f"{folder} is the folder of another suite than {suite!r}; name that one by --suite.")
    ending = "" if mode == "all" else f"_{mode}"
    for place in (*(folder / name for name in sorted(names)), folder):
        logs = sorted({*place.glob(f"*{ending}.txt"), *place.glob(f"*{ending}.txt.gz")})
        if logs:
            return logs
    places = " or ".join(f"{folder / name}" for name in sorted(names))
    raise SuiteError(f"no logs (*{ending}.txt, *{ending}.txt.gz) of suite {suite!r} in {places} or {folder}.")


def record(model_entry: Entry, mode: Mode, dtype: torch.dtype = torch.float32) -> OperatorInputsMode:
    """Records one pass of a model over fake tensors: forward alone, or forward, loss and backward.

    Args:
        model_entry: the model and the shape of its inputs.
        mode: the pass that is recorded; inference is in eval mode, without gradients.
        dtype: the floating dtype of parameters and inputs.

    Raises:
        ModelSpecError: the model cannot be built.
    """
    training = mode == "training"
    fake_mode, model = fake_copy(_build(model_entry).to(dtype).train(training))
    with fake_mode:
        args, kwargs = _inputs(model_entry, model, training, dtype)
    recorder = OperatorInputsMode()
    with fake_mode, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(training), recorder:
        outputs = model(*args, **kwargs)
        if training:
            _loss(outputs).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return recorder


def _build(model_entry: Entry) -> torch.nn.Module:
    if model_entry.config:
        declare_torchvision_operators()
        import transformers

        model_class = getattr(transformers, model_entry.spec.partition(":")[2])
        configured: torch.nn.Module = model_class(model_class.config_class(**model_entry.config))
        return configured
    model = load_model(model_entry.spec)
    return copy.deepcopy(model.get_submodule(model_entry.part)) if model_entry.part else model


def _inputs(
    model_entry: Entry, model: torch.nn.Module, training: bool, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Fake inputs of a model; those of a language model hold the labels of its loss in training."""
    shape = (model_entry.batch, *model_entry.shape)
    if not model_entry.spec.startswith("transformers:"):
        return (torch.rand(shape, dtype=dtype),), {}
    if len(model_entry.shape) == 3:
        labels = {"labels": torch.zeros(model_entry.batch, dtype=torch.int64)} if training else {}
        return (), {"pixel_values": torch.rand(shape, dtype=dtype), **labels}
    tokens = torch.zeros(shape, dtype=torch.int64)
    kwargs = {"input_ids": tokens}
    config: Any = model.config  # nn.Module types every attribute as a tensor or a module
    if training:
        kwargs["labels"] = tokens.clone()
    elif config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = tokens.clone()
    return (), kwargs


def _loss(outputs: Any) -> torch.Tensor:
    """What training minimises: the model's own loss, cross entropy of logits, or the mean of features."""
    if getattr(outputs, "loss", None) is not None:
        return _tensor(outputs.loss)
    if isinstance(outputs, Mapping):
        return _sum(list(outputs.values()), _loss if "out" in outputs else _mean)
    if isinstance(outputs, (list, tuple)):
        return _sum([output for output in outputs if output is not None], _loss)
    logits = _tensor(outputs)
    classes = torch.zeros((logits.shape[0], *logits.shape[2:]), dtype=torch.int64)
    return F.cross_entropy(logits, classes)


def _sum(values: list[Any], loss: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    total = loss(values[0])
    for value in values[1:]:
        total = total + loss(value)
    return total


def _mean(features: Any) -> torch.Tensor:
    return _tensor(features).mean()


def _tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"expected a tensor to minimise, got {type(value).__name__}")
    return value
