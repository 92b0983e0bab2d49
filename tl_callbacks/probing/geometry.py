"""The shape of a layer's features: how many directions they use, how alike they point, how far classes collapsed."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_callbacks.probing.moments import Moments
from tl_callbacks.probing.sums import Centred, spectrum


@dataclass(frozen=True)
class Geometry:
    """Four numbers of the features' shape; the ranks are bounded by the rows, so compare them at equal rows only.

    Attributes:
        effective_rank: exp of the entropy of the covariance's eigenvalues (Roy and Vetterli 2007), from 1 to d.
        rank_me: exp of the entropy of the singular values of the features about zero (Garrido et al. 2023), 1 to d.
        participation_ratio: (sum of eigenvalues)^2 / sum of their squares, of the covariance, from 1 to d.
        mean_cosine: between two rows, from about 0 for isotropic features to 1 (Ethayarajh 2019, "anisotropy").
    """

    effective_rank: float
    rank_me: float
    participation_ratio: float
    mean_cosine: float


@torch.no_grad()
def geometry(moments: Moments | Centred) -> Geometry:
    """Return effective rank, RankMe, participation ratio and mean cosine; nan where rows are too few or all alike.

    Args:
        moments: of the rows.

    Example:
        >>> found = geometry(Moments.of(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])))
        >>> round(found.participation_ratio, 6), round(found.mean_cosine, 6)
        (2.0, -0.333333)

    References:
        Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, section 2.
        Garrido et al., "RankMe", ICML 2023, section 3.1; without the epsilon, since 0 log 0 is 0 here. https://arxiv.org/abs/2210.02885
        Ethayarajh, "How contextual are contextualized word representations?", EMNLP 2019, section 4.2.
    """
    sums = moments.centred() if isinstance(moments, Moments) else moments
    values, _ = spectrum(sums.scatter)
    about_zero, _ = spectrum(sums.scatter + sums.n * torch.outer(sums.mean, sums.mean))
    return Geometry(
        effective_rank=_entropic_rank(values),
        rank_me=_entropic_rank(about_zero.sqrt()),
        participation_ratio=float(values.sum().square() / values.square().sum()),
        mean_cosine=mean_cosine(sums),
    )


def effective_rank(sums: Centred) -> float:
    """Return the effective rank of `geometry` alone, in a fraction of its time.

    Example:
        >>> effective_rank(Moments.of(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).centred())
        1.0
    """
    if not bool(sums.scatter.isfinite().all()):
        return math.nan
    values = torch.linalg.eigvalsh(sums.scatter)
    return _entropic_rank(values.where(values > values[-1] * len(values) * torch.finfo(values.dtype).eps, 0))


def mean_cosine(sums: Centred) -> float:
    """Return the mean cosine between two rows; nan with fewer than two that are not zero.

    Example:
        >>> mean_cosine(Moments.of(torch.tensor([[1.0, 0.0], [2.0, 0.0]])).centred())
        1.0
    """
    pairs = sums.units * (sums.units - 1)
    return (float(sums.unit_sum.square().sum()) - sums.units) / pairs if pairs else math.nan


def _entropic_rank(values: Tensor) -> float:
    total = values.sum()
    shares = values / total
    return math.exp(-float(torch.special.xlogy(shares, shares).sum())) if total > 0 else math.nan


@dataclass(frozen=True)
class Collapse:
    """Neural collapse of the features of classes; all numbers fall to 0 as classes collapse.

    Attributes:
        within: NC1, tr(Sigma_W Sigma_B^+) / C: spread within classes, against that of their means.
        norms: NC2, standard deviation over mean of the class means' distances from the mean of all.
        angles: NC2, standard deviation of the cosines between class means.
        simplex: NC2, mean of |cosine + 1 / (C - 1)|: how far from the largest angle that all pairs can have.
        duality: NC3, distance between the head's weights and the class means, both of unit norm; nan without a head.
    """

    within: float
    norms: float
    angles: float
    simplex: float
    duality: float


@torch.no_grad()
def neural_collapse(moments: Moments | Centred, name: str = "task", *, head: Tensor | None = None) -> Collapse:
    """Return how far the classes' features have collapsed; classes without rows are left out, nan below two classes.

    Means are taken from the mean of all rows. NC1 averages within classes over rows, and between them over classes.
    NC4 needs features: see `nearest_centre_disagreement`.

    Args:
        moments: of the rows.
        name: a label set of classes.
        head: (C, d), the weights of the classifier on these features.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
        >>> neural_collapse(Moments.of(x, torch.tensor([0, 0, 1, 1]))).simplex
        0.0

    References:
        Papyan, Han and Donoho, "Prevalence of neural collapse during the terminal phase of deep learning training",
        PNAS 117(40), 2020, "Definition of neural collapse" and figures 2 to 6. https://arxiv.org/abs/2008.08186
    """
    sums = moments.centred() if isinstance(moments, Moments) else moments
    counts, means = sums.class_counts(name), sums.class_means(name)
    some = counts > 0
    classes = int(some.sum())
    if classes < 2:
        return Collapse(math.nan, math.nan, math.nan, math.nan, math.nan)
    if head is not None and head.shape != means.shape:
        raise ValueError(f"head has shape {tuple(head.shape)}; expected {tuple(means.shape)}: a row for each class.")
    counts, means = counts[some], means[some]
    within = (sums.scatter - (means.T * counts) @ means) / sums.n
    # The inverse of Sigma_B in the span of the class means, from their C x C products.
    values, vectors = spectrum(means @ means.T / classes)
    basis = vectors.T @ means  # (C, d), rows of squared length C * values
    inverse = values.where(values > 1e-12 * values[-1], torch.inf).reciprocal()
    spread = ((basis @ within) * basis).sum(dim=1)
    norms = means.norm(dim=1)
    cosines = (means @ means.T) / torch.outer(norms, norms)
    pairs = cosines[torch.triu_indices(classes, classes, 1).unbind()]
    duality = math.nan
    if head is not None:
        weights = head.to(means)[some]
        duality = float((weights / weights.norm() - means / means.norm()).norm())
    return Collapse(
        within=float((spread * inverse.square()).sum()) / classes**2,
        norms=float(norms.std(correction=0) / norms.mean()),
        angles=float(pairs.std(correction=0)),
        simplex=float((pairs + 1 / (classes - 1)).abs().mean()),
        duality=duality,
    )


@torch.no_grad()
def nearest_centre_disagreement(
    features: Tensor, predictions: Tensor, moments: Moments | Centred, name: str = "task"
) -> float:
    """Return NC4: the share of rows whose nearest class mean is not the class that the head predicts, in [0, 1].

    Args:
        features: (n, d), rows to judge.
        predictions: (n,), the head's classes.
        moments: with the class means.
        name: a label set of classes.

    Example:
        >>> x, labels = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([0, 0, 1])
        >>> nearest_centre_disagreement(x, labels, Moments.of(x, labels))
        0.0
    """
    sums = moments.centred() if isinstance(moments, Moments) else moments
    means = sums.class_means(name)
    distances = torch.cdist(features.to(means) - sums.mean, means)
    distances[:, sums.class_counts(name) == 0] = torch.inf
    return float((distances.argmin(dim=1) != predictions.to(distances.device)).double().mean())
