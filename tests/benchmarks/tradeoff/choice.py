"""What a way of fine-tuning is, and which of its strengths counts."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scipy import stats
from torch import nn

WITHIN = 0.01
PLAIN = "none"
Results = dict[str, dict[float, list[dict[str, float]]]]
"""By way and strength, for each seed, what a run came to: `dev ...` and `test ...`."""


@dataclass(frozen=True)
class Way:
    """One way of fine-tuning: the strengths that are tried, and what it adds to a run at a strength."""

    strengths: tuple[float, ...]
    callbacks: Callable[[Any], list[Any]] = lambda run: []
    arguments: Callable[[Any], dict[str, Any]] = lambda run: {}
    adapted: Callable[[Any], nn.Module] = lambda run: run.model


def chosen(tried: dict[float, list[dict[str, float]]], least: float) -> float:
    """Return the strength that retains most among those of at least that target accuracy, else the most accurate."""
    near = [strength for strength, runs in tried.items() if _mean(runs, "dev target") >= least]
    if near:
        return max(near, key=lambda strength: _mean(tried[strength], "dev retention"))
    return max(tried, key=lambda strength: _mean(tried[strength], "dev target"))


def by_way(results: Results) -> dict[str, Any]:
    """Return by way the chosen strength, and over the seeds mean, deviation and interval of what the test rows say."""
    (plain,) = results[PLAIN].values()
    least = _mean(plain, "dev target") - WITHIN
    found: dict[str, Any] = {}
    for name, tried in results.items():
        strength = chosen(tried, least)
        runs = tried[strength]
        keys = [key for key in runs[0] if key.startswith("test ")]
        found[name] = {
            "strength": strength,
            **{key.removeprefix("test "): summary([one[key] for one in runs]) for key in keys},
            "target less none's": summary(
                [one["test target"] - none["test target"] for one, none in zip(runs, plain, strict=True)]
            ),
            "every strength, mean": {
                str(s): {key: round(_mean(runs, key), 4) for key in ("dev target", "dev retention", *keys)}
                for s, runs in tried.items()
            },
        }
    return found


def summary(values: list[float]) -> dict[str, Any]:
    """The mean, the standard deviation, and the 95 % interval of the mean by Student's t."""
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    middle = statistics.fmean(values)
    return {
        "mean": round(middle, 4), "sd": round(statistics.stdev(values), 4),
        "interval": [round(middle - half, 4), round(middle + half, 4)], "seeds": [round(value, 4) for value in values],
    }  # fmt: skip


def _mean(runs: list[dict[str, float]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)
