"""Held-out scores of probes with their standard errors, and the folds and shuffled labels they are judged by."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_callbacks.probing.copies import first_of, numbered
from tl_callbacks.probing.moments import Moments


@dataclass(frozen=True)
class ProbeScore:
    """What a probe reached on rows it was not fitted on.

    Attributes:
        value: accuracy in [0, 1], or R^2 (below 0 where the mean would do better); nan without rows.
        error: its standard error, which the bootstrap over rows approaches; 0 where all rows or none are right.
        chance: accuracy of always answering the most frequent class of the scored rows; 0 for R^2.
        rows: rows that were scored.
    """

    value: float
    error: float
    chance: float
    rows: int


def score(scores: Tensor, truth: Tensor, classes: int | None, copies: Tensor | None = None) -> ProbeScore:
    """Return accuracy or R^2 of predicted columns; rows whose scores are not finite are left out.

    The standard error of R^2 is that of a ratio of sums, to first order.

    Args:
        scores: (n, classes), or (n, 1) for regression.
        truth: (n,), classes or values.
        classes: their number, or None for regression.
        copies: (n,), the same number for rows that are copies, which the standard error counts as one; None: none are.

    Example:
        >>> found = score(torch.eye(2)[[0, 1, 1, 0]], torch.tensor([0, 1, 0, 0]), 2)
        >>> found.value, round(found.error, 3), found.chance
        (0.75, 0.217, 0.75)
    """
    finite = scores.isfinite().all(dim=1).cpu()
    scores, truth = scores.cpu()[finite], truth.cpu()[finite]
    rows = len(truth)
    if not rows:
        return ProbeScore(math.nan, math.nan, 0.0 if classes is None else math.nan, 0)
    if classes is not None:
        share = float((scores.argmax(dim=1) == truth).double().mean())
        chance = float(torch.bincount(truth.long(), minlength=1).max()) / rows
        off = (scores.argmax(dim=1) == truth).double() - share
        return ProbeScore(share, _error(off, copies, finite) / rows, chance, rows)
    missed = (truth.double() - scores[:, 0]).square()
    spread = (truth.double() - truth.double().mean()).square()
    total = float(spread.sum())
    if total == 0:
        return ProbeScore(math.nan, math.nan, 0.0, rows)
    ratio = float(missed.sum()) / total
    return ProbeScore(1 - ratio, _error(missed - ratio * spread, copies, finite) / total, 0.0, rows)


def _error(off: Tensor, copies: Tensor | None, kept: Tensor) -> float:
    """The norm of what each row adds, rows that are copies together."""
    if copies is None:
        return float(off.norm())
    numbers = numbered(copies[kept])
    return float(off.new_zeros(int(numbers.max()) + 1).index_add_(0, numbers, off).norm())


def stratified_folds(labels: Tensor, folds: int, *, seed: int = 0, copies: Tensor | None = None) -> Tensor:
    """Return a fold for each row, (n,), so that the folds hold each class in equal numbers, up to one.

    Args:
        labels: (n,), integers for classes; floating point values are dealt out at random.
        folds: how many, 2 or more.
        seed: of the order in which rows are dealt.
        copies: (n,), the same number for rows that are copies, which share a fold, by the label of the first; None, or
            fewer different rows than folds: each row is dealt alone.

    Example:
        >>> torch.bincount(stratified_folds(torch.tensor([0, 0, 0, 0, 1, 1]), 2))
        tensor([3, 3])
        >>> fold = stratified_folds(torch.tensor([0, 1, 0, 1]), 2, copies=torch.tensor([0, 0, 1, 1]))
        >>> bool(fold[0] == fold[1] != fold[2])
        True
    """
    if folds < 2:
        raise ValueError(f"folds is {folds}; expected 2 or more: a row is scored by a probe fitted on other folds.")
    if copies is not None:
        numbers = numbered(copies)
        if folds <= len(first := first_of(numbers)) < len(labels):
            return stratified_folds(labels.cpu()[first], folds, seed=seed)[numbers]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if not labels.is_floating_point():
        order = order[labels.cpu()[order].argsort(stable=True)]
    fold = torch.empty(len(labels), dtype=torch.long)
    fold[order] = torch.arange(len(labels)) % folds
    return fold


def shuffled_labels(labels: Tensor, folds: Tensor, *, seed: int = 0) -> Tensor:
    """Return the labels in random order within each fold: a control that features can tell nothing about.

    Shuffled across folds, a class that is rare in a fold is frequent outside it, and a probe that has learned nothing
    but frequencies scores below chance.

    Args:
        labels: (n,).
        folds: (n,), the fold of each row.
        seed: of the order.

    Example:
        >>> shuffled_labels(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1])).sort().values
        tensor([0, 1, 2, 3])
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    from_rows, to_rows = order[folds.cpu()[order].argsort(stable=True)], folds.cpu().argsort(stable=True)
    shuffled = labels.clone()
    shuffled[to_rows] = labels[from_rows]
    return shuffled


def classes_of(labels: Mapping[str, Tensor], more: Mapping[str, Tensor] | None = None) -> dict[str, int | None]:
    """Return by label set the number of classes, of labels and those of other rows too, or None for regression.

    Args:
        labels: by name, (n,), integers from 0 for classes or floating point for regression.
        more: the same of other rows.

    Example:
        >>> classes_of({"task": torch.tensor([0, 2]), "length": torch.tensor([0.5, 2.0])})
        {'task': 3, 'length': None}
    """
    kinds: dict[str, int | None] = {}
    for name, values in labels.items():
        both = torch.cat([values.cpu(), more[name].cpu()]) if more else values.cpu()
        kinds[name] = None if both.is_floating_point() else int(both.max()) + 1 if len(both) else 1
    return kinds


def moments_of_folds(
    features: Tensor, labels: Mapping[str, Tensor], fold_of_row: Tensor, folds: int, classes: Mapping[str, int | None]
) -> list[Moments]:
    """Return the moments of each fold.

    Args:
        features: (n, d).
        labels: by label set, (n,).
        fold_of_row: (n,), from 0.
        folds: how many.
        classes: by label set, as in `Moments`.

    Example:
        >>> parts = moments_of_folds(torch.ones(3, 2), {}, torch.tensor([0, 1, 1]), 2, {})
        >>> [part.n for part in parts]
        [1, 2]
    """
    parts: list[Moments] = []
    for number in range(folds):
        rows = fold_of_row == number
        chosen = {name: values[rows.to(values.device)] for name, values in labels.items()}
        part = parts[0].without_rows() if parts else Moments(features.shape[1], classes)
        parts.append(part.update(features[rows.to(features.device)], chosen))
    return parts
