"""Takes one optimizer step a cell on the ranks that launched it, and writes what the first rank saw as JSON.

Launched by `test_loss_scale.py` with torch.distributed.run: `python -m tests.loss_scale_worker <file>`.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from tests import tiny
from tl_callbacks.loss_scale import loss_scale_caution

ROWS = 16
# accumulation steps, average_tokens_across_devices, and what is set on model and trainer
CELLS: dict[str, tuple[int, bool, dict[str, Any], dict[str, Any]]] = {
    "processes": (1, True, {}, {}),
    "both": (2, True, {}, {}),
    "accumulation": (2, False, {}, {}),
    "neither": (1, False, {}, {}),
    "divided": (2, True, {}, {"loss_is_scaled_for_ga": False}),
    "set on the model": (2, True, {"accepts_loss_kwargs": False}, {}),
    "set on the trainer": (2, True, {}, {"model_accepts_loss_kwargs": False}),
    "set too late": (2, True, {"late": False}, {}),
}


class Gradient(TrainerCallback):
    """Keeps the gradient of the last step, all parameters in one vector."""

    vector: torch.Tensor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.vector = torch.cat([p.grad.flatten() for p in kwargs["model"].parameters() if p.grad is not None]).clone()


def stepped(
    model: nn.Module, rows: list[dict[str, Any]], accumulation: int, *, ranks: int = 1, average: bool = True,
    on_model: dict[str, Any] | None = None, on_trainer: dict[str, Any] | None = None, **given: Any,
) -> tuple[Trainer, str | None, torch.Tensor]:  # fmt: skip
    """Train one step over all rows, without dropout; return the trainer, the caution before, and the gradient."""
    on_model = on_model or {}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in on_model.keys() - {"late"}:
        setattr(model, name, on_model[name])
    gradient = Gradient()
    with tempfile.TemporaryDirectory() as folder:
        args = tiny.arguments(
            folder, per_device_train_batch_size=len(rows) // ranks // accumulation, max_steps=1, logging_steps=1,
            gradient_accumulation_steps=accumulation, max_grad_norm=0.0, average_tokens_across_devices=average,
            optim="sgd", learning_rate=0.0, per_device_eval_batch_size=len(rows), **given.pop("arguments", {}),
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=[gradient], **given)
        for name, value in (on_trainer or {}).items():
            setattr(trainer, name, value)
        if "late" in on_model:
            model.accepts_loss_kwargs = on_model["late"]  # type: ignore[assignment]
        caution = loss_scale_caution(trainer)
        trainer.train()
        trainer.evaluate()
    return trainer, caution, gradient.vector


def logged(trainer: Trainer, name: str) -> float:
    """The one value that was logged under a name."""
    (value,) = (entry[name] for entry in trainer.state.log_history if name in entry)
    return float(value)


def main(file: Path) -> None:
    """Write the gradient, the losses that were logged and the caution, by cell."""
    found = {}
    for name, (accumulation, average, on_model, on_trainer) in CELLS.items():
        trainer, caution, gradient = stepped(
            plain_bert(), tiny.texts(ROWS), accumulation, ranks=2, average=average, on_model=on_model,
            on_trainer=on_trainer,
        )  # fmt: skip
        found[name] = {
            "gradient": gradient.tolist(),
            "loss": logged(trainer, "loss"),
            "eval_loss": logged(trainer, "eval_loss"),
            "caution": caution,
        }
    if trainer.is_world_process_zero():
        file.write_text(json.dumps(found))


def plain_bert() -> nn.Module:
    """A BERT classifier as transformers makes it."""
    model = tiny.bert(dropout=0.0)
    del model.accepts_loss_kwargs
    return model


if __name__ == "__main__":
    main(Path(sys.argv[1]))
