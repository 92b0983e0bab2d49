"""Every kind of architecture trained for real: what is frozen stays bit for bit, what is open moves."""

import dataclasses
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, default_data_collator

from tests import tiny
from tests.families import FAMILIES, Family
from tl_callbacks import GradualUnfreezing, LayerGroups, attach, every, group_layers, layerwise_optimizer
from tl_callbacks.frozen.state import openable
from tl_callbacks.names import normalise
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.unfreezing.plan import UnfreezePlan

BATCH = 4
AFTER = 4  # steps with everything open
TINY = 1e-20  # of Adam: the smallest gradient moves a whole step
WARNING = {"ALBERT": "AlbertForSequenceClassification. all 2 layers share the weights of one block"}
ADAPTED = [name for name, family in FAMILIES.items() if family.lora]
QUICK = ("BERT", "Llama", "T5", "ResNet", "Wav2Vec2", "CLIP")


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, also those that are not saved, by normalised name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {normalise(name): tensor.detach().clone() for name, tensor in named}


class Watch(TrainerCallback):
    """Notes when each group first moves, and what is not at rest while the plan says that it is frozen.

    Args:
        model: the model, before training.
        groups: its groups.
        plan: what is believed of the openings.
    """

    def __init__(self, model: nn.Module, groups: LayerGroups, plan: UnfreezePlan) -> None:
        self.start, self.groups, self.plan = tensors(model), groups, plan
        self.trainable = set(openable(model))
        self.moved_in: dict[str, int] = {}
        self.leaked: set[str] = set()  # parameters and buffers that moved
        self.with_gradient: set[str] = set()
        self.in_training_mode: set[str] = set()

    def frozen(self, model: nn.Module, step: int) -> tuple[dict[str, nn.Parameter], dict[str, nn.Module]]:
        """The parameters that are frozen in a step, and the modules that hold no others, bar what never trains."""
        open_groups = self.plan.at(step).open
        names = {name for group in self.groups if group.name not in open_groups for name in group.parameters}
        frozen = {name: p for name, p in parameters_by_name(model).items() if name in names}
        ids = {id(p) for p in frozen.values()}
        training = {id(p) for name, p in frozen.items() if name in self.trainable}
        parts = [(name, module, {id(p) for p in module.parameters()}) for name, module in model.named_modules()]
        return frozen, {name: module for name, module, held in parts if held <= ids and held & training}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters, modules = self.frozen(kwargs["model"], state.global_step)
        self.with_gradient |= {name for name, p in parameters.items() if p.grad is not None}
        self.in_training_mode |= {name for name, part in modules.items() if any(m.training for m in part.modules())}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step - 1
        parameters, modules = self.frozen(kwargs["model"], step)
        buffers = {normalise(f"{name}.{inner}") for name, part in modules.items() for inner, _ in part.named_buffers()}
        moved = tiny.moved(self.start, tensors(kwargs["model"]))
        self.leaked |= moved & (set(parameters) | buffers)
        for group in self.groups:
            if not moved.isdisjoint(group.parameters):
                self.moved_in.setdefault(group.name, step)


@dataclasses.dataclass
class Run:
    """One training with gradual unfreezing, and what it left."""

    model: nn.Module
    groups: LayerGroups
    watch: Watch

    @property
    def moved(self) -> set[str]:
        return tiny.moved(self.watch.start, tensors(self.model))


def train(family: Family, model: nn.Module, folder: Path, *, claimed: int = 1) -> Run:
    """Train with one more group open a step; `claimed` is the distance of openings that the watch believes in."""
    groups = group_layers(model)
    steps = len(groups) - 1 + AFTER
    args = tiny.arguments(folder, weight_decay=0.0, adam_epsilon=TINY, max_steps=steps)
    unfreeze = GradualUnfreezing(groups, every(1))
    watch = Watch(model, groups, GradualUnfreezing(groups, every(claimed)).plan(steps))
    trainer = Trainer(
        model, args, train_dataset=family.rows(), data_collator=family.collate, callbacks=[unfreeze, watch],
        optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=0.9),
    )  # fmt: skip
    attach(trainer)
    trainer.train()
    return Run(model, groups, watch)


