"""Whether the Trainer's own evaluation pass shows the rows of a probe set, and a place around each evaluation."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch.utils.data import SequentialSampler
from transformers import Trainer

from tl_callbacks.probing.rows import Source, chosen_places

Collate = Callable[[list[Any]], Any]

_GUARD = "_tl_around_evaluation"


def around_evaluation(trainer: Trainer, around: Callable[[Any], AbstractContextManager[None]]) -> None:
    """Let each `trainer.evaluate()` of one data set run inside `around(dataset)`.

    Args:
        trainer: the Trainer. Wrapped once; later calls add to what it enters.
        around: makes the context of a data set, as the user gave it.
    """
    entered = getattr(trainer, _GUARD, None)
    if entered is not None:
        if around not in entered:
            entered.append(around)
        return
    entered = [around]
    setattr(trainer, _GUARD, entered)
    evaluate = trainer.evaluate

    @functools.wraps(evaluate)
    def guarded(eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        dataset = resolved(trainer, eval_dataset)
        run: Callable[[], Any] = lambda: evaluate(eval_dataset, *args, **kwargs)  # noqa: E731
        if isinstance(dataset, dict):
            return run()  # which evaluates each of them by a call of its own
        for context in entered:
            run = functools.partial(_inside, context, dataset, run)
        return run()

    trainer.evaluate = guarded  # type: ignore[method-assign]


def _inside(context: Callable[[Any], AbstractContextManager[None]], dataset: Any, run: Callable[[], Any]) -> Any:
    with context(dataset):
        return run()


def resolved(trainer: Trainer, dataset: Any) -> Any:
    """Return the data set that the Trainer understands: its own one, one of its own by name, or the given one.

    Raises:
        ValueError: there is none of that name.
    """
    own = trainer.eval_dataset
    if dataset is None:
        return own
    if not isinstance(dataset, str):
        return dataset
    if isinstance(own, Mapping) and dataset in own:
        return own[dataset]
    if dataset == "eval" and own is not None and not isinstance(own, dict):
        return own
    names = [f"`{name}`" for name in own] if isinstance(own, Mapping) else ["the only one is called `eval`"]
    names = ["it has none"] if own is None else names
    raise ValueError(
        f"`{dataset}` is none of the Trainer's evaluation sets ({', '.join(names)}). "
        "Give the data set itself, or the name of one in eval_dataset."
    )


def source_of(trainer: Trainer, dataset: Any, most: int, seed: int, *, collate: Collate | None = None) -> Source:
    """Return how the Trainer makes batches of a data set's rows, of at most so many.

    Args:
        trainer: the Trainer.
        dataset: with a length and rows by number.
        most: rows.
        seed: of which rows are drawn.
        collate: makes a batch of rows, which then keep all columns; None: the Trainer's collator.

    Raises:
        TypeError: the data set has no length or no rows by number.
    """
    args = trainer.args
    return Source(
        dataset=dataset,
        places=chosen_places(dataset, most, seed),
        collate=trainer.data_collator if collate is None else collate,
        batch_size=args.per_device_eval_batch_size,
        label_names=(*(trainer.label_names or ()), "labels", "label", "label_ids"),
        drop_columns=args.remove_unused_columns and collate is None,
        workers=args.dataloader_num_workers,
        context=trainer.accelerator.autocast,
    )


def is_evaluated(trainer: Trainer, dataset: Any) -> bool:
    """Return whether a data set is the Trainer's `eval_dataset` or one of them."""
    own = trainer.eval_dataset
    return own is not None and any(one is dataset for one in (own.values() if isinstance(own, dict) else (own,)))


def why_not_listen(trainer: Trainer, dataset: Any) -> str | None:
    """Return why the Trainer's own pass over a data set does not show what probes need; None where it does."""
    args, dataloaders = trainer.args, trainer.accelerator.dataloader_config
    smoothed = trainer.label_smoother is not None and getattr(
        getattr(trainer.model, "config", None), "is_encoder_decoder", False
    )
    reasons = {
        "it is no evaluation set of the Trainer": not is_evaluated(trainer, dataset),
        "torch.compile passes hooks by": args.torch_compile,
        "it generates": bool(getattr(args, "predict_with_generate", False)),
        "it reads rows by length": args.train_sampling_strategy == "group_by_length",
        "dataloader_drop_last leaves rows out": args.dataloader_drop_last,
        "DataParallel copies the model": args.n_gpu > 1,
        "the batches are split or sent by the first rank": bool(
            dataloaders.split_batches or dataloaders.dispatch_batches
        ),
        "the collator masks at random": bool(getattr(trainer.data_collator, "mlm", False)),
        "label smoothing takes the labels from the decoder": smoothed,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def read_in_order(trainer: Trainer) -> bool:
    """Return whether the evaluation that has just ended read its rows from the first to the last."""
    loader: Any = trainer.callback_handler.eval_dataloader
    batches = getattr(loader, "batch_sampler", None)
    while batches is not None and hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return isinstance(getattr(batches, "sampler", None), SequentialSampler)
