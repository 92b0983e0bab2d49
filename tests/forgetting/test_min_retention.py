"""min_retention: which checkpoints may be the best, and what a training says that ends with too little."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from tests.forgetting.models import sentences
from tests.forgetting.test_monitor import PAIRS, SAVING, logged, make, trained
from tl_callbacks import (
    ForgettingMonitor,
    LanguageModelling,
    PreflightError,
    PreflightWarning,
    Retrieval,
    attach,
    events,
)
from tl_callbacks.forgetting.readings import Change


class Forget:
    """Lets the monitor find the retention that a test says, by the step that the weights are of; all else as it is."""

    def __init__(self, monitor: ForgettingMonitor, retentions: dict[int, float], seen: dict[float, float]) -> None:
        self.trainer: Trainer | None = None
        changes = monitor._panel.changes

        def changed(model: Any, recorded: Any) -> dict[str, Change]:
            assert self.trainer is not None
            here = seen.setdefault(float(weights(self.trainer).sum()), retentions[self.trainer.state.global_step])
            return {name: change._replace(retention=here) for name, change in changes(model, recorded).items()}

        monitor._panel.changes = changed  # type: ignore[method-assign]


def run(
    folder: Path,
    retentions: dict[int, float],
    *,
    least: float | None = 0.95,
    callbacks: Any = (),
    seen: dict[float, float] | None = None,
    resumed: str | None = None,
    **options: Any,
) -> Trainer:
    monitor = ForgettingMonitor(LanguageModelling(sentences(), kl_tokens=0), min_retention=least)
    forget = Forget(monitor, retentions, {} if seen is None else seen)
    trainer = make(folder, monitor, callbacks=callbacks, **{**SAVING, **options})
    forget.trainer = trainer
    attach(trainer)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def weights(trainer: Trainer) -> torch.Tensor:
    assert trainer.model is not None
    found: torch.Tensor = trainer.model.state_dict()["lm_head.weight"].clone()
    return found


def test_the_best_checkpoint_is_the_best_of_those_that_kept_enough(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", {2: 1, 4: 1, 6: 1})
    assert plain.state.best_global_step == 6, "the control: the loss falls at each evaluation"
    some = run(tmp_path / "some", {2: 0.99, 4: 0.96, 6: 0.9})
    assert (some.state.best_global_step, Path(str(some.state.best_model_checkpoint)).name) == (4, "checkpoint-4")
    metrics = [entry["eval_loss"] for entry in some.state.log_history if "eval_loss" in entry]
    assert some.state.best_metric == metrics[1]
    assert not torch.equal(weights(some), weights(plain)), "the weights of step 4 were loaded"
    facts = json.loads((tmp_path / "some" / "recipe.json").read_text())["methods"]["ForgettingMonitor"]
    assert (facts["weights_of_step"], facts["min_retention"]) == (4, 0.95)
    (end,) = events.read(some.state.log_history, "forgetting_end")
    assert (end["step"], end["weights_of"], end["values"]["tl/retention"]) == (6, 4, 0.96)


def test_min_retention_by_what_is_really_forgotten(tmp_path: Path) -> None:
    options = {**SAVING, "learning_rate": 5e-2}
    free = trained(tmp_path / "free", ForgettingMonitor(LanguageModelling(sentences())), **options)
    kept = {step: entry["tl/retention"] for step, entry in logged(free).items()}
    assert kept[2] > kept[6]
    assert free.state.best_global_step == 6
    monitor = ForgettingMonitor(LanguageModelling(sentences()), min_retention=(kept[2] + max(kept[4], kept[6])) / 2)
    held = trained(tmp_path / "held", monitor, **options)
    assert held.state.best_global_step == 2
    facts = monitor.facts()
    assert facts["retention"] == pytest.approx(kept[2], rel=1e-6), "of the weights that were loaded"
    assert facts["satisfied"] is True
    assert {s: e["tl/retention"] for s, e in logged(held).items()} == kept, "the training itself is the same"


def test_saving_the_best_alone_saves_none_that_lost_too_much(tmp_path: Path) -> None:
    run(tmp_path / "plain", {2: 1, 4: 1, 6: 1}, save_strategy="best")
    assert checkpoints(tmp_path / "plain") == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    run(tmp_path / "some", {2: 0.9, 4: 0.96, 6: 0.96}, save_strategy="best", save_total_limit=1)
    assert checkpoints(tmp_path / "some") == {"checkpoint-6"}
    with pytest.warns(UserWarning, match="No checkpoint that was evaluated kept it"):
        run(tmp_path / "none", {2: 0.9, 4: 0.9, 6: 0.9}, save_strategy="best")
    assert checkpoints(tmp_path / "none") == set()


def test_where_none_kept_enough_the_end_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"ends with a retention of 0.9000, below min_retention=0.95. No checkpoint"):
        trainer = run(tmp_path, {2: 0.8, 4: 0.85, 6: 0.9})
    assert trainer.state.best_model_checkpoint is None
    facts = json.loads((tmp_path / "recipe.json").read_text())["methods"]["ForgettingMonitor"]
    assert (facts["satisfied"], facts["retention"], facts["weights_of_step"]) == (False, 0.9, 6)


def test_what_is_advised_suits_what_was_saved(tmp_path: Path) -> None:
    kept, options = {2: 0.99, 4: 0.9, 6: 0.9}, {"metric_for_best_model": "loss", "greater_is_better": False}
    with pytest.warns(UserWarning, match=r"in `\S+/checkpoint-2` kept it. Load them, or set load_best_model_at_end"):
        run(tmp_path / "saved", kept, load_best_model_at_end=False, **options)
    with pytest.warns(UserWarning, match="The weights of step 2 kept it and were not saved. Save at each evaluation"):
        run(tmp_path / "not", {**kept, 8: 0.9}, max_steps=8, save_steps=4)
    assert checkpoints(tmp_path / "not") == {"checkpoint-4", "checkpoint-8"}

    class Meddle(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                model.lm_head.weight.mul_(30)

    monitor = ForgettingMonitor(LanguageModelling(sentences()), min_retention=0.5)
    changed = make(tmp_path / "changed", monitor, learning_rate=1e-3, **SAVING)
    changed.callback_handler.callbacks.insert(0, Meddle())
    attach(changed)
    with pytest.warns(UserWarning, match=r"`\S+/checkpoint-6`, which was loaded, kept it when it was evaluated"):
        changed.train()


def test_a_resumed_run_goes_on_with_the_best_of_those_that_kept_enough(tmp_path: Path) -> None:
    retentions, seen = {2: 0.99, 4: 0.9, 6: 0.9}, {}  # type: ignore[var-annotated]
    straight = run(tmp_path, retentions, seen=seen)
    again = run(tmp_path, retentions, seen=seen, resumed=str(tmp_path / "checkpoint-4"))
    assert again.state.best_global_step == straight.state.best_global_step == 2
    assert torch.equal(weights(again), weights(straight))


def test_retention_may_be_the_metric_and_stop_early(tmp_path: Path) -> None:
    early = EarlyStoppingCallback(1)
    options = {"metric_for_best_model": "retention", "greater_is_better": True}
    trainer = run(tmp_path, {2: 0.99, 4: 0.98, 6: 0.97}, least=None, callbacks=[early], **options)
    assert (trainer.state.global_step, trainer.state.best_metric) == (4, 0.99)
    monitor = ForgettingMonitor(LanguageModelling(sentences()))
    first = make(tmp_path, monitor, callbacks=[early], **{**SAVING, **options})
    first.callback_handler.callbacks.reverse()
    with pytest.raises(PreflightError, match="EarlyStoppingCallback looks for `eval_retention` before"):
        attach(first)


class Break(TrainerCallback):
    """Makes a weight of the head no number after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model.lm_head.weight[7] = math.nan


