"""Additive float64 sums of one layer's features: everything that the probes need, in O(d^2) memory.

All sums are about a pilot mean, since transformer activations have means far from zero, about which second moments
cancel. The pilot is the mean of the first rows that this process saw; it changes rounding only, and differs between
ranks: `merge` moves the sums to a common one, which is exact algebra, and `all_reduce_` agrees on one first.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import one_hot

from tl_callbacks.probing.sums import Centred, Sums

CPU = torch.device("cpu")
CHUNK = 256  # rows that are summed at a time, whatever the batches were


class Moments:
    """The sums of one layer, filled by `update`, added up by `merge`, read by `centred`.

    Sums are made of 256 rows at a time, so that they are the same, bit for bit, whatever the batches were.
    Rows with a feature that is not finite are left out and counted in `skipped`.

    Args:
        width: features of a row, d.
        label_sets: by name, the number of classes, or None for a real-valued target. The task's labels, control
            labels and shuffled labels are sets of equal standing.
        device: where the sums are kept; None: where the first features are, or the CPU if that device has no float64.

    Example:
        >>> moments = Moments(2, {"task": 2})
        >>> _ = moments.update(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([0, 1]))
        >>> moments.centred().scatter
        tensor([[2., 2.],
                [2., 2.]], dtype=torch.float64)

    References:
        Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American Statistician 37(3), 1983.
    """

    def __init__(
        self,
        width: int,
        label_sets: Mapping[str, int | None] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        if width < 1:
            raise ValueError(f"width is {width}; expected the number of features of a row, 1 or more.")
        self.width = width
        self.label_sets = dict(label_sets or {})
        for name, classes in self.label_sets.items():
            if classes is not None and classes < 1:
                raise ValueError(f"label set {name!r} has {classes} classes; expected 1 or more, or None.")
        self._device = None if device is None else torch.device(device)
        self._columns: dict[str, slice] = {}
        for name, classes in self.label_sets.items():
            start = max((columns.stop for columns in self._columns.values()), default=0)
            self._columns[name] = slice(start, start + (classes or 1))
        self._sums: Sums | None = None
        self._pilots: tuple[Tensor, Tensor] | None = None  # of the features, and of the label columns
        self._rows, self._labels, self._pending = torch.empty(0), torch.empty(0), 0

    @classmethod
    def of(cls, features: Tensor, labels: Tensor | None = None) -> Self:
        """Return the moments of whole arrays, with one label set, "task".

        Args:
            features: (n, d).
            labels: (n,), integers from 0 for classes, or floating point for regression.
        """
        if labels is None:
            return cls(features.shape[1]).update(features)
        classes = None if labels.is_floating_point() else max(int(labels.max()) + 1, 1) if len(labels) else 1
        return cls(features.shape[1], {"task": classes}).update(features, labels)

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor | Mapping[str, Tensor] | None = None) -> Self:
        """Add rows.

        Args:
            features: (rows, d), of any floating dtype and any number of rows, none included.
            labels: by label set, (rows,); a tensor alone stands for the only set there is.

        Raises:
            ValueError: a shape, the names of the label sets or a class do not fit.
        """
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected (rows, {self.width}).")
        codes = self._codes(labels, len(features))
        rows, kept = self._buffers(features.device)
        start = 0
        while start < len(features):
            take = min(CHUNK - self._pending, len(features) - start)
            there, here = slice(self._pending, self._pending + take), slice(start, start + take)
            rows[there] = features[here].to(rows)
            kept[there] = codes[here].to(kept)
            self._pending, start = self._pending + take, start + take
            if self._pending == CHUNK:
                self._flush()
        return self

    def without_rows(self) -> "Moments":
        """Return moments of no rows about the same pilot: what is added to them later adds up without being moved."""
        other = Moments(self.width, self.label_sets, device=self._device)
        self._flush()
        other._pilots = self._pilots
        return other

    def merge(self, other: "Moments") -> Self:
        """Add the sums of other rows, about whatever pilot they are."""
        return self._add(other, 1)

    def minus(self, other: "Moments") -> "Moments":
        """Return the moments without rows that are part of these: those outside a fold."""
        return self.without_rows().merge(self)._add(other, -1)

    @property
    def n(self) -> int:
        """Rows that were counted."""
        return round(float(self._flush().scalars[0]))

    @property
    def skipped(self) -> int:
        """Rows that were left out because a feature was not finite."""
        return round(float(self._flush().scalars[1]))

    def centred(self) -> Centred:
        """Return the sums about the means; of no rows, zeros."""
        mean, label_mean = self._means()
        sums = self._about(mean, label_mean)
        columns = self._columns.items()
        return Centred(
            n=self.n, mean=mean, scatter=(sums.gram + sums.gram.T) / 2, fourth=sums.scalars[2],
            unit_sum=sums.unit, units=round(float(sums.scalars[3])),
            cross={name: sums.cross[at] for name, at in columns},
            label_mean={name: label_mean[at] for name, at in columns},
            label_square={name: sums.label_square[at] for name, at in columns},
            classes=dict(self.label_sets),
        )  # fmt: skip

    def _codes(self, labels: Tensor | Mapping[str, Tensor] | None, count: int) -> Tensor:
        """The label sets' columns beside each other, one number a row and set."""
        sets = {} if labels is None else labels
        if isinstance(sets, Tensor):
            sets = dict.fromkeys(list(self.label_sets)[:1], sets) if len(self.label_sets) == 1 else {"": sets}
        if set(sets) != set(self.label_sets):
            given = "as one tensor" if isinstance(labels, Tensor) else f"for {sorted(sets)}"
            raise ValueError(f"labels were given {given}; expected the label sets {sorted(self.label_sets)}, by name.")
        codes = torch.zeros(count, len(self.label_sets), dtype=torch.float64)
        for column, (name, classes) in enumerate(self.label_sets.items()):
            values = sets[name].detach().to("cpu")
            if values.shape != (count,):
                raise ValueError(f"labels {name!r} have shape {tuple(values.shape)}; expected ({count},).")
            codes[:, column] = values.double()
            if classes is not None and count and not 0 <= int(values.min()) <= int(values.max()) < classes:
                wrong = int(values.min()) if int(values.min()) < 0 else int(values.max())
                raise ValueError(
                    f"labels {name!r} hold class {wrong}; expected 0 to {classes - 1}. Leave out rows without a label."
                )
            if classes is None and not values.isfinite().all():
                raise ValueError(f"labels {name!r} are not all finite. Leave out rows without a label.")
        return codes

    def _allocated(self, device: torch.device = CPU) -> "Sums":
        if self._sums is None:
            # Apple's GPUs have no float64.
            self._device = self._device or (CPU if device.type == "mps" else device)
            self._sums = Sums(self.width, sum(classes or 1 for classes in self.label_sets.values()), self._device)
        return self._sums

    def _buffers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        self._allocated(device)
        if not len(self._rows):
            self._rows = torch.zeros(CHUNK, self.width, dtype=torch.float64, device=self._device)
            self._labels = torch.zeros(CHUNK, len(self.label_sets), dtype=torch.float64, device=self._device)
        return self._rows, self._labels

    @torch.no_grad()
    def _flush(self) -> "Sums":
        """Add the rows that wait, and return the sums."""
        sums, count = self._allocated(), self._pending
        if not count:
            return sums
        self._pending = 0
        x, codes = self._rows[:count], self._labels[:count]
        norms = x.norm(dim=1)  # finite where all features are
        finite = norms.isfinite()
        if not finite.all():
            x, codes, norms = x[finite], codes[finite], norms[finite]
        sums.scalars[1] += count - len(x)
        if len(x):
            targets = [
                codes[:, i : i + 1] if classes is None else one_hot(codes[:, i].long(), classes).double()
                for i, classes in enumerate(self.label_sets.values())
            ]
            y = torch.cat(targets, dim=1) if targets else x.new_zeros(len(x), 0)
            if self._pilots is None:
                self._pilots = x.mean(dim=0), y.mean(dim=0)
            sums.add(x, norms, x - self._pilots[0], y - self._pilots[1])
        return sums

    def _means(self) -> tuple[Tensor, Tensor]:
        sums = self._flush()
        if self._pilots is None:
            return torch.zeros_like(sums.first), torch.zeros_like(sums.label_first)
        n = max(self.n, 1)
        return self._pilots[0] + sums.first / n, self._pilots[1] + sums.label_first / n

    def _about(self, pilot: Tensor, label_pilot: Tensor) -> "Sums":
        sums = self._flush()
        if self._pilots is None or (torch.equal(self._pilots[0], pilot) and torch.equal(self._pilots[1], label_pilot)):
            return sums.copy()
        return sums.moved(self._pilots[0] - pilot, self._pilots[1] - label_pilot)

    def _add(self, other: "Moments", sign: int) -> Self:
        if (other.width, other.label_sets) != (self.width, self.label_sets):
            raise ValueError(
                f"moments of width {other.width} and label sets {other.label_sets} do not add up with those of width "
                f"{self.width} and {self.label_sets}."
            )
        theirs = other._flush()
        sums = self._allocated(theirs.flat.device)
        self._flush()
        if self._pilots is None and other._pilots is not None:
            self._pilots = other._pilots[0].to(sums.flat.device), other._pilots[1].to(sums.flat.device)
        if self._pilots is not None:
            here = [pilot.to(theirs.flat.device) for pilot in self._pilots]
            theirs = other._about(here[0], here[1])
        sums.flat.add_(theirs.flat.to(sums.flat.device), alpha=sign)
        return self


