"""fp16 training with a gradient scaler on a CPU.

Accelerate makes the scaler for accelerators alone; torch has one for the CPU. With it in place, accelerate's and the
Trainer's own code scales the loss, unscales before clipping, skips steps and saves the scale.
"""

from collections.abc import Collection
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import nn
from transformers import Trainer, TrainingArguments

from tests import tiny


class Overflowing(Trainer):
    """A Trainer whose loss, and with it every gradient, is infinite at the given steps."""

    overflows: Collection[int] = ()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * float("inf") if model.training and self.state.global_step in self.overflows else loss


def trainer(
    model: nn.Module,
    args: TrainingArguments,
    *,
    half: bool = True,
    overflows: Collection[int] = (),
    scale: float = 2.0**10,
    growth_interval: int = 3,
    **kwargs: Any,
) -> Overflowing:
    """A Trainer with a gradient scaler if the mixed precision is fp16, without if not.

    Args:
        model: the model.
        args: the arguments; with `fp16=True`.
        half: whether the forward computes in float16; if not, all but the scale is as without fp16.
        overflows: steps at which the loss is infinite.
        scale: the loss scale at the start.
        growth_interval: steps without overflow after which the scale doubles.
        kwargs: of the Trainer.
    """
    made = Overflowing(model, args, train_dataset=tiny.texts(), **kwargs)
    made.overflows = overflows
    if made.accelerator.mixed_precision == "fp16":
        made.accelerator.native_amp = True
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
        made.accelerator.autocast_handler = AutocastKwargs(enabled=half)
    return made
