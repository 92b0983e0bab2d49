"""What would go wrong, found before step 1: all findings at once."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

from transformers import Trainer

from tl_callbacks.callbacks import TransferCallback
from tl_callbacks.frozen.by_hand import hand_frozen_findings
from tl_callbacks.frozen.state import openable
from tl_callbacks.groups import LayerGroups
from tl_callbacks.layerwise.factory import LayerwiseOptimizer, check_groups, refusal
from tl_callbacks.loss_scale import loss_scale_caution
from tl_callbacks.names import normalise
from tl_callbacks.sharding import factory_findings
from tl_callbacks.unfreezing.callback import GradualUnfreezing


class PreflightError(ValueError):
    r"""Lists everything that is wrong with a set-up, each with what to do.

    Args:
        findings: one text a finding.
        cautions: what would work, but should be known beforehand; listed behind.

    Example:
        >>> str(PreflightError(["the head is frozen; open it."]))
        'attach(trainer) found 1 problem:\n- the head is frozen; open it.'
    """

    def __init__(self, findings: list[str], cautions: Sequence[str] = ()) -> None:
        plural = "problem" if len(findings) == 1 else "problems"
        text = "\n- ".join([f"attach(trainer) found {len(findings)} {plural}:", *findings])
        super().__init__("\n- ".join([f"{text}\nTo know besides:", *cautions]) if cautions else text)
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
    found += _rates(trainer)
    for callback in our_callbacks(trainer):
        found += callback.findings(trainer)
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if trainer.args.world_size < started:
        found.append(
            f"{started} processes were started, but the Trainer sees {trainer.args.world_size}: each would train alone "
            "and write the same files. Expected one GPU a process; without GPUs set use_cpu=True in TrainingArguments."
        )
    ignored = {normalise(name) for name in getattr(trainer.model, "_ddp_params_and_buffers_to_ignore", ())}
    if trainer.args.world_size > 1 and (apart := [name for name in openable(trainer.model) if name in ignored]):
        found.append(
            f"`{apart[0]}` and {len(apart) - 1} other parameters are in the model's _ddp_params_and_buffers_to_ignore, "
            "so DDP does not reduce their gradients and the ranks would drift apart. Take them out of it."
        )
    if trainer.args.n_gpu > 1:
        found.append(
            f"{trainer.args.n_gpu} devices in one process make the Trainer use DataParallel, which copies the model at "
            "every step. Launch one process a device with accelerate launch or torchrun."
        )
    return list(dict.fromkeys(found))  # two callbacks may find the same


def cautions(trainer: Trainer) -> list[str]:
    """Return what will work but should be known before step 1, one text each; empty if nothing."""
    found = [text for callback in our_callbacks(trainer) for text in callback.cautions(trainer)]
    if scaled := loss_scale_caution(trainer):
        found.append(scaled)
    return list(dict.fromkeys(found))


def _rates(trainer: Trainer) -> list[str]:
    """Return what keeps the groups from having the rates that they were given."""
    found, groups = [], _given_groups(trainer)
    scheduler = trainer.lr_scheduler
    reads = scheduler is not None and type(scheduler).__module__.split(".")[0] not in ("torch", "transformers")
    if not reads and any(group.get("lr_scale", 1) != 1 for group in groups):
        found.append(
            "parameter groups carry `lr_scale`, which no scheduler of torch or transformers reads, so all would train "
            "at the same rate. Pass optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=...), or "
            "multiply each group's lr by it."
        )
    factory = factory_of(trainer)
    rates = (
        set(factory.scales.values()) if factory else {group.get("lr", trainer.args.learning_rate) for group in groups}
    )
    kind = str(getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type))
    kwargs: Any = trainer.args.lr_scheduler_kwargs or {}
    floors: Any = 0
    if scheduler is not None:
        floors = getattr(scheduler, "eta_min", None) or getattr(scheduler, "min_lrs", 0)
    elif kind in ("reduce_lr_on_plateau", "greedy"):
        floors = kwargs.get("min_lr", 1e-3 if kind == "greedy" else 0)  # the default of transformers' GreedyLR
    floor, *others = set(floors) if isinstance(floors, list | tuple) else {floors or 0}  # a list has one a group
    if len(rates) > 1 and floor > 0 and not others:
        name = type(scheduler).__name__ if scheduler is not None else f"lr_scheduler_type={kind}"
        found.append(
            f"{name} stops at the same lowest rate, {floor}, in every group, so that groups of different rates become "
            "equal. Use a scheduler that scales each group's rate, such as linear or "
            "cosine_with_min_lr, or set the floor to 0."
        )
    return found


def _given_groups(trainer: Trainer) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer that the user made or described."""
    if trainer.optimizer is not None:
        return list(trainer.optimizer.param_groups)
    groups = trainer.optimizer_cls_and_kwargs[1].get("params", []) if trainer.optimizer_cls_and_kwargs else []
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list | tuple) else []


def _optimizer(trainer: Trainer) -> list[str]:
    assert trainer.model is not None
    factory = factory_of(trainer)
    unfreezing = any(isinstance(callback, GradualUnfreezing) for callback in our_callbacks(trainer))
    given = trainer.optimizer is not None or (trainer.optimizer_cls_and_kwargs is not None and factory is None)
    if (factory or unfreezing) and not given and (reason := refusal(trainer.args)):
        return [reason]
    if factory is None:
        return factory_findings(trainer, own_rates=True) if unfreezing else []
    found = factory_findings(trainer, own_rates=unfreezing or set(factory.scales.values()) != {1.0})
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


def factory_of(trainer: Trainer) -> LayerwiseOptimizer | None:
    """Return the trainer's factory if it is one of ours."""
    first = trainer.optimizer_cls_and_kwargs[0] if trainer.optimizer_cls_and_kwargs else None
    return first if isinstance(first, LayerwiseOptimizer) else None
