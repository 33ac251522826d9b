"""A model that several threads call while its weights change: latencies with and without updates.

    python -m benchmarks.serving [--model resnet18] [--callers 4] [--seconds 10] [--every 1]

Every variant serves in this process, one after the other: the callers call it as fast as they can, first left
alone, then while a further thread loads other weights every so many seconds, with fxpasses in a block of
`fxpasses.updating`. Latencies are of single calls, in milliseconds. An answer that belongs to none of the
versions of the weights is counted as wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fxpasses
from benchmarks.models.cases import Case, build_inputs, build_model
from benchmarks.models.variants import Variant, build_variant, parse_variants
from benchmarks.shared.commands import refuse
from benchmarks.shared.statistics import quantiles
from fxpasses.errors import FxpassesError

_CLOSE = 1e-3
"""How far an answer may be from that of a version, in units of its largest value."""


@dataclass
class Served:
    """What the callers saw.

    Attributes:
        latencies: of each call, in seconds.
        wrong: answers of no version.
        updates: how many there were.
    """

    latencies: list[float] = field(default_factory=list)
    wrong: int = 0
    updates: int = 0


def serve(
    call: Callable[[], torch.Tensor],
    versions: Sequence[torch.Tensor],
    callers: int,
    seconds: float,
    update: Callable[[int], None] | None,
    every: float,
) -> Served:
    """Calls from several threads for so long, while `update` is given the number of the next version."""
    served, stop, lock = Served(), threading.Event(), threading.Lock()

    def caller() -> None:
        latencies, wrong = [], 0
        while not stop.is_set():
            start = time.perf_counter()
            with torch.no_grad():
                found = call()
            latencies.append(time.perf_counter() - start)
            wrong += not any(
                bool((found - version).abs().max() <= _CLOSE * version.abs().max()) for version in versions
            )
        with lock:
            served.latencies += latencies
            served.wrong += wrong

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(every, max(0.0, end - time.monotonic())))
        if update is not None and time.monotonic() < end:
            served.updates += 1
            update(served.updates)
    stop.set()
    for thread in threads:
        thread.join()
    return served


def measure(case: Case, variant: Variant, given: argparse.Namespace) -> tuple[Served, Served]:
    """One variant without updates and with them."""
    model = build_model(case, None)
    inputs = build_inputs(case, model)
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for _ in range(2)]
    for name, tensor in states[1].items():
        if tensor.is_floating_point() and name.endswith("weight") and tensor.ndim > 1:
            tensor.mul_(1.25)
    run = build_variant(variant, case, model, inputs)
    versions = []
    with torch.no_grad():
        for state in reversed(states):
            model.load_state_dict(state)
            versions.append(run(*inputs))

    def update(number: int) -> None:
        ours = variant.kind == "fxpasses"
        with fxpasses.updating(run) if ours else contextlib.nullcontext():
            model.load_state_dict(states[number % 2])

    def call() -> torch.Tensor:
        return run(*inputs)

    amount = (given.callers, given.seconds)
    return (
        serve(call, versions[1:], *amount, None, given.every),
        serve(call, versions, *amount, update, given.every),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; gives 0, or 2 where the arguments are wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="default: resnet18")
    parser.add_argument(
        "--variants", default="inductor,fxpasses:weights=cached", help="default: inductor and cached weights"
    )
    parser.add_argument("--callers", type=int, default=4, help="threads that call; default: 4")
    parser.add_argument("--threads", type=int, default=1, help="of each call; default: 1")
    parser.add_argument("--seconds", type=float, default=10, help="for each row; default: 10")
    parser.add_argument("--every", type=float, default=1, help="seconds from update to update; default: 1")
    given = parser.parse_args(arguments)
    try:
        variants = parse_variants(given.variants)
        if min(given.callers, given.seconds, given.every) <= 0:
            raise FxpassesError("--callers, --seconds and --every must be more than 0.")
        case = Case(given.model, mode="inference", threads=given.threads)
        for variant in variants:
            variant.check(case)
    except FxpassesError as error:
        refuse(parser, str(error))
    torch.set_num_threads(case.threads)
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("variant", "updates", "calls a second", "p50 ms", "p99 ms", "wrong"):
        table.add_column(header, justify="left" if header == "variant" else "right")
    for variant in variants:
        for served in measure(case, variant, given):
            middle, late = (1e3 * value for value in quantiles(served.latencies, (0.5, 0.99)))
            rate = len(served.latencies) / given.seconds
            cells = (str(served.updates), f"{rate:.1f}", f"{middle:.1f}", f"{late:.1f}", str(served.wrong))
            table.add_row(variant.name, *cells)
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
