"""Reports made by hand, for tests of what reads them."""

from __future__ import annotations

from benchmarks.models.results import ModelResult, Report, VariantResult

SETTINGS: dict[str, object] = {
    "mode": "frozen-training",
    "batch": 8,
    "size": 64,
    "dtype": "float32",
    "device": "cpu",
    "dynamic": "none",
    "threads": 2,
    "rounds": 8,
}
ENVIRONMENT: dict[str, object] = {
    "device": "a processor",
    "processor": "a processor",
    "physical_cores": 2,
    "libraries": {"torch": "2.13.0"},
    "date": "2026-01-02T03:04:05+00:00",
}


def timed(name: str, seconds: float, *, saved_bytes: int | None = None, rounds: int = 8) -> VariantResult:
    """A variant that took about `seconds` in every round."""
    jitter = [1.0 + 0.001 * (index % 3 - 1) for index in range(rounds)]
    values = tuple(seconds * factor for factor in jitter)
    return VariantResult(name, "ok", seconds=values, calls=1, saved_bytes=saved_bytes)


def report(**models: list[VariantResult]) -> Report:
    """A report over models; its baseline is inductor."""
    results = tuple(
        ModelResult(name, tuple(variants), (max((len(variant.seconds) for variant in variants), default=0),))
        for name, variants in models.items()
    )
    return Report(dict(SETTINGS), dict(ENVIRONMENT), "inductor", results)


def two_models() -> Report:
    """fxpasses: 2x and 0.5x of inductor, with a half and a quarter of eager's bytes."""
    return report(
        resnet18=[
            timed("eager", 3.0, saved_bytes=100),
            timed("inductor", 2.0, saved_bytes=80),
            timed("fxpasses", 1.0, saved_bytes=50),
        ],
        resnet50=[
            timed("eager", 3.0, saved_bytes=400),
            timed("inductor", 1.0, saved_bytes=80),
            timed("fxpasses", 2.0, saved_bytes=100),
        ],
    )
