"""Trains sentence-transformers' trainer on the ranks that launched it, and writes what each rank had at the end.

Launched by `test_ranks.py`, with torch.distributed.run for two ranks and without for one:
`python ranks.py <folder> <layout>`.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from tests.trainers.words import Steps, bert_folder, texts
from tl_callbacks import GradualUnfreezing, at_steps, attach, group_layers
from tl_callbacks.losses import loss_parameters
from tl_callbacks.unfreezing import callback
from tl_callbacks.unfreezing.reducer import rebuild_reducer

OPENINGS = [2, 4, 5]
ROWS = 64


def data(loss: str) -> Any:
    columns = {"a": texts(ROWS, seed=1), "b": texts(ROWS, seed=2)}
    labels = [number % 3 for number in range(ROWS)]
    if loss == "several":
        return {name: Dataset.from_dict({**columns, "label": labels}) for name in ("one", "other")}
    return Dataset.from_dict(columns if loss == "ranking" else {**columns, "label": labels})


def run(
    folder: Path,
    encoder: str,
    ranks: int,
    loss: str,
    *,
    ours: bool = True,
    seed: int = 0,
    rebuild: Callable[[Any], None] = rebuild_reducer,
) -> dict[str, Any]:
    """Train in double precision, with the same global batches on any number of ranks; return what this rank had."""
    model = SentenceTransformer(modules=[Transformer(encoder), Pooling(16)]).double()

    def softmax(number: int) -> losses.SoftmaxLoss:
        torch.manual_seed(seed + number)
        return losses.SoftmaxLoss(model, 16, num_labels=3).double()

    args = SentenceTransformerTrainingArguments(
        str(folder / "run"), per_device_train_batch_size=8 // ranks, learning_rate=1e-3, max_steps=8, logging_steps=2,
        max_grad_norm=0.05, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, log_level="error",
        dataloader_pin_memory=False,
    )  # fmt: skip
    made = {"one": softmax(1), "other": softmax(2)} if loss == "several" else softmax(1)
    if loss == "ranking":
        made = losses.MultipleNegativesRankingLoss(model)
    groups = group_layers(model)
    steps = Steps(model)
    callbacks = [GradualUnfreezing(groups, at_steps(OPENINGS))] if ours else []
    trainer = SentenceTransformerTrainer(
        model, args, train_dataset=data(loss), loss=made, callbacks=[*callbacks, steps]
    )
    start = {name: p.detach().clone() for name, p in loss_parameters(trainer).items()}
    callback.rebuild_reducer = rebuild
    if ours:
        attach(trainer, verify_ranks=0)  # the cells without a remedy are to drift apart, not to stop
    trainer.train()
    callback.rebuild_reducer = rebuild_reducer
    weights = {name: p.detach().clone() for name, p in loss_parameters(trainer).items()}
    return {
        "model": steps.states, "loss": weights, "loss start": start, "groups": groups.to_json(),
        "wrapper": type(trainer.model_wrapped).__name__,
    }  # fmt: skip


def main(folder: Path) -> None:
    """Run all cells."""
    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    encoder = bert_folder(
        folder / f"encoder.{rank}", dropout=0.0
    )  # while no process group keeps other ranks from saving
    cells: dict[str, dict[str, Any]] = {
        "ranking": {"loss": "ranking"},
        "ranking, no rebuild": {"loss": "ranking", "rebuild": lambda wrapper: None},
        "weights": {"loss": "softmax"},
        "weights, another start on each rank": {"loss": "softmax", "seed": 10 * rank},
        "weights, plain": {"loss": "softmax", "ours": False},
        "several": {"loss": "several"},
    }
    for name, cell in cells.items():
        torch.save(run(folder / "runs" / f"{name}.{rank}", encoder, ranks, **cell), folder / f"{name}.{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
