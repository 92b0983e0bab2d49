"""Scores of how much of the labels a layer's features hold, without training: H-score, LogME, and LEEP and NCE.

They are diagnostics to compare layers, or a layer before and after: rankings of models by them are disputed
(Agostinelli et al., "How stable are transferability metrics evaluations?", ECCV 2022).
"""

import math

import torch
from torch import Tensor

from tl_callbacks.probing.moments import Moments
from tl_callbacks.probing.sums import Centred, spectrum


def h_score(x: Tensor, labels: Tensor, *, shrinkage: bool = False) -> float:
    """Return the H-score tr(cov(x)^+ cov(E[x | y])): 0 where class means agree, at most the number of classes - 1.

    Without shrinkage it is at that bound whenever d >= n - 1 and rows differ, whatever the labels: use shrinkage there.

    Args:
        x: (n, d), of any floating dtype.
        labels: (n,), integers from 0.
        shrinkage: take Ledoit and Wolf's covariance, and shrink the other one by as much.

    Example:
        >>> round(h_score(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([0, 0, 1, 1])), 6)
        1.0

    References:
        Bao et al., "An information-theoretic approach to transferability in task transfer learning", ICIP 2019.
        Ibrahim, Ponomareva and Mazumder, "Newer is not always better: rethinking transferability metrics", ECML PKDD
        2022, section 4. https://arxiv.org/abs/2110.06893
    """
    return h_score_of(Moments.of(x, labels), shrinkage=shrinkage)


@torch.no_grad()
def h_score_of(moments: Moments | Centred, name: str = "task", *, shrinkage: bool = False) -> float:
    """Return `h_score` from sums.

    Args:
        moments: of the rows.
        name: a label set of classes.
        shrinkage: as in `h_score`.

    Example:
        >>> round(h_score_of(Moments.of(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))), 6)
        1.0
    """
    sums = moments.centred() if isinstance(moments, Moments) else moments
    counts, means = sums.class_counts(name), sums.class_means(name)
    if sums.n < 2:
        return math.nan
    if not shrinkage:
        # It does not change with invertible maps of x, so features may be scaled alike: that keeps the inverse stable.
        spread = sums.spreads()
        values, vectors = spectrum(sums.scatter / torch.outer(spread, spread))
        along = (means / spread) @ vectors
        inverse = values.where(values > 0, torch.inf).reciprocal()
        return float((counts.unsqueeze(1) * along.square() * inverse).sum())
    share = ledoit_wolf(sums)
    width = len(sums.mean)
    covariance = (1 - share) * sums.scatter / sums.n
    covariance.diagonal().add_(share * sums.scatter.trace() / (sums.n * width))
    values, vectors = spectrum(covariance)
    inverse = values.where(values > 0, torch.inf).reciprocal()
    between = (counts.unsqueeze(1) * (means @ vectors).square() * inverse).sum() / (sums.n - 1)  # as the authors' code
    return float((1 - share) * between)


def ledoit_wolf(moments: Moments | Centred) -> float:
    """Return the share of the identity in Ledoit and Wolf's covariance, in [0, 1]; 1 for rows that do not differ.

    Args:
        moments: of the rows.

    Example:
        >>> ledoit_wolf(Moments.of(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])))
        1.0

    References:
        Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
        Multivariate Analysis 88(2), 2004, section 3.2.
    """
    sums = moments.centred() if isinstance(moments, Moments) else moments
    n, width = max(sums.n, 1), len(sums.mean)
    covariance = sums.scatter / n
    square, trace = float(covariance.square().sum()), float(covariance.trace())
    away = square - trace**2 / width
    noise = (float(sums.fourth) / n - square) / n
    return min(max(noise / away, 0.0), 1.0) if away > 1e-15 * square else 1.0


def log_me(x: Tensor, labels: Tensor) -> float:
    """Return LogME: the log evidence per row of a Bayesian linear model of the labels, at its best precisions.

    Columns y of the labels (one for each class that occurs, or the values) are modelled as N(0, 1/beta I + 1/alpha
    x x^T) without an intercept, alpha and beta maximise the evidence, and the mean over columns is returned. It is
    right for n < d too, where a widely used implementation leaves out terms of the null space.

    Args:
        x: (n, d), of any floating dtype.
        labels: (n,), integers from 0 for classes or floating point for regression.

    Returns:
        Natural logarithms per row; more is better, of any sign. nan where no label differs from 0, or without rows.

    Example:
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> log_me(x, x[:, 0]) > log_me(x, x[:, 0].flip(0))
        True

    References:
        You et al., "LogME: practical assessment of pre-trained models for transfer learning", ICML 2021, section 4.
        https://arxiv.org/abs/2102.11005
        MacKay, "Bayesian interpolation", Neural Computation 4(3), 1992.
    """
    return log_me_of(Moments.of(x, labels))


