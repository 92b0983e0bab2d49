"""The sums behind `Moments`: additive about a pilot, and as they are read, about the means."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Centred:
    """The sums about the mean of the features, and of each label column.

    A label set of C classes has C columns, its one-hot code; a regression target has one.

    Attributes:
        n: rows.
        mean: (d,).
        scatter: (d, d), sum of (x - mean)(x - mean)^T.
        fourth: sum of ||x - mean||^4.
        unit_sum: (d,), sum of x / ||x||, about zero and not the mean.
        units: rows whose norm is not zero.
        cross: by label set, (columns, d), sum of (y - mean of y)(x - mean)^T.
        label_mean: by label set, (columns,); for classes their shares.
        label_square: by label set, (columns,), sum of (y - mean of y)^2.
        classes: by label set, the number of classes, or None for regression.
    """

    n: int
    mean: Tensor
    scatter: Tensor
    fourth: Tensor
    unit_sum: Tensor
    units: int
    cross: dict[str, Tensor]
    label_mean: dict[str, Tensor]
    label_square: dict[str, Tensor]
    classes: dict[str, int | None]

    def class_counts(self, name: str) -> Tensor:
        """Return the rows of each class of a label set, shape (C,)."""
        return (self.label_mean[name] * self.n).round()

    def spreads(self) -> Tensor:
        """Return the standard deviations of the features, (d,); one where a feature is constant up to rounding."""
        spread = (self.scatter.diagonal() / max(self.n, 1)).sqrt()
        return spread.where(spread > 1e-10 * self.mean.abs(), 1)

    def class_means(self, name: str) -> Tensor:
        """Return the means of the classes of a label set less the mean of all, (C, d); zero where a class is empty."""
        counts = self.class_counts(name)
        return self.cross[name] / counts.clamp(min=1).unsqueeze(1)


class Sums:
    """The sums about a pilot, as views of one flat tensor."""

    def __init__(self, width: int, columns: int, device: torch.device, flat: Tensor | None = None) -> None:
        d, t = width, columns
        shapes = ((4,), (d,), (d,), (d,), (d, d), (t,), (t,), (t, d))
        sizes = [math.prod(shape) for shape in shapes]
        self.width, self.columns = width, columns
        self.flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device) if flat is None else flat
        views = [part.view(shape) for part, shape in zip(torch.split(self.flat, sizes), shapes, strict=True)]
        # scalars: rows, rows left out, sum of ||x||^4, rows whose norm is not zero; cubed: sum of ||x||^2 x.
        self.scalars, self.first, self.cubed, self.unit, self.gram, *labels = views
        self.label_first, self.label_square, self.cross = labels

    def copy(self) -> "Sums":
        """Return sums of their own memory."""
        return Sums(self.width, self.columns, self.flat.device, self.flat.clone())

    def add(self, raw: Tensor, norms: Tensor, x: Tensor, y: Tensor) -> None:
        """Add rows; `x` and `y` are about the pilots, `norms` are those of `raw`."""
        ones, square = torch.ones_like(norms), x.norm(dim=1).square()
        self.scalars += torch.stack([ones.sum(), 0 * ones[0], square @ square, (norms > 0).sum()])
        sums = torch.stack([ones, square]) @ x
        self.first += sums[0]
        self.cubed += sums[1]
        self.unit += norms.where(norms > 0, torch.inf).reciprocal() @ raw
        self.gram.addmm_(x.T, x)
        self.label_first += y.sum(dim=0)
        self.label_square += y.square().sum(dim=0)
        self.cross.addmm_(y.T, x)

    def moved(self, by: Tensor, label_by: Tensor) -> "Sums":
        """Return the sums of x + by and y + label_by, by expanding each product."""
        new, n, length = self.copy(), self.scalars[0], by @ by
        trace, along = self.gram.trace(), self.first @ by
        new.scalars[2] += (
            4 * (by @ self.gram @ by) + n * length**2 + 4 * (self.cubed @ by) + 2 * length * (trace + 2 * along)
        )
        new.cubed += 2 * (self.gram @ by) + length * self.first + (trace + 2 * along + n * length) * by
        outer = torch.outer(self.first + n / 2 * by, by)
        new.gram += outer + outer.T
        new.first += n * by
        new.cross += torch.outer(self.label_first + n * label_by, by) + torch.outer(label_by, self.first)
        new.label_square += label_by * (2 * self.label_first + n * label_by)
        new.label_first += n * label_by
        return new


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of a sum of outer products.

    Eigenvalues that are zero up to rounding are set to zero; those of a matrix that is not finite are nan.

    Args:
        matrix: (d, d), symmetric, positive semi-definite.

    Example:
        >>> spectrum(torch.diag(torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64)))[0]
        tensor([0., 1., 4.], dtype=torch.float64)
    """
    if not bool(matrix.isfinite().all()):
        return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)
    values, vectors = torch.linalg.eigh(matrix)
    return values.where(values > values[-1] * len(values) * torch.finfo(values.dtype).eps, 0), vectors
