"""The source task by its own head and re-probed: the first sees what moved, the second what is gone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
)

from tests import tiny
from tests.forgetting.memory import sureness
from tl_callbacks import ForgettingMonitor, SourceTask, attach, group_layers
from tl_callbacks.forgetting.readings import Reading
from tl_callbacks.probing import ridge_probe


class Net(nn.Module):
    """Two layers and a head, of points in four clusters."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.below = nn.Linear(6, 12)
        self.above = nn.Linear(12, 12)
        self.head = nn.Linear(12, classes)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.above(torch.relu(self.below(x))))
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = nn.functional.cross_entropy(logits, labels)
        return found


def points(count: int = 200, *, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    x = 1.5 * torch.eye(6)[labels] + 0.5 * torch.randn(count, 6, generator=generator)
    return [{"x": row, "labels": int(label)} for row, label in zip(x, labels, strict=True)]


@pytest.fixture(scope="module")
def pretrained() -> Net:
    torch.manual_seed(0)
    model, rows = Net(), points(seed=1)
    x, labels = torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        model(x, labels)["loss"].backward()
        optimizer.step()
    return model.eval()


def read(measure: SourceTask, model: Any, folder: Path, **options: Any) -> dict[str, Reading]:
    trainer = Trainer(model, tiny.arguments(folder, **options))
    assert measure.findings(trainer) == []
    return measure.score(measure.read(model, group_layers(model), base=True, rank=0, ranks=1).sorted())


def test_the_values_are_those_of_the_model_and_of_a_probe_by_hand(pretrained: Net, tmp_path: Path) -> None:
    rows = points()
    found = read(SourceTask(rows), pretrained, tmp_path, per_device_eval_batch_size=7)
    x, labels = torch.stack([row["x"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    with torch.no_grad():
        logits, features = pretrained(x)["logits"], pretrained.above(torch.relu(pretrained.below(x)))
    assert found["source"].value == float((logits.argmax(1) == labels).double().mean())
    assert found["source"].value > 0.9
    assert found["source_reprobed"].value == pytest.approx(ridge_probe(features, labels).value, abs=1e-9)
    assert found["source"].chance == 0.25


def test_features_that_moved_are_lost_to_the_head_alone(pretrained: Net, tmp_path: Path) -> None:
    before = read(SourceTask(points()), pretrained, tmp_path)
    turned, emptied = copy.deepcopy(pretrained), copy.deepcopy(pretrained)
    with torch.no_grad():
        rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q
        turned.above.weight.copy_(rotation @ turned.above.weight)
        turned.above.bias.copy_(rotation @ turned.above.bias)
        emptied.above.weight.zero_()
    moved, gone = (read(SourceTask(points()), model, tmp_path) for model in (turned, emptied))
    assert moved["source"].value < before["source"].value - 0.3
    assert moved["source_reprobed"].value == pytest.approx(before["source_reprobed"].value, abs=0.03)
    assert gone["source_reprobed"].value <= 0.3


def test_the_old_head_stands_in_for_a_new_one(pretrained: Net, tmp_path: Path) -> None:
    expected = read(SourceTask(points()), pretrained, tmp_path)
    torch.manual_seed(1)
    new = Net(classes=7)
    new.load_state_dict({k: v for k, v in pretrained.state_dict().items() if "head" not in k}, strict=False)
    found = read(SourceTask(points(), head=copy.deepcopy(pretrained.head)), new, tmp_path)
    for name in ("source", "source_reprobed"):
        assert torch.equal(found[name].sums, expected[name].sums)
    assert read(SourceTask(points()), new, tmp_path)["source"].value < 0.6, "the new head does not know the task"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in new.modules())
    assert new(torch.zeros(1, 6))["logits"].shape == (1, 7)
    trainer = Trainer(new, tiny.arguments(tmp_path))
    (finding,) = SourceTask(points(), head=new.head).findings(trainer)
    assert "would train with it. Give a copy" in finding


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
LABELLED = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0}

HEADS: dict[str, tuple[Any, Any]] = {
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**LABELLED, **SMALL)),
        lambda old: old.classifier,
    ),
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**LABELLED, **SMALL)),
        lambda old: old.classifier,
    ),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(**LABELLED, dim=16, n_layers=1, n_heads=2, hidden_dim=24)
        ),
        lambda old: nn.Sequential(old.pre_classifier, nn.ReLU(), old.classifier),
    ),
    "deberta v2": (
        lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**LABELLED, **SMALL)),
        lambda old: nn.Sequential(old.pooler, old.classifier),
    ),
    "modernbert": (
        lambda: ModernBertForSequenceClassification(
            ModernBertConfig(**LABELLED, **SMALL, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
        ),
        lambda old: nn.Sequential(old.head, old.classifier),
    ),
    "llama": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**LABELLED, **SMALL, num_key_value_heads=2)),
        lambda old: old.score,
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_an_old_head_of_one_module_or_of_several(name: str, tmp_path: Path) -> None:
    make, head_of = HEADS[name]
    torch.manual_seed(0)
    model, rows = make().eval(), tiny.texts(30, seed=4)
    head = copy.deepcopy(head_of(model))
    expected = read(SourceTask(rows, score=sureness), model, tmp_path)
    with torch.no_grad():
        for group in group_layers(model):
            if group.name == group_layers(model).head:
                for parameter in group.parameters:
                    model.get_parameter(parameter).normal_(generator=torch.Generator().manual_seed(1))
    found = read(SourceTask(rows, head=head, score=sureness), model, tmp_path)
    for value in ("source", "source_reprobed"):
        assert torch.allclose(found[value].sums, expected[value].sums, atol=1e-6), value
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    own = read(SourceTask(rows, score=sureness), model, tmp_path)
    assert not torch.allclose(own["source"].sums, expected["source"].sums, atol=0.05), "the head that stands there now"
    assert torch.equal(own["source_reprobed"].sums, expected["source_reprobed"].sums), "a probe sees no head at all"


