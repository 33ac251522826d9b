"""The demo: an embedded residual network is fine-tuned with frozen statistics.

1. It goes through `torch.compile(backend="fxpasses")`, and the report says what happened.
2. Outputs and parameter gradients are compared with eager: in float64, where they test the algebra, and in
   float32, where eager's own error against float64 is the yardstick.
3. Eager, stock inductor and fxpasses are timed. Each lives in a process of its own that is compiled and
   warm, and all take one step per round, in random order, so that a drift of the machine hits them alike.
   The ratio is that of paired steps; where the middle half of the pairs straddles 1, nothing is claimed.

Nothing is downloaded, and the weights are random: BN's statistics and affine parameters too, since a batch
norm with the initial ones is the identity.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from torch import nn

from fxpasses.backend.door import backend
from fxpasses.comparison import RESULTS, relative_error
from fxpasses.errors import FxpassesError
from fxpasses.report import counters
from fxpasses.report.report import Report

VARIANTS = ("eager", "inductor", "fxpasses")
"""What is timed: each compiles the same model in its own way."""

BATCH, IMAGE = 8, 64
"""Images per step, and their height and width in pixels."""

Progress = Callable[[str], None]
"""Is told what begins now."""

Step = Callable[[torch.Tensor], torch.Tensor]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BN beside a shortcut, which is a 1x1 one with BN where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C_in, H, W] -> [N, C_out, H/stride, W/stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResidualNet(nn.Module):
    """A small network in the style of ResNet: a stem and four residual blocks."""

    def __init__(self, widths: Sequence[int] = (32, 32, 64, 128), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(widths[0])
        before = [widths[0], *widths]
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(inputs, outputs, stride=1 if inputs == outputs else 2)
                for inputs, outputs in zip(before, widths, strict=False)
            )
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, classes]."""
        x = F.relu(self.stem_bn(self.stem(x)))
        return self.head(self.blocks(x).mean((2, 3)))  # type: ignore[no-any-return]  # modules are untyped


def build_model(seed: int = 0) -> ResidualNet:
    """The network in eval mode, every parameter trainable, its batch norms far from the identity."""
    torch.manual_seed(seed)
    model = ResidualNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def build_images(seed: int = 1) -> torch.Tensor:
    """One batch, [BATCH, 3, IMAGE, IMAGE]."""
    return torch.randn(BATCH, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


# Correctness -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One comparison. Errors are the largest difference, relative to the largest value of the reference.

    Attributes:
        name: what is compared with what.
        error: the rewritten model's error.
        allowed: the error that is still right.
        eager_error: eager's own error, where it is the yardstick.
    """

    name: str
    error: float
    allowed: float
    eager_error: float | None = None

    @property
    def right(self) -> bool:
        """Whether the error is allowed; one that is not a number never is."""
        return self.error <= self.allowed


def check_against_eager(
    model: nn.Module, images: torch.Tensor, compile_model: Callable[[nn.Module], Step]
) -> list[Check]:
    """Compares a compiled model with eager.

    Args:
        model: in float32 and in the mode to be tested; it is not changed.
        images: its input, in float32.
        compile_model: what is put to the test.
    """
    exact, exact_gradients = _run(copy.deepcopy(model).double(), images.double(), lambda module: module)
    eager, _ = _run(copy.deepcopy(model), images, lambda module: module)
    ours64, gradients64 = _run(copy.deepcopy(model).double(), images.double(), compile_model)
    ours32, _ = _run(copy.deepcopy(model), images, compile_model)
    gradient_errors = [
        relative_error(found, expected) for found, expected in zip(gradients64, exact_gradients, strict=True)
    ]
    eager_error = relative_error(eager, exact)
    allowed64, allowed32 = RESULTS.allowed(torch.float64), RESULTS.allowed(torch.float32, eager_error)
    return [
        Check("float64 outputs against eager", relative_error(ours64, exact), allowed64),
        Check(
            f"float64 gradients against eager, {len(gradient_errors)} parameters",
            max(gradient_errors),
            allowed64,
        ),
        Check("float32 outputs against float64", relative_error(ours32, exact), allowed32, eager_error),
    ]


def _run(
    model: nn.Module, images: torch.Tensor, compile_model: Callable[[nn.Module], Step]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs, and the gradients of their mean square for every parameter."""
    outputs = compile_model(model)(images)
    outputs.square().mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if len(gradients) != len(list(model.parameters())):
        raise FxpassesError(f"only {len(gradients)} parameters of the demo's model have a gradient.")
    return outputs.detach(), gradients


def compile_with(variant: str) -> Callable[[nn.Module], Step]:
    """How a variant compiles a module."""
    if variant == "eager":
        return lambda model: model
    chosen = backend if variant == "fxpasses" else "inductor"
    return lambda model: torch.compile(model, backend=chosen)


# Speed and memory ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """What one variant took.

    Attributes:
        seconds: wall time of each step, forward and backward, one per round.
        saved_bytes: size of the tensors that the forward pass keeps for the backward pass, each storage
            once, without parameters, buffers and inputs.
    """

    seconds: tuple[float, ...]
    saved_bytes: int

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of a step, in seconds."""
        return _quartiles(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a baseline: quartiles of the ratios of paired steps."""

    lower: float
    median: float
    upper: float

    @staticmethod
    def of(baseline: Timing, ours: Timing) -> Ratio:
        """The ratio of steps that were taken in the same round."""
        return Ratio(*_quartiles([b / o for b, o in zip(baseline.seconds, ours.seconds, strict=True)]))

    @property
    def verdict(self) -> str:
        """``"faster"``, ``"slower"``, or ``"inconclusive"`` where the quartiles straddle 1."""
        if self.lower > 1:
            return "faster"
        return "slower" if self.upper < 1 else "inconclusive"


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def measure_saved_bytes(step: Step, model: nn.Module, images: torch.Tensor) -> int:
    """The bytes that one forward pass keeps for the backward pass; see `Timing.saved_bytes`."""
    held = [*model.parameters(), *model.buffers(), images]
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = step(images)
    del outputs
    return sum(kept.values())


def measure_in_turns(rounds: int, threads: int, progress: Progress) -> dict[str, Timing]:
    """Times every variant, each in a process of its own.

    Args:
        rounds: how many steps of each are timed, at least 2.
        threads: torch threads of each process; one process works at a time.
        progress: is told what begins.

    Raises:
        FxpassesError: a process failed; the message has its error.
    """
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(_worker(name, threads)) for name in VARIANTS}
        saved: dict[str, int] = {}
        for name, connection in workers.items():
            progress(f"compiling and warming up: {name}")
            saved[name] = int(_ask(name, connection, "warm up"))
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        order, shuffled = list(VARIANTS), random.Random(0)
        for index in range(rounds):
            progress(f"timing in turns: round {index + 1} of {rounds}")
            shuffled.shuffle(order)
            for name in order:
                seconds[name].append(float(_ask(name, workers[name], "step")))
    return {name: Timing(tuple(seconds[name]), saved[name]) for name in VARIANTS}


@contextlib.contextmanager
def _worker(variant: str, threads: int) -> Iterator[Connection]:
    """A process that serves one variant; it ends with the block."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's thread pools
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, variant, threads), daemon=False)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        with contextlib.suppress(OSError):
            ours.send("stop")
        ours.close()
        process.join(timeout=20)
        if process.is_alive():
            process.kill()


