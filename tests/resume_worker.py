"""What is trained and resumed, and a script that trains it until it is killed from outside.

`python resume_worker.py <folder> straight | resume | hold-at-step:<n> | hold-in-saving:<n>`. Where it holds, it touches
`<folder>/holding` and sleeps.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from tests import tiny
from tests.forgetting import memory
from tl_callbacks import (
    GradualUnfreezing,
    LayerGroups,
    RepresentationProbes,
    WeightAnchoring,
    at_fractions,
    at_steps,
    attach,
    group_layers,
    layerwise_optimizer,
    per_epoch,
    schedule_from_probes,
    slanted_triangular,
    staged,
)
from tl_callbacks.anchoring import Decoupled, Penalty, sigmoid_annealing

STEPS = 12
HOLDING = "holding"
RESULT = "result.pt"


@dataclass(frozen=True)
class Setting:
    """Callbacks, and the checkpoints to resume from: each opening and the steps around it."""

    callbacks: Callable[[LayerGroups], list[TrainerCallback]]
    checkpoints: tuple[int, ...] = (3, 4, 5, 6, 8, 9, 10)
    decay: float | None = None
    lora: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)


def unfreezing(schedule: Any, **kwargs: Any) -> Callable[[LayerGroups], list[TrainerCallback]]:
    return lambda groups: [GradualUnfreezing(groups, schedule, **kwargs)]


def anchoring(strength: float, form: Any) -> Callable[[LayerGroups], list[TrainerCallback]]:
    return lambda groups: [WeightAnchoring(strength, form=form)]


def importance(groups: LayerGroups) -> dict[str, torch.Tensor]:
    """An importance of each weight, the same at each start."""
    model = tiny.bert(layers=2)
    generator = torch.Generator().manual_seed(4)
    return {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}


def probes(groups: LayerGroups) -> RepresentationProbes:
    return RepresentationProbes("eval", groups, reference_set=tiny.texts(20, seed=9))


EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}
OPENINGS = at_steps([4, 5, 9])
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
BY_GRADIENT = schedule_from_probes(threshold=0.5, max_wait=0.9, order="relative_gradient_norm", measured_steps=2)
SETTINGS: dict[str, Setting] = {
    "unfreezing": Setting(unfreezing(OPENINGS)),
    "own rates": Setting(unfreezing(OPENINGS, rates="own"), overrides={"lr_scheduler_type": "cosine"}),
    "slanted triangular": Setting(unfreezing(OPENINGS, rates=slanted_triangular())),
    "staged": Setting(unfreezing(staged([(0, 1), (4, 2, 1 / 3), (9, "all", 0.1)])), (3, 4, 5, 8, 9, 10)),
    "per epoch": Setting(unfreezing(per_epoch()), (2, 3, 4, 5, 6, 7, 8, 9, 10)),
    "fractions": Setting(unfreezing(at_fractions([0.3, 0.4, 0.75]))),
    # Evaluations open groups at 3, 5 and 7; or, by the gradients of steps 2 and 3, 5 and 6, at 4, 7 and 8.
    "plateau": Setting(
        unfreezing(schedule_from_probes(patience=2, threshold=0.5, max_wait=0.9), rates="own"),
        (2, 3, 4, 5, 6, 7, 8),
        overrides=EVALUATED,
    ),
    "relative gradient norm": Setting(
        unfreezing(BY_GRADIENT, rates=slanted_triangular()), (1, 2, 3, 4, 5, 6, 7, 8, 9), overrides=EVALUATED
    ),
    "keep frozen": Setting(unfreezing(at_steps([4, 5]), keep_frozen=["embeddings"]), (3, 4, 5, 6)),
    "decoupled": Setting(anchoring(0.05, "decoupled"), (1, 6, 11)),
    "penalty": Setting(anchoring(0.5, "penalty"), (1, 6, 11)),
    "mixout": Setting(
        anchoring(0.3, "mixout"), (1, 6, 11), overrides={"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    ),
    "annealed": Setting(anchoring(0.2, Decoupled(annealing=sigmoid_annealing(0.5, 0.5))), (1, 6, 11)),
    "EWC": Setting(lambda groups: [WeightAnchoring(5.0, form=Penalty(importance=importance(groups)))], (1, 6, 11)),
    "penalty, LoRA": Setting(anchoring(0.5, "penalty"), (1, 6, 11), lora=True),
    "decoupled, LoRA": Setting(anchoring(0.2, "decoupled"), (6,), lora=True),
    "features": Setting(anchoring(5.0, "features"), (1, 6, 11)),
    "outputs": Setting(anchoring(50.0, "outputs"), (1, 6, 11)),
    "all together": Setting(
        lambda groups: [
            *unfreezing(OPENINGS, rates="own")(groups),
            *anchoring(0.5, "penalty")(groups),
        ],
        decay=0.7,
        overrides={"gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "eval_strategy": "steps", "eval_steps": 2},
    ),
    "LoRA": Setting(unfreezing(at_steps([4, 9])), (3, 4, 5, 8, 9, 10), lora=True),
    "probes": Setting(lambda groups: [*unfreezing(OPENINGS)(groups), probes(groups)], (4, 5, 6), overrides=EVALUATION),
    "forgetting": Setting(
        lambda groups: [*unfreezing(OPENINGS)(groups), memory.monitor()], (4, 5, 6), overrides=EVALUATION
    ),
    "forgetting, LoRA": Setting(
        lambda groups: [*unfreezing(at_steps([4, 9]))(groups), memory.monitor()],
        (5, 6),
        lora=True,
        overrides=EVALUATION,
    ),
    "probes, LoRA": Setting(
        lambda groups: [*unfreezing(at_steps([4, 9]))(groups), probes(groups)], (5, 6), lora=True, overrides=EVALUATION
    ),
}
Regroup = Callable[[LayerGroups], LayerGroups]


def make(folder: Path, setting: Setting, *, regroup: Regroup = lambda groups: groups, **overrides: Any) -> Trainer:
    """A new model and an attached trainer, as each start of a user's script makes them; an epoch has 3 steps."""
    model: Any = tiny.bert(layers=2, dropout=0.1)
    if setting.lora:
        torch.manual_seed(0)
        config = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", lora_dropout=0.1)
        model = get_peft_model(model, config)
    args = tiny.arguments(folder, **{"logging_steps": 1, **setting.overrides, **overrides})
    groups = regroup(group_layers(model))
    kwargs: dict[str, Any] = {}
    if setting.decay is not None:
        kwargs["optimizer_cls_and_kwargs"] = layerwise_optimizer(args, groups, decay=setting.decay)
    rows = tiny.texts(12 * args.gradient_accumulation_steps)
    trainer = tiny.trainer(model, args, rows, callbacks=setting.callbacks(groups), **kwargs)
    attach(trainer)
    return trainer


