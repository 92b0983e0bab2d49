"""The numbers of one set of rows at one moment, by measure and group."""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from tl_callbacks.probing.alignment import procrustes_from
from tl_callbacks.probing.geometry import effective_rank, mean_cosine
from tl_callbacks.probing.linear_probe import held_out_ridge
from tl_callbacks.probing.moments import Moments
from tl_callbacks.probing.projection import RandomProjection
from tl_callbacks.probing.scores import (
    ProbeScore,
    classes_of,
    moments_of_folds,
    score,
    shuffled_labels,
    stratified_folds,
)
from tl_callbacks.probing.similarity import MIN_ROWS, NOISE, centred, debias, similarity_ratio
from tl_callbacks.probing.sums import Centred
from tl_callbacks.probing.targets import LEAST, as_targets
from tl_callbacks.probing.transferability import log_me_of

Measures = dict[str, dict[str, float]]  # measure to group to value

FOLDS = LEAST - 1
WIDE = 1024  # features a row, above which a fixed random projection to as many is measured


def measure(
    features: Mapping[str, Tensor],
    labels: Tensor | None = None,
    reference: Mapping[str, Tensor] | None = None,
    *,
    shuffled: bool = False,
    log_me: bool = False,
    copies: Tensor | None = None,
    products: dict[str, Tensor] | None = None,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Measures:
    """Return all numbers of the groups' features; those that do not exist are left out.

    `probe` is the held-out accuracy (R^2 for real-valued labels) of a ridge probe by 5 folds and `probe_se` its
    standard error; of several labels a row the means over labels, of which the latter is at least the mean's standard
    error; `effective_rank` and `anisotropy` the shape of the features; `cka` (debiased) and `procrustes`
    (angular) how far they are from the reference. Groups of more than 1024 features a row are measured in a fixed
    random projection to 1024.

    Args:
        features: by group, (n, d).
        labels: as in `as_targets`; None: no probes.
        reference: by group, features of the same rows in the pretrained model; None: no similarities.
        shuffled: whether shuffled labels are probed too, as `probe_shuffled`, with `probe_chance`.
        log_me: whether LogME is computed.
        copies: (n,), the same number for rows that are copies and share a fold; None: none are.
        products: what the reference's similarity to itself is kept in, from one call to the next.
        seed: of the folds and the shuffled labels.
        rank: number of this process; the groups are shared among the ranks.
        ranks: how many share them; where more than one, call it on all.

    Example:
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> found = measure({"layer": x}, (x[:, 0] > 0).long(), {"layer": x})
        >>> sorted(found), round(found["cka"]["layer"], 6)
        (['anisotropy', 'cka', 'effective_rank', 'probe', 'probe_se', 'procrustes'], 1.0)
    """
    targets = as_targets(labels)
    names = list(features)
    own = {}
    for name in names[rank::ranks]:
        against = None if reference is None else reference.get(name)
        x = narrow(features[name])
        own[name], sums = _of_group(x, targets, copies, shuffled=shuffled, log_me=log_me, seed=seed)
        if against is not None:
            own[name] |= _to_reference(x, sums, narrow(against), {} if products is None else products, name)
    parts: Sequence[dict[str, Any]] = gather_object([own]) if ranks > 1 else [own]
    merged = {name: values for part in parts for name, values in part.items()}
    found: Measures = {}
    for name in names:
        for kind, value in merged[name].items():
            if math.isfinite(value):
                found.setdefault(kind, {})[name] = value
    return found


def _of_group(
    x: Tensor,
    targets: tuple[dict[str, Tensor], Tensor] | None,
    copies: Tensor | None,
    *,
    shuffled: bool,
    log_me: bool,
    seed: int,
) -> tuple[dict[str, float], Centred]:
    """Return the measures of a group by itself, and the sums of its rows, without those that are not finite."""
    found: dict[str, float] = {}
    total = None
    if targets is not None and int(targets[1].sum()) >= LEAST:
        labels, rows = targets
        kept, alike = x[rows], None if copies is None else copies[rows]
        fold = stratified_folds(_strata(labels), FOLDS, seed=seed, copies=alike)
        drawn = {f"shuffled {name}": shuffled_labels(column, fold, seed=seed) for name, column in labels.items()}
        sets = {**labels, **(drawn if shuffled else {})}
        kinds = classes_of(sets)
        parts = moments_of_folds(kept, sets, fold, FOLDS, kinds)
        scored = held_out_ridge(parts, kept, fold)
        scores = {name: score(scored[name], sets[name], kinds[name], alike) for name in sets}
        task = [scores[name] for name in labels]
        found |= {"probe": _mean(task, "value"), "probe_se": _mean(task, "error")}
        if shuffled:
            control = [scores[name] for name in drawn]
            found |= {"probe_shuffled": _mean(control, "value"), "probe_chance": _mean(task, "chance")}
        total = parts[0].without_rows()
        for part in parts:
            total.merge(part)
        if log_me:
            found["log_me"] = statistics.fmean(log_me_of(total, name) for name in labels)
        total = total if len(kept) == len(x) else None
    sums = (total or Moments.of(x)).centred()
    return found | {"effective_rank": effective_rank(sums), "anisotropy": mean_cosine(sums)}, sums


def _strata(labels: Mapping[str, Tensor]) -> Tensor:
    """What folds are stratified by: the classes, of several labels their pattern, or nothing."""
    columns = list(labels.values())
    if len(columns) == 1 or any(column.is_floating_point() for column in columns):
        return columns[0].double() if len(columns) > 1 else columns[0]
    patterns: Tensor = torch.unique(torch.stack(columns, dim=1), dim=0, return_inverse=True)[1]
    return patterns


def _mean(scores: Sequence[ProbeScore], field: str) -> float:
    return statistics.fmean(getattr(score, field) for score in scores)


def _to_reference(
    x: Tensor, sums: Centred, reference: Tensor, products: dict[str, Tensor], name: str
) -> dict[str, float]:
    """Return debiased CKA and the Procrustes angle, of one product of the two."""
    if sums.n < len(x) or len(x) < MIN_ROWS:
        return {}
    x, y = centred(x), centred(reference)
    cross, of_x, of_y = x.T @ y, x.square().sum(1), y.square().sum(1)
    if name not in products:
        products[name] = _hsic(y.T @ y, of_y, of_y)
    cka = similarity_ratio(_hsic(cross, of_x, of_y), _hsic(sums.scatter, of_x, of_x), products[name])
    return {"cka": float(cka), "procrustes": procrustes_from(cross, of_x.sum(), of_y.sum(), "angular")}


def _hsic(product: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    squared = product.square().sum()
    found = debias(squared, (of_x * of_y).sum(), of_x.sum() * of_y.sum(), len(of_x))
    return torch.where(found.abs() <= NOISE * squared, 0.0, found)


def narrow(features: Tensor) -> Tensor:
    """Return features as they are measured, in float32: more than 1024 a row in a fixed random projection to as many.

    Example:
        >>> narrow(torch.zeros(2, 3000)).shape
        torch.Size([2, 1024])
    """
    width = features.shape[1]
    return features.float() if width <= WIDE else _projection(width)(features).float()


@functools.lru_cache(maxsize=4)
def _projection(width: int) -> RandomProjection:
    return RandomProjection(width, WIDE)
