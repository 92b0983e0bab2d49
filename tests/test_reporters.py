"""What reporters and `trainer_state.json` see of our callbacks, and that the Trainer's own records stay as they are."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.integrations.integration_utils import rewrite_logs

from tests import tiny
from tl_callbacks import (
    GradualUnfreezing,
    PreflightWarning,
    WeightAnchoring,
    at_steps,
    attach,
    group_layers,
    layerwise_optimizer,
)
from tl_callbacks.events import read

GROUPS = ("embeddings", "encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "head")
OPENINGS = [2, 4, 5, 9]
OPEN, TRAINABLE = "tl/unfreezing/open_groups", "tl/unfreezing/trainable_parameters"


class Live(TrainerCallback):
    """The rates that the optimizer used, and what required a gradient, by steps done."""

    def __init__(self) -> None:
        self.rates: dict[int, dict[str, float]] = {}
        self.trainable: dict[int, int] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        self.rates[state.global_step + 1] = {group["layer_group"]: group["lr"] for group in groups}
        self.trainable[state.global_step] = sum(p.numel() for p in kwargs["model"].parameters() if p.requires_grad)


class WandbLike(TrainerCallback):
    """Keeps what `WandbCallback.on_log` sends: the logs with its names for them, and the step."""

    def __init__(self) -> None:
        self.sent: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        summary = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
        sent = rewrite_logs({key: value for key, value in logs.items() if key not in summary})
        self.sent.append({**sent, "train/global_step": state.global_step})


def train(folder: Path, *, ours: bool = True, callbacks: list[Any] | None = None, **overrides: Any) -> Trainer:
    """A training with all of our callbacks, or with the plain Trainer over the same weights."""
    model = tiny.bert(dropout=0.0)
    args = tiny.arguments(folder, **overrides)
    groups = group_layers(model)
    kwargs: dict[str, Any] = {}
    if ours:
        kwargs["optimizer_cls_and_kwargs"] = layerwise_optimizer(args, groups, decay=0.5)
    methods = [GradualUnfreezing(groups, at_steps(OPENINGS), rates="own"), WeightAnchoring(0.05)] if ours else []
    trainer = tiny.trainer(model, args, callbacks=[*methods, *(callbacks or [])], **kwargs)
    if ours:
        attach(trainer)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventAccumulator, Live, Trainer]:
    """What TensorBoard reads of a run, and what happened in it."""
    folder, live = tmp_path_factory.mktemp("board"), Live()
    trainer = train(
        folder, callbacks=[live], report_to="tensorboard", logging_steps=2, eval_strategy="steps", eval_steps=6
    )
    files = list(folder.rglob("events.out.tfevents.*"))
    assert len(files) == 1
    accumulator = EventAccumulator(str(files[0].parent))
    accumulator.Reload()
    return accumulator, live, trainer


def test_tensorboard_has_the_rate_of_every_group(board: tuple[EventAccumulator, Live, Trainer]) -> None:
    accumulator, live, _ = board
    assert {tag for tag in accumulator.Tags()["scalars"] if "tl/rate/" in tag} == {f"train/tl/rate/{g}" for g in GROUPS}
    for group in GROUPS:
        points = accumulator.Scalars(f"train/tl/rate/{group}")
        assert [point.step for point in points] == [2, 4, 6, 8, 10, 12]
        expected = [live.rates[point.step][group] for point in points]
        assert [point.value for point in points] == pytest.approx(expected, rel=1e-6)
    assert len({rates["encoder.layer.2"] / rates["head"] for rates in live.rates.values()}) > 2, "groups must differ"
    main = accumulator.Scalars("train/learning_rate")
    head = accumulator.Scalars("train/tl/rate/head")
    assert [(point.step, point.value) for point in main] == [(point.step, point.value) for point in head]


def test_tensorboard_has_the_openings(board: tuple[EventAccumulator, Live, Trainer]) -> None:
    accumulator, live, trainer = board
    opened = accumulator.Scalars(f"train/{OPEN}")
    assert [(point.step, point.value) for point in opened] == list(zip([0, *OPENINGS], range(1, 6), strict=True))
    trainable = accumulator.Scalars(f"train/{TRAINABLE}")
    assert [(point.step, point.value) for point in trainable] == [(s, live.trainable[s]) for s in [0, *OPENINGS]]
    events = read(trainer.state.log_history, "opening")
    assert [(point.step, point.value) for point in trainable] == [
        (e["step"], e["trainable_parameters"]) for e in events
    ]


def test_tensorboard_has_the_distances_and_the_trainers_own_records(
    board: tuple[EventAccumulator, Live, Trainer],
) -> None:
    accumulator = board[0]
    assert [point.step for point in accumulator.Scalars("train/tl/anchor/embeddings")] == [6, 12]
    assert [point.step for point in accumulator.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
    assert [point.step for point in accumulator.Scalars("eval/loss")] == [6, 12]


@pytest.mark.parametrize("how", ["integration", "callback"])
def test_a_reporter_gets_all_keys_under_the_names_it_gives_them(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = Live()
    if how == "integration":  # which runs before the user's callbacks
        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb-like", WandbLike)
        trainer = train(tmp_path, callbacks=[live], report_to=["wandb-like"])
    else:
        trainer = train(tmp_path, callbacks=[live, WandbLike()])
    (reporter,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, WandbLike))
    rates = [sent for sent in reporter.sent if "train/tl/rate/head" in sent]
    assert [sent["train/global_step"] for sent in rates] == [4, 8, 12]
    for sent in rates:
        found = {key.removeprefix("train/tl/rate/"): v for key, v in sent.items() if key.startswith("train/tl/rate/")}
        assert found == live.rates[int(sent["train/global_step"])]
    openings = [sent for sent in reporter.sent if f"train/{OPEN}" in sent]
    assert [sent["train/global_step"] for sent in openings] == [0, *OPENINGS]
    # A step that goes back is dropped by such services.
    steps = [sent["train/global_step"] for sent in reporter.sent]
    assert steps == sorted(steps)
    assert all(isinstance(value, int | float) for sent in reporter.sent for value in sent.values())


def test_trainer_state_json_has_rates_openings_and_distances(tmp_path: Path) -> None:
    live = Live()
    trainer = train(
        tmp_path, callbacks=[live], save_strategy="steps", save_steps=6, eval_strategy="steps", eval_steps=4
    )
    trainer.save_state()
    saved = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert saved == trainer.state.log_history
    for group in GROUPS:
        rates = {e["step"]: e[f"tl/rate/{group}"] for e in saved if f"tl/rate/{group}" in e}
        assert rates == {step: live.rates[step][group] for step in (4, 8, 12)}
    events = read(saved, "opening")
    assert [(event["step"], event["groups"]) for event in events] == [
        (step, [group]) for step, group in zip([0, *OPENINGS], reversed(GROUPS), strict=True)
    ]
    logged = [(e["step"], e[OPEN], e[TRAINABLE]) for e in saved if OPEN in e]
    assert logged == [(e["step"], n, e["trainable_parameters"]) for n, e in enumerate(events, start=1)]
    assert [entry["step"] for entry in saved if "tl/anchor/embeddings" in entry] == [4, 8, 12]
    half = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert half == [entry for entry in saved if entry["step"] <= 6]


SETTINGS: dict[str, dict[str, Any]] = {
    "steps": {},
    "first step too": {"logging_first_step": True},
    "every step": {"logging_steps": 1},
    "epochs": {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    "openings at logs": {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
    "accumulation": {"gradient_accumulation_steps": 3, "logging_steps": 3},
    "evaluation, saving, the best": {
        "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    },
    "epochs, evaluation first": {
        "logging_strategy": "epoch", "eval_strategy": "epoch", "eval_on_start": True, "max_steps": -1,
        "num_train_epochs": 2,
    },
}  # fmt: skip


def records(trainer: Trainer) -> list[tuple[int, list[str]]]:
    """Step and keys of every record that the Trainer itself made."""
    entries = trainer.state.log_history
    return [(e["step"], sorted(e)) for e in entries if not any(key.startswith("tl/") for key in e)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_trainers_own_records_are_those_of_a_run_without_us(setting: str, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", ours=False, **SETTINGS[setting])
    ours = train(tmp_path / "ours", **SETTINGS[setting])
    assert records(ours) == records(plain)
    assert any("loss" in keys for _, keys in records(plain))
    added = [entry for entry in ours.state.log_history if any(key.startswith("tl/") for key in entry)]
    assert {key.split("/")[1] for entry in added for key in entry if "/" in key} >= {"rate", "unfreezing", "event"}
    rates = [entry["step"] for entry in added if "tl/rate/head" in entry]
    assert rates == [step for step, keys in records(plain) if "learning_rate" in keys]


def test_a_log_at_the_end_of_a_step_would_lose_the_trainers_record(tmp_path: Path) -> None:
    class Careless(TrainerCallback):
        trainer: Trainer

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.trainer.log({"careless": 1.0})

    careless = Careless()
    trainer = tiny.trainer(tiny.bert(), tiny.arguments(tmp_path), callbacks=[careless])
    careless.trainer = trainer
    trainer.train()
    assert not any("loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("patience", [1, 9])
def test_the_best_metric_and_early_stopping_see_the_evaluations_alone(patience: int, tmp_path: Path) -> None:
    # No rate, no training: the first evaluation is the best, and patience counts the others.
    overrides = {
        **SETTINGS["evaluation, saving, the best"], "learning_rate": 0.0, "eval_steps": 2, "save_steps": 2,
    }  # fmt: skip
    plain = train(tmp_path / "plain", ours=False, callbacks=[EarlyStoppingCallback(patience)], **overrides)
    early = pytest.warns(PreflightWarning, match="can stop the training at step 4") if patience == 1 else nullcontext()
    with early:
        ours = train(tmp_path / "ours", callbacks=[EarlyStoppingCallback(patience)], **overrides)
    assert ours.state.global_step == plain.state.global_step == min(2 * (patience + 1), 12)
    assert (ours.state.best_metric, ours.state.best_global_step) == (plain.state.best_metric, 2)
    assert Path(str(ours.state.best_model_checkpoint)).name == "checkpoint-2"
    assert records(ours) == records(plain)
