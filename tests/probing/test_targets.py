"""Labels of every kind: what probes make of them, and what a person is told where there is no probe."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from tests import tiny
from tl_callbacks import RepresentationProbes, attach, probe_model, rank_models
from tl_callbacks.probing import ridge_probe
from tl_callbacks.probing.measures import measure
from tl_callbacks.probing.targets import as_targets, labels_in, why_no_probe
from tl_callbacks.probing.transferability import log_me

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16,
}  # fmt: skip


def rows(label: Any, count: int = 24) -> list[dict[str, Any]]:
    texts = tiny.texts(count)
    return [
        {"input_ids": row["input_ids"], "labels": label(place, row["input_ids"])} for place, row in enumerate(texts)
    ]


def several(count: int = 200) -> tuple[Tensor, Tensor]:
    """Features, and three labels a row: two that a line tells, and one that is never given."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    return x, torch.stack([x[:, 0] > 0, x[:, 1] + x[:, 2] > 1, torch.zeros(count)], dim=1).float()


def test_several_labels_a_row_are_the_mean_of_a_probe_each() -> None:
    x, labels = several()
    found = measure({"layer": x}, labels, shuffled=True, log_me=True)
    alone = [ridge_probe(x, labels[:, column].long()) for column in (0, 1)]
    values = {kind: found[kind]["layer"] for kind in found}
    assert values["probe"] == pytest.approx(sum(one.value for one in alone) / 2, abs=0.03), "other folds"
    assert values["probe_se"] == pytest.approx(sum(one.error for one in alone) / 2, rel=0.3)
    assert values["probe_chance"] == pytest.approx(sum(one.chance for one in alone) / 2)
    assert values["probe_shuffled"] < values["probe_chance"] + 0.05 < values["probe"] - 0.05
    assert values["log_me"] == pytest.approx(sum(log_me(x, labels[:, c].long()) for c in (0, 1)) / 2)
    one = measure({"layer": x}, labels[:, 0].long())["probe"]["layer"]
    assert measure({"layer": x}, labels[:, :1])["probe"]["layer"] == pytest.approx(one, abs=0.03)


def test_several_values_a_row_are_the_mean_of_their_r_squared() -> None:
    x, _ = several()
    values = torch.stack([x @ torch.ones(6), torch.randn(200, generator=torch.Generator().manual_seed(1))], dim=1)
    assert measure({"layer": x}, values)["probe"]["layer"] == pytest.approx(0.5, abs=0.06)
    values[3, 1] = torch.nan
    targets, kept = as_targets(values) or ({}, torch.empty(0))
    assert [list(targets), int(kept.sum()), bool(kept[3])] == [["0", "1"], 199, False]
    assert math.isfinite(measure({"layer": x}, values)["probe"]["layer"])


def test_truth_values_are_two_classes() -> None:
    x, labels = several()
    truth = labels[:, 0] > 0
    assert measure({"layer": x}, truth)["probe"]["layer"] == measure({"layer": x}, truth.long())["probe"]["layer"] > 0.8


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ({"labels": torch.zeros(4, 7, dtype=torch.long)}, r"\(4, 7\) integers a batch, as of tokens; expected one a"),
        ({"labels": torch.zeros(4, 7, 7)}, r"\(4, 7, 7\) numbers a batch"),
        ({"labels": ["a", "b"]}, "no labels; expected numbers under `labels` or `label`"),
        ({"input_ids": torch.zeros(4, 7)}, "no labels"),
        ((torch.zeros(4, 7), torch.zeros(4)), "no labels"),
        ({"start": torch.zeros(4), "end": torch.zeros(4)}, r"several labels \(start, end\); expected one"),
    ],
)
def test_labels_that_no_probe_takes_have_a_reason(batch: Any, why: str) -> None:
    found, reason = labels_in(batch, ("start", "end"))
    assert found is None
    assert re.search(why, reason)
    assert why_no_probe(found, reason) == reason


def test_labels_that_a_probe_takes() -> None:
    column, both = torch.tensor([[1.0], [2.0]]), {"start": torch.zeros(4), "labels": torch.arange(4)}
    assert labels_in({"label": column}, ())[0].tolist() == [1.0, 2.0]  # type: ignore[union-attr]
    assert labels_in(both, ("start",))[0] is both["start"]
    assert labels_in({"labels": torch.zeros(2, 3)}, ())[0].shape == (2, 3)  # type: ignore[union-attr]
    assert why_no_probe(torch.tensor([0, 0, 0, 1, 1, 1]), "") == ""
    assert why_no_probe(torch.tensor([0, 0, 1, 1, 1, -100]), "") == "5 of its rows have a label; expected 6 or more"
    assert why_no_probe(torch.zeros(9, 2), "") == "all its labels are equal"


