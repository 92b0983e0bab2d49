"""Facts that a run records in `TrainerState.log_history`, which the Trainer saves and restores.

Separate because every method writes them and nothing here needs torch.
"""

from collections.abc import Iterable
from typing import Any

KEY = "tl/event"


def emit(log_history: list[dict[str, Any]], kind: str, *, step: int, **facts: Any) -> None:
    """Append one event to `log_history`.

    Events carry no wall time, so that a resumed run writes the same history as a straight one.

    Args:
        log_history: `TrainerState.log_history`.
        kind: what happened, such as `"opening"`.
        step: optimizer steps done when it happened.
        facts: JSON values.

    Example:
        >>> history = []
        >>> emit(history, "opening", step=4, groups=["layer.1"])
        >>> history
        [{'tl/event': 'opening', 'step': 4, 'groups': ['layer.1']}]
    """
    log_history.append({KEY: kind, "step": step, **facts})


def read(log_history: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind, in order, without the marker key.

    Args:
        log_history: `TrainerState.log_history`, or the same list read from `trainer_state.json`.
        kind: the kind given to `emit`.

    Returns:
        A list of dicts with `step` and the facts.

    Example:
        >>> read([{"loss": 1.0, "step": 4}, {"tl/event": "opening", "step": 4}], "opening")
        [{'step': 4}]
    """
    return [
        {key: value for key, value in entry.items() if key != KEY} for entry in log_history if entry.get(KEY) == kind
    ]
