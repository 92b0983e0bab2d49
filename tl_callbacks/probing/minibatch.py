"""CKA from batches that are seen one at a time, when neither all rows nor d x d sums can be kept."""

import math
from collections.abc import Sequence
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from tl_callbacks.probing.similarity import MIN_ROWS, common_rows, gram_vectors, similarity_ratio


class MinibatchCKA:
    """The debiased linear CKA of all pairs of layers from batches: sums of HSIC first, their ratio last.

    An average of per-batch ratios is biased, and that of biased CKA is off by up to 0.4 at 32 rows a batch. Here the
    error at 32 rows is about 0.01, provided that batches are random: batches of rows sorted by length make it several
    times as large. A batch counts by its rows, so that a last one of few does not spoil the sums (for batches of one
    size that is the paper's estimator); batches of n <= 3 rows, for which HSIC does not exist, are dropped and counted.

    Args:
        layers: L.
        others: L', layers on the other side.

    Example:
        >>> x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0))
        >>> cka = MinibatchCKA(2, 1)
        >>> for batch in x.split(32):
        ...     _ = cka.update([batch, batch[:, :2]], [batch])
        >>> cka.matrix().shape
        torch.Size([2, 1])

    References:
        Nguyen, Raghu and Kornblith, "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021, the part on
        minibatch CKA. https://arxiv.org/abs/2010.15327
    """

    def __init__(self, layers: int, others: int) -> None:
        self.shape = (layers, others)
        self.sums = torch.zeros(2 + layers + others + layers * others, dtype=torch.float64)

    @property
    def batches(self) -> int:
        """Batches that were counted."""
        return round(self.sums[0].item())

    @property
    def dropped(self) -> int:
        """Batches that were too small."""
        return round(self.sums[1].item())

    @torch.no_grad()
    def update(self, xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Self:
        """Add a batch.

        Args:
            xs: its features at the L layers, each (rows, d).
            ys: the same rows at the L' others.

        Raises:
            ValueError: another number of layers, or other shapes.
        """
        if (len(xs), len(ys)) != self.shape:
            raise ValueError(f"{len(xs)} and {len(ys)} layers; expected {self.shape[0]} and {self.shape[1]}.")
        rows = common_rows([*xs, *ys])
        if rows < MIN_ROWS:
            self.sums[1] += 1
            return self
        mine, others = gram_vectors(xs), gram_vectors(ys)
        parts = (
            *(torch.linalg.vector_norm(grams, dim=1).square() for grams in (mine, others)),
            (mine @ others.T).flatten(),
        )
        self.sums[0] += 1
        self.sums[2:] += torch.cat(parts).cpu() / (rows - 3)  # HSIC times the rows
        return self

    def merge(self, other: "MinibatchCKA") -> Self:
        """Add the sums of other batches.

        Raises:
            ValueError: another number of layers.
        """
        if other.shape != self.shape:
            raise ValueError(f"sums of {other.shape} layers do not add up with those of {self.shape}.")
        self.sums += other.sums
        return self

    def all_reduce_(self, group: dist.ProcessGroup | None = None) -> Self:
        """Add up the sums of all ranks in place; nothing where there is one process. Call it once."""
        if dist.is_available() and dist.is_initialized():
            # NCCL reduces what is on a GPU only.
            device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
            sums = self.sums.to(device)
            dist.all_reduce(sums, group=group)
            self.sums = sums.cpu()
        return self

    def matrix(self) -> Tensor:
        """Return (L, L') in float64: at most about 1, 0 where a layer is constant, NaN before the first batch."""
        layers, others = self.shape
        xx, yy, xy = torch.split_with_sizes(self.sums[2:], [layers, others, layers * others])
        if not self.batches:
            return torch.full(self.shape, math.nan, dtype=torch.float64)
        return similarity_ratio(xy.view(self.shape), xx[:, None], yy)
