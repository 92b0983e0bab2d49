"""Trains every DeepSpeed cell on the ranks that launched it, and writes what each rank saw: one file per cell and rank.

Launched by `test_deepspeed.py` with torch.distributed.run, and alone for the same trainings without DeepSpeed:
`python deepspeed_worker.py <folder>`.
"""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.optim import SGD
from transformers import Trainer, TrainerCallback

from tests import tiny
from tests.distributed.deepspeed_cells import CELLS, GRADUAL, HOLD, OWN, PLAIN, STEPS, TWO, Cell, Hold
from tests.distributed.worker import Callbacks, StopAt, Witness
from tl_callbacks import (
    PreflightError,
    WeightAnchoring,
    attach,
    events,
    group_layers,
    layerwise_optimizer,
)
from tl_callbacks.frozen.eval_mode import frozen_modules
from tl_callbacks.recorder import RECIPE_NAME
from tl_callbacks.unfreezing import rate_frozen


class States(TrainerCallback):
    """Records after each step what the optimizer and the modules hold of the frozen groups and the others.

    `largest`: the largest number in the optimizer's state of each layer group, its count left out. `training`: whether
    any frozen module was in training mode, and whether the head was.
    """

    def __init__(self) -> None:
        self.largest: list[dict[str, float]] = []
        self.training: list[tuple[bool, bool]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        inner = rate_frozen.innermost(kwargs["optimizer"])
        found: dict[str, float] = {}
        for group in inner.param_groups:
            values = [v for p in group["params"] for k, v in inner.state.get(p, {}).items() if k != "step"]
            tensors = [float(value.abs().max()) for value in values if torch.is_tensor(value)]
            name = group.get("layer_group", "")
            found[name] = max([found.get(name, 0.0), *tensors])
        self.largest.append(found)
        model = kwargs["model"]
        self.training.append((any(module.training for module in frozen_modules(model)), model.classifier.training))


def make(
    folder: Path, cell: Cell, ranks: int, *, dropout: float = 0.0, config: dict[str, Any] | None = None, **more: Any
) -> tuple[Trainer, Witness, States]:
    """A trainer whose per-device batch shrinks with the number of ranks, so that the global batches stay the same."""
    kwargs: dict[str, Any] = {}
    overrides: dict[str, Any] = {
        "max_steps": STEPS,
        "max_grad_norm": 0.05,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 8 // ranks,
        **cell.overrides,
        **more,
    }
    if cell.zero is not None:
        auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config = {**dict.fromkeys((*auto, "gradient_clipping"), "auto"), **(config or {})}
        # DeepSpeed's own Adam for offloading is compiled when it is first used; torch's steps on a CPU as well.
        config |= {"zero_optimization": dict(cell.zero), "zero_force_ds_cpu_optimizer": False}
        overrides |= {"deepspeed": config, "use_cpu": False}
    args = tiny.arguments(folder, **overrides)
    model: Any = tiny.bert(layers=2, dropout=dropout)
    groups = group_layers(model)
    witness = Witness(groups)
    states = States()
    callbacks = [*cell.callbacks(groups, ranks), witness, states]
    kwargs["optimizer_cls_and_kwargs"] = layerwise_optimizer(args, groups, decay=cell.decay)
    return tiny.trainer(model, args, tiny.texts(16 * STEPS), callbacks=callbacks, **kwargs), witness, states


@contextmanager
def holding(hold: Hold) -> Iterator[None]:
    """Let the callback hold frozen groups with another function."""
    rate_frozen.hold = hold
    try:
        yield
    finally:
        rate_frozen.hold = HOLD


def facts(trainer: Trainer, witness: Witness, states: States, start: dict[str, torch.Tensor]) -> dict[str, Any]:
    assert trainer.model is not None
    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):  # does something under ZeRO-3 only
        end = tiny.state(trainer.model)
    recipe = json.loads((Path(str(trainer.args.output_dir)) / RECIPE_NAME).read_text())
    return {
        "start": start,
        "end": end,
        "hashes": witness.hashes,
        "trainable": witness.trainable,
        "states": states.largest,
        "training": states.training,
        "events": events.read(trainer.state.log_history, "opening"),
        "rates": [entry for entry in trainer.state.log_history if "tl/rate/head" in entry],
        "optimizer": type(rate_frozen.innermost(trainer.optimizer)).__name__,
        "wrapper": type(trainer.model_wrapped).__name__,
        "methods": recipe["methods"],
    }


def run(cell: Cell, folder: Path, ranks: int) -> dict[str, Any]:
    """Train one cell and return what this rank saw."""
    trainer, witness, states = make(folder, cell, ranks)
    assert trainer.model is not None
    start = tiny.state(trainer.model)
    attach(trainer)
    with holding(cell.hold):
        trainer.train()
    return facts(trainer, witness, states, start)


