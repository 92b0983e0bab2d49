"""The numbers of one set of rows at one moment, by measure and group."""

import functools
import math
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
from tl_callbacks.probing.scores import classes_of, moments_of_folds, score, shuffled_labels, stratified_folds
from tl_callbacks.probing.similarity import MIN_ROWS, NOISE, centred, debias, similarity_ratio
from tl_callbacks.probing.sums import Centred
from tl_callbacks.probing.transferability import log_me_of

Measures = dict[str, dict[str, float]]  # measure to group to value

FOLDS = 5
WIDE = 1024  # features a row, above which a fixed random projection to as many is measured


def as_targets(labels: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Return targets for probes and the rows that have one: classes numbered from 0, or values; None without two.

    Negative classes and values that are no numbers mean that a row has no label.

    Example:
        >>> targets, rows = as_targets(torch.tensor([7, -100, 3, 7]))
        >>> targets.tolist(), rows.tolist()
        ([1, 0, 1], [True, False, True, True])
    """
    if labels is None:
        return None
    rows = labels.isfinite() if labels.is_floating_point() else labels >= 0
    targets = labels[rows].double() if labels.is_floating_point() else labels[rows].long()
    values = torch.unique(targets)
    if len(values) < 2:
        return None
    return (targets if targets.is_floating_point() else torch.searchsorted(values, targets)), rows


def measure(
    features: Mapping[str, Tensor],
    labels: Tensor | None = None,
    reference: Mapping[str, Tensor] | None = None,
    *,
    shuffled: bool = False,
    log_me: bool = False,
    products: dict[str, Tensor] | None = None,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Measures:
    """Return all numbers of the groups' features; those that do not exist are left out.

    `probe` is the held-out accuracy (R^2 for real-valued labels) of a ridge probe by 5 folds and `probe_se` its
    standard error; `effective_rank` and `anisotropy` the shape of the features; `cka` (debiased) and `procrustes`
    (angular) how far they are from the reference. Groups of more than 1024 features a row are measured in a fixed
    random projection to 1024.

    Args:
        features: by group, (n, d).
        labels: (n,), integers for classes or floating point; None: no probes.
        reference: by group, features of the same rows in the pretrained model; None: no similarities.
        shuffled: whether shuffled labels are probed too, as `probe_shuffled`, with `probe_chance`.
        log_me: whether LogME is computed.
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
        x = _narrow(features[name])
        own[name], sums = _of_group(x, targets, shuffled, log_me, seed)
        if against is not None:
            own[name] |= _to_reference(x, sums, _narrow(against), {} if products is None else products, name)
    parts: Sequence[dict[str, Any]] = gather_object([own]) if ranks > 1 else [own]
    merged = {name: values for part in parts for name, values in part.items()}
    found: Measures = {}
    for name in names:
        for kind, value in merged[name].items():
            if math.isfinite(value):
                found.setdefault(kind, {})[name] = value
    return found


def _of_group(
    x: Tensor, targets: tuple[Tensor, Tensor] | None, shuffled: bool, log_me: bool, seed: int
) -> tuple[dict[str, float], Centred]:
    """Return the measures of a group by itself, and the sums of its rows, without those that are not finite."""
    found: dict[str, float] = {}
    total = None
    if targets is not None and len(targets[0]) > FOLDS:
        labels, rows = targets
        kept = x[rows]
        fold = stratified_folds(labels, FOLDS, seed=seed)
        sets = {"task": labels, **({"shuffled": shuffled_labels(labels, fold, seed=seed)} if shuffled else {})}
        kinds = classes_of(sets)
        parts = moments_of_folds(kept, sets, fold, FOLDS, kinds)
        scored = held_out_ridge(parts, kept, fold)
        scores = {name: score(scored[name], sets[name], kinds[name]) for name in sets}
        found |= {"probe": scores["task"].value, "probe_se": scores["task"].error}
        if shuffled:
            found |= {"probe_shuffled": scores["shuffled"].value, "probe_chance": scores["task"].chance}
        total = parts[0].without_rows()
        for part in parts:
            total.merge(part)
        if log_me:
            found["log_me"] = log_me_of(total)
        total = total if len(kept) == len(x) else None
    sums = (total or Moments.of(x)).centred()
    return found | {"effective_rank": effective_rank(sums), "anisotropy": mean_cosine(sums)}, sums


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


def _narrow(features: Tensor) -> Tensor:
    width = features.shape[1]
    return features.float() if width <= WIDE else _projection(width)(features).float()


@functools.lru_cache(maxsize=4)
def _projection(width: int) -> RandomProjection:
    return RandomProjection(width, WIDE)
