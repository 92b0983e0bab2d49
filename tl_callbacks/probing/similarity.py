"""How alike two representations of the same rows are: linear CKA, one pair or all pairs of layers.

All of it is computed in float64 on features that were centred first: a Gram matrix of features with a large mean, as
transformers have, holds little but that mean, and in float32 nothing else. Features with NaN or infinity give NaN.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

MIN_ROWS = 4  # the debiased estimator divides by n (n - 3)
BLOCK = 64  # rows of a Gram matrix at a time: what lies below the diagonal is not computed
NOISE = 1e-12  # a self-similarity this small beside the sums that it is the difference of is rounding


def wide(x: Tensor) -> Tensor:
    """Return the features in float64, without a graph; on the CPU if their device, Apple's GPU, has no float64."""
    return (x.detach().cpu() if x.device.type == "mps" else x.detach()).double()


def centred(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the features less their mean, (n, d).

    The first row is subtracted before the mean is taken. So constant columns become exactly 0, which the mean of equal
    numbers, rounded, would not do, and a large mean is gone before anything is rounded to `dtype`.
    """
    x = x.detach() if dtype == torch.float32 else wide(x)
    x = x.to(torch.promote_types(x.dtype, dtype))
    z = (x - x[:1]).to(dtype)
    return z.sub_(z.mean(0))


def debias(products: Tensor, squares: Tensor, traces: Tensor, rows: int) -> Tensor:
    """Return n (n - 3) times the unbiased HSIC of linear kernels, from sums over centred features.

    products - n / (n - 2) squares + traces / ((n - 1) (n - 2)). It may be negative.

    Args:
        products: ||X^T Y||^2 in Frobenius' norm, any shape.
        squares: sum over the rows of ||x||^2 ||y||^2, the same shape.
        traces: ||X||^2 ||Y||^2, the same shape.
        rows: n, at least 4.

    References:
        Song et al., "Feature Selection via Dependence Maximization", JMLR 2012, the unbiased estimator, with
        K = X X^T multiplied out. https://jmlr.org/papers/v13/song12a.html
    """
    return products - rows / (rows - 2) * squares + traces / ((rows - 1) * (rows - 2))


def similarity_ratio(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Return xy / sqrt(xx yy), and 0 where xx or yy is 0: what does not vary has nothing in common with anything."""
    ratio = xy / (xx.clamp(min=0).sqrt() * yy.clamp(min=0).sqrt())
    return torch.where(((xx <= 0) | (yy <= 0)) & ~xy.isnan(), 0.0, ratio)


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = True) -> float:
    """Return the linear CKA of two representations of the same rows: 1 for equal up to rotation, scale and shift.

    HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)). The biased form, ||X^T Y||^2 / (||X^T X|| ||Y^T Y||), grows with d / n,
    even for independent features (0.67 at n=32, d=64); the debiased one is about 0 there. Its negative values are
    kept: cut off at 0, their mean would be biased again.

    Args:
        x: features, (n, d), any floating dtype.
        y: features of the same rows in the same order, (n, d'); d' may differ.
        debiased: the unbiased estimator of HSIC in all three places.

    Returns:
        At most 1 (biased: from 0); 0 where `x` or `y` is constant, or varies in one row only (debiased): it has no
        structure that `y` could share. NaN where it does not exist: n <= 3 (biased: n <= 1), or NaN or infinity in
        the features.

    Raises:
        ValueError: a tensor has not two dimensions, or the two have different numbers of rows.

    Example:
        >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> round(linear_cka(x, 3 * x.flip(1) + 1), 6)
        1.0

    References:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, section 3.
        https://arxiv.org/abs/1905.00414. Nguyen, Raghu and Kornblith, ICLR 2021, for the unbiased HSIC in it.
        https://arxiv.org/abs/2010.15327
    """
    return float(cka_matrix([x], [y], debiased=debiased))


def cka_matrix(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor] | None = None,
    *,
    debiased: bool = True,
    form: Literal["gram", "features"] | None = None,
) -> Tensor:
    """Return the linear CKA of every layer in `xs` with every layer in `ys`, from one matrix product.

    Args:
        xs: features of the same n rows at L layers, each (n, d); widths may differ.
        ys: the same rows at L' layers, of another model, say; None: `xs`.
        debiased: as in `linear_cka`.
        form: of the two equal ways, "gram" compares n x n matrices of products of rows, "features" d x d' matrices
            of products of columns; None: the one with fewer operations.

    Returns:
        (L, L'), float64; special values as in `linear_cka`.

    Raises:
        ValueError: a tensor has not two dimensions, or they have different numbers of rows.

    Example:
        >>> x = torch.eye(6)[:, :3]
        >>> cka_matrix([x, 2 * x, x[:, :1]], debiased=False)[0].round(decimals=4)
        tensor([1.0000, 1.0000, 0.6000], dtype=torch.float64)
    """
    rows = common_rows([*xs, *(ys or ())])
    if rows < (MIN_ROWS if debiased else 2):
        return torch.full((len(xs), len(xs if ys is None else ys)), math.nan, dtype=torch.float64)
    if (form or _cheaper(rows, xs, xs if ys is None else ys)) == "gram":
        mine = gram_vectors(xs, debiased=debiased)
        return cka_from_grams(mine, mine if ys is None else gram_vectors(ys, debiased=debiased))
    mine_centred = [centred(x) for x in xs]
    others = mine_centred if ys is None else [centred(y) for y in ys]
    xx, yy = (
        torch.cat([_feature_products([z], [z], debiased=debiased).flatten() for z in layers])
        for layers in (mine_centred, others)
    )
    return similarity_ratio(_feature_products(mine_centred, others, debiased=debiased), xx[:, None], yy)


