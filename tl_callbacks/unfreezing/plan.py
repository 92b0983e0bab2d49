"""The table of openings: a schedule applied to groups and a length of training. Plain Python."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from tl_callbacks.groups import LayerGroups, table
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


@dataclass(frozen=True)
class UnfreezePlan:
    """The phases of a training, in order; prints as a table.

    Args:
        phases: by ascending step, the first at step 0.
        never: names of the groups that do not open within the training, though not held frozen, bottom to top.
        keep_frozen: names of the groups that are held frozen, bottom to top.

    Example:
        >>> plan = UnfreezePlan((Phase(0, ("head",), ("head",), 18),), (), ())
        >>> print(plan)
        step  epoch  opens  open groups  parameters  rate factor
        0         -   head            1          18            1
    """

    phases: tuple[Phase, ...]
    never: tuple[str, ...]
    keep_frozen: tuple[str, ...]

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
        return "\n".join(lines)


def make_plan(
    groups: LayerGroups,
    schedule: UnfreezeSchedule,
    keep_frozen: Sequence[str],
    *,
    max_steps: int,
    steps_per_epoch: int | None,
) -> UnfreezePlan:
    """Return the plan of a schedule over groups.

    Args:
        groups: the groups, bottom to top.
        schedule: when how many open.
        keep_frozen: names of groups that never open; the schedule counts only the others.
        max_steps: optimizer steps of the training.
        steps_per_epoch: optimizer steps of an epoch, None if unknown.

    Raises:
        ValueError: see `UnfreezeSchedule.in_steps`.
    """
    order = [group for group in reversed(groups.groups) if group.name not in set(keep_frozen)]
    phases: list[Phase] = []
    before = 0
    for stage in schedule.in_steps(len(order), max_steps=max_steps, steps_per_epoch=steps_per_epoch):
        if stage.start >= max_steps:
            break
        count = stage.groups or 1
        phases.append(
            Phase(
                step=int(stage.start),
                opened=tuple(group.name for group in reversed(order[before:count])),
                open=tuple(group.name for group in reversed(order[:count])),
                num_parameters=sum(group.num_parameters for group in order[:count]),
                factor=stage.factor,
                epoch=stage.start / steps_per_epoch if steps_per_epoch else None,
            )
        )
        before = count
    never = tuple(group.name for group in reversed(order[before:]))
    return UnfreezePlan(tuple(phases), never, tuple(keep_frozen))


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
