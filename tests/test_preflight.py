"""What attach(trainer) finds before step 1: that each finding is true, and gone once its advice is taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from tests import tiny
from tl_callbacks import (
    GradualUnfreezing,
    PreflightError,
    PreflightWarning,
    at_fractions,
    at_steps,
    attach,
    events,
    group_layers,
    layerwise_optimizer,
    per_epoch,
)
from tl_callbacks.preflight import cautions, preflight

OPENINGS = at_steps([2, 4, 6, 8])


def unfreezing(args: TrainingArguments, schedule: Any = OPENINGS, model: Any = None, **kwargs: Any) -> Trainer:
    """A trainer with groups that open one after the other."""
    model = tiny.bert() if model is None else model
    callback = GradualUnfreezing(group_layers(model), schedule)
    return tiny.trainer(model, args, callbacks=[callback, *kwargs.pop("callbacks", [])], **kwargs)


def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))


REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize(
    ("overrides", "schedule", "message"),
    [
        ({"ddp_static_graph": True}, OPENINGS, "ddp_static_graph=True promises DDP that the same parameters train"),
        ({"ddp_static_graph": True}, at_steps([0, 0, 0, 0]), None),
        ({**REENTRANT, "ddp_find_unused_parameters": True}, OPENINGS, "make DDP count a parameter twice"),
        (REENTRANT, OPENINGS, None),
    ],
)
def test_what_ddp_cannot_do(
    overrides: dict[str, Any], schedule: Any, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = unfreezing(tiny.arguments(tmp_path, **overrides), schedule)
    assert preflight(trainer) == [], "one process has no such trouble"
    two_processes(monkeypatch)
    found = preflight(trainer)
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_parameters_outside_the_reducer_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny.bert()
    model._ddp_params_and_buffers_to_ignore = ["classifier.weight", "bert.embeddings.position_ids"]
    trainer = tiny.trainer(model, tiny.arguments(tmp_path))
    assert preflight(trainer) == []
    two_processes(monkeypatch)
    assert len(found := preflight(trainer)) == 1
    assert "`classifier.weight` and 0 other parameters are in the model's _ddp_params_and_buffers_to_ignore" in found[0]


def vit() -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        num_channels=1, num_labels=tiny.NUM_LABELS,
    )  # fmt: skip
    return ViTForImageClassification(config)


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_of_images_moves_nothing_above_frozen_layers(
    reentrant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vit()
    args = tiny.arguments(tmp_path, **{**REENTRANT, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}})
    groups = group_layers(model)
    callback = GradualUnfreezing(groups, at_steps([2, 4]), keep_frozen=["embeddings"])
    trainer = tiny.trainer(model, args, tiny.images(), callbacks=[callback])
    found = preflight(trainer)
    if not reentrant:
        assert found == []
        attach(trainer)
    else:
        assert len(found) == 1
        assert "gives no gradient to open layers above frozen ones" in found[0]
        monkeypatch.setattr("tl_callbacks.unfreezing.checks._frozen_layers", lambda *args: [])
        with pytest.warns(PreflightWarning, match="back-propagates through frozen layers"):
            attach(trainer)
    before = tiny.state(model)
    if reentrant:
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
            trainer.train()
    else:
        trainer.train()
    moved = tiny.moved(before, tiny.state(model))
    assert "classifier.weight" in moved
    lower = groups["layers.0"].parameters
    assert bool(moved & set(lower)) is not reentrant, "the finding is true"


def scaled(optimizer: bool) -> dict[str, Any]:
    """A script's own layer-wise rates as timm writes them."""
    model = tiny.bert()
    groups = [
        {"params": list(model.bert.parameters()), "lr_scale": 0.5},
        {"params": list(model.classifier.parameters()), "lr_scale": 1.0},
    ]
    if optimizer:
        return {"model": model, "optimizers": (torch.optim.AdamW(groups, lr=0.01), None)}
    return {"model": model, "optimizer_cls_and_kwargs": (torch.optim.AdamW, {"params": groups, "lr": 0.01})}


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_scale_that_no_scheduler_reads(optimizer: bool, tmp_path: Path) -> None:
    keywords = scaled(optimizer)
    trainer = tiny.trainer(keywords.pop("model"), tiny.arguments(tmp_path), **keywords)
    with pytest.raises(PreflightError, match="carry `lr_scale`, which no scheduler of torch or transformers reads"):
        attach(trainer)
    trainer.train()
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert len(rates) == 1, "the finding is true"


def test_a_scale_that_the_users_scheduler_may_read(tmp_path: Path) -> None:
    class Scaled(LambdaLR):
        """What timm's schedulers do."""

    keywords = scaled(True)
    optimizer = keywords["optimizers"][0]
    keywords["optimizers"] = (optimizer, Scaled(optimizer, lambda step: 1.0))
    assert preflight(tiny.trainer(keywords.pop("model"), tiny.arguments(tmp_path), **keywords)) == []


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
PLATEAU |= {"metric_for_best_model": "eval_runtime", "greater_is_better": True}


def plateau(floor: float) -> dict[str, Any]:
    return {**PLATEAU, "lr_scheduler_kwargs": {"min_lr": floor, "patience": 0, "factor": 0.1, "threshold": 1e9}}


