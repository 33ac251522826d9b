"""Robust statistics of repeated timings, and when to keep silent.

Timings are skewed and drift, so the centre is the median and the spread the interquartile range (IQR).
Two variants that were measured in the same rounds are compared round by round:

    r_i = b_i / a_i,    ratio = median(r),    interval = percentile bootstrap of the median of log r

so that a drift that hits both sides of a round cancels. A ratio B/A of times above 1 says that A is faster.

Two processes of one program differ by a few per cent for as long as they live (where their pages lie, how
their code is aligned), which no number of rounds averages out. So the rounds are spread over several
*launches* of each process, and the bootstrap is nested: it draws launches, then rounds within each. The
interval is then no narrower than what the launches differ by; with one launch it knows nothing of that.

A ratio whose confidence interval straddles 1 is *inconclusive*. So is one of fewer than `MINIMUM_PAIRS`
rounds: n values bracket their true median with a probability of at most 1 - 2^(1-n), which reaches 95 %
at n = 6 (sign test).

Sources: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993; T. Kalibera, R. Jones, Rigorous
Benchmarking in Reasonable Time, ISMM 2013, on launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Verdict = Literal["faster", "slower", "inconclusive"]
Array = npt.NDArray[np.float64]

MINIMUM_PAIRS = 6
CONFIDENCE = 0.95
_RESAMPLES = 9999
_SEED = 20_230_518


@dataclass(frozen=True)
class Summary:
    """The centre and the spread of a sample, in the sample's unit."""

    median: float
    q1: float
    q3: float
    n: int

    @property
    def iqr(self) -> float:
        """The interquartile range, q3 - q1."""
        return self.q3 - self.q1


