"""Means and ratios of what several seeds answer on the same items, with bootstrap intervals."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

LEVEL, RESAMPLES = 0.95, 10_000


@dataclass(frozen=True)
class Interval:
    """A mean with its lower and upper limit, as fractions; formatted, all three in percent."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return "{:{s}} [{:{s}}, {:{s}}]".format(*(100 * x for x in asdict(self).values()), s=spec)


def paired_interval(
    a: ArrayLike, b: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean of `a - b` with a percentile interval from resampled seeds and test items.

    Seeds and items are crossed: every seed answers the same items. So a resample draws seeds, draws
    items *once*, and uses these for all its seeds; new items for every seed would treat an item's
    difficulty as noise that more seeds average out.

    What few seeds can say: the variance between S seeds enters as (S - 1) / S of its unbiased
    estimate. One seed gives an interval for the choice of items only; two show that there is
    training noise, not how much. Simulated with 540 items, 95 % intervals of 1, 2, 3 and 5 seeds
    cover 72, 90, 94 and 96 % where a seed moves each accuracy by 2.5 points (standard deviation),
    but 33, 70, 81 and 88 % where by 7. Without training noise they are too wide (Owen).

    Args:
        a: 0 or 1 per seed and test item, shape (seeds, items).
        b: the same of the row to compare with; or 0, for an interval of `a` alone.
        level: coverage aimed at, between 0 and 1.
        resamples: number of resamples.
        seed: seed of the resampling, not of a training run.

    Raises:
        ValueError: `a` is not (seeds, items) with at least one entry, or `b` has another shape.

    References:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13.
        Davison and Hinkley, "Bootstrap Methods and their Application", 1997, sec. 3.8.
        Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007.

    Example:
        >>> paired_interval([[1, 1, 0, 1]], [[1, 1, 0, 1]])
        Interval(mean=0.0, low=0.0, high=0.0)
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim != 2 or a.size == 0 or b.shape not in ((), a.shape):
        shapes = f"`a` has shape {a.shape}, `b` has shape {b.shape}"
        raise ValueError(f"{shapes}: expected (seeds, items) of both, or `b` = 0. Stack the seeds.")
    low, high = _limits(_resampled([a - b], resamples, seed)[0] / a.size, level)
    return Interval(float((a - b).mean()), low, high)


def ratio_interval(
    a: ArrayLike, base: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the sum of `a` over the sum of `base` with a percentile interval, as `paired_interval` resamples.

    Both sums are taken over the same draws: where `a` is `base`, the interval is 1 to 1. Draws in which `base` is 0 are
    left out.

    Args:
        a: per seed and item, shape (seeds, items); the difference of two rows' answers for that of their ratios.
        base: of the same shape.
        level: coverage aimed at, between 0 and 1.
        resamples: number of resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: they are not (seeds, items) with at least one entry, or `base` sums to 0.

    Example:
        >>> ratio_interval([[1, 0, 1, 0]], [[1, 1, 1, 1]]).mean
        0.5
    """
    a, base = np.asarray(a, dtype=float), np.asarray(base, dtype=float)
    if a.ndim != 2 or a.size == 0 or base.shape != a.shape:
        shapes = f"`a` has shape {a.shape}, `base` has shape {base.shape}"
        raise ValueError(f"{shapes}: expected (seeds, items) of both. Stack the seeds.")
    if not base.sum() > 0:
        raise ValueError(f"`base` sums to {base.sum()}; expected more than 0, to have a share of.")
    now, before = _resampled([a, base], resamples, seed)
    low, high = _limits(now[before > 0] / before[before > 0], level)
    return Interval(float(a.sum() / base.sum()), low, high)


def _resampled(values: list[np.ndarray], resamples: int, seed: int) -> np.ndarray:
    """Return the sum of each array, (seeds, items), over the same draws of seeds and items: (arrays, resamples)."""
    num_seeds, num_items = values[0].shape
    rng, sums = np.random.default_rng(seed), np.empty((len(values), resamples))
    chunk = max(1, 500_000 // num_items)  # 4 MB a buffer, at any number of items
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        seeds = rng.integers(num_seeds, size=(size, num_seeds))
        items = rng.integers(num_items, size=(size, num_items))
        items += num_items * np.arange(size)[:, None]
        counts = np.bincount(items.ravel(), minlength=items.size).reshape(items.shape).astype(float)
        for place, array in enumerate(values):
            by_seed = counts @ array.T  # whole numbers of answers, so exact
            sums[place, start : start + size] = np.take_along_axis(by_seed, seeds, axis=1).sum(axis=1)
    return sums


def _limits(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
