"""Distances between the means and covariances of two data sets' features, with a null from random splits."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tl_callbacks.probing.similarity import centred
from tl_callbacks.probing.two_samples import Distance, check, pooled, usable


def frechet(x: Tensor, y: Tensor, *, splits: int = 20, seed: int = 0) -> Distance:
    """Return the squared Fréchet distance of two Gaussians with the features' means and covariances.

    ||mu - mu'||^2 + tr(S + S' - 2 (S S')^(1/2)). Its bias is large and falls as 1 / n (22 for n=100 of one
    64-dimensional Gaussian), which is what the null shows: all rows split at random into sets of n and n'. Where
    n < d the bias does not fall as 1 / n, but that of the null is the same.

    Args:
        x: features, (n, d).
        y: features of other rows, (n', d).
        splits: draws of the null.
        seed: of the generator.

    Returns:
        0 or more, in squared units of the features.

    Raises:
        ValueError: features that are not (n, d) and (n', d).

    Example:
        >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> round(frechet(x, x + 3).estimate, 4)
        18.0

    References:
        Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982, equation 4.
    """
    return _with_splits("frechet", x, y, lambda a, b, d: _frechet(a, b), splits, seed)


def coral(x: Tensor, y: Tensor, *, splits: int = 20, seed: int = 0) -> Distance:
    """Return the CORAL distance ||S - S'||^2 / (4 d^2) of the features' covariances, means apart.

    Args:
        x: features, (n, d).
        y: features of other rows, (n', d).
        splits: draws of the null, as in `frechet`.
        seed: of the generator.

    Returns:
        0 or more, in fourth powers of the features' unit.

    Raises:
        ValueError: features that are not (n, d) and (n', d).

    Example:
        >>> x = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> coral(x, 3 * x, splits=0).estimate
        16.0

    References:
        Sun and Saenko, "Deep CORAL", ECCV 2016 workshops, equation 1. https://arxiv.org/abs/1607.01719
    """
    return _with_splits("coral", x, y, _coral, splits, seed)


def _frechet(x: Tensor, y: Tensor) -> float:
    means = (x.mean(0) - y.mean(0)).square().sum()
    roots = [centred(z) / math.sqrt(len(z) - 1) for z in (x, y)]
    # tr (S S')^(1/2) is the sum of the singular values of a product of roots of S and S': no negative eigenvalues.
    left, right = (torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root for root in roots)
    cross = torch.linalg.svdvals(left @ right.T).sum()
    return max(0.0, float(means + left.square().sum() + right.square().sum() - 2 * cross))


def _coral(x: Tensor, y: Tensor, width: int) -> float:
    left, right = (z.T @ z / (len(z) - 1) for z in (centred(x), centred(y)))
    return float((left - right).square().sum() / (4 * width * width))


def _with_splits(
    name: str, x: Tensor, y: Tensor, distance: Callable[[Tensor, Tensor, int], float], splits: int, seed: int
) -> Distance:
    """The distance, and its null from random splits of all rows."""
    check(x, y)
    z, first = pooled(x, y)
    if not usable(z, first):
        return Distance(name, math.nan, ())
    generator, width = torch.Generator().manual_seed(seed), x.shape[1]
    orders = (torch.randperm(len(z), generator=generator).to(z.device) for _ in range(splits))
    null = tuple(distance(z[order[:first]], z[order[first:]], width) for order in orders)
    return Distance(name, distance(z[:first], z[first:], width), null)
