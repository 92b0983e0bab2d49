"""The operation behind retrieval: how often the nearest text is the one that belongs to the query."""

import torch
from torch import Tensor

_TIED = 1e-6  # difference of cosines below which two texts are equally near: float32 tells no less
_CHUNK = 1 << 22  # cosines that are held at a time


def recall_at(queries: Tensor, documents: Tensor, k: int = 1) -> Tensor:
    """Return for each query whether its own document is among the k nearest of all, by cosine.

    Query number i belongs to document number i. Where documents are equally near, as duplicates are, it is the share
    of the orders in which its own one is among the k: a number between 0 and 1 that no order of the rows changes.
    So rows that are all the same score chance, k / n, and not 1. A query that is no number scores 0, as does one whose
    document is none; to the others such a document is never near.

    Args:
        queries: (n, d), any floating dtype.
        documents: (n, d).
        k: how many count, 1 or more.

    Returns:
        (n,), float64; the mean is recall@k.

    Raises:
        ValueError: the shapes differ, or k is below 1.

    Example:
        >>> queries, documents = torch.eye(3), torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 1]])
        >>> recall_at(queries, documents).tolist()
        [1.0, 0.3333333333333333, 0.5]
    """
    if queries.shape != documents.shape or queries.ndim != 2:
        raise ValueError(
            f"the queries are {tuple(queries.shape)} and the documents {tuple(documents.shape)}; expected two matrices "
            "of one shape, (n, d), row i of one belonging to row i of the other."
        )
    if k < 1:
        raise ValueError(f"`k` is {k}; expected 1 or more.")
    x, y = _unit(queries), _unit(documents)
    own = (x * y).sum(1)
    found = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    step = max(1, _CHUNK // max(1, len(y)))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        ahead = x[rows] @ y.T - own[rows, None]
        nearer = (ahead > _TIED).sum(1)
        tied = (ahead.abs() <= _TIED).sum(1).clamp(min=1)  # its own document at least
        found[rows] = ((k - nearer).double() / tied).clamp(0.0, 1.0)
    return torch.where(own.isfinite(), found, 0.0)


def _unit(features: Tensor) -> Tensor:
    features = features.double()
    found: Tensor = features / torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp(min=1e-12)
    return found
