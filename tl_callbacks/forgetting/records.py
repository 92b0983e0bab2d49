"""What a training records of what was lost: the numbers that it logs, and the facts of `recipe.json`."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tl_callbacks.forgetting.readings import Change


class Measured(NamedTuple):
    """What was measured at a step.

    Attributes:
        step: at which it was measured.
        weights_of: the step that the weights are of, where the best ones were loaded at the end.
        changes: what became of each value.
        retention: the smallest of all.
    """

    step: int
    weights_of: int
    changes: Mapping[str, Change]
    retention: float


def smallest(changes: Mapping[str, Change], names: Iterable[str]) -> float:
    """Return the smallest retention; nan where one is no number, as of a broken model, or where there is none.

    Args:
        changes: what became of each value.
        names: of the values that have a retention in the pretrained model.

    Example:
        >>> half, broken = Change(0.4, 0.4, 0.1, 0.5), Change(math.nan, math.nan, math.nan, math.nan)
        >>> smallest({"a": half, "b": broken}, ["a"]), smallest({"a": half, "b": broken}, ["a", "b"])
        (0.5, nan)
    """
    found = [changes[name].retention for name in names]
    return math.nan if any(map(math.isnan, found)) else min(found, default=math.nan)


def logs(measured: Measured) -> dict[str, float]:
    """Return what is logged of a measurement, by key; without what is no number."""
    found = {"tl/retention": measured.retention}
    for name, change in measured.changes.items():
        found |= {f"tl/forgetting/{name}": change.forgetting, f"tl/forgetting/{name}_se": change.error}
        found[f"tl/retention/{name}"] = change.retention
    return {key: value for key, value in found.items() if math.isfinite(value)}


def retention_key(metrics: Mapping[str, Any]) -> str:
    """Return under which name an evaluation's metrics hold the retention: `eval_retention`, of other prefixes theirs.

    Several evaluation sets have one retention, so that it can be the metric for the best model.

    Args:
        metrics: of the Trainer's evaluation, which has added how long it took.

    Example:
        >>> retention_key({"eval_news_loss": 0.5, "eval_news_runtime": 1.0}), retention_key({"test_runtime": 1.0})
        ('eval_retention', 'test_retention')
    """
    ends = [key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")]
    prefix = min(ends, key=len, default="eval")
    return "eval_retention" if prefix.startswith("eval_") else f"{prefix}_retention"


def row(text: str, before: float | None, change: Change | None) -> dict[str, Any]:
    """Return a value's facts; null where it was not measured or is no number, of a divergence's base 0.

    Args:
        text: what it is.
        before: of the pretrained model; None: it is a divergence, or was not measured.
        change: what became of it; None: it was not measured.

    Example:
        >>> row("accuracy", 0.5, None)
        {'measures': 'accuracy', 'before': 0.5, 'after': None, 'retention': None}
    """
    found: dict[str, Any] = {"measures": text, "before": before, "after": None, "retention": None}
    if change is None:
        return found
    found |= {"before": 0.0 if before is None else before, "after": number(change.value)}
    found |= {"retention": number(change.retention), "forgetting": number(change.forgetting)}
    return {**found, "standard_error": number(change.error)}


def number(value: float) -> float | None:
    """Return a value as JSON can hold it, null where it is no number.

    Example:
        >>> number(1.0), number(math.nan)
        (1.0, None)
    """
    return value if math.isfinite(value) else None
