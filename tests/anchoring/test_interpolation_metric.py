"""The metric by which WiSE-FT chooses: that of `evaluate()`, in its direction, and nothing is lost where it fails."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from tests import tiny
from tests.anchoring.test_weight_interpolation import trained
from tl_callbacks import NoEffectWarning, WeightInterpolation, attach, events


def errors(prediction: Any) -> dict[str, float]:
    return {"wer": float(np.mean(prediction.predictions.argmax(-1) != prediction.label_ids))}


def run(folder: Path, callback: WeightInterpolation, metrics: Any = None, **options: Any) -> Trainer:
    sets = options.pop("sets", None)
    args = tiny.arguments(folder, **options)
    trainer = tiny.trainer(tiny.bert(), args, callbacks=[callback], compute_metrics=metrics)
    trainer.eval_dataset = sets or trainer.eval_dataset
    attach(trainer)
    trainer.train()
    return trainer


def test_a_loss_is_better_if_it_is_smaller_and_the_trainers_metric_is_the_default(tmp_path: Path) -> None:
    by_loss, by_metric = WeightInterpolation([0.0]), WeightInterpolation([0.0])
    trained(tmp_path / "loss", by_loss, tiny.bert(), max_steps=40)
    assert by_loss.chosen is not None
    assert by_loss.chosen.metric == min(place.metric for place in by_loss.places)
    best = {"metric_for_best_model": "accuracy", "load_best_model_at_end": True, "eval_strategy": "steps"}
    trained(tmp_path / "best", by_metric, tiny.bert(), save_strategy="steps", save_steps=6, eval_steps=6, **best)
    assert by_metric.chosen is not None
    assert by_metric.chosen.metric == max(place.metric for place in by_metric.places) <= 1


@pytest.mark.parametrize("metric", ["wer", "eval_wer", None])
def test_a_metric_has_the_direction_that_the_arguments_give_it(metric: str | None, tmp_path: Path) -> None:
    callback = WeightInterpolation(metric=metric)
    run(tmp_path, callback, errors, max_steps=40, metric_for_best_model="wer", greater_is_better=False)
    values = [place.metric for place in callback.places]
    assert callback.chosen is not None
    assert callback.chosen.metric == min(values) < max(values)
    other = WeightInterpolation(metric="wer")  # the arguments speak of another metric
    run(tmp_path, other, errors, max_steps=40, metric_for_best_model="loss", greater_is_better=False)
    assert other.chosen is not None
    assert other.chosen.metric == max(values)


@pytest.mark.parametrize("metric", ["loss", "eval_loss", "eval_a_loss", None])
def test_a_data_set_by_name_gives_its_metrics_under_the_trainers_names(metric: str | None, tmp_path: Path) -> None:
    callback = WeightInterpolation([0.0, 0.5], metric=metric, dataset="a")
    saving = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 4, "eval_steps": 4}
    best = {"metric_for_best_model": "eval_a_loss", "load_best_model_at_end": True}
    sets = {"a": tiny.texts(8), "b": tiny.texts(8, seed=5)}
    trainer = run(tmp_path, callback, sets=sets, **saving, **best)
    assert callback.chosen is not None
    assert callback.chosen.metric == min(place.metric for place in callback.places)
    found = trainer.evaluate()
    assert found["eval_a_loss"] == callback.chosen.metric != found["eval_b_loss"]


class Heard(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.evaluations = 0

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.evaluations += 1


def test_the_metric_of_generated_text_is_that_of_evaluate_and_nobody_hears_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 49}
    model = T5ForConditionalGeneration(T5Config(**size, **tokens))
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"][:4]} for row in tiny.texts(8)]
    defaults = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "log_level": "error", "max_steps": 2}
    args = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, generation_max_length=7, save_strategy="no", **defaults
    )
    callback, heard = WeightInterpolation([1.0], metric="width", greater_is_better=False), Heard()

    def width(prediction: Any) -> dict[str, float]:
        return {"width": float((prediction.predictions > 0).sum(1).max())}  # padded with 0 up to 20

    def made(tuned: Any, callbacks: list[Any]) -> Seq2SeqTrainer:
        return Seq2SeqTrainer(
            tuned, args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks, compute_metrics=width
        )

    untold = made(copy.deepcopy(model), [])
    with pytest.warns(UserWarning, match="model-agnostic default `max_length`"):
        loop = untold.evaluation_loop(untold.get_eval_dataloader(), "", metric_key_prefix="eval")
    assert loop.metrics is not None
    assert loop.metrics["eval_width"] > 7, "the arguments must matter"
    trainer = made(model, [callback, heard])
    attach(trainer)
    trainer.train()
    assert heard.evaluations == 0
    assert not [entry for entry in trainer.state.log_history if "eval_width" in entry]
    assert [place.metric for place in callback.places] == [trainer.evaluate()["eval_width"]]
    assert callback.places[0].metric <= 7
    assert heard.evaluations == 1
    assert [entry for entry in trainer.state.log_history if "eval_width" in entry]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_leaves_the_tuned_weights(value: float, tmp_path: Path) -> None:
    plain = tiny.bert()
    trained(tmp_path / "plain", None, plain)
    callback = WeightInterpolation([0.0, 0.5], metric="wer")
    with pytest.warns(NoEffectWarning, match=r"is (nan|inf) at every place .*; the model keeps its tuned weights"):
        trainer = run(tmp_path, callback, lambda prediction: {"wer": value})
    assert trainer.model is not None
    assert not tiny.moved(tiny.state(plain), tiny.state(trainer.model))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    recipe = json.loads((tmp_path / "recipe.json").read_text(), parse_constant=refuse)
    facts = recipe["methods"]["WeightInterpolation"]
    assert facts["alpha"] == 1
    assert [place["metric"] for place in facts["curve"]] == [None] * 3
    (event,) = events.read(trainer.state.log_history, "interpolation")
    assert event["curve"] == facts["curve"]


def test_an_unknown_metric_is_refused_at_the_first_evaluation(tmp_path: Path) -> None:
    callback = WeightInterpolation(metric="f1")
    with pytest.raises(ValueError, match=r"gives no `eval_f1`; it gives .*eval_wer"):
        run(tmp_path, callback, errors, eval_strategy="steps", eval_steps=4)
    assert callback.trainer is not None
    assert callback.trainer.state.global_step == 4
    other = WeightInterpolation([1.0], metric="wer", dataset=tiny.texts(8))  # the evaluations are of other data sets
    run(tmp_path, other, errors, eval_strategy="steps", eval_steps=4, sets={"a": tiny.texts(8), "b": tiny.texts(8)})
    assert other.chosen is not None


def test_an_unknown_metric_after_the_training_leaves_the_tuned_weights_and_loses_nothing(tmp_path: Path) -> None:
    plain = tiny.bert()
    trained(tmp_path / "plain", None, plain)
    callback = WeightInterpolation(metric="f1")
    with pytest.warns(NoEffectWarning, match=r"gives no `eval_f1`; it gives .*eval_wer.* keeps its tuned weights"):
        trainer = run(tmp_path, callback, errors)
    assert trainer.model is not None
    assert not tiny.moved(tiny.state(plain), tiny.state(trainer.model))
    assert callback.chosen is None
    assert json.loads((tmp_path / "recipe.json").read_text())["methods"]["WeightInterpolation"]["curve"] == []
    trainer.evaluate()  # outside a training it is nobody's business