@pytest.mark.parametrize(
    ("overrides", "decay", "message"),
    [
        (plateau(2e-3), 0.5, r"lr_scheduler_type=reduce_lr_on_plateau stops at the same lowest rate, 0.002, in every"),
        (plateau(2e-3), 1.0, None),
        (plateau(0.0), 0.5, None),
        ({**PLATEAU, "lr_scheduler_kwargs": {"min_lr": None}}, 0.5, None),
        ({**PLATEAU, "lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {}}, 0.5, "lowest rate, 0.001"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 2e-3}}, 0.5, None),
    ],
)
def test_a_floor_that_is_the_same_for_all_groups(
    overrides: dict[str, Any], decay: float, message: str | None, tmp_path: Path
) -> None:
    model = tiny.bert()
    args = tiny.arguments(tmp_path, **overrides)
    optimizer = layerwise_optimizer(args, group_layers(model), decay=decay)
    found = preflight(tiny.trainer(model, args, optimizer_cls_and_kwargs=optimizer))
    assert len(found) == (message is not None)
    assert message is None or message.replace("\\", "") in found[0]


@pytest.mark.parametrize("floor", [2e-3, 0.0])
def test_a_floor_ends_the_ratios(floor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tl_callbacks.preflight._rates", lambda trainer: [])
    model = tiny.bert()
    args = tiny.arguments(tmp_path, **plateau(floor))
    trainer = tiny.trainer(
        model, args, optimizer_cls_and_kwargs=layerwise_optimizer(args, group_layers(model), decay=0.5)
    )
    attach(trainer)
    trainer.train()
    assert trainer.optimizer is not None
    rates = [
        group["lr"] for group in trainer.optimizer.param_groups if group["layer_group"] in ("head", "encoder.layer.2")
    ]
    assert (set(rates) == {floor}) if floor else (max(rates) == pytest.approx(2 * min(rates))), "they were as 1 to 0.5"


SCHEDULERS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "cosine to a floor": (lambda o: CosineAnnealingLR(o, 12, eta_min=1e-3), True),
    "cosine to 0": (lambda o: CosineAnnealingLR(o, 12), False),
    "plateau with a floor": (lambda o: ReduceLROnPlateau(o, min_lr=1e-3), True),
    "plateau with a floor for each": (lambda o: ReduceLROnPlateau(o, min_lr=[1e-4, 1e-3]), False),
    "a multiple": (lambda o: LambdaLR(o, lambda step: 1.0), False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_floor_of_the_users_own_scheduler(name: str, tmp_path: Path) -> None:
    make, wrong = SCHEDULERS[name]
    model = tiny.bert()
    groups = [{"params": list(model.bert.parameters()), "lr": 1e-3}, {"params": list(model.classifier.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=1e-2)
    found = preflight(tiny.trainer(model, tiny.arguments(tmp_path), optimizers=(optimizer, make(optimizer))))
    assert ["same lowest rate" in text for text in found] == [True] * wrong


STOP = {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True, "save_strategy": "steps"}


@pytest.mark.parametrize(
    ("overrides", "patience", "earliest"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}, 1, 4),
        ({"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}, 3, None),
        ({"eval_strategy": "steps", "eval_steps": 0.25, "save_steps": 0.25}, 1, 6),
        ({"eval_strategy": "epoch", "save_strategy": "epoch", "per_device_train_batch_size": 16}, 0, 4),
    ],
)
def test_early_stopping_before_the_last_opening(
    overrides: dict[str, Any], patience: int, earliest: int | None, tmp_path: Path
) -> None:
    args = tiny.arguments(tmp_path, **{**STOP, **overrides})
    found = cautions(unfreezing(args, callbacks=[EarlyStoppingCallback(patience)]))
    assert len(found) == (earliest is not None)
    if earliest is not None:
        assert f"can stop the training at step {earliest}, before `embeddings` opens at step 8" in found[0]
        advised = int(found[0].split("patience of ")[1].split()[0])
        assert cautions(unfreezing(args, callbacks=[EarlyStoppingCallback(advised)])) == []


def test_early_stopping_can_fire_when_the_caution_says(tmp_path: Path) -> None:
    overrides = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "metric_for_best_model": "eval_runtime"}
    args = tiny.arguments(tmp_path, **{**STOP, **overrides, "greater_is_better": True})
    trainer = unfreezing(args, callbacks=[EarlyStoppingCallback(1, 1e9)])
    with pytest.warns(PreflightWarning, match="at step 4"):
        attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert "embeddings" not in [
        g for event in events.read(trainer.state.log_history, "opening") for g in event["groups"]
    ]


def test_compilation_is_announced(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path)
    args.torch_compile = True
    trainer = unfreezing(tiny.arguments(tmp_path))
    assert cautions(trainer) == []
    trainer.args = args
    assert "compiles once more at each of the 4 transitions" in cautions(trainer)[0]


def test_a_schedule_longer_than_the_training(tmp_path: Path) -> None:
    trainer = unfreezing(tiny.arguments(tmp_path, max_steps=5))
    with pytest.warns(PreflightWarning, match="never opens `embeddings`, `encoder.layer.0` within 5 steps"):
        attach(trainer)
    epochs = tiny.arguments(tmp_path, max_steps=-1, num_train_epochs=3)
    assert "within 48 steps" in cautions(unfreezing(epochs, per_epoch()))[0], "the length is known ahead"
    assert cautions(unfreezing(epochs, at_fractions([0.1, 0.2, 0.3, 0.4]))) == []


def test_errors_and_cautions_come_together(tmp_path: Path) -> None:
    model = tiny.bert()
    trainer = unfreezing(tiny.arguments(tmp_path, max_steps=5), model=model)
    model.classifier.bias.requires_grad_(False)
    with pytest.raises(PreflightError, match=r"found 1 problem:\n- .*classifier.bias") as caught:
        attach(trainer)
    assert "\nTo know besides:\n- GradualUnfreezing" in str(caught.value)
    assert len(caught.value.findings) == 1
