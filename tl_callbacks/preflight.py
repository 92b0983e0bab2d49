"""What would go wrong, found before step 1: all findings at once."""

import itertools

from torch import nn
from transformers import Trainer

from tl_callbacks.callbacks import TransferCallback
from tl_callbacks.frozen.by_hand import hand_frozen_findings
from tl_callbacks.groups import LayerGroups
from tl_callbacks.layerwise.factory import LayerwiseOptimizer, check_groups, refusal
from tl_callbacks.unfreezing.callback import GradualUnfreezing


class PreflightError(ValueError):
    r"""Lists everything that is wrong with a set-up, each with what to do.

    Args:
        findings: one text a finding.

    Example:
        >>> str(PreflightError(["the head is frozen; open it."]))
        'attach(trainer) found 1 problem:\n- the head is frozen; open it.'
    """

    def __init__(self, findings: list[str]) -> None:
        plural = "problem" if len(findings) == 1 else "problems"
        super().__init__("\n- ".join([f"attach(trainer) found {len(findings)} {plural}:", *findings]))
        self.findings = findings


def our_callbacks(trainer: Trainer) -> list[TransferCallback]:
    """Return this package's callbacks among the trainer's, in their order."""
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, TransferCallback)]


def preflight(trainer: Trainer) -> list[str]:
    """Return all that would go wrong with a trainer, one text a finding; empty if nothing."""
    assert trainer.model is not None
    found = []
    if trainer.state.global_step > 0:
        found.append(
            f"the trainer has already trained {trainer.state.global_step} steps, so the pretrained weights and the "
            "first openings are gone. Call attach(trainer) before trainer.train()."
        )
    found += hand_frozen_findings(trainer.model)
    found += _optimizer(trainer)
    for callback in our_callbacks(trainer):
        found += callback.findings(trainer)
    if trainer.args.n_gpu > 1:
        found.append(
            f"{trainer.args.n_gpu} devices in one process make the Trainer use DataParallel, which copies the model at "
            "every step. Launch one process a device with accelerate launch or torchrun."
        )
    return list(dict.fromkeys(found))  # two callbacks may find the same


def _optimizer(trainer: Trainer) -> list[str]:
    assert trainer.model is not None
    factory = factory_of(trainer)
    unfreezing = any(isinstance(callback, GradualUnfreezing) for callback in our_callbacks(trainer))
    given = trainer.optimizer is not None or (trainer.optimizer_cls_and_kwargs is not None and factory is None)
    if (factory or unfreezing) and not given and (reason := refusal(trainer.args)):
        return [reason]
    if factory is None:
        return []
    found = []
    if has_loss_parameters(trainer):
        found.append(
            f"{type(trainer).__name__} trains parameters of its loss too, which layerwise_optimizer does not cover. "
            "Leave optimizer_cls_and_kwargs out; attach(trainer) then keeps the trainer's own optimizer."
        )
    if factory.args is not trainer.args:
        found.append(
            "layerwise_optimizer was given other arguments than the Trainer; rate and weight decay would have two "
            "sources. Pass the same TrainingArguments object to both."
        )
    found += [
        f"GradualUnfreezing and layerwise_optimizer were given different groups (first difference: {first}), so rates "
        "would not follow the openings. Pass the same LayerGroups to both."
        for callback in our_callbacks(trainer)
        if isinstance(callback, GradualUnfreezing) and (first := _first_difference(callback.groups, factory.groups))
    ]
    try:
        check_groups(factory.groups, trainer.model)
    except ValueError as error:
        found.append(f"layerwise_optimizer: {error}")
    return found


def _first_difference(one: LayerGroups, other: LayerGroups) -> str | None:
    """Return the names of the first groups, bottom to top, that differ in name or parameters; None if none do."""
    for a, b in itertools.zip_longest(one, other):
        if a is None or b is None or (a.name, a.parameters) != (b.name, b.parameters):
            return " against ".join(f"`{group.name}`" if group else "none" for group in (a, b))
    return None


def has_loss_parameters(trainer: Trainer) -> bool:
    """Return whether the trainer holds losses as modules, as sentence-transformers' does, and optimizes them itself."""
    loss = getattr(trainer, "loss", None)
    return isinstance(loss, nn.Module | dict)


def factory_of(trainer: Trainer) -> LayerwiseOptimizer | None:
    """Return the trainer's factory if it is one of ours."""
    first = trainer.optimizer_cls_and_kwargs[0] if trainer.optimizer_cls_and_kwargs else None
    return first if isinstance(first, LayerwiseOptimizer) else None