def test_the_last_of_several_modules_is_not_taken_for_the_whole_head(tmp_path: Path) -> None:
    make, _ = HEADS["distilbert"]
    model, rows = make().eval(), tiny.texts(12)
    last = copy.deepcopy(model.classifier)
    with pytest.raises(
        ValueError, match=r"head is `pre_classifier`, `classifier`, one upon the other, and `head` is one"
    ):
        read(SourceTask(rows, head=last, score=sureness), model, tmp_path)
    assert "source" in read(SourceTask(rows, head=nn.Sequential(last), score=sureness), model, tmp_path)


class SideBySide(Net):
    """Two heads, each of which is given the features."""

    def __init__(self) -> None:
        super().__init__()
        self.other_head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.above(torch.relu(self.below(x)))
        return {"logits": self.head(hidden), "others": self.other_head(hidden)}


def test_a_head_of_modules_side_by_side_is_not_replaced(tmp_path: Path) -> None:
    model = SideBySide()
    groups = group_layers(model, patterns={"below": "below", "above": "above", "head": "*head"})
    measure = SourceTask(points(20), head=nn.Sequential(nn.Linear(12, 4)))
    assert measure.findings(Trainer(model, tiny.arguments(tmp_path))) == []
    with pytest.raises(ValueError, match="head group is `head`, `other_head`, which do not follow one upon the other"):
        measure.read(model, groups, base=True, rank=0, ranks=1)


def test_a_head_in_another_dtype_than_the_model(pretrained: Net, tmp_path: Path) -> None:
    rows, head = tiny.texts(30, seed=4), nn.Linear(16, 3)
    expected = read(SourceTask(rows, head=head, score=sureness), tiny.bert(), tmp_path)["source"]
    found = read(SourceTask(rows, head=head, score=sureness), tiny.bert().to(torch.bfloat16), tmp_path)["source"]
    assert found.value == pytest.approx(expected.value, abs=0.01)


