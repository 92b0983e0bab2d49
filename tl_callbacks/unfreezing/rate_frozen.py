"""How groups stay frozen under DeepSpeed: by rate 0 and weight decay 0, besides `requires_grad`.

ZeRO registers only what requires a gradient when it wraps the model, so everything does then, and groups are frozen
afterwards. But it steps flat partitions, one for each optimizer group, with zeros in the place of gradients that did
not come: weight decay would still move a frozen group. With rate 0 the step changes no weight, bit for bit, and with
weight decay 0 no momentum. The optimizer still counts it, so the state of a group that opens is emptied: its first
steps are those of an optimizer that begins. Backward passes stop where they do elsewhere; memory and the communication
of weights are those of the whole model.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from tl_callbacks.sharding import sharding, zero_stage
from tl_callbacks.unfreezing.plan import Phase

LABEL = "rate-frozen, not cheap"

# Optimizers whose state begins at zero, so that emptying it is to begin anew, also on a flat partition.
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")


def applies(trainer: Trainer | None) -> bool:
    """Return whether groups are frozen this way: under DeepSpeed."""
    return trainer is not None and sharding(trainer) == "deepspeed"


def findings(trainer: Trainer) -> list[str]:
    """Return what of a DeepSpeed set-up cannot freeze groups, one text a finding; empty without DeepSpeed."""
    if not applies(trainer):
        return []
    found = []
    if (stage := zero_stage(trainer)) > 2:
        found.append(
            f"GradualUnfreezing does not support DeepSpeed ZeRO-{stage}, which holds a parameter only while its module "
            "runs; freezing there is not known to be exact. Use stage 2."
        )
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if optim not in _OPTIMIZERS:
        found.append(
            f"GradualUnfreezing under DeepSpeed empties the optimizer's state of a group that opens, which is not "
            f"known to be sound for optim={optim}. Expected one of {', '.join(_OPTIMIZERS)}."
        )
    if trainer.optimizer is not None:
        found.append(
            f"the Trainer drops the {type(trainer.optimizer).__name__} that it was given under DeepSpeed and makes its "
            "own. Pass optimizer_cls_and_kwargs=layerwise_optimizer(args, groups) instead of an optimizer."
        )
    return found


def note(trainer: Trainer | None) -> str:
    """Return what to tell the person who trains, empty without DeepSpeed."""
    if trainer is None or not applies(trainer):
        return ""
    return (
        f"\nUnder DeepSpeed ZeRO-{zero_stage(trainer)} frozen groups are {LABEL}: they have rate 0, weight decay 0 and "
        "no gradient, but optimizer state, steps and communication of the weights are those of the whole model."
    )


def hold(trainer: Trainer | None, phase: Phase, optimizer: Any, scheduler: LambdaLR, *, step: int) -> None:
    """Give frozen groups rate 0 and weight decay 0, and open ones their own; empty the state of what opens now.

    Does nothing without DeepSpeed. Depends on the step alone, so a resumed run repeats it; what a group's weight decay
    is when it is open is kept in the group, and so in the checkpoint.

    Args:
        trainer: the Trainer.
        phase: the phase that holds.
        optimizer: accelerate's wrapper around DeepSpeed's optimizer.
        scheduler: the Trainer's scheduler, which has one rule a group.
        step: optimizer steps done.
    """
    if not applies(trainer):
        return
    inner = innermost(optimizer)
    for place, group in enumerate(inner.param_groups):
        decay = group.setdefault("initial_weight_decay", group["weight_decay"])
        is_open = group["layer_group"] in phase.open
        group["weight_decay"] = decay if is_open else 0.0
        group["lr"] = scheduler.base_lrs[place] * scheduler.lr_lambdas[place](scheduler.last_epoch) if is_open else 0.0
    if step == phase.step:
        _empty_state(inner, phase.opened)


def innermost(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, Optimizer)
    return optimizer


def _empty_state(optimizer: Optimizer, opened: Collection[str]) -> None:
    """Set the optimizer's state of the groups `opened` to zero, in place: ZeRO keeps views of it."""
    for group in optimizer.param_groups:
        if group["layer_group"] in opened:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                for key, value in state.items():
                    if torch.is_tensor(value):
                        value.zero_()
                    elif isinstance(value, int | float):
                        state[key] = type(value)(0)
