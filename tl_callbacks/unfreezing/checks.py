"""What can be wrong with a gradual unfreezing: before training, at its begin, and against what a checkpoint records."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerState, TrainingArguments

from tl_callbacks import events
from tl_callbacks.errors import NoEffectWarning
from tl_callbacks.frozen.by_hand import hand_frozen_findings
from tl_callbacks.frozen.state import openable
from tl_callbacks.names import normalise
from tl_callbacks.parameters import is_peft, parameters_by_name
from tl_callbacks.sharding import sharding
from tl_callbacks.unfreezing import rate_frozen
from tl_callbacks.unfreezing.evaluations import undecidable
from tl_callbacks.unfreezing.plan import UnfreezePlan, training_lengths

if TYPE_CHECKING:
    from tl_callbacks.unfreezing.callback import GradualUnfreezing


def findings(callback: "GradualUnfreezing", trainer: Trainer) -> list[str]:
    """Return what would go wrong with this trainer, one text a finding."""
    assert trainer.model is not None
    found = []
    known = parameters_by_name(trainer.model)
    if unknown := [name for name in callback.groups.parameters if name not in known]:
        found.append(
            f"GradualUnfreezing's groups name `{unknown[0]}` and {len(unknown) - 1} other parameters that this "
            "model does not have; make them with group_layers(model) from the model given to the Trainer. If the "
            "trainer itself adds PEFT adapters (peft_config), make them from trainer.model and add the callback with "
            "trainer.add_callback, or give it get_peft_model(model, peft_config)."
        )
    if sum(isinstance(other, type(callback)) for other in trainer.callback_handler.callbacks) > 1:
        found.append("the Trainer has several GradualUnfreezing callbacks; keep one, with one schedule.")
    kind = str(getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type))
    if kind in ("reduce_lr_on_plateau", "greedy") and not callback.opens_all_at_once():
        found.append(
            f"lr_scheduler_type={kind} adapts one rate to the loss of what is open; a group that opens later gets "
            "whatever is left of it. Use a scheduler of the step, such as linear, with GradualUnfreezing."
        )
    found += unplannable(callback, training_lengths(trainer))
    found += undecidable(callback, trainer)
    if not callback.freezes_nothing():
        found += _frozen_layers(callback, trainer)
    found += rate_frozen.findings(trainer)
    if sharding(trainer) == "fsdp1":
        found.append(
            "GradualUnfreezing does not support FSDP 1, whose flat parameters cross layer groups. Use FSDP 2 "
            '(fsdp_config={"version": 2, ...}) or DDP.'
        )
    if trainer.optimizer is not None and not callback.opens_all_at_once():
        held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
        outside = [name for name, parameter in openable(trainer.model).items() if id(parameter) not in held]
        if outside:
            found.append(_outside(outside))
    return found


def _frozen_layers(callback: "GradualUnfreezing", trainer: Trainer) -> list[str]:
    """Return what cannot go together with frozen layers, or with openings."""
    assert trainer.model is not None
    args, found = trainer.args, []
    if args.ddp_static_graph and args.world_size > 1 and not callback.opens_all_at_once():
        found.append(
            "ddp_static_graph=True promises DDP that the same parameters train at every step, which GradualUnfreezing "
            "breaks at each opening. Leave ddp_static_graph out."
        )
    if reentrant(args):
        if args.ddp_find_unused_parameters and args.world_size > 1:
            found.append(
                "reentrant activation checkpointing and ddp_find_unused_parameters=True make DDP count a parameter "
                f"twice. {NON_REENTRANT}"
            )
        if getattr(trainer.model, "main_input_name", "input_ids") != "input_ids" and not is_peft(trainer.model):
            found.append(
                "reentrant activation checkpointing gives no gradient to open layers above frozen ones, because what "
                f"reaches {type(trainer.model).__name__} requires none: they would not move. {NON_REENTRANT}"
            )
    return found


NON_REENTRANT = 'Set activation_checkpointing_kwargs={"use_reentrant": False}.'


def reentrant(args: TrainingArguments) -> bool:
    """Return whether activation checkpointing is on in its reentrant kind."""
    kwargs: Any = args.activation_checkpointing_kwargs or {}
    return bool(args.activation_checkpointing and kwargs.get("use_reentrant"))


def unplannable(callback: "GradualUnfreezing", lengths: tuple[int, int | None] | None) -> list[str]:
    """Return why the schedule cannot be applied to a training of these lengths, None where they are not known."""
    try:
        if lengths is not None:
            callback.plan(*lengths)
    except ValueError as error:
        return [f"GradualUnfreezing: {error}"]
    return []


def never_opens(callback: "GradualUnfreezing", plan: UnfreezePlan, max_steps: int) -> str:
    """Return the text that names the groups a plan never opens."""
    if plan.decided is not None:
        names = ", ".join(f"`{name}`" for name in plan.never)
        return (
            f"{callback!r} may leave {names} frozen: its opening comes within {max_steps} steps only if the metric "
            "stalls. Lower max_wait, or name it in keep_frozen."
        )
    return (
        f"{callback!r} never opens {', '.join(f'`{name}`' for name in plan.never)} within {max_steps} steps. Open them "
        "earlier, or name them in keep_frozen if that is meant."
    )


def _outside(names: list[str]) -> str:
    return (
        f"`{names[0]}` and {len(names) - 1} other parameters are not in the optimizer, so opening them would move "
        "nothing. Pass optimizer_cls_and_kwargs=layerwise_optimizer(args, groups) instead of an optimizer."
    )


def unattached(model: nn.Module, args: TrainingArguments) -> None:
    """Warn that the callback was not attached; refuse where it cannot be exact without.

    Raises:
        RuntimeError: the training runs on several processes, or is sharded.
        ValueError: parameters were frozen by hand.
    """
    if args.world_size > 1 or args.fsdp or getattr(args, "deepspeed_plugin", None):
        raise RuntimeError(
            f"GradualUnfreezing was not attached, and the training runs on {args.world_size} processes; it cannot "
            "be exact there without the Trainer's wrapper. Call attach(trainer) before trainer.train()."
        )
    if findings := hand_frozen_findings(model):
        raise ValueError(findings[0])
    warnings.warn(
        "GradualUnfreezing was not attached: set-up errors go unnoticed, and rates are not logged. Call "
        "attach(trainer) before trainer.train().",
        UserWarning,
        stacklevel=3,
    )


def history(callback: "GradualUnfreezing", plan: UnfreezePlan, state: TrainerState) -> None:
    """Refuse to resume a run whose recorded openings this schedule would not have made.

    Raises:
        ValueError: `max_steps` changed under a schedule of fractions, or other groups are open.
    """
    recorded = events.read(state.log_history, "opening")
    if not recorded:
        return
    schedules = callback.schedule.values() if isinstance(callback.schedule, Mapping) else [callback.schedule]
    if any(schedule.unit == "fractions" for schedule in schedules) and recorded[-1]["max_steps"] != state.max_steps:
        raise ValueError(
            f"the run was started with max_steps={recorded[-1]['max_steps']} and is resumed with {state.max_steps}, "
            f"but {callback.schedule!r} counts fractions of it. Resume with the same length, or use at_steps([...])."
        )
    was_open = {name for event in recorded for name in event["groups"]}
    would_be = set(plan.at(state.global_step - 1).open)
    if was_open != would_be:
        raise ValueError(
            f"the checkpoint of step {state.global_step} records {sorted(was_open)} as open, but {callback.schedule!r} "
            f"would have opened {sorted(would_be)}. Resume with the schedule, groups and batch sizes that the run was "
            "started with."
        )


def effect(callback: "GradualUnfreezing", plan: UnfreezePlan, state: TrainerState) -> None:
    """Warn of groups that never open within the training, unless `attach` could, and of a schedule without effect."""
    if plan.never and (callback.trainer is None or training_lengths(callback.trainer) is None):
        warnings.warn(never_opens(callback, plan, state.max_steps), NoEffectWarning, stacklevel=3)
    if callback.freezes_nothing() and len(plan.phases) == 1:
        warnings.warn(
            f"{callback!r} has everything open from step 0 and freezes nothing. Leave it out, or open groups later.",
            NoEffectWarning,
            stacklevel=3,
        )


def optimizer(
    callback: "GradualUnfreezing",
    model: nn.Module,
    inner: Optimizer,
    scheduler: LRScheduler,
    *,
    per_group: bool,
    flat: bool = False,
) -> None:
    """Refuse an optimizer that lacks what is to open, or that cannot give the groups rates of their own.

    Args:
        callback: the callback.
        model: the model without wrappers.
        inner: the optimizer under accelerate's.
        scheduler: the Trainer's scheduler.
        per_group: whether the groups are to get rates of their own.
        flat: whether the optimizer steps flat partitions, so that its groups tell what they hold by name only.

    Raises:
        ValueError: a parameter is outside the optimizer, or rates per group are impossible.
    """
    held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    parameters = openable(model)
    outside = [n for n in callback.groups.parameters if n in parameters and id(parameters[n]) not in held]
    if flat:
        named = {normalise(name) for group in inner.param_groups for name in group.get("param_names", ())}
        outside = [name for name in outside if name not in named]
    if outside:
        raise ValueError(_outside(outside))
    if per_group and not (isinstance(scheduler, LambdaLR) and "layer_group" in inner.param_groups[0]):
        raise ValueError(
            f"rates={callback.rates!r} with {callback.schedule!r} needs the groups of layerwise_optimizer and a "
            f"scheduler of the step (LambdaLR); found {type(inner).__name__} and {type(scheduler).__name__}. Pass "
            "optimizer_cls_and_kwargs=layerwise_optimizer(args, groups) and call attach(trainer)."
        )
