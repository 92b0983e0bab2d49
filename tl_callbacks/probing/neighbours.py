"""What rows tell that sums do not, on a sample: the nearest-neighbour probe and the intrinsic dimension."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from tl_callbacks.probing.copies import copies
from tl_callbacks.probing.scores import ProbeScore, score

BLOCK = 512  # rows whose distances to all others are held at a time


@torch.no_grad()
def knn_probe(x: Tensor, labels: Tensor, *, neighbours: int = 10) -> ProbeScore:
    """Return the accuracy of the majority of a row's nearest neighbours by cosine, the row and its copies left out.

    Of classes with as many votes the one with the lowest number wins. Rows are compared with all others, so take a
    sample of a few thousand.

    Args:
        x: (n, d), of any floating dtype.
        labels: (n,), integers from 0.
        neighbours: how many vote, 1 or more; all others where there are fewer. Where none are, class 0 is taken.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
        >>> knn_probe(x, torch.tensor([0, 0, 1, 1]), neighbours=1).value
        1.0

    References:
        Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018, section 3.4.
    """
    if neighbours < 1:
        raise ValueError(f"neighbours is {neighbours}; expected 1 or more.")
    finite = x.isfinite().all(dim=1)
    x, labels = normalize(_wide(x[finite]), dim=1), labels.to(x.device)[finite]
    k, classes = min(neighbours, len(x) - 1), int(labels.max()) + 1 if len(labels) else 1
    if k < 1:
        return score(torch.empty(0, classes), labels[:0], classes)
    votes, number = [], copies({"": x}).to(x.device)
    for start in range(0, len(x), BLOCK):
        alike = x[start : start + BLOCK] @ x.T
        alike[number[start : start + BLOCK].unsqueeze(1) == number] = -torch.inf
        nearest = alike.topk(k, dim=1)
        counted = nearest.values.isfinite().unsqueeze(2)
        votes.append((one_hot(labels[nearest.indices], classes) * counted).sum(dim=1).double())
    return score(torch.cat(votes), labels, classes, number.cpu())


@torch.no_grad()
def intrinsic_dimension(x: Tensor) -> float:
    """Return TwoNN's estimate of the features' intrinsic dimension, from each row's two nearest others; 0 or more.

    d = n / sum of ln(r2 / r1), the maximum of the likelihood. Rows with a duplicate are left out: r1 = 0 tells nothing.

    Args:
        x: (n, d), a sample of a few thousand rows.

    Returns:
        nan where fewer than two rows are left, or none differ in their two distances.

    Example:
        >>> line = torch.rand(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> round(intrinsic_dimension(line @ torch.ones(1, 20, dtype=torch.float64)))
        1

    References:
        Facco et al., "Estimating the intrinsic dimension of datasets by a minimal neighborhood information",
        Scientific Reports 7, 2017, "Methods". https://arxiv.org/abs/1803.06992
    """
    x = _wide(x[x.isfinite().all(dim=1)])
    if len(x) < 3:
        return math.nan
    nearest = []
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK]
        away = torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist")
        away[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = torch.inf
        nearest.append(away.topk(2, dim=1, largest=False).values)
    first, second = torch.cat(nearest).unbind(dim=1)
    kept = first > 0
    logs = (second[kept] / first[kept]).log().sum()
    return int(kept.sum()) / float(logs) if int(kept.sum()) > 1 and logs > 0 else math.nan


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.device.type != "mps" else x.float()
