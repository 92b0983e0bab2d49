"""What a measure reads of one model, by row, and how two readings compare: change, its standard error, retention."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["score", "loss", "divergence"]


@dataclass(frozen=True)
class Reading:
    """A value that is a ratio of sums over rows, as accuracy and token-weighted cross-entropy are.

    Args:
        sums: (rows,), float64, such as hits, or nats.
        weights: (rows,), float64, such as ones, or tokens.
        kind: "score" (0 or more, higher is better), "loss" (in nats, lower is better) or "divergence" (from the
            pretrained model, 0 of itself).
        chance: what a model that knows nothing scores.

    Example:
        >>> Reading(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0]), "loss").value
        1.0
    """

    sums: Tensor
    weights: Tensor
    kind: Kind
    chance: float = 0.0

    @property
    def value(self) -> float:
        """The ratio; nan where nothing counts."""
        total = float(self.weights.sum())
        return float(self.sums.sum()) / total if total > 0 else math.nan

    @property
    def error(self) -> float:
        """The standard error of the value over rows, to first order."""
        return _error(self.sums, self.weights)

    @property
    def lucky(self) -> float:
        """What chance comes to in one of forty cases: two of its standard errors above it."""
        return self.chance + 2 * math.sqrt(self.chance * (1 - self.chance) / max(float(self.weights.sum()), 1.0))


class Change(NamedTuple):
    """What became of a value.

    Attributes:
        value: as it is now.
        forgetting: how much worse than the pretrained model: base - now of a score, now - base of a loss, and a
            divergence itself; below 0 where it got better.
        error: its standard error, paired by row.
        retention: now / base of a score, exp(base - now) of a loss (the ratio of the perplexities), so above 1 where
            it got better; nan of a divergence, and where the base scored 0.
    """

    value: float
    forgetting: float
    error: float
    retention: float


def compare(now: Reading, base: Reading, base_value: float | None = None) -> Change:
    """Return what became of a value since the pretrained model.

    Args:
        now: of the tuned model.
        base: of the pretrained one, on the same rows.
        base_value: its value as the run recorded it; None: that of `base`.

    Example:
        >>> hits, ones = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.ones(4)
        >>> change = compare(Reading(torch.tensor([1.0, 1.0, 0.0, 0.0]), ones, "score"), Reading(hits, ones, "score"))
        >>> change.forgetting, round(change.retention, 4)
        (0.25, 0.6667)
    """
    before = base.value if base_value is None else base_value
    if now.kind == "divergence":
        return Change(now.value, now.value, now.error, math.nan)
    sign = 1 if now.kind == "loss" else -1
    return Change(
        now.value,
        sign * (now.value - before) + 0.0,  # no -0.0
        _error(now.sums - base.sums, now.weights),
        retention(now.value, before, now.kind),
    )


def retention(now: float, base: float, kind: Kind) -> float:
    """Return what share of a value is left; nan where there is none.

    Example:
        >>> retention(0.45, 0.9, "score"), retention(2.0, 2.0, "loss")
        (0.5, 1.0)
    """
    if kind == "loss":
        return math.exp(min(base - now, 700.0))
    return now / base if kind == "score" and base > 0 else math.nan


def _error(sums: Tensor, weights: Tensor) -> float:
    total, rows = float(weights.sum()), int((weights > 0).sum())
    if total <= 0 or rows < 2:
        return math.nan
    spread = sums - weights * (sums.sum() / total)
    return float(torch.linalg.vector_norm(spread)) / total * math.sqrt(rows / (rows - 1))
