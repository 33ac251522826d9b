"""`python -m benchmarks.utilization`: device utilisation from profiler traces, or of a model that it traces.

    python -m benchmarks.utilization TRACE.json TRACE.json.gz
    python -m benchmarks.utilization --model resnet18 --mode inference --backend inductor

`benchmark_utilization(f, input)` does the same for any function. What utilisation means stands in
`benchmarks.traces`, what counts as a matrix product or convolution in `benchmarks.kernel_patterns`.
The exit status is 2 where a trace cannot be read or the arguments do not fit.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from benchmarks.cases import MODES, Case, build_inputs, build_model, run_step
from benchmarks.environment import check_device, environment_block, physical_cores
from benchmarks.torch_internals import visible_cpu_kernels
from benchmarks.traces import Utilization, analyse, load_trace
from benchmarks.variants import build_variant, parse_variant
from fxpasses.errors import FxpassesError

WINDOW = "benchmark_utilization"
Function = Callable[..., object]

_COLUMNS = (
    "path",
    "window",
    "window_seconds",
    "device",
    "stream",
    "busy_seconds",
    "utilization",
    "matmul_seconds",
    "convolution_seconds",
    "mm_conv_seconds",
    "mm_conv_utilization",
    "copy_seconds",
)


class UtilizationArgumentError(FxpassesError, ValueError):
    """Options that do not go together."""


def benchmark_utilization(
    f: Function,
    input: object,  # noqa: A002  # the name that PyTorch's own benchmark_utilization has
    trace_path: str | Path | None = None,
    optimizer: Callable[[Function], Function] | None = None,
    repeats: int = 3,
) -> tuple[float, float]:
    """Runs `f` on `input`, traces it, and reports how busy the device was.

    Args:
        f: what to run.
        input: its argument, or a tuple or list of its arguments.
        trace_path: where to keep the trace (`.json` or `.json.gz`); None to drop it.
        optimizer: makes what is run of `f`, such as `torch.compile`.
        repeats: calls within the profiled window, after warm-up calls outside of it.

    Returns:
        The utilisation, and the part of the window in which matrix products and convolutions ran: both
        in [0, 1], and means over the devices that ran anything.
    """
    arguments = tuple(input) if isinstance(input, tuple | list) else (input,)
    tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    with visible_cpu_kernels():
        optimized = optimizer(f) if optimizer else f
        found = _traced(lambda: optimized(*arguments), device, trace_path, repeats)
    return found.utilization, found.mm_conv_utilization


_DEFAULT_MODEL = "resnet18"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parser().parse_args(argv)
    threads = torch.get_num_threads()
    try:
        if args.traces and args.model is not None:
            raise UtilizationArgumentError("give either traces to read or --model to trace, not both.")
        if not args.traces and args.model is None:
            args.model = _DEFAULT_MODEL
        torch.set_num_threads(args.threads or physical_cores())
        results = [_model(args)] if args.model is not None else _traces(args)
        for each in results:
            Console(width=None if sys.stdout.isatty() else 140).print(_table(each))
        _write(args, results)
    except (FxpassesError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def _traces(args: argparse.Namespace) -> list[Utilization]:
    with Progress(console=Console(stderr=True)) as bar:
        paths = bar.track(args.traces, description="reading traces")
        return [analyse(load_trace(path), args.window) for path in paths]


def _model(args: argparse.Namespace) -> Utilization:
    case = Case(
        model=args.model,
        mode=args.mode,
        batch=args.batch,
        size=args.size,
        dtype=args.dtype,
        device=str(check_device(args.device)),
        threads=torch.get_num_threads(),
    )
    variant = parse_variant(args.backend)
    variant.check(case)
    model = build_model(case)
    inputs = build_inputs(case, model)
    parameters = list(model.parameters())
    with visible_cpu_kernels():
        built = build_variant(variant, case, model, inputs)
        device = torch.device(case.device)

        def step() -> object:
            return run_step(case, built, parameters, inputs)

        try:
            step()
        except (RuntimeError, ValueError) as error:
            raise UtilizationArgumentError(f"{args.model} fails on {case}: {error}") from error
        found = _traced(step, device, args.trace, args.repeats)
    return replace(found, path=args.trace or f"{args.model} {args.mode} {args.backend}")


def _traced(
    call: Callable[[], object], device: torch.device, trace_path: str | Path | None, repeats: int
) -> Utilization:
    """Calls, traces and analyses; compilation and the profiler's own start stay outside of the window."""
    if repeats < 1:
        raise UtilizationArgumentError(f"repeats must be at least 1, got {repeats}.")
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for _ in range(2):
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(trace_path) if trace_path is not None else Path(folder) / "trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda finished: finished.export_chrome_trace(str(path)),
        ) as profiler:
            for _ in range(2):
                _synchronize(device)
                with record_function(WINDOW):
                    for _ in range(repeats):
                        call()
                    # Within the window: kernels that are still queued belong to it.
                    _synchronize(device)
                profiler.step()
        return analyse(load_trace(path), WINDOW)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(result: Utilization) -> Table:
    title = f"{result.path}: {1e3 * result.window_seconds:.3f} ms ({result.window})"
    table = Table(title=title, title_justify="left")
    table.add_column("device")
    table.add_column("stream" if result.source == "device" else "process/thread")
    for column in ("busy ms", "utilisation", "matmul ms", "convolution ms", "matmul+conv", "copies ms"):
        table.add_column(column, justify="right")
    for device in result.devices:
        for stream in device.streams:
            busy = f"{1e3 * stream.busy_seconds:.3f}"
            table.add_row(device.device, stream.stream, busy, f"{stream.utilization:.1%}")
        table.add_row(
            f"[bold]{device.device} {device.name}",
            "all",
            f"{1e3 * device.busy_seconds:.3f}",
            f"{device.utilization:.1%}",
            f"{1e3 * device.matmul_seconds:.3f}",
            f"{1e3 * device.convolution_seconds:.3f}",
            f"{device.mm_conv_utilization:.1%}",
            f"{1e3 * device.copy_seconds:.3f}",
            end_section=True,
        )
    share = f"{result.mm_conv_utilization:.1%} ({result.mm_conv_share:.1%} of busy)"
    table.add_row("[bold]mean", "", "", f"{result.utilization:.1%}", "", "", share, "")
    return table