def test_old_classes_of_a_head_that_has_more(pretrained: Net, tmp_path: Path) -> None:
    rows = [row for row in points() if row["labels"] < 2]
    biased = copy.deepcopy(pretrained)
    with torch.no_grad():
        biased.head.bias[3] += 100
    assert read(SourceTask(rows), biased, tmp_path)["source"].value == 0
    assert read(SourceTask(rows, classes=[0, 1]), biased, tmp_path)["source"].value > 0.9
    right = lambda logits, labels: (logits.argmax(1) == labels).double()  # noqa: E731
    assert read(SourceTask(rows, score=right), biased, tmp_path)["source"].value == 0
    assert read(SourceTask(rows, score=right, classes=[0, 1]), biased, tmp_path)["source"].value > 0.9
    with pytest.raises(ValueError, match="`classes` has 9 and the head gives 4 logits; expected numbers from 0 to 3"):
        read(SourceTask(rows, classes=[0, 9]), biased, tmp_path)
    with pytest.raises(ValueError, match=r"`classes` are \[0, -1\]; expected two or more numbers from 0"):
        SourceTask(rows, classes=[0, -1])


def test_a_score_of_ones_own_and_rows_without_labels(pretrained: Net, tmp_path: Path) -> None:
    rows = points()
    sure = lambda logits, labels: logits.softmax(1)[torch.arange(len(labels)), labels]  # noqa: E731
    found = read(SourceTask(rows, score=sure), pretrained, tmp_path)["source"]
    assert 0.5 < found.value < 1
    missing = [{**row, "labels": -100 if number < 50 else row["labels"]} for number, row in enumerate(rows)]
    some = read(SourceTask(missing), pretrained, tmp_path)
    assert some["source"].weights.tolist() == some["source_reprobed"].weights.tolist() == [0.0] * 50 + [1.0] * 150
    with pytest.raises(ValueError, match="the rows have no labels"):
        read(SourceTask([{"x": row["x"]} for row in rows]), pretrained, tmp_path)
    with pytest.raises(ValueError, match="are no classes of logits"):
        read(SourceTask([{"x": row["x"], "labels": 0.5} for row in rows]), pretrained, tmp_path)
    with pytest.raises(ValueError, match=r"`classes` are \[1\]"):
        SourceTask(rows, classes=[1])


def test_labels_that_are_true_or_false_and_words(pretrained: Net, tmp_path: Path) -> None:
    rows = points()
    upper = [{**row, "labels": row["labels"] > 1} for row in rows]
    numbers = [{**row, "labels": int(row["labels"] > 1)} for row in rows]
    flags = lambda rows: {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}  # noqa: E731
    expected = read(SourceTask(numbers), pretrained, tmp_path)
    found = read(SourceTask(upper, collate=flags), pretrained, tmp_path)
    for name in ("source", "source_reprobed"):
        assert torch.equal(found[name].sums, expected[name].sums)
        assert found[name].chance == 0.5
    trainer = Trainer(pretrained, tiny.arguments(tmp_path))
    (finding,) = SourceTask([{"x": row["x"], "label": "abcd"[row["labels"]]} for row in rows]).findings(trainer)
    assert "the labels are words, such as 'a'; expected the numbers of the classes" in finding
    given = SourceTask([{**row, "labels": "abcd"[row["labels"]]} for row in rows], collate=flags)
    assert given.findings(trainer) == [], "a collator may know what to make of them"