def expected_to_move(family: Family, model: nn.Module) -> set[str]:
    """Names of the parameters with a gradient, and of the buffers that training moves, without this package."""
    plain = tiny.clone(model).train()
    before, rows = tensors(plain), family.rows()
    for start in range(0, len(rows), BATCH):
        out = plain(**(family.collate or default_data_collator)(rows[start : start + BATCH]))
        out["loss"].backward()
    with_gradient = {name for name, p in parameters_by_name(plain).items() if p.grad is not None and p.grad.any()}
    return with_gradient | tiny.moved(before, tensors(plain))


def check_run(run: Run, expected: set[str]) -> None:
    """Check what holds for each model: `expected` is what must have moved by the end."""
    parameters = parameters_by_name(run.model)
    buffers = {normalise(name) for name, _ in run.model.named_buffers()}
    assert len(set(run.groups.parameters)) == len(run.groups.parameters)
    assert run.watch.trainable <= set(run.groups.parameters) <= set(parameters)
    assert expected - buffers, "no parameter has a gradient"
    assert run.watch.leaked == set()
    assert run.watch.with_gradient == set()
    assert run.watch.in_training_mode == set()
    assert expected - run.moved == set()
    assert run.moved - buffers <= run.watch.trainable
    moving = [group.name for group in run.groups if not expected.isdisjoint(group.parameters)]
    moved_in = {name: step for name, step in run.watch.moved_in.items() if name in moving}
    assert moved_in == {name: run.watch.plan.opening_step(name) for name in moving}
    assert len(set(moved_in.values())) > 1, "all groups opened at once"
    assert {name for name, p in parameters.items() if p.requires_grad} == run.watch.trainable
    assert not run.model._forward_pre_hooks


def marked(names: Iterable[str], quick: Sequence[str] = QUICK) -> list[Any]:
    """Parameters of a test: all slow but the quick ones, each with the warning of ours that belongs to it."""
    marks = {name: [] if name in quick else [pytest.mark.slow] for name in names}
    if "timm" in marks and importlib.util.find_spec("timm") is None:
        marks["timm"].append(pytest.mark.skip(reason="timm is no dependency; make installs it"))
    for name in marks.keys() & WARNING.keys():
        marks[name].append(pytest.mark.filterwarnings(f"ignore:{WARNING[name]}:UserWarning"))
    return [pytest.param(name, marks=marks[name]) for name in names]


@pytest.mark.parametrize("name", marked(FAMILIES))
def test_each_group_has_something_to_open(name: str) -> None:
    model = FAMILIES[name].build()
    trainable = set(openable(model))
    assert [group.name for group in group_layers(model) if trainable.isdisjoint(group.parameters)] == []


@pytest.mark.parametrize("name", marked(FAMILIES))
def test_each_layer_moves_from_its_opening_on_and_not_before(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model = family.build()
    expected = expected_to_move(family, model)
    check_run(train(family, model, tmp_path), expected)


@pytest.mark.parametrize("name", marked(ADAPTED, quick=ADAPTED[:1]))
def test_of_a_model_with_adapters_they_alone_move_each_from_its_opening_on(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base = family.build()
    layers = group_layers(base).names
    assert family.lora
    run = train(family, get_peft_model(base, LoraConfig(r=2, **family.lora)), tmp_path)
    trained = run.watch.trainable
    check_run(run, trained)
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert len(run.groups) > 1
    assert run.groups.names == tuple(layer for layer in layers if layer in run.groups.names), "not by depth"


def test_the_watch_sees_what_moves_while_it_is_said_to_be_frozen(tmp_path: Path) -> None:
    family = FAMILIES["ResNet"]
    run = train(family, family.build(), tmp_path, claimed=2)
    assert all(run.watch.leaked & set(group.parameters) for group in run.groups[:-1])
    assert all(run.watch.with_gradient & set(group.parameters) for group in run.groups[:-1])
    assert any("running_mean" in name for name in run.watch.leaked)
    assert run.watch.in_training_mode
    with pytest.raises(AssertionError):
        check_run(run, run.watch.trainable)


def test_there_are_many_families() -> None:
    assert len(FAMILIES) >= 65
    assert len(ADAPTED) >= 15
    assert set(QUICK) <= set(FAMILIES)
