"""What a forward pass over a fixed set of rows shows: our own one, and what is kept of the Trainer's."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tl_callbacks.groups import LayerGroups
from tl_callbacks.probing.capture import Batch, Capture
from tl_callbacks.probing.rows import Source, Step, called, forwards, is_own_pass
from tl_callbacks.probing.targets import VARYING, agreed, labels_in
from tl_callbacks.reading.pooling import Pooling


@dataclass
class Part:
    """What one process has seen of the rows: their places, pooled features by group, and labels.

    Args:
        places: (rows,).
        features: by group, (rows, d), float32.
        labels: (rows,) or (rows, labels), where each row has them; None otherwise.
        unlabelled: why there are none.
    """

    places: Tensor
    features: dict[str, Tensor]
    labels: Tensor | None = None
    unlabelled: str = ""

    def sorted(self) -> Self:
        """Return the rows in the order of their places, on the CPU."""
        return self.gathered(torch.device("cpu"), 1)

    def gathered(self, device: torch.device, ranks: int) -> Self:
        """Return the rows of all ranks in the order of their places, each once, on the CPU. Call it on all of them.

        Args:
            device: on which the ranks exchange tensors.
            ranks: how many there are.
        """
        names = list(self.features)
        labels, unlabelled = agreed(self.labels, self.unlabelled, ranks)
        columns = [part.flatten(1) for part in self.features.values()]
        merged = [
            _from_all(part, device, ranks) for part in (self.places, torch.cat(columns, 1), labels) if part is not None
        ]
        places, order = torch.unique(merged[0], sorted=True, return_inverse=True)
        first = torch.full((len(places),), len(order)).scatter_reduce_(0, order, torch.arange(len(order)), "amin")
        widths = [column.shape[1] for column in columns]
        features = {
            name: part.contiguous() for name, part in zip(names, torch.split(merged[1][first], widths, 1), strict=True)
        }
        return type(self)(places, features, merged[2][first] if labels is not None else None, unlabelled)


def _from_all(tensor: Tensor, device: torch.device, ranks: int) -> Tensor:
    """Return the rows of all ranks, one rank after the other, on the CPU."""
    if ranks == 1:
        return tensor.cpu()
    counts = torch.zeros(ranks, dtype=torch.long, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(tensor)], device=device))
    most = int(counts.max())
    padded = tensor.new_zeros((most, *tensor.shape[1:]), device=device)
    padded[: len(tensor)] = tensor.to(device)
    found = padded.new_empty((ranks * most, *tensor.shape[1:]))
    dist.all_gather_into_tensor(found, padded)
    return torch.cat(
        [part[:count] for part, count in zip(torch.split(found, most), counts.tolist(), strict=True)]
    ).cpu()


def read_rows(
    model: nn.Module,
    groups: LayerGroups,
    source: Source,
    *,
    pooling: Pooling,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Part:
    """Return what this rank's share of the rows looks like in the model, by one forward pass in eval mode.

    All ranks do equally many forwards, which a sharded model needs; what is filled up is left out. Random states and
    the mode of every module are as before. What is drawn at random while rows are loaded is the same in each pass.

    Args:
        model: the model without a wrapper.
        groups: its groups.
        source: the rows.
        pooling: as in `Capture`.
        seed: of what is drawn at random.
        rank: number of this process, from 0.
        ranks: how many share the work.

    Raises:
        ValueError: a forward gives more or fewer vectors than rows, as of packed rows.
    """
    seen: list[Batch] = []
    labels: list[Tensor] = []
    reasons: list[str] = []

    def note(step: Step) -> None:
        label, why = labels_in(step.batch, source.label_names)
        labels.extend([] if label is None else [label])
        reasons.extend([why] if why else [])
        _check(seen, len(step.places))

    call = functools.partial(called, model, labels=False)  # features do not depend on them, and a loss may fail
    with Capture(model, groups, seen.append, pooling=pooling):
        places, kept = forwards(model, source, note, call=call, seed=seed, rank=rank, ranks=ranks)
    features = {name: torch.cat([batch.features[name] for batch in seen]).cpu()[kept] for name in _common(seen)}
    reasons += [VARYING] if len({label.shape[1:] for label in labels}) > 1 else []
    unlabelled = reasons[0] if reasons else ""
    return Part(places[kept], features, None if unlabelled else torch.cat(labels).cpu()[kept], unlabelled)


def _check(seen: list[Batch], rows: int) -> None:
    """Raise if the last forward did not give a vector a row; forget its inputs."""
    if not seen or not seen[-1].features:
        raise ValueError(
            "no layer group of the model gave a vector a row: its forward takes no tensor with rows, or calls none of "
            "the groups' modules. Print group_layers(model), and give groups whose modules are called."
        )
    seen[-1] = Batch(seen[-1].features, {})
    wrong = {name: len(features) for name, features in seen[-1].features.items() if len(features) != rows}
    if wrong:
        name = next(iter(wrong))
        raise ValueError(
            f"{rows} rows gave {wrong[name]} vectors in group `{name}`: the rows hold several samples each (packed). "
            "Expected a probe set with one sample a row. Leave packing out for it."
        )


def _common(seen: Sequence[Batch]) -> list[str]:
    """Return the groups that were read in every forward with one width, bottom to top."""
    first = seen[0].features
    return [
        name
        for name, features in first.items()
        if all(name in b.features and b.features[name].shape[1] == features.shape[1] for b in seen)
    ]


@dataclass
class Listener:
    """Keeps what the Trainer's own evaluation pass shows of the rows, without the copies that fill its last batches.

    The Trainer reads a data set from its beginning to its end, and rank r of W takes the batches r, r + W, and so on;
    so the place of a row follows from the number of the forward. Whether that held is checked at the end.

    Args:
        rows: of the data set.
        places: those that are kept, ascending.
        rank: number of this process.
        ranks: how many share the data set.
    """

    rows: int
    places: Tensor
    rank: int = 0
    ranks: int = 1
    _seen: list[Batch] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)
    _kept: list[Tensor] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """Take the next forward's features, if it is the Trainer's."""
        if is_own_pass():
            return
        size = len(next(iter(batch.features.values()), ()))
        start = (len(self._sizes) * self.ranks + self.rank) * (self._sizes[0] if self._sizes else size)
        places = torch.arange(start, start + size)
        wanted = torch.isin(places, self.places)
        self._sizes.append(size)
        self._kept.append(places[wanted])
        whole = bool(wanted.all())
        features = {n: f if whole else f[wanted.to(f.device)] for n, f in batch.features.items()}
        self._seen.append(Batch(features, {}))

    def part(self) -> Part | None:
        """Return what was kept; None where the forwards were not those of one pass over the rows."""
        if not self._sizes or not self._sizes[0]:
            return None
        size, steps = self._sizes[0], len(self._sizes)
        even = all(other == size for other in self._sizes[: -1 if self.ranks == 1 else None])
        if (
            not even
            or steps != -(-self.rows // (size * self.ranks))
            or (self.ranks == 1 and sum(self._sizes) != self.rows)
        ):
            return None
        features = {name: torch.cat([batch.features[name] for batch in self._seen]) for name in _common(self._seen)}
        return Part(torch.cat(self._kept), features)