def _token(place: int, ids: list[int]) -> list[int]:
    return [-100, *(number % 3 for number in ids[1:])]


SILENT: dict[str, tuple[Any, Any, str]] = {
    "tokens": (lambda: BertForTokenClassification(BertConfig(**SMALL, num_labels=3)), _token, "as of tokens"),
    "one class": (lambda: tiny.bert(), lambda place, ids: 1, "all its labels are equal"),
    "sequences": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
        ),
        lambda place, ids: ids,
        "as of tokens",
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_a_person_is_told_once_why_there_is_no_probe(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, label, why = SILENT[name]
    data, probes = rows(label), RepresentationProbes("eval", controls=False)
    args = tiny.arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = Trainer(make(), args, train_dataset=data, eval_dataset=data, callbacks=[probes])
    attach(trainer)
    trainer.train()
    assert capsys.readouterr().out.count("no probe of the probe set: ") == 1
    assert why in probes.facts()["without_probe"]["probe"]
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert any(key.startswith("tl/cka/") for key in logged)
    assert not any(key.startswith("tl/probe") for key in logged)


def test_several_labels_a_row_are_logged(tmp_path: Path) -> None:
    data = rows(lambda place, ids: [float(ids[0] % 2), float(ids[1] % 3 == 0), 1.0])
    model = BertForSequenceClassification(BertConfig(**SMALL, num_labels=3, problem_type="multi_label_classification"))
    probes = RepresentationProbes("eval", controls=False)
    args = tiny.arguments(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[probes])
    attach(trainer)
    trainer.train()
    last = next(entry for entry in trainer.state.log_history if "tl/cka/head" in entry)
    assert 0 < last["tl/probe/head"] < 1
    assert "without_probe" not in probes.facts()


def test_a_head_that_does_not_fit_is_no_hindrance() -> None:
    """A candidate comes with a head of two classes; the data set has seven."""
    model = AutoModelForSequenceClassification.from_config(BertConfig(**SMALL, num_labels=2))
    found = probe_model(model, rows(lambda place, ids: place % 7, 40), controls=False)
    assert math.isfinite(found["head"].probe)
    assert not found.unprobed
    several = probe_model(
        model, rows(lambda place, ids: [float(place % 2), float(place % 3 == 0), 0.0]), controls=False
    )
    assert math.isfinite(several["head"].log_me)


def test_one_of_two_ends_of_an_answer_is_no_class(tmp_path: Path) -> None:
    data = [{**row, "start_positions": place % 4, "end_positions": 5} for place, row in enumerate(tiny.texts(20))]
    data = [{key: value for key, value in row.items() if key != "labels"} for row in data]
    probes = RepresentationProbes("eval", controls=False)
    model = BertForQuestionAnswering(BertConfig(**SMALL))
    trainer = Trainer(model, tiny.arguments(tmp_path), train_dataset=data, eval_dataset=data, callbacks=[probes])
    attach(trainer)
    assert "several labels (start_positions, end_positions)" in probes.facts()["without_probe"]["probe"]


def test_the_table_says_why_there_is_no_probe() -> None:
    model = BertForTokenClassification(BertConfig(**SMALL, num_labels=3))
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    found = probe_model(model, rows(_token), controls=False)
    assert str(found).endswith("24 rows; no probe: " + found.unprobed)
    assert "nan" not in str(found)
    with pytest.raises(ValueError, match=r"no labels to rank by: its labels are \(24, 8\) integers a batch"):
        rank_models({"tokens": model}, rows(_token), controls=False)
    with pytest.raises(ValueError, match="the probe set has no rows; expected some"):
        probe_model(model, [])


def test_a_compiled_model_is_given_what_it_takes() -> None:
    model = tiny.bert()
    plain = probe_model(model, rows(lambda place, ids: place % 2), controls=False)
    compiled: Any = torch.compile(model, backend="eager")
    found = probe_model(compiled, rows(lambda place, ids: place % 2), controls=False)
    assert [row.log_me for row in found] == pytest.approx([row.log_me for row in plain])
