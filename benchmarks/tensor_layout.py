"""`python -m benchmarks.tensor_layout`: one convolution in contiguous and in channels_last, or a sweep.

Without --sweep: the convolution given by --input, --weight, ... (or those of --kinds) in every dtype and
direction asked for. Results are compared before anything is timed; the speed-up is contiguous over
channels_last of one round, its median over the rounds, with a bootstrap confidence interval.

Operands are in no cache when they are read, as in a model, where the rest of the network has run since; --hot
repeats each call on the same ones.

With --sweep: every distinct convolution, layout copy and layout-sensitive operator of the given models, and
the device's peaks, written to a device profile that the layout pass reads. It records how operands were read.

The exit status is 1 where a result was wrong, 2 where the arguments are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.layout.measure import Comparison, Variant, measure_convolution
from benchmarks.layout.report import (
    comparison_tables,
    comparisons,
    plot_speedups,
    plot_times,
    sweep_table,
    to_json,
    write_csv,
)
from benchmarks.layout.setting import DTYPES, Setting
from benchmarks.layout.sweep import SweepResult, Workload, collect, sweep, tasks, to_profile
from benchmarks.operators.inputs.suites import MODES, Mode
from benchmarks.shared.environment import check_device, environment_block, physical_cores
from fxpasses.devices.caches import evict
from fxpasses.devices.convolutions import (
    DIRECTIONS,
    Convolution,
    Direction,
    implementations,
    in_layout,
    operands,
)
from fxpasses.devices.profile import COLD, HOT, LAYOUTS
from fxpasses.devices.store import device_name, file_name, load
from fxpasses.devices.timing import Effort
from fxpasses.errors import FxpassesError, unknown_name

Name = TypeVar("Name", bound=str)
Number = TypeVar("Number", int, float)

# A convolution of every kind, with the batch on a GPU and on a CPU.
KINDS: dict[str, tuple[Convolution, int, int]] = {
    "plain": (Convolution.of((1, 3, 224, 224), (64, 3, 7, 7), (2,), (3,)), 256, 4),
    "grouped": (Convolution.of((1, 128, 56, 56), (128, 4, 3, 3), (1,), (1,), groups=32), 64, 4),
    "depthwise": (Convolution.of((1, 96, 112, 112), (96, 1, 3, 3), (2,), (1,), groups=96), 64, 4),
    "transposed": (Convolution.of((1, 128, 28, 28), (128, 64, 2, 2), (2,), transposed=True), 64, 4),
    "pointwise": (Convolution.of((1, 64, 56, 56), (256, 64, 1, 1)), 64, 4),
    "plain-3d": (Convolution.of((1, 64, 8, 28, 28), (64, 64, 3, 3, 3), (1,), (1,)), 16, 1),
    "grouped-3d": (Convolution.of((1, 64, 8, 28, 28), (64, 8, 3, 3, 3), (1,), (1,), groups=8), 16, 1),
    "depthwise-3d": (Convolution.of((1, 64, 8, 28, 28), (64, 1, 3, 3, 3), (1,), (1,), groups=64), 16, 1),
    "transposed-3d": (Convolution.of((1, 64, 4, 14, 14), (64, 32, 2, 2, 2), (2,), transposed=True), 16, 1),
    "pointwise-3d": (Convolution.of((1, 64, 8, 28, 28), (128, 64, 1, 1, 1)), 16, 1),
}


class ArgumentError(FxpassesError, ValueError):
    """Options that do not go together, or a value that one of them does not take."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parser().parse_args(argv)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or physical_cores())
        return _sweep(args) if args.sweep else _compare(args)
    except (FxpassesError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


def _compare(args: argparse.Namespace) -> int:
    cases = _cases(args)
    directions = [_one_of("pass", name, DIRECTIONS) for name in args.passes]
    todo = [
        (case, direction, setting)
        for setting in _settings(args)
        for case in cases
        for direction in directions
    ]
    variants: list[Variant] = []
    with Progress(console=_progress_console()) as bar:
        for case, direction, setting in bar.track(todo, description="measuring"):
            variants += measure_convolution(case, direction, setting)
    name = f"{device_name(args.device)}, {HOT if args.hot else COLD} operands"
    for table in comparison_tables(variants, name):
        _console().print(table)
    if args.trace:
        _write_trace(Path(args.trace), cases, directions, _settings(args)[0])
    compared = comparisons(variants)
    _write(args, variants, compared, {})
    if args.plot:
        plot_speedups(compared, Path(args.plot))
    return _status(variants)


def _sweep(args: argparse.Namespace) -> int:
    deadline = time.monotonic() + args.budget
    modes: list[Mode] = [_one_of("mode", name, MODES) for name in args.modes]
    device = check_device(args.device)
    path = _profile_path(args, device)
    existing = load(path) if path and path.exists() else None
    try:
        # Before anything is measured: a profile of another machine would refuse the result.
        known = existing.merged(to_profile([], device, tf32=args.tf32, hot=args.hot)) if existing else None
    except ValueError as error:
        raise ArgumentError(f"--profile {path}: {error}") from error
    results: list[SweepResult] = []
    for setting in _settings(args):
        workload = Workload()
        for batch in args.batch:
            workload += collect(args.sweep, batch=batch, size=args.size, modes=modes, dtype=setting.dtype)
        if workload.one_dimensional:
            print(f"{workload.one_dimensional} one-dimensional convolutions have one layout and are left out")
        todo = tasks(workload, setting.device, setting.dtype)
        with Progress(console=_progress_console()) as bar:
            tracked = bar.track(todo, description=f"measuring {setting.dtype}")
            results.append(sweep(tracked, setting, deadline))
    measured = to_profile(results, device, tf32=args.tf32, hot=args.hot)
    if path:
        (known.merged(measured) if known else measured).save(path)
        print(f"{path}: {len(measured.measurements)} measurements on {measured.device}")
    variants = [variant for result in results for variant in result.variants]
    compared = comparisons(variants)
    _console().print(sweep_table(compared, measured))
    not_measured = [label for result in results for label in result.not_measured]
    if not_measured:
        shown = "\n  ".join(not_measured[:10] + (["..."] if len(not_measured) > 10 else []))
        print(f"the budget of {args.budget:g} s ended before {len(not_measured)} cases:\n  {shown}")
    peaks = [asdict(result.roofline) for result in results]
    _write(args, variants, compared, {"rooflines": peaks, "not_measured": not_measured})
    if args.plot:
        plot_times(compared, Path(args.plot))
    return _status(variants)


def _profile_path(args: argparse.Namespace, device: torch.device) -> Path | None:
    """The file to write; in a folder, the one that a profile of this device is looked for under."""
    if not args.profile:
        return None
    path = Path(args.profile)
    return path / file_name(device_name(device)) if path.is_dir() or args.profile.endswith("/") else path


def _cases(args: argparse.Namespace) -> list[Convolution]:
    """The convolutions asked for: one of --input and --weight, else those of --kinds."""
    if (args.input is None) != (args.weight is None):
        raise ArgumentError("--input and --weight go together: give both, or --kinds, or neither.")
    if args.input is not None:
        arguments = (
            args.stride,
            args.padding,
            args.dilation,
            args.transposed,
            args.output_padding,
            args.groups,
        )
        return [Convolution.of(args.input, args.weight, *arguments)]
    names = list(KINDS) if args.kinds == ["all"] else args.kinds
    found = []
    for name in names:
        case, gpu_batch, cpu_batch = KINDS[_one_of("kind", name, tuple(KINDS))]
        batch = cpu_batch if check_device(args.device).type == "cpu" else gpu_batch
        found.append(_with_batch(case, batch))
    return found


def _with_batch(case: Convolution, batch: int) -> Convolution:
    fields = {**asdict(case), "input_size": (batch, *case.input_size[1:])}
    return Convolution(**fields)


def _settings(args: argparse.Namespace) -> list[Setting]:
    device = check_device(args.device)
    effort = Effort(rounds=args.repeats, case_seconds=args.case_seconds)
    dtypes = [_one_of("dtype", name, tuple(DTYPES)) for name in args.dtype]
    return [Setting(dtype, device, effort, args.tf32, args.hot) for dtype in dtypes]


def _write_trace(
    path: Path, cases: Sequence[Convolution], directions: Sequence[Direction], setting: Setting
) -> None:
    """A profiler trace of a call of each implementation after a first one, labelled with its layout.

    The stacks of Python functions around each operator are in it.
    """
    activities = [ProfilerActivity.CPU]
    if setting.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        setting.arithmetic(),
        profile(activities=activities, record_shapes=True, with_stack=True) as profiler,
    ):
        for case in cases:
            for direction in directions:
                values = operands(case, direction, setting.torch_dtype, setting.device)
                for layout in LAYOUTS:
                    kernel = implementations(case, direction, layout, in_layout(values, layout))[
                        "aten.convolution"
                    ]()
                    kernel()
                    if not setting.hot:
                        evict(setting.device)
                    with record_function(f"{direction} {layout} {case.key}"):
                        kernel()
                        if setting.device.type == "cuda":
                            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    print(f"{path}: profiler trace")


