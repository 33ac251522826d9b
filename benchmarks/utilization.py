"""`python -m benchmarks.utilization`: device utilisation from profiler traces, or of a model that it traces.

    python -m benchmarks.utilization TRACE.json TRACE.json.gz
    python -m benchmarks.utilization --model resnet18 --mode inference --backend inductor

`benchmark_utilization(f, input)` does the same for any function. What utilisation means stands in
`benchmarks.traces.analysis`, what counts as a matrix product or convolution in
`benchmarks.traces.kernel_patterns`. The exit status is 2 where a trace cannot be read or the arguments do not
fit.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.models.cases import MODES, Case, build_inputs, build_model, run_step
from benchmarks.models.variants import build_variant, parse_variant
from benchmarks.shared.environment import check_device, environment_block, physical_cores
from benchmarks.torch_internals import visible_cpu_kernels
from benchmarks.traces.analysis import Utilization, analyse, load_trace
from benchmarks.traces.profiled_calls import WINDOW as WINDOW
from benchmarks.traces.profiled_calls import Function, Protocol, bound, devices_of, traced
from benchmarks.traces.profiled_calls import UtilizationArgumentError as UtilizationArgumentError
from fxpasses.errors import FxpassesError

_COLUMNS = (
    "path",
    "window",
    "window_seconds",
    "wall_seconds",
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


class Benchmarked(tuple[float, float]):
    """The utilisation, and that by matrix products and convolutions, over the window: both in [0, 1].

    Attributes:
        details: each device, and the same over unprofiled wall time where that was asked for.
    """

    details: Utilization

    @staticmethod
    def of(details: Utilization) -> Benchmarked:
        """The two figures of a trace."""
        found = Benchmarked((details.utilization, details.mm_conv_utilization))
        found.details = details
        return found


def benchmark_utilization(
    f: Function,
    input: object,  # noqa: A002  # the name that PyTorch's own benchmark_utilization has had
    trace_path: str | Path | None = None,
    optimizer: Callable[[Function], Function] | None = None,
    repeats: int = 3,
    *,
    optimize_ctx: AbstractContextManager[object] | None = None,
    kwargs_for_f: Mapping[str, object] | None = None,
    kwargs_for_profiler: Mapping[str, object] | None = None,
    device: str | torch.device | None = None,
    warmup: int = 5,
    seed: int = 1337,
    wall_time: bool = False,
    trace_file_name: str = "tmp_chrome_trace",
    num_runs: int | None = None,
) -> Benchmarked:
    """Runs `f` on `input`, traces it, and reports how busy the device was.

    It takes what that of `torch._functorch.benchmark_utils` takes. Warm-up calls, calls for wall time and the
    window each begin with the same seed (`benchmarks.traces.profiled_calls`).

    Args:
        f: what to run.
        input: its argument, as it is, whatever its structure; a tuple that `f` takes as its positional
            arguments is spread out.
        trace_path: where to keep the trace: a file (`.json` or `.json.gz`) or a folder; None to drop it.
        optimizer: makes what is run of `f`, such as `torch.compile`.
        repeats: calls within the profiled window, after warm-up calls outside of it.
        optimize_ctx: a context to run everything in, such as `torch.autocast(...)`; entered once.
        kwargs_for_f: keyword arguments of `f`.
        kwargs_for_profiler: of `torch.profiler.profile`, such as ``{"with_stack": True}``.
        device: where it runs; None to find it by the tensors of the arguments and of `f`, if it is a module.
        warmup: calls before anything is measured.
        seed: of the random generators, whose state is then restored.
        wall_time: whether to time `repeats` calls without the profiler, too.
        trace_file_name: the trace's name in a folder, without ``.json``.
        num_runs: PyTorch's name for `repeats`.

    Returns:
        The utilisation, and the part of the window in which matrix products and convolutions ran: both in
        [0, 1], and means over the devices that ran anything. In `details` is the rest: with `wall_time` also
        `wall_utilization` and `mm_conv_wall_utilization`, over wall time without the profiler.

    Raises:
        UtilizationArgumentError: an argument that cannot be; `f` was not called.
        UnavailableDeviceError: this machine has no such device.
    """
    keywords = kwargs_for_f or {}
    protocol = Protocol(
        devices=(check_device(str(device)),) if device is not None else devices_of(f, input, keywords),
        repeats=repeats if num_runs is None else num_runs,
        warmup=warmup,
        seed=seed,
        wall_time=wall_time,
        profiler=kwargs_for_profiler or {},
    )
    call = bound(f, input, keywords)
    context = contextlib.nullcontext() if optimize_ctx is None else optimize_ctx
    with visible_cpu_kernels(), context:
        optimized = optimizer(f) if optimizer else f
        path = _trace_file(trace_path, trace_file_name)
        return Benchmarked.of(traced(lambda: call(optimized), protocol, path))


def _trace_file(given: str | Path | None, name: str) -> Path | None:
    """The file to write; what has no suffix of a trace is a folder."""
    if given is None or Path(given).name.endswith((".json", ".json.gz")):
        return Path(given) if given is not None else None
    return Path(given) / f"{name}.json"


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
        for result in results:
            Console(width=None if sys.stdout.isatty() else 140).print(_table(result))
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
        protocol = Protocol((device,), args.repeats, wall_time=args.wall_time)
        found = traced(step, protocol, args.trace)
    return replace(found, path=args.trace or f"{args.model} {args.mode} {args.backend}")


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
    if result.wall_seconds is not None:
        unprofiled = f"[bold]over {1e3 * result.wall_seconds:.3f} ms unprofiled"
        shares = f"{result.wall_utilization:.1%}", f"{result.mm_conv_wall_utilization:.1%}"
        table.add_row(unprofiled, "", "", shares[0], "", "", shares[1], "")
    return table


def _write(args: argparse.Namespace, results: Sequence[Utilization]) -> None:
    if args.json:
        # A trace read from a file was made elsewhere: this machine's environment says nothing about it.
        block = environment_block(args.device) if args.model is not None else None
        data = {"benchmark": "utilization", "environment": block, "arguments": vars(args)}
        text = json.dumps(data | {"traces": [_to_json(result) for result in results]}, indent=1)
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
        "wall_utilization": result.wall_utilization,
        "mm_conv_wall_utilization": result.mm_conv_wall_utilization,
    }


def _csv_rows(result: Utilization) -> list[dict[str, object]]:
    """One row a device, whose stream is `all`, and one a stream."""
    rows: list[dict[str, object]] = []
    for device in result.devices:
        rows.append(asdict(device) | {"stream": "all"})
        rows += [asdict(stream) | {"device": device.device} for stream in device.streams]
    names = ("path", "window", "window_seconds", "wall_seconds")
    common = {name: getattr(result, name) for name in names}
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
    add("--wall-time", action="store_true", help="time the steps without the profiler, too")
    add("--trace", metavar="FILE", help="keep the trace")
    return parser


if __name__ == "__main__":
    sys.exit(main())
