"""Cells of the Hugging Face Trainer: callbacks as they are often written, and ours."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.benchmarks.neighbours.script import BATCH, PHASES, RATE, STEPS_PER_EPOCH, Record, in_phase, rows
from tl_callbacks import GradualUnfreezing, attach, group_layers, staged


class FrozenBefore(TrainerCallback):
    """Freezes when it is made, so before the Trainer is, and opens a phase at each epoch: nothing else."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.freeze()

    def freeze(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = in_phase(name, 0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phase = round(state.epoch)
        if phase:
            opened = [p for name, p in self.model.named_parameters() if in_phase(name, phase)]
            for parameter in opened:
                parameter.requires_grad = True
            self.opened(opened, **kwargs)

    def opened(self, parameters: list[nn.Parameter], **kwargs: Any) -> None:
        """For what the next ones add."""


class GroupAdded(FrozenBefore):
    """Adds what it opens to the optimizer."""

    def opened(self, parameters: list[nn.Parameter], *, optimizer: Any, **kwargs: Any) -> None:
        optimizer.add_param_group({"params": parameters, "lr": RATE})


class GroupAndRateAdded(FrozenBefore):
    """Adds what it opens to the optimizer, and a rate for it to the scheduler."""

    def opened(self, parameters: list[nn.Parameter], *, optimizer: Any, lr_scheduler: Any, **kwargs: Any) -> None:
        optimizer.add_param_group({"params": parameters, "lr": RATE, "initial_lr": RATE})
        lr_scheduler.base_lrs.append(RATE)
        lr_scheduler.lr_lambdas.append(lr_scheduler.lr_lambdas[0])


class FrozenAtTrainBegin(FrozenBefore):
    """Freezes when training begins: the optimizer and DDP know all parameters by then."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.freeze()


def ours(model: nn.Module) -> GradualUnfreezing:
    """The same schedule by this package: 1 group, then 3, then all."""
    stages = [(0, 1), (STEPS_PER_EPOCH, 3), (2 * STEPS_PER_EPOCH, "all")]
    return GradualUnfreezing(group_layers(model), staged(stages))


CHECKPOINTING = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}


@dataclass(frozen=True)
class Cell:
    """One training.

    Args:
        callback: from the model.
        arguments: training arguments.
        all_in_optimizer: whether the script gives the Trainer an optimizer over all parameters.
        attached: whether `attach` is called.
    """

    callback: Callable[[nn.Module], TrainerCallback]
    arguments: dict[str, Any] = field(default_factory=dict)
    all_in_optimizer: bool = False
    attached: bool = False


CELLS = {
    "naive, frozen before train()": Cell(FrozenBefore),
    "naive, frozen before train(), groups added": Cell(GroupAdded),
    "naive, frozen before train(), groups and rates added": Cell(GroupAndRateAdded),
    "naive, frozen before train(), optimizer over all parameters": Cell(FrozenBefore, all_in_optimizer=True),
    "naive, frozen in on_train_begin": Cell(FrozenAtTrainBegin),
    "naive, frozen in on_train_begin, ddp_find_unused_parameters=False": Cell(
        FrozenAtTrainBegin, {"ddp_find_unused_parameters": False}
    ),
    "naive, frozen in on_train_begin, activation checkpointing": Cell(FrozenAtTrainBegin, CHECKPOINTING),
    "ours": Cell(ours, attached=True),
    "ours, ddp_find_unused_parameters=False": Cell(ours, {"ddp_find_unused_parameters": False}, attached=True),
    "ours, activation checkpointing": Cell(ours, CHECKPOINTING, attached=True),
}


class Witness(TrainerCallback):
    """Records each step, after the others."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.record.step()


def train(name: str, model: Any, record: Record, seed: int, folder: Path) -> None:
    """Train one cell on this rank."""
    cell = CELLS[name]
    args = TrainingArguments(
        str(folder), num_train_epochs=len(PHASES), per_device_train_batch_size=BATCH, learning_rate=RATE,
        lr_scheduler_type="constant", weight_decay=0.0, train_sampling_strategy="sequential", seed=seed,
        save_strategy="no", logging_steps=1000, report_to="none", use_cpu=True, disable_tqdm=True, log_level="error",
        dataloader_pin_memory=False, **cell.arguments,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0) if cell.all_in_optimizer else None
    trainer = Trainer(
        model, args, train_dataset=rows(seed), callbacks=[cell.callback(model), Witness(record)],
        optimizers=(optimizer, None),
    )  # fmt: skip
    if cell.attached:
        attach(trainer)
    trainer.train()