def _write(
    args: argparse.Namespace,
    variants: Sequence[Variant],
    compared: Sequence[Comparison],
    more: Mapping[str, object],
) -> None:
    if args.json:
        block = environment_block(args.device) | {"threads": torch.get_num_threads()}
        data = {"benchmark": "tensor_layout", "environment": block, "arguments": vars(args)}
        text = json.dumps({**data, **to_json(variants, compared), **more}, indent=1)
        Path(args.json).write_text(text + "\n", "utf-8")
    if args.csv:
        write_csv(Path(args.csv), variants)


def _status(variants: Sequence[Variant]) -> int:
    """1 where a result was wrong, after naming it; else 0."""
    wrong = [variant for variant in variants if variant.status == "mismatch"]
    for variant in wrong:
        name = f"{variant.operator} {variant.key} {variant.dtype} {variant.layout} {variant.implementation}"
        print(f"error: {name} is wrong, no time is reported: {variant.reason}", file=sys.stderr)
    return 1 if wrong else 0


def _console() -> Console:
    # A file or a pipe has no width of its own, and rich would wrap at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 140)


def _progress_console() -> Console:
    # On a stream of its own: standard output holds the results.
    return Console(stderr=True)


def _one_of(kind: str, given: str, valid: Sequence[Name]) -> Name:
    for name in valid:
        if name == given:
            return name
    raise ArgumentError(unknown_name(kind, given, valid))


