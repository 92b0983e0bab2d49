"""Forward passes over a fixed set of rows: our own one, and what is kept of the Trainer's."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tl_callbacks.fingerprints import base_model
from tl_callbacks.groups import LayerGroups
from tl_callbacks.probing.capture import Batch, Capture
from tl_callbacks.reading.pooling import Pooling
from tl_callbacks.reading.quiet import evaluating, random_states_kept

_LABELS = ("labels", "label", "label_ids")


@dataclass(frozen=True)
class Source:
    """Rows of a data set and how they become batches.

    Args:
        dataset: with a length and rows by number, in the form that the collator takes.
        places: the rows that are read, ascending.
        collate: makes a batch of rows.
        batch_size: rows a process takes at a time.
        label_names: keys of a batch that may hold the labels, the first one found counts.
        drop_columns: whether columns that the model does not take are dropped, as the Trainer does.
        workers: processes that load rows.
        context: entered around each forward, as for mixed precision.
    """

    dataset: Any
    places: Tensor
    collate: Callable[[list[Any]], Any]
    batch_size: int
    label_names: Sequence[str] = _LABELS
    drop_columns: bool = True
    workers: int = 0
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Part:
    """What one process has seen of the rows: their places, pooled features by group, and labels.

    Args:
        places: (rows,).
        features: by group, (rows, d), float32.
        labels: (rows,), where each row has one; None otherwise.
    """

    places: Tensor
    features: dict[str, Tensor]
    labels: Tensor | None = None

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
        columns = [part.flatten(1) for part in self.features.values()]
        merged = [
            _from_all(part, device, ranks)
            for part in (self.places, torch.cat(columns, 1), self.labels)
            if part is not None
        ]
        places, order = torch.unique(merged[0], sorted=True, return_inverse=True)
        first = torch.full((len(places),), len(order)).scatter_reduce_(0, order, torch.arange(len(order)), "amin")
        widths = [column.shape[1] for column in columns]
        features = {
            name: part.contiguous() for name, part in zip(names, torch.split(merged[1][first], widths, 1), strict=True)
        }
        return type(self)(places, features, merged[2][first] if self.labels is not None else None)


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


def chosen_places(dataset: Any, most: int, seed: int) -> Tensor:
    """Return the rows that are read, ascending: all, or as many of them, drawn at random, as may be kept.

    Raises:
        TypeError: the data set has no length or no rows by number.

    Example:
        >>> chosen_places(["a", "b", "c"], 2, seed=0).shape
        torch.Size([2])
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(dataset, Mapping):
        raise TypeError(
            f"a probe set is read again and again in the same order; expected a data set with a length and rows by "
            f"number, got {type(dataset).__name__}. Give one split, not a stream or several splits."
        )
    if len(dataset) <= most:
        return torch.arange(len(dataset))
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:most].sort().values


@torch.no_grad()
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
    share = -(-len(source.places) // ranks)
    padded = source.places[torch.arange(share * ranks).clamp(max=len(source.places) - 1)]
    mine = padded[rank::ranks]
    seen: list[Batch] = []
    labels: list[Tensor] = []
    takes = inspect.signature(base_model(model).forward).parameters
    rows = _Rows(source, takes)
    loader = DataLoader(
        rows, source.batch_size, sampler=mine.tolist(), collate_fn=source.collate, num_workers=source.workers,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with random_states_kept(device, seed), evaluating(model), Capture(model, groups, seen.append, pooling=pooling):
        for start, batch in zip(range(0, share, source.batch_size), loader, strict=True):
            label = _label(batch, source.label_names)
            labels += [] if label is None else [label]
            batch = send_to_device(_accepted(batch, takes), device)
            with source.context():
                _ = model(**batch) if isinstance(batch, Mapping) else model(batch)
            _check(seen, len(mine[start : start + source.batch_size]))
    kept = torch.arange(rank, share * ranks, ranks) < len(source.places)
    features = {name: torch.cat([batch.features[name] for batch in seen]).cpu()[kept] for name in _common(seen)}
    known = torch.cat(labels).cpu()[kept] if labels and sum(map(len, labels)) == share else None
    return Part(mine[kept], features, known)


class _Rows(Dataset[Any]):
    def __init__(self, source: Source, takes: Mapping[str, Any]) -> None:
        self.rows = source.dataset
        self.names = {*takes, *source.label_names, *_LABELS} if source.drop_columns else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        row = self.rows[place]
        if self.names is None or not isinstance(row, Mapping):
            return row
        return {key: value for key, value in row.items() if key in self.names}


def _accepted(batch: Any, takes: Mapping[str, Any]) -> Any:
    """Return a batch without labels that the model does not name."""
    if not isinstance(batch, Mapping):
        return batch[0] if isinstance(batch, tuple | list) else batch
    every = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    return {key: value for key, value in batch.items() if key in takes or (every and key not in _LABELS)}


def _label(batch: Any, names: Sequence[str]) -> Tensor | None:
    """Return the labels of a batch if there is one number a row."""
    if not isinstance(batch, Mapping):
        return None
    found = (batch[name] for name in (*names, *_LABELS) if isinstance(batch.get(name), Tensor))
    value: Tensor | None = next(found, None)
    if value is None or value.ndim > 2 or (value.ndim == 2 and value.shape[1] != 1):
        return None
    return value.flatten()


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
        """Take the next forward's features."""
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
