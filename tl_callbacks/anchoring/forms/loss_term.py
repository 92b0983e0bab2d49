"""A term beside the Trainer's loss: where it enters, and what it is multiplied by to count once an optimizer step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils.operations import ignorant_find_batch_size
from torch import Tensor
from transformers import Trainer

from tl_callbacks.reading.calls import count_rows


class LossTerm:
    """Adds a term to the loss of each training micro-batch, in the Trainer's own `compute_loss`.

    The gradient of an optimizer step becomes that of the task's loss plus the term's mean over all rows of the step:
    of all micro-batches and ranks, however many rows each has, and whether the Trainer divides the loss by the number
    of micro-batches or not. Label smoothing, `compute_loss_func`, a `compute_loss` of a subclass and gradient scalers
    are covered; evaluation is not touched.

    Args:
        trainer: an attached trainer.
        prepare: called before a micro-batch's loss is computed.
        term: called after it with the share of the step's rows that the micro-batch holds; returns the mean of the
            term over the micro-batch's rows, or None where it is constant.
    """

    def __init__(self, trainer: Trainer, prepare: Callable[[], None], term: Callable[[float], Tensor | None]) -> None:
        self._trainer = trainer
        self._prepare = prepare
        self._term = term
        self._rows: int | None = None
        self._entered = False
        self._before: dict[str, Any] = {}  # what stood in for the methods before, if anything did
        self._ours: dict[str, Any] = {}

    def enter(self) -> None:
        """Stand in for the trainer's `get_batch_samples` and `compute_loss`."""
        trainer: Any = self._trainer
        get_batch_samples, compute_loss = trainer.get_batch_samples, trainer.compute_loss

        @functools.wraps(get_batch_samples)
        def counted(*args: Any, **kwargs: Any) -> Any:
            batches, items = get_batch_samples(*args, **kwargs)
            if self._entered:
                self._rows = self._of_all_ranks(sum(rows_of(batch) for batch in batches))
            return batches, items

        @functools.wraps(compute_loss)
        def with_term(model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any) -> Any:
            if not self._entered or not model.training:
                return compute_loss(model, inputs, return_outputs, *args, **kwargs)
            items = kwargs.get("num_items_in_batch", args[0] if args else None)
            rows = rows_of(inputs)
            self._prepare()
            result = compute_loss(model, inputs, return_outputs, *args, **kwargs)
            loss, outputs = result if return_outputs else (result, None)
            loss = self._with_term(loss, rows, counted=items is not None)
            return (loss, outputs) if return_outputs else loss

        self._ours = {"get_batch_samples": counted, "compute_loss": with_term}
        self._before = {name: vars(trainer)[name] for name in self._ours if name in vars(trainer)}
        vars(trainer).update(self._ours)
        self._entered = True

    def leave(self) -> None:
        """Give the trainer its own methods back. Safe to call twice.

        Where another has wrapped ours since, they stay below and only pass on.
        """
        self._entered = False
        own = vars(self._trainer)
        for name in [name for name, ours in self._ours.items() if own.get(name) is ours]:
            del own[name]
            if name in self._before:
                own[name] = self._before[name]

    def _with_term(self, loss: Tensor, rows: int, *, counted: bool) -> Tensor:
        assert self._rows is not None, "the Trainer gets the batches of a step before it computes their losses"
        share = rows / self._rows
        term = self._term(share)
        if term is None:
            return loss
        # What the Trainer and DDP will divide by: the micro-batches, unless the loss is scaled, and the ranks.
        factor = self._trainer.accelerator.num_processes * (1 if self._is_scaled(counted) else self._micro_batches())
        total: Tensor = loss + (term * share * factor).to(loss)
        return total

    def _is_scaled(self, counted: bool) -> bool:
        """Return whether the Trainer will leave the loss undivided, by its own rule."""
        trainer: Any = self._trainer
        if (said := getattr(trainer, "loss_is_scaled_for_ga", None)) is not None:
            return bool(said)
        return bool(trainer.model_accepts_loss_kwargs and counted) or trainer.compute_loss_func is not None

    def _micro_batches(self) -> int:
        return int(self._trainer.current_gradient_accumulation_steps)

    def _of_all_ranks(self, rows: int) -> int:
        if self._trainer.args.world_size == 1:
            return rows
        return int(self._trainer.accelerator.reduce(torch.tensor(rows, device=self._trainer.args.device), "sum"))


def rows_of(batch: Any) -> int:
    """Return the rows of a batch.

    Raises:
        ValueError: it holds no tensor with rows.

    Example:
        >>> rows_of({"input_ids": torch.zeros(4, 7), "labels": torch.zeros(4)})
        4
    """
    rows = count_rows(batch) if isinstance(batch, Mapping) else None
    rows = ignorant_find_batch_size(batch) if rows is None else rows
    if rows is None:
        raise ValueError(
            f"a training batch of type {type(batch).__name__} holds no tensor with rows, so the anchor's term cannot "
            "be averaged over them. Expected a mapping of tensors, as the Trainer's collators make."
        )
    return int(rows)
