"""The metric of the model as it is: the Trainer's own evaluation, of which nothing is logged and no callback hears."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import Trainer


class UnknownMetricError(ValueError):
    """An evaluation does not give the metric that was asked for."""


def evaluated(trainer: Trainer, dataset: Any) -> dict[str, float]:
    """Return what `trainer.evaluate()` measures of the model as it is, as the Trainer names it.

    It is the method of the trainer's class, with all that this sets (a Seq2SeqTrainer's arguments of `generate`).

    Args:
        trainer: the Trainer.
        dataset: a data set, the name of one in its `eval_dataset`, or None for that one.
    """
    with _unheard(trainer):
        return type(trainer).evaluate(trainer, dataset, metric_key_prefix=prefix(dataset))


def prefix(dataset: Any) -> str:
    """Return how the Trainer begins the names of a data set's metrics.

    Example:
        >>> prefix(None), prefix("dev")
        ('eval', 'eval_dev')
    """
    return f"eval_{dataset}" if isinstance(dataset, str) else "eval"


def names_of(metric: str, dataset: Any) -> list[str]:
    """Return the names that a metric may have in an evaluation, given with `eval_` and the data set's name or without.

    Example:
        >>> names_of("loss", "dev")
        ['eval_loss', 'eval_dev_loss']
    """
    plain = metric.removeprefix("eval_")
    return list(dict.fromkeys((f"eval_{plain}", f"{prefix(dataset)}_{plain}")))


def number(metrics: Mapping[str, float], metric: str, dataset: Any) -> float:
    """Return one metric of an evaluation.

    Args:
        metrics: as `evaluated` returns them.
        metric: its name, with `eval_` and the data set's name or without.
        dataset: as for `evaluated`.

    Raises:
        UnknownMetricError: there is none of this name.

    Example:
        >>> number({"eval_dev_loss": 0.5}, "loss", "dev")
        0.5
    """
    for name in names_of(metric, dataset):
        if name in metrics:
            return float(metrics[name])
    raise UnknownMetricError(
        f"the evaluation gives no `{names_of(metric, dataset)[0]}`; it gives {', '.join(metrics)}. Give one of them as "
        "`metric` of WeightInterpolation."
    )


@contextmanager
def _unheard(trainer: Trainer) -> Iterator[None]:
    """Let the trainer log nothing and call no callback."""
    handler, own = trainer.callback_handler, vars(trainer)
    callbacks, log = handler.callbacks, own.get("log")
    try:
        handler.callbacks = []
        own["log"] = lambda *args, **kwargs: None
        yield
    finally:
        handler.callbacks = callbacks
        if log is None:
            del own["log"]
        else:
            own["log"] = log
