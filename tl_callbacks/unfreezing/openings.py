"""What a run records of its openings, once each, so that a resumed run writes the same."""

from typing import TYPE_CHECKING

from torch import nn
from transformers import TrainerState

from tl_callbacks import events
from tl_callbacks.unfreezing.plan import Phase

if TYPE_CHECKING:
    from tl_callbacks.unfreezing.callback import GradualUnfreezing

EVENT = "opening"


def opened(state: TrainerState) -> list[str]:
    """Return the names of the groups whose opening is recorded, in the order of the openings."""
    return [name for event in events.read(state.log_history, EVENT) for name in event["groups"]]


def record(callback: "GradualUnfreezing", model: nn.Module, phase: Phase, state: TrainerState) -> None:
    """Record that a phase began, if what it opened and its factor are not recorded yet, and why, if the run decided."""
    recorded = events.read(state.log_history, EVENT)
    before = set(opened(state))
    if set(phase.open) == before and phase.factor == recorded[-1]["factor"]:
        return
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    events.emit(
        state.log_history,
        EVENT,
        step=state.global_step,
        groups=[name for name in phase.open if name not in before],
        trainable_parameters=trainable,
        factor=phase.factor,
        max_steps=state.max_steps,
        **({"decision": dict(phase.reason)} if phase.reason else {}),
    )
    # Reporters see what is logged, and of that numbers only.
    callback.log({"tl/unfreezing/open_groups": len(phase.open), "tl/unfreezing/trainable_parameters": trainable}, state)
