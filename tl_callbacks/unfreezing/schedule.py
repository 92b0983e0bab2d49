"""The rule: how many groups are open at a step, counted from the top. Plain Python, a pure function of the step."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Unit = Literal["steps", "epochs", "fractions"]


class Stage(NamedTuple):
    """From `start` on, the top `groups` groups are open (None: all), at `factor` times their rates."""

    start: float
    groups: int | None
    factor: float = 1.0


@dataclass(frozen=True)
class UnfreezeSchedule:
    """When groups open, by step; made by `every`, `at_steps`, `at_fractions`, `per_epoch`, `staged`.

    The top group, the head, is open from step 0 in all of them.

    Args:
        unit: what `start` of the stages and `interval` count: optimizer steps, epochs, or fractions of training.
        stages: the changes, by ascending start; for a schedule with an `interval` empty.
        interval: distance of the openings, without end; None for a schedule of stages.
        per_interval: groups opened at each interval.

    Example:
        >>> every(200).open_groups(step=450)
        3
        >>> at_fractions([0.25, 0.5]).open_groups(step=50, max_steps=100)
        3
    """

    unit: Unit
    stages: tuple[Stage, ...] = ()
    interval: int | None = None
    per_interval: int = 1

    def __repr__(self) -> str:
        if self.interval is not None:
            return f"every({self.interval})" if self.unit == "steps" else f"per_epoch({self.per_interval})"
        if any(stage.factor != 1 or stage.groups != place + 2 for place, stage in enumerate(self.stages)):
            return f"staged({[tuple(stage) for stage in self.stages]})"
        return f"at_{self.unit}({[stage.start for stage in self.stages]})"

    def in_steps(
        self, num_groups: int, *, max_steps: int | None = None, steps_per_epoch: int | None = None
    ) -> tuple[Stage, ...]:
        """Return the stages with `start` in optimizer steps and `groups` as a number; the first one starts at step 0.

        Stages that start at the same step are one. A fraction is rounded up to the next whole step.

        Args:
            num_groups: number of groups that may open, the head included, at least 1.
            max_steps: optimizer steps of the training; needed for fractions.
            steps_per_epoch: optimizer steps of an epoch; needed for epochs.

        Returns:
            Stages by ascending start.

        Raises:
            ValueError: `max_steps` or `steps_per_epoch` is needed and missing.
        """
        stages = {0: Stage(0, 1)}
        for stage in self._all_stages(num_groups):
            start = self._to_steps(stage.start, max_steps, steps_per_epoch)
            groups = num_groups if stage.groups is None else min(stage.groups, num_groups)
            stages[start] = Stage(start, groups, stage.factor)
        result = [stages[0]]
        for stage in list(stages.values())[1:]:
            if (stage.groups, stage.factor) != (result[-1].groups, result[-1].factor):
                result.append(stage)
        return tuple(result)

    def open_groups(
        self,
        step: int,
        *,
        num_groups: int | None = None,
        max_steps: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> int:
        """Return how many groups, from the top and with the head, are open during the given optimizer step.

        Args:
            step: optimizer steps done, from 0.
            num_groups: number of groups that may open; None: as many as the schedule opens.
            max_steps: optimizer steps of the training; needed for fractions.
            steps_per_epoch: optimizer steps of an epoch; needed for epochs.

        Returns:
            A number from 1 to `num_groups`.

        Raises:
            ValueError: a length is needed and missing, or `num_groups` is needed for a stage that opens all.
        """
        if num_groups is None:
            if any(stage.groups is None for stage in self.stages):
                raise ValueError("`num_groups` is None, but a stage opens all groups; pass the number of groups.")
            # Enough for every opening up to this step; the schedule itself has no end.
            num_groups = 2 + step * self.per_interval + max([stage.groups or 0 for stage in self.stages], default=0)
        stages = self.in_steps(num_groups, max_steps=max_steps, steps_per_epoch=steps_per_epoch)
        return next(stage.groups or 1 for stage in reversed(stages) if stage.start <= step)

    def _all_stages(self, num_groups: int) -> Sequence[Stage]:
        if self.interval is None:
            return self.stages
        intervals = math.ceil((num_groups - 1) / self.per_interval)
        return [Stage(n * self.interval, 1 + n * self.per_interval) for n in range(1, intervals + 1)]

    def _to_steps(self, start: float, max_steps: int | None, steps_per_epoch: int | None) -> int:
        if self.unit == "steps":
            return int(start)
        length = max_steps if self.unit == "fractions" else steps_per_epoch
        if length is None or length <= 0:
            name = "max_steps" if self.unit == "fractions" else "steps_per_epoch"
            raise ValueError(
                f"`{name}` is {length}, but {self!r} counts {self.unit}; pass the length of the training, or use "
                "every(steps) or at_steps([...])."
            )
        return math.ceil(round(start * length, 6))  # the rounding undoes 0.1 * 30 = 3.0000000000000004


def every(steps: int) -> UnfreezeSchedule:
    """Return a schedule that opens one more group every `steps` optimizer steps, downwards from the head.

    Args:
        steps: optimizer steps between openings, at least 1.

    Raises:
        ValueError: `steps` is not a positive whole number.

    Example:
        >>> [every(10).open_groups(step) for step in (0, 9, 10, 20)]
        [1, 1, 2, 3]
    """
    return UnfreezeSchedule("steps", interval=_positive("steps", steps))


def per_epoch(n: int = 1) -> UnfreezeSchedule:
    """Return a schedule that opens `n` more groups at the start of each epoch after the first, as ULMFiT does with 1.

    Args:
        n: groups an epoch, at least 1.

    Raises:
        ValueError: `n` is not a positive whole number.

    Example:
        >>> per_epoch().open_groups(step=25, steps_per_epoch=10)
        3

    References:
        Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, section 3.3.
        https://arxiv.org/abs/1801.06146
    """
    return UnfreezeSchedule("epochs", interval=1, per_interval=_positive("n", n))


def at_steps(steps: Sequence[int]) -> UnfreezeSchedule:
    """Return a schedule that opens one more group at each of the given optimizer steps.

    Args:
        steps: optimizer steps, ascending, 0 or more; a step that stands twice opens two groups.

    Raises:
        ValueError: the steps are not whole numbers, negative or not ascending.

    Example:
        >>> [at_steps([5, 5, 8]).open_groups(step) for step in (0, 5, 8)]
        [1, 3, 4]
    """
    for step in steps:
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"step {step!r} is not a whole number; for shares of the training use at_fractions.")
    return _one_by_one("steps", steps)


def at_fractions(fractions: Sequence[float]) -> UnfreezeSchedule:
    """Return a schedule that opens one more group at each of the given fractions of training.

    Args:
        fractions: fractions of `max_steps`, ascending, in [0, 1); rounded up to whole steps.

    Raises:
        ValueError: a fraction is outside [0, 1), or they are not ascending.

    Example:
        >>> at_fractions([0.1, 0.5]).open_groups(step=50, max_steps=100)
        3
    """
    return _one_by_one("fractions", fractions)


def staged(stages: Sequence[Sequence[float | str]]) -> UnfreezeSchedule:
    """Return a schedule of stages: head, then the top groups, then all, each with its own factor on the rates.

    "Continue with a smaller rate" is a factor below 1. `LP-FT` is `staged([(0.3, "all", 0.1)])`: the head alone for
    30 % of training, then everything at a tenth of the rate.

    Args:
        stages: (start, groups) or (start, groups, factor), by ascending start. `start`: a whole number counts
            optimizer steps, a float in [0, 1) is a fraction of training; all stages must use one of the two (0 is
            either). `groups`: how many from the top, head included, or "all"; never fewer than before. `factor`:
            ratio to the rates the groups would have, above 0.

    Raises:
        ValueError: starts are mixed, not ascending or out of range; groups shrink; a factor is not positive.

    Example:
        >>> schedule = staged([(0, 1), (0.2, 3, 1 / 3), (0.5, "all", 0.1)])
        >>> [schedule.open_groups(step, num_groups=8, max_steps=100) for step in (0, 20, 50)]
        [1, 3, 8]

    References:
        Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022,
        section 3. https://arxiv.org/abs/2202.10054
    """
    parsed: list[Stage] = []
    for stage in stages:
        if not 2 <= len(stage) <= 3:
            raise ValueError(
                f"stage {stage!r} has {len(stage)} parts; expected (start, groups) or with a factor third."
            )
        start, groups, factor = (*stage, 1.0)[:3]
        if groups != "all" and (not isinstance(groups, int) or groups < 1):
            raise ValueError(f'groups {groups!r} in stage {stage!r}: expected a whole number from 1, or "all".')
        if not isinstance(factor, int | float) or factor <= 0:
            raise ValueError(f"factor {factor!r} in stage {stage!r}: expected a number above 0.")
        if not isinstance(start, int | float):
            raise ValueError(f"start {start!r} in stage {stage!r}: expected steps (int) or a fraction (float).")
        parsed.append(Stage(start, None if isinstance(groups, str) else int(groups), float(factor)))
    kinds = {type(stage.start) for stage in parsed if stage.start != 0}
    if len(kinds) > 1:
        raise ValueError("stages start at steps (int) and at fractions (float); use one of the two for all of them.")
    for above, below in itertools.pairwise(parsed):
        if below.groups is not None and (above.groups is None or below.groups < above.groups):
            raise ValueError(f"stage {tuple(below)} opens fewer groups than the one before; an open group stays open.")
    unit: Unit = "fractions" if float in kinds else "steps"
    return UnfreezeSchedule(unit, _ascending(unit, parsed))


def _one_by_one(unit: Unit, starts: Sequence[float]) -> UnfreezeSchedule:
    return UnfreezeSchedule(unit, _ascending(unit, [Stage(start, place + 2) for place, start in enumerate(starts)]))


def _ascending(unit: Unit, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    starts = [stage.start for stage in stages]
    if starts != sorted(starts):
        raise ValueError(f"starts {starts} are not ascending; groups open downwards, one after the other. Sort them.")
    outside = [start for start in starts if start < 0 or (unit == "fractions" and start >= 1)]
    if outside:
        expected = "fractions in [0, 1)" if unit == "fractions" else "steps, 0 or more"
        raise ValueError(f"start {outside[0]} is out of range; expected {expected}.")
    return tuple(stages)


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` is {value!r}; expected a whole number from 1.")
    return value