def _numbers(text: str) -> list[int]:
    """`8,64,56,56` or `8x64x56x56`."""
    return [int(number) for number in text.replace("x", ",").split(",")]


def _names(text: str) -> list[str]:
    return [piece.strip() for piece in text.split(",") if piece.strip()]


def _positive(convert: Callable[[str], Number]) -> Callable[[str], Number]:
    def positive(text: str) -> Number:
        value = convert(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    return positive


def _batches(text: str) -> list[int]:
    return [_positive(int)(piece) for piece in text.split(",")]


def _size(text: str) -> list[int]:
    numbers = _numbers(text)
    return numbers * 2 if len(numbers) == 1 else numbers


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").partition("\n\n")[2]
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tensor_layout", description=description, formatter_class=form
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:INDEX]")
    add("--dtype", type=_names, default=["float32"], help=f"any of {','.join(DTYPES)}")
    add("--tf32", action="store_true", help="let float32 use TF32 on a GPU, with TF32's tolerance")
    add("--hot", action="store_true", help="operands in a cache: every call has the same")
    add("--threads", type=_positive(int), help="threads of torch (default: physical cores)")
    add("--repeats", type=_positive(int), default=20, help="rounds, at most (default: 20)")
    add(
        "--case-seconds",
        type=_positive(float),
        default=2.0,
        help="fewer rounds, down to six, where all would take longer than so many seconds (default: 2)",
    )
    add("--json", metavar="FILE", help="write all samples")
    add("--csv", metavar="FILE", help="write one line a variant")
    add("--plot", metavar="FILE", help="write a PNG")
    _add_convolution(parser)
    _add_sweep(parser)
    return parser


def _add_convolution(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("one convolution").add_argument
    add("--kinds", type=_names, default=["plain"], help=f"all, or any of {','.join(KINDS)} (default: plain)")
    add("--input", type=_numbers, metavar="N,C,H,W", help="size of the input, 4-D or 5-D")
    add("--weight", type=_numbers, metavar="K,C,R,S", help="size of the weight (transposed: C,K,R,S)")
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("output-padding", 0)):
        add(
            f"--{name}",
            type=_numbers,
            default=[default],
            help=f"one value or one a dimension (default: {default})",
        )
    add("--groups", type=_positive(int), default=1)
    add("--transposed", action="store_true", help="a transposed convolution")
    add(
        "--passes",
        type=_names,
        default=list(DIRECTIONS),
        help=f"any of {','.join(DIRECTIONS)} (default: all)",
    )
    add("--trace", metavar="FILE", help="write a profiler trace of both layouts, with stacks (.json[.gz])")


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("a sweep over the convolutions of models").add_argument
    add(
        "--sweep",
        type=_names,
        metavar="MODELS",
        help="timm's names, or torchvision:NAME, package.module:factory",
    )
    add("--batch", type=_batches, default=[1], help="one or more, such as 1,8 (default: 1)")
    add("--size", type=_size, default=[224, 224], help="side, HxW or TxHxW of the input (default: 224)")
    add("--modes", type=_names, default=["inference"], help=f"any of {','.join(MODES)} (default: inference)")
    add(
        "--profile",
        metavar="FILE",
        help="write the device profile, or add to the one there; in a folder, under the device's name",
    )
    add(
        "--budget",
        type=_positive(float),
        default=300.0,
        help="seconds after which no case is begun (default: 300)",
    )


if __name__ == "__main__":
    sys.exit(main())
