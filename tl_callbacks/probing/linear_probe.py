"""The linear probe in closed form: ridge regression on labels, its penalty chosen by generalised cross-validation.

One eigendecomposition of a layer serves each penalty and each label set. Accuracy is not a quadratic form, so it
cannot be read from sums: held-out rows must be scored. Keep the features of a bounded probe set (float32 will do) and
either fit on one part and score the other, or keep the sums of K folds: the sums of the rest are exact differences
(`Moments.minus`), so each row is scored by a probe that never saw it. R^2 needs sums only (`r_squared`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_callbacks.probing.copies import copies
from tl_callbacks.probing.moments import Moments
from tl_callbacks.probing.scores import ProbeScore, classes_of, moments_of_folds, score, stratified_folds
from tl_callbacks.probing.sums import Centred, spectrum


@dataclass(frozen=True)
class LinearProbe:
    """Linear maps from features to the columns of each label set.

    Attributes:
        weights: by label set, (columns, d).
        biases: by label set, (columns,).
        penalties: by label set, the penalty on the sum of squares over rows.
        gcv: by label set, the generalised cross-validation error at it; infinite where rows are too few to tell.
        classes: by label set, the number of classes, or None for regression.
    """

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    penalties: dict[str, float]
    gcv: dict[str, float]
    classes: dict[str, int | None]

    @torch.no_grad()
    def scores(self, features: Tensor, name: str = "task") -> Tensor:
        """Return the predicted columns of a label set, (n, columns), in float64."""
        weights = self.weights[name]
        return torch.addmm(self.biases[name], features.to(weights), weights.T)

    def predict(self, features: Tensor, name: str = "task") -> Tensor:
        """Return the predicted class of each row, or value, (n,)."""
        scores = self.scores(features, name)
        return scores[:, 0] if self.classes[name] is None else scores.argmax(dim=1)


@torch.no_grad()
def fit_ridge(
    moments: Moments | Centred, penalties: Sequence[float] | None = None, *, standardize: bool = True
) -> LinearProbe:
    """Return the ridge probes of all label sets of a layer.

    Each set takes the penalty of least GCV(penalty) = (RSS / n) / (1 - df / n)^2, RSS summed over its columns, with
    df = 1 + sum of s / (s + penalty) over the eigenvalues s. The intercept is not penalised.

    Args:
        moments: of the rows to fit.
        penalties: to choose from, each above 0, in units of the sum of squares over rows, as scikit-learn's `alpha`;
            None: 29 values, the number of rows times 1e-5 to 1e2.
        standardize: give each feature unit variance first.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> probe = fit_ridge(Moments.of(x, (x[:, 0] > 0).long()))
        >>> float((probe.predict(x) == (x[:, 0] > 0)).float().mean()) > 0.9
        True

    References:
        Golub, Heath and Wahba, "Generalized cross-validation as a method for choosing a good ridge parameter",
        Technometrics 21(2), 1979, section 1.
        Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016.
    """
    sums = moments.centred() if isinstance(moments, Moments) else moments
    path = penalty_path(penalties, sums.n).to(sums.mean.device)
    spread = sums.spreads() if standardize else torch.ones_like(sums.mean)
    values, vectors = spectrum(sums.scatter / torch.outer(spread, spread))
    alive = values > 0
    filters = 1 / (values + path.unsqueeze(1))  # (penalties, d)
    free = max(sums.n - 1 - int(alive.sum()), 0) + (path.unsqueeze(1) * filters * alive).sum(dim=1)  # n - df
    weights, biases, chosen, gcv = {}, {}, {}, {}
    for name, cross in sums.cross.items():
        along = vectors.T @ (cross / spread).T  # (d, columns)
        explained = along.square().sum(dim=1).where(alive, 0) / values.where(alive, 1)
        total = sums.label_square[name].sum()
        unexplained = (total - explained.sum()).clamp(min=0) * (sums.n - 1 > int(alive.sum()))
        residual = unexplained + ((path.unsqueeze(1) * filters).square() * explained).sum(dim=1)
        errors = (
            (residual * sums.n / free.square()).where(free > 1e-9 * max(sums.n, 1), torch.inf).nan_to_num(torch.inf)
        )
        best = len(path) - 1 - int(errors.flip(0).argmin())  # the largest of equals
        weights[name] = ((vectors * filters[best]) @ along).T / spread
        biases[name] = sums.label_mean[name] - weights[name] @ sums.mean
        chosen[name], gcv[name] = float(path[best]), float(errors[best])
    return LinearProbe(weights, biases, chosen, gcv, sums.classes)


@torch.no_grad()
def held_out_ridge(
    folds: Sequence[Moments],
    features: Tensor,
    fold_of_row: Tensor,
    penalties: Sequence[float] | None = None,
    *,
    standardize: bool = True,
) -> dict[str, Tensor]:
    """Return, by label set, the columns that probes fitted without a row's fold predict for it, (n, columns).

    The penalty of each set is chosen once, by GCV on all folds, and features are scaled by their spread in all folds;
    the rest of a fit is done without the fold.

    Args:
        folds: the moments of each fold, over all ranks.
        features: (n, d), the rows to score, or those of them that this rank holds.
        fold_of_row: (n,), which of the folds a row was counted in.
        penalties: as in `fit_ridge`.
        standardize: as in `fit_ridge`.

    Example:
        >>> x, fold = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
        >>> folds = [Moments.of(x[fold == k], (x[fold == k, 0] > 0).long()) for k in range(4)]
        >>> held_out_ridge(folds, x, fold)["task"].shape
        torch.Size([40, 2])
    """
    total = folds[0].without_rows()
    for fold in folds:
        total.merge(fold)
    sums = total.centred()
    chosen = fit_ridge(sums, penalties, standardize=standardize).penalties
    spread = sums.spreads() if standardize else None
    found = {name: torch.full((len(features), columns or 1), torch.nan, dtype=torch.float64)
             for name, columns in total.label_sets.items()}  # fmt: skip
    for number, fold in enumerate(folds):
        rows = (fold_of_row == number).to(features.device)
        if bool(rows.any()):
            probe = solve_ridge(total.minus(fold).centred(), chosen, spread)
            for name, scores in found.items():
                scores[rows.cpu()] = probe.scores(features[rows], name).cpu()
    return found


def solve_ridge(sums: Centred, penalties: Mapping[str, float], spread: Tensor | None = None) -> LinearProbe:
    """Return the ridge probes of all label sets at given penalties, by one Cholesky factor for each distinct one.

    Args:
        sums: of the rows to fit.
        penalties: by label set, above 0.
        spread: (d,), what each feature is divided by before it is penalised; None: 1.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> probe = solve_ridge(Moments.of(x, torch.tensor([0.0, 1.0, 2.0])).centred(), {"task": 1e-9})
        >>> round(float(probe.weights["task"]), 3)
        1.0
    """
    spread = torch.ones_like(sums.mean) if spread is None else spread
    scatter = sums.scatter / torch.outer(spread, spread)
    weights: dict[str, Tensor] = {}
    for penalty in dict.fromkeys(penalties.values()):
        factor = torch.linalg.cholesky(scatter + penalty * torch.eye(len(spread)).to(scatter))
        names = [name for name in sums.cross if penalties[name] == penalty]
        solved = torch.cholesky_solve(torch.cat([sums.cross[name] / spread for name in names]).T, factor).T
        parts = torch.split(solved / spread, [len(sums.cross[name]) for name in names])
        weights.update(zip(names, parts, strict=True))
    biases = {name: sums.label_mean[name] - weights[name] @ sums.mean for name in weights}
    return LinearProbe(weights, biases, dict(penalties), dict.fromkeys(weights, torch.nan), sums.classes)


def r_squared(probe: LinearProbe, moments: Moments, name: str = "task") -> float:
    """Return a probe's R^2 on rows of which only sums are kept; over all columns of a class label set.

    Args:
        probe: fitted on other rows.
        moments: of the rows to score, with that label set.
        name: the label set.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> moments = Moments.of(x, torch.tensor([0.0, 1.0, 2.0]))
        >>> round(r_squared(fit_ridge(moments, [1e-9]), moments), 3)
        1.0
    """
    sums, weights = moments.centred(), probe.weights[name]
    off = sums.label_mean[name] - probe.biases[name] - weights @ sums.mean
    total = float(sums.label_square[name].sum())
    residual = (
        sums.label_square[name] - 2 * (weights * sums.cross[name]).sum(dim=1)
        + ((weights @ sums.scatter) * weights).sum(dim=1) + sums.n * off.square()
    )  # fmt: skip
    return 1 - float(residual.sum()) / total if total > 0 else float("nan")


def ridge_probe(
    x: Tensor,
    labels: Tensor,
    *,
    test: tuple[Tensor, Tensor] | None = None,
    folds: int = 5,
    penalties: Sequence[float] | None = None,
    standardize: bool = True,
    seed: int = 0,
) -> ProbeScore:
    """Return the held-out accuracy, or R^2, of a ridge probe on features, with its standard error.

    Args:
        x: (n, d), of any floating dtype.
        labels: (n,), integers from 0 for classes or floating point for regression.
        test: features and labels of rows to score; None: score `x` by folds.
        folds: of the cross-validation, stratified by class; 2 or more. Rows with equal features share one.
        penalties: as in `fit_ridge`.
        standardize: as in `fit_ridge`.
        seed: of the folds.

    Raises:
        ValueError: `folds` is below 2, or shapes do not fit.

    Example:
        >>> x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
        >>> found = ridge_probe(x, (x[:, 0] > 0).long())
        >>> found.value > 0.9, found.chance < 0.6
        (True, True)
    """
    tests = None if test is None else (test[0], {"task": test[1]})
    return ridge_probes(
        x, {"task": labels}, test=tests, folds=folds, penalties=penalties, standardize=standardize, seed=seed
    )["task"]


def ridge_probes(
    x: Tensor,
    labels: Mapping[str, Tensor],
    *,
    test: tuple[Tensor, Mapping[str, Tensor]] | None = None,
    folds: int = 5,
    penalties: Sequence[float] | None = None,
    standardize: bool = True,
    seed: int = 0,
) -> dict[str, ProbeScore]:
    """Return the scores of `ridge_probe` for several label sets, of one eigendecomposition.

    Args:
        x: (n, d), of any floating dtype.
        labels: by label set, (n,). Folds are stratified by the first.
        test: features, and labels by label set, of rows to score; None: score `x` by folds.
        folds: as in `ridge_probe`.
        penalties: as in `fit_ridge`.
        standardize: as in `fit_ridge`.
        seed: of the folds.

    Example:
        >>> x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
        >>> labels = (x[:, 0] > 0).long()
        >>> from tl_callbacks.probing.scores import shuffled_labels, stratified_folds
        >>> shuffled = shuffled_labels(labels, stratified_folds(labels, 5))
        >>> found = ridge_probes(x, {"task": labels, "shuffled": shuffled})
        >>> found["task"].value > 0.9, found["shuffled"].value < 0.6
        (True, True)
    """
    kinds, alike = classes_of(labels, None if test is None else test[1]), None
    if test is None:
        alike = copies({"": x})
        fold = stratified_folds(next(iter(labels.values())), folds, seed=seed, copies=alike)
        parts = moments_of_folds(x, labels, fold, folds, kinds)
        scored, truth = held_out_ridge(parts, x, fold, penalties, standardize=standardize), labels
    else:
        probe = fit_ridge(Moments(x.shape[1], kinds).update(x, labels), penalties, standardize=standardize)
        scored, truth = {name: probe.scores(test[0], name) for name in labels}, test[1]
    return {name: score(scored[name], truth[name], classes, alike) for name, classes in kinds.items()}


def penalty_path(penalties: Sequence[float] | None, rows: int) -> Tensor:
    """Return the penalties to choose from, ascending, in float64: those given, or the default for so many rows.

    Args:
        penalties: each above 0; or None.
        rows: that are fitted.

    Raises:
        ValueError: there is none, or one is not above 0.

    Example:
        >>> len(penalty_path(None, 100))
        29
    """
    if penalties is None:
        return max(rows, 1) * torch.logspace(-5, 2, 29, dtype=torch.float64)
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties are {list(penalties)}; expected at least one, each above 0.")
    return torch.tensor(sorted(penalties), dtype=torch.float64)
