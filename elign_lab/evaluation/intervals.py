"""95 % intervals: Wilson's for counts of molecules, the bootstrap over molecules for everything else.

A fraction of molecules is a binomial proportion. Its bootstrap is too narrow near 0 and 1, and has no width at all
when all molecules agree; Wilson's score interval has neither fault. Pooled atoms and medians are resampled by
molecule, because the atoms of a molecule succeed or fail together.

Uniqueness must not be bootstrapped: a resample repeats molecules, so it contains 37 % fewer distinct ones even when
all are different. Its interval is Wilson's, with "valid and not seen before" as the success of each molecule. That is
right when duplicates are rare, and too wide rather than too narrow when they are many, because a molecule that is found
leaves fewer to be found. What it estimates is the expected uniqueness of another run of the same number of molecules.
The tests measure the coverage of all of these by simulation; it is 0.88 or more, the least where a proportion is
within about one molecule of 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

LEVEL = 0.95
_INDICES_AT_A_TIME = 1 << 20  # bounds the memory of the bootstrap

FloatArray = NDArray[np.floating]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; NaN where there is nothing to estimate from."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """{"value", "low", "high"}, with None for NaN, because JSON has no NaN."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {key: number if np.isfinite(number) else None for key, number in numbers.items()}


def wilson(successes: int, trials: int) -> Interval:
    """Proportion with Wilson's score interval (Wilson, JASA 22, 209, 1927).

    Without trials the interval is all of [0, 1], and the value is 0, as EDM has it for the uniqueness of no molecules.
    """
    if trials == 0:
        return Interval(0.0, 0.0, 1.0)
    interval = binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return Interval(successes / trials, float(interval.low), float(interval.high))


def bootstrap(statistic: Callable[[NDArray[np.intp]], FloatArray], n: int, *, seed: int, n_boot: int) -> Interval:
    """Percentile bootstrap over n molecules (Efron and Tibshirani, 1993).

    statistic: from indices of molecules (resamples, n) to values (resamples,). The same seed resamples the same
    molecules, so statistics of two paired samples can be subtracted inside `statistic`.
    """
    if n_boot < 1:
        raise ValueError(f"n_boot must be at least 1, got {n_boot}")
    value = float(statistic(np.arange(n)[None])[0])
    if not np.isfinite(value):
        return Interval(np.nan, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    rows = max(1, _INDICES_AT_A_TIME // n)
    sizes = [min(rows, n_boot - start) for start in range(0, n_boot, rows)]
    values = np.concatenate([statistic(rng.integers(n, size=(size, n))) for size in sizes])
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def ratio_of_sums(above: NDArray[Any], below: NDArray[Any], *, seed: int, n_boot: int) -> Interval:
    """Sum of `above` over sum of `below`, each one per molecule, with a bootstrap over molecules."""
    return bootstrap(lambda i: above[i].sum(-1) / below[i].sum(-1), len(below), seed=seed, n_boot=n_boot)


def pooled(successes: NDArray[np.integer], trials: NDArray[np.integer], *, seed: int, n_boot: int) -> Interval:
    """Sum of successes over sum of trials, each one per molecule, with a bootstrap over molecules.

    When all trials end alike the bootstrap has no width; the open end is then Wilson's for that many molecules, which
    is wide enough for any number of trials in a molecule.
    """
    n = len(trials)
    interval = ratio_of_sums(successes, trials, seed=seed, n_boot=n_boot)
    if interval.value in (0.0, 1.0):
        return wilson(int(interval.value) * n, n)
    return interval


def median(values: FloatArray) -> FloatArray:
    """Median over the last axis of the entries that are not NaN; NaN where there is none. (..., n) -> (...)."""
    ordered = np.sort(values, axis=-1)  # NaN goes last
    count = np.isfinite(ordered).sum(-1, keepdims=True)
    low = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, -1)
    high = np.take_along_axis(ordered, np.minimum(count // 2, values.shape[-1] - 1), -1)
    return ((low + high) / 2)[..., 0]


def paired_difference(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Interval:
    """Proportion of the second minus the first, for paired outcomes (n,).

    Newcombe, Statistics in Medicine 17, 2635 (1998), method 10: Wilson's limits, with the correlation of the pairs.
    """
    n = len(first)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    product = float(both * neither - only_first * only_second)
    if product > 0:
        product = max(product - n / 2, 0.0)
    margins = float(both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    correlation = product / np.sqrt(margins) if margins else 0.0
    return difference(wilson(int(first.sum()), n), wilson(int(second.sum()), n), correlation)


def difference(first: Interval, second: Interval, correlation: float = 0.0) -> Interval:
    """Second minus first, from their intervals (Newcombe 1998: the distances to the limits add in quadrature)."""
    value = second.value - first.value
    below, above = second.value - second.low, second.high - second.value
    first_below, first_above = first.value - first.low, first.high - first.value
    low = value - np.sqrt(below**2 - 2 * correlation * below * first_above + first_above**2)
    high = value + np.sqrt(above**2 - 2 * correlation * above * first_below + first_below**2)
    return Interval(value, float(low), float(high))
