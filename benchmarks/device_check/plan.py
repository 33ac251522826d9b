"""What the check runs, in which order, and within which time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.device_check import networks

STOCK, OURS, RACED = "inductor", "fxpasses", "fxpasses:race=True"
STAGES = ("tests", "speed", "memory")

_TESTS = ("tests/passes/test_conv_bn_reference.py", "tests/backend/test_devices.py")
"""First: what a device must be right in, whatever else it is."""


@dataclass(frozen=True)
class Setting:
    """Where the check runs.

    Attributes:
        device: of torch.
        dtype: of the models' parameters and images.
        batch: of the inputs.
        size: height and width of the images.
        rounds: turns of each variant.
        groups: names of the networks that are compiled at the same time.
        memory: the network whose peak memory is measured.
    """

    device: str
    dtype: str
    batch: int
    size: int
    rounds: int
    groups: tuple[tuple[str, ...], ...]
    memory: str


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        stage: of `STAGES`.
        name: what it finds out.
        command: its arguments.
        result: the file of `benchmarks.models` that it writes; None for tests.
    """

    stage: str
    name: str
    command: tuple[str, ...]
    result: Path | None = None


def on_a_gpu() -> Setting:
    """The check itself."""
    groups = networks.NAMES[:3], networks.NAMES[3:]
    return Setting("cuda", "bfloat16", 64, 224, 8, groups, "resnet50")


def rehearsal() -> Setting:
    """The same on a CPU, with networks and images as small as they may be."""
    return Setting("cpu", "float32", 2, 32, 6, (networks.TINY,), networks.TINY[0])


def runs_of(setting: Setting, folder: Path) -> list[Run]:
    """All runs, those first that the bars need most.

    Args:
        setting: where.
        folder: of the results.
    """
    python = sys.executable
    marker = ("-m", "gpu") if setting.device == "cuda" else ("-m", "not full", "-k", "cpu")
    pytest = (python, "-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", *marker)
    runs = [Run("tests", "the tests that matter most", (*pytest, *_TESTS))]
    if setting.device == "cuda":
        runs.append(Run("tests", "all other tests", (*pytest, *(f"--ignore={path}" for path in _TESTS))))
    for mode, dynamic in (
        ("training", "none"),
        ("inference", "none"),
        ("training", "batch"),
        ("inference", "batch"),
    ):
        for number, group in enumerate(setting.groups, 1):
            name = f"{mode}, {'dynamic batch' if dynamic == 'batch' else 'static'}, group {number}"
            result = folder / f"{mode}-{dynamic}-{number}.json"
            command = _models(setting, group, mode, result, (STOCK, OURS, RACED), "--dynamic", dynamic)
            runs.append(Run("speed", name, command, result))
    result = folder / "memory.json"
    command = _models(setting, (setting.memory,), "frozen-training", result, (STOCK, OURS))
    return [*runs, Run("memory", f"frozen training of {setting.memory}", command, result)]


def _models(
    setting: Setting, names: Sequence[str], mode: str, result: Path, variants: Sequence[str], *more: str
) -> tuple[str, ...]:
    together = len(names) * len(variants) if setting.device == "cuda" else 1
    given = {
        "--models": ",".join(map(networks.specification, names)),
        "--mode": mode,
        "--variants": ",".join(variants),
        "--device": setting.device,
        "--dtype": setting.dtype,
        "--batch": str(setting.batch),
        "--size": str(setting.size),
        "--rounds": str(setting.rounds),
        "--launches": "1",
        "--at-once": str(together),
        "--json": str(result),
    }
    pairs = (piece for pair in given.items() for piece in pair)
    return (sys.executable, "-m", "benchmarks.models", *pairs, *more)
