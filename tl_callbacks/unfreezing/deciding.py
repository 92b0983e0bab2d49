"""How a plan that the run's record decides is made anew: when there is something new, and alike on all ranks."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerState, TrainingArguments

from tl_callbacks.names import closest
from tl_callbacks.unfreezing.adaptive import GRADIENT, History, ProbeSchedule
from tl_callbacks.unfreezing.gradients import GradientMeter
from tl_callbacks.unfreezing.plan import UnfreezePlan, steps_per_epoch

if TYPE_CHECKING:
    from tl_callbacks.unfreezing.callback import GradualUnfreezing


def plan_now(
    callback: "GradualUnfreezing", args: TrainingArguments, state: TrainerState, dataloader: Any
) -> UnfreezePlan:
    """Return the plan that the record up to the present gives; the first rank's, where it decides.

    Metrics are the same on all ranks as a rule, but a `compute_metrics` may do otherwise, and the checkpoint keeps the
    record of the first.
    """
    plan = callback.plan(
        state.max_steps, steps_per_epoch(dataloader, args), history=state.log_history, step=state.global_step
    )
    if plan.decided is None or args.world_size == 1:
        return plan
    shared = [plan]
    dist.broadcast_object_list(shared)
    return shared[0]


def anything_new(callback: "GradualUnfreezing", plan: UnfreezePlan, state: TrainerState) -> bool:
    """Return whether the plan may change at this step: after an evaluation, and after gradients were measured.

    Raises:
        ValueError: evaluations do not log the schedule's metric.
    """
    if not isinstance(callback.schedule, ProbeSchedule):
        return False
    step, metric = state.global_step, callback.schedule.metric
    latest = _logged_at(state.log_history, step)
    if any(key.startswith("eval_") for key in latest) and not callback.schedule.values(state.log_history):
        raise ValueError(
            f"{callback.schedule!r} reads `{metric}`, which the evaluation at step {step} did not log. Closest keys: "
            f"{closest(metric, latest)}. Name one of them, or give the Trainer what computes it (compute_metrics, or "
            "the callback that logs it)."
        )
    return metric in latest or step - 1 in plan.measured


def _logged_at(history: History, step: int) -> dict[str, Any]:
    """Return what was logged at a step, which is at the end of the history."""
    found: dict[str, Any] = {}
    for entry in reversed(history):
        if int(entry.get("step", step)) != step:
            break
        found |= entry
    return found


def meter(callback: "GradualUnfreezing", model: nn.Module, opened: tuple[str, ...]) -> GradientMeter:
    """Return what measures the gradients of the groups that may still open in the step that begins."""
    return GradientMeter(model, [name for names in _waiting(callback, opened).values() for name in names])


def relative_norms(
    callback: "GradualUnfreezing", measuring: GradientMeter, opened: tuple[str, ...], optimizer: Any
) -> dict[str, float]:
    """Return what a step has measured as it is logged. Call it on all ranks."""
    scaler = getattr(optimizer, "scaler", None)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    norms = measuring.relative_norms(_waiting(callback, opened), loss_scale=scale)
    return {f"{GRADIENT}{name}": norm for name, norm in norms.items()}


def _waiting(callback: "GradualUnfreezing", opened: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    closed = {*opened, *callback.keep_frozen}
    return {group.name: group.parameters for group in callback.groups if group.name not in closed}