@pytest.mark.parametrize("step", [6, 100])
def test_a_measure_that_is_no_number_has_kept_nothing(step: int, tmp_path: Path) -> None:
    monitor = ForgettingMonitor([LanguageModelling(sentences()), Retrieval(PAIRS)], min_retention=0.5)
    options = {**SAVING, "learning_rate": 1e-6, "load_best_model_at_end": False, "metric_for_best_model": "loss"}
    trainer = make(tmp_path, monitor, callbacks=[Break(step)], greater_is_better=False, **options)
    attach(trainer)
    broken = step == 6
    if broken:
        with pytest.warns(UserWarning, match="the training ends with a retention that is no number"):
            trainer.train()
    else:
        trainer.train()
    assert trainer.state.best_global_step == (4 if broken else 6)
    facts = json.loads((tmp_path / "recipe.json").read_text())["methods"]["ForgettingMonitor"]
    assert facts["satisfied"] is not broken
    assert (facts["retention"] is None) is broken
    assert facts["measures"]["retrieval"]["retention"] == 1, "which reads no head, and alone would be enough"
    assert ("tl/retention" in logged(trainer)[6]) is not broken
    assert math.isnan(monitor.retention()) is broken


def test_early_stopping_with_a_least_retention_is_said_to_stop_late(tmp_path: Path) -> None:
    monitor = ForgettingMonitor(LanguageModelling(sentences()), min_retention=0.5)
    trainer = make(tmp_path, monitor, callbacks=[EarlyStoppingCallback(1)], **SAVING)
    with pytest.warns(PreflightWarning, match="counts no evaluation while there is none: it may stop late or never"):
        attach(trainer)
