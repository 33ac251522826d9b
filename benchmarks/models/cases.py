"""A case: one model in one mode on inputs of one shape, and one step of it.

================= ============================================= ================================
mode              the module                                    a step
================= ============================================= ================================
inference         `eval()`, under `torch.no_grad`               outputs
frozen-training   `eval()`: BatchNorm uses its running          outputs, loss, parameter gradients
                  statistics; every parameter is trainable
training          `train()`: BatchNorm uses the batch's         outputs, loss, parameter gradients
================= ============================================= ================================

The loss is the sum over floating-point outputs of their mean square, computed outside the compiled function.
There is no optimiser. In `training`, dropout and stochastic depth are set to zero for every variant: compiled
code draws other random numbers than eager does, and what cannot be compared is not timed.

Running statistics of BatchNorm start as mean 0 and variance 1, and some architectures start gamma at 0, with
which a BatchNorm, or a whole branch, does nothing. `randomise_batch_norms` gives them the statistics of what
they read, perturbed, and a gamma around 1, so that activations keep their scale in deep networks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import torch

from benchmarks.torch_internals import mark_dynamic, tree_leaves
from fxpasses.cli.model_specs import load_model
from fxpasses.errors import FxpassesError

Mode = Literal["inference", "frozen-training", "training"]
Dynamic = Literal["none", "batch", "all"]
Inputs = tuple[torch.Tensor, ...]
Model = Callable[..., object]
BatchNorm = torch.nn.BatchNorm1d | torch.nn.BatchNorm2d | torch.nn.BatchNorm3d | torch.nn.SyncBatchNorm

MODES: tuple[Mode, ...] = get_args(Mode)
DYNAMICS: tuple[Dynamic, ...] = get_args(Dynamic)
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
VIDEO_FRAMES = 16
_DROPOUTS = (
    torch.nn.Dropout,
    torch.nn.Dropout1d,
    torch.nn.Dropout2d,
    torch.nn.Dropout3d,
    torch.nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout,
)
_BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)
_REGULARISERS = ("drop_rate", "drop_prob", "drop_path_rate")


class CaseError(FxpassesError, ValueError):
    """A case that cannot be measured as asked."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        model: timm's name, or a specification of `fxpasses.cli.model_specs`.
        mode: see the module's docstring.
        batch: the batch size.
        size: height and width of images, or the length of token sequences.
        dtype: a key of `DTYPES`, of parameters and floating-point inputs.
        device: a torch device.
        dynamic: `none` static shapes, `batch` a dynamic batch size, `all` every size dynamic.
        threads: intra-operator threads.
        seed: of the parameters, the statistics and the inputs.
    """

    model: str
    mode: Mode = "inference"
    batch: int = 1
    size: int = 224
    dtype: str = "float32"
    device: str = "cpu"
    dynamic: Dynamic = "none"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise CaseError(f"mode {self.mode!r} is unknown; valid: {', '.join(MODES)}.")
        if self.dynamic not in DYNAMICS:
            raise CaseError(f"dynamic {self.dynamic!r} is unknown; valid: {', '.join(DYNAMICS)}.")
        if self.dtype not in DTYPES:
            raise CaseError(f"dtype {self.dtype!r} is unknown; valid: {', '.join(DTYPES)}.")
        if min(self.batch, self.size, self.threads) < 1:
            raise CaseError(
                f"batch {self.batch}, size {self.size} and threads {self.threads} must be at least 1."
            )
        if self.dynamic == "batch" and self.batch < 2:
            # Dynamo specialises the sizes 0 and 1, silently, also where mark_dynamic was called.
            raise CaseError("a dynamic batch needs --batch 2 or more: torch.compile specialises a size of 1.")

    @property
    def trains(self) -> bool:
        """Whether a step has a backward."""
        return self.mode != "inference"

    def to_json(self) -> dict[str, object]:
        """The fields."""
        return asdict(self)


@dataclass(frozen=True)
class Step:
    """The results of one step: outputs that require grad still do; gradients are the parameters' own."""

    outputs: list[torch.Tensor]
    loss: torch.Tensor | None


