"""ForgettingMonitor in a Trainer: the baseline, what it logs, what it leaves as it was, and min_retention."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer

import hub_cards
from tests import tiny
from tests.forgetting.models import llama, sentences, tokenizer
from tests.forgetting.test_language import by_hand
from tests.forgetting.test_source_task import Net, points
from tl_callbacks import (
    ForgettingMonitor,
    LanguageModelling,
    PreflightError,
    PreflightWarning,
    RepresentationProbes,
    Retrieval,
    SourceTask,
    attach,
    events,
)

SCHEMA = json.loads((Path(hub_cards.__file__).parent / "run.schema.json").read_text())
MONITOR = SCHEMA["properties"]["methods"]["properties"]["ForgettingMonitor"]
EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
SAVING = {**EVALUATION, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
PAIRS = [(text, f"{text} w9") for text in sentences(20)]


def words(count: int = 24, *, seed: int = 5) -> list[dict[str, Any]]:
    """Rows that a language model is trained on."""
    ids = torch.randint(5, 9, (count, 8), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def make(folder: Path, monitor: Any, *, model: Any = None, callbacks: Any = (), **options: Any) -> Trainer:
    args = tiny.arguments(folder, **{**EVALUATION, **options})
    rows = words()
    return Trainer(
        llama() if model is None else model, args, train_dataset=rows, eval_dataset=rows[:8],
        processing_class=tokenizer(), callbacks=[monitor, *callbacks],
    )  # fmt: skip


def trained(folder: Path, monitor: Any, **options: Any) -> Trainer:
    trainer = make(folder, monitor, **options)
    attach(trainer)
    trainer.train()
    return trainer


def logged(trainer: Trainer) -> dict[int, dict[str, float]]:
    """What was logged, by step."""
    return {
        entry["step"]: {key: value for key, value in entry.items() if key.startswith("tl/")}
        for entry in trainer.state.log_history
        if any(key.startswith("tl/forgetting/") for key in entry)
    }


def test_every_measure_at_every_evaluation_against_the_pretrained_model(tmp_path: Path) -> None:
    texts = sentences()
    monitor = ForgettingMonitor([LanguageModelling(texts), Retrieval(PAIRS)])
    trainer = trained(tmp_path, monitor, learning_rate=5e-2)
    found = logged(trainer)
    assert list(found) == [2, 4, 6]
    nats, tokens = by_hand(llama(), texts)
    now = by_hand(trainer.model, texts)
    assert found[6]["tl/forgetting/language"] == pytest.approx((now[0] - nats) / tokens, abs=1e-5)
    assert found[6]["tl/retention/language"] == pytest.approx(math.exp((nats - now[0]) / tokens), rel=1e-5)
    assert found[6]["tl/forgetting/language"] > 0.1, "the control must move"
    assert found[6]["tl/forgetting/language_kl"] > found[2]["tl/forgetting/language_kl"] > 0
    names = ("language", "language_kl", "retrieval")
    assert set(found[4]) == {
        *(f"tl/forgetting/{name}" for name in names), *(f"tl/forgetting/{name}_se" for name in names),
        "tl/retention/language", "tl/retention/retrieval", "tl/retention",
    }  # fmt: skip
    assert found[4]["tl/retention"] == min(found[4]["tl/retention/language"], found[4]["tl/retention/retrieval"])
    (event,) = events.read(trainer.state.log_history, "forgetting")
    assert event["step"] == 0
    assert event["baseline"]["language"] == pytest.approx(nats / tokens, abs=1e-6)
    assert len(event["start"]) == 64
    facts = json.loads((tmp_path / "recipe.json").read_text())["methods"]["ForgettingMonitor"]
    rows = facts["measures"]
    assert {*rows} == {*names}
    for name, row in rows.items():
        assert row["retention"] == found[6].get(f"tl/retention/{name}")
        assert (row["forgetting"], row["standard_error"]) == tuple(
            found[6][f"tl/forgetting/{name}{e}"] for e in ("", "_se")
        )
        assert row["before"] == event["baseline"].get(name, 0.0)
    assert rows["language"]["after"] == pytest.approx(now[0] / tokens, abs=1e-5)
    assert rows["language"]["measures"].startswith("cross-entropy of held-out text, nats a token")
    assert facts["retention"] == found[6]["tl/retention"]
    jsonschema.validate(facts, MONITOR)
    running = ForgettingMonitor(LanguageModelling(texts)).facts()
    jsonschema.validate(running, MONITOR)
    assert (running["retention"], running["satisfied"]) == (None, None)
    assert (facts["min_retention"], facts["satisfied"], facts["weights_of_step"]) == (None, True, 6)
    assert facts["rows"] == {"language": 12, "retrieval": 20}


def test_head_drift_and_loss_stand_side_by_side(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows = Net(), points(seed=1)
    args = tiny.arguments(tmp_path, max_steps=150, per_device_train_batch_size=16)
    Trainer(model, args, train_dataset=rows).train()
    flipped = [{**row, "labels": 3 - row["labels"]} for row in rows]
    args = tiny.arguments(tmp_path, max_steps=60, per_device_train_batch_size=16, learning_rate=3e-2)
    trainer = Trainer(model, args, train_dataset=flipped, callbacks=[ForgettingMonitor(SourceTask(points()))])
    attach(trainer)
    trainer.train()
    (found,) = logged(trainer).values()
    assert found["tl/retention/source"] < 0.3, "the head answers another question now"
    assert found["tl/retention/source_reprobed"] > 0.9, "the features are there"
    assert found["tl/retention"] == found["tl/retention/source"]


ADAPTERS: dict[str, Any] = {
    "LoRA": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    "LoRA that is no identity": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
    "soft prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PiSSA": LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights="pissa"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_baseline_of_adapters_is_the_model_without_them(name: str, tmp_path: Path) -> None:
    nats, tokens = by_hand(llama(), sentences())
    torch.manual_seed(1)
    model = get_peft_model(llama(), ADAPTERS[name])
    start = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = make(tmp_path, ForgettingMonitor(LanguageModelling(sentences())), model=model, learning_rate=1e-12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(trainer)
    assert any("have rewritten the weights below" in str(warning.message) for warning in caught) is (name == "PiSSA")
    trainer.train()
    (event,) = events.read(trainer.state.log_history, "forgetting")
    assert event["baseline"]["language"] == pytest.approx(nats / tokens, abs=2e-6)
    found = logged(trainer)[6]
    identity = name in ("LoRA", "PiSSA")
    assert (abs(found["tl/forgetting/language"]) < 1e-4) is identity, "what is no identity has moved at once"
    assert (found["tl/forgetting/language_kl"] < 1e-6) is identity
    for key, value in model.state_dict().items():
        assert torch.allclose(value, start[key], atol=1e-6), key
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n or "prompt" in n)


def test_a_model_made_anew_has_a_baseline_of_its_own(tmp_path: Path) -> None:
    seeds = iter([1, 2])
    args = tiny.arguments(tmp_path, **EVALUATION, learning_rate=1e-12)
    trainer = Trainer(
        args=args, model_init=lambda: llama(seed=next(seeds)), train_dataset=words(), eval_dataset=words()[:8],
        processing_class=tokenizer(), callbacks=[ForgettingMonitor(LanguageModelling(sentences()))],
    )  # fmt: skip
    attach(trainer)
    trainer.train()
    assert abs(logged(trainer)[6]["tl/forgetting/language"]) < 1e-5


def test_several_evaluation_sets_and_evaluations_around_the_training(tmp_path: Path) -> None:
    monitor = ForgettingMonitor(LanguageModelling(sentences()))
    trainer = make(tmp_path, monitor, eval_on_start=True)
    trainer.eval_dataset = {"one": words(6, seed=1), "two": words(6, seed=2)}  # type: ignore[assignment]
    attach(trainer)
    assert trainer.evaluate()["eval_retention"] == 1.0
    trainer.train()
    assert list(logged(trainer)) == [0, 2, 4, 6]
    count = len(trainer.state.log_history)
    (end,) = events.read(trainer.state.log_history, "forgetting_end")
    assert end["values"] == logged(trainer)[6]
    assert trainer.evaluate()["eval_retention"] == logged(trainer)[6]["tl/retention"]
    assert not any("tl/retention" in entry for entry in trainer.state.log_history[count:]), "of no step of the training"
    assert trainer.model is not None
    trainer.model.load_state_dict(llama().state_dict())
    assert trainer.evaluate()["eval_retention"] == pytest.approx(1.0), "of the weights as they are"
    tested = trainer.evaluate(words(), metric_key_prefix="test")
    assert (tested["test_retention"], "eval_retention" in tested) == (pytest.approx(1.0), False)
    assert monitor.changes(trainer.model)["language"].forgetting == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_its_passes_are_not_taken_for_the_trainers_evaluation(
    first: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(*callbacks: Any) -> dict[str, float]:
        trainer = make(tmp_path, *callbacks[:1], callbacks=callbacks[1:])
        attach(trainer)
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "tl/cka/layers.1" in entry and entry["step"] == 6]
        return {key: value for key, value in entries[0].items() if key.startswith("tl/cka")}

    monitor, probes = ForgettingMonitor(LanguageModelling(sentences())), RepresentationProbes("eval")
    expected = found(RepresentationProbes("eval"))
    assert found(*((monitor, probes) if first else (probes, monitor))) == expected
    assert "in a pass of its own" not in capsys.readouterr().out
    found(RepresentationProbes(words()))
    assert "in a pass of its own" in capsys.readouterr().out, "the control: what the probes say of another set"


def test_a_measure_that_the_pretrained_model_cannot_do_is_named(tmp_path: Path) -> None:
    shuffled = list(zip(sentences(20), sentences(20, seed=9), strict=True))
    with pytest.warns(
        UserWarning, match=r"`retrieval` is 0\.\d+ in the pretrained model, no better than chance \(0.050"
    ):
        attach(make(tmp_path, ForgettingMonitor(Retrieval(shuffled))))


def test_no_share_of_nothing_can_be_asked_for(tmp_path: Path) -> None:
    model, rows = Net(), points()
    with torch.no_grad():
        model.head.bias[0] += 100
    hopeless = SourceTask([{**row, "labels": 3} for row in rows], name="hopeless")

    def attached(least: float | None) -> ForgettingMonitor:
        monitor = ForgettingMonitor([hopeless, SourceTask(rows)], min_retention=least)
        attach(Trainer(model, tiny.arguments(tmp_path), train_dataset=rows, callbacks=[monitor]))
        return monitor

    with pytest.warns(UserWarning, match="no better than chance"):
        free = attached(None)
    assert free.retention() == 1, "of the other measure"
    with (
        pytest.warns(),
        pytest.raises(ValueError, match=r"in every measure, and `hopeless` is 0 there. Give rows that it can do"),
    ):
        attached(0.9)


def test_what_is_refused(tmp_path: Path) -> None:
    measure = LanguageModelling(sentences())
    with pytest.raises(ValueError, match="there is nothing to measure"):
        ForgettingMonitor([])
    with pytest.raises(ValueError, match="two measures are called `language`"):
        ForgettingMonitor([measure, LanguageModelling(sentences())])
    with pytest.raises(ValueError, match="`min_retention` is 0"):
        ForgettingMonitor(measure, min_retention=0)
    with pytest.raises(TypeError, match=r"expected measures, such as LanguageModelling\(texts\), got 'language'"):
        ForgettingMonitor(["language"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="expected measures, such as"):
        ForgettingMonitor("language")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Call attach"):
        make(tmp_path, ForgettingMonitor(measure)).train()
    with pytest.raises(RuntimeError, match="Call attach"):
        ForgettingMonitor(measure).changes(llama())
    with pytest.raises(RuntimeError, match="Call attach"):
        ForgettingMonitor(measure).retention()
    with pytest.raises(PreflightError, match="several ForgettingMonitor"):
        attach(make(tmp_path, ForgettingMonitor(measure), callbacks=[ForgettingMonitor(measure)]))
    model = llama()
    model.config._name_or_path = "run/checkpoint-40"
    with pytest.raises(PreflightError, match=r"would take the model of `run/checkpoint-40` for .* give its fold"):
        attach(make(tmp_path, ForgettingMonitor(measure), model=model))
    model.config._name_or_path = "run/base"
    attach(make(tmp_path, ForgettingMonitor(measure), model=model))
    trainer = make(tmp_path, ForgettingMonitor(measure))
    trainer.processing_class = None
    with pytest.raises(PreflightError, match="language: the rows are texts and there is no tokenizer"):
        attach(trainer)
    with pytest.raises(ValueError, match="`language` is nan in the pretrained model: nothing in its rows counts"):
        attach(make(tmp_path, ForgettingMonitor(LanguageModelling(["w5", "w6"]))))
    with pytest.warns(PreflightWarning, match="the Trainer looks for no best one: set load_best_model_at_end=True"):
        attach(make(tmp_path, ForgettingMonitor(measure, min_retention=0.9)))
