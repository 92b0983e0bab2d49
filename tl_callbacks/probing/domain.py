"""How far apart two data sets' features are, each distance beside what equal distributions would give.

All four distances are positive for two samples of one distribution, or scatter about 0: without the null they say
nothing. They see different things: the classifier behind the proxy A-distance is linear and blind to a change of
variance alone. Generators are the functions' own; the global one is not touched.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_callbacks.probing.gaussian_distances import coral, frechet
from tl_callbacks.probing.two_samples import Distance, check, pooled, usable
from tl_callbacks.tables import table

FOLDS = 5


@dataclass(frozen=True)
class DomainDistances:
    """The distances of `domain_distance`, by layer and measure; it prints as a table.

    Args:
        layers: by layer, by measure: "mmd2", "pad", "frechet" and "coral".

    Example:
        >>> domain_distance(torch.zeros(20, 2), torch.ones(20, 2), permutations=10).layers.keys()
        dict_keys(['features'])
    """

    layers: Mapping[str, Mapping[str, Distance]]

    def __getitem__(self, layer: str) -> Mapping[str, Distance]:
        return self.layers[layer]

    def __str__(self) -> str:
        titles = ["layer", "measure", "estimate", "null", "null 95 %", "p"]
        rows = [[layer, *found.cells()] for layer, measures in self.layers.items() for found in measures.values()]
        return table([titles, *rows])


def mmd2(x: Tensor, y: Tensor, *, permutations: int = 200, max_rows: int = 2000, seed: int = 0) -> Distance:
    """Return the unbiased squared maximum mean discrepancy; its null permutes which data set a row is of.

    With k(u, v) = exp(-||u - v||^2 / m), m the median of ||u - v||^2 over all pairs, as in the authors' code: mean of
    k within x, plus within y, less twice between. It sees any difference of the distributions.

    Args:
        x: features, (n, d).
        y: features of other rows, (n', d).
        permutations: draws of the null.
        max_rows: of each data set; of more, so many are drawn. Memory is that of a matrix of 2 max_rows squared.
        seed: of the generator.

    Returns:
        About 0 for one distribution, so negative values too, and at most 2. 0 where all rows are equal.

    Raises:
        ValueError: features that are not (n, d) and (n', d).

    Example:
        >>> x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
        >>> mmd2(x[:50], x[50:] + 2).p_value < 0.01
        True

    References:
        Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, equation 3. https://jmlr.org/papers/v13/gretton12a.html
    """
    generator = torch.Generator().manual_seed(seed)
    check(x, y)
    x, y = (z[torch.randperm(len(z), generator=generator)[:max_rows].sort().values.to(z.device)] for z in (x, y))
    z, first = pooled(x, y)
    if not usable(z, first):
        return Distance("mmd2", math.nan, ())
    squares = z.square().sum(1)
    distances = (squares[:, None] + squares - 2 * (z @ z.T)).clamp_(min=0).fill_diagonal_(0.0)
    above = distances[tuple(torch.triu_indices(len(z), len(z), offset=1, device=z.device))]
    # Where more than half of all pairs are equal, the median is of the others.
    scale = above.median() if above.median() > 0 else above[above > 0].median() if above.any() else above.new_ones(())
    kernel = torch.exp(distances / -scale).fill_diagonal_(0.0)
    members = _members(len(z), first, permutations, generator).to(kernel)
    total, row = kernel.sum(), kernel.sum(0) @ members
    within = (members * (kernel @ members)).sum(0)
    n, m = first, len(z) - first
    values = (
        within / (n * (n - 1)) + (total - 2 * row + within) / (m * (m - 1)) - 2 * (row - within) / (n * m)
    ).tolist()
    return Distance("mmd2", values[0], tuple(values[1:]))


def proxy_a_distance(x: Tensor, y: Tensor, *, permutations: int = 200, seed: int = 0) -> Distance:
    """Return the proxy A-distance 2 (1 - 2 error), from how well a linear classifier tells the data sets apart.

    The error is the mean of both data sets' error rates over 5 folds. The classifier is linear discriminant analysis
    with equal priors; the covariance is shrunk by Ledoit and Wolf's rule, so d > n will do. The null permutes which
    data set a row is of: total sums do not change with that, so one factorisation a fold serves all permutations.

    Args:
        x: features, (n, d).
        y: features of other rows, (n', d).
        permutations: draws of the null.
        seed: of the generator, for the folds too.

    Returns:
        2 for data sets that a line separates, about 0 for one distribution, where it may be negative.

    Raises:
        ValueError: features that are not (n, d) and (n', d).

    Example:
        >>> x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
        >>> proxy_a_distance(x[:50], x[50:] + 9).estimate
        2.0

    References:
        Ben-David et al., "Analysis of Representations for Domain Adaptation", NeurIPS 2006, section 5. Ledoit and
        Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004, section 3.2.
    """
    generator = torch.Generator().manual_seed(seed)
    check(x, y)
    z, first = pooled(x, y)
    if not usable(z, first):
        return Distance("pad", math.nan, ())
    members = _members(len(z), first, permutations, generator).to(z)
    wrong = z.new_zeros(2, members.shape[1])
    for test in (
        torch.randperm(len(z), generator=generator).to(z.device).tensor_split(FOLDS)
    ):  # some without rows, of few
        keep = torch.ones(len(z), dtype=torch.bool, device=z.device)
        keep[test] = False
        mean = z[keep].mean(0)
        train, labels = z[keep] - mean, members[keep]
        ones = labels.sum(0)
        # About the mean of all: the sums of the two sides differ in sign.
        sums = train.T @ labels
        both = (ones > 0) & (ones < len(train))
        upper, lower = sums / ones.clamp(min=1), -sums / (len(train) - ones).clamp(min=1)
        direction = torch.linalg.solve(_shrunk(train, x.shape[1]), (upper - lower) * both)
        scores = (z[test] - mean) @ direction - ((upper + lower) / 2 * direction).sum(0)
        wrong[0] += ((scores <= 0) * members[test]).sum(0)
        wrong[1] += ((scores > 0) * (1 - members[test])).sum(0)
    errors = (wrong[0] / first + wrong[1] / (len(z) - first)) / 2
    values = (2 * (1 - 2 * errors)).tolist()
    return Distance("pad", values[0], tuple(values[1:]))


def domain_distance(
    x: Tensor | Mapping[str, Tensor],
    y: Tensor | Mapping[str, Tensor],
    *,
    permutations: int = 200,
    splits: int = 20,
    max_rows: int = 2000,
    seed: int = 0,
) -> DomainDistances:
    """Return four distances between two data sets' features, each with its null, for every layer.

    Args:
        x: features of one data set, (n, d), or by layer.
        y: features of the other, (n', d), or by the same layers.
        permutations: draws of the null of `mmd2` and `proxy_a_distance`.
        splits: draws of the null of `frechet` and `coral`.
        max_rows: of `mmd2`.
        seed: of the generators.

    Returns:
        By layer ("features" for tensors), by measure; it prints as a table.

    Raises:
        ValueError: other layers in `y` than in `x`, or features that are not (n, d) and (n', d).

    Example:
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> domain_distance(x[:30], x[30:])["features"]["mmd2"].p_value > 0.05
        True
    """
    left, right = ({"features": z} if isinstance(z, Tensor) else z for z in (x, y))
    if set(left) != set(right):
        raise ValueError(f"layers {sorted(left)} and {sorted(right)} differ; expected features of the same layers.")
    found = {}
    for layer, a in left.items():
        b = right[layer]
        measures = (
            mmd2(a, b, permutations=permutations, max_rows=max_rows, seed=seed),
            proxy_a_distance(a, b, permutations=permutations, seed=seed),
            frechet(a, b, splits=splits, seed=seed),
            coral(a, b, splits=splits, seed=seed),
        )
        found[layer] = {measure.measure: measure for measure in measures}
    return DomainDistances(found)


def _members(rows: int, first: int, permutations: int, generator: torch.Generator) -> Tensor:
    """(rows, 1 + permutations): 1 where a row is of the first data set, as it is and permuted."""
    orders = [torch.arange(rows), *(torch.randperm(rows, generator=generator) for _ in range(permutations))]
    return torch.stack([order < first for order in orders], dim=1)


def _shrunk(z: Tensor, width: int) -> Tensor:
    """The covariance of centred rows, shrunk towards a multiple of the identity; `width`: d before a rotation."""
    n, squares = len(z), z.square().sum(1)
    covariance = z.T @ z / n
    level = covariance.trace() / width
    spread = (covariance.square().sum() - width * level**2).clamp(min=0)
    noise = ((squares.square().sum() / n - covariance.square().sum()) / n).clamp(min=0)
    share = torch.where(spread > noise, noise / spread, 1.0)
    # Where nothing varies any matrix will do; the floor keeps one of few directions invertible.
    floor = torch.where(level > 0, level * 1e-10, 1.0)
    identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return (1 - share) * covariance + (share * level + floor) * identity