def build_model(case: Case, state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """The model in the case's mode and dtype on its device, with the parameters of `state` if given.

    Raises:
        ModelSpecError: the name does not parse, import or build.
    """
    torch.manual_seed(case.seed)
    model = load_model(case.model, default_source="timm")
    if state is not None:
        model.load_state_dict(state)
    model = model.to(device=case.device, dtype=DTYPES[case.dtype])
    for parameter in model.parameters():
        parameter.requires_grad_(case.trains)
    if case.mode != "training":
        return model.eval()
    disable_regularisers(model)
    return model.train()


def disable_regularisers(model: torch.nn.Module) -> None:
    """Sets the probability of dropout and of stochastic depth to zero."""
    for module in model.modules():
        if isinstance(module, _DROPOUTS) or type(module).__name__ == "StochasticDepth":
            setattr(module, "p", 0.0)  # noqa: B010  # not every class here declares it
        for name in _REGULARISERS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def build_inputs(case: Case, model: torch.nn.Module) -> Inputs:
    """Random inputs: images, clips of `VIDEO_FRAMES` frames, or tokens, as the model takes them.

    A model of one's own takes images of three channels, unless it has a method
    `example_inputs(batch, size)` that returns a tuple of tensors.
    """
    generator = torch.Generator().manual_seed(case.seed + 1)
    inputs: Inputs
    own = getattr(model, "example_inputs", None)
    if callable(own):
        inputs = tuple(own(case.batch, case.size))
    elif getattr(model, "main_input_name", None) == "input_ids":
        words = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]  # transformers' own attribute
        inputs = (torch.randint(words, (case.batch, case.size), generator=generator),)
    else:
        frames = (VIDEO_FRAMES,) if ".video." in type(model).__module__ else ()
        shape = (case.batch, _channels(model), *frames, case.size, case.size)
        inputs = (torch.randn(shape, generator=generator),)
    dtype = DTYPES[case.dtype]
    return tuple(
        tensor.to(case.device, dtype if tensor.is_floating_point() else tensor.dtype) for tensor in inputs
    )


def mark_dynamic_batch(case: Case, inputs: Inputs) -> None:
    """Marks the batch dimension where the case asks for it."""
    if case.dynamic == "batch":
        for tensor in inputs:
            mark_dynamic(tensor, (0,))


def _channels(model: torch.nn.Module) -> int:
    configuration = getattr(model, "pretrained_cfg", None)  # timm's
    if isinstance(configuration, dict) and "input_size" in configuration:
        return int(configuration["input_size"][0])
    return int(getattr(getattr(model, "config", None), "num_channels", 3))  # transformers'


def run_step(case: Case, model: Model, parameters: list[torch.nn.Parameter], inputs: Inputs) -> Step:
    """One step of `model`; in the training modes gradients are those of this step alone."""
    for parameter in parameters:
        parameter.grad = None
    with contextlib.nullcontext() if case.trains else torch.no_grad():
        outputs = tensors_of(model(*inputs))
        loss = mean_square(outputs) if case.trains else None
    if loss is not None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return Step(outputs, loss)


def tensors_of(outputs: object) -> list[torch.Tensor]:
    """The tensors in a model's outputs, in order."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def mean_square(outputs: list[torch.Tensor]) -> torch.Tensor:
    """The loss: the sum over the differentiable outputs of their mean square."""
    terms = [
        output.square().mean() for output in outputs if output.is_floating_point() and output.requires_grad
    ]
    if not terms:
        raise CaseError(
            "the model has no output that depends on a parameter: it cannot be trained. Use inference."
        )
    return torch.stack(terms).sum()


def randomise_batch_norms(case: Case, model: torch.nn.Module) -> None:
    """Gives every BatchNorm statistics and affine parameters with which it is not an identity, in place.

    The model runs once on a random batch, and each norm adopts, just before it is applied, the mean m and the
    deviation d = sqrt(max(variance, m^2)) of what it reads: a running mean of m moved by a tenth of d, and a
    running variance of d^2 scaled by 0.5 to 1.5. Without the bound by m^2, channels of a network with random
    weights that hardly vary would be divided by next to nothing, norm after norm, until the rounding of
    float32 filled the output: a network that nobody trains, and no compiler computes right. gamma is 0.5 to
    1.5, beta normal with deviation 0.1.
    """
    generator = torch.Generator().manual_seed(case.seed + 2)

    def adopt(norm: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(norm, _BATCH_NORMS)
        _randomise_affine(norm, generator)
        _adopt_statistics(norm, arguments[0], generator)

    handles = [
        module.register_forward_pre_hook(adopt)
        for module in model.modules()
        if isinstance(module, _BATCH_NORMS)
    ]
    if not handles:
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        model(*build_inputs(replace(case, batch=4), model))
    for handle in handles:
        handle.remove()
    for module, training in modes.items():
        module.training = training


def _randomise_affine(norm: BatchNorm, generator: torch.Generator) -> None:
    if norm.affine:
        norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
        norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator) * 0.1)


def _adopt_statistics(norm: BatchNorm, x: torch.Tensor, generator: torch.Generator) -> None:
    """Sets the running statistics, of shape [C], from the norm's input `x` of shape [N, C, ...]."""
    if norm.running_mean is None or norm.running_var is None:
        return
    variance, mean = torch.var_mean(x.transpose(0, 1).flatten(1), dim=1, correction=0)
    variance = torch.maximum(variance, mean.square()).clamp(min=norm.eps)
    shift, scale = (torch.randn(mean.shape, generator=generator), torch.rand(mean.shape, generator=generator))
    norm.running_mean.copy_(mean + 0.1 * shift.to(mean) * variance.sqrt())
    norm.running_var.copy_(variance * (scale.to(mean) + 0.5))
