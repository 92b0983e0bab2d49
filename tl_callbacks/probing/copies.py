"""Which rows are copies of each other: with copies on both sides of a fold, a probe scores what it remembers."""

from collections.abc import Mapping

import torch
from torch import Tensor

TOLERANCE = 1e-5  # of a row's norm: what batches padded otherwise change in float32, and far below what rows differ by


@torch.no_grad()
def copies(features: Mapping[str, Tensor]) -> Tensor:
    """Return a number for each row, from 0, that is the same for rows with equal features in every layer.

    Equal up to rounding, as of one text in batches that are padded to other lengths; in bfloat16 that is more than is
    allowed for here, so such copies are found in batches of one length only. Rows with a feature that is not finite
    are copies of none. No random state is used.

    Args:
        features: by layer, (n, d).

    Example:
        >>> copies({"layer": torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])})
        tensor([0, 1, 0])
    """
    parts = [part.cpu() for part in features.values()]
    number = torch.zeros(len(parts[0]) if parts else 0, dtype=torch.long)
    if not len(number):
        return number
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        x = part.double()
        nearly = TOLERANCE * x.norm(dim=1).nanmedian()
        # Equal rows are equal along any direction, and others all but surely not along two of each layer.
        for along in (x @ torch.randn(x.shape[1], 2, generator=generator, dtype=torch.float64)).unbind(dim=1):
            order = along.argsort(stable=True)
            order = order[number[order].argsort(stable=True)]
            apart = (number[order].diff() != 0) | ~(along[order].diff() <= nearly)
            number[order] = torch.cat([apart.new_zeros(1), apart]).cumsum(0)
        if int(number.max()) == len(number) - 1:
            break
    return numbered(number)


def numbered(values: Tensor) -> Tensor:
    """Return values as numbers from 0 in the order in which they first occur.

    Example:
        >>> numbered(torch.tensor([7, 3, 7, 5]))
        tensor([0, 1, 0, 2])
    """
    _, inverse = torch.unique(values, return_inverse=True)
    return first_of(inverse).argsort().argsort()[inverse]


def first_of(numbers: Tensor) -> Tensor:
    """Return the first row of each number from 0.

    Example:
        >>> first_of(torch.tensor([0, 1, 0, 2]))
        tensor([0, 1, 3])
    """
    rows = torch.arange(len(numbers))
    found = torch.full((int(numbers.max()) + 1 if len(numbers) else 0,), len(numbers))
    return found.scatter_reduce_(0, numbers, rows, "amin")