def result(trainer: Trainer) -> dict[str, Any]:
    """What a resumed training must repeat."""
    assert trainer.model is not None
    assert trainer.optimizer is not None
    return {
        "weights": tiny.state(trainer.model),
        "optimizer": trainer.optimizer.state_dict(),
        "log_history": trainer.state.log_history,
    }


class Hold(TrainerCallback):
    """Sleeps at a step, after our callbacks did what is due there; notes where the training began."""

    def __init__(self, folder: Path, step: int | None) -> None:
        self.folder = folder
        self.step = step
        self.began: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            hold(self.folder)


def hold(folder: Path) -> None:
    """Say that the moment to be killed is here, and wait for it."""
    (folder / HOLDING).touch()
    time.sleep(300)
    raise TimeoutError("was not killed")


def main(folder: Path, mode: str) -> None:
    """Train with a checkpoint at every second step."""
    torch.set_num_threads(1)
    what, _, number = mode.partition(":")
    trainer = make(folder, SETTINGS["all together"], save_strategy="steps", save_steps=2)
    watch = Hold(folder, int(number) if what == "hold-at-step" else None)
    trainer.add_callback(watch)
    if what == "hold-in-saving":
        save = trainer._save_optimizer_and_scheduler  # model.safetensors is written before it, trainer_state.json after

        def save_or_hold(output_dir: str) -> None:
            if output_dir.endswith(f"checkpoint-{number}"):
                hold(folder)
            save(output_dir)

        trainer._save_optimizer_and_scheduler = save_or_hold
    trainer.train(resume_from_checkpoint=what == "resume")
    torch.save({**result(trainer), "began": watch.began}, folder / RESULT)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
