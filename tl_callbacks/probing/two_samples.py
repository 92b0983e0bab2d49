"""A distance between two samples beside its null, and what all such distances do with their features."""

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_callbacks.probing.similarity import centred, wide


@dataclass(frozen=True)
class Distance:
    """A distance between two data sets and what it would be between two samples of one distribution.

    Args:
        measure: its name.
        estimate: the distance; NaN where there are too few rows or a feature is not finite.
        null: draws of the distance between samples of one distribution.

    Example:
        >>> print(Distance("mmd2", 0.5, (0.0, 0.1, 0.2)))
        mmd2 0.5 (null 0.1, 95 % of it below 0.19; p = 0.25)
    """

    measure: str
    estimate: float
    null: tuple[float, ...]

    @property
    def null_mean(self) -> float:
        """The mean of the null: the share of the estimate that is due to few rows."""
        return statistics.fmean(self.null) if self.null else math.nan

    @property
    def null_high(self) -> float:
        """The 95 % quantile of the null."""
        return float(torch.tensor(self.null, dtype=torch.float64).quantile(0.95)) if self.null else math.nan

    @property
    def excess(self) -> float:
        """The estimate less the null's mean: about 0 between samples of one distribution."""
        return self.estimate - self.null_mean

    @property
    def p_value(self) -> float:
        """The share of draws, this one included, that are as large: at least 1 / (draws + 1)."""
        if not self.null or math.isnan(self.estimate):
            return math.nan
        return (1 + sum(draw >= self.estimate for draw in self.null)) / (1 + len(self.null))

    def __str__(self) -> str:
        measure, estimate, null, high, p = self.cells()
        return f"{measure} {estimate} (null {null}, 95 % of it below {high}; p = {p})"

    def cells(self) -> list[str]:
        """Return measure, estimate, mean and 95 % quantile of the null, and p-value, as texts."""
        return [self.measure, *(f"{v:.3g}" for v in (self.estimate, self.null_mean, self.null_high, self.p_value))]


def check(x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless the features are (n, d) and (n', d)."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features of shapes {tuple(x.shape)} and {tuple(y.shape)}; expected (n, d) and (n', d). Pool tokens first."
        )


def pooled(x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """Return the rows of both about their mean, and how many are of the first.

    Where d > n + n' they are rotated into their span, which changes no distance.
    """
    z = centred(torch.cat([wide(x), wide(y)]))
    if z.shape[1] > len(z) and z.isfinite().all():
        z = torch.linalg.qr(z.T, mode="r").R.T
    return z, len(x)


def usable(z: Tensor, first: int) -> bool:
    """Return whether there are two rows of each, and all finite."""
    return min(first, len(z) - first) >= 2 and bool(z.isfinite().all())