def _ask(name: str, connection: Connection, request: str) -> float:
    try:
        connection.send(request)
        answer = connection.recv()
    except (EOFError, OSError) as error:
        raise FxpassesError(f"the process of {name} ended before it answered.") from error
    if isinstance(answer, str):
        raise FxpassesError(f"the process of {name} failed: {answer}")
    return float(answer)


def _serve(connection: Connection, variant: str, threads: int) -> None:
    """The worker: warms up when asked to (answers bytes saved), and takes steps (answers seconds)."""
    try:
        torch.set_num_threads(threads)
        model, images = build_model(), build_images()
        step = compile_with(variant)(model)
        while (request := connection.recv()) != "stop":
            if request == "warm up":
                for _ in range(3):
                    _timed_step(step, model, images)
                connection.send(measure_saved_bytes(step, model, images))
            else:
                connection.send(_timed_step(step, model, images))
    except (EOFError, KeyboardInterrupt):
        return  # the demo itself has ended, or is about to
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def _timed_step(step: Step, model: nn.Module, images: torch.Tensor) -> float:
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    step(images).square().mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return time.perf_counter() - start


# The whole -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoResult:
    """What the demo found, as plain data.

    Attributes:
        report: what happened in the compilations of the comparison with eager.
        checks: the comparisons.
        timings: by variant.
        threads: torch threads that every variant had.
    """

    report: Report
    checks: tuple[Check, ...]
    timings: Mapping[str, Timing]
    threads: int

    @property
    def right(self) -> bool:
        """Whether something was rewritten and every comparison is within what is allowed."""
        return bool(self.report.applied) and all(check.right for check in self.checks)

    @property
    def ratio(self) -> Ratio:
        """How many times as fast as stock inductor."""
        return Ratio.of(self.timings["inductor"], self.timings["fxpasses"])

    def to_dict(self) -> dict[str, object]:
        """The result, ready for `json.dump`; seconds and bytes."""
        return {
            "torch": torch.__version__,
            "threads": self.threads,
            "right": self.right,
            "applied": dict(self.report.applied),
            "checks": [dataclasses.asdict(check) | {"right": check.right} for check in self.checks],
            "timings": {name: dataclasses.asdict(timing) for name, timing in self.timings.items()},
            "ratio_to_inductor": dataclasses.asdict(self.ratio) | {"verdict": self.ratio.verdict},
        }


def run_demo(rounds: int = 15, threads: int | None = None, progress: Progress = lambda _: None) -> DemoResult:
    """Runs the demo; takes one to two minutes on two cores, most of it compilation.

    Args:
        rounds: how many steps of each variant are timed, at least 2.
        threads: torch threads; None for torch's own choice.
        progress: is told what begins.

    Raises:
        MissingCompilerError: inductor found no C++ compiler.
        FxpassesError: too few rounds, or a process that failed.
    """
    if rounds < 2:
        raise FxpassesError(f"the demo compares spreads and needs at least 2 rounds, not {rounds}.")
    used = threads or torch.get_num_threads()
    torch.set_num_threads(used)
    progress("compiling with fxpasses and comparing with eager, in float64 and float32")
    seen = len(counters.reports())
    checks = check_against_eager(build_model(), build_images(), compile_with("fxpasses"))
    report = counters.reports()[seen:][-1]
    return DemoResult(report, tuple(checks), measure_in_turns(rounds, used, progress), used)