@torch.no_grad()
def log_me_of(moments: Moments | Centred, name: str = "task") -> float:
    """Return `log_me` from sums.

    With t = alpha / beta the best beta is known, and what is left is a function of log t alone: it is maximised on a
    grid and then by golden sections, so nothing depends on a fixed point that may not have converged.

    Args:
        moments: of the rows.
        name: a label set, of classes or real values.

    Example:
        >>> round(log_me_of(Moments.of(torch.ones(4, 1), torch.tensor([0, 1, 0, 1]))), 3)
        -1.007
    """
    sums = moments.centred() if isinstance(moments, Moments) else moments
    n = sums.n
    if not n:
        return math.nan
    values, vectors = spectrum(sums.scatter + n * torch.outer(sums.mean, sums.mean))
    label_mean = sums.label_mean[name]
    squares = sums.label_square[name] + n * label_mean.square()
    some = squares > 0
    if not bool(some.any()) or not bool(values.isfinite().all()):
        return math.nan
    along = ((sums.cross[name] + n * torch.outer(label_mean, sums.mean)) @ vectors)[some].square()
    explained = along * values.where(values > 0, torch.inf).reciprocal()  # (columns, d)
    squares = squares[some]
    # What x cannot explain; never below rounding, so that perfect fits have a finite score.
    left = (squares - explained.sum(dim=1)) * (int((values > 0).sum()) < n)
    left = left.maximum(1e-14 * squares)
    top = float(values[-1]) or 1.0

    def evidence(log_t: Tensor) -> Tensor:
        """Of each column, at points (columns, points)."""
        t = log_t.exp().unsqueeze(2)
        residual = left.unsqueeze(1) + (explained.unsqueeze(1) * (t / (t + values))).sum(dim=2)
        fit = n / 2 * (n / residual).log() - n / 2 * (1 + math.log(2 * math.pi))
        return fit - 0.5 * torch.log1p(values / t).sum(dim=2)

    grid = math.log(top) + torch.linspace(-30, 25, 111, dtype=torch.float64, device=values.device)
    best = evidence(grid.expand(len(squares), -1)).argmax(dim=1)
    low, high = grid[(best - 1).clamp(min=0)], grid[(best + 1).clamp(max=len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        inner = torch.stack([high - golden * (high - low), low + golden * (high - low)], dim=1)
        left_better = torch.gt(*evidence(inner).unbind(dim=1))
        low, high = low.where(left_better, inner[:, 0]), inner[:, 1].where(left_better, high)
    return float(evidence(((low + high) / 2).unsqueeze(1)).mean() / n)


@torch.no_grad()
def leep(probabilities: Tensor, labels: Tensor) -> float:
    """Return LEEP: the mean log likelihood of labels predicted from a source head's classes; 0 or less, more is better.

    Args:
        probabilities: (n, source classes), of the source model's head; rows add up to 1.
        labels: (n,), integers from 0.

    Raises:
        ValueError: a probability is below 0, or rows do not add up to 1.

    Example:
        >>> leep(torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1]))
        0.0

    References:
        Nguyen et al., "LEEP: a new measure to evaluate transferability of learned representations", ICML 2020,
        section 3. https://arxiv.org/abs/2002.12462
    """
    theta = probabilities.double()
    if len(theta) and (float(theta.min()) < 0 or float((theta.sum(dim=1) - 1).abs().max()) > 0.02):
        raise ValueError(
            "probabilities do not add up to 1 in each row; expected those of a head's softmax, not logits."
        )
    if not len(theta):
        return math.nan
    code = torch.nn.functional.one_hot(labels).to(theta)
    joint = code.T @ theta  # (labels, source classes)
    mass = joint.sum(dim=0)
    given = joint / mass.where(mass > 0, 1)  # a source class without mass weighs nothing
    return float((theta @ given.T).gather(1, labels.unsqueeze(1)).log().mean())


def nce(source_classes: Tensor, labels: Tensor) -> float:
    """Return NCE, the negative conditional entropy -H(labels | source classes), in nats; 0 or less, more is better.

    Args:
        source_classes: (n,), the class that a source head finds most likely.
        labels: (n,), integers from 0.

    Example:
        >>> nce(torch.tensor([3, 3, 5, 5]), torch.tensor([0, 0, 1, 1]))
        0.0

    References:
        Tran, Nguyen and Hassner, "Transferability and hardness of supervised classification tasks", ICCV 2019,
        section 4. https://arxiv.org/abs/1908.08142
    """
    if not len(labels):
        return math.nan
    joint = torch.zeros(int(source_classes.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    joint.index_put_((source_classes.cpu(), labels.cpu()), joint.new_ones(len(labels)), accumulate=True)
    given = joint / joint.sum(dim=1, keepdim=True).clamp(min=1)
    return float(torch.special.xlogy(joint, given).sum() / len(labels))