def resume(folder: Path, ranks: int, stage: int) -> dict[str, Any]:
    """Train straight; stop at checkpoint 6 and resume; and resume from the checkpoints around an opening."""

    def train(name: str, source: str | bool | None, *, stop: int | None = None, save: int = 1) -> dict[str, Any]:
        callbacks: Callbacks = lambda g, n: [*OWN(g, n), *([StopAt(stop)] if stop else [])]  # noqa: E731
        cell = Cell({"stage": stage}, callbacks, decay=0.7)
        trainer, witness, states = make(
            folder / name, cell, ranks, dropout=0.1, save_strategy="steps", save_steps=save, logging_steps=1
        )
        assert trainer.model is not None
        start = tiny.state(trainer.model)
        attach(trainer)
        trainer.train(resume_from_checkpoint=source)
        torch.distributed.barrier()
        return facts(trainer, witness, states, start)

    found = {"straight": train("straight", None)}
    found["stopped"] = train("stopped", None, stop=6, save=6)
    found["resumed from 6"] = train("stopped", True, save=6)
    for step in (2, 3, 4, 5, 7):
        found[f"resumed from {step}"] = train(f"from-{step}", str(folder / "straight" / f"checkpoint-{step}"), save=12)
    return found


def refusals(folder: Path, ranks: int) -> dict[str, str]:
    """What `attach` says of set-ups that cannot work, by name; empty where it takes them."""
    adamw = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
    anchor: Callbacks = lambda g, n: [WeightAnchoring(0.1)]  # noqa: E731
    setups: dict[str, tuple[Cell, dict[str, Any]]] = {
        "unfreezing under ZeRO-3": (Cell({"stage": 3}, GRADUAL), {}),
        "unfreezing with Adafactor": (Cell(TWO, GRADUAL, {"optim": "adafactor"}), {}),
        "rates with Adafactor": (Cell(TWO, overrides={"optim": "adafactor"}, decay=0.5), {}),
        "Adagrad": (Cell(TWO, overrides={"optim": "adagrad"}, decay=0.5), {}),
        "anchoring": (Cell(TWO, anchor), {}),
        "an optimizer in the config": (Cell(TWO, decay=0.5), {"optimizer": adamw}),
        "a scheduler in the config": (Cell(TWO, decay=0.5), {"scheduler": warmup}),
        "a scheduler in the config and one rate": (Cell(TWO), {"scheduler": warmup}),
        "unfreezing and a scheduler in the config": (Cell(TWO, GRADUAL), {"scheduler": warmup}),
    }
    found = {}
    for name, (cell, config) in setups.items():
        trainer, _, _ = make(folder / name, cell, ranks, config=config)
        found[name] = finding(trainer)
    trainer, _, _ = make(folder / "given", Cell(TWO, GRADUAL), ranks)
    assert trainer.model is not None
    trainer.optimizer, trainer.optimizer_cls_and_kwargs = SGD(trainer.model.parameters(), lr=0.1), None
    found["a given optimizer"] = finding(trainer)
    return found


def finding(trainer: Trainer) -> str:
    """The text of `attach`'s error, empty if there is none."""
    try:
        attach(trainer)
    except PreflightError as error:
        return str(error)
    return ""


def section_alone(folder: Path, ranks: int) -> dict[str, Any]:
    """Train with the config's own optimizer and none of ours: nothing is refused, and nothing is said of rates."""
    adamw = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
    trainer, _, _ = make(folder, Cell(TWO), ranks, config={"optimizer": adamw}, max_steps=2, logging_steps=1)
    trainer.optimizer_cls_and_kwargs = None
    attach(trainer)
    trainer.train()
    recipe = json.loads((folder / RECIPE_NAME).read_text())
    return {"methods": recipe["methods"], "groups": recipe["groups"], "steps": trainer.state.global_step}


def unattached(folder: Path, ranks: int) -> str:
    """Train without `attach`, and return the error."""
    trainer, _, _ = make(folder, Cell(TWO, GRADUAL), ranks)
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    return ""


def on_a_cpu() -> None:
    """Let accelerate set up DeepSpeed's processes on a CPU, for which it knows no backend."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    # It would compile an all-reduce over shared memory. `deepspeed.comm.torch` is torch itself, not that module.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def main(folder: Path) -> None:
    """Run all cells of this world size."""
    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        for name, cell in PLAIN.items():
            torch.save(run(cell, folder / "runs" / name, 1), folder / f"{name}.0.pt")
        return
    on_a_cpu()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, cell in CELLS.items():
        torch.save(run(cell, folder / "runs" / name, ranks), folder / f"{name}.{rank}.pt")
    for stage in (0, 1, 2):
        torch.save(resume(folder / "runs" / f"resume-{stage}", ranks, stage), folder / f"resume-{stage}.{rank}.pt")
    for what in (refusals, section_alone, unattached):
        torch.save(what(folder / "runs" / what.__name__, ranks), folder / f"{what.__name__}.{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
