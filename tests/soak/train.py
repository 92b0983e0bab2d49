"""One training of a run, in each of its ranks: straight, interrupted or resumed."""

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests import tiny
from tests.families import FAMILIES
from tests.kill_worker import hold, reached
from tests.soak.draw import Draw
from tests.soak.witness import Witness, hooks
from tl_callbacks import (
    GradualUnfreezing,
    LayerGroups,
    WeightAnchoring,
    attach,
    group_layers,
    layerwise_optimizer,
    slanted_triangular,
)
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.unfreezing import callback


class Interrupt(TrainerCallback):
    """Ends a training before its time."""

    def __init__(self, run: Draw, folder: Path) -> None:
        self.run = run
        self.folder = folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.run.at:
            if self.run.interruption == "error":
                raise KeyboardInterrupt
            if self.run.interruption == "kill":
                reached(self.folder)
                hold()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run.interruption == "stop" and state.global_step == self.run.at:
            control.should_training_stop = True


class Nudge(TrainerCallback):
    """A planted defect: moves the lowest group in the second step."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.parameter.data.flatten()[0] += 1e-6


class LeaveHook(TrainerCallback):
    """A planted defect: a hook that stays."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(lambda module, inputs: None)


class KeepFrozen(TrainerCallback):
    """A planted defect: what should be trainable again is not."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        next(kwargs["model"].parameters()).requires_grad_(False)


class Reseed(TrainerCallback):
    """A planted defect: random numbers that depend on where the training began."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(self.began)


PLANTS = (
    "no rebuild", "no eval mode", "opens late", "frozen weight moved", "hook left", "left frozen",
    "other random numbers",
)  # fmt: skip


def build(run: Draw) -> nn.Module:
    """A new model, the same one each time."""
    family = FAMILIES[run.family]
    model: Any = family.build()
    if run.lora:
        assert family.lora
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, **family.lora))
    return model  # type: ignore[no-any-return]


def methods(run: Draw, groups: LayerGroups) -> list[TrainerCallback]:
    """Our callbacks."""
    rates: Any = slanted_triangular() if run.rates == "slanted_triangular" else run.rates
    found: list[TrainerCallback] = [GradualUnfreezing(groups, run.unfreeze_schedule(), rates=rates)]
    if run.anchor is not None:
        found.append(WeightAnchoring(run.strength, form=run.anchor, groups=groups))  # type: ignore[arg-type]
    return found


def make(
    run: Draw, model: nn.Module, args: TrainingArguments, callbacks: list[TrainerCallback], **kwargs: Any
) -> Trainer:
    """A Trainer with the run's rows."""
    family = FAMILIES[run.family]
    rows = list(itertools.islice(itertools.cycle(family.rows()), run.rows))
    return Trainer(model, args, train_dataset=rows, data_collator=family.collate, callbacks=callbacks, **kwargs)


def plain_leftovers(run: Draw, folder: Path) -> set[str]:
    """The hooks that a Trainer without our callbacks leaves behind."""
    model = build(run)
    before = hooks(model)
    args = tiny.arguments(folder, **run.arguments | {"max_steps": 1, "save_strategy": "no"})
    trainer = make(run, model, args, [])
    trainer.train()
    assert trainer.optimizer is not None
    return set(hooks(model, getattr(trainer.optimizer, "optimizer", trainer.optimizer)) - before)


def train(folder: Path, run: Draw, part: str, plant: str | None = None) -> None:
    """Do one of "straight", "interrupted", "resumed" and write what this rank saw."""
    rank = os.environ.get("RANK", "0")
    leftovers = plain_leftovers(run, folder / "plain") if run.checkpointing and part == "straight" else set()
    model = build(run)
    before = hooks(model)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    args = tiny.arguments(folder / ("straight" if part == "straight" else "resumed"), **run.arguments)
    groups = group_layers(model)
    parameters = parameters_by_name(model)
    witness = Witness(model, {group.name: [parameters[name] for name in group.parameters] for group in groups})
    late = (run.numbers[0] + 1, *run.numbers[1:])
    planned = dataclasses.replace(run, numbers=late) if plant == "opens late" else run
    callbacks = [*methods(planned, groups), witness]
    if part == "interrupted":
        callbacks.append(Interrupt(run, folder))
    if plant == "frozen weight moved":
        callbacks.insert(0, Nudge(parameters[groups[0].parameters[0]]))
    if plant in ("hook left", "left frozen", "other random numbers"):
        callbacks.append({"hook left": LeaveHook, "left frozen": KeepFrozen, "other random numbers": Reseed}[plant]())
    if plant == "no rebuild":
        callback.rebuild_reducer = lambda wrapper: None
    if plant == "no eval mode":
        callback.keep_in_eval = lambda model: None
    trainer = make(
        run, model, args, callbacks,
        optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=run.decay),
    )  # fmt: skip
    attach(trainer, verify_ranks=0)  # the witness compares the ranks by itself, after every step
    start = tiny.state(model)
    try:
        trainer.train(resume_from_checkpoint=part == "resumed")
    except KeyboardInterrupt:
        assert part == "interrupted"
    assert trainer.optimizer is not None
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    found = {
        "levels": [[group.name for group in level] for level in reversed(groups.levels)],
        "began": witness.began,
        "hashes": witness.weights,
        "buffers": witness.still,
        "steps": witness.steps,
        "hooks": sorted((hooks(model, inner) - before).elements()),
        "hooks gone": sorted((before - hooks(model, inner)).elements()),
        "plain leftovers": leftovers,
        "trainable": ([n for n, p in model.named_parameters() if p.requires_grad], trainable),
        "start": start,
        "weights": tiny.state(model),
        "optimizer": inner.state_dict(),
        "log_history": trainer.state.log_history,
    }
    torch.save(found, folder / f"{part}.{rank}.pt")
