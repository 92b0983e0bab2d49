"""What will work under a gradual unfreezing, but should be known before step 1."""

from math import ceil
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.unfreezing.checks import NON_REENTRANT, never_opens, reentrant, unplannable
from tl_callbacks.unfreezing.evaluations import evaluation_interval, to_know
from tl_callbacks.unfreezing.plan import UnfreezePlan, training_lengths

if TYPE_CHECKING:
    from tl_callbacks.unfreezing.callback import GradualUnfreezing


def cautions(callback: "GradualUnfreezing", trainer: Trainer) -> list[str]:
    """Return what will work but should be known beforehand, one text each."""
    found: list[str] = []
    if callback.freezes_nothing():
        return found
    args = trainer.args
    if reentrant(args):
        found.append(
            f"reentrant activation checkpointing recomputes and back-propagates through frozen layers. {NON_REENTRANT}"
        )
    lengths = training_lengths(trainer)
    if lengths is None or unplannable(callback, lengths):
        return found
    plan = callback.plan(*lengths)
    if args.neftune_noise_alpha and (waits := _noise(callback, plan, trainer)):
        found.append(waits)
    if plan.never:
        found.append(never_opens(callback, plan, lengths[0]))
    if args.torch_compile and len(plan.phases) > 1:
        found.append(
            f"torch_compile=True compiles once more at each of the {len(plan.phases) - 1} transitions, which can take "
            "longer than the steps that freezing saves. Open more groups at once, or leave torch_compile out."
        )
    found += to_know(callback, plan, trainer)
    found += [
        text
        for other in trainer.callback_handler.callbacks
        if isinstance(other, EarlyStoppingCallback) and (text := _early_stop(other, plan, args, *lengths))
    ]
    return found


def _noise(callback: "GradualUnfreezing", plan: UnfreezePlan, trainer: Trainer) -> str | None:
    """Return a text if NEFTune, which acts on an embedding in training mode, waits until that opens."""
    model: Any = trainer.model
    embedding = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    names = {name for name, parameter in parameters_by_name(model).items() if id(parameter) in embedding}
    groups = [group.name for group in callback.groups if names & set(group.parameters)]
    if not groups or groups[0] in plan.phases[0].open:
        return None
    opening = plan.opening_step(groups[0])
    until = "in this training" if opening is None else f"before step {opening}"
    return (
        f"neftune_noise_alpha={trainer.args.neftune_noise_alpha} adds no noise {until}: `{groups[0]}` is frozen, and "
        "what is frozen is in eval mode. Open the group earlier, or leave the noise out."
    )


def _early_stop(
    stopping: EarlyStoppingCallback, plan: UnfreezePlan, args: TrainingArguments, max_steps: int, epoch: int | None
) -> str | None:
    """Return a text if early stopping can fire before the last opening, None if it cannot."""
    last, interval = plan.phases[-1], evaluation_interval(args, max_steps, epoch)
    patience = stopping.early_stopping_patience
    earliest = (patience + 1) * interval  # the first evaluation sets the best value
    if not interval or earliest >= last.step:
        return None
    return (
        f"EarlyStoppingCallback(early_stopping_patience={patience}) can stop the training at step {earliest}, before "
        f"`{last.opened[0] if last.opened else last.open[0]}` opens at step {last.step}. Give it a patience of "
        f"{ceil(last.step / interval)} evaluations or more, or open the groups earlier."
    )