def gram_vectors(xs: Sequence[Tensor], *, debiased: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return each layer's Gram matrix as a vector, so that the dot product of two is their HSIC.

    Those of the reference never change: computed once, they make a comparison with all of its layers one product. The
    debiased ones hold the U-centred matrix, so that v . w is n (n - 3) HSIC. What lies below the diagonal is left out,
    in blocks of 64 rows, and what lies above counts twice, by a factor of sqrt 2.

    Args:
        xs: features of the same n rows at L layers, each (n, d).
        debiased: U-centred matrices, without the diagonal; else doubly centred ones.
        dtype: of the products and the result. float32 takes half the time and memory: of centred features, CKA is
            off by about 1e-5 at 2000 rows.

    Returns:
        (L, k), k from n (n + 1) / 2 for few rows to n (n + 64) / 2.

    Raises:
        ValueError: fewer than 4 rows (2 where not debiased), a tensor without two dimensions, or different numbers
            of rows.

    Example:
        >>> gram_vectors([torch.eye(5), torch.ones(5, 2)]).shape
        torch.Size([2, 25])

    References:
        Szekely and Rizzo, "Partial distance correlation with methods for dissimilarities", Annals of Statistics 2014,
        for the U-centred matrix. https://arxiv.org/abs/1310.2926
    """
    rows, least = common_rows(xs), MIN_ROWS if debiased else 2
    if rows < least:
        raise ValueError(f"{rows} rows; expected {least} or more for a Gram matrix. Give more rows.")
    blocks = [(start, min(start + BLOCK, rows)) for start in range(0, rows, BLOCK)]
    sizes = [(end - start) * width for start, end in blocks for width in (end - start, rows - end)]
    found = torch.empty(len(xs), sum(sizes), dtype=dtype, device=centred(xs[0][:1], dtype).device)
    for x, vector in zip(xs, found, strict=True):
        z = centred(x, dtype)
        squares = torch.linalg.vector_norm(z, dim=1).square()
        # The rows of a centred Gram matrix sum to 0, so without the diagonal to minus that: the U-centred entry is
        # z_i . z_j + share_i + share_j.
        share = (squares / (rows - 2) - squares.sum() / (2 * (rows - 1) * (rows - 2))) if debiased else None
        panels = iter(torch.split_with_sizes(vector, sizes))
        for start, end in blocks:
            for first, last, weight in ((start, end, 1.0), (end, rows, math.sqrt(2))):
                panel = next(panels).view(end - start, last - first)
                if share is None:
                    torch.mm(z[start:end], z[first:last].T, out=panel).mul_(weight)
                else:
                    torch.add(share[start:end, None], share[first:last], out=panel)
                    panel.addmm_(z[start:end], z[first:last].T, beta=weight, alpha=weight)
                    if first == start:
                        panel.fill_diagonal_(0.0)
        if debiased and vector.norm() <= 64 * torch.finfo(dtype).eps * squares.sum():
            vector.zero_()  # no more than rounding
    return found


def cka_from_grams(xs: Tensor, ys: Tensor) -> Tensor:
    """Return the CKA of all pairs of two stacks of `gram_vectors`, (L, L') in float64.

    Args:
        xs: (L, k), of `gram_vectors`.
        ys: (L', k), of the same rows.

    Example:
        >>> grams = gram_vectors([torch.arange(12.0).view(6, 2).square()])
        >>> round(cka_from_grams(grams, grams).item(), 6)
        1.0
    """
    xx, yy = (torch.linalg.vector_norm(grams, dim=1).double().square() for grams in (xs, ys))
    return similarity_ratio((xs @ ys.T).double(), xx[:, None], yy)


def common_rows(layers: Sequence[Tensor]) -> int:
    """Return the number of rows that all layers have."""
    shapes = [tuple(layer.shape) for layer in layers]
    if not shapes or any(len(shape) != 2 for shape in shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"features of shapes {shapes}; expected (n, d) each, with the same n. Pool tokens first, and give the "
            "same rows in the same order."
        )
    return int(shapes[0][0])


def _cheaper(rows: int, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Literal["gram", "features"]:
    """The form with fewer multiplications."""
    mine, others = [x.shape[1] for x in xs], [y.shape[1] for y in ys]
    widths = mine if ys is xs else mine + others
    grams = rows * rows / 2 * (sum(widths) + len(xs) * len(ys))
    features = rows * (sum(mine) * sum(others) + sum(width * width for width in widths))
    return "gram" if grams <= features else "features"


def _feature_products(xs: Sequence[Tensor], ys: Sequence[Tensor], *, debiased: bool) -> Tensor:
    """(L, L'): HSIC times its divisor, of centred layers, from products of columns; rounding is set to 0."""
    stacked = torch.cat([*ys], dim=1)
    bounds = [0, *torch.tensor([y.shape[1] for y in ys]).cumsum(0).tolist()]
    columns = [(x.T @ stacked).square().sum(0) for x in xs]
    products = torch.stack([torch.stack([c[low:high].sum() for low, high in pairwise(bounds)]) for c in columns])
    if not debiased:
        return products
    mine, others = (torch.stack([z.square().sum(1) for z in layers]) for layers in (xs, ys))
    found = debias(products, mine @ others.T, mine.sum(1)[:, None] * others.sum(1), len(stacked))
    return torch.where(found.abs() <= NOISE * products, 0.0, found)