def pack(moments: Sequence[Moments]) -> Tensor:
    """Return the sums of all layers in one flat float64 tensor, on the device of the first.

    They add up across processes where the pilots are equal: see `all_reduce_`.

    Example:
        >>> pack([Moments.of(torch.ones(3, 2)), Moments.of(torch.ones(3, 1))]).shape
        torch.Size([22])
    """
    flats = [m._flush().flat for m in moments]
    return torch.cat([flat.to(flats[0].device) for flat in flats]) if flats else torch.zeros(0, dtype=torch.float64)


def unpack_(moments: Sequence[Moments], flat: Tensor) -> None:
    """Write the sums of all layers back from one flat tensor.

    Example:
        >>> one, two = Moments.of(torch.ones(3, 2)), Moments(2)
        >>> unpack_([two], pack([one]))
        >>> two.n
        3
    """
    parts = torch.split(flat, [m._flush().flat.numel() for m in moments])
    for m, part in zip(moments, parts, strict=True):
        m._flush().flat.copy_(part)


@torch.no_grad()
def all_reduce_(moments: Sequence[Moments], group: dist.ProcessGroup | None = None) -> None:
    """Add up the sums of all ranks in place, in one all-reduce of all layers; nothing where there is one process.

    A small one comes first, of d + 1 numbers a layer: the mean over all ranks becomes everyone's pilot, so ranks may
    have had other first rows, or none. Call it once for the rows that a rank has seen.

    Args:
        moments: the same layers in the same order on each rank.
        group: the processes; None: all of them.

    Example:
        >>> all_reduce_([Moments.of(torch.ones(3, 2))])
    """
    if not moments or not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    device = moments[0]._flush().flat.device
    totals = [torch.cat([m._flush().scalars[:1], *(m.n * mean for mean in m._means())]).to(device) for m in moments]
    flat = torch.cat(totals)
    dist.all_reduce(flat, group=group)
    for m, total in zip(moments, torch.split(flat, [len(total) for total in totals]), strict=True):
        mean = (total[1:] / total[0].clamp(min=1)).to(m._flush().flat.device)
        pilots = mean[: m.width], mean[m.width :]
        m._sums, m._pilots = m._about(*pilots), pilots
    flat = pack(moments)
    dist.all_reduce(flat, group=group)
    unpack_(moments, flat)
