"""A training that is killed from outside at a given moment, and the one that resumes it; run by `test_kills.py`."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState

from tests.resume_worker import Setting, anchoring, make, result, unfreezing
from tl_callbacks import at_steps, slanted_triangular

STEPS = 24
SAVE = 3
OPENINGS = [7, 8, 15]  # after a checkpoint, before one and at one
LONG = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVE}
SETTINGS: dict[str, Setting] = {
    "all together": Setting(
        lambda groups: [
            *unfreezing(at_steps(OPENINGS), rates="own")(groups),
            *anchoring(0.5, "penalty")(groups),
        ],
        decay=0.7,
        overrides={
            **LONG, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "eval_strategy": "steps", "eval_steps": 4,
        },
    ),
    "decoupled": Setting(
        lambda groups: [
            *unfreezing(at_steps(OPENINGS), rates=slanted_triangular())(groups),
            *anchoring(0.05, "decoupled")(groups),
        ],
        decay=0.8,
        overrides=LONG,
    ),
    "LoRA": Setting(
        lambda groups: [*unfreezing(at_steps([7, 15]))(groups), *anchoring(0.05, "decoupled")(groups)],
        lora=True,
        overrides={**LONG, "gradient_accumulation_steps": 2},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Moment:
    """When to be killed.

    Args:
        event: "step": at this step's begin, after what is due there; "running": likewise, but training goes on until
            the kill comes; or what of a checkpoint is written: "half weights", "weights", "optimizer", "random states",
            "half state"; or "half random states" on the last rank, when all others have finished theirs.
        step: optimizer steps done, or the checkpoint's number.
    """

    event: str
    step: int


class Watch(TrainerCallback):
    """Notes where the training began, and says when the moment is there."""

    def __init__(self, folder: Path, moment: Moment | None) -> None:
        self.folder = folder
        self.moment = moment
        self.began: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.moment in (Moment("step", state.global_step), Moment("running", state.global_step)):
            reached(self.folder)
            if self.moment.event == "step":
                hold()


def reached(folder: Path) -> None:
    """Say that this rank is where it is to be killed."""
    (folder / f"reached.{rank()}").touch()


def hold() -> None:
    """Wait to be killed."""
    time.sleep(300)
    raise TimeoutError("was not killed")


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def cut(path: Path) -> None:
    """Leave the first half of a file, as a write that was interrupted does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def hold_in_saving(trainer: Trainer, folder: Path, moment: Moment) -> None:
    """Make the trainer wait in the midst of a checkpoint."""
    checkpoint = folder / f"checkpoint-{moment.step}"
    save_optimizer, save_random = trainer._save_optimizer_and_scheduler, trainer._save_rng_state
    save_state = TrainerState.save_to_json
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1

    def at(*events: str) -> bool:
        return moment.event in events and trainer.state.global_step == moment.step

    def now() -> None:
        reached(folder)
        hold()

    def optimizer(output_dir: str) -> None:
        if at("half weights", "weights"):
            if moment.event == "half weights" and rank() == 0:
                cut(next(checkpoint.glob("*model.safetensors")))
            now()
        save_optimizer(output_dir)

    def random_states(output_dir: str) -> None:
        if at("optimizer"):
            now()
        save_random(output_dir)
        if at("half random states") and rank() == last:
            cut(next(checkpoint.glob(f"rng_state*{rank() or ''}.pth")))
            now()
        if at("random states"):
            now()

    def state(self: TrainerState, path: str) -> None:
        save_state(self, path)
        if at("half state"):
            cut(Path(path))
            now()

    trainer._save_optimizer_and_scheduler = optimizer  # type: ignore[method-assign]
    trainer._save_rng_state = random_states  # type: ignore[method-assign]
    TrainerState.save_to_json = state  # type: ignore[method-assign]  # the Trainer makes its state anew in train()


def train(
    folder: Path, name: str, moment: Moment | None = None, resume: bool = False, overrides: dict[str, Any] | None = None
) -> None:
    """Train a setting to its end, which a rank with a moment never comes to."""
    trainer = make(folder, SETTINGS[name], **(overrides or {}))
    watch = Watch(folder, moment)
    trainer.add_callback(watch)
    if moment is not None:
        hold_in_saving(trainer, folder, moment)
    trainer.train(resume_from_checkpoint=resume)
    if moment is not None:
        hold()
    assert trainer.lr_scheduler is not None
    found = {**result(trainer), "began": watch.began, "scheduler": trainer.lr_scheduler.state_dict()}
    torch.save(found, folder / f"result.{rank()}.pt")
