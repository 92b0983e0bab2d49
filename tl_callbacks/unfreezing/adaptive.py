"""The rule that reads a run's own record: a group opens when what the record watches has stopped improving.

A pure function of the history, as the other schedules are of the step: the same history gives the same openings on
every rank, in a resumed run and when asked again. Plain Python.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

Order = Literal["top_down", "relative_gradient_norm"]
History = Sequence[Mapping[str, Any]]
Level = Sequence[str]
Values = tuple[tuple[int, float], ...]

GRADIENT = "tl/relative_gradient/"
"""Prefix of the keys under which the relative gradient norms of frozen groups are logged."""


class Opening(NamedTuple):
    """One opening: at `step` the groups `groups`, for `reason`; steps after the present one are the latest possible."""

    step: int
    groups: tuple[str, ...]
    reason: dict[str, Any]
    measured: tuple[int, ...] = ()  # steps whose gradients decide which group it is


@dataclass(frozen=True)
class ProbeSchedule:
    """When groups open, decided by what evaluations logged; made by `schedule_from_probes`.

    Args:
        metric: key in `log_history` that is watched.
        patience: evaluations without improvement after which a group opens.
        threshold: improvement that counts, as a share of the best value so far.
        order: which group opens next.
        max_wait: opening number n comes at the latest at step n * `max_wait` (a whole number), or, of N openings, after
            the fraction n / N * `max_wait` of training.
        measured_steps: optimizer steps over which the relative gradient norms are averaged.
        greater_is_better: direction of the metric; None: lower is better if its name ends in `loss`.

    Example:
        >>> schedule = ProbeSchedule("eval_loss", max_wait=50)
        >>> history = [{"eval_loss": loss, "step": step} for step, loss in ((10, 1.0), (20, 0.8), (30, 0.8))]
        >>> [(o.step, o.groups) for o in schedule.openings([["head"], ["high"], ["low"]], history=history, step=30)]
        [(30, ('high',)), (100, ('low',))]
    """

    metric: str
    patience: int = 1
    threshold: float = 0.01
    order: Order = "top_down"
    max_wait: float = 0.5
    measured_steps: int = 1
    greater_is_better: bool | None = None

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ValueError(f"`order` is {self.order!r}; expected one of {', '.join(get_args(Order))}.")
        for name in ("patience", "measured_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; expected a whole number from 1.")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"`threshold` is {self.threshold}; expected a share of the best value, in [0, 1).")
        whole = isinstance(self.max_wait, int) and not isinstance(self.max_wait, bool)
        if not (self.max_wait >= 1 if whole else isinstance(self.max_wait, float) and 0 < self.max_wait < 1):
            raise ValueError(
                f"`max_wait` is {self.max_wait!r}; expected the steps between two openings at the most, a whole number "
                "from 1, or the fraction of training after which everything is open, in (0, 1)."
            )
        if not self.metric or self.metric == "step":
            raise ValueError(f"`metric` is {self.metric!r}; expected a key that evaluations log, such as `eval_loss`.")

    def __repr__(self) -> str:
        own = {"patience": 1, "threshold": 0.01, "measured_steps": 1, "greater_is_better": None}
        told = [f"{name}={getattr(self, name)!r}" for name, usual in own.items() if getattr(self, name) != usual]
        return ", ".join([f"schedule_from_probes({self.metric!r}", f"order={self.order!r}", *told]) + (
            f", max_wait={self.max_wait})"
        )

    @property
    def unit(self) -> Literal["steps", "fractions"]:
        """What `max_wait` counts."""
        return "steps" if isinstance(self.max_wait, int) else "fractions"

    @property
    def lower_is_better(self) -> bool:
        """The direction of the metric."""
        return self.metric.endswith("loss") if self.greater_is_better is None else not self.greater_is_better

    @property
    def ranks_groups(self) -> bool:
        """Whether the order of the groups is measured."""
        return self.order != "top_down"

    def latest(self, number: int, openings: int, max_steps: int | None) -> int:
        """Return the step at which opening `number` (from 1) of `openings` comes at the latest.

        Raises:
            ValueError: `max_wait` is a fraction and `max_steps` is missing, or too short for what is to be measured.
        """
        if isinstance(self.max_wait, int):
            spacing, step = float(self.max_wait), number * self.max_wait
        elif not max_steps:
            raise ValueError(f"`max_steps` is {max_steps}, but {self!r} counts fractions; pass the training's length.")
        else:
            spacing = self.max_wait * max_steps / openings
            step = math.ceil(round(number * spacing, 6))
        if self.ranks_groups and openings > 1 and spacing < self.measured_steps:
            raise ValueError(
                f"{self!r} leaves {spacing:.3g} steps for each of {openings} openings, fewer than the "
                f"{self.measured_steps} whose gradients it measures. Raise max_wait or lower measured_steps."
            )
        return step

    def openings(
        self, levels: Sequence[Level], *, history: History = (), step: int = 0, max_steps: int | None = None
    ) -> list[Opening]:
        """Return the openings of the levels below the top: those decided by step `step`, then the latest possible.

        Args:
            levels: group names by level, top to bottom; the first is open from step 0.
            history: `log_history` up to the present.
            step: optimizer steps done.
            max_steps: optimizer steps of the training; needed for a `max_wait` in fractions.

        Returns:
            One entry a level, by ascending step.

        Raises:
            ValueError: see `latest`.
        """
        values, norms = self.values(history), gradient_norms(history)
        waiting, opened, result = list(levels[1:]), 0, []
        for number in range(1, len(levels)):
            steps = self.measured_steps if self.ranks_groups and len(waiting) > 1 else 0
            due = max(opened, self.latest(number, len(levels) - 1, max_steps) - steps)
            stage = self._stage(values, opened, due)
            stalled = self._plateau(stage)
            due = due if stalled is None else stage[stalled][0]
            looked = stage if stalled is None else stage[: stalled + 1]
            reason: dict[str, Any] = {
                "rule": "latest" if stalled is None else "plateau",
                "metric": self.metric,
                "values": [list(pair) for pair in looked],
            }
            measured = tuple(range(due, due + steps))
            opened = due + steps
            level = waiting[0]
            if steps and opened <= step:
                ratios = mean_norms([name for one in waiting for name in one], norms, measured)
                reason["relative_gradient_norm"] = ratios
                if ratios is not None:
                    level = max(waiting, key=lambda names: sum(ratios[name] for name in names) / len(names))
            waiting.remove(level)
            result.append(Opening(opened, tuple(level), reason, measured))
        return result

    def values(self, history: History) -> Values:
        """Return (step, value) of each evaluation that logged the metric; of several at one step the first counts."""
        found: dict[int, float] = {}
        for entry in history:
            if self.metric in entry:
                found.setdefault(int(entry["step"]), float(entry[self.metric]))
        return tuple(sorted(found.items()))

    def _stage(self, values: Values, opened: int, until: int) -> Values:
        """Return what counts since an opening: the last value before it, and those after it."""
        return values_until(values, opened)[-1:] + tuple(pair for pair in values if opened < pair[0] <= until)

    def _plateau(self, stage: Values) -> int | None:
        """Return the place of the value at which improvements have stopped, None if they have not."""
        best, stalled = math.inf, 0
        for place, (_, value) in enumerate(stage):
            loss = value if self.lower_is_better else -value
            if place == 0 or loss < best - self.threshold * abs(best):
                best, stalled = loss, 0
            else:
                stalled += 1
            if stalled == self.patience:
                return place
        return None


def values_until(values: Values, step: int) -> Values:
    """Return the values of the steps up to and with `step`."""
    return tuple(pair for pair in values if pair[0] <= step)


def gradient_norms(history: History) -> dict[int, dict[str, float]]:
    """Return the relative gradient norms that a history holds, by step and group."""
    found: dict[int, dict[str, float]] = {}
    for entry in history:
        logged = dict(_measured(entry))
        if logged:
            found.setdefault(int(entry["step"]), {}).update(logged)
    return found


def mean_norms(
    groups: Sequence[str], norms: Mapping[int, Mapping[str, float]], steps: Collection[int]
) -> dict[str, float] | None:
    """Return each group's mean over the steps at which all were measured, None where there was none."""
    whole = [norms[step] for step in steps if all(name in norms.get(step, {}) for name in groups)]
    return {name: sum(one[name] for one in whole) / len(whole) for name in groups} if whole else None


