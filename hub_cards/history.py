"""What `log_history` tells: phases, rates, curves, and what the methods measured."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Series = tuple[tuple[int, float], ...]  # (optimizer step, value)
Log = Sequence[Mapping[str, Any]]

_EVENT = "tl/event"
_BOOKKEEPING = ("runtime", "per_second", "epoch", "jit_compilation_time", "model_preparation_time")
_PREFIXES = ("eval_", "test_", "train_", "validation_")


@dataclass(frozen=True)
class Phase:
    """Optimizer steps `first_step` to `last_step` (not included), in which the same groups were open."""

    first_step: int
    last_step: int
    opened: tuple[str, ...]  # at its beginning
    open: tuple[str, ...]  # all that trained, bottom to top
    trainable_parameters: int


def phases(log: Log, names: Sequence[str], trainable: int, global_step: int) -> tuple[Phase, ...]:
    """Return what trained when, from the openings that were recorded; without any, one phase in which all trained.

    Example:
        >>> log = [{"tl/event": "opening", "step": 0, "groups": ["head"], "trainable_parameters": 3},
        ...        {"tl/event": "opening", "step": 4, "groups": ["layer.0"], "trainable_parameters": 9}]
        >>> [(phase.first_step, phase.last_step, phase.open) for phase in phases(log, ["layer.0", "head"], 9, 10)]
        [(0, 4, ('head',)), (4, 10, ('layer.0', 'head'))]
    """
    openings: dict[int, tuple[set[str], int]] = {}
    for entry in log:
        if entry.get(_EVENT) == "opening":
            opened, _ = openings.get(entry["step"], (set(), 0))
            openings[entry["step"]] = (opened | set(entry["groups"]), entry["trainable_parameters"])
    openings = openings or {0: (set(names), trainable)}
    steps, found, open_ = [*sorted(openings), global_step], [], set[str]()
    for first, last in itertools.pairwise(steps):
        opened, count = openings[first]
        open_ |= opened
        found.append(Phase(first, last, _ordered(opened, names), _ordered(open_, names), count))
    return tuple(found)


def rates(log: Log, names: Sequence[str]) -> dict[str, Series]:
    """Return each group's learning rate as the live optimizer had it, bottom to top."""
    found = _series(log, "tl/rate/")
    return {name: found[name] for name in _ordered(set(found), names)}


def curves(log: Log) -> dict[str, Series]:
    """Return the training loss, the gradient norm and every metric of the evaluations."""
    keys = dict.fromkeys(key for entry in log for key in entry if key in ("loss", "grad_norm") or _evaluates(key))
    found = {key: _collect(log, key) for key in keys}
    return {key: series for key, series in found.items() if series}


def measures(log: Log) -> dict[str, dict[str, Series]]:
    """Return what methods logged as `tl/<method>/<what>`, other than rates and openings.

    Without what was forgotten and kept, where that was measured once: `recipe.json` has it, with what it is.
    """
    found: dict[str, dict[str, Series]] = {}
    for key, series in _series(log, "tl/").items():
        method, _, what = key.partition("/")
        if what and method not in ("rate", "unfreezing"):
            found.setdefault(method, {})[what] = series
    return {
        method: series
        for method, series in found.items()
        if method not in ("forgetting", "retention") or any(len(points) > 1 for points in series.values())
    }


def last_evaluation(log: Log) -> dict[str, dict[str, float]]:
    """Return the metrics of the last evaluation, under the split's name `eval`; empty where there was none."""
    for entry in reversed(log):
        if found := {key: entry[key] for key in entry if _evaluates(key) and _is_number(entry[key])}:
            return {"eval": found}
    return {}


def metric_name(key: str) -> str:
    """Return a metric's name without the Trainer's prefix.

    Example:
        >>> metric_name("eval_accuracy")
        'accuracy'
    """
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def is_bookkeeping(key: str) -> bool:
    """Return whether a key of the results says how long it took, not how good it is."""
    return key.endswith(_BOOKKEEPING)


def _evaluates(key: str) -> bool:
    return key.startswith("eval_") and not is_bookkeeping(key)


def _series(log: Log, prefix: str) -> dict[str, Series]:
    keys = dict.fromkeys(key for entry in log for key in entry if key.startswith(prefix) and key != _EVENT)
    return {key.removeprefix(prefix): series for key in keys if (series := _collect(log, key))}


def _collect(log: Log, key: str) -> Series:
    return tuple((int(entry["step"]), float(entry[key])) for entry in log if key in entry and _is_number(entry[key]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ordered(names: set[str], order: Sequence[str]) -> tuple[str, ...]:
    known = [name for name in order if name in names]
    return (*known, *sorted(names - {*order}))
