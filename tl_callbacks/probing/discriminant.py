"""The probe with probabilities: linear discriminant analysis from the moments, calibrated on held-out rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tl_callbacks.probing.copies import copies
from tl_callbacks.probing.linear_probe import fit_ridge
from tl_callbacks.probing.moments import Moments
from tl_callbacks.probing.scores import ProbeScore, classes_of, moments_of_folds, score, stratified_folds
from tl_callbacks.probing.sums import Centred


@dataclass(frozen=True)
class Discriminant:
    """A classifier with probabilities softmax(logits / temperature).

    Attributes:
        weights: (C, d).
        bias: (C,).
        temperature: above 1 where the fitted model was too sure of itself.
    """

    weights: Tensor
    bias: Tensor
    temperature: float = 1.0

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Return log probabilities up to a constant a row, before the temperature, (n, C), in float64."""
        return torch.addmm(self.bias, features.to(self.weights), self.weights.T)

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the probability of each class, (n, C), in float64."""
        return (self.logits(features) / self.temperature).softmax(dim=1)


@dataclass(frozen=True)
class CalibratedScore(ProbeScore):
    """Accuracy on held-out rows, and how far the probabilities can be trusted there.

    Attributes:
        log_loss: mean of -ln of the probability of the right class, in nats.
        calibration_error: expected calibration error, 15 bins, in [0, 1].
        temperature: that was fitted on other held-out rows; its mean over folds.
    """

    log_loss: float
    calibration_error: float
    temperature: float


@torch.no_grad()
def fit_lda(
    moments: Moments | Centred, name: str = "task", *, shrinkage: float | None = None, penalty: float | None = None,
    spread: Tensor | None = None,
) -> Discriminant:  # fmt: skip
    """Return linear discriminant analysis: Gaussian classes of one covariance, shrunk toward the identity.

    By default the scatter within classes gets the penalty that GCV chose for the ridge probe of the same labels, with
    which it spans the same directions (penalised discriminant analysis). Features are scaled to unit variance first.

    Args:
        moments: of the rows to fit.
        name: a label set of classes. A class without rows counts as half a row at the mean of all.
        shrinkage: instead, (1 - shrinkage) covariance + shrinkage * mean variance * I; above 0, at most 1.
        penalty: instead, this much on the diagonal of the scatter within classes, above 0.
        spread: (d,), what each feature is divided by before; None: its standard deviation.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
        >>> fit_lda(Moments.of(x, torch.tensor([0, 0, 1, 1]))).probabilities(x)[0, 0] > 0.5
        tensor(True)

    References:
        Hastie, Buja and Tibshirani, "Penalized discriminant analysis", Annals of Statistics 23(1), 1995, section 3.
    """
    if shrinkage is not None and not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage is {shrinkage}; expected more than 0, at most 1, or None to choose by GCV.")
    sums = moments.centred() if isinstance(moments, Moments) else moments
    n = max(sums.n, 1)
    spread = sums.spreads() if spread is None else spread
    counts, means = sums.class_counts(name), sums.class_means(name) / spread
    covariance = (sums.scatter / torch.outer(spread, spread) - (means.T * counts) @ means) / n
    if shrinkage is None:
        penalty = fit_ridge(_only(sums, name)).penalties[name] if penalty is None else penalty
        covariance.diagonal().add_(penalty / n)
    else:
        variance = (covariance.trace() / len(spread)).clamp(min=1e-12)
        covariance *= 1 - shrinkage
        covariance.diagonal().add_(shrinkage * variance)
    weights = torch.cholesky_solve(means.T, torch.linalg.cholesky(covariance)).T
    prior = counts.clamp(min=0.5) / counts.clamp(min=0.5).sum()
    bias = prior.log() - 0.5 * (weights * means).sum(dim=1)
    weights = weights / spread
    return Discriminant(weights, bias - weights @ sums.mean)


@torch.no_grad()
def held_out_logits(
    folds: Sequence[Moments],
    features: Tensor,
    fold_of_row: Tensor,
    name: str = "task",
    *,
    shrinkage: float | None = None,
) -> Tensor:
    """Return the logits of discriminants fitted without a row's fold, (n, C); nan for rows of no fold.

    Args:
        folds: the moments of each fold, over all ranks.
        features: (n, d), the rows to score, or those of them that this rank holds.
        fold_of_row: (n,), which of the folds a row was counted in.
        name: a label set of classes.
        shrinkage: as in `fit_lda`.

    Example:
        >>> x, fold = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
        >>> folds = [Moments.of(x[fold == k], (x[fold == k, 0] > 0).long()) for k in range(4)]
        >>> held_out_logits(folds, x, fold).shape
        torch.Size([40, 2])
    """
    total = Moments(folds[0].width, folds[0].label_sets)
    for fold in folds:
        total.merge(fold)
    sums = total.centred()
    spread = sums.spreads()
    penalty = None if shrinkage is not None else fit_ridge(_only(sums, name)).penalties[name]
    logits = torch.full((len(features), total.label_sets[name] or 1), torch.nan, dtype=torch.float64)
    for number, fold in enumerate(folds):
        rows = (fold_of_row == number).to(features.device)
        if bool(rows.any()):
            rest = total.minus(fold).centred()
            fitted = fit_lda(rest, name, shrinkage=shrinkage, penalty=penalty, spread=spread)
            logits[rows.cpu()] = fitted.logits(features[rows]).cpu()
    return logits


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T, in [1e-2, 1e4], at which softmax(logits / T) gives labels their greatest likelihood.

    Args:
        logits: (n, C), of rows that the logits' model was not fitted on; rows that are not finite are left out.
        labels: (n,), integers from 0.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)
        1.82

    References:
        Guo et al., "On calibration of modern neural networks", ICML 2017, section 4.2.
    """
    finite = logits.isfinite().all(dim=1)
    logits, labels = logits[finite].double(), labels.to(logits.device)[finite]
    right = logits.gather(1, labels.unsqueeze(1)).sum()
    low, high = -math.log(1e4), math.log(1e2)  # of 1 / T; the likelihood is concave in 1 / T
    for _ in range(40):
        middle = (low + high) / 2
        expected = ((logits * math.exp(middle)).softmax(dim=1) * logits).sum()
        low, high = (middle, high) if right > expected else (low, middle)
    return math.exp(-(low + high) / 2)


def calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Return the expected calibration error: mean |accuracy - confidence| over bins of confidence, in [0, 1].

    Args:
        probabilities: (n, C).
        labels: (n,), integers from 0.
        bins: of equal width in the confidence.

    Example:
        >>> calibration_error(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        0.5

    References:
        Guo et al., "On calibration of modern neural networks", ICML 2017, section 2.
    """
    if not len(labels):
        return math.nan
    confidence, predicted = probabilities.double().max(dim=1)
    gaps = (predicted == labels.to(predicted.device)).double() - confidence
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return float(gaps.new_zeros(bins).index_add_(0, place, gaps).abs().sum()) / len(labels)


def lda_probe(
    x: Tensor, labels: Tensor, *, test: tuple[Tensor, Tensor] | None = None, folds: int = 5,
    shrinkage: float | None = None, seed: int = 0,
) -> CalibratedScore:  # fmt: skip
    """Return the held-out accuracy, log loss and calibration of a discriminant.

    The temperature is fitted on held-out rows as well, of other folds than those it is applied to.

    Args:
        x: (n, d), of any floating dtype.
        labels: (n,), integers from 0.
        test: features and labels of rows to score; None: score `x` by folds.
        folds: as in `ridge_probe`.
        shrinkage: as in `fit_lda`.
        seed: of the folds.

    Example:
        >>> x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
        >>> found = lda_probe(x, (x[:, 0] > 0).long())
        >>> found.value > 0.9, found.calibration_error < 0.1
        (True, True)
    """
    kinds = classes_of({"task": labels}, None if test is None else {"task": test[1]})
    alike = copies({"": x}) if test is None else None
    if test is None:
        fold = stratified_folds(labels, folds, seed=seed, copies=alike)
        parts = moments_of_folds(x, {"task": labels}, fold, folds, kinds)
        logits, truth = held_out_logits(parts, x, fold, shrinkage=shrinkage), labels.cpu()
        used = torch.tensor([fit_temperature(logits[fold != k], truth[fold != k]) for k in range(folds)])
        temperatures = used.double()[fold]
    else:
        fitted = fit_calibrated_lda(x, labels, classes=kinds["task"], folds=folds, shrinkage=shrinkage, seed=seed)
        logits, truth = fitted.logits(test[0]).cpu(), test[1].cpu()
        temperatures = torch.full((len(truth),), fitted.temperature, dtype=torch.float64)
    finite = logits.isfinite().all(dim=1)
    logits, truth, temperatures = logits[finite], truth[finite], temperatures[finite]
    probabilities = (logits / temperatures.unsqueeze(1)).softmax(dim=1)
    plain = score(logits, truth, kinds["task"], None if alike is None else alike[finite])
    losses = -probabilities.gather(1, truth.unsqueeze(1)).clamp(min=torch.finfo(torch.float64).tiny).log()
    return CalibratedScore(
        plain.value, plain.error, plain.chance, plain.rows,
        float(losses.mean()), calibration_error(probabilities, truth), float(temperatures.mean()),
    )  # fmt: skip


def fit_calibrated_lda(
    x: Tensor,
    labels: Tensor,
    *,
    classes: int | None = None,
    folds: int = 5,
    shrinkage: float | None = None,
    seed: int = 0,
) -> Discriminant:
    """Return a discriminant fitted on all rows, with the temperature that fits rows held out by folds.

    Args:
        x: (n, d), of any floating dtype.
        labels: (n,), integers from 0.
        classes: how many; None: as occur.
        folds: as in `ridge_probe`.
        shrinkage: as in `fit_lda`.
        seed: of the folds.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
        >>> fit_calibrated_lda(x, torch.tensor([0, 0, 1, 1]), folds=2).probabilities(x).argmax(dim=1)
        tensor([0, 0, 1, 1])
    """
    kinds = {"task": classes} if classes else classes_of({"task": labels})
    fold = stratified_folds(labels, folds, seed=seed, copies=copies({"": x}))
    parts = moments_of_folds(x, {"task": labels}, fold, folds, kinds)
    temperature = fit_temperature(held_out_logits(parts, x, fold, shrinkage=shrinkage), labels)
    total = Moments(x.shape[1], kinds)
    for part in parts:
        total.merge(part)
    return replace(fit_lda(total, shrinkage=shrinkage), temperature=temperature)


def _only(sums: Centred, name: str) -> Centred:
    return replace(sums, cross={name: sums.cross[name]})