def _measured(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    return ((key.removeprefix(GRADIENT), float(value)) for key, value in entry.items() if key.startswith(GRADIENT))


def schedule_from_probes(
    metric: str = "eval_loss",
    *,
    patience: int = 1,
    threshold: float = 0.01,
    order: Order = "top_down",
    max_wait: float = 0.5,
    measured_steps: int = 1,
    greater_is_better: bool | None = None,
) -> ProbeSchedule:
    """Return a schedule for `GradualUnfreezing` that opens the next group when `metric` has stopped improving.

    After each opening the values that evaluations log are watched, from the last one before it on: one counts as an
    improvement if it is better than the best by more than `threshold` times that; after `patience` in a row that do
    not, the next group opens at the step of the last. Whatever they say, opening number n comes at the latest where
    `every(max_wait)`, or `at_fractions` with equal distances up to `max_wait`, would have it.

    With `order="relative_gradient_norm"` the group that opens is the frozen one of the largest ||gradient|| /
    ||weights||, as Auto-RGN weighs layers by; it is measured in the steps right after the decision, of each whole
    optimizer step before clipping, and logged as `tl/relative_gradient/<group>`. Those steps go backward through all
    groups; they change no frozen weight and no other gradient. What was looked at stands in the event of the opening.

    Args:
        metric: a key of `log_history`: `eval_<metric>` of the Trainer's evaluations, or what a callback logs at each,
            such as `tl/probe/<group>`.
        patience: evaluations without improvement, at least 1.
        threshold: share of the best value, in [0, 1).
        order: `top_down`, or `relative_gradient_norm`.
        max_wait: optimizer steps for each opening at the most (a whole number), or the fraction of training, in (0, 1),
            after which everything is open.
        measured_steps: optimizer steps over which the relative gradient norms are averaged, at least 1.
        greater_is_better: direction of the metric; None: lower is better if its name ends in `loss`.

    Raises:
        ValueError: a number is out of range, or `order` is unknown.

    Example:
        >>> schedule_from_probes("eval_accuracy", patience=2, max_wait=0.6)
        schedule_from_probes('eval_accuracy', order='top_down', patience=2, max_wait=0.6)

    References:
        Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", ICLR 2023 (Auto-RGN).
        https://arxiv.org/abs/2210.11466
    """
    return ProbeSchedule(metric, patience, threshold, order, max_wait, measured_steps, greater_is_better)
