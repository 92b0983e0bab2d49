"""A fixed set of rows, and a forward pass over one rank's share of them that leaves everything as it was."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tl_callbacks.fingerprints import base_model
from tl_callbacks.probing.targets import LABELS
from tl_callbacks.reading.quiet import evaluating, random_states_kept

_OWN = ContextVar("a pass of our own", default=False)


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
    label_names: Sequence[str] = LABELS
    drop_columns: bool = True
    workers: int = 0
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class Step(NamedTuple):
    """One forward: the rows, which of them are no filling, the batch as the collator made it, and the output."""

    places: Tensor
    kept: Tensor
    batch: Any
    output: Any


def chosen_places(dataset: Any, most: int, seed: int) -> Tensor:
    """Return the rows that are read, ascending: all, or as many of them, drawn at random, as may be kept.

    Raises:
        TypeError: the data set has no length or no rows by number.
        ValueError: it has no rows.

    Example:
        >>> chosen_places(["a", "b", "c"], 2, seed=0).shape
        torch.Size([2])
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(dataset, Mapping):
        raise TypeError(
            f"a probe set is read again and again in the same order; expected a data set with a length and rows by "
            f"number, got {type(dataset).__name__}. Give one split, not a stream or several splits."
        )
    if not len(dataset):
        raise ValueError("the probe set has no rows; expected some to measure. Check how it was split or filtered.")
    if len(dataset) <= most:
        return torch.arange(len(dataset))
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:most].sort().values


@torch.no_grad()
def forwards(
    model: nn.Module,
    source: Source,
    take: Callable[[Step], None],
    *,
    call: Callable[[Any], Any] | None = None,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Call the model in eval mode with this rank's share of the rows, and `take` after each forward.

    All ranks do equally many forwards, which a sharded model needs; what fills them up is marked. Random states and
    the mode of every module are as before. What is drawn at random while rows are loaded is the same in each pass.

    Args:
        model: the model without a wrapper.
        source: the rows.
        take: called with each forward.
        call: calls the model with a batch on its device; None: `called`.
        seed: of what is drawn at random.
        rank: number of this process, from 0.
        ranks: how many share the work.

    Returns:
        The places of all rows that were read, and which of them are no filling.

    Example:
        >>> collate = lambda rows: {"input": torch.tensor(rows)}
        >>> source = Source([[1.0], [2.0], [3.0]], torch.arange(3), collate, batch_size=2)
        >>> forwards(nn.Linear(1, 1), source, lambda step: print(tuple(step.output.shape)), rank=1, ranks=2)
        (2, 1)
        (tensor([1, 2]), tensor([ True, False]))
    """
    share = -(-len(source.places) // ranks)
    padded = source.places[torch.arange(share * ranks).clamp(max=len(source.places) - 1)]
    mine = padded[rank::ranks]
    kept = torch.arange(rank, share * ranks, ranks) < len(source.places)
    call = functools.partial(called, model) if call is None else call
    loader = DataLoader(
        _Rows(source, takes(model)), source.batch_size, sampler=mine.tolist(), collate_fn=source.collate,
        num_workers=source.workers, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with random_states_kept(device, seed), evaluating(model), _own_pass():
        for start, batch in zip(range(0, share, source.batch_size), loader, strict=True):
            chosen = slice(start, start + source.batch_size)
            with source.context():
                output = call(send_to_device(batch, device))
            take(Step(mine[chosen], kept[chosen], batch, output))
    return mine, kept


def is_own_pass() -> bool:
    """Return whether the forward that is going on is one of `forwards`, and none of the Trainer's.

    Example:
        >>> is_own_pass()
        False
    """
    return _OWN.get()


@contextmanager
def _own_pass() -> Iterator[None]:
    token = _OWN.set(True)
    try:
        yield
    finally:
        _OWN.reset(token)


class _Rows(Dataset[Any]):
    def __init__(self, source: Source, takes: Mapping[str, inspect.Parameter]) -> None:
        self.rows = source.dataset
        self.names = {*takes, *source.label_names, *LABELS} if source.drop_columns else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        row = self.rows[place]
        if self.names is None or not isinstance(row, Mapping):
            return row
        return {key: value for key, value in row.items() if key in self.names}


def called(model: nn.Module, batch: Any, *, labels: bool = True) -> Any:
    """Return what the model gives for what it takes of a batch.

    Args:
        model: the model.
        batch: as a collator makes it, on the model's device.
        labels: whether it is given labels too, where its forward names them; else only those that it cannot do
            without: labels of tokens, from which a decoder makes its input, and a required argument.

    Example:
        >>> called(nn.Linear(1, 1), {"input": torch.zeros(3, 1), "labels": torch.zeros(3)}).shape
        torch.Size([3, 1])
    """
    if not isinstance(batch, Mapping):
        return model(batch[0] if isinstance(batch, tuple | list) else batch)
    names = takes(model)
    every = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def stays(key: str, value: Any) -> bool:
        if key not in LABELS:
            return key in names or every
        if key not in names or labels:
            return key in names
        sequence = decodes and isinstance(value, Tensor) and value.ndim == 2
        return sequence or names[key].default is inspect.Parameter.empty

    return model(**{key: value for key, value in batch.items() if stays(key, value)})


def takes(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return what the forward of a model takes by name, below the wrappers of PEFT and `torch.compile`.

    Example:
        >>> list(takes(nn.Linear(1, 1)))
        ['input']
    """
    base = base_model(getattr(model, "_orig_mod", model))
    return inspect.signature(getattr(base, "_orig_mod", base).forward).parameters
