"""Our callbacks under the Trainer's ordinary features: precision, data, losses, evaluation, compilation."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tests import tiny
from tests.test_identities import train as neutral_run
from tl_callbacks import (
    GradualUnfreezing,
    NoEffectWarning,
    WeightAnchoring,
    at_steps,
    attach,
    group_layers,
)

OPENINGS = [2, 4, 6, 8]
FORMS = ["decoupled", "penalty"]


class Steps(TrainerCallback):
    """Keeps the weights before and after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states.append(tiny.state(kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states.append(tiny.state(kwargs["model"]))


def run(model: nn.Module, folder: Path, *, form: Any = "penalty", data: Any = None, **kwargs: Any) -> Any:
    """A training with unfreezing and an anchor that pulls from the first step, and the weights after each step.

    Keywords of the Trainer come under `trainer`, the others are arguments.
    """
    steps = Steps()
    args = tiny.arguments(folder, **{key: value for key, value in kwargs.items() if key != "trainer"})
    callbacks: list[Any] = [
        GradualUnfreezing(group_layers(model), at_steps(OPENINGS)),
        WeightAnchoring(0.05, form=form, reference=tiny.state(tiny.bert(seed=3))),
        steps,
    ]
    trainer = tiny.trainer(model, args, data, callbacks=callbacks, **kwargs.get("trainer", {}))
    attach(trainer)
    trainer.train()
    return trainer, steps


def assert_moves_by_plan(model: nn.Module, steps: Steps) -> None:
    """At every step each open group moved, and each frozen one stayed bit for bit as it was."""
    groups = group_layers(model)
    assert len(steps.states) == 13
    for step in range(12):
        before, after = steps.states[step], steps.states[step + 1]
        still = [group.name for group in groups if not tiny.moved(before, after, group.parameters)]
        frozen = len(groups) - 1 - sum(opening <= step for opening in OPENINGS)
        assert still == list(groups.names[:frozen]), step


def bfloat16(kind: str) -> tuple[Any, dict[str, Any]]:
    """A model and arguments: autocast over float32 weights, or weights in bfloat16."""
    return (tiny.bert(), {"bf16": True}) if kind == "autocast" else (tiny.bert().bfloat16(), {})


@pytest.mark.parametrize("kind", ["autocast", "weights"])
@pytest.mark.parametrize("form", FORMS)
def test_frozen_groups_stay_bit_for_bit_in_bfloat16(form: Any, kind: str, tmp_path: Path) -> None:
    model, overrides = bfloat16(kind)
    _, steps = run(model, tmp_path, form=form, **overrides)
    assert_moves_by_plan(model, steps)
    _, single = run(tiny.bert(), tmp_path, form=form)
    assert any(not torch.equal(steps.states[-1][n].float(), t) for n, t in single.states[-1].items()), "a control"


@pytest.mark.parametrize("kind", ["autocast", "weights"])
@pytest.mark.parametrize("neutral", ["factory", "unfreezing, own rates", "decoupled", "penalty", "all"])
def test_neutral_settings_follow_the_plain_trainer_in_bfloat16(neutral: str, kind: str, tmp_path: Path) -> None:
    (plain, overrides), (ours, _) = bfloat16(kind), bfloat16(kind)
    start = tiny.state(plain)
    expected, _ = neutral_run(tmp_path / "plain", neutral=None, model=plain, **overrides)
    found, _ = neutral_run(tmp_path / "ours", neutral=neutral, model=ours, **overrides)
    assert tiny.moved(expected, found) == set()
    assert len(tiny.moved(start, expected)) > 30, "the control must move"


def pad_unequally(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "input_ids": row["input_ids"][: 3 + number % 6]} for number, row in enumerate(rows)]


def doubled_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return 2 * nn.functional.cross_entropy(outputs["logits"], labels)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    padded = [row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows]
    return {"input_ids": torch.tensor(padded), "labels": torch.tensor([row["labels"] for row in rows])}


LOSSES_AND_DATA: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing_factor": 0.3},
    "compute_loss_func": {"trainer": {"compute_loss_func": doubled_loss}},
    "compute_loss_func, accumulation": {
        "gradient_accumulation_steps": 2,
        "trainer": {"compute_loss_func": doubled_loss},
    },
    "group by length": {"train_sampling_strategy": "group_by_length", "trainer": {"data_collator": collate}},
}


@pytest.mark.parametrize("feature", LOSSES_AND_DATA)
def test_losses_and_samplers_of_the_trainer(feature: str, tmp_path: Path) -> None:
    kwargs = LOSSES_AND_DATA[feature]
    rows = pad_unequally(tiny.texts()) if "length" in feature else tiny.texts()

    def end(neutral: bool, **changed: Any) -> dict[str, torch.Tensor]:
        model = tiny.bert()
        args = tiny.arguments(tmp_path, **{k: v for k, v in {**kwargs, **changed}.items() if k != "trainer"})
        callbacks = [GradualUnfreezing(group_layers(model), at_steps([0] * 4)), WeightAnchoring(0.0, form="penalty")]
        extra = {**kwargs.get("trainer", {}), **({"callbacks": callbacks} if neutral else {})}
        trainer = tiny.trainer(model, args, rows, **extra)
        if neutral:
            attach(trainer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)
            trainer.train()
        return tiny.state(model)

    assert tiny.moved(end(False), end(True)) == set()
    off = {"label_smoothing_factor": 0.0, "train_sampling_strategy": "random"}
    if "compute_loss_func" not in feature:
        assert tiny.moved(end(False), end(False, **off)), "the control: the feature changes the run"
    model = tiny.bert()
    _, steps = run(model, tmp_path, data=rows, **kwargs)
    assert_moves_by_plan(model, steps)
