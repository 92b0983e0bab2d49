"""The source task by its own head and re-probed: the first sees what moved, the second what is gone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer

from tests import tiny
from tests.forgetting.memory import sureness
from tl_callbacks import SourceTask, group_layers
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


def test_old_classes_of_a_head_that_has_more(pretrained: Net, tmp_path: Path) -> None:
    rows = [row for row in points() if row["labels"] < 2]
    biased = copy.deepcopy(pretrained)
    with torch.no_grad():
        biased.head.bias[3] += 100
    assert read(SourceTask(rows), biased, tmp_path)["source"].value == 0
    assert read(SourceTask(rows, classes=[0, 1]), biased, tmp_path)["source"].value > 0.9


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
