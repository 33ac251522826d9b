"""Robust statistics of repeated timings, and when to keep silent.

Timings are skewed and drift, so the centre is the median and the spread the interquartile range (IQR).
Two variants that were measured in the same rounds are compared round by round:

    r_i = b_i / a_i,    ratio = median(r),    interval = percentile bootstrap of the median of log r

so that a drift that hits both sides of a round cancels. A ratio B/A of times above 1 says that A is faster.
A ratio whose confidence interval straddles 1 is *inconclusive*. So is one of fewer than `MINIMUM_PAIRS`
rounds: n values bracket their true median with a probability of at most 1 - 2^(1-n), which reaches 95 %
at n = 6 (sign test). Source of the interval: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.stats  # type: ignore[import-untyped]  # its stubs are no test requirement

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
    return tuple(float(each) for each in np.quantile(_checked(samples), levels))


def summarize(samples: Sequence[float]) -> Summary:
    """Median and quartiles.

    Raises:
        ValueError: `samples` is empty or holds a value that is not finite.
    """
    q1, median, q3 = quantiles(samples, (0.25, 0.5, 0.75))
    return Summary(median, q1, q3, len(samples))


def paired_ratio(
    times: Sequence[float], baseline: Sequence[float], *, confidence: float = CONFIDENCE
) -> Ratio:
    """The baseline's time over this variant's, paired by round: above 1 this variant is the faster one.

    Args:
        times: seconds of the variant A, one value a round.
        baseline: seconds of the variant B in the same rounds.
        confidence: the level of the interval.

    Raises:
        ValueError: the two differ in length, or hold a value that is not positive and finite.
    """
    if len(times) != len(baseline):
        raise ValueError(
            f"a paired ratio needs the same rounds on both sides: {len(times)} against {len(baseline)}"
        )
    return _ratio([_log_ratios(times, baseline)], confidence)


def geometric_mean_ratio(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], *, confidence: float = CONFIDENCE
) -> Ratio:
    """The geometric mean over models of the paired ratio, each model's rounds resampled on their own.

    Args:
        pairs: for each model the times of A and those of the baseline B in the same rounds.
        confidence: the level of the interval.

    Raises:
        ValueError: no pairs, or one that `paired_ratio` would refuse.
    """
    if not pairs:
        raise ValueError("a geometric mean needs at least one model")
    for times, baseline in pairs:
        if len(times) != len(baseline):
            raise ValueError(f"a paired ratio needs the same rounds: {len(times)} against {len(baseline)}")
    return _ratio([_log_ratios(*pair) for pair in pairs], confidence)


def unpaired_ratio(
    times: Sequence[float], baseline: Sequence[float], *, confidence: float = CONFIDENCE
) -> Ratio:
    """The ratio of the medians of two independent samples, B over A, such as two runs on different days.

    Raises:
        ValueError: a sample is empty or holds a value that is not positive and finite.
    """
    log_a, log_b = _log(times), _log(baseline)
    value = float(np.exp(np.median(log_b) - np.median(log_a)))
    n = min(len(log_a), len(log_b))
    if n < MINIMUM_PAIRS:
        return Ratio(value, None, None, n, confidence)

    def difference(b: Array, a: Array, axis: int) -> Array:
        return np.asarray(np.median(b, axis=axis) - np.median(a, axis=axis))

    low, high = _interval([log_b, log_a], difference, confidence)
    return Ratio(value, low, high, n, confidence)


def _ratio(log_ratios: Sequence[Array], confidence: float) -> Ratio:
    """The exponential of the mean over models of the median over rounds, with its interval."""

    def mean_of_medians(*samples: Array, axis: int) -> Array:
        return np.asarray(np.mean([np.median(each, axis=axis) for each in samples], axis=0))

    value = float(np.exp(np.mean([np.median(each) for each in log_ratios])))
    n = min(len(each) for each in log_ratios)
    if n < MINIMUM_PAIRS:
        return Ratio(value, None, None, n, confidence)
    low, high = _interval(log_ratios, mean_of_medians, confidence)
    return Ratio(value, low, high, n, confidence)


def _interval(samples: Sequence[Array], statistic: object, confidence: float) -> tuple[float, float]:
    # The percentile method: the bias correction of BCa rests on a jackknife that is degenerate for medians.
    result = scipy.stats.bootstrap(
        samples,
        statistic,
        n_resamples=_RESAMPLES,
        batch=1000,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(_SEED),
    )
    interval = result.confidence_interval
    return float(np.exp(interval.low)), float(np.exp(interval.high))


def _log_ratios(times: Sequence[float], baseline: Sequence[float]) -> Array:
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
