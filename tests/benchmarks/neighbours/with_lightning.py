"""Cells of Lightning: `BackboneFinetuning`, `BaseFinetuning` and finetuning-scheduler, set up as their pages say."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from finetuning_scheduler import FinetuningScheduler
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, Callback
from torch.utils.data import DataLoader

from tests.benchmarks.neighbours.script import BATCH, PHASES, RANKS, RATE, Record, rows


class Module(lightning.LightningModule):
    """The model for Lightning. The optimizer holds what is trainable when it is made, as `BaseFinetuning` asks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def backbone(self) -> torch.nn.Module:
        """What `BackboneFinetuning` freezes."""
        return self.model.bert

    def training_step(self, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, torch.Tensor], number: int) -> None:
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = filter(lambda parameter: parameter.requires_grad, self.parameters())
        return torch.optim.AdamW(trainable, RATE, weight_decay=0.0)


class PhaseByPhase(BaseFinetuning):
    """A user's own `BaseFinetuning`, with the same phases."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.model.bert])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        bert = pl_module.model.bert
        opened = {1: [bert.pooler, bert.encoder], 2: [bert.embeddings]}.get(epoch)
        if opened:
            self.unfreeze_and_add_param_group(opened, optimizer, lr=RATE, initial_denom_lr=1)


def schedule() -> dict[int, dict[str, Any]]:
    """An explicit schedule: a phase an epoch, all at the one rate."""
    phases: dict[int, dict[str, Any]] = {}
    for number, prefixes in enumerate(PHASES):
        params = [rf"model\.{prefix}\..*" for prefix in prefixes]
        phases[number] = {"params": params, "lr": RATE, "max_transition_epoch": number + 1}
    return phases


@dataclass(frozen=True)
class Cell:
    """One training: the callback and Lightning's name of the strategy."""

    callback: Callable[[], Callback]
    strategy: str


def backbone() -> Callback:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1)


def scheduler() -> Callback:
    return FinetuningScheduler(schedule())


def scheduler_without_restoring() -> Callback:
    return FinetuningScheduler(schedule(), restore_best=False, epoch_transitions_only=True)


CALLBACKS = {
    "finetuning-scheduler": scheduler,
    "finetuning-scheduler, restore_best=False, epoch_transitions_only": scheduler_without_restoring,
    "BackboneFinetuning": backbone,
    "BaseFinetuning": PhaseByPhase,
}
CELLS = {
    f"{name}, {strategy}": Cell(callback, strategy)
    for name, callback in CALLBACKS.items()
    for strategy in ("ddp", "ddp_find_unused_parameters_true")
}


class Witness(Callback):
    """Records each step."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.record.step()


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}


def train(name: str, model: Any, record: Record, seed: int, folder: Path) -> None:
    """Train one cell on this rank."""
    cell, data = CELLS[name], rows(seed)
    lightning.seed_everything(seed, verbose=False)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=RANKS, strategy=cell.strategy, max_epochs=len(PHASES), logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0,
        callbacks=[cell.callback(), Witness(record)],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(
            Module(model),
            DataLoader(data, batch_size=BATCH, collate_fn=collate),
            DataLoader(data[: BATCH * RANKS], batch_size=BATCH, collate_fn=collate),
        )