@pytest.mark.parametrize(
    ("score", "got"),
    [
        (lambda logits, labels: torch.tensor(0.5), r"shape \(\)"),
        (lambda logits, labels: 0.5, "type float"),
        (lambda logits, labels: torch.ones(3), r"shape \(3,\)"),
        (lambda logits, labels: torch.ones(len(labels), 1), r"shape \(8, 1\)"),
    ],
)
def test_a_score_that_is_not_one_number_a_row(score: Any, got: str, pretrained: Net, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`score` gives a value of {got} for 8 rows; expected a tensor of shape"):
        read(SourceTask(points(20), score=score), pretrained, tmp_path)


class Tagger(nn.Module):
    """A class for each token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.below(input_ids))}


def test_what_cannot_be_probed_is_said_once(pretrained: Net, tmp_path: Path, capsys: Any) -> None:
    near = lambda logits, labels: 1 / (1 + (logits[:, :1] - labels.reshape(len(labels), -1)).square().sum(1))  # noqa: E731
    rows = points(40)
    tagged = [{**row, "labels": [row["labels"], 2, -100, 1, 1, 7, 2, 2]} for row in tiny.texts(12)]
    cases: dict[str, tuple[Any, SourceTask, str]] = {
        "numbers": (pretrained, SourceTask([{**row, "labels": 0.5} for row in rows], score=near), "are numbers, no"),
        "several": (
            pretrained,
            SourceTask([{**row, "labels": [0.0, 1.0]} for row in rows], score=near),
            "have several",
        ),
        "tokens": (Tagger(), SourceTask(tagged), "have several labels, as of tokens; expected a class a row"),
        "few": (pretrained, SourceTask(rows[:5]), "5 of its rows have a label; expected 6 or more"),
        "one": (pretrained, SourceTask([{**row, "labels": 0} for row in rows]), "all its labels are equal"),
        "none": (pretrained, SourceTask(rows), ""),
    }
    for name, (model, measure, why) in cases.items():
        found = read(measure, model, tmp_path)
        assert ("source_reprobed" in found) == (not why), name
        assert why in measure.unmeasured.get("source_reprobed", ""), name
        assert bool(measure.unmeasured) == bool(why), name
        assert measure.definitions["source_reprobed"].startswith("not measured: " if why else "accuracy"), name
        if name == "tokens":
            assert found["source"].weights.tolist() == [7.0] * 12
            assert found["source"].chance == pytest.approx((3 * 12 + 4) / 84), "class 2; it never answers 7"
    monitor = ForgettingMonitor(SourceTask([{**row, "labels": 0.5} for row in rows], score=near))
    trainer = Trainer(pretrained, tiny.arguments(tmp_path, max_steps=1), train_dataset=rows, callbacks=[monitor])
    attach(trainer)
    trainer.train()
    assert capsys.readouterr().out.count("no source_reprobed (its labels are numbers, no classes)") == 1
    assert "not measured: " in monitor.facts()["measures"]["source_reprobed"]["measures"]


def test_each_rank_reads_a_share_and_together_they_read_all(pretrained: Net, tmp_path: Path) -> None:
    measure = SourceTask(points(50))
    whole = read(measure, pretrained, tmp_path)["source"]
    groups = group_layers(pretrained)
    parts = [measure.read(pretrained, groups, base=True, rank=rank, ranks=4) for rank in range(4)]
    assert sorted(torch.cat([part.places for part in parts]).tolist()) == list(range(50)), "each row once"
    sums = torch.zeros(50, dtype=torch.float64)
    for part in parts:
        sums[part.places] = part.features["hits"][:, 0]
    assert torch.equal(sums, whole.sums)


@pytest.mark.parametrize("own", [True, False])
def test_adapters_with_a_head_of_their_own(own: bool, tmp_path: Path) -> None:
    rows, plain = tiny.texts(30, seed=4), tiny.bert()
    old = nn.Linear(16, 3)
    expected = read(SourceTask(rows, head=None if own else old, score=sureness), plain, tmp_path)
    torch.manual_seed(1)
    model = get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias.add_(torch.tensor([9.0, 0, 0]))
    trainer = Trainer(model, tiny.arguments(tmp_path))
    measure, groups = SourceTask(rows, head=None if own else old, score=sureness), group_layers(model)
    assert measure.findings(trainer) == []
    with model.disable_adapter():
        off = measure.score(measure.read(model, groups, base=True, rank=0, ranks=1).sorted())
    on = measure.score(measure.read(model, groups, base=False, rank=0, ranks=1).sorted())
    for found in (off, on) if not own else (off,):
        for name in ("source", "source_reprobed"):
            assert torch.allclose(found[name].sums, expected[name].sums, atol=1e-6), name
    if own:
        assert not torch.allclose(on["source"].sums, expected["source"].sums, atol=0.1), "the head that trains"
