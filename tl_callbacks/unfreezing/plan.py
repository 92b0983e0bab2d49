"""The table of openings: a schedule applied to groups and a length of training. Plain Python."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from transformers import Trainer, TrainingArguments

from tl_callbacks.groups import LayerGroups
from tl_callbacks.tables import table
from tl_callbacks.unfreezing.adaptive import History, ProbeSchedule
from tl_callbacks.unfreezing.schedule import UnfreezeSchedule


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which the same groups are open.

    Args:
        step: optimizer step at which it begins.
        opened: names of the groups that open at that step, bottom to top.
        open: names of all groups that are open from then on, bottom to top.
        num_parameters: number of scalars in the open groups.
        factor: ratio of the rates to what they would be.
        epoch: `step` in epochs, None where the length of an epoch is unknown.
        reason: why the groups open then, where the run's record decides it; JSON values.

    Example:
        >>> Phase(0, ("head",), ("head",), 18).step
        0
    """

    step: int
    opened: tuple[str, ...]
    open: tuple[str, ...]
    num_parameters: int
    factor: float = 1.0
    epoch: float | None = None
    reason: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class UnfreezePlan:
    """The phases of a training, in order; prints as a table.

    Args:
        phases: by ascending step, the first at step 0.
        never: names of the groups that do not open within the training, though not held frozen, bottom to top.
        keep_frozen: names of the groups that are held frozen, bottom to top.
        decided: optimizer steps done when it was made, where the run's record decides: openings after it are the
            latest possible, in the order they have if nothing is measured. None: nothing can change it.
        measured: steps in which the gradients of all groups are measured, as far as decided.

    Example:
        >>> plan = UnfreezePlan((Phase(0, ("head",), ("head",), 18),), (), ())
        >>> print(plan)
        step  epoch  opens  open groups  parameters  rate factor
        0         -   head            1          18            1
    """

    phases: tuple[Phase, ...]
    never: tuple[str, ...]
    keep_frozen: tuple[str, ...]
    decided: int | None = None
    measured: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.phases)

    def at(self, step: int) -> Phase:
        """Return the phase that holds during the given optimizer step (steps done, from 0)."""
        return next(phase for phase in reversed(self.phases) if phase.step <= step)

    def opening_step(self, group: str) -> int | None:
        """Return the optimizer step at which a group opens, None if it never does."""
        return next((phase.step for phase in self.phases if group in phase.open), None)

    def facts(self) -> list[dict[str, Any]]:
        """Return the phases as JSON values."""
        return [
            {"step": p.step, "opened": list(p.opened), "num_parameters": p.num_parameters, "factor": p.factor}
            for p in self.phases
        ]

    def __str__(self) -> str:
        rows: list[Sequence[str]] = [["step", "epoch", "opens", "open groups", "parameters", "rate factor"]]
        rows += [
            [
                str(phase.step),
                "-" if phase.epoch is None else f"{phase.epoch:.2f}",
                ", ".join(reversed(phase.opened)) or "-",
                str(len(phase.open)),
                f"{phase.num_parameters:,}",
                f"{phase.factor:.3g}",
            ]
            for phase in self.phases
        ]
        lines = [table(rows)]
        if self.keep_frozen:
            lines.append(f"held frozen: {', '.join(self.keep_frozen)}")
        if self.never:
            lines.append(f"never opens: {', '.join(self.never)}")
        if self.decided is not None and any(phase.step > self.decided for phase in self.phases):
            lines.append(f"decided up to step {self.decided}; openings after it are the latest possible")
        return "\n".join(lines)


Schedules = UnfreezeSchedule | ProbeSchedule | Mapping[str, UnfreezeSchedule]


def make_plan(
    groups: LayerGroups,
    schedule: Schedules,
    keep_frozen: Sequence[str],
    *,
    max_steps: int,
    steps_per_epoch: int | None,
    history: History = (),
    step: int = 0,
) -> UnfreezePlan:
    """Return the plan of a schedule over groups.

    A schedule counts levels: groups at one depth of parallel towers open together.

    Args:
        groups: the groups, bottom to top.
        schedule: when how many open; or one schedule for each of several towers, see `by_tower`.
        keep_frozen: names of groups that never open; the schedule counts only the others.
        max_steps: optimizer steps of the training.
        steps_per_epoch: optimizer steps of an epoch, None if unknown.
        history: what the run has logged, which decides under a `ProbeSchedule`.
        step: optimizer steps done.

    Raises:
        ValueError: see `UnfreezeSchedule.in_steps`, `ProbeSchedule.latest` and `by_tower`.
    """
    may_open = [name for name in groups.names if name not in set(keep_frozen)]
    sizes = {group.name: group.num_parameters for group in groups}
    openings: dict[int, set[str]] = {}
    factors: dict[int, float] = {}
    reasons: dict[int, Mapping[str, Any]] = {}
    measured: list[int] = []
    for one, levels in by_tower(groups, schedule, may_open):
        before = 0
        if isinstance(one, ProbeSchedule):
            openings[0] = set(levels[0])
            for opening in one.openings(levels, history=history, step=step, max_steps=max_steps):
                openings.setdefault(opening.step, set()).update(opening.groups)
                reasons[opening.step] = opening.reason
                measured += opening.measured if opening.step < max_steps else ()
            continue
        for stage in one.in_steps(len(levels), max_steps=max_steps, steps_per_epoch=steps_per_epoch):
            count = stage.groups or 1
            opened = [name for level in levels[before:count] for name in level]
            openings.setdefault(int(stage.start), set()).update(opened)
            factors[int(stage.start)] = stage.factor
            before = count
    phases: list[Phase] = []
    opened_before: set[str] = set()
    for start in sorted(start for start in openings if start < max_steps):
        now = opened_before | openings[start]
        phases.append(
            Phase(
                step=start,
                opened=tuple(name for name in may_open if name in now - opened_before),
                open=tuple(name for name in may_open if name in now),
                num_parameters=sum(sizes[name] for name in now),
                factor=factors.get(start, 1.0),
                epoch=start / steps_per_epoch if steps_per_epoch else None,
                reason=reasons.get(start),
            )
        )
        opened_before = now
    never = tuple(name for name in may_open if name not in opened_before)
    decided = step if isinstance(schedule, ProbeSchedule) else None
    return UnfreezePlan(tuple(phases), never, tuple(keep_frozen), decided, tuple(measured))


