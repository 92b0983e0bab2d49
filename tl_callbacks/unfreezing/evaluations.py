"""Whether a run evaluates often enough for its evaluations to decide openings, said before step 1."""

from math import ceil
from typing import TYPE_CHECKING

from transformers import Trainer, TrainingArguments

from tl_callbacks.unfreezing import rate_frozen
from tl_callbacks.unfreezing.adaptive import ProbeSchedule
from tl_callbacks.unfreezing.plan import UnfreezePlan, training_lengths

if TYPE_CHECKING:
    from tl_callbacks.unfreezing.callback import GradualUnfreezing


def evaluation_interval(args: TrainingArguments, max_steps: int, steps_per_epoch: int | None) -> int:
    """Return the optimizer steps from one evaluation to the next, 0 without evaluations or where it is unknown."""
    kind = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if kind == "epoch":
        return steps_per_epoch or 0
    every = float(args.eval_steps or 0) if kind == "steps" else 0.0
    return ceil(every * max_steps) if every < 1 else int(every)


def undecidable(callback: "GradualUnfreezing", trainer: Trainer) -> list[str]:
    """Return why the run's record cannot decide when groups open, one text a finding; empty for other schedules."""
    schedule = callback.schedule
    if not isinstance(schedule, ProbeSchedule):
        return []
    found = []
    if str(getattr(trainer.args.eval_strategy, "value", trainer.args.eval_strategy)) == "no":
        found.append(
            f"{schedule!r} reads `{schedule.metric}` from evaluations, and eval_strategy is `no`. Set "
            'eval_strategy="steps" with eval_steps, and give the Trainer an eval_dataset that is not the test set.'
        )
    elif (times := _times(callback, trainer)) is not None and times[0] >= times[2]:
        found.append(
            f"{schedule!r} cannot see a plateau before step {times[0]}, but has opened everything by step {times[2]}. "
            f"Evaluate every {_needed(schedule, times[1])} steps (eval_steps), or raise max_wait."
        )
    if schedule.ranks_groups and rate_frozen.applies(trainer):
        found.append(
            f"{schedule!r} measures gradients of frozen groups, which DeepSpeed keeps in partitions of its own. Use "
            'order="top_down", or train with DDP or FSDP 2.'
        )
    return found


def to_know(callback: "GradualUnfreezing", plan: UnfreezePlan, trainer: Trainer) -> list[str]:
    """Return what will work but should be known beforehand of openings that the run decides, one text each."""
    schedule = callback.schedule
    found: list[str] = []
    if not isinstance(schedule, ProbeSchedule):
        return found
    times = _times(callback, trainer)
    if times is not None and times[1] <= times[0] < times[2]:
        found.append(
            f"{schedule!r} cannot see a plateau before step {times[0]}, and opens a first group at step {times[1]} "
            f"whatever it sees. Evaluate every {_needed(schedule, times[1])} steps (eval_steps) for it to decide that "
            "one too."
        )
    if trainer.args.eval_on_start:
        found.append(
            "eval_on_start=True evaluates once more where a run is resumed, and that counts among the evaluations that "
            "decide openings. Resume from checkpoints that were saved at an evaluation, or leave it out."
        )
    if schedule.ranks_groups and trainer.args.torch_compile and plan.measured:
        found.append(
            f"torch_compile=True compiles anew for the steps that measure gradients, {len(plan.measured)} at the most. "
            'Use order="top_down", or leave torch_compile out.'
        )
    return found


def _times(callback: "GradualUnfreezing", trainer: Trainer) -> tuple[int, int, int] | None:
    """Return the steps of the earliest plateau, of the first and of the last opening at the latest; None if unknown."""
    schedule, lengths = callback.schedule, training_lengths(trainer)
    if lengths is None or not isinstance(schedule, ProbeSchedule):
        return None
    interval = evaluation_interval(trainer.args, *lengths)
    try:
        latest = [phase.step for phase in callback.plan(*lengths).phases[1:]]
    except ValueError:
        return None  # told by another finding
    if not interval or not latest:
        return None
    evaluations = schedule.patience + (0 if trainer.args.eval_on_start else 1)
    return evaluations * interval, latest[0], latest[-1]


def _needed(schedule: ProbeSchedule, latest: int) -> int:
    return max(1, (latest - 1) // (schedule.patience + 1))