@dataclass(frozen=True)
class Ratio:
    """A ratio of times B/A with its confidence interval; the interval is None where nothing can be claimed.

    Above 1 means that A, the variant that the ratio speaks for, is the faster one.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    confidence: float = CONFIDENCE

    @property
    def verdict(self) -> Verdict:
        """What the interval allows to say about A."""
        if self.low is None or self.high is None or self.low <= 1.0 <= self.high:
            return "inconclusive"
        return "faster" if self.low > 1.0 else "slower"

    def to_json(self) -> dict[str, object]:
        """The fields and the verdict."""
        return asdict(self) | {"verdict": self.verdict}


def quantiles(samples: Sequence[float], levels: Sequence[float]) -> tuple[float, ...]:
    """The quantiles of `samples` at `levels` (each in [0, 1]), linearly interpolated.

    Raises:
        ValueError: `samples` is empty or holds a value that is not finite.
    """
    return tuple(float(quantile) for quantile in np.quantile(_checked(samples), levels))


def summarize(samples: Sequence[float]) -> Summary:
    """Median and quartiles.

    Raises:
        ValueError: `samples` is empty or holds a value that is not finite.
    """
    q1, median, q3 = quantiles(samples, (0.25, 0.5, 0.75))
    return Summary(median, q1, q3, len(samples))


def paired_ratio(
    times: Sequence[float],
    baseline: Sequence[float],
    *,
    launches: Sequence[int] | None = None,
    confidence: float = CONFIDENCE,
) -> Ratio:
    """The baseline's time over this variant's, paired by round: above 1 this variant is the faster one.

    Args:
        times: seconds of the variant A, one value a round.
        baseline: seconds of the variant B in the same rounds.
        launches: how many of the rounds, in order, each launch of the processes took; None for one launch.
        confidence: the level of the interval.

    Raises:
        ValueError: the lengths differ, or a value is not positive and finite.
    """
    return geometric_mean_ratio([(times, baseline)], launches=[launches], confidence=confidence)


def geometric_mean_ratio(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    launches: Sequence[Sequence[int] | None] | None = None,
    confidence: float = CONFIDENCE,
) -> Ratio:
    """The geometric mean over models of the paired ratio, each model's rounds resampled on their own.

    Args:
        pairs: for each model the times of A and those of the baseline B in the same rounds.
        launches: for each model those of `paired_ratio`.
        confidence: the level of the interval.

    Raises:
        ValueError: no pairs, or one that `paired_ratio` would refuse.
    """
    if not pairs:
        raise ValueError("a geometric mean needs at least one model")
    logs = [_log_ratios(*pair) for pair in pairs]
    sizes = [_sizes(log, counts) for log, counts in zip(logs, launches or [None] * len(logs), strict=True)]
    value = float(np.exp(np.mean([np.median(log) for log in logs])))
    n = min(len(log) for log in logs)
    if n < MINIMUM_PAIRS:
        return Ratio(value, None, None, n, confidence)
    generator = np.random.default_rng(_SEED)
    medians = [_resampled_medians(log, size, generator) for log, size in zip(logs, sizes, strict=True)]
    return _with_interval(value, np.mean(medians, axis=0), n, confidence)


def unpaired_ratio(
    times: Sequence[float],
    baseline: Sequence[float],
    *,
    launches: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None),
    confidence: float = CONFIDENCE,
) -> Ratio:
    """The ratio of the medians of two independent samples, B over A, such as two runs on different days.

    Args:
        times: of A.
        baseline: of B.
        launches: those of A and of B, see `paired_ratio`.
        confidence: the level of the interval.

    Raises:
        ValueError: a sample is empty or holds a value that is not positive and finite.
    """
    log_a, log_b = _log(times), _log(baseline)
    sizes_a, sizes_b = _sizes(log_a, launches[0]), _sizes(log_b, launches[1])
    value = float(np.exp(np.median(log_b) - np.median(log_a)))
    n = min(len(log_a), len(log_b))
    if n < MINIMUM_PAIRS:
        return Ratio(value, None, None, n, confidence)
    generator = np.random.default_rng(_SEED)
    medians_b = _resampled_medians(log_b, sizes_b, generator)
    medians_a = _resampled_medians(log_a, sizes_a, generator)
    return _with_interval(value, medians_b - medians_a, n, confidence)


def _resampled_medians(sample: Array, sizes: Sequence[int], generator: np.random.Generator) -> Array:
    """The medians of `_RESAMPLES` nested resamples: launches with replacement, then rounds in each."""
    # scipy.stats.bootstrap resamples one level only.
    lengths = np.asarray(sizes)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    drawn = []
    for size in sizes:
        launch = generator.integers(len(sizes), size=_RESAMPLES)
        rounds = np.floor(generator.random((_RESAMPLES, size)) * lengths[launch, None]).astype(np.int64)
        drawn.append(sample[starts[launch, None] + rounds])
    return np.asarray(np.median(np.concatenate(drawn, axis=1), axis=1))


def _with_interval(value: float, log_values: Array, n: int, confidence: float) -> Ratio:
    tail = (1.0 - confidence) / 2.0
    low, high = np.exp(np.quantile(log_values, (tail, 1.0 - tail)))
    return Ratio(value, float(low), float(high), n, confidence)


def _sizes(sample: Array, launches: Sequence[int] | None) -> list[int]:
    sizes = [len(sample)] if launches is None else [rounds for rounds in launches if rounds]
    if sum(sizes) != len(sample) or min(sizes) < 0:
        raise ValueError(f"launches of {sizes} rounds do not add up to {len(sample)} rounds")
    return sizes


def _log_ratios(times: Sequence[float], baseline: Sequence[float]) -> Array:
    if len(times) != len(baseline):
        raise ValueError(
            f"a paired ratio needs the same rounds on both sides: {len(times)} against {len(baseline)}"
        )
    return _log(baseline) - _log(times)


def _log(samples: Sequence[float]) -> Array:
    values = _checked(samples)
    if not (values > 0).all():
        raise ValueError(f"times must be positive, got {values.min()} among {len(values)} values")
    return np.asarray(np.log(values))


def _checked(samples: Sequence[float]) -> Array:
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no samples: there is nothing to summarise")
    if not np.isfinite(values).all():
        raise ValueError(
            f"samples must be finite, got {values[~np.isfinite(values)][0]} among {values.size} values"
        )
    return values
