"""How alike two representations of the same rows are once they are aligned: orthogonal Procrustes, SVCCA."""

import math
from typing import Literal

import torch
from torch import Tensor

from tl_callbacks.probing.similarity import centred, common_rows

Convention = Literal["angular", "opd", "disparity"]


def procrustes(x: Tensor, y: Tensor, *, convention: Convention = "angular") -> float:
    """Return the distance of two representations of the same rows after the best rotation or reflection.

    With X and Y centred and divided by their Frobenius norms, and s = ||X^T Y||_* (the sum of singular values):
    "angular": arccos s, from 0 to pi / 2, which obeys the triangle inequality; "opd": 2 - 2 s, from 0 to 2, the
    squared distance ||X - Y Q||^2; "disparity": 1 - s^2, from 0 to 1, as in `scipy.spatial.procrustes`, which scales
    Y once more. Unlike CKA it weighs directions of little variance too. It is not corrected for n: compare at equal n.

    Args:
        x: features, (n, d), any floating dtype.
        y: features of the same rows in the same order, (n, d'); d' may differ.
        convention: "angular", "opd" or "disparity".

    Returns:
        0 for equal up to rotation, scale and shift; the greatest value where `x` or `y` is constant, for there is
        nothing to align; NaN for n <= 1, or NaN or infinity in the features.

    Raises:
        ValueError: an unknown convention, a tensor has not two dimensions, or different numbers of rows.

    Example:
        >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        >>> round(procrustes(x, -x, convention="disparity"), 6)
        0.0

    References:
        Williams et al., "Generalized Shape Metrics on Neural Representations", NeurIPS 2021, section 2.2 (angular).
        https://arxiv.org/abs/2110.14739. Ding, Denain and Steinhardt, NeurIPS 2021, section 2 (opd).
        https://arxiv.org/abs/2108.01661
    """
    rows, x, y = common_rows([x, y]), centred(x), centred(y)
    if rows < min(x.shape[1], y.shape[1]):  # X^T Y has the singular values of a matrix of n x n
        x, y = (torch.linalg.qr(z.T, mode="r").R.T if z.isfinite().all() else z[:, :rows] * math.nan for z in (x, y))
    return procrustes_from(x.T @ y, x.square().sum(), y.square().sum(), convention) if rows > 1 else math.nan


def procrustes_from(cross: Tensor, square_x: Tensor, square_y: Tensor, convention: Convention) -> float:
    """Return `procrustes` from X^T Y, ||X||^2 and ||Y||^2 of centred features.

    Raises:
        ValueError: an unknown convention.
    """
    if convention not in ("opd", "angular", "disparity"):
        raise ValueError(f"convention {convention!r} is none; expected 'opd', 'angular' or 'disparity'.")
    if not (cross.isfinite().all() and square_x.isfinite() and square_y.isfinite()):
        return math.nan
    scale = math.sqrt(float(square_x)) * math.sqrt(float(square_y))
    nuclear = min(1.0, float(torch.linalg.svdvals(cross).sum()) / scale) if scale else 0.0
    return {"opd": 2 - 2 * nuclear, "angular": math.acos(nuclear), "disparity": 1 - nuclear**2}[convention]


def svcca(
    x: Tensor, y: Tensor, *, keep: float = 0.99, of: Literal["singular values", "variance"] = "singular values"
) -> float:
    """Return the mean canonical correlation of what is left after truncation, from 0 to 1; for comparison with others.

    Of each side's singular directions the fewest are kept whose singular values sum to `keep` of the whole, as in the
    authors' tutorial, or, with `of="variance"`, whose squares do. The mean is over as many correlations as the side
    with fewer directions has. With nearly as many directions as rows all correlations are 1, whatever the features.

    Args:
        x: features, (n, d), any floating dtype.
        y: features of the same rows in the same order, (n, d'); d' may differ.
        keep: share that is kept, in (0, 1].
        of: "singular values" or "variance".

    Returns:
        0 where `x` or `y` is constant; NaN for n <= 1, or NaN or infinity in the features.

    Raises:
        ValueError: `keep` outside (0, 1], an unknown `of`, a tensor has not two dimensions, or different numbers of
            rows.

    Example:
        >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> round(svcca(x, x @ torch.diag(torch.tensor([1.0, 2, 3, 4])), keep=1.0), 6)
        1.0

    References:
        Raghu et al., "SVCCA: Singular Vector Canonical Correlation Analysis", NeurIPS 2017, section 2.
        https://arxiv.org/abs/1706.05806
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; expected a share in (0, 1], such as 0.99.")
    if of not in ("singular values", "variance"):
        raise ValueError(f"of is {of!r}; expected 'singular values' or 'variance'.")
    if common_rows([x, y]) < 2 or not (x.isfinite().all() and y.isfinite().all()):
        return math.nan
    bases = []
    for z in (centred(x), centred(y)):
        basis, values, _ = torch.linalg.svd(z, full_matrices=False)
        rank = int((values > values[:1] * max(z.shape) * torch.finfo(z.dtype).eps).sum())
        if not rank:
            return 0.0
        parts = values[:rank] if of == "singular values" else values[:rank].square()
        bases.append(basis[:, : min(rank, int((parts.cumsum(0) < keep * parts.sum()).sum()) + 1)])
    return float(torch.linalg.svdvals(bases[0].T @ bases[1]).mean())