def _write(args: argparse.Namespace, results: Sequence[Utilization]) -> None:
    if args.json:
        # A trace read from a file was made elsewhere: this machine's environment says nothing about it.
        block = environment_block(args.device) if args.model is not None else None
        data = {"benchmark": "utilization", "environment": block, "arguments": vars(args)}
        text = json.dumps(data | {"traces": [_to_json(each) for each in results]}, indent=1)
        Path(args.json).write_text(text + "\n", "utf-8")
    if args.csv:
        with Path(args.csv).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore")
            writer.writeheader()
            for result in results:
                writer.writerows(_csv_rows(result))


def _to_json(result: Utilization) -> dict[str, object]:
    return asdict(result) | {
        "utilization": result.utilization,
        "mm_conv_utilization": result.mm_conv_utilization,
        "mm_conv_share": result.mm_conv_share,
    }


def _csv_rows(result: Utilization) -> list[dict[str, object]]:
    """One row a device, whose stream is `all`, and one a stream."""
    rows: list[dict[str, object]] = []
    for device in result.devices:
        rows.append(asdict(device) | {"stream": "all"})
        rows += [asdict(stream) | {"device": device.device} for stream in device.streams]
    common = {"path": result.path, "window": result.window, "window_seconds": result.window_seconds}
    return [common | row for row in rows]


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").partition("\n\n")[2]
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.utilization", description=description, formatter_class=form
    )
    add = parser.add_argument
    add("traces", nargs="*", metavar="TRACE", help="Chrome traces of torch's profiler, .json or .json.gz")
    add("--window", help="pattern of annotations whose spans are the window (default: the profiler's steps)")
    add("--json", metavar="FILE", help="write everything")
    add("--csv", metavar="FILE", help="write a line for each device and stream")
    add = parser.add_argument_group("trace a model").add_argument
    add(
        "--model",
        help=f"timm's name (default: {_DEFAULT_MODEL}, without TRACE), or torchvision:NAME, "
        "transformers:CLASS, package.module:factory",
    )
    add("--mode", choices=MODES, default="inference")
    add(
        "--backend", default="eager", help="eager, inductor, fxpasses or another variant of benchmarks.models"
    )
    add("--batch", type=int, default=1)
    add("--size", type=int, default=224)
    add("--dtype", default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="threads of torch (default: physical cores)")
    add("--repeats", type=int, default=5, help="steps within the window (default: 5)")
    add("--trace", metavar="FILE", help="keep the trace")
    return parser


if __name__ == "__main__":
    sys.exit(main())
