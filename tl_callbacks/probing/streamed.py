"""Similarity from sums that add up over batches and ranks: exact for all rows, or averaged over batches.

`PairSums` holds what the debiased CKA and the Procrustes distance of two layers need: memory for three d x d matrices,
the same result in any split of the rows. `MinibatchCKA` holds a number per pair of layers and sees batches only.
"""

import math
from collections.abc import Sequence
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from tl_callbacks.probing.alignment import Convention, procrustes_from
from tl_callbacks.probing.similarity import MIN_ROWS, NOISE, common_rows, debias, similarity_ratio, wide


class _Terms:
    """The sums over rows of one pair (x, y) about pilots, as views into one flat tensor.

    Args:
        width_x: d.
        width_y: d'.
        device: where they are kept.
    """

    def __init__(self, width_x: int, width_y: int, device: torch.device | str) -> None:
        self.widths = (width_x, width_y)
        sizes = (1, 1, 1, 1, width_x, width_y, width_y, width_x, width_x * width_y)
        self.flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        (
            self.count, self.square_x, self.square_y, self.squares,  # n, of ||x||^2, of ||y||^2, of ||x||^2 ||y||^2
            self.x, self.y, self.weighted_y, self.weighted_x,  # of x, of y, of ||x||^2 y, of ||y||^2 x
            cross,
        ) = torch.split_with_sizes(self.flat, sizes)  # fmt: skip
        self.cross = cross.view(width_x, width_y)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows, less the pilots."""
        of_x, of_y = x.square().sum(1), y.square().sum(1)
        self.count += len(x)
        self.square_x += of_x.sum()
        self.square_y += of_y.sum()
        self.squares += of_x @ of_y
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.weighted_y += of_x @ y
        self.weighted_x += of_y @ x
        self.cross.addmm_(x.T, y)

    def moved(self, x: Tensor, y: Tensor) -> "_Terms":
        """The same sums of rows from which `x` and `y` are taken away, by multiplying out."""
        new, n = _Terms(*self.widths, self.flat.device), self.count
        new.count += n
        new.x += self.x - n * x
        new.y += self.y - n * y
        new.cross += self.cross - torch.outer(x, self.y) - torch.outer(new.x, y)
        of_x, of_y = x @ x, y @ y
        new.square_x += self.square_x - 2 * (x @ self.x) + n * of_x
        new.square_y += self.square_y - 2 * (y @ self.y) + n * of_y
        new.weighted_y += self.weighted_y - 2 * (x @ self.cross) + of_x * self.y - new.square_x * y
        new.weighted_x += self.weighted_x - 2 * (self.cross @ y) + of_y * self.x - new.square_y * x
        # ||x||^2 of the new rows times ||y||^2, 2 y . (row) and ||y||^2 of the old ones.
        wide_y = self.weighted_y - 2 * (x @ self.cross) + of_x * self.y
        wide_squares = self.squares - 2 * (x @ self.weighted_x) + of_x * self.square_y
        new.squares += wide_squares - 2 * (y @ wide_y) + of_y * new.square_x
        return new

    def centred(self) -> "_Terms":
        """The same about the means."""
        n = self.count.clamp(min=1)
        return self.moved(self.x / n, self.y / n)

    def hsic(self, rows: int, *, debiased: bool) -> Tensor:
        """HSIC times its divisor, of centred sums; rounding is set to 0."""
        products = self.cross.square().sum()
        if not debiased:
            return products
        found = debias(products, self.squares.squeeze(), (self.square_x * self.square_y).squeeze(), rows)
        return torch.where(found.abs() <= NOISE * products, 0.0, found)


class PairSums:
    """The sums of two layers, or of one layer and its reference: `linear_cka` and `procrustes` of all rows, in a pass.

    Sums are about the mean of the first rows that this process saw, in float64: rounding is then that of centred
    features. Rows in which a feature is not finite are left out and counted in `skipped`.

    Args:
        width_x: features of a row on the one side, d.
        width_y: on the other side.
        device: where the sums are kept; the features go there.

    Example:
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> sums = PairSums(4, 2)
        >>> for batch in x.split(7):
        ...     _ = sums.update(batch, batch[:, :2])
        >>> round(sums.linear_cka(), 4)
        0.7423

    References:
        As in `linear_cka` and `procrustes`; Chan, Golub and LeVeque, The American Statistician 37(3), 1983, for pilots.
    """

    def __init__(self, width_x: int, width_y: int, *, device: torch.device | str = "cpu") -> None:
        if min(width_x, width_y) < 1:
            raise ValueError(f"widths are {width_x} and {width_y}; expected the number of features, 1 or more.")
        self.widths = (width_x, width_y)
        self.skipped = 0
        self._pairs = [_Terms(a, b, device) for a, b in self._sides()]
        self._pilots: tuple[Tensor, Tensor] | None = None

    def _sides(self) -> tuple[tuple[int, int], ...]:
        x, y = self.widths
        return (x, y), (x, x), (y, y)

    @property
    def n(self) -> int:
        """Rows that were counted."""
        return round(self._pairs[0].count.item())

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> Self:
        """Add rows.

        Args:
            x: (rows, d), any floating dtype and any number of rows, none included.
            y: (rows, d'), the same rows in the same order.

        Raises:
            ValueError: a shape does not fit.
        """
        rows = common_rows([x, y])
        if (x.shape[1], y.shape[1]) != self.widths:
            raise ValueError(f"features of widths {x.shape[1]} and {y.shape[1]}; expected {self.widths}.")
        device = self._pairs[0].flat.device
        x, y = wide(x).to(device), wide(y).to(device)
        finite = x.isfinite().all(1) & y.isfinite().all(1)
        x, y = x[finite], y[finite]
        self.skipped += rows - len(x)
        if not len(x):
            return self
        if self._pilots is None:
            # From the first row on, so that a constant column's is exact.
            self._pilots = x[0] + (x - x[0]).mean(0), y[0] + (y - y[0]).mean(0)
        x, y = x - self._pilots[0], y - self._pilots[1]
        for terms, (a, b) in zip(self._pairs, ((x, y), (x, x), (y, y)), strict=True):
            terms.add(a, b)
        return self

    @torch.no_grad()
    def merge(self, other: "PairSums") -> Self:
        """Add the sums of other rows, about whatever pilots they are.

        Raises:
            ValueError: other widths.
        """
        if other.widths != self.widths:
            raise ValueError(f"sums of widths {other.widths} do not add up with those of widths {self.widths}.")
        self.skipped += other.skipped
        if other._pilots is None:
            return self
        device = self._pairs[0].flat.device
        if self._pilots is None:
            self._pilots = other._pilots[0].to(device), other._pilots[1].to(device)
        home = other._pairs[0].flat.device
        theirs = other._about(self._pilots[0].to(home), self._pilots[1].to(home))
        for mine, their in zip(self._pairs, theirs, strict=True):
            mine.flat += their.flat.to(device)
        return self

    def linear_cka(self, *, debiased: bool = True) -> float:
        """Return the linear CKA of all rows, as `similarity.linear_cka` of them at once."""
        if self.n < (MIN_ROWS if debiased else 2):
            return math.nan
        xy, xx, yy = (terms.centred().hsic(self.n, debiased=debiased) for terms in self._pairs)
        return float(similarity_ratio(xy, xx, yy))

    def procrustes(self, *, convention: Convention = "angular") -> float:
        """Return the Procrustes distance of all rows, as `alignment.procrustes` of them at once."""
        if self.n < 2:
            return math.nan
        terms = self._pairs[0].centred()
        return procrustes_from(terms.cross, terms.square_x, terms.square_y, convention)

    def _about(self, x: Tensor, y: Tensor) -> list[_Terms]:
        """The sums about other pilots."""
        if self._pilots is None:
            return self._pairs
        x, y = x - self._pilots[0], y - self._pilots[1]
        return [terms.moved(a, b) for terms, (a, b) in zip(self._pairs, ((x, y), (x, x), (y, y)), strict=True)]


@torch.no_grad()
def reduce_pairs_(pairs: Sequence[PairSums], group: dist.ProcessGroup | None = None) -> None:
    """Add up the sums of all ranks in place, in one all-reduce of all pairs; nothing where there is one process.

    A small one comes first, of d + d' numbers a pair: everyone moves to the greatest of the ranks' pilots, so ranks
    may have had other first rows, or none. Call it once for the rows that a rank has seen.

    Args:
        pairs: the same pairs in the same order on each rank.
        group: the processes; None: all of them.

    Example:
        >>> reduce_pairs_([PairSums(2, 3)])
    """
    if not pairs or not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    device = pairs[0]._pairs[0].flat.device
    pilots = torch.cat(
        [
            torch.cat(pair._pilots).to(device)
            if pair._pilots
            else torch.full((sum(pair.widths),), -math.inf, dtype=torch.float64, device=device)
            for pair in pairs
        ]
    )
    # The greatest, not the mean: of equal numbers it is exactly that number, so constant columns stay constant.
    dist.all_reduce(pilots, op=dist.ReduceOp.MAX, group=group)
    parts = []
    for pair, pilot in zip(pairs, torch.split_with_sizes(pilots, [sum(pair.widths) for pair in pairs]), strict=True):
        if pilot.isfinite().all():
            x, y = torch.split_with_sizes(pilot.to(pair._pairs[0].flat.device), pair.widths)
            pair._pairs, pair._pilots = pair._about(x, y), (x, y)
        skipped = pair._pairs[0].flat.new_tensor([pair.skipped])
        parts += [part.to(device) for part in (skipped, *(terms.flat for terms in pair._pairs))]
    flat = torch.cat(parts)
    dist.all_reduce(flat, group=group)
    summed = iter(torch.split_with_sizes(flat, [len(part) for part in parts]))
    for pair in pairs:
        pair.skipped = round(next(summed).item())
        for terms in pair._pairs:
            terms.flat.copy_(next(summed))