def by_tower(
    groups: LayerGroups, schedule: Schedules, may_open: Sequence[str]
) -> list[tuple[UnfreezeSchedule | ProbeSchedule, list[list[str]]]]:
    """Return each schedule with the levels that it opens, top to bottom, as lists of group names.

    With one schedule that is all levels. With a mapping of anchored patterns of group or tower names each schedule
    opens the groups that match; the top level, which all towers share, is open from step 0 in each.

    Raises:
        ValueError: a group that may open matches no pattern or several, a pattern matches no group, or a schedule
            changes rates by a factor, which towers cannot do apart.

    Example:
        >>> from tl_callbacks import LayerGroup, every
        >>> groups = LayerGroups(tuple(LayerGroup(name, (name,)) for name in ("text.0", "image.0", "head")), "head")
        >>> [levels for _, levels in by_tower(groups, {"text": every(1), "image": every(9)}, groups.names)]
        [[['head'], ['text.0']], [['head'], ['image.0']]]
    """
    levels = [[group.name for group in level if group.name in may_open] for level in reversed(groups.levels)]
    levels = [level for level in levels if level]
    if not isinstance(schedule, Mapping):
        return [(schedule, levels)]
    top = set(levels[0])
    chosen = {pattern: set(groups.select([pattern])) for pattern in schedule}
    for name in may_open:
        takers = [pattern for pattern, names in chosen.items() if name in names]
        if len(takers) > 1 or (not takers and name not in top):
            how = f"{len(takers)} schedules ({', '.join(takers)})" if takers else "no schedule"
            raise ValueError(
                f"group `{name}` has {how}; expected one for each group below the top. Towers: "
                f"{', '.join(groups.towers) or 'none'}. Name the group in one pattern, or in keep_frozen."
            )
    for pattern, one in schedule.items():
        if not isinstance(one, UnfreezeSchedule):
            raise ValueError(
                f"the schedule of `{pattern}` is {one!r}; expected every, at_steps, at_fractions, per_epoch or staged "
                "for each tower. Give schedule_from_probes alone, for all towers."
            )
        if any(stage.factor != 1 for stage in one.stages):
            raise ValueError(
                f"the schedule of `{pattern}`, {one!r}, changes rates by a factor, which holds for all groups at once. "
                "Leave the factors out, or use one schedule."
            )
    result: list[tuple[UnfreezeSchedule | ProbeSchedule, list[list[str]]]] = []
    for pattern, one in schedule.items():
        own = [[name for name in level if name in chosen[pattern]] for level in levels[1:]]
        result.append((one, [levels[0], *(level for level in own if level)]))
    return result


def steps_per_epoch(dataloader: Iterable[Any], args: TrainingArguments) -> int | None:
    """Return the optimizer steps of an epoch as the Trainer counts them, None for a loader without a length.

    Example:
        >>> import tempfile
        >>> args = TrainingArguments(tempfile.mkdtemp(), gradient_accumulation_steps=4, use_cpu=True)
        >>> steps_per_epoch([0] * 9, args)
        3
    """
    if not isinstance(dataloader, Sized):
        return None
    try:
        batches = len(dataloader)
    except TypeError:  # a DataLoader over an iterable dataset
        return None
    return max(1, -(-batches // args.gradient_accumulation_steps))


def training_lengths(trainer: Trainer) -> tuple[int, int | None] | None:
    """Return (optimizer steps of the training, of an epoch) ahead of it; None without a training set of known length.

    The steps of an epoch are None where the training set has no length and `max_steps` is given.
    """
    if not isinstance(trainer.train_dataset, Sized):
        return (trainer.args.max_steps, None) if trainer.args.max_steps > 0 else None
    lengths = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return lengths[-1], lengths[1]
